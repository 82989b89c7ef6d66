"""log p(x | z) of an image under the decoder's output, summed over pixels, in nats.

Each likelihood reads one decoder output per pixel (called `logits` for all of them) and offers the
same three methods: `log_prob(x, logits)`; `mean(logits)`, the expected pixel values in [0, 1]; and
`affine(x, logits)`, which evaluates every image under every decoder output with one matrix product:
all three log-densities are affine in x (the Gaussian up to a term without z).

What an image may look like is decided here too: `as_images` its shape, `check_pixels` its values.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

# The pixels that a likelihood has a density for, unless it says otherwise in `pixels`.
UNIT_INTERVAL = (0.0, 1.0)


class Bernoulli(nn.Module):
    r"""log p(x|z) = Σ_pixels x log σ(l) + (1 - x) log(1 - σ(l)).

    For grey x in [0, 1] this is the cross-entropy that the Keras notebook uses: a bound's worth of
    nats, but no normalised density of grey images (see `ContinuousBernoulli`).
    """

    name = "bernoulli"

    def log_prob(self, x: Tensor, logits: Tensor) -> Tensor:
        """Nats per image.

        Args:
            x: (B, *shape), values in [0, 1].
            logits: (..., B, *shape).

        Returns:
            (..., B).

        Raises:
            ValueError: The images of x and of logits differ in shape or number.
        """
        x, logits = pair_images(x, logits)
        if is_transformed(x, logits):  # torch.func sees through torch's own operations only
            return (x * logits + F.logsigmoid(-logits)).sum(-1)
        terms: Tensor = _BernoulliTerms.apply(x, logits)
        return terms

    def affine(self, x: Tensor, logits: Tensor) -> Tensor:
        """Nats of each image under each output: (N, pixels) and (G, pixels) -> (N, G)."""
        if logits.requires_grad or is_transformed(logits):
            even = self.log_prob(torch.full_like(logits, 0.5), logits)  # smooth at 0, unlike |l|
        else:
            even = _even_part(logits)
        return torch.addmm(even, x - 0.5, logits.T)

    def mean(self, logits: Tensor) -> Tensor:
        """Pixel probabilities, in the shape of `logits`."""
        return torch.sigmoid(logits)


class _BernoulliTerms(torch.autograd.Function):
    """Σ_pixels x l - softplus(l), with its gradient x - σ(l) in three passes over the pixels.

    Autograd's own chain makes ten. No finite logit is turned into log(0).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor) -> Tensor:
        """(B, pixels) and (..., B, pixels) -> (..., B)."""
        ctx.save_for_backward(x, logits)
        # no vecdot: under autocast it would round both to bf16
        terms: Tensor = ((x - 0.5) * logits).sum(-1) + _even_part(logits)
        return terms

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of x too, where it is asked for; in operations that can be differentiated again."""
        x, logits = ctx.saved_tensors
        grad_x = grad_logits = None
        grad = grad.unsqueeze(-1)
        if ctx.needs_input_grad[0]:
            grad_x = (logits * grad).sum_to_size(x.shape)
        if ctx.needs_input_grad[1]:
            grad_logits = (x - torch.sigmoid(logits)).mul_(grad)
        return grad_x, grad_logits


def _even_part(logits: Tensor) -> Tensor:
    """Σ_pixels log σ(|l|) - |l| / 2, which with (x - 1/2) l is the whole term: (..., P) -> (...).

    One temporary of the pixels' size. A logarithm is dear and only the sum is wanted, so one is
    taken of the product of eight pixels, which lies in [1/256, 1].
    """
    size = logits.abs()
    linear = size.sum(-1)
    groups = math.gcd(logits.shape[-1], 8)
    logs = size.sigmoid_().unflatten(-1, (groups, -1)).prod(-2).log()
    return torch.add(logs.sum(-1), linear, alpha=-0.5)


class ContinuousBernoulli(nn.Module):
    r"""The Bernoulli term plus the log-normaliser that makes it a density on [0, 1].

    Loaiza-Ganem and Cunningham, *The continuous Bernoulli* (NeurIPS 2019), equation 6:
    log C(λ) = log(2 tanh⁻¹(1 - 2λ) / (1 - 2λ)). With λ = σ(l) that is log(l / tanh(l / 2)), which
    is smooth at l = 0 where the paper's form divides 0 by 0.
    """

    name = "continuous_bernoulli"

    def log_prob(self, x: Tensor, logits: Tensor) -> Tensor:
        """Nats per image: (B, *shape) and (..., B, *shape) -> (..., B)."""
        x, logits = pair_images(x, logits)
        return (x * logits - F.softplus(logits) + _log_normalizer(logits)).sum(-1)

    def affine(self, x: Tensor, logits: Tensor) -> Tensor:
        """Nats of each image under each output: (N, pixels) and (G, pixels) -> (N, G)."""
        return torch.addmm((_log_normalizer(logits) - F.softplus(logits)).sum(-1), x, logits.T)

    def mean(self, logits: Tensor) -> Tensor:
        """Expected pixel values: σ(l) is the parameter, its mean is 1/(1 - e^-l) - 1/l."""
        near = logits.abs() < 0.05  # there the difference of two large numbers loses its digits
        safe = torch.where(near, torch.ones_like(logits), logits)
        exact = -1 / torch.expm1(-safe) - 1 / safe
        return torch.where(near, 0.5 + logits / 12 - logits**3 / 720, exact).clamp(0, 1)


class Gaussian(nn.Module):
    """N(x; l, σ²) with one learned log-variance for all pixels; nats of density, not of mass."""

    name = "gaussian"
    pixels = (-math.inf, math.inf)

    def __init__(self) -> None:
        super().__init__()
        self.logvar = nn.Parameter(torch.zeros(()))

    def log_prob(self, x: Tensor, logits: Tensor) -> Tensor:
        """Nats per image: (B, *shape) and (..., B, *shape) -> (..., B)."""
        x, logits = pair_images(x, logits)
        squares = (x - logits) ** 2 * torch.exp(-self.logvar)
        return (-0.5 * (squares + self.logvar + math.log(2 * math.pi))).sum(-1)

    def affine(self, x: Tensor, logits: Tensor) -> Tensor:
        """Nats of each image under each output: (N, pixels) and (G, pixels) -> (N, G)."""
        center = x.mean(0)  # or else the squares cancel where σ is small
        x, logits = x - center, logits - center
        scale = torch.exp(-self.logvar)
        normalizer = 0.5 * x.shape[-1] * (self.logvar + math.log(2 * math.pi))
        offset = -0.5 * scale * (logits**2).sum(-1) - normalizer
        return torch.addmm(offset, x, scale * logits.T) - 0.5 * scale * (x**2).sum(-1, True)

    def mean(self, logits: Tensor) -> Tensor:
        """The decoder's output, held inside [0, 1] so that it is an image."""
        return logits.clamp(0, 1)


