"""Exact log p(x) by numerical integration over one or two latents. Nats per image.

`exact_log_px` gives the true value that importance sampling is checked against.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from vae_torch.bars import hidden
from vae_torch.machine import wide
from vae_torch.parts.likelihoods import pairwise
from vae_torch.parts.posteriors import gaussian_near
from vae_torch.seeds import Stream, seeded_generator
from vae_torch.vae import VAE, in_eval_mode

# Nats below an image's log p(x): a square that cannot hold more is not refined.
_NEGLIGIBLE = 20.0
# Nats. A square must be refined while quartering it changes its own integral by more than the
# first; while log p(x, z) at a place that the encoder or the prior names exceeds its value at all
# points of the square by more than the second; or while it varies by more than the third.
_CHANGE, _ABOVE, _RANGE = 0.5, 1.0, 16.0
# At most this many of the first squares lie between 0 and the edge.
_TO_THE_EDGE = 16
# Limits on squares of one size: a number, a number per image, and pairs of a square and an image,
# which take 36 bytes each.
_SQUARES, _SQUARES_PER_IMAGE, _PAIRS = 2**15, 64, 2**26


class QuadratureError(ValueError):
    """The integral cannot be computed: one line that says why."""


class Quadrature(NamedTuple):
    """log p(x) by numerical integration over the latent space."""

    log_px: Tensor  # (N,) nats
    residual: float  # nats: bound on the mean error, from what the last refinements changed
    side: float  # of the smallest squares
    half_width: float  # the squares cover ± this in each dimension
    squares: int  # of all sizes that were integrated over


@in_eval_mode
@torch.no_grad()
def exact_log_px(
    vae: VAE, x: Tensor, *, tolerance: float = 0.01, progress: bool = False
) -> Quadrature:
    r"""Log p(x) = log ∫ p(x|z) p(z) dz over a latent space of one or two dimensions.

    The plane is cut into squares that cover all posteriors and all components of the prior. The
    area is widened by a quarter until no mean changes. Each square has 8 x 8 Gauss-Legendre points.
    With a log-likelihood that is affine in x, one matrix multiplication evaluates many images at
    all of them. A square is quartered for two kinds of images: those whose log p(x) it changes, and
    those for which it may hide a peak, because p(x, z) varies strongly between its points, or is
    higher at the encoder's mean or at a component of the prior than at any of them. So smaller
    squares are evaluated for fewer images.

    The encoder decides neither the result nor the work: its means are places to look at, and its
    deviations are not used. An integral that needs too many squares is refused.

    Args:
        vae: A model with latent_dim 1 or 2.
        x: (N, *shape) in [0, 1].
        tolerance: Nats. A square is small enough for an image once quartering it moves log p(x) by
            less than half of this. The sum of these last changes is the residual.
        progress: Show a bar on a terminal.

    Raises:
        QuadratureError: The integral does not settle, needs too many squares, or meets values that
            are not finite.
        ValueError: latent_dim is above 2, or `VAE.check` refuses x.
    """
    check_few_latents(vae)
    x = vae.check(x)
    off = hidden() if progress else True
    with tqdm(desc="exact log p(x)", unit="cell", disable=off, leave=False) as bar:
        return _integrate(vae, x, tolerance, bar)


def _integrate(vae: VAE, x: Tensor, tolerance: float, bar: Any) -> Quadrature:
    dims, everything = vae.latent_dim, torch.arange(len(x), device=x.device)
    places = _Places(vae, x)
    reach = max(5.0, places.reach)
    side = max(min(max(2.0, reach / 8), 8.0), reach / _TO_THE_EDGE)
    levels = 20 + max(0, math.ceil(math.log2(side / 8)))

    nothing = x.new_full((len(x),), -math.inf)
    n = math.ceil(reach / side)
    _refuse_too_many((2 * n) ** dims, (2 * n) ** dims * len(x), len(x), side)
    quartered = _quarter(
        vae, x, [_Cell(c, everything, nothing) for c in _ring(x, 0, n, side, dims)], side
    )
    squares = len(quartered)
    bar.update(squares)
    total = _sum_of(quartered, nothing)
    for _ in range(20):
        if not total.isfinite().all():
            raise QuadratureError(
                f"log p(x) over ±{n * side:.3g} is not finite; look for NaN, or for numbers that "
                "are too large, in the model's weights"
            )
        wider = math.ceil(1.25 * n)
        _refuse_too_many((2 * wider) ** dims, (2 * wider) ** dims * len(x), len(x), side)
        ring = [_Cell(c, everything, nothing) for c in _ring(x, n, wider, side, dims)]
        quartered += _quarter(vae, x, ring, side)
        squares += len(ring)
        before, total, n = total, _sum_of(quartered, nothing), wider
        moved = (total - before).abs().mean().item()
        if moved < tolerance / 10:
            break
    else:
        raise QuadratureError(
            f"widening to ±{n * side:.0f} still moves the mean by {moved:.3f} nats"
        )
    width_residual, half_width = moved, n * side

    settled = nothing.clone()  # log of the part that needs no smaller squares
    gains = torch.zeros_like(settled)  # share of p(x) by which the last quartering changed it
    for _ in range(levels):
        side /= 2
        total = _sum_of(quartered, settled)
        cells, area = [], dims * math.log(side)
        for centers, images, parent, values, tops, lows in quartered:
            now, found = total[images], values.logsumexp(1)
            gain = (torch.exp(found - now) - torch.exp(parent - now)).abs()
            floor = (now - _NEGLIGIBLE).unsqueeze(1)
            named = places.highest_within(centers, side, images)  # (images, children)
            # between two of the 8 points log p(x, z) rises no more than elsewhere
            ranges = (tops - lows).nan_to_num()
            small = torch.maximum(tops + ranges / 8, named) + area < floor
            fine = (gain < tolerance / 2) & ~((found - parent).abs() > _CHANGE)
            resolved = (named <= tops + _ABOVE) & (ranges < _RANGE)
            done = small | (fine.unsqueeze(1) & resolved)
            more = values.masked_fill(~done, -math.inf).logsumexp(1)
            settled[images] = torch.logaddexp(settled[images], more)
            gains[images] += gain.masked_fill(~fine, 0.0)
            for j, center in enumerate(centers):
                open_ = ~done[:, j]
                if open_.any():
                    cells.append(_Cell(center, images[open_], values[open_, j]))
        if not cells:
            residual = gains.mean().item() + width_residual
            return Quadrature(wide(settled), residual, side, half_width, squares)
        _refuse_too_many(len(cells), sum(len(cell.images) for cell in cells), len(x), side)
        quartered = _quarter(vae, x, cells, side)
        squares += len(quartered)
        bar.update(len(quartered))
    raise QuadratureError(
        f"squares of {side:.1g} are still too large for {len(cells)} places: the likelihood is "
        "rougher there than the arithmetic is exact"
    )


def _refuse_too_many(squares: int, pairs: int, images: int, side: float) -> None:
    most = _SQUARES + _SQUARES_PER_IMAGE * images
    if squares > most or pairs > _PAIRS:
        raise QuadratureError(
            f"{squares:,} squares of {side:.2g} for {images:,} images, {pairs:,} pairs: at most "
            f"{most:,} and {_PAIRS:,} are computed; use importance sampling, or fewer images"
        )


class _Cell(NamedTuple):
    """A square of the plane, or an interval of the line, and its images."""

    center: Tensor  # (dims,)
    images: Tensor  # (M,) their numbers
    value: Tensor  # (M,) log of the integral over it, for each image


class _Quartered(NamedTuple):
    """A cell and the `children`, 2^dims of them, that it was cut into."""

    centers: Tensor  # (children, dims)
    images: Tensor  # (M,)
    parent: Tensor  # (M,) log of the integral over the whole cell
    values: Tensor  # (M, children) log of the integrals
    tops: Tensor  # (M, children) log of the highest p(x, z) found
    lows: Tensor  # (M, children) and of the lowest


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
        outs, prior = vae.decode(z).split(points), vae.log_prior(z).split(points)
        for cell, centers, out, log_pz in zip(some, places, outs, prior, strict=True):
            rows = x if len(cell.images) == len(x) else x[cell.images]
            block = pairwise(vae.likelihood, rows, out) + log_pz
            block = block.unflatten(1, (len(corners), -1))  # (M, children, points)
            values = (block + log_w).logsumexp(2)
            ends = (block.amax(2), block.amin(2))
            found.append(_Quartered(centers, cell.images, cell.value, values, *ends))
    return found


def _sum_of(quartered: list[_Quartered], settled: Tensor) -> Tensor:
    """Log p(x) of every image, from what is integrated so far: (N,)."""
    total = settled.clone()
    for cell in quartered:
        total[cell.images] = torch.logaddexp(total[cell.images], cell.values.logsumexp(1))
    return total


def _ring(like: Tensor, inner: int, outer: int, side: float, dims: int) -> Tensor:
    """Centres of the cells of [-outer, outer]^dims but not [-inner, inner]^dims, times side."""
    ticks = torch.arange(-outer, outer, device=like.device, dtype=like.dtype) + 0.5
    centers = torch.cartesian_prod(*[ticks] * dims).reshape(-1, dims)
    return side * centers[centers.abs().amax(1) > inner]


class _Places:
    """Where to look for peaks: the encoder's means, and the centres of the prior's components.

    Raises:
        QuadratureError: The encoder or the prior gives no numbers.
    """

    def __init__(self, vae: VAE, x: Tensor) -> None:
        noise = seeded_generator(x.device, 0, Stream.FIT, 3)
        self.means = torch.cat([gaussian_near(q, noise).mean for q in vae.encode_parts(x)])
        parts = [x.new_zeros(1, vae.latent_dim)]
        spreads = torch.zeros_like(parts[0])
        if find := getattr(vae.prior, "components", None):  # the standard normal has none
            centers, logvars, _ = find()
            parts.append(centers)
            spreads = torch.cat([spreads, torch.exp(0.5 * logvars)])
        self.shared = torch.cat(parts)  # 0, where every decoder was trained, and the components
        if not all(place.isfinite().all() for place in (self.means, self.shared, spreads)):
            raise QuadratureError("the posteriors or the prior's components are not finite")
        some = list(zip(x.split(1000), self.means.split(1000), strict=True))  # bounds the memory
        at_means = [vae.likelihood.log_prob(part, vae.decode(mean)) for part, mean in some]
        self.at_means = torch.cat(at_means) + vae.log_prior(self.means)  # (N,)
        out = vae.decode(self.shared)
        shared = [pairwise(vae.likelihood, part, out) for part, _ in some]
        self.at_shared = torch.cat(shared) + vae.log_prior(self.shared)  # (N, places)
        # a mean where p(x, z) is lower than at 0 does not tell where the mass is
        good = self.means[self.at_means > self.at_shared[:, 0]].abs().flatten()
        edges = torch.cat([good, (self.shared.abs() + 6 * spreads).flatten()])
        self.reach = float(edges.max())  # their largest distance from 0

    def highest_within(self, centers: Tensor, side: float, images: Tensor) -> Tensor:
        """Highest log p(x, z) of places in cells: (C, dims) and (M,) -> (M, C), or -inf."""
        inside = _inside(self.means[images], centers, side)
        found = torch.where(inside, self.at_means[images].unsqueeze(1), -math.inf)
        shared = _inside(self.shared, centers, side)
        for j in shared.any(0).nonzero().flatten().tolist():
            top = self.at_shared[images][:, shared[:, j]].amax(1)
            found[:, j] = torch.maximum(found[:, j], top)
        return found


def _inside(z: Tensor, centers: Tensor, side: float) -> Tensor:
    """Whether places are in cells: (M, dims) and (C, dims) -> (M, C)."""
    return ((z.unsqueeze(1) - centers).abs() <= 0.5 * side).all(-1)


def check_few_latents(vae: VAE) -> None:
    """Refuse a model with too many latents to integrate over.

    Raises:
        ValueError: latent_dim is above 2.
    """
    if vae.latent_dim > 2:
        raise ValueError(
            f"latent_dim is {vae.latent_dim}: integration over the latents is for 1 or 2; "
            "use importance sampling"
        )
