"""log p(x) by importance sampling from Gaussians fitted to each image's posterior. Nats per image.

An encoder's q(z|x) is a poor proposal: it misses correlations, tails and whole modes. Gaussians
with a full covariance, fitted for a short time, need a tenth of the samples. Where q(z|x) is no
Gaussian, one of the noise that it turns into z is fitted too: that fit begins at q(z|x) itself.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vae_torch.evaluation.pareto import pareto_k, rise_from_half
from vae_torch.evaluation.partial import Partial, in_parts
from vae_torch.machine import wide
from vae_torch.parts.likelihoods import pairwise
from vae_torch.parts.posteriors import (
    DiagonalGaussian,
    Posterior,
    gaussian_near,
    log_standard_normal,
)
from vae_torch.seeds import Stream, seeded_generator
from vae_torch.vae import VAE, in_eval_mode

# Samples from the prior, the same for all images. Where one of them fits an image well, the fit
# gets another start there, in case the encoder does not know that mode. In a few dimensions as
# many come from a Gaussian twice as wide: modes of odd images lie where the prior has few samples.
_POINTS, _NEIGHBOURS, _STARTS, _CANDIDATES = 8192, 8, 4, 16
_HOPELESS = 15.0  # a start this many nats below the best one adds nothing to p(x)

_STEPS, _DRAWS, _RATE = 100, 8, 0.1  # of the fit: Adam, in units of the encoder's deviations
_STEPS_NOISE = 300  # of a fit of noise: such posteriors are those of harder models
_FEW_ENTRIES = 2**24  # entries of the covariances at once

# Shares of the samples. Those of the encoder and the prior limit the weights if a fit fails.
_FITTED, _ENCODER, _PRIOR = 0.85, 0.1, 0.05
_WIDER = 1.1  # factor on the fitted deviations, to cover the tails

# Where the weights of an image are uneven, its proposals are adapted to them and it is sampled
# again. Kernels cover a posterior of a few dimensions; in many they would miss most of it.
_FEW_DIMS, _ROUNDS, _KERNELS = 4, 3, 32
_MORE = 4  # times as many samples then
_ENOUGH = 0.8  # effective samples, as a share of the first samples

# Shape of the tail, by Vehtari et al., *Pareto smoothed importance sampling* (JMLR 2024): above the
# first, the variance of the weights is infinite; above the second, their mean is not to be trusted.
_UNEVEN_K, _LARGE_K = 0.5, 0.7
_LARGE_RISE = 0.5  # nats from half of the samples to all


class FittedEstimate(NamedTuple):
    """log p(x) by importance sampling from fitted proposals, one entry per image."""

    log_px: Tensor  # (N,) nats, in expectation a lower bound
    rise: Tensor  # (N,) nats gained from half of the samples to all: see `rise_from_half`
    effective_samples: Tensor  # (N,) (Σ w)² / Σ w²
    pareto_k: Tensor  # (N,) shape of the weights' tail; the largest if an image was sampled again

    @property
    def doubtful(self) -> Tensor:
        """Which estimates show signs of being far too low: (N,). Others may be so without signs."""
        return (self.pareto_k > _LARGE_K) | (self.rise > _LARGE_RISE)


@in_eval_mode
def fitted_log_px(
    vae: VAE,
    x: Tensor,
    *,
    num_samples: int = 1000,
    seed: int = 0,
    chunk: int = 1024,
    progress: bool = False,
    store: Partial | None = None,
    name: str = "fitted",
) -> FittedEstimate:
    """Log 1/K Σ_k p(x, z_k) / r(z_k), with proposals r fitted to each image.

    r is a mixture of three kinds: Gaussians with full covariances, fitted from the encoder's and,
    where samples from the prior find another mode, from there too; q(z|x); and a Gaussian as wide
    as the prior's samples. A posterior that has `noise_of` and is no Gaussian adds a fitted
    Gaussian of its noise. Each gives its share of the samples, and all are weighted by the whole
    mixture: Owen and Zhou, *Safe and effective importance sampling* (2000).

    With up to four latents, an image whose weights are uneven is sampled again, up to three times,
    each time with 4 K samples. Half of them come from kernels where the last weights were large:
    Delyon and Portier, *Safe adaptive importance sampling: a mixture approach* (2021). Only the
    last samples count.

    The noise of an image depends on (seed, its index) alone, so `chunk` changes the result only by
    rounding.

    Args:
        vae: The model.
        x: (N, *shape).
        num_samples: K, rounded up to an even number.
        seed: Random seed of the noise.
        chunk: Decoder rows at once.
        progress: Show a bar on a terminal.
        store: Keeps finished images, so that an interrupted estimate resumes.
        name: Name of the images in `store`.

    Raises:
        ValueError: num_samples or chunk is below 1, or `VAE.check` refuses x.
    """
    if num_samples < 1 or chunk < 1:
        raise ValueError(f"num_samples={num_samples}, chunk={chunk}: both must be 1 or more")
    x = vae.check(x)
    with torch.no_grad():
        points = _shared_points(vae, seed, chunk)
    together = min(max(1, chunk // _DRAWS), max(1, _FEW_ENTRIES // vae.latent_dim**2))

    def estimate(start: int, stop: int) -> Tensor:
        part, rows = x[start:stop], []
        fits, of_noise = _fit(vae, part, points, seed), _fit_noise(vae, part, seed)
        for i in range(len(part)):
            noise = seeded_generator(x.device, seed, start + i, Stream.PROPOSAL)
            own = [kind.of(kind.owner == i) for kind in (fits, of_noise) if kind is not None]
            rows.append(_estimate(vae, part[i : i + 1], own, points, num_samples, chunk, noise))
        return torch.stack(rows)

    rows = in_parts(estimate, len(x), together, name=name, store=store, vae=vae, progress=progress)
    return FittedEstimate(*rows.T)


class _Points(NamedTuple):
    """Samples from the prior, with what every image needs to know of them."""

    params: Tensor  # (M, *shape), of the likelihood
    log_pz: Tensor  # (M,)
    z: Tensor  # (M, latent_dim)
    neighbours: Tensor  # (M, _NEIGHBOURS)
    mean: Tensor  # (latent_dim,)
    deviation: Tensor  # (latent_dim,)


def _shared_points(vae: VAE, seed: int, chunk: int) -> _Points:
    weight = next(vae.parameters())
    noise = seeded_generator(weight.device, seed, Stream.PROPOSAL)
    z = vae.prior.sample(_POINTS, noise).to(weight)
    mean, deviation = z.mean(0), z.std(0)
    if vae.latent_dim <= _FEW_DIMS:
        normal = torch.randn(z.shape, generator=noise, device=z.device).to(z)
        z = torch.cat([z, mean + 2 * deviation * normal])
    params = torch.cat([vae.decode(some) for some in z.split(chunk)])
    neighbours = torch.cat(
        [
            torch.cdist(some, z).topk(_NEIGHBOURS + 1, largest=False).indices
            for some in z.split(1024)
        ]
    )[:, 1:]
    return _Points(params, vae.log_prior(z), z, neighbours, mean, deviation)


class _Fits(NamedTuple):
    """Gaussians N(mean, scale scaleᵀ) of z or of noise; the p-th belongs to image `owner[p]`."""

    owner: Tensor  # (P,)
    mean: Tensor  # (P, latent_dim)
    scale: Tensor  # (P, latent_dim, latent_dim), lower triangular
    elbo: Tensor  # (P,) nats
    encoder_mean: Tensor  # (P, latent_dim) of the image
    encoder_scale: Tensor  # (P, latent_dim)

    def of(self, chosen: Tensor) -> "_Fits":
        return _Fits(*(part[chosen] for part in self))


def _log_joint(vae: VAE, x: Tensor, z: Tensor) -> Tensor:
    """Log p(x, z): (B, *shape) and (K, B, latent_dim) -> (K, B)."""
    return vae.likelihood.log_prob(x, vae.decode(z)) + vae.log_prior(z)  # type: ignore[no-any-return]


def _starts(
    vae: VAE, x: Tensor, mean: Tensor, deviation: Tensor, points: _Points
) -> tuple[Tensor, Tensor]:
    """Image (P,) and place (P, latent_dim) of each start: the encoder's mean, and points at peaks.

    A point is a peak of an image's p(x, z) if p(x, z) is higher there than at its neighbours. A
    point on the slope of the encoder's own mode is none. Of several peaks close together the
    highest counts: they are points of one mode.
    """
    everything = torch.arange(len(x), device=x.device)
    scores = pairwise(vae.likelihood, x, points.params) + points.log_pz  # (B, M)
    own = _log_joint(vae, x, mean.unsqueeze(0))[0]
    best = torch.maximum(scores.amax(1), own)
    peaks = scores > (best - _HOPELESS).unsqueeze(1)
    for neighbour in points.neighbours.T:
        peaks &= scores > scores[:, neighbour]
    image, point = peaks.nonzero(as_tuple=True)
    near = ((points.z[point] - mean[image]).abs() < 3 * deviation[image]).all(1)
    slope = near & (scores[image, point] < own[image])
    peaks[image[slope], point[slope]] = False
    tops, at = scores.masked_fill(~peaks, -math.inf).topk(_CANDIDATES)
    z = points.z[at]  # (B, _CANDIDATES, latent_dim)
    within = torch.minimum(3 * deviation, points.deviation).unsqueeze(1)
    taken = torch.zeros_like(tops, dtype=torch.bool)
    for rank in range(_CANDIDATES):
        same_mode = taken & ((z - z[:, rank : rank + 1]).abs() < within).all(2)
        free = taken.sum(1) < _STARTS - 1
        taken[:, rank] = tops[:, rank].isfinite() & ~same_mode.any(1) & free
    image, chosen = taken.nonzero(as_tuple=True)
    return torch.cat([everything, image]), torch.cat([mean, z[image, chosen]])


def _fit(vae: VAE, x: Tensor, points: _Points, seed: int) -> _Fits:
    """Fit Gaussians of z, from the encoder's mean and from samples of the prior."""
    with torch.no_grad():
        start_noise = seeded_generator(x.device, seed, Stream.PROPOSAL, 2)
        encoder_mean, logvar = gaussian_near(vae.encode(x), start_noise)
        encoder_scale = torch.exp(0.5 * logvar)
        owner, start = _starts(vae, x, encoder_mean, encoder_scale, points)
    unit = torch.minimum(encoder_scale, points.deviation).clamp(min=1e-2 * points.deviation)[owner]
    images = x[owner]
    fitted = _ascend(lambda z: _log_joint(vae, images, z), start, unit, _STEPS, seed)
    return _Fits(owner, *fitted, encoder_mean[owner], encoder_scale[owner])


