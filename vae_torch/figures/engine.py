"""What explorer.html runs: a decoder as a list of operations, or a grid of decoded images."""

import base64
import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vae_torch.parts.likelihoods import Bernoulli, ContinuousBernoulli, Gaussian
from vae_torch.parts.networks import ConvBlock
from vae_torch.vae import VAE

_GRID_SIDES = {1: (33, 65, 129, 257), 2: (17, 25, 33, 49, 65)}  # by latents; tried in this order
_GRID_ERROR = 0.02  # mean error per pixel between decoded images, at most
_DECODED = 2**24  # pixels at once: limits memory

_ACTIVATION_OPS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Sigmoid: "sigmoid",
}
_LAYERS = (
    "Linear, LayerNorm, ConvTranspose2d, Conv2d with stride 1, Unflatten, residual blocks and "
    + ", ".join(sorted(kind.__name__ for kind in _ACTIVATION_OPS))
)
# How the page turns decoder outputs into pixels, by a likelihood's `drawn_as`.
_MEANS = {"sigmoid": Bernoulli, "continuous": ContinuousBernoulli, "clamp": Gaussian}


class ExplorerError(ValueError):
    """No page can be made of this model: one line that says why."""


def packed_decoder(vae: VAE, *, max_bytes: int) -> dict[str, Any]:
    """The decoder for the page to run: `ops`, `weights`, and `mean`, which makes the pixels.

    Raises:
        ExplorerError: The weights are not finite, or larger than `max_bytes`; or the page does not
            know a layer or the likelihood, or would draw other pixels than the model.
    """
    mean = mean_op(vae.likelihood)
    weights: list[Tensor] = []
    ops = decoder_ops(vae.decoder, vae.latent_dim + (vae.classes or 0), weights)
    packed = torch.cat([torch.zeros(0), *(w.detach().float().cpu().flatten() for w in weights)])
    if not bool(packed.half().isfinite().all()):
        raise ExplorerError("the decoder's weights are not finite; did it diverge?")
    if 2 * len(packed) * 4 / 3 > max_bytes:
        raise ExplorerError(
            f"the decoder has {len(packed):,} weights, which alone make a page larger than "
            f"{max_bytes / 1e6:.0f} MB; explore a model with a smaller model.intermediate_dim, or "
            "model.options.channels with model=resnet"
        )
    _refuse_other_pixels(vae, ops, mean, packed)
    return {"ops": ops, "weights": half_base64(packed), "mean": mean}


@torch.no_grad()
def decoded_grid(
    vae: VAE, low: Tensor, high: Tensor, *, max_bytes: int, reason: str
) -> dict[str, Any]:
    """Decoded images on an even grid of one or two latents, between which the page interpolates.

    Args:
        vae: The model.
        low: (latent_dim,), the corner with the smallest coordinates.
        high: (latent_dim,), the opposite corner.
        max_bytes: Limit for all images.
        reason: Why the page does not run the decoder itself.

    Raises:
        ExplorerError: No grid of this size is close to the model; the message begins with `reason`.
    """
    off = math.inf
    for side in _GRID_SIDES[vae.latent_dim]:
        if side**vae.latent_dim * math.prod(vae.input_shape) * 4 / 3 > max_bytes:
            break
        nodes = _grid_pixels(vae, low, high, torch.linspace(0, 1, side))
        if not bool(nodes.isfinite().all()):
            raise ExplorerError("the decoder's images are not finite; did it diverge?")
        nodes = (nodes.clamp(0, 1) * 255).round()
        middles = torch.linspace(0, 1, 2 * side - 1)[1::2]  # as far as possible from decoded images
        right = _grid_pixels(vae, low, high, middles).clamp(0, 1)
        off = (_between(nodes) / 255 - right).abs().flatten(vae.latent_dim).mean(-1).max().item()
        if off < _GRID_ERROR:
            pixels = nodes.to(torch.uint8).numpy().tobytes()
            return {
                "side": side,
                "low": low.tolist(),
                "high": high.tolist(),
                "pixels": base64.b64encode(pixels).decode(),
            }
    lacking = f"is off by {off:.2f} a pixel" if math.isfinite(off) else "does not fit into a page"
    raise ExplorerError(f"{reason}; and a grid of decoded images {lacking}")


