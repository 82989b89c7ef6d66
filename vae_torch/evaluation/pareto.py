"""What importance weights themselves show of the error of their mean."""

import math

import torch
from torch import Tensor

from vae_torch.machine import wide


def rise_from_half(log_w: Tensor) -> Tensor:
    """Nats that log p(x) gains from half of the samples to all: at least as much bias is left.

    Once the samples cover the posterior, the bias falls as 1 / K and is equal to this: Nowozin,
    *Debiasing Evidence Approximations* (ICLR 2018), proposition 1. Before that it falls more
    slowly, and is far larger.

    Args:
        log_w: (K, ...) log-weights; samples 0, 2, 4, ... are the one half, the rest the other.

    Returns:
        (...); NaN if K is below 2.
    """
    half = len(log_w) // 2
    if not half:
        return log_w.new_full(log_w.shape[1:], math.nan)
    pairs = log_w[: 2 * half]
    halves: Tensor = pairs.unflatten(0, (half, 2)).logsumexp(0).mean(0) - math.log(half)
    return pairs.logsumexp(0) - math.log(2 * half) - halves


def pareto_k(log_w: Tensor) -> Tensor:
    """Shape k of the generalised Pareto distribution of the largest weights.

    Do not trust an importance-sampling estimate if k is above 0.7: Vehtari, Simpson, Gelman, Yao
    and Gabry, *Pareto Smoothed Importance Sampling* (JMLR 2024). The fit is that of Zhang and
    Stephens, *A New and Efficient Estimation Method for the Generalized Pareto Distribution*
    (2009), with the weak prior of Vehtari et al., appendix C. A small k does not prove that the
    samples cover the whole posterior.

    Args:
        log_w: (K, ...) log-weights.

    Returns:
        (...); NaN if K is below 25, too few to see a tail.
    """
    samples = len(log_w)
    size = min(samples // 5, math.ceil(3 * math.sqrt(samples)))
    if size < 5:
        return log_w.new_full(log_w.shape[1:], math.nan)
    top = wide(log_w).topk(size + 1, dim=0).values.flip(0)  # ascending
    weights = (top - top[-1]).exp()
    tail = (weights[1:] - weights[0]).clamp(min=torch.finfo(torch.float64).tiny)  # (size, ...)
    k = _zhang_stephens(tail)
    k = (k * size + 10 * 0.5) / (size + 10)
    flat = tail[-1] < 1e-9  # equal weights have no tail
    return torch.where(flat, k.new_tensor(-math.inf), k).to(log_w)


def _zhang_stephens(tail: Tensor) -> Tensor:
    """Posterior mean of k for exceedances in ascending order: (n, ...) -> (...)."""
    n = len(tail)
    grid = 30 + math.isqrt(n)
    j = torch.arange(1, grid + 1, dtype=tail.dtype, device=tail.device) - 0.5
    j = j.reshape(-1, *[1] * (tail.ndim - 1))
    quartile = tail[math.floor(n / 4 + 0.5) - 1]
    b = 1 / tail[-1] + (1 - (grid / j).sqrt()) / (3 * quartile)  # (grid, ...)
    k = torch.log1p(-b.unsqueeze(1) * tail).mean(1)  # (grid, ...)
    profile = n * ((-b / k).log() - k - 1)
    mean = (profile.softmax(0) * b).sum(0)
    return torch.log1p(-mean * tail).mean(0)
