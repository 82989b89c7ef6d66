"""One HTML page to walk through a model's latent space: no server, no network, no library.

The page carries the decoder's weights as half floats and runs it itself, in some hundred lines of
JavaScript. This works for any number of latents: half floats move a pixel by 0.0007 at most with
the 40 latents of `experiment=strong`. It is fast enough: in headless Chromium, on one core of a
busy server, an image takes 0.7 ms with `model=mlp`, 1.4 ms with `residual` and 4 to 7 ms with
`conv` at their default widths, within the 16.7 ms of a frame at 60 per second.

If the page cannot run a decoder and the model has one or two latents, it interpolates a grid of
decoded images. For 32x32 images of the default decoder the mean error is 0.0008 per pixel and the
largest 0.02 (0.06 for the residual decoder). A grid of three or more latents does not fit into a
page.
"""

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vae_torch.config import Config
from vae_torch.figures import (
    DIGIT_COLOURS,
    NoPicturesError,
    image_grid,
    pictures,
    shrunk,
    to_pixels,
)
from vae_torch.figures.engine import ExplorerError, decoded_grid, half_base64, packed_decoder
from vae_torch.images import Batch
from vae_torch.parts.objectives import ACTIVE_UNIT_VARIANCE, bound
from vae_torch.parts.posteriors import DiagonalGaussian
from vae_torch.seeds import seeded_generator
from vae_torch.vae import VAE

__all__ = ["MAX_BYTES", "ExplorerError", "explorer_page", "run_facts", "run_notes"]

MAX_BYTES = 8_000_000  # of a page, or half of it beside a decoder that needs more
MAX_DECODER_BYTES = 32_000_000  # such as 64x64 colour images of `model=conv`: 22 MB

# With fewer epochs or images than these, the page says why it looks poor.
_FEW_EPOCHS = 3
_FEW_IMAGES = 10_000

_MOST_COMPONENTS = 32
_FEWEST_POINTS = 100
_SPRITE_COLUMNS = 50
_SPRITE_WIDTH = 8000  # pixels, which every browser decodes
_SPRITE_SIDE = 128  # side of an image; larger ones are reduced

_CLASS_NAMES = {
    "fashion_mnist": (
        "T-shirt", "trouser", "pullover", "dress", "coat",
        "sandal", "shirt", "sneaker", "bag", "boot",
    ),
    "emnist": tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"),
}  # fmt: skip


def explorer_page(
    vae: VAE,
    x: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    title: str = "VAE",
    facts: str = "",
    notes: list[str] | None = None,
    data_name: str = "mnist",
    class_names: Sequence[str] | None = None,
    available: int | None = None,
    points: int = 3000,
) -> str:
    """Make the page, with fewer points than asked for if it would exceed `MAX_BYTES`.

    A decoder that needs more room than that gets it, up to `MAX_DECODER_BYTES`.

    Args:
        vae: The model.
        x: (N, *shape) in [0, 1], the images whose posterior means are shown; None for no points.
        labels: (N,) their classes; None where they have none.
        title: Heading of the page.
        facts: One line under it: what the model is.
        notes: What the viewer must know first, a banner each.
        data_name: A name of `data.name`; decides the names of classes.
        class_names: Names of the classes by label, if the data has some.
        available: Number of images in the data; x holds the first ones. N if absent.
        points: Largest number of images, from the first on.

    Raises:
        ExplorerError: The weights are not finite, or too many for a page of this size; or the page
            cannot draw the images, or can neither run the decoder nor interpolate its images.
    """
    training = vae.training
    vae.eval()  # a decoder in train mode may be random
    try:
        return _page(
            vae,
            x,
            labels,
            {"title": title, "facts": facts, "notes": list(notes or [])},
            data_name,
            class_names or _CLASS_NAMES.get(data_name, ()),
            available,
            points,
        )
    finally:
        vae.train(training)


