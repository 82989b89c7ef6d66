"""Plots: the posteriors of images in latent space, and the KL of each dimension."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vae_torch.figures.latents import (
    activity,
    gaussian_posterior,
    most_active,
    posterior_means,
    subscript,
    variances,
)
from vae_torch.images import Batch
from vae_torch.parts.objectives import ACTIVE_UNIT_VARIANCE
from vae_torch.parts.posteriors import DiagonalGaussian, kl_per_dim
from vae_torch.vae import VAE

if TYPE_CHECKING:  # half a second that runs without figures save
    from matplotlib.figure import Figure

# Paul Tol's "muted" scheme, distinct for colour-blind eyes, with grey as the tenth. Its order gives
# digits of similar shape (4 and 9, 3 and 8, 1 and 7) the most different colours.
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


_NAME = 16  # letters of a class's name, at most


def latent_scatter(
    vae: VAE, x: Tensor, labels: Tensor | None, *, class_names: Sequence[str] | None = None
) -> "Figure":
    """Posterior means of images, coloured by class, with each class's name near its median.

    With more than two latents, the two whose means vary most are shown. With one, the class is the
    height. Without labels, all points have one colour, and with one latent the height is random.
    Two units around the origin are always visible, so that a collapsed posterior looks like one.
    From the eleventh class on the colours repeat, and only the names tell classes apart.

    Args:
        vae: The model.
        x: (N, *shape) in [0, 1].
        labels: (N,) classes, or None.
        class_names: Names of the classes, by label; numbers if absent.
    """
    means = posterior_means(vae, x, labels)
    known = labels is not None
    classes = np.zeros(len(x), int) if labels is None else labels.cpu().numpy()
    first, *more = most_active(means)
    across = means[:, first].numpy()
    spread = np.random.default_rng(0).uniform(-0.3, 0.3, len(classes))  # not all on a line
    up = means[:, more[0]].numpy() if more else classes + spread
    figure, axes = new_axes(7, 6)
    from matplotlib.patheffects import withStroke

    names = np.unique(classes)
    called = {digit: name_of(digit, class_names) for digit in names}
    for i, digit in enumerate(names):
        chosen, colour = classes == digit, DIGIT_COLOURS[i % len(DIGIT_COLOURS)]
        axes.scatter(
            across[chosen], up[chosen], s=5, c=colour, alpha=0.75, linewidths=0, label=called[digit]
        )
    middle = np.median(up)
    axes.update_datalim([(-2, -2 if more else middle), (2, 2 if more else middle)])
    axes.autoscale_view()
    if not more:  # show all points of each class if the classes are few
        axes.set_ylim(names[0] - 0.6, names[-1] + 0.6)
    active = bool((variances(means) > ACTIVE_UNIT_VARIANCE).any())
    few = len(names) <= len(DIGIT_COLOURS)
    if few and known:
        axes.legend(title="class", loc="center left", bbox_to_anchor=(1, 0.5), markerscale=4)
    if not known and not more:
        axes.set_yticks([])
    elif few and not more:
        axes.set_yticks(names, list(called.values()) if class_names else None)
    if len(names) > 1 and (active if more else few):
        low, high = np.array([axes.get_xlim(), axes.get_ylim()]).T
        distance = (high - low).max() / (24 if few else 40)
        medians = [[np.median(v[classes == digit]) for v in (across, up)] for digit in names]
        for digit, at in zip(names, _apart(np.array(medians), distance), strict=True):
            axes.annotate(
                called[digit], at, fontsize=13 if few else 9, weight="bold", ha="center",
                va="center", path_effects=[withStroke(linewidth=3, foreground="white")],
            )  # fmt: skip
    state = "; no dimension is active" if len(x) > 1 and not active else ""
    axes.set_title(f"Posterior means of {_images(len(x))}{state}")
    axes.set_xlabel(f"z{subscript(first)}")
    if more:
        axes.set_ylabel(f"z{subscript(more[0])}")
    elif known:
        axes.set_ylabel("class")
    if more:
        axes.set_aspect("equal")
    return figure


def name_of(label: int, class_names: Sequence[str] | None) -> str:
    """A class's name, shortened if long, or its number."""
    if class_names is None or label >= len(class_names):
        return str(label)
    name = class_names[label]
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"


def _apart(places: np.ndarray, distance: float) -> np.ndarray:
    """Move places (n, 2) apart until none are nearer than `distance`, for two hundred rounds."""
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


