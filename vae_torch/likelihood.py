"""log p(x | z) of an image under the decoder's output, summed over pixels, in nats.

Each likelihood reads one decoder output per pixel (called `logits` for all of them) and offers the
same three methods: `log_prob(x, logits)`; `mean(logits)`, the expected pixel values in [0, 1]; and
`affine(x, logits)`, which evaluates every image under every decoder output with one matrix product:
all three log-densities are affine in x (the Gaussian up to a term without z).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
        """
        _check_shapes(x, logits)
        terms: Tensor = _BernoulliTerms.apply(
            x.flatten(1), logits.flatten(logits.ndim - x.ndim + 1)
        )
        return terms

    def affine(self, x: Tensor, logits: Tensor) -> Tensor:
        """Nats of each image under each output: (N, pixels) and (G, pixels) -> (N, G)."""
        return torch.addmm(_even_part(logits), x - 0.5, logits.T)

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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of x too, where it is asked for."""
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
        _check_shapes(x, logits)
        return _sum_pixels(x * logits - F.softplus(logits) + _log_normalizer(logits), x)

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

    def __init__(self) -> None:
        super().__init__()
        self.logvar = nn.Parameter(torch.zeros(()))

    def log_prob(self, x: Tensor, logits: Tensor) -> Tensor:
        """Nats per image: (B, *shape) and (..., B, *shape) -> (..., B)."""
        _check_shapes(x, logits)
        squares = (x - logits) ** 2 * torch.exp(-self.logvar)
        return _sum_pixels(-0.5 * (squares + self.logvar + math.log(2 * math.pi)), x)

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


def _sum_pixels(terms: Tensor, x: Tensor) -> Tensor:
    return terms.flatten(terms.ndim - x.ndim + 1).sum(-1)


def _check_shapes(x: Tensor, logits: Tensor) -> None:
    if logits.shape[logits.ndim - x.ndim :] != x.shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and logits {tuple(logits.shape)}; the last "
            f"{x.ndim} dimensions of logits must be those of x"
        )
