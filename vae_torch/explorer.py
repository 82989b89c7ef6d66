"""One HTML page to walk through a model's latent space: no server, no network, no library.

The page carries the decoder's weights as half floats and runs it itself, in some hundred lines of
JavaScript. The other choice was a grid of decoded images to interpolate. With two latents that does
as well to the eye: 32x32 images take the space of the default decoder's weights and are off by
0.0008 a pixel in the mean, at worst by 0.02 (0.06 for the residual decoder). But a grid of three or
more latents does not fit into a page, and there the sliders, the components and the paths need the
decoder itself. That is right for any number of latents: half floats move a pixel by 0.0007 at worst
with the 40 latents of `experiment=strong`. It is also quick enough: in headless Chromium, on one
core of a busy server, an image takes 0.7 ms with `model=mlp`, 1.4 ms with `residual` and 4 to 7 ms
with `conv` at their default widths, and all three keep to the 16.7 ms of a frame at 60 a second.
"""

import base64
import html
import io
import json
import math
import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vae_torch.config import Config
from vae_torch.figures import DIGIT_COLOURS, pictures, to_pixels
from vae_torch.images import Batch
from vae_torch.parts.likelihoods import Bernoulli, ContinuousBernoulli, Gaussian
from vae_torch.parts.objectives import ACTIVE_UNIT_VARIANCE, bound
from vae_torch.parts.posteriors import gaussian_of
from vae_torch.seeds import seeded_generator
from vae_torch.vae import VAE

MAX_BYTES = 8_000_000

# Fewer epochs or images than these, and the page says why it looks poor.
_FEW_EPOCHS = 3
_FEW_IMAGES = 10_000

_MOST_COMPONENTS = 32
_FEWEST_POINTS = 100
_SPRITE_COLUMNS = 50

_CLASS_NAMES = {
    "fashion_mnist": (
        "T-shirt", "trouser", "pullover", "dress", "coat",
        "sandal", "shirt", "sneaker", "bag", "boot",
    ),
    "emnist": tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"),
}  # fmt: skip

_ACTIVATION_OPS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Sigmoid: "sigmoid",
}
_LAYERS = "Linear, LayerNorm, ConvTranspose2d, Unflatten, residual blocks and " + ", ".join(
    sorted(kind.__name__ for kind in _ACTIVATION_OPS)
)
# What the page makes pixels with, by a likelihood's `drawn_as`.
_MEANS = {"sigmoid": Bernoulli, "continuous": ContinuousBernoulli, "clamp": Gaussian}


class ExplorerError(ValueError):
    """A model of which no page can be made: one line that says why."""