def kl_figure(vae: VAE, x: Tensor, labels: Tensor | None = None) -> "Figure":
    """KL(q(z|x) || N(0, 1)) of each latent dimension, largest first, coloured by activity.

    Args:
        vae: The model.
        x: (N, *shape) in [0, 1].
        labels: (N,) classes, which a conditional model needs.
    """
    means, logvars = gaussian_posterior(vae, Batch(x, labels), "figures/kl.png")
    kl = kl_per_dim(means, logvars).mean(0)
    order, n = kl.argsort(descending=True), len(kl)
    active = (variances(means) > ACTIVE_UNIT_VARIANCE)[order].numpy()
    figure, axes = new_axes(max(3.2, min(10, 2 + 0.3 * n)), 4)
    colours = {"active": DIGIT_COLOURS[0], "inactive": DIGIT_COLOURS[4]}
    for kind, chosen in {"active": active, "inactive": ~active}.items():
        places = np.flatnonzero(chosen)
        colour = colours[kind] if len(x) > 1 else DIGIT_COLOURS[9]
        bars = axes.bar(places, kl[order[places]].numpy(), color=colour, label=kind)
        if n <= 12:
            axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    if 0 < active.sum() < n:
        axes.legend(loc="upper right", frameon=False)
    axes.set_title(activity(means), fontsize=11)
    half = max(n, 2) / 2 + 0.2  # so that one bar does not fill the width
    axes.set_xlim((n - 1) / 2 - half, (n - 1) / 2 + half)
    axes.set_ylim(0, max(1.08 * kl.max().item(), 0.1))  # so that a collapsed KL does not look tall
    if n <= 40:
        axes.set_xticks(range(n), [str(d + 1) for d in order.tolist()], fontsize=8)
    else:  # names of each would be too small
        ranks = [1, *range(10, n + 1, 10)]
        axes.set_xticks([rank - 1 for rank in ranks], map(str, ranks))
    axes.set_xlabel("latent dimension" if n <= 40 else "latent dimensions, largest KL first")
    axes.set_ylabel("KL to N(0, 1), nats per image")
    return figure


def log_px_map(
    vae: VAE, x: Tensor, log_px: Tensor, labels: Tensor | None = None, *, ellipses: int = 12
) -> "Figure":
    """The latent plane, coloured by how well the model explains images, with some posteriors.

    Args:
        vae: A model with latent_dim 2.
        x: (N, *shape) in [0, 1].
        log_px: (N,) nats, from `evaluate.exact_log_px`.
        labels: (N,) classes, for a conditional model.
        ellipses: Number of images, from the first, whose Gaussian q(z|x) is drawn at two sd.

    Raises:
        ValueError: latent_dim is not 2.
    """
    if vae.latent_dim != 2:
        raise ValueError(f"latent_dim is {vae.latent_dim}; the map needs 2")
    means = posterior_means(vae, x, labels)
    figure, axes = new_axes(7.5, 6)
    from matplotlib.patches import Ellipse

    log_px = log_px.cpu()
    order = log_px.argsort(descending=True)  # badly explained images on top
    low, high = np.quantile(log_px.numpy(), [0.01, 0.99])
    across, up = means[order].T.numpy()
    points = axes.scatter(
        across, up, s=6, c=log_px[order].numpy(), linewidths=0,
        cmap="viridis", vmin=low, vmax=high,
    )  # fmt: skip
    title = f"Posterior means of {_images(len(x))}"
    with torch.no_grad():
        first = Batch(x, labels).rows(slice(ellipses))
        q = vae.of(first).encode(first.x)
    if isinstance(q, DiagonalGaussian):
        deviations = torch.exp(0.5 * q.logvar.float().cpu())
        for centre, widths in zip(means[:ellipses].tolist(), deviations, strict=True):
            width, height = (4 * widths).tolist()  # two standard deviations to each side
            axes.add_patch(Ellipse(centre, width, height, fill=False, ec=DIGIT_COLOURS[4], lw=1.6))
        circled = "" if len(x) == 1 else f" of {min(ellipses, len(x))}"
        title += f"; ellipses: q(z|x){circled}, 2 sd"
    px = "p(x|y)" if vae.classes else "p(x)"
    figure.colorbar(points, label=f"exact log {px}, nats", extend="both")
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="z₁", ylabel="z₂", aspect="equal")
    return figure


def _images(count: int) -> str:
    return f"{count:,} test {'image' if count == 1 else 'images'}"


def new_axes(width: float, height: float, columns: int = 1) -> "tuple[Figure, Any]":
    """A figure in the style of all plots, and its axes, or several of them side by side."""
    figure = import_matplotlib()(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.subplots(1, columns)
    for each in figure.axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def import_matplotlib() -> "type[Figure]":
    """Import matplotlib's Figure without its log message.

    On a machine's first import matplotlib logs at INFO that it builds a font cache, which would go
    into a run's log. Its level is raised during the import, unless somebody has set one.
    """
    logger = logging.getLogger("matplotlib.font_manager")
    chosen = logger.level
    logger.setLevel(chosen or logging.WARNING)
    try:
        from matplotlib.figure import Figure
    finally:
        logger.setLevel(chosen)
    return Figure
