"""log p(x | z) of an image under the decoder's output, summed over pixels, in nats.

A likelihood is a module:

    @likelihoods.register("mine")
    class Mine(nn.Module):
        outputs = 2  # decoder outputs per pixel; 1 if left out
        def __init__(self, *, width: float = 1.0) -> None: ...
        def log_prob(self, x, params) -> Tensor: ...  # nats per image, (..., B)
        def mean(self, params) -> Tensor: ...  # expected pixels in [0, 1], (..., *shape)

`params` are (..., *shape), or (..., *shape, outputs) with several outputs per pixel. An argument
`input_shape` before the star gets the shape of an image. A likelihood whose log p is affine in x
can also have `affine(x, params)`, which evaluates every image under every decoder output with one
matrix multiplication. Pixels may lie in [0, 1], or in the range that its `pixels` gives. `drawn_as`
tells the explorer page how to turn params into pixels. `levels` says that log_prob is the
probability of one of so many pixel values, which bits per dimension need.
"""

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd import forward_ad

from vae_torch.config import Count
from vae_torch.images import pair_images
from vae_torch.parts.registry import Table

_IN_CACHE = 2**18  # numbers that a pass over many outputs looks at, at once

likelihoods: "Table[type[nn.Module]]" = Table("likelihood", "likelihood_options")


@likelihoods.register("bernoulli")
class Bernoulli(nn.Module):
    r"""log p(x|z) = Σ_pixels x log σ(l) + (1 - x) log(1 - σ(l)).

    For grey x in [0, 1] this is the cross-entropy of the Keras notebook. It is in nats, but it is
    not a normalised density of grey images (see `ContinuousBernoulli`).
    """

    drawn_as = "sigmoid"

    def log_prob(self, x: Tensor, logits: Tensor) -> Tensor:
        """Nats per image.

        Args:
            x: (B, *shape), values in [0, 1].
            logits: (..., B, *shape).

        Returns:
            (..., B).

        Raises:
            ValueError: x and logits hold different numbers of images, or images of other shapes.
        """
        return bernoulli_terms(*pair_images(x, logits))

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


def bernoulli_terms(x: Tensor, logits: Tensor) -> Tensor:
    """Σ_pixels x l - softplus(l): (B, pixels) and (..., B, pixels) -> (..., B), nats."""
    if is_transformed(x, logits):  # torch.func cannot transform a custom autograd function
        return (x * logits + F.logsigmoid(-logits)).sum(-1)
    terms: Tensor = _BernoulliTerms.apply(x, logits)
    return terms


