"""Latents of images: their positions, their activity, and interpolations between them."""

import torch
from torch import Tensor

from vae_torch.images import Batch
from vae_torch.machine import wide
from vae_torch.parts.objectives import ACTIVE_UNIT_VARIANCE
from vae_torch.parts.posteriors import gaussian_of
from vae_torch.vae import VAE


def spherical_interpolation(start: Tensor, end: Tensor, *, steps: int) -> Tensor:
    """From `start` to `end` around the origin: directions along an arc, lengths linearly.

    After White (2016), section 2.1, whose weights assume vectors of equal length: with other
    lengths they lead far outside where the angle is large. Here every point's distance from the
    origin lies between those of the two ends. Special cases:

    - Opposite directions: half a circle through the axis that is closest to a right angle.
    - A zero vector has no direction: a straight line.
    - One dimension: the sign changes halfway.

    Args:
        start: (latent_dim,).
        end: (latent_dim,).
        steps: Points on the way, ends included.

    Returns:
        (steps, latent_dim).
    """
    ends = wide(torch.stack([start, end]))
    t = torch.linspace(0, 1, steps, dtype=ends.dtype, device=ends.device)[:, None]
    lengths = torch.linalg.vector_norm(ends, dim=1, keepdim=True)
    first, last = torch.where(lengths > 0, ends / lengths, ends.flip(0) / lengths.flip(0))
    if not lengths.any():
        directions = ends[:1]
    elif len(first) == 1:
        directions = torch.where(t < 0.5, first, last)
    else:
        # 2 atan2 keeps its digits near 0 and π, where acos of a cosine loses half of them
        apart, joint = (torch.linalg.vector_norm(v) for v in (last - first, last + first))
        side = last - (first @ last) * first
        if torch.linalg.vector_norm(side) < 1e-12:  # the same direction, or opposite ones
            axis = torch.nn.functional.one_hot(first.abs().argmin(), len(first)).to(first)
            side = axis - (first @ axis) * first
        angle = 2 * t * torch.atan2(apart, joint)
        directions = angle.cos() * first + angle.sin() * torch.nn.functional.normalize(side, dim=0)
        directions = torch.nn.functional.normalize(directions, dim=1)
    return (torch.lerp(lengths[0], lengths[1], t) * directions).to(start)


@torch.no_grad()
def posterior_means(vae: VAE, x: Tensor, y: Tensor | None = None) -> Tensor:
    """Centres of the posteriors (N, latent_dim), on the CPU, in batches to limit memory."""
    parts = vae.of(Batch(x, y)).encode_parts(x)
    return torch.cat([q.mean for q in parts]).float().cpu()


@torch.no_grad()
def gaussian_posterior(vae: VAE, batch: Batch, what: str) -> tuple[Tensor, Tensor]:
    """Means and log-variances of Gaussian posteriors, on the CPU, in batches to limit memory.

    Raises:
        ConfigError: q(z|x) is not Gaussian; the message begins with `what`.
    """
    parts = [gaussian_of(q, what) for q in vae.of(batch).encode_parts(batch.x)]
    mean, logvar = (torch.cat(part).float().cpu() for part in zip(*parts, strict=True))
    return mean, logvar


def most_active(means: Tensor) -> list[int]:
    """Latent dimensions by the variance of their means, largest first; two keep their own order."""
    if means.shape[1] <= 2:
        return list(range(means.shape[1]))
    return variances(means).argsort(descending=True).tolist()


def variances(means: Tensor) -> Tensor:
    """(latent_dim,) over the images; zero for one image."""
    return means.var(0) if len(means) > 1 else torch.zeros(means.shape[1])


def activity(means: Tensor) -> str:
    """The number of active dimensions, in words."""
    if len(means) == 1:
        return "one image: activity unknown"
    count, total = int((variances(means) > ACTIVE_UNIT_VARIANCE).sum()), means.shape[1]
    return f"{count} of {total} {'dimension' if total == 1 else 'dimensions'} active"


def subscript(dimension: int) -> str:
    """`₁` for dimension 0."""
    return "".join(chr(0x2080 + int(digit)) for digit in str(dimension + 1))