LIKELIHOODS: dict[str, type[Bernoulli | ContinuousBernoulli | Gaussian]] = {
    kind.name: kind for kind in (Bernoulli, ContinuousBernoulli, Gaussian)
}


def _log_normalizer(logits: Tensor) -> Tensor:
    """log(l / tanh(l / 2)), even in l; its Taylor series near 0, where l/tanh is 0/0."""
    size = logits.abs()
    near = size < 0.2
    safe = torch.where(near, torch.ones_like(size), size)
    # tanh(a/2) = (1 - e^-a) / (1 + e^-a)
    exact = safe.log() + torch.log1p(torch.exp(-safe)) - torch.log(-torch.expm1(-safe))
    square = logits**2
    series = math.log(2) + square / 12 - 7 * square**2 / 1440 + 31 * square**3 / 90720
    return torch.where(near, series, exact)


def as_images(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Images in the shape that a model reads: (B, *any) -> (B, *shape).

    Args:
        x: Images, floats.
        shape: Of one image.

    Raises:
        ValueError: Another shape (see `check_shape`), or integer pixels.
    """
    check_shape(x, shape)
    _check_floats(x)
    return x.reshape(len(x), *shape)


def check_shape(x: Tensor, shape: Sequence[int]) -> None:
    """Refuse what holds no images of this shape.

    The shapes must be equal once dimensions of size 1 are dropped, or one of them flat. Whatever
    else has as many pixels is refused: its channels would become images, or rows of pixels.

    Args:
        x: (B, *any).
        shape: Of one image.

    Raises:
        ValueError: Shows both shapes.
    """
    if x.ndim > 1 and _same_image(x.shape[1:], shape):
        return
    flat, whole = f"(B, {math.prod(shape)})", f"(B, {', '.join(map(str, shape))})"
    allowed = f"{flat}, or any shape with as many pixels after B"
    if len(_without_ones(shape)) > 1:
        allowed = f"{whole} or {flat}"
    raise ValueError(f"x has shape {tuple(x.shape)}; this model takes {allowed}")


def pair_images(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Images beside what a decoder made for them: (B, pixels) and (..., B, pixels).

    Args:
        x: (B, *shape).
        logits: (..., B, *shape), or either of them flat.

    Raises:
        ValueError: Images of other shapes, or other numbers of them.
    """
    if logits.shape[logits.ndim - x.ndim :] == x.shape:
        return x.flatten(1), logits.flatten(logits.ndim - x.ndim + 1)
    places = [  # of B in the shape of logits
        place
        for place, size in enumerate(logits.shape[:-1])
        if x.ndim > 1 and size == len(x) and _same_image(x.shape[1:], logits.shape[place + 1 :])
    ]
    if len(places) != 1:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and logits {tuple(logits.shape)}; both must hold as "
            "many images, of one shape, (B, *shape) and (..., B, *shape)"
        )
    return x.flatten(1), logits.flatten(places[0] + 1)


def check_pixels(x: Tensor, allowed: tuple[float, float] = UNIT_INTERVAL) -> None:
    """Refuse pixels that are NaN, infinite or out of range.

    Where values cannot be read (torch.func, torch.compile, a CUDA graph, the meta device), nothing
    is checked.

    Args:
        x: Pixels, floats.
        allowed: The lowest and the highest value that a pixel may have.

    Raises:
        ValueError: Shows the shape and the range of x, or the type where x holds integers.
    """
    _check_floats(x)
    if x.numel() == 0 or not _can_be_read(x):
        return
    low, high = torch.stack(x.detach().aminmax()).tolist()
    if not (math.isfinite(low) and math.isfinite(high) and allowed[0] <= low <= high <= allowed[1]):
        needed = "in [0, 1] (divide bytes by 255)" if allowed == UNIT_INTERVAL else "and finite"
        raise ValueError(
            f"x of shape {tuple(x.shape)} has values from {low:g} to {high:g}; pixels are floats "
            f"{needed}"
        )


def _check_floats(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; pixels are floats in [0, 1] (divide bytes by 255)")


def _same_image(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes are those of one image."""
    a, b = _without_ones(a), _without_ones(b)
    return a == b or (math.prod(a) == math.prod(b) and min(len(a), len(b)) < 2)


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def is_transformed(*tensors: Tensor) -> bool:
    """Whether torch.func or forward-mode differentiation looks at these operations."""
    if torch._C._are_functorch_transforms_active():
        return True
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _can_be_read(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or x.is_meta:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())