def explorer_page(
    vae: VAE,
    x: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    title: str = "VAE",
    facts: str = "",
    notes: list[str] | None = None,
    data_name: str = "mnist",
    points: int = 3000,
) -> str:
    """The page, with fewer points than asked for where it would be larger than `MAX_BYTES`.

    Args:
        vae: The model.
        x: (N, *shape) in [0, 1], the images whose posterior means are shown; None for no points.
        labels: (N,) their classes.
        title: Heading of the page.
        facts: One line under it: what the model is.
        notes: What the viewer must know first, a banner each.
        data_name: A name of `data.name`; decides how classes are called.
        points: Images at most, from the first on.

    Raises:
        ExplorerError: The weights are not finite, or too many for a page of this size; or the page
            cannot draw the decoder, the likelihood or the images.
    """
    height, width = _image_size(vae)
    mean = _mean_op(vae.likelihood)
    weights: list[Tensor] = []
    ops = decoder_ops(vae.decoder, vae.latent_dim, weights)
    packed = torch.cat([torch.zeros(0), *(w.detach().float().cpu().flatten() for w in weights)])
    if not bool(packed.half().isfinite().all()):
        raise ExplorerError("the decoder's weights are not finite; did it diverge?")
    if 2 * len(packed) * 4 / 3 > MAX_BYTES:
        raise ExplorerError(
            f"the decoder has {len(packed):,} weights, which alone make a page larger than "
            f"{MAX_BYTES / 1e6:.0f} MB; explore a model with a smaller model.intermediate_dim"
        )
    _refuse_other_pixels(vae, ops, mean, packed)
    page: dict[str, Any] = {
        "title": title,
        "facts": facts,
        "notes": list(notes or []),
        "latent_dim": vae.latent_dim,
        "height": height,
        "width": width,
        "ops": ops,
        "weights": _half_base64(packed),
        "mean": mean,
        "active_variance": ACTIVE_UNIT_VARIANCE,
        "noun": "digit" if data_name in ("mnist", "qmnist") else "class",
    }
    if x is None or labels is None:
        return _fill(page | _without_images(vae))
    n = min(points, len(x))
    while True:
        content = _fill(page | _with_images(vae, x[:n], labels[:n], len(x), data_name))
        if len(content.encode()) < MAX_BYTES:
            return content
        if n <= _FEWEST_POINTS:
            raise ExplorerError(
                f"the page would have {len(content.encode()) / 1e6:.1f} MB with {n} images, and "
                f"{MAX_BYTES / 1e6:.0f} MB are the most; explore a smaller model"
            )
        n = max(_FEWEST_POINTS, n // 2)


def decoder_ops(decoder: nn.Module, latent_dim: int, weights: list[Tensor]) -> list[dict[str, Any]]:
    """The decoder as a list of operations for the page; appends their weights to `weights`.

    Each operation has a name under `op`, its sizes, and where its weights begin in all of them
    flattened one after the other.

    Raises:
        ExplorerError: A layer that the page does not know.
    """
    trunk, out = (getattr(decoder, name, None) for name in ("trunk", "out"))
    if isinstance(trunk, nn.Module) and isinstance(out, nn.Module):
        return _ops(nn.Sequential(trunk, out), (latent_dim,), weights)[0]
    if not isinstance(decoder, nn.Sequential):
        raise ExplorerError(
            f"the page cannot run the decoder {type(decoder).__name__}, which has no trunk and "
            f"out; it runs {_LAYERS}"
        )
    return _ops(decoder, (latent_dim,), weights)[0]


def run_notes(run_dir: Path, config: Config) -> tuple[list[str], int | None]:
    """What is unusual about a run, in sentences, and the epochs it completed (None: not known)."""
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
    """What a run is, in one line."""
    latents = config.model.latent_dim
    parts = [
        config.data.name,
        f"{config.model.name} decoder",
        f"{latents} {'latent' if latents == 1 else 'latents'}",
        f"{config.likelihood.replace('_', ' ')} likelihood",
        f"{config.prior} prior",
    ]
    if epochs is not None:
        parts.append(f"{epochs} {'epoch' if epochs == 1 else 'epochs'}")
    return " · ".join(parts)


def _ops(
    module: nn.Module, shape: tuple[int, ...], weights: list[Tensor]
) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """Operations of one module for an input of `shape`, and the shape of its output."""

    def stored(*tensors: Tensor) -> list[int]:
        begins = []
        for tensor in tensors:
            begins.append(sum(w.numel() for w in weights))
            weights.append(tensor)
        return begins

    def refused(reason: str) -> ExplorerError:
        return ExplorerError(
            f"the page cannot run the decoder's {type(module).__name__}{reason}; it runs {_LAYERS}"
        )

    if isinstance(module, nn.Identity):
        return [], shape
    if isinstance(module, nn.Sequential):
        ops = []
        for layer in module:
            more, shape = _ops(layer, shape, weights)
            ops += more
        return ops, shape
    if isinstance(module, nn.Linear):
        weight, bias = stored(module.weight, _or_zeros(module.bias, module.out_features))
        sizes = {"inputs": module.in_features, "outputs": module.out_features}
        return [{"op": "linear", **sizes, "weight": weight, "bias": bias}], (module.out_features,)
    if isinstance(module, nn.LayerNorm):
        if tuple(module.normalized_shape) != shape:
            raise refused(f" over a part of {shape}")
        ones = torch.ones(shape) if module.weight is None else module.weight
        weight, bias = stored(ones, _or_zeros(module.bias, math.prod(shape)))
        return [{"op": "layer_norm", "eps": module.eps, "weight": weight, "bias": bias}], shape
    if isinstance(module, nn.ConvTranspose2d):
        plain = ("kernel_size", "stride", "padding")
        if len(shape) != 3 or any(len(set(getattr(module, name))) != 1 for name in plain):
            raise refused(" that is not square")
        if module.groups != 1 or set(module.dilation) != {1} or set(module.output_padding) != {0}:
            raise refused(" with groups, dilation or output_padding")
        return _transposed(module, shape, stored)
    if isinstance(module, nn.Unflatten):
        return [], tuple(module.unflattened_size)
    if type(module) in _ACTIVATION_OPS:
        if getattr(module, "approximate", "none") != "none":
            raise refused(f" with approximate={module.approximate}")
        return [{"op": _ACTIVATION_OPS[type(module)]}], shape
    body = getattr(module, "body", None)  # of a residual block: x + body(x)
    if isinstance(body, nn.Sequential):
        ops, shape = _ops(body, shape, weights)
        return [{"op": "residual", "body": ops}], shape
    raise refused("")


def _or_zeros(bias: Tensor | None, size: int) -> Tensor:
    return torch.zeros(size) if bias is None else bias


def _transposed(
    module: nn.ConvTranspose2d, shape: tuple[int, ...], stored: Any
) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    channels, height, width = shape
    kernel, stride, padding = (
        int(n[0]) for n in (module.kernel_size, module.stride, module.padding)
    )
    weight, bias = stored(module.weight, _or_zeros(module.bias, module.out_channels))
    op = {
        "op": "conv_transpose",
        "channels": channels,
        "outputs": module.out_channels,
        "height": height,
        "width": width,
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
        "weight": weight,
        "bias": bias,
    }
    grown = ((side - 1) * stride - 2 * padding + kernel for side in (height, width))
    return [op], (module.out_channels, *grown)


def _mean_op(likelihood: nn.Module) -> str:
    """How the page makes pixels of the decoder's output."""
    if (op := getattr(likelihood, "drawn_as", None)) in _MEANS:
        return str(op)
    raise ExplorerError(
        f"the page cannot draw the likelihood {type(likelihood).__name__}: its drawn_as is none of "
        f"{', '.join(_MEANS)}"
    )


@torch.no_grad()
def _refuse_other_pixels(vae: VAE, ops: list[dict[str, Any]], mean: str, packed: Tensor) -> None:
    """Whether the page's operations give the model's pixels: a layer may compute what it likes.

    Raises:
        ExplorerError: They do not.
    """
    weight = next(vae.parameters())
    z = 2 * torch.randn(8, vae.latent_dim, generator=torch.Generator().manual_seed(0))
    logits = vae.decode(z.to(weight))
    pixels = vae.likelihood.mean(logits)
    theirs = [part.float().cpu().flatten(1) for part in (logits, pixels)]
    try:
        ours = _run(ops, z, packed)
        off = [
            (got - right).abs().max().item() / max(1.0, right.abs().max().item())
            for got, right in zip((ours, _run([{"op": mean}], ours, packed)), theirs, strict=True)
        ]
    except RuntimeError as error:  # of shapes that do not chain
        raise ExplorerError(
            f"the page cannot run the decoder {type(vae.decoder).__name__} ({error})"
        ) from None
    for part, by in zip((vae.decoder, vae.likelihood), off, strict=True):
        if not by < 0.01:
            raise ExplorerError(
                f"the page would not draw what the model does: {type(part).__name__} is no chain "
                f"of layers that the page knows; it runs {_LAYERS}"
            )


def _run(ops: list[dict[str, Any]], x: Tensor, packed: Tensor) -> Tensor:
    """What explorer.html computes of x (n, inputs): (n, outputs)."""

    def stored(begin: int, *shape: int) -> Tensor:
        return packed[begin : begin + math.prod(shape)].view(shape)

    functions = torch.nn.functional
    elementwise: dict[str, Any] = {op: kind() for kind, op in _ACTIVATION_OPS.items()}
    elementwise |= {op: kind().mean for op, kind in _MEANS.items()}
    for op in ops:
        name = op["op"]
        if name == "linear":
            weight = stored(op["weight"], op["outputs"], op["inputs"])
            x = functions.linear(x, weight, stored(op["bias"], op["outputs"]))
        elif name == "layer_norm":
            size = x.shape[1]
            weight, bias = stored(op["weight"], size), stored(op["bias"], size)
            x = functions.layer_norm(x, (size,), weight, bias, op["eps"])
        elif name == "conv_transpose":
            sheet = x.view(-1, op["channels"], op["height"], op["width"])
            weight = stored(op["weight"], op["channels"], op["outputs"], op["kernel"], op["kernel"])
            bias = stored(op["bias"], op["outputs"])
            sheet = functions.conv_transpose2d(sheet, weight, bias, op["stride"], op["padding"])
            x = sheet.flatten(1)
        elif name == "residual":
            x = x + _run(op["body"], x, packed)
        else:
            x = elementwise[name](x)
    return x


def _image_size(vae: VAE) -> tuple[int, int]:
    shape = vae.input_shape
    if len(shape) == 1 and math.isqrt(shape[0]) ** 2 == shape[0]:
        return math.isqrt(shape[0]), math.isqrt(shape[0])
    if len(shape) == 2 or (len(shape) == 3 and shape[0] == 1):
        return shape[-2], shape[-1]
    raise ExplorerError(
        f"the page cannot draw images of shape {shape}; it draws grey ones: (height, width), "
        "(1, height, width), or flat and square"
    )


@torch.no_grad()
def _without_images(vae: VAE) -> dict[str, Any]:
    """Where the prior lies, for a page without points."""
    weight = next(vae.parameters())
    generator = seeded_generator(weight.device, 0)
    z = vae.prior.sample(1000, generator).float().cpu()
    return {"points": 0, "centre": _listed(z.mean(0)), "spread": _listed(z.std(0))}


@torch.no_grad()
def _with_images(
    vae: VAE, x: Tensor, labels: Tensor, available: int, data_name: str
) -> dict[str, Any]:
    mean, logvar, terms = _posterior_and_terms(vae, x)
    if not all(bool(values.isfinite().all()) for values in (mean, logvar, *terms.values())):
        raise ExplorerError("the model's posterior or its elbo is not finite; did it diverge?")
    variance = mean.var(0) if len(mean) > 1 else torch.zeros(vae.latent_dim)
    classes = labels.cpu()
    kinds, index = classes.unique(return_inverse=True)
    names = _CLASS_NAMES.get(data_name, ())
    # one image says nothing about how the means vary
    collapsed = len(mean) > 1 and not bool((variance > ACTIVE_UNIT_VARIANCE).any())
    page = {
        "points": len(x),
        "available": available,
        "collapsed": collapsed,
        "means": _half_base64(mean),
        "logvars": _half_base64(logvar),
        "terms": {name: _listed(values, 2) for name, values in terms.items()},
        "classes": index.tolist(),
        "class_names": [names[k] if k < len(names) else str(k) for k in kinds.tolist()],
        "colours": [DIGIT_COLOURS[i % len(DIGIT_COLOURS)] for i in range(len(kinds))],
        "sprite": _sprite(pictures(vae, x)),
        "sprite_columns": _SPRITE_COLUMNS,
        "centre": _listed(mean.mean(0)),
        "spread": _listed(variance.sqrt()),
    }
    if vae.latent_dim > 2 and len(x) > 2:
        page["components"] = _principal_components(mean)
    return page


def _posterior_and_terms(
    vae: VAE, x: Tensor, *, draws: int = 8
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Mean and logvar (N, latent_dim), and each image's elbo = reconstruction - kl (N,), in nats.

    The KL is in closed form where the prior is N(0, 1); all else is a mean over `draws` of z.
    """
    device = next(vae.parameters()).device
    generator = seeded_generator(device, 0)
    posteriors, terms = [], []
    for some in x.to(device).split(250):
        posteriors.append(gaussian_of(vae.encode(some), "the page"))
        eps = torch.randn(draws, len(some), vae.latent_dim, generator=generator, device=device)
        parts = bound(vae, Batch(some), eps)
        terms.append({"elbo": parts.reconstruction - parts.kl, **parts.metrics()})
    mean, logvar = (torch.cat(part).float().cpu() for part in zip(*posteriors, strict=True))
    names = ("elbo", "reconstruction", "kl")
    whole = {name: torch.cat([term[name] for term in terms]).float().cpu() for name in names}
    return mean, logvar, whole


def _principal_components(means: Tensor) -> dict[str, Any]:
    """Directions in which the posterior means vary most, and each one's share of the variance."""
    variance, directions = torch.linalg.eigh(means.double().T.cov())
    variance, directions = variance.flip(0).clamp_min(0), directions.flip(1).T
    count = int((variance > ACTIVE_UNIT_VARIANCE).sum().clamp(2, _MOST_COMPONENTS))
    directions = directions[:count]
    # the sign of an eigenvector is free: let its largest entry be positive
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    directions = directions * largest.sign()
    share = variance[:count] / variance.sum().clamp_min(1e-12)
    return {"count": count, "share": _listed(share), "directions": _half_base64(directions)}


def _sprite(images: Tensor) -> str:
    """All images (n, H, W) as one grey PNG, row by row without a gap, in base64."""
    from PIL import Image

    n, height, width = images.shape
    rows = -(-n // _SPRITE_COLUMNS)
    table = torch.zeros(rows * _SPRITE_COLUMNS, height, width)
    table[:n] = images
    table = table.reshape(rows, _SPRITE_COLUMNS, height, width).transpose(1, 2)
    buffer = io.BytesIO()
    picture = to_pixels(table.reshape(rows * height, _SPRITE_COLUMNS * width))
    Image.fromarray(picture).save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _half_base64(values: Tensor) -> str:
    halves = values.detach().cpu().numpy().astype("<f2")
    return base64.b64encode(np.ascontiguousarray(halves).tobytes()).decode()


def _listed(values: Tensor, digits: int = 4) -> list[float]:
    return [round(v, digits) for v in values.tolist()]


def _fill(page: dict[str, Any]) -> str:
    """The template with the page's data in it; no text of a run can end the script or a tag."""
    data = json.dumps(page, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    content = {"TITLE": html.escape(page["title"]), "DATA": data}
    template = resources.files("vae_torch").joinpath("explorer.html").read_text("utf-8")
    return re.sub(r"\{\{(TITLE|DATA)\}\}", lambda found: content[found[1]], template)