def _page(
    vae: VAE,
    x: Tensor | None,
    labels: Tensor | None,
    texts: dict[str, Any],
    data_name: str,
    class_names: Sequence[str],
    available: int | None,
    points: int,
) -> str:
    channels, height, width = _image_size(vae)
    page: dict[str, Any] = {
        **texts,
        "latent_dim": vae.latent_dim,
        "channels": channels,
        "height": height,
        "width": width,
        "active_variance": ACTIVE_UNIT_VARIANCE,
        "noun": "digit" if data_name in ("mnist", "qmnist") else "class",
    }
    if vae.classes:
        page["given"] = [_called(label, class_names) for label in range(vae.classes)]
    images = _without_images(vae)
    try:
        decoder = packed_decoder(vae, max_bytes=MAX_DECODER_BYTES)
        whose = ""
    except ExplorerError as error:
        if vae.latent_dim > 2 or vae.classes:  # a grid for each class would be too many images
            raise
        decoder, whose = None, str(error)
    n = 0 if x is None else min(points, len(x))
    most = max(MAX_BYTES, (len(decoder["weights"]) if decoder else 0) + MAX_BYTES // 2)
    while True:
        if x is not None and n:
            some = None if labels is None else labels[:n]
            images = _with_images(vae, x[:n], some, available or len(x), class_names)
        drawn = decoder or _grid(vae, images, whose)
        content = _fill(page | drawn | images)
        if not n or len(content.encode()) < most:
            return content
        if n <= _FEWEST_POINTS:
            raise ExplorerError(
                f"the page would have {len(content.encode()) / 1e6:.1f} MB with {n} images, and "
                f"{most / 1e6:.0f} MB are the most; explore a smaller model"
            )
        n = max(_FEWEST_POINTS, n // 2)


def _grid(vae: VAE, images: dict[str, Any], reason: str) -> dict[str, Any]:
    """Decode the square of the latent plane that holds all points."""
    low, high = (torch.tensor(images["reach"][end], dtype=torch.float32) for end in (0, 1))
    middle, half = (low + high) / 2, ((high - low) / 2).max() * 1.05
    budget = MAX_BYTES // 2  # the other half is for the points
    grid = decoded_grid(vae, middle - half, middle + half, max_bytes=budget, reason=reason)
    return {"grid": grid}


def run_notes(run_dir: Path, config: Config) -> tuple[list[str], int | None]:
    """Sentences on what is unusual about a run, and its completed epochs (None: unknown)."""
    notes = []
    epochs = config.train.epochs
    done: int | None = epochs
    if not (run_dir / "summary.json").exists():
        metrics = run_dir / "metrics.jsonl"
        done = metrics.read_bytes().count(b"\n") if metrics.exists() else None
        so_far = f"it completed {done or 'none'} of {epochs} epochs"
        if done is None:
            so_far = f"how many of its {epochs} epochs it completed is not known"
        notes.append(
            f"This run has not finished: {so_far}. You see the model of its last checkpoint."
        )
    if done is not None and done < _FEW_EPOCHS:
        trained = f"{done} {'epoch' if done == 1 else 'epochs'}" if done else "less than one epoch"
        notes.append(
            f"This model was trained for {trained}. Its images are blurred and its classes "
            "overlap; train longer before you read much into it."
        )
    limit = config.data.limit_train
    if limit is not None and limit < _FEW_IMAGES:
        notes.append(
            f"This model was trained on {limit:,} images (data.limit_train), too few to show what "
            "it can do."
        )
    return notes, done


def run_facts(config: Config, epochs: int | None) -> str:
    """One line that describes a run."""
    latents, given = config.model.latent_dim, ", given the class" * config.model.conditional
    parts = [
        config.data.name,
        f"{config.model.name} decoder{given}",
        f"{latents} {'latent' if latents == 1 else 'latents'}",
        f"{config.likelihood.replace('_', ' ')} likelihood",
        f"{config.prior} prior",
    ]
    if epochs is not None:
        parts.append(f"{epochs} {'epoch' if epochs == 1 else 'epochs'}")
    return " · ".join(parts)


def _image_size(vae: VAE) -> tuple[int, int, int]:
    """Channels, height and width."""
    try:
        sides = pictures(vae, torch.zeros(1, *vae.input_shape)).shape[1:]
    except NoPicturesError:
        raise ExplorerError(
            f"the page cannot draw images of shape {vae.input_shape}; it draws (height, width), "
            "(1, height, width), (3, height, width), or flat and square ones"
        ) from None
    return (sides[0] if len(sides) == 3 else 1), sides[-2], sides[-1]


@torch.no_grad()
def _without_images(vae: VAE) -> dict[str, Any]:
    """The range of the prior, for a page without points."""
    weight = next(vae.parameters())
    generator = seeded_generator(weight.device, 0)
    z = vae.prior.sample(1000, generator).float().cpu()
    centre, spread = z.mean(0), z.std(0)
    return {
        "points": 0,
        "centre": _listed(centre),
        "spread": _listed(spread),
        "reach": [_listed(centre - 3.5 * spread), _listed(centre + 3.5 * spread)],
    }


@torch.no_grad()
def _with_images(
    vae: VAE, x: Tensor, labels: Tensor | None, available: int, names: Sequence[str]
) -> dict[str, Any]:
    mean, logvar, terms = _posterior_and_terms(vae, x, labels)
    known = [mean, *([] if logvar is None else [logvar]), *terms.values()]
    if not all(bool(values.isfinite().all()) for values in known):
        raise ExplorerError("the model's posterior or its elbo is not finite; did it diverge?")
    variance = mean.var(0) if len(mean) > 1 else torch.zeros(vae.latent_dim)
    # one image does not tell how the means vary
    collapsed = len(mean) > 1 and not bool((variance > ACTIVE_UNIT_VARIANCE).any())
    shown = shrunk(pictures(vae, x), _SPRITE_SIDE)
    columns = min(_SPRITE_COLUMNS, max(1, _SPRITE_WIDTH // shown.shape[-1]))
    page: dict[str, Any] = {
        "points": len(x),
        "available": available,
        "collapsed": collapsed,
        "means": half_base64(mean),
        "logvars": None if logvar is None else half_base64(logvar),
        "terms": {name: _listed(values, 2) for name, values in terms.items()},
        "classes": None,
        "class_names": [""],
        "colours": [DIGIT_COLOURS[0]],
        "sprite": _sprite(shown, columns),
        "sprite_columns": columns,
        "sprite_size": list(shown.shape[-2:]),
        "centre": _listed(mean.mean(0)),
        "spread": _listed(variance.sqrt()),
        # as wide as the plane: an uninformative posterior is as wide as the prior
        "reach": [
            _listed(torch.minimum(mean.amin(0), mean.mean(0) - 2.2)),
            _listed(torch.maximum(mean.amax(0), mean.mean(0) + 2.2)),
        ],
    }
    if labels is not None:
        kinds, index = labels.cpu().unique(return_inverse=True)
        page["classes"] = index.tolist()
        page["class_names"] = [_called(label, names) for label in kinds.tolist()]
        page["labels"] = kinds.tolist()  # a conditional model decodes with them
        page["colours"] = [DIGIT_COLOURS[i % len(DIGIT_COLOURS)] for i in range(len(kinds))]
    if vae.latent_dim > 2 and len(x) > 2:
        page["components"] = _principal_components(mean)
    return page


def _called(label: int, names: Sequence[str]) -> str:
    return names[label] if label < len(names) else str(label)


def _posterior_and_terms(
    vae: VAE, x: Tensor, labels: Tensor | None, *, draws: int = 8
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Mean and logvar (N, latent_dim), and each image's elbo = reconstruction - kl (N,), in nats.

    Without a Gaussian q(z|x) there is no logvar. The KL is in closed form if the prior is N(0, 1)
    and q(z|x) Gaussian; everything else is a mean over samples of z.
    """
    device = next(vae.parameters()).device
    generator = seeded_generator(device, 0)
    means, logvars, terms = [], [], []
    for start in range(0, len(x), 250):
        some = x[start : start + 250].to(device)
        y = None if labels is None else labels[start : start + 250].to(device)
        eps = torch.randn(draws, len(some), vae.latent_dim, generator=generator, device=device)
        parts = bound(vae, Batch(some, y), eps)
        means.append(parts.q.mean)
        if isinstance(parts.q, DiagonalGaussian):
            logvars.append(parts.q.logvar)
        terms.append({"elbo": parts.reconstruction - parts.kl, **parts.metrics()})
    names = ("elbo", "reconstruction", "kl")
    whole = {name: torch.cat([term[name] for term in terms]).float().cpu() for name in names}
    logvar = torch.cat(logvars).float().cpu() if logvars else None
    return torch.cat(means).float().cpu(), logvar, whole


def _principal_components(means: Tensor) -> dict[str, Any]:
    """The directions in which posterior means vary most, and the share of variance of each."""
    variance, directions = torch.linalg.eigh(means.double().T.cov())
    variance, directions = variance.flip(0).clamp_min(0), directions.flip(1).T
    count = int((variance > ACTIVE_UNIT_VARIANCE).sum().clamp(2, _MOST_COMPONENTS))
    directions = directions[:count]
    # the sign of an eigenvector is free: let its largest entry be positive
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    directions = directions * largest.sign()
    share = variance[:count] / variance.sum().clamp_min(1e-12)
    return {"count": count, "share": _listed(share), "directions": half_base64(directions)}


def _sprite(images: Tensor, columns: int) -> str:
    """All images (n, [3,] H, W) as one PNG in base64, row by row without gaps."""
    rows = -(-len(images) // columns)
    blank = torch.zeros(rows * columns - len(images), *images.shape[1:])
    table = image_grid(torch.cat([images, blank]).reshape(-1, *images.shape[1:]), columns, gap=0)
    buffer = io.BytesIO()
    Image.fromarray(to_pixels(table)).save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _listed(values: Tensor, digits: int = 4) -> list[float]:
    return [round(v, digits) for v in values.tolist()]


def _fill(page: dict[str, Any]) -> str:
    """The template with the page's data; no text of a run can end the script or a tag."""
    data = json.dumps(page, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    content = {"TITLE": html.escape(page["title"]), "DATA": data}
    template = resources.files("vae_torch").joinpath("explorer.html").read_text("utf-8")
    return re.sub(r"\{\{(TITLE|DATA)\}\}", lambda found: content[found[1]], template)