def _grid_pixels(vae: VAE, low: Tensor, high: Tensor, places: Tensor) -> Tensor:
    """Pixels at these places of each side: (side, [side,] pixels), the first latent last."""
    axes = [first + places * (last - first) for first, last in zip(low, high, strict=True)]
    z = torch.stack(torch.meshgrid(*axes[::-1], indexing="ij")[::-1], -1)
    weight = next(vae.parameters())
    at_once = max(1, _DECODED // math.prod(vae.input_shape))
    parts = z.reshape(-1, vae.latent_dim).to(weight).split(at_once)
    found = [vae.likelihood.mean(vae.decode(part)).float().cpu().flatten(1) for part in parts]
    return torch.cat(found).reshape(*z.shape[:-1], -1)


def _between(nodes: Tensor) -> Tensor:
    """Interpolate the centres of a grid's cells, as the page does."""
    for axis in range(nodes.ndim - 1):
        length = nodes.shape[axis] - 1
        nodes = (nodes.narrow(axis, 0, length) + nodes.narrow(axis, 1, length)) / 2
    return nodes


def half_base64(values: Tensor) -> str:
    """Values as half floats in base64, as the page reads them."""
    halves = values.detach().cpu().numpy().astype("<f2")
    return base64.b64encode(np.ascontiguousarray(halves).tobytes()).decode()


def decoder_ops(decoder: nn.Module, latent_dim: int, weights: list[Tensor]) -> list[dict[str, Any]]:
    """The decoder as a list of operations for the page; appends their weights to `weights`.

    Each operation has a name under `op`, its sizes, and the index at which its weights begin when
    all weights are flattened and joined.

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


def _ops(
    module: nn.Module, shape: tuple[int, ...], weights: list[Tensor]
) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """The operations of one module for an input of `shape`, and the shape of its output."""

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
        if module.groups != 1 or set(module.dilation) != {1}:
            raise refused(" with groups or dilation")
        return _transposed(module, shape, stored)
    if isinstance(module, nn.Conv2d):
        return _ops(_as_transposed(module, refused), shape, weights)
    if isinstance(module, nn.Unflatten):
        return [], tuple(module.unflattened_size)
    if type(module) in _ACTIVATION_OPS:
        if getattr(module, "approximate", "none") != "none":
            raise refused(f" with approximate={module.approximate}")
        return [{"op": _ACTIVATION_OPS[type(module)]}], shape
    body = getattr(module, "body", None)  # of a residual block: x + body(x)
    if isinstance(body, nn.Sequential):
        if isinstance(module, ConvBlock):
            body = nn.Sequential(*body[:-1], _scaled(body[-1], module.scale))
        ops, shape = _ops(body, shape, weights)
        return [{"op": "residual", "body": ops}], shape
    raise refused("")


def _or_zeros(bias: Tensor | None, size: int) -> Tensor:
    return torch.zeros(size) if bias is None else bias


@torch.no_grad()
def _as_transposed(
    module: nn.Conv2d, refused: Callable[[str], ExplorerError]
) -> nn.ConvTranspose2d:
    """The transposed convolution that computes the same, for one with stride 1 and a square kernel.

    Raises:
        ExplorerError: Another convolution.
    """
    kernel, padding = module.kernel_size[0], module.padding[0]
    square = len(set(module.kernel_size)) == len(set(module.padding)) == 1
    plain = module.padding_mode == "zeros" and module.groups == 1 and set(module.dilation) == {1}
    if not square or isinstance(padding, str) or padding >= kernel:
        raise refused(" that is not square, or padded by as much as its kernel")
    if not plain or set(module.stride) != {1}:
        raise refused(" with a stride, groups, dilation or other padding than zeros")
    same = nn.ConvTranspose2d(
        module.in_channels, module.out_channels, kernel, padding=kernel - 1 - padding
    )
    same.weight.copy_(module.weight.transpose(0, 1).flip(2, 3))
    assert same.bias is not None
    same.bias.copy_(_or_zeros(module.bias, module.out_channels))
    return same


@torch.no_grad()
def _scaled(module: nn.Module, scale: Tensor) -> nn.Module:
    """A convolution with its outputs times a factor per channel, (channels, 1, 1)."""
    assert isinstance(module, nn.Conv2d)
    scaled = copy.deepcopy(module)
    scaled.weight.mul_(scale.unsqueeze(1))
    if scaled.bias is not None:
        scaled.bias.mul_(scale.flatten())
    return scaled


def _transposed(
    module: nn.ConvTranspose2d, shape: tuple[int, ...], stored: Any
) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    channels, height, width = shape
    kernel, stride, padding = (
        int(n[0]) for n in (module.kernel_size, module.stride, module.padding)
    )
    below, beside = (int(n) for n in module.output_padding)
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
        "below": below,
        "beside": beside,
        "weight": weight,
        "bias": bias,
    }
    grown = (
        (side - 1) * stride - 2 * padding + kernel + more
        for side, more in ((height, below), (width, beside))
    )
    return [op], (module.out_channels, *grown)


def mean_op(likelihood: nn.Module) -> dict[str, Any]:
    """How the page turns decoder outputs into pixels.

    Raises:
        ExplorerError: The page does not know the likelihood's `drawn_as`.
    """
    op = getattr(likelihood, "drawn_as", None)
    if op == "logistic":
        return {"op": op, "mixtures": int(getattr(likelihood, "mixtures", 1))}
    if op in _MEANS:
        return {"op": op}
    raise ExplorerError(
        f"the page cannot draw the likelihood {type(likelihood).__name__}: its drawn_as is none of "
        f"{', '.join(_MEANS)}, logistic"
    )


@torch.no_grad()
def _refuse_other_pixels(
    vae: VAE, ops: list[dict[str, Any]], mean: dict[str, Any], packed: Tensor
) -> None:
    """Check that the page's operations give the model's pixels: a layer may compute anything.

    Raises:
        ExplorerError: They do not.
    """
    weight = next(vae.parameters())
    z = inputs = 2 * torch.randn(8, vae.latent_dim, generator=torch.Generator().manual_seed(0))
    if classes := vae.classes:
        labels = torch.arange(8) % classes
        vae = vae.given(labels)
        inputs = torch.cat([z, torch.nn.functional.one_hot(labels, classes)], 1)
    try:
        made = vae.decoder(inputs.to(weight))
        pixels = vae.likelihood.mean(vae.decode(z.to(weight)))
        theirs = [part.float().cpu().flatten(1) for part in (made, pixels)]
        ours = _run(ops, inputs, packed)
        off = [
            (got - right).abs().max().item() / max(1.0, right.abs().max().item())
            for got, right in zip((ours, _run([mean], ours, packed)), theirs, strict=True)
        ]
    except RuntimeError as error:  # shapes that do not fit together
        raise ExplorerError(
            f"the page cannot run the decoder {type(vae.decoder).__name__} ({error})"
        ) from None
    for part, by in zip((vae.decoder, vae.likelihood), off, strict=True):
        if not by < 0.01:
            raise ExplorerError(
                f"the page would not draw what the model does: {type(part).__name__} is not a "
                f"chain of layers that the page knows; it runs {_LAYERS}"
            )


def _run(ops: list[dict[str, Any]], x: Tensor, packed: Tensor) -> Tensor:
    """What explorer.html computes from x (n, inputs): (n, outputs)."""

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
            more = (op["below"], op["beside"])
            sheet = functions.conv_transpose2d(
                sheet, weight, bias, op["stride"], op["padding"], more
            )
            x = sheet.flatten(1)
        elif name == "logistic":
            x = _logistic_mean(x, op["mixtures"])
        elif name == "residual":
            x = x + _run(op["body"], x, packed)
        else:
            x = elementwise[name](x)
    return x


def _logistic_mean(x: Tensor, mixtures: int) -> Tensor:
    """Means of mixtures of logistics: (n, outputs * pixels), output by output -> (n, pixels).

    The outputs are the weights of the mixture (if it has several logistics), the centres, which are
    clamped to [0, 1], and the scales.
    """
    outputs = x.view(len(x), 2 if mixtures == 1 else 3 * mixtures, -1)
    if mixtures == 1:
        return (0.5 + outputs[:, 0]).clamp(0, 1)
    shares = outputs[:, :mixtures].softmax(1)
    return (shares * (0.5 + outputs[:, mixtures : 2 * mixtures]).clamp(0, 1)).sum(1)