def fits_noise_of(q: Posterior) -> bool:
    """Whether a Gaussian of its noise is fitted too: it is no Gaussian and has `noise_of`."""
    return hasattr(q, "noise_of") and not isinstance(q, DiagonalGaussian)


def _fit_noise(vae: VAE, x: Tensor, seed: int) -> _Fits | None:
    """Fit Gaussians of the noise that q(z|x) turns into z, if that is another family."""
    with torch.no_grad():
        q = vae.encode(x)
        if not fits_noise_of(q):
            return None
        zeros = torch.zeros_like(q.mean)

    def log_density(noise: Tensor) -> Tensor:
        z, log_q = q.sample(noise)
        log_joint = _log_joint(vae, x, z) + log_standard_normal(noise)
        return log_joint - log_q  # type: ignore[no-any-return]

    everything, ones = torch.arange(len(x), device=x.device), torch.ones_like(zeros)
    return _Fits(everything, *_ascend(log_density, zeros, ones, _STEPS_NOISE, seed), zeros, ones)


def _ascend(
    log_density: Callable[[Tensor], Tensor], start: Tensor, unit: Tensor, steps: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit full-covariance Gaussians by gradient ascent on the ELBO: mean, scale and ELBO of each.

    The gradient is that of Roeder, Wu and Duvenaud, *Sticking the Landing* (2017): its noise
    vanishes as the fit improves. All images share the noise, so none depends on the others.

    Args:
        log_density: The posteriors up to a factor, (K, P, latent_dim) -> (K, P).
        start: (P, latent_dim) first means.
        unit: (P, latent_dim) first deviations, and the unit of a step.
        steps: Number of them.
        seed: Random seed of the noise.
    """
    dims = start.shape[1]
    shift, spread = (torch.zeros_like(start).requires_grad_() for _ in range(2))
    below = start.new_zeros((len(start), dims, dims)).requires_grad_()
    groups = [{"params": [shift, spread], "share": 1.0}, {"params": [below], "share": 0.3}]
    optimizer = torch.optim.Adam(groups, lr=_RATE, betas=(0.9, 0.99))
    noise = seeded_generator(start.device, seed, Stream.PROPOSAL, 1)
    last = start.new_zeros(len(start))
    tail = steps // 10
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * group["share"] * (1 - step / steps)
        half = torch.randn((_DRAWS // 2, 1, dims), generator=noise, device=start.device).to(start)
        eps = torch.cat([half, -half])
        scale = torch.diag_embed(spread.exp()) + below.tril(-1)
        offset = shift + (scale @ eps.permute(1, 2, 0).expand(len(start), -1, -1)).permute(2, 0, 1)
        log_q = _log_gaussian(offset, shift.detach(), scale.detach())
        bound = (log_density(start + unit * offset) - log_q).mean(0)
        bound = bound + unit.log().sum(1)
        grads = torch.autograd.grad(-bound.sum(), [shift, spread, below])
        for part, grad in zip((shift, spread, below), grads, strict=True):
            part.grad = grad.nan_to_num()
        optimizer.step()
        if step >= steps - tail:
            last += bound.detach() / tail
    with torch.no_grad():
        scale = torch.diag_embed(spread.exp()) + below.tril(-1)
        return start + unit * shift, unit.unsqueeze(2) * scale, last


def _log_gaussian(z: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Log-density of N(mean, scale scaleᵀ): (K, P, D), (P, D) and (P, D, D) -> (K, P)."""
    white = torch.linalg.solve_triangular(scale, (z - mean).permute(1, 2, 0), upper=False)
    log_det = scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = log_det + 0.5 * z.shape[-1] * math.log(2 * math.pi)
    densities: Tensor = (-0.5 * (white**2).sum(1) - constant.unsqueeze(1)).T
    return densities


@torch.no_grad()
def _estimate(
    vae: VAE,
    x: Tensor,
    kinds: list[_Fits],
    points: _Points,
    num_samples: int,
    chunk: int,
    noise: torch.Generator,
) -> Tensor:
    """The values of a `FittedEstimate` for one image, from fits of z and perhaps of noise: (4,)."""
    encoder = kinds[-1]  # of the noise, N(0, I) is q(z|x)
    means = [fits.mean for fits in kinds]
    mean = torch.cat([*means, encoder.encoder_mean[:1], points.mean.unsqueeze(0)])
    others = torch.stack([encoder.encoder_scale[0], points.deviation])
    scale = torch.cat([*(_WIDER * fits.scale for fits in kinds), torch.diag_embed(others)])
    elbo = torch.cat([fits.elbo for fits in kinds])
    # a fit's ELBO tells the weight of its mode within a nat or two
    worth = 0.8 * (elbo.nan_to_num(nan=-math.inf) / 2).softmax(0) + 0.2 / len(elbo)
    shares = torch.cat([_FITTED * worth, worth.new_tensor([_ENCODER, _PRIOR])])
    of_noise = slice(len(means[0]), len(mean) - 1) if len(kinds) > 1 else None
    half = math.ceil(num_samples / 2)
    proposals = _Proposals(mean, scale, shares, of_noise)
    z, log_w = _weighted(vae, x, proposals, half, chunk, noise)
    heaviest = pareto_k(log_w)
    for _ in range(_ROUNDS if vae.latent_dim <= _FEW_DIMS else 0):
        if not (pareto_k(log_w) > _UNEVEN_K or _effective(log_w) < _ENOUGH * 2 * half):
            break
        adapted = _with_kernels(proposals, kinds[0], z, log_w)
        z, log_w = _weighted(vae, x, adapted, _MORE * half, chunk, noise)
        # a tail that was seen once is there, even if later samples miss it
        heaviest = torch.maximum(heaviest, pareto_k(log_w))
    found = log_w.logsumexp(0) - math.log(len(z))
    return torch.stack([found, rise_from_half(log_w), _effective(log_w), heaviest])


class _Proposals(NamedTuple):
    """A mixture of Gaussians."""

    mean: Tensor  # (G, latent_dim)
    scale: Tensor  # (G, latent_dim, latent_dim), lower triangular
    share: Tensor  # (G,)
    of_noise: slice | None  # those that are of noise instead of z


def _weighted(
    vae: VAE, x: Tensor, proposals: _Proposals, half: int, chunk: int, noise: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Samples for one image, (2 half, latent_dim), and their log-weights, (2 half,)."""
    mean, scale, share, of_noise = proposals
    # as many samples of each as its share says, up to one; the same in both halves
    quantiles = (torch.arange(half, device=x.device) + 0.5) / half
    which = torch.searchsorted(share.cumsum(0), quantiles).clamp(max=len(share) - 1)
    share = torch.bincount(which, minlength=len(share)) / half
    which = which.repeat_interleave(2)
    eps = torch.randn((2 * half, mean.shape[1]), generator=noise, device=x.device).to(x)
    z = torch.empty_like(eps)
    for j in range(len(mean)):
        own = which == j
        z[own] = mean[j] + eps[own] @ scale[j].T
    if of_noise is None:
        densities = _log_gaussian(z.unsqueeze(1), mean, scale)
    else:
        z, densities = _in_terms_of_z(vae, x, z, which, mean, scale, of_noise)
    log_r = torch.logsumexp(densities + share.log(), 1)
    log_px = [pairwise(vae.likelihood, x, vae.decode(some))[0] for some in z.split(chunk)]
    return z, wide(torch.cat(log_px) + vae.log_prior(z) - log_r)


def _effective(log_w: Tensor) -> Tensor:
    """(Σ w)² / Σ w²: (K,) -> ()."""
    return torch.exp(2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0))


def _with_kernels(proposals: _Proposals, fits: _Fits, z: Tensor, log_w: Tensor) -> _Proposals:
    """Half of the proposals, and half kernels at samples of large weight, as wide as the next fit.

    The places are drawn by the root of the weights: by the weights themselves, where help is needed
    most, the largest one would be nearly all of them.
    """
    chances = (0.5 * log_w).softmax(0).cumsum(0)
    quantiles = (torch.arange(_KERNELS, device=z.device) + 0.5).to(chances) / _KERNELS
    places = z[torch.searchsorted(chances, quantiles).clamp(max=len(z) - 1)]
    nearest = _log_gaussian(places.unsqueeze(1), fits.mean, fits.scale).argmax(1)
    mean, scale, share, of_noise = proposals
    return _Proposals(
        torch.cat([mean, places]),
        torch.cat([scale, fits.scale[nearest]]),
        torch.cat([0.5 * share, share.new_full((_KERNELS,), 0.5 / _KERNELS)]),
        of_noise,
    )


def _in_terms_of_z(
    vae: VAE, x: Tensor, drawn: Tensor, which: Tensor, mean: Tensor, scale: Tensor, of_noise: slice
) -> tuple[Tensor, Tensor]:
    """Samples of Gaussians, some of them of noise, as z, and their densities as those of z.

    Args:
        vae: The model.
        x: (1, *shape).
        drawn: (K, latent_dim), of z or of noise.
        which: (K,) the Gaussian of each sample.
        mean: (G, latent_dim).
        scale: (G, latent_dim, latent_dim).
        of_noise: The Gaussians of noise.

    Returns:
        (K, latent_dim) and (K, G).
    """
    q, z = vae.encode(x), drawn.unsqueeze(1).clone()
    noisy = (which >= of_noise.start) & (which < of_noise.stop)
    z[noisy] = q.rsample(z[noisy])
    densities = _log_gaussian(z, mean, scale)
    noise = q.noise_of(z)
    log_volume = log_standard_normal(noise) - q.log_prob(z)
    warped = _log_gaussian(noise, mean[of_noise], scale[of_noise]) - log_volume
    densities[:, of_noise] = warped.nan_to_num(nan=-math.inf)  # no finite noise gives this z
    return z[:, 0], densities
