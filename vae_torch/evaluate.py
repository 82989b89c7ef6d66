"""What a trained model is worth: bounds, log p(x), and how it uses its latents. Nats per image.

`bound_metrics` is what the training loop logs. `evaluate_model` fills the evaluation card, from
functions that also work alone and return one value per image.
"""

import logging
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from vae_torch.config import ObjectiveConfig
from vae_torch.data import seeded_generator
from vae_torch.model import VAE, reparameterize
from vae_torch.objective import (
    ACTIVE_UNIT_VARIANCE,
    kl_per_dim,
    log_weights,
    objective_terms,
)
from vae_torch.prior import StandardNormal, log_mixture, log_normal

_log = logging.getLogger("vae_torch")

Loader = DataLoader[tuple[Tensor, Tensor]]

# Tell the random streams of one seed apart (data order and training noise have their own).
_BOUND, _IMPORTANCE, _FIT, _AGGREGATE = 3, 4, 5, 6

# Nats below an image's log p(x): a square in which even the highest point times its area is lower
# is left as it is, though a narrow peak may stand between its points.
_NEGLIGIBLE = 20.0


@torch.no_grad()
def bound_metrics(
    vae: VAE,
    loader: Iterable[tuple[Tensor, Tensor]],
    objective: ObjectiveConfig,
    *,
    beta: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Means over a data set of what the training loop logs about it.

    The noise depends on `seed` alone, so the curve of a run moves only where the model moved.

    Returns:
        `loss`, `elbo`, `reconstruction`, `kl` in nats per image, and `kl_per_dim`, one per latent
        dimension, against the standard normal (left out for a learned prior, where it is no part of
        the KL).
    """
    device = next(vae.parameters()).device
    noise = seeded_generator(device, seed, _BOUND)
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    kl_dims = torch.zeros(vae.latent_dim, dtype=torch.float64, device=device)
    images = 0
    at_once = math.ceil(1000 / objective.num_samples)  # images: more would not stay in a cache
    for batch, _ in loader:
        for x in batch.to(device).split(at_once):
            shape = (objective.num_samples, len(x), vae.latent_dim)
            eps = torch.randn(shape, generator=noise, device=device)
            terms = objective_terms(vae, x, eps, objective, beta)
            parts = (terms.loss, terms.elbo.mean(), terms.reconstruction.mean(), terms.kl.mean())
            sums += len(x) * torch.stack(parts)
            kl_dims += len(x) * terms.kl_per_dim
            images += len(x)
    names = ("loss", "elbo", "reconstruction", "kl")
    metrics: dict[str, Any] = dict(zip(names, (sums / images).tolist(), strict=True))
    if isinstance(vae.prior, StandardNormal):
        metrics["kl_per_dim"] = (kl_dims / images).tolist()
    return metrics


class ImportanceEstimate(NamedTuple):
    """log p(x) by importance sampling from q(z|x), one entry per image."""

    log_px: Tensor  # (N,) nats
    effective_samples: Tensor  # (N,) (Σ w)² / Σ w², at most num_samples


@torch.no_grad()
def importance_log_px(
    vae: VAE,
    x: Tensor,
    *,
    num_samples: int = 5000,
    seed: int = 0,
    chunk: int = 1024,
    proposal: tuple[Tensor, Tensor] | None = None,
    progress: bool = False,
) -> ImportanceEstimate:
    """Log 1/K Σ_k p(x, z_k) / q(z_k|x): Burda et al. (2016), equation 8 with a large K.

    Each image's noise depends on (seed, its place) alone, so the answer does not depend on `chunk`
    beyond the rounding of sums.

    Args:
        vae: The model.
        x: (N, *shape) in [0, 1].
        num_samples: K.
        seed: Of the noise.
        chunk: Decoder rows at once. A thousand stay in a core's cache; any number gives the same
            answer.
        proposal: Mean and log-variance, (N, latent_dim) each, to draw from instead of q(z|x).
        progress: Show a bar on a terminal.

    Raises:
        ValueError: num_samples or chunk is below 1.
    """
    if num_samples < 1 or chunk < 1:
        raise ValueError(f"num_samples={num_samples}, chunk={chunk}: both must be 1 or more")
    mean, logvar = vae.encode(x) if proposal is None else proposal
    together = max(1, chunk // num_samples)  # images
    log_px, effective = [], []
    steps = range(0, len(x), together)
    for start in tqdm(steps, "log p(x)", disable=None if progress else True, leave=False):
        part = slice(start, start + together)
        eps = torch.stack(
            [
                torch.randn(
                    num_samples,
                    vae.latent_dim,
                    generator=seeded_generator(x.device, seed, i, _IMPORTANCE),
                    device=x.device,
                )
                for i in range(start, min(start + together, len(x)))
            ],
            1,
        ).to(x.dtype)  # (K, images, latent_dim)
        log_w = torch.cat(
            [
                log_weights(vae, x[part], (mean[part], logvar[part]), some)
                for some in eps.split(max(1, chunk // eps.shape[1]))
            ]
        ).double()  # (K, images)
        total = log_w.logsumexp(0)
        log_px.append(total - math.log(num_samples))
        effective.append(torch.exp(2 * total - (2 * log_w).logsumexp(0)))
    return ImportanceEstimate(torch.cat(log_px), torch.cat(effective))


class Quadrature(NamedTuple):
    """log p(x) by numerical integration over the latent space."""

    log_px: Tensor  # (N,) nats
    residual: float  # nats by which the mean still moved in the last refinements
    side: float  # of the smallest squares
    half_width: float  # the squares cover ± this in each dimension


@torch.no_grad()
def exact_log_px(
    vae: VAE, x: Tensor, *, tolerance: float = 0.01, progress: bool = False
) -> Quadrature:
    r"""Log p(x) = log ∫ p(x|z) p(z) dz over a latent space of one or two dimensions.

    The plane is cut into squares, which cover all posteriors and all components of the prior and
    are widened by a quarter until that moves no mean. Each has 8 x 8 Gauss-Legendre points, and a
    log-likelihood that is affine in x turns many images at all of these points into one matrix
    product. A square is quartered for the images to whose log p(x) that makes a difference, and for
    those whose narrow posterior lies in it, so that ever smaller squares see ever fewer images.

    Args:
        vae: A model with latent_dim 1 or 2.
        x: (N, *shape) in [0, 1].
        tolerance: Nats. A square is small enough for an image once quartering it moves log p(x) by
            less than half of this; what all of these together moved the mean is the residual.
        progress: Show a bar on a terminal.

    Raises:
        ValueError: latent_dim is above 2, or the integral does not settle.
    """
    _check_few_latents(vae)
    x = x.flatten(1)
    dims, everything = vae.latent_dim, torch.arange(len(x), device=x.device)
    narrow = _NarrowPlaces(vae, x)
    reach = max(5.0, narrow.reach())
    side = min(max(2.0, reach / 8), 8.0)
    bar = tqdm(desc="exact log p(x)", unit="cell", disable=None if progress else True, leave=False)

    nothing = x.new_full((len(x),), -math.inf)
    n = math.ceil(reach / side)
    parts = _quarter(
        vae, x, [_Cell(c, everything, nothing) for c in _ring(x, 0, n, side, dims)], side
    )
    bar.update(len(parts))
    total = _sum_of(parts, nothing)
    for _ in range(20):
        wider = math.ceil(1.25 * n)
        ring = [_Cell(c, everything, nothing) for c in _ring(x, n, wider, side, dims)]
        parts += _quarter(vae, x, ring, side)
        before, total, n = total, _sum_of(parts, nothing), wider
        moved = (total - before).mean().abs().item()
        if moved < tolerance / 10:
            break
    else:
        raise ValueError(f"widening to ±{n * side:.0f} still moves the mean by {moved:.3f} nats")
    width_residual, half_width = moved, n * side

    settled = nothing.clone()  # log of what needs no smaller squares
    gains = torch.zeros_like(settled)  # share of p(x) by which the last quartering of it moved it
    for _ in range(20):
        side /= 2
        total = _sum_of(parts, settled)
        cells = []
        for centers, images, parent, values, tops in parts:
            now = total[images]
            gain = torch.exp(values.logsumexp(1) - now) - torch.exp(parent - now)
            small = tops + dims * math.log(side) < (now - _NEGLIGIBLE).unsqueeze(1)
            must = narrow.within(centers, side, images)
            fine = (gain.abs() < tolerance / 2) & ~must.any(1)
            done = fine.unsqueeze(1) | (small & ~must)  # (images, children)
            more = values.masked_fill(~done, -math.inf).logsumexp(1)
            settled[images] = torch.logaddexp(settled[images], more)
            gains[images] += gain.masked_fill(~fine, 0.0)
            for j, center in enumerate(centers):
                open_ = ~done[:, j]
                if open_.any():
                    cells.append(_Cell(center, images[open_], values[open_, j]))
        if not cells:
            bar.close()
            residual = gains.mean().abs().item() + width_residual
            return Quadrature(settled.double(), residual, side, half_width)
        parts = _quarter(vae, x, cells, side)
        bar.update(len(parts))
    raise ValueError(
        f"squares of {side:.1g} are still too large for {len(cells)} places: the likelihood is "
        "rougher there than the arithmetic is exact"
    )


class _Cell(NamedTuple):
    """A square of the plane (or an interval of the line), and those who care."""

    center: Tensor  # (dims,)
    images: Tensor  # (M,) their numbers
    value: Tensor  # (M,) log of each one's integral over it


class _Quartered(NamedTuple):
    """A cell cut in `parts` = 2^dims."""

    centers: Tensor  # (parts, dims)
    images: Tensor  # (M,)
    parent: Tensor  # (M,) what the whole cell was thought to be worth
    values: Tensor  # (M, parts) log of the integrals
    tops: Tensor  # (M, parts) log of the highest p(x|z) p(z) seen


def _quarter(vae: VAE, x: Tensor, cells: list[_Cell], side: float) -> list[_Quartered]:
    """Integrate over the halves or quarters of cells of this side."""
    dims = vae.latent_dim
    nodes, weights = np.polynomial.legendre.leggauss(8)
    corners = torch.cartesian_prod(*[torch.tensor([-0.25, 0.25])] * dims).reshape(-1, dims).to(x)
    offsets = torch.cartesian_prod(*[torch.tensor(nodes / 4)] * dims).reshape(-1, dims).to(x)
    log_w = torch.cartesian_prod(*[torch.tensor(weights / 4).log()] * dims).reshape(-1, dims)
    log_w = log_w.sum(1).to(x) + dims * math.log(side)  # of cells of side 1/2, times the area
    found = []
    points = len(corners) * len(offsets)
    for start in range(0, len(cells), 8192 // points):  # rows of the decoder at once
        some = cells[start : start + 8192 // points]
        places = torch.stack([cell.center for cell in some])[:, None] + side * corners
        z = (places.unsqueeze(2) + side * offsets).reshape(-1, dims)
        logits, prior = vae.decode(z).flatten(1).split(points), vae.log_prior(z).split(points)
        for cell, centers, out, log_pz in zip(some, places, logits, prior, strict=True):
            rows = x if len(cell.images) == len(x) else x[cell.images]
            block = vae.likelihood.affine(rows, out) + log_pz
            block = block.unflatten(1, (len(corners), -1))  # (M, parts, points)
            values = (block + log_w).logsumexp(2)
            found.append(_Quartered(centers, cell.images, cell.value, values, block.amax(2)))
    return found


def _sum_of(parts: list[_Quartered], settled: Tensor) -> Tensor:
    """Log p(x) of every image as far as it is known: (N,)."""
    total = settled.clone()
    for part in parts:
        total[part.images] = torch.logaddexp(total[part.images], part.values.logsumexp(1))
    return total


def _ring(like: Tensor, inner: int, outer: int, side: float, dims: int) -> Tensor:
    """Centres of the cells of [-outer, outer]^dims but not [-inner, inner]^dims, times side."""
    ticks = torch.arange(-outer, outer, device=like.device, dtype=like.dtype) + 0.5
    centers = torch.cartesian_prod(*[ticks] * dims).reshape(-1, dims)
    return side * centers[centers.abs().amax(1) > inner]


class _NarrowPlaces:
    """Where something may be too narrow for the points of a cell: posteriors, the prior's parts."""

    def __init__(self, vae: VAE, x: Tensor) -> None:
        self.means, logvars = vae.encode(x)
        self.deviations = torch.exp(0.5 * logvars)
        self.parts: tuple[Tensor, Tensor] | None = None
        if not isinstance(vae.prior, StandardNormal):
            means, logvars, _ = vae.prior.components(vae.encoder)
            self.parts = (means, torch.exp(0.5 * logvars))

    def reach(self) -> float:
        """How far from 0 they come."""
        reach = (self.means.abs() + 6 * self.deviations).max()
        if self.parts:
            reach = torch.maximum(reach, (self.parts[0].abs() + 6 * self.parts[1]).max())
        return reach.item()

    def within(self, centers: Tensor, side: float, images: Tensor) -> Tensor:
        """Whether an image must not settle for a cell: (P, dims) and (M,) -> (M, P)."""
        found = _narrow(self.means[images], self.deviations[images], centers, side)
        if self.parts:
            found = found | _narrow(*self.parts, centers, side).any(0)
        return found


def _narrow(means: Tensor, deviations: Tensor, centers: Tensor, side: float) -> Tensor:
    """Gaussians (M, dims) that are narrow beside a cell and have mass in it: (M, P)."""
    off = (means.unsqueeze(1) - centers).abs()
    near = (off < 0.5 * side + 3 * deviations.unsqueeze(1)).all(-1)
    return near & (16 * deviations < side).any(-1, keepdim=True)


def _check_few_latents(vae: VAE) -> None:
    if vae.latent_dim > 2:
        raise ValueError(
            f"latent_dim is {vae.latent_dim}: integration over the latents is for 1 or 2; "
            "use importance sampling"
        )


def fit_posterior(
    vae: VAE, x: Tensor, *, steps: int = 500, num_samples: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The best Gaussian posterior of each image, found by ascent on its ELBO from the encoder's.

    Cremer, Li and Duvenaud, *Inference Suboptimality in VAEs* (ICML 2018), section 4.1: q*.

    Args:
        vae: The model; its weights stay as they are.
        x: (N, *shape) in [0, 1].
        steps: Of Adam, on each image's own mean and log-variance.
        num_samples: Draws of z per step.
        seed: Of the noise.

    Returns:
        Mean and log-variance, (N, latent_dim) each.
    """
    noise = seeded_generator(x.device, seed, _FIT)
    with torch.no_grad():
        mean, logvar = (part.clone() for part in vae.encode(x))
    mean.requires_grad_()
    logvar.requires_grad_()
    optimizer = torch.optim.Adam([mean, logvar], lr=0.02)
    shape = (num_samples, *mean.shape)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        eps = torch.randn(shape, generator=noise, device=x.device, dtype=x.dtype)
        loss = -log_weights(vae, x, (mean, logvar), eps).mean(0).sum()
        mean.grad, logvar.grad = torch.autograd.grad(loss, [mean, logvar])
        optimizer.step()
    return mean.detach(), logvar.detach()


@torch.no_grad()
def posterior_elbo(
    vae: VAE, x: Tensor, mean: Tensor, logvar: Tensor, *, num_samples: int = 1000, seed: int = 0
) -> Tensor:
    """The ELBO of any Gaussian posteriors N(mean, exp(logvar)): (N,) nats, by Monte Carlo."""
    noise = seeded_generator(x.device, seed, _FIT, 1)
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    done = 0
    while done < num_samples:  # twenty at a time bound the memory
        shape = (min(20, num_samples - done), *mean.shape)
        eps = torch.randn(shape, generator=noise, device=x.device, dtype=x.dtype)
        total += log_weights(vae, x, (mean, logvar), eps).double().sum(0)
        done += shape[0]
    return total / num_samples


@torch.no_grad()
def aggregate_kl(vae: VAE, x: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The mean KL(q(z|x) || p(z)) as mutual information plus KL(q(z) || p(z)).

    Hoffman and Johnson, *ELBO surgery* (2016), with q(z) the mean of the N posteriors and one draw
    of z from each.

    Returns:
        log q(z_n|x_n) - log q(z_n) and log q(z_n) - log p(z_n), (N,) each; their means are the two
        parts. The first mean cannot exceed log N.
    """
    mean, logvar = vae.encode(x)
    noise = seeded_generator(x.device, seed, _AGGREGATE)
    eps = torch.randn(mean.shape, generator=noise, device=x.device, dtype=x.dtype)
    z = reparameterize(mean, logvar, eps=eps)
    uniform = mean.new_full((len(mean),), -math.log(len(mean)))
    # in double, since posteriors can be narrow where log_mixture subtracts squares
    parts = (mean.double(), logvar.double(), uniform.double())
    log_qz = torch.cat([log_mixture(some.double(), *parts) for some in z.split(1000)])
    return log_normal(z, mean, logvar) - log_qz, log_qz - vae.log_prior(z)


def evaluate_model(
    vae: VAE,
    loader: Loader,
    *,
    train_loader: Loader | None = None,
    num_samples: int = 5000,
    fit_images: int = 100,
    chunk: int = 1024,
    exact: bool | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """The evaluation card.

    Args:
        vae: The model.
        loader: Of the test set: (x, label), x in [0, 1].
        train_loader: Adds the training bound, and probes of the latents fitted on it.
        num_samples: Of the importance-sampling estimate of log p(x).
        fit_images: How many images get a posterior of their own, to split the gap.
        chunk: Decoder rows at once.
        exact: Integrate log p(x) over the latents; None does so for one or two of them.
        seed: Of all noise.
        progress: Show bars on a terminal.

    Returns:
        Each figure as `{"value", "standard_error", "unit", "definition", "num_samples",
        "num_images", "seed"}`, by name, and under `verdict` a list of sentences.

    Raises:
        ValueError: num_samples, fit_images or chunk is below 1; an integral over more than two
            latents is asked for.
    """
    if fit_images < 1:
        raise ValueError(f"fit_images={fit_images}: must be 1 or more")
    if exact:
        _check_few_latents(vae)
    x, labels = _whole(vae, loader)
    card: dict[str, Any] = {}

    def put(name: str, value: Any, definition: str, samples: int, **more: Any) -> None:
        """A per-image tensor is averaged here, with its standard error; other values stand."""
        images, error = len(x), None
        if isinstance(value, Tensor):
            images, error = len(value), _standard_error(value)
            value = value.double().mean().item()
        card[name] = {
            "value": value,
            "standard_error": error,
            "unit": "nats per image",
            "definition": definition,
            "num_samples": samples,
            "num_images": images,
            "seed": seed,
            **more,
        }

    _put_bound(put, vae, x, seed)
    estimate = importance_log_px(
        vae, x, num_samples=num_samples, seed=seed, chunk=chunk, progress=progress
    )
    definition = "log p(x) by importance sampling from q(z|x); in expectation a lower bound"
    put("log_px", estimate.log_px, definition, num_samples)
    put(
        "effective_samples",
        estimate.effective_samples,
        "(Σ w)² / Σ w² of the importance weights",
        num_samples,
        unit="samples",
        share_below_10=(estimate.effective_samples < min(10, num_samples)).double().mean().item(),
    )
    truth = None
    if exact or (exact is None and vae.latent_dim <= 2):
        grid = exact_log_px(vae, x, progress=progress)
        truth = grid.log_px
        put(
            "log_px_exact",
            truth,
            f"log p(x) by integration over ±{grid.half_width:g}, squares down to {grid.side:.2g}",
            0,
            residual=grid.residual,
        )
    _put_gap(put, vae, x[:fit_images], truth, num_samples, chunk, seed)
    _put_latents(put, vae, x, labels, train_loader, seed)
    if not ((x == 0) | (x == 1)).all():
        floor = -torch.special.xlogy(x, x) - torch.special.xlogy(1 - x, 1 - x)
        put(
            "entropy_floor",
            -floor.flatten(1).sum(1),
            "reconstruction that no Bernoulli decoder of these grey pixels can exceed; "
            "grey and binarised figures do not compare",
            0,
        )
    if train_loader is not None:
        bound = bound_metrics(vae, train_loader, ObjectiveConfig(), seed=seed)
        count = sum(len(x) for x, _ in train_loader)
        put("train_elbo", bound["elbo"], "elbo on the training images", 1, num_images=count)
    card["verdict"] = verdict(card, num_samples)
    return card


def _whole(vae: VAE, loader: Loader) -> tuple[Tensor, Tensor]:
    device = next(vae.parameters()).device
    batches = list(loader)
    x, labels = (torch.cat(parts).to(device) for parts in zip(*batches, strict=True))
    return x, labels


def _standard_error(values: Tensor) -> float | None:
    return values.double().std().item() / math.sqrt(len(values)) if len(values) > 1 else None


@torch.no_grad()
def _put_bound(put: Any, vae: VAE, x: Tensor, seed: int) -> None:
    noise = seeded_generator(x.device, seed, _BOUND)
    rows = []
    for part in x.split(1000):  # bounds the decoder's memory
        eps = torch.randn((1, len(part), vae.latent_dim), generator=noise, device=x.device)
        terms = objective_terms(vae, part, eps.to(x.dtype), ObjectiveConfig())
        rows.append(torch.stack([terms.elbo, terms.reconstruction, terms.kl]))
    elbo, reconstruction, kl = torch.cat(rows, 1)
    analytic = isinstance(vae.prior, StandardNormal)
    put("elbo", elbo, "reconstruction - kl, a lower bound on log p(x)", 1)
    put("reconstruction", reconstruction, "E_q log p(x|z), summed over pixels", 1)
    how = "in closed form" if analytic else "a Monte Carlo estimate from one draw of z"
    put("kl", kl, f"KL(q(z|x) || p(z)), {how}", 0 if analytic else 1)
    mean, logvar = vae.encode(x)
    if analytic:
        per_dim = kl_per_dim(mean, logvar).mean(0)
        put("kl_per_dim", per_dim.tolist(), "the KL of each latent dimension", 0)
    if len(x) == 1:  # nothing varies
        return
    variance = mean.var(0)
    put(
        "active_units",
        int((variance > ACTIVE_UNIT_VARIANCE).sum()),
        f"latent dimensions whose posterior mean varies by more than {ACTIVE_UNIT_VARIANCE} "
        "(variance over images)",
        0,
        unit=f"of {vae.latent_dim} dimensions",
        variance_per_dim=variance.tolist(),
    )


def _put_gap(
    put: Any, vae: VAE, x: Tensor, exact: Tensor | None, num_samples: int, chunk: int, seed: int
) -> None:
    with torch.no_grad():
        encoder_elbo = posterior_elbo(vae, x, *vae.encode(x), seed=seed)
    mean, logvar = fit_posterior(vae, x, seed=seed)
    best_elbo = posterior_elbo(vae, x, mean, logvar, seed=seed)
    if exact is None:
        # the fitted posterior, a fifth wider to cover the tails, proposes better than the encoder
        wider = (mean, logvar + 2 * math.log(1.2))
        log_px = importance_log_px(
            vae, x, num_samples=num_samples, seed=seed, chunk=chunk, proposal=wider
        ).log_px
        how = "log p(x) by importance sampling from the fitted posteriors"
    else:
        log_px, how = exact[: len(x)], "log p(x) by integration"
    put(
        "gap", log_px - encoder_elbo, f"log p(x) - elbo, on the images of the next two; {how}", 1000
    )
    put(
        "approximation_gap",
        log_px - best_elbo,
        "log p(x) - elbo of the best Gaussian posterior of each image (Cremer et al., 2018)",
        1000,
    )
    put(
        "amortisation_gap",
        best_elbo - encoder_elbo,
        "elbo of the best Gaussian posterior - elbo of the encoder's (Cremer et al., 2018)",
        1000,
    )


def _put_latents(
    put: Any, vae: VAE, x: Tensor, labels: Tensor, train_loader: Loader | None, seed: int
) -> None:
    information, marginal = aggregate_kl(vae, x, seed=seed)
    put(
        "mutual_information",
        information,
        f"I(x; z) in the mean KL (Hoffman, Johnson, 2016); at most log N = {math.log(len(x)):.2f}",
        1,
    )
    full = information.mean() > math.log(len(x)) - 0.5
    note = "; only an upper bound, as I(x; z) stands at its ceiling of log N" if full else ""
    put("marginal_kl", marginal, f"KL(q(z) || p(z)), the rest of the mean KL{note}", 1)
    if train_loader is None:
        return
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.neighbors import KNeighborsClassifier
    except ImportError:
        _log.warning("no probes of the latents: pip install 'vae-torch[probe]'")
        return

    train_x, train_labels = _whole(vae, train_loader)
    with torch.no_grad():
        train_means, means = (vae.encode(part)[0].cpu().numpy() for part in (train_x, x))
    classes, train_classes = labels.cpu().numpy(), train_labels.cpu().numpy()
    if len(np.unique(train_classes)) < 2 or len(train_means) < 10:
        return  # nothing to tell apart
    probes = {
        "linear_probe_accuracy": (
            "logistic regression",
            LogisticRegression(max_iter=2000, tol=1e-3),
        ),
        "knn_accuracy": ("10 nearest neighbours", KNeighborsClassifier(10)),
    }
    for name, (words, probe) in probes.items():
        right = probe.fit(train_means, train_classes).predict(means) == classes
        put(
            name,
            torch.from_numpy(right).double(),
            f"labels that {words} on the training images' posterior means finds",
            0,
            unit="share of images",
        )


def verdict(card: dict[str, Any], num_samples: int) -> list[str]:
    """What the card's figures mean, in sentences, each with something to try."""
    value = {name: entry["value"] for name, entry in card.items()}
    said = []
    active = value.get("active_units")  # None on the card of one image
    dims = len(card["active_units"]["variance_per_dim"]) if active is not None else 0
    if active == 0:
        said.append(
            "The posterior has collapsed: no latent dimension says anything about the image. Try "
            "objective=elbo, objective.beta_warmup_epochs or objective.free_bits."
        )
    elif active is not None and active < dims:
        said.append(
            f"{dims - active} of {dims} latent dimensions are collapsed. That costs little; "
            "objective.free_bits or objective.beta_warmup_epochs may bring them to use."
        )
    if "train_elbo" in value:
        gap = value["train_elbo"] - value["elbo"]
        if gap > 3:
            said.append(
                f"The training bound is {gap:.1f} nats better than the test bound: overfitting. "
                "Try data.binarize=dynamic, fewer epochs, train.ema or a smaller model."
            )
    poor = card["effective_samples"]["share_below_10"]
    if poor > 0.01:
        said.append(
            f"log_px is not to be trusted for {100 * poor:.0f}% of the images, which have fewer "
            f"than 10 effective samples of {num_samples}. Try a larger eval.num_samples."
        )
    if "log_px_exact" in value:
        off = value["log_px"] - value["log_px_exact"]
        said.append(
            f"Importance sampling is {abs(off):.3f} nats {'above' if off > 0 else 'below'} the "
            "integral, which is the truth here."
        )
    if value["gap"] > 1:
        larger = max("approximation_gap", "amortisation_gap", key=lambda name: value[name])
        remedy = (
            "a Gaussian fits the true posterior badly: more latent dimensions or objective=iwae"
            if larger == "approximation_gap"
            else "the encoder does not find the best Gaussian: a larger or longer trained encoder"
        )
        said.append(
            f"Most of the bound's gap of {value['gap']:.1f} nats is the {larger}: {remedy}."
        )
    return said
