"""Images in a table with names: reconstructions, traversals, interpolations."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vae_torch.figures.grids import image_grid
from vae_torch.figures.latents import (
    activity,
    most_active,
    posterior_means,
    spherical_interpolation,
    subscript,
    variances,
)
from vae_torch.figures.pictures import as_pictures, decoded_pictures, pictures, shrunk
from vae_torch.figures.plots import import_matplotlib
from vae_torch.images import Batch
from vae_torch.parts.objectives import ACTIVE_UNIT_VARIANCE
from vae_torch.vae import VAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def reconstruction_figure(vae: VAE, x: Tensor) -> "Figure":
    """Originals over reconstructions, with the nats of each reconstruction under it.

    Args:
        vae: The model.
        x: (n, *shape) in [0, 1].

    Returns:
        A figure; its numbers are -log p(x | z) at the posterior mean, in nats.
    """
    logits = vae.decode(vae.encode(x).mean)
    nats = -vae.likelihood.log_prob(x.reshape(-1, *vae.input_shape), logits)
    return image_table(
        shrunk(torch.cat([pictures(vae, x), pictures(vae, vae.likelihood.mean(logits))]), 128),
        rows=["image", "decoded"],
        columns=[f"{number:.0f}" for number in nats.tolist()],
        caption="-log p(x | z) at the posterior mean, nats",
    )


@torch.no_grad()
def traversal_figure(
    vae: VAE,
    x: Tensor,
    labels: Tensor | None = None,
    *,
    steps: int = 11,
    dimensions: int = 40,
    context: int = 1000,
) -> "Figure":
    """One image decoded while one latent moves: a row per active dimension, most active first.

    Args:
        vae: The model.
        x: (N, *shape) in [0, 1]. The first image is decoded; the first `context` images decide
            which dimensions are active and how far each moves.
        labels: (N,) classes, for a conditional model; everything is decoded with the first one.
        steps: Images in a row, from -3 to 3 standard deviations of these means around their mean.
        dimensions: Largest number of rows.
        context: Number of images to encode.
    """
    batch = Batch(x, labels)
    means = posterior_means(vae, *batch.rows(slice(context)))
    spread = variances(means)
    active = [d for d in most_active(means) if spread[d] > ACTIVE_UNIT_VARIANCE]
    shown = active[:dimensions] or most_active(means)[:1]
    ticks = torch.linspace(-3, 3, steps)
    ways = []
    for dim in shown:
        z = means[:1].repeat(steps, 1)
        z[:, dim] = means[:, dim].mean() + ticks * spread[dim].sqrt()
        ways.append(z)
    hidden = f", {len(active) - len(shown)} not shown" if len(active) > len(shown) else ""
    return image_table(
        shrunk(decoded_pictures(vae.of(batch.rows(slice(1))), torch.cat(ways)), 64),
        rows=[f"z{subscript(dim)}" for dim in shown],
        columns=[f"{t:+.1f}".replace("+0.0", "0").replace("-0.0", "0") for t in ticks.tolist()],
        caption=f"standard deviations of the posterior means\n{activity(means)}{hidden}",
    )


@torch.no_grad()
def interpolation_figure(vae: VAE, x: Tensor, *, steps: int = 9) -> "Figure":
    """Interpolate between two images in latent space: in a straight line, and around the origin.

    In many dimensions the prior's mass lies on a shell, which a straight line leaves. The spherical
    interpolation (White, *Sampling Generative Networks* (2016), section 2.1) stays on it. With one
    latent there is only the straight line.

    Args:
        vae: The model.
        x: (2, *shape) in [0, 1], the two ends.
        steps: Images in a row, ends included.

    Raises:
        ValueError: x does not hold two images.
    """
    if len(x) != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; an interpolation has two ends")
    means = posterior_means(vae, x)
    ways = {"straight": torch.lerp(means[0], means[1], torch.linspace(0, 1, steps)[:, None])}
    if vae.latent_dim > 1:
        ways["spherical"] = spherical_interpolation(means[0], means[1], steps=steps)
    start, end = pictures(vae, x).split(1)
    between = [""] * (steps // 2) + ["decoded on the way"] + [""] * (steps - steps // 2 - 1)
    shown = torch.cat([torch.cat([start, decoded_pictures(vae, z), end]) for z in ways.values()])
    return image_table(
        shrunk(shown, 128),
        rows=list(ways),
        columns=["image", *between, "image"],
    )


def image_table(
    images: Tensor, *, rows: Sequence[str], columns: Sequence[str], caption: str = ""
) -> "Figure":
    """Images in a table with names for rows and columns.

    A pixel of a small image takes two by two on the screen, and the text stays readable where
    TensorBoard shows the whole table in 350 pixels.

    Args:
        images: (rows * columns, pixels), (..., H, W), (..., 1, H, W) or (..., 3, H, W) in [0, 1],
            row by row; flat ones must be square.
        rows: A name for each row, on its left.
        columns: A name for each column, under it; empty names take no space.
        caption: One or more lines under the table.
    """
    images = as_pictures(images)
    tall, wide = images.shape[-2:]
    dpi, size = 100, 12  # size: of the text, in points
    scale = 2 if wide < 64 else 1
    gap, letter, line = 2, 0.6 * size * dpi / 72, 1.35 * size * dpi / 72
    # on one axis: many axes are slow
    grid = image_grid(images if images.ndim == 4 else images[:, None], len(columns), gap=gap)
    height, width = (scale * side for side in grid.shape[:2])
    left, right = letter * max(map(len, rows)) + 12, 4.0
    lacking = letter * max(map(len, caption.splitlines()), default=0) - (left + width + right)
    left, right = (side + max(lacking, 0) / 2 for side in (left, right))
    bottom = line * (bool(any(columns)) + len(caption.splitlines())) + 6
    whole = (left + width + right, height + bottom)
    figure = import_matplotlib()(figsize=(whole[0] / dpi, whole[1] / dpi), dpi=dpi)
    axes = figure.add_axes(
        (left / whole[0], bottom / whole[1], width / whole[0], height / whole[1])
    )
    axes.imshow(
        grid.clamp(0, 1).numpy(),
        cmap="gray",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        aspect="auto",
    )
    for place, names, step in (
        (axes.set_xticks, columns, wide + gap),
        (axes.set_yticks, rows, tall + gap),
    ):
        place([gap / 2 + (i + 0.5) * step - 0.5 for i in range(len(names))], names)
    axes.tick_params(length=0, labelsize=size, pad=3)
    axes.spines[:].set_visible(False)
    if caption:
        figure.supxlabel(caption, fontsize=size, y=2 / whole[1], va="bottom")
    return figure
