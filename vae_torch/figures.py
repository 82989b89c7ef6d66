"""Every picture: grids as (H, W) tensors in [0, 1], plots as matplotlib figures.

`save_png` writes either. Nothing here touches pyplot's global state or needs a screen.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vae_torch.checkpoint import write_atomically
from vae_torch.model import VAE

if TYPE_CHECKING:  # half a second that a run without figures need not pay
    from matplotlib.figure import Figure

# Paul Tol's and Okabe-Ito's colours, ordered so that ten classes stay apart for colour-blind eyes.
DIGIT_COLOURS = (
    "#332288",
    "#e69f00",
    "#56b4e9",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#882255",
    "#117733",
    "#999999",
    "#000000",
)


def image_grid(images: Tensor, columns: int, *, gap: int = 2) -> Tensor:
    """Tile images into one, row by row, on white.

    Args:
        images: (N, pixels) or (N, 1, H, W), values in [0, 1]; flat ones must be square.
        columns: Images per row.
        gap: White pixels between them.

    Returns:
        (height, width).
    """
    images = _squares(images)
    n, height, width = images.shape
    rows = -(-n // columns)
    grid = torch.ones(rows * (height + gap) + gap, columns * (width + gap) + gap)
    for i, image in enumerate(images):
        top = gap + i // columns * (height + gap)
        left = gap + i % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


def reconstruction_grid(vae: VAE, x: Tensor) -> Tensor:
    """The notebook's `plot_results`: originals over their reconstructions.

    Args:
        vae: The model.
        x: (n, *shape) in [0, 1]; the notebook shows ten.

    Returns:
        (height, width), two rows of n images.
    """
    n = len(x)
    both = torch.cat([x.reshape(n, -1), vae.reconstruct(x).reshape(n, -1)])
    return image_grid(both, n)


def sample_grid(vae: VAE, *, rows: int = 8, seed: int = 0) -> Tensor:
    """The expected images of rows x rows draws from the prior, the same draws for one seed."""
    device = next(vae.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    return image_grid(vae.sample(rows * rows, generator=generator), rows)


@torch.no_grad()
def manifold_grid(vae: VAE, *, rows: int = 20) -> Tensor:
    """The decoded latent plane, at coordinates that cut the prior into equal masses.

    Kingma and Welling (2013), figure 4: an even grid on the unit square, through the inverse
    Gaussian CDF. The second latent grows upwards.

    Raises:
        ValueError: latent_dim is not 2.
    """
    if vae.latent_dim != 2:
        raise ValueError(f"latent_dim is {vae.latent_dim}; the manifold needs 2")
    weight = next(vae.parameters())
    ticks = torch.special.ndtri((torch.arange(rows) + 0.5) / rows).to(weight)
    up, across = torch.meshgrid(ticks.flip(0), ticks, indexing="ij")
    z = torch.stack([across, up], -1).reshape(-1, 2)  # (rows², 2)
    return image_grid(vae.likelihood.mean(vae.decode(z)), rows, gap=0)


@torch.no_grad()
def latent_scatter(vae: VAE, x: Tensor, labels: Tensor) -> "Figure":
    """Posterior means of images in the latent plane, coloured by class.

    Args:
        vae: A model with latent_dim 2.
        x: (N, *shape) in [0, 1].
        labels: (N,) classes.

    Raises:
        ValueError: latent_dim is not 2.
    """
    from matplotlib.figure import Figure

    if vae.latent_dim != 2:
        raise ValueError(f"latent_dim is {vae.latent_dim}; the scatter needs 2")
    means = vae.encode(x)[0].cpu().numpy()
    classes = labels.cpu().numpy()
    figure = Figure(figsize=(7, 6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for i, digit in enumerate(np.unique(classes)):
        chosen = means[classes == digit]
        colour = DIGIT_COLOURS[i % len(DIGIT_COLOURS)]
        axes.scatter(
            chosen[:, 0], chosen[:, 1], s=4, c=colour, alpha=0.6, linewidths=0, label=str(digit)
        )
    axes.set(xlabel="z₁", ylabel="z₂", title="Posterior means of test images", aspect="equal")
    if len(np.unique(classes)) <= len(DIGIT_COLOURS):
        axes.legend(title="digit", loc="center left", bbox_to_anchor=(1, 0.5), markerscale=4)
    return figure


def to_pixels(picture: "Tensor | Figure") -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 of a grid or a plot."""
    if isinstance(picture, Tensor):
        return (picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_png(picture: "Tensor | Figure | np.ndarray", path: str | Path, *, scale: int = 1) -> None:
    """Write a grid or plot as PNG; `scale` repeats each pixel, for grids of small images."""
    from PIL import Image

    pixels = picture if isinstance(picture, np.ndarray) else to_pixels(picture)
    if scale > 1:
        pixels = pixels.repeat(scale, 0).repeat(scale, 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", optimize=True)
    write_atomically(Path(path), buffer.getvalue())


def _squares(images: Tensor) -> Tensor:
    if images.ndim == 2:
        side = round(images.shape[1] ** 0.5)
        if side * side != images.shape[1]:
            raise ValueError(f"images have shape {tuple(images.shape)}; flat ones must be square")
        return images.detach().cpu().reshape(-1, side, side)
    return images.detach().cpu().reshape(images.shape[0], *images.shape[-2:])
