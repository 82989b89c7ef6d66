"""Every picture: grids as (H, W) tensors in [0, 1], plots as matplotlib figures.

`save_png` writes either. Nothing here touches pyplot's global state or needs a screen.
"""

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vae_torch.files import write_atomically
from vae_torch.parts.objectives import ACTIVE_UNIT_VARIANCE
from vae_torch.parts.posteriors import gaussian_of, kl_per_dim
from vae_torch.vae import VAE

if TYPE_CHECKING:  # half a second that a run without figures need not pay
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Paul Tol's "muted" scheme, which stays apart for colour-blind eyes, with grey as the tenth; in an
# order that gives digits of similar shape (4 and 9, 3 and 8, 1 and 7) the most different colours.
DIGIT_COLOURS = (
    "#332288",
    "#88ccee",
    "#44aa99",
    "#117733",
    "#cc6677",
    "#999933",
    "#882255",
    "#aa4499",
    "#ddcc77",
    "#555555",
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
    images = squares(images)
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
    return image_grid(torch.cat([pictures(vae, x), pictures(vae, vae.reconstruct(x))]), n)


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


def latent_scatter(vae: VAE, x: Tensor, labels: Tensor) -> "Figure":
    """Posterior means of images, coloured by class, with each class's number near its median.

    With more than two latents: the two whose means vary most. With one: the class is the height.
    Two units around the origin are always in view, so that a collapsed posterior looks like one.
    From the eleventh class on the colours repeat: then the numbers tell.

    Args:
        vae: The model.
        x: (N, *shape) in [0, 1].
        labels: (N,) classes.
    """
    means = _means(vae, x)
    classes = labels.cpu().numpy()
    first, *more = _most_active(means)
    across = means[:, first].numpy()
    spread = np.random.default_rng(0).uniform(-0.3, 0.3, len(classes))  # points, not a line
    up = means[:, more[0]].numpy() if more else classes + spread
    figure, axes = _figure(7, 6)
    from matplotlib.patheffects import withStroke

    names = np.unique(classes)
    for i, digit in enumerate(names):
        chosen, colour = classes == digit, DIGIT_COLOURS[i % len(DIGIT_COLOURS)]
        axes.scatter(
            across[chosen], up[chosen], s=5, c=colour, alpha=0.75, linewidths=0, label=str(digit)
        )
    middle = np.median(up)
    axes.update_datalim([(-2, -2 if more else middle), (2, 2 if more else middle)])
    axes.autoscale_view()
    if not more:  # all of each class's points, however few the classes
        axes.set_ylim(names[0] - 0.6, names[-1] + 0.6)
    active = bool((_variances(means) > ACTIVE_UNIT_VARIANCE).any())
    few = len(names) <= len(DIGIT_COLOURS)
    if few:
        axes.legend(title="class", loc="center left", bbox_to_anchor=(1, 0.5), markerscale=4)
    if few and not more:
        axes.set_yticks(names)
    if len(names) > 1 and (active if more else few):
        low, high = np.array([axes.get_xlim(), axes.get_ylim()]).T
        distance = (high - low).max() / (24 if few else 40)
        medians = [[np.median(v[classes == digit]) for v in (across, up)] for digit in names]
        for digit, at in zip(names, _apart(np.array(medians), distance), strict=True):
            axes.annotate(
                str(digit), at, fontsize=13 if few else 9, weight="bold", ha="center", va="center",
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )  # fmt: skip
    state = "; no dimension is active" if len(x) > 1 and not active else ""
    axes.set_title(f"Posterior means of {_images(len(x))}{state}")
    axes.set_xlabel(f"z{_subscript(first)}")
    axes.set_ylabel(f"z{_subscript(more[0])}" if more else "class")
    if more:
        axes.set_aspect("equal")
    return figure


def _apart(places: np.ndarray, distance: float) -> np.ndarray:
    """Places (n, 2), moved until no two are nearer than `distance`, or some two hundred times."""
    places = places + 1e-6 * distance * np.arange(len(places))[:, None] * [1, -1]  # no two equal
    for _ in range(200):
        away = places[:, None] - places[None]  # (n, n, 2)
        lengths = np.linalg.norm(away, axis=-1)
        lacking = np.clip(distance - lengths, 0, None)
        np.fill_diagonal(lacking, 0)
        if not lacking.any():
            break
        places = places + (away * (0.5 * lacking / np.maximum(lengths, 1e-12))[..., None]).sum(1)
    return places


@torch.no_grad()
def reconstruction_figure(vae: VAE, x: Tensor) -> "Figure":
    """Originals over reconstructions, with what each reconstruction is worth under it.

    Args:
        vae: The model.
        x: (n, *shape) in [0, 1].

    Returns:
        A figure; its numbers are -log p(x | z) at the posterior mean, in nats.
    """
    mean, _ = vae.encode(x)
    logits = vae.decode(mean)
    nats = -vae.likelihood.log_prob(x.reshape(-1, *vae.input_shape), logits)
    return image_table(
        torch.cat([pictures(vae, x), pictures(vae, vae.likelihood.mean(logits))]),
        rows=["image", "decoded"],
        columns=[f"{number:.0f}" for number in nats.tolist()],
        caption="-log p(x | z) at the posterior mean, nats",
    )


@torch.no_grad()
def traversal_figure(
    vae: VAE, x: Tensor, *, steps: int = 11, dimensions: int = 40, context: int = 1000
) -> "Figure":
    """One image decoded while one latent moves: a row per active dimension, most active first.

    Args:
        vae: The model.
        x: (N, *shape) in [0, 1]: the first is the image that moves, the first `context` say which
            dimensions are active and how far their posterior means reach.
        steps: Images in a row, from -3 to 3 standard deviations of these means around their mean.
        dimensions: Rows at most.
        context: Images to encode.
    """
    means = _means(vae, x[:context])
    variances = _variances(means)
    active = [d for d in _most_active(means) if variances[d] > ACTIVE_UNIT_VARIANCE]
    shown = active[:dimensions] or _most_active(means)[:1]
    ticks = torch.linspace(-3, 3, steps)
    ways = []
    for dim in shown:
        z = means[:1].repeat(steps, 1)
        z[:, dim] = means[:, dim].mean() + ticks * variances[dim].sqrt()
        ways.append(z)
    hidden = f", {len(active) - len(shown)} not shown" if len(active) > len(shown) else ""
    return image_table(
        _decoded(vae, torch.cat(ways)),
        rows=[f"z{_subscript(dim)}" for dim in shown],
        columns=[f"{t:+.1f}".replace("+0.0", "0").replace("-0.0", "0") for t in ticks.tolist()],
        caption=f"standard deviations of the posterior means\n{_activity(means)}{hidden}",
    )


@torch.no_grad()
def interpolation_figure(vae: VAE, x: Tensor, *, steps: int = 9) -> "Figure":
    """The way from one image to another in latent space: straight, and around the origin.

    In many dimensions the prior's mass lies on a shell, which a straight way leaves; the spherical
    one (White, *Sampling Generative Networks* (2016), section 2.1) stays on it. One latent has the
    straight way alone.

    Args:
        vae: The model.
        x: (2, *shape) in [0, 1], both ends.
        steps: Images on the way, ends included.

    Raises:
        ValueError: x holds not two images.
    """
    if len(x) != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; an interpolation has two ends")
    means = _means(vae, x)
    ways = {"straight": torch.lerp(means[0], means[1], torch.linspace(0, 1, steps)[:, None])}
    if vae.latent_dim > 1:
        ways["spherical"] = spherical_interpolation(means[0], means[1], steps=steps)
    start, end = pictures(vae, x).split(1)
    between = [""] * (steps // 2) + ["decoded on the way"] + [""] * (steps - steps // 2 - 1)
    return image_table(
        torch.cat([torch.cat([start, _decoded(vae, z), end]) for z in ways.values()]),
        rows=list(ways),
        columns=["image", *between, "image"],
    )


def spherical_interpolation(start: Tensor, end: Tensor, *, steps: int) -> Tensor:
    """From `start` to `end` around the origin: directions along an arc, lengths linearly.

    After White (2016), section 2.1, whose weights are of vectors of one length: with other lengths
    they lead far out where the angle is large. Here no point lies nearer to the origin than both
    ends or farther away. Where no arc is given, these are the choices:

    - Opposite directions: half a circle through the axis that is nearest to a right angle.
    - A zero vector has no direction: the way is straight.
    - One dimension: a circle of two points. The way jumps from one side to the other halfway.

    Args:
        start: (latent_dim,).
        end: (latent_dim,).
        steps: Points on the way, ends included.

    Returns:
        (steps, latent_dim).
    """
    t = torch.linspace(0, 1, steps, dtype=torch.float64, device=start.device)[:, None]
    ends = torch.stack([start, end]).double()
    lengths = torch.linalg.vector_norm(ends, dim=1, keepdim=True)
    first, last = torch.where(lengths > 0, ends / lengths, ends.flip(0) / lengths.flip(0))
    if not lengths.any():
        directions = ends[:1]
    elif len(first) == 1:
        directions = torch.where(t < 0.5, first, last)
    else:
        # 2 atan2 keeps its digits near 0 and π, where acos of a cosine loses half of them
        apart, joint = (torch.linalg.vector_norm(v) for v in (last - first, last + first))
        side = last - (first @ last) * first
        if torch.linalg.vector_norm(side) < 1e-12:  # the same direction, or opposite ones
            axis = torch.nn.functional.one_hot(first.abs().argmin(), len(first)).to(first)
            side = axis - (first @ axis) * first
        angle = 2 * t * torch.atan2(apart, joint)
        directions = angle.cos() * first + angle.sin() * torch.nn.functional.normalize(side, dim=0)
        directions = torch.nn.functional.normalize(directions, dim=1)
    return (torch.lerp(lengths[0], lengths[1], t) * directions).to(start)


def kl_figure(vae: VAE, x: Tensor) -> "Figure":
    """KL(q(z|x) || N(0, 1)) of each latent dimension, largest first, coloured by activity.

    Args:
        vae: The model.
        x: (N, *shape) in [0, 1].
    """
    means, logvars = _posterior(vae, x, "figures/kl.png")
    kl = kl_per_dim(means, logvars).mean(0)
    order, n = kl.argsort(descending=True), len(kl)
    active = (_variances(means) > ACTIVE_UNIT_VARIANCE)[order].numpy()
    figure, axes = _figure(max(3.2, min(10, 2 + 0.3 * n)), 4)
    colours = {"active": DIGIT_COLOURS[0], "inactive": DIGIT_COLOURS[4]}
    for kind, chosen in {"active": active, "inactive": ~active}.items():
        places = np.flatnonzero(chosen)
        colour = colours[kind] if len(x) > 1 else DIGIT_COLOURS[9]
        bars = axes.bar(places, kl[order[places]].numpy(), color=colour, label=kind)
        if n <= 12:
            axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    if 0 < active.sum() < n:
        axes.legend(loc="upper right", frameon=False)
    axes.set_title(_activity(means), fontsize=11)
    half = max(n, 2) / 2 + 0.2  # one bar is no wall
    axes.set_xlim((n - 1) / 2 - half, (n - 1) / 2 + half)
    axes.set_ylim(0, max(1.08 * kl.max().item(), 0.1))  # a collapsed one is no tower
    if n <= 40:
        axes.set_xticks(range(n), [str(d + 1) for d in order.tolist()], fontsize=8)
    else:  # names of each would be too small to read
        ranks = [1, *range(10, n + 1, 10)]
        axes.set_xticks([rank - 1 for rank in ranks], map(str, ranks))
    axes.set_xlabel("latent dimension" if n <= 40 else "latent dimensions, largest KL first")
    axes.set_ylabel("KL to N(0, 1), nats per image")
    return figure


def log_px_map(vae: VAE, x: Tensor, log_px: Tensor, *, ellipses: int = 12) -> "Figure":
    """Where in the latent plane the model explains images well, and how sure q(z|x) is there.

    Args:
        vae: A model with latent_dim 2.
        x: (N, *shape) in [0, 1].
        log_px: (N,) nats, from `evaluate.exact_log_px`.
        ellipses: Of the first images: q(z|x) at two standard deviations.

    Raises:
        ValueError: latent_dim is not 2.
    """
    if vae.latent_dim != 2:
        raise ValueError(f"latent_dim is {vae.latent_dim}; the map needs 2")
    means, logvars = _posterior(vae, x, "a map with ellipses")
    figure, axes = _figure(7.5, 6)
    from matplotlib.patches import Ellipse

    log_px = log_px.cpu()
    order = log_px.argsort(descending=True)  # the badly explained ones on top
    low, high = np.quantile(log_px.numpy(), [0.01, 0.99])
    across, up = means[order].T.numpy()
    points = axes.scatter(
        across, up, s=6, c=log_px[order].numpy(), linewidths=0,
        cmap="viridis", vmin=low, vmax=high,
    )  # fmt: skip
    deviations = torch.exp(0.5 * logvars)
    for centre, widths in zip(means[:ellipses].tolist(), deviations[:ellipses], strict=False):
        width, height = (4 * widths).tolist()  # two standard deviations to each side
        axes.add_patch(Ellipse(centre, width, height, fill=False, ec=DIGIT_COLOURS[4], lw=1.6))
    figure.colorbar(points, label="exact log p(x), nats", extend="both")
    circled = "" if len(x) == 1 else f" of {min(ellipses, len(x))}"
    title = f"Posterior means of {_images(len(x))}; ellipses: q(z|x){circled}, 2 sd"
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="z₁", ylabel="z₂", aspect="equal")
    return figure


def growth_frame(vae: VAE, x: Tensor, epoch: int) -> np.ndarray:
    """One frame of a run's animation: reconstructions over the manifold, or over samples.

    Args:
        vae: The model.
        x: (n, *shape): the images to reconstruct.
        epoch: Written above them.

    Returns:
        (H, W) uint8, of one size for a whole run.
    """
    from PIL import Image, ImageDraw, ImageFont

    top = reconstruction_grid(vae, x)
    below = manifold_grid(vae, rows=11) if vae.latent_dim == 2 else sample_grid(vae, rows=10)
    width = max(top.shape[1], below.shape[1])
    parts = [torch.ones(22, width)]
    for grid in (top, below):
        padded = torch.ones(grid.shape[0] + 4, width)
        left = (width - grid.shape[1]) // 2
        padded[: grid.shape[0], left : left + grid.shape[1]] = grid
        parts.append(padded)
    image = Image.fromarray(to_pixels(torch.cat(parts)))
    ImageDraw.Draw(image).text((4, 3), f"epoch {epoch}", fill=0, font=ImageFont.load_default(14))
    return np.asarray(image)


def read_png(path: Path) -> np.ndarray:
    """What `save_png` wrote."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image)


def save_gif(frames: Sequence[np.ndarray], path: str | Path, *, milliseconds: int = 250) -> None:
    """Write grey frames as one animation that loops and rests on its last frame.

    Raises:
        ValueError: No frame.
    """
    from PIL import Image

    if not frames:
        raise ValueError("no frames: an animation needs one at least")
    first, *rest = (Image.fromarray(frame) for frame in frames)
    buffer = io.BytesIO()
    durations = [milliseconds] * len(rest) + [2000]
    first.save(buffer, "gif", save_all=True, append_images=rest, duration=durations, loop=0)
    write_atomically(Path(path), buffer.getvalue())


def to_pixels(picture: "Tensor | Figure") -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 of a grid or a plot."""
    if isinstance(picture, Tensor):
        return (picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def to_png(picture: "Tensor | Figure | np.ndarray", *, scale: int = 1) -> bytes:
    """A grid or plot as a PNG file; `scale` repeats each pixel, for grids of small images."""
    from PIL import Image

    pixels = picture if isinstance(picture, np.ndarray) else to_pixels(picture)
    if scale > 1:
        pixels = pixels.repeat(scale, 0).repeat(scale, 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def save_png(picture: "Tensor | Figure | np.ndarray", path: str | Path, *, scale: int = 1) -> None:
    """Write `to_png`."""
    write_atomically(Path(path), to_png(picture, scale=scale))


@torch.no_grad()
def _means(vae: VAE, x: Tensor) -> Tensor:
    """Centres of the posteriors on the CPU, in batches that bound the memory."""
    return torch.cat([vae.encode(some).mean for some in x.split(1000)]).float().cpu()


@torch.no_grad()
def _posterior(vae: VAE, x: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Means and log-variances of Gaussians on the CPU, in batches that bound the memory."""
    parts = [gaussian_of(vae.encode(some), what) for some in x.split(1000)]
    mean, logvar = (torch.cat(part).float().cpu() for part in zip(*parts, strict=True))
    return mean, logvar


def _most_active(means: Tensor) -> list[int]:
    """Latent dimensions, the one whose means vary most first; of two the order is their own."""
    if means.shape[1] <= 2:
        return list(range(means.shape[1]))
    return _variances(means).argsort(descending=True).tolist()


def _variances(means: Tensor) -> Tensor:
    """(latent_dim,) over the images; one image has none."""
    return means.var(0) if len(means) > 1 else torch.zeros(means.shape[1])


def _activity(means: Tensor) -> str:
    """How many dimensions are active."""
    if len(means) == 1:
        return "one image: activity unknown"
    count, total = int((_variances(means) > ACTIVE_UNIT_VARIANCE).sum()), means.shape[1]
    return f"{count} of {total} {'dimension' if total == 1 else 'dimensions'} active"


def _images(count: int) -> str:
    return f"{count:,} test {'image' if count == 1 else 'images'}"


def _decoded(vae: VAE, z: Tensor) -> Tensor:
    """(n, latent_dim) -> (n, H, W) expected pixels."""
    weight = next(vae.parameters())
    return pictures(vae, vae.likelihood.mean(vae.decode(z.to(weight))))


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    figure = import_matplotlib()(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def import_matplotlib() -> "type[Figure]":
    """Import what draws, without matplotlib's news.

    The first import on a machine tells at INFO that it has listed the fonts, which would go into
    a run's log. Its level is set aside for the import alone, and only where nobody chose one.
    """
    logger = logging.getLogger("matplotlib.font_manager")
    chosen = logger.level
    logger.setLevel(chosen or logging.WARNING)
    try:
        from matplotlib.figure import Figure
    finally:
        logger.setLevel(chosen)
    return Figure


def image_table(
    images: Tensor, *, rows: Sequence[str], columns: Sequence[str], caption: str = ""
) -> "Figure":
    """Images in a table whose rows and columns have names.

    An image pixel is two by two on the screen, and the text can be read where TensorBoard shows the
    whole in 350 pixels.

    Args:
        images: (rows * columns, pixels), (..., H, W) or (..., 1, H, W) in [0, 1], row by row; flat
            ones must be square.
        rows: A name for each row, to its left.
        columns: A name for each column, under it; empty ones take no space.
        caption: A line or more under the table.
    """
    images = squares(images)
    dpi, scale, size = 100, 2, 12  # size: of the text, in points
    gap, letter, line = 2, 0.6 * size * dpi / 72, 1.35 * size * dpi / 72
    grid = image_grid(images[:, None], len(columns), gap=gap)  # on one axis: many are slow
    height, width = (scale * side for side in grid.shape)
    left, right = letter * max(map(len, rows)) + 12, 4.0
    lacking = letter * max(map(len, caption.splitlines()), default=0) - (left + width + right)
    left, right = (side + max(lacking, 0) / 2 for side in (left, right))
    bottom = line * (bool(any(columns)) + len(caption.splitlines())) + 6
    whole = (left + width + right, height + bottom)
    figure = import_matplotlib()(figsize=(whole[0] / dpi, whole[1] / dpi), dpi=dpi)
    axes = figure.add_axes(
        (left / whole[0], bottom / whole[1], width / whole[0], height / whole[1])
    )
    axes.imshow(grid.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    tall, wide = (side + gap for side in images.shape[1:])
    axes.set_xticks([gap / 2 + (i + 0.5) * wide - 0.5 for i in range(len(columns))], columns)
    axes.set_yticks([gap / 2 + (i + 0.5) * tall - 0.5 for i in range(len(rows))], rows)
    axes.tick_params(length=0, labelsize=size, pad=3)
    axes.spines[:].set_visible(False)
    if caption:
        figure.supxlabel(caption, fontsize=size, y=2 / whole[1], va="bottom")
    return figure


def _subscript(dimension: int) -> str:
    """`₁` for dimension 0."""
    return "".join(chr(0x2080 + int(digit)) for digit in str(dimension + 1))


def pictures(vae: VAE, x: Tensor) -> Tensor:
    """Images of a model, flat or not, in the shape that it knows: (N, H, W) on the CPU."""
    return squares(x.reshape(-1, *vae.input_shape))


def squares(images: Tensor) -> Tensor:
    """(N, pixels), (N, H, W) or (N, 1, H, W) -> (N, H, W) on the CPU; flat ones must be square.

    Raises:
        ValueError: They are of another shape.
    """
    if images.ndim == 2:
        side = round(images.shape[1] ** 0.5)
        if side * side != images.shape[1]:
            raise ValueError(f"images have shape {tuple(images.shape)}; flat ones must be square")
        return images.detach().cpu().reshape(-1, side, side)
    if images.ndim < 3 or any(size != 1 for size in images.shape[1:-2]):
        raise ValueError(
            f"images have shape {tuple(images.shape)}; they must be grey: (N, height, width) or "
            "(N, 1, height, width)"
        )
    return images.detach().cpu().reshape(images.shape[0], *images.shape[-2:])