class _BernoulliTerms(torch.autograd.Function):
    """Σ_pixels x l - softplus(l), with its gradient x - σ(l) in three passes over the pixels.

    Autograd would make ten passes. No finite logit leads to log(0).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor) -> Tensor:
        """(B, pixels) and (..., B, pixels) -> (..., B)."""
        ctx.save_for_backward(x, logits)
        # not vecdot: under autocast it would round both to bf16
        terms: Tensor = ((x - 0.5) * logits).sum(-1) + _even_part(logits)
        return terms

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients, for x only if needed; the operations can be differentiated again."""
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

    Memory for one temporary of the pixels' size. Logarithms are slow and only their sum is needed,
    so one is taken of the product of eight pixels, which lies in [1/256, 1].
    """
    size = logits.abs()
    linear = size.sum(-1)
    groups = math.gcd(logits.shape[-1], 8)
    logs = size.sigmoid_().unflatten(-1, (groups, -1)).prod(-2).log()
    return torch.add(logs.sum(-1), linear, alpha=-0.5)


@likelihoods.register("continuous_bernoulli")
class ContinuousBernoulli(nn.Module):
    r"""The Bernoulli term plus the log-normaliser that makes it a density on [0, 1].

    Loaiza-Ganem and Cunningham, *The continuous Bernoulli* (NeurIPS 2019), equation 6:
    log C(λ) = log(2 tanh⁻¹(1 - 2λ) / (1 - 2λ)). With λ = σ(l) that is log(l / tanh(l / 2)), which
    is smooth at l = 0 where the paper's form divides 0 by 0.
    """

    drawn_as = "continuous"

    def log_prob(self, x: Tensor, logits: Tensor) -> Tensor:
        """Nats per image: (B, *shape) and (..., B, *shape) -> (..., B)."""
        x, logits = pair_images(x, logits)
        return (x * logits - F.softplus(logits) + _log_normalizer(logits)).sum(-1)

    def affine(self, x: Tensor, logits: Tensor) -> Tensor:
        """Nats of each image under each output: (N, pixels) and (G, pixels) -> (N, G)."""
        return torch.addmm((_log_normalizer(logits) - F.softplus(logits)).sum(-1), x, logits.T)

    def mean(self, logits: Tensor) -> Tensor:
        """Expected pixel values: σ(l) is the parameter, its mean 1/(1 - e^-l) - 1/l.

        1/(1 - e^-l) is written as (1 + 1/tanh(l/2))/2: ONNX has no `expm1`.
        """
        near = logits.abs() < 0.05  # near 0 the difference of two large numbers loses digits
        safe = torch.where(near, torch.ones_like(logits), logits)
        exact = 0.5 + 0.5 / torch.tanh(0.5 * safe) - 1 / safe
        return torch.where(near, 0.5 + logits / 12 - logits**3 / 720, exact).clamp(0, 1)


@likelihoods.register("gaussian")
class Gaussian(nn.Module):
    """N(x; l, σ²) with one variance for all pixels: log-densities in nats, not probabilities.

    Args:
        sigma: `optimal`: in train mode σ² is the mean squared residual of each batch, which
            maximises log p; eval mode keeps the last value. Rybkin, Daniilidis and Levine, *Simple
            and Effective VAE Training with Calibrated Decoders* (ICML 2021). First derivatives are
            those of log p at that σ²; second derivatives treat σ² as constant. `learned`: a
            parameter that starts at σ = 1.
    """

    drawn_as = "clamp"
    pixels = (-math.inf, math.inf)

    def __init__(self, *, sigma: Literal["optimal", "learned"] = "optimal") -> None:
        super().__init__()
        self.logvar: Tensor
        if sigma == "learned":
            self.logvar = nn.Parameter(torch.zeros(()))
        else:
            self.register_buffer("logvar", torch.zeros(()))
        self.optimal = sigma == "optimal"

    def log_prob(self, x: Tensor, logits: Tensor) -> Tensor:
        """Nats per image: (B, *shape) and (..., B, *shape) -> (..., B)."""
        x, logits = pair_images(x, logits)
        squares = (x - logits) ** 2
        if self.optimal and self.training and not is_transformed(x, logits):
            with torch.no_grad():
                self.logvar.copy_(squares.mean().clamp(min=1e-8).log())
        squares = squares * torch.exp(-self.logvar)
        return (-0.5 * (squares + self.logvar + math.log(2 * math.pi))).sum(-1)

    def affine(self, x: Tensor, logits: Tensor) -> Tensor:
        """Nats of each image under each output: (N, pixels) and (G, pixels) -> (N, G)."""
        center = x.mean(0)  # center first: else the squares cancel where σ is small
        x, logits = x - center, logits - center
        scale = torch.exp(-self.logvar)
        normalizer = 0.5 * x.shape[-1] * (self.logvar + math.log(2 * math.pi))
        offset = -0.5 * scale * (logits**2).sum(-1) - normalizer
        return torch.addmm(offset, x, scale * logits.T) - 0.5 * scale * (x**2).sum(-1, True)

    def mean(self, logits: Tensor) -> Tensor:
        """The decoder's output, clamped to [0, 1]."""
        return logits.clamp(0, 1)


@likelihoods.register("discretized_logistic")
class DiscretizedLogistic(nn.Module):
    """The probability of each of 256 pixel values under a mixture of logistics, in nats.

    Salimans et al., *PixelCNN++* (ICLR 2017), equation 2, a mixture for each pixel and channel. The
    lowest and highest value get the tails. A pixel counts as the nearest of the values.

    Args:
        mixtures: Logistics per pixel.
        levels: Values that a pixel may have, from 0 to 1.
    """

    drawn_as = "logistic"

    def __init__(
        self, *, mixtures: Count = 1, levels: Annotated[int, Field(strict=True, ge=2)] = 256
    ) -> None:
        super().__init__()
        if mixtures < 1 or levels < 2:
            raise ValueError(
                f"mixtures is {mixtures} and levels {levels}; they must be 1 or more, and 2 or more"
            )
        self.mixtures, self.levels = mixtures, levels
        self.outputs = 2 if mixtures == 1 else 3 * mixtures

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        """Nats per image: (B, *shape) and (..., B, *shape, outputs) -> (..., B).

        Raises:
            ValueError: x and params hold different numbers of images, or images of other shapes.
        """
        x, pixels = pair_images(x, params[..., 0])
        log_weights, means, log_scales = self._logistics(params.reshape(*pixels.shape, -1))
        x = (((self.levels - 1) * x).round() / (self.levels - 1)).unsqueeze(-1)
        half = 0.5 / (self.levels - 1)
        precision = torch.exp(-log_scales)
        low, high = precision * (x - half - means), precision * (x + half - means)
        # σ(high) - σ(low) = σ(high) σ(-low) (1 - e^-(high - low)), whose logarithm loses no digits
        inside = F.logsigmoid(high) + F.logsigmoid(-low)
        inside = inside + torch.log(-torch.expm1(-2 * half * precision))
        mass = torch.where(x >= 1, F.logsigmoid(-low), inside)
        mass = torch.where(x <= 0, F.logsigmoid(high), mass)
        return torch.logsumexp(log_weights + mass, -1).sum(-1)

    def mean(self, params: Tensor) -> Tensor:
        """The logistics' clamped centres, averaged over the mixture: (..., *shape) in [0, 1]."""
        log_weights, means, _ = self._logistics(params)
        return (log_weights.exp() * means.clamp(0, 1)).sum(-1)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Sampled pixels, each one of the levels: (..., *shape, outputs) -> (..., *shape)."""
        log_weights, means, log_scales = self._logistics(params)
        weights = log_weights.exp().reshape(-1, self.mixtures)
        chosen = torch.multinomial(weights, 1, generator=generator).reshape(*means.shape[:-1], 1)
        mean, scale = (t.gather(-1, chosen).squeeze(-1) for t in (means, log_scales.exp()))
        uniform = torch.rand(mean.shape, generator=generator, device=params.device).to(params)
        x = (mean + scale * torch.logit(uniform, 1e-6)).clamp(0, 1)
        return (x * (self.levels - 1)).round() / (self.levels - 1)

    def _logistics(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights, centres and log-scales, (..., *shape, mixtures) each."""
        *weights, means, log_scales = params.unflatten(-1, (-1, self.mixtures)).unbind(-2)
        log_weights = weights[0].log_softmax(-1) if weights else torch.zeros_like(means)
        # starts as a wide bump in the middle of the range
        return log_weights, 0.5 + means, (log_scales - 2).clamp(min=-7)


def bits_per_dim(likelihood: Any, log_px: float, shape: Iterable[int]) -> float | None:
    """-log p(x) / (pixels and channels x log 2); None where pixels have a density.

    A density depends on the unit of the pixels, so only probabilities compare with the literature.

    Args:
        likelihood: Has `levels` if its pixels have probabilities.
        log_px: Nats per image, or a bound on it.
        shape: Of an image.
    """
    if getattr(likelihood, "levels", None) is None:
        return None
    return -log_px / (math.prod(shape) * math.log(2))


def pairwise(likelihood: Any, x: Tensor, params: Tensor) -> Tensor:
    """Nats of each image under each decoder output: (N, *shape) and (G, ...) -> (N, G).

    One matrix multiplication where log p is affine in x, else a pass over all outputs per image.
    """
    if affine := getattr(likelihood, "affine", None):
        return affine(x.flatten(1), params.flatten(1))  # type: ignore[no-any-return]
    parts = params.unsqueeze(1).split(max(1, _IN_CACHE // params[0].numel()))
    rows = [torch.cat([likelihood.log_prob(one, some) for some in parts]) for one in x.split(1)]
    return torch.stack(rows).squeeze(-1)


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


def is_transformed(*tensors: Tensor) -> bool:
    """Whether torch.func or forward-mode differentiation traces these tensors."""
    if torch._C._are_functorch_transforms_active():
        return True
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
