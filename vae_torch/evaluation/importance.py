"""log p(x) by importance sampling, and fitted posteriors. Nats per image."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vae_torch.bars import bar
from vae_torch.evaluation.pareto import pareto_k, rise_from_half
from vae_torch.evaluation.partial import Partial, in_parts
from vae_torch.machine import wide
from vae_torch.parts.objectives import log_weights
from vae_torch.parts.posteriors import DiagonalGaussian, Posterior, WithOtherNoise
from vae_torch.seeds import Stream, seeded_generator
from vae_torch.vae import VAE, in_eval_mode


class ImportanceEstimate(NamedTuple):
    """log p(x) by importance sampling from q(z|x), one entry per image."""

    log_px: Tensor  # (N,) nats
    effective_samples: Tensor  # (N,) (Σ w)² / Σ w², at most num_samples
    pareto_k: Tensor  # (N,) shape of the weights' tail: see `pareto.pareto_k`
    rise: Tensor  # (N,) nats gained from half of the samples to all: see `pareto.rise_from_half`


@in_eval_mode
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
    store: Partial | None = None,
    name: str = "encoder",
) -> ImportanceEstimate:
    """Log 1/K Σ_k p(x, z_k) / q(z_k|x): Burda et al. (2016), equation 8 with a large K.

    The noise of an image depends on (seed, its index) alone, so `chunk` changes the result only by
    the rounding of sums.

    Args:
        vae: The model.
        x: (N, *shape) in [0, 1].
        num_samples: K.
        seed: Random seed of the noise.
        chunk: Decoder rows at once; any number gives the same result. A thousand fit into a core's
            cache.
        proposal: Mean and log-variance, (N, latent_dim) each, to sample from instead of q(z|x).
        progress: Show a bar on a terminal.
        store: Keeps finished images, so that an interrupted estimate resumes.
        name: Of the estimate, in `store`.

    Raises:
        ValueError: num_samples or chunk is below 1, or `VAE.check` refuses x.
    """
    if num_samples < 1 or chunk < 1:
        raise ValueError(f"num_samples={num_samples}, chunk={chunk}: both must be 1 or more")
    x = vae.check(x)

    def estimate(start: int, stop: int) -> Tensor:
        part = slice(start, stop)
        eps = torch.stack(
            [
                torch.randn(
                    num_samples,
                    vae.latent_dim,
                    generator=seeded_generator(x.device, seed, i, Stream.IMPORTANCE),
                    device=x.device,
                )
                for i in range(start, stop)
            ],
            1,
        ).to(x.dtype)  # (K, images, latent_dim)
        if proposal is None:
            own: Posterior = vae.encode(x[part])
        else:
            own = DiagonalGaussian(*(each[part] for each in proposal))
        log_w = wide(
            torch.cat(
                [
                    log_weights(vae, x[part], own, some)
                    for some in eps.split(max(1, chunk // eps.shape[1]))
                ]
            )
        )  # (K, images)
        total = log_w.logsumexp(0)
        effective = torch.exp(2 * total - (2 * log_w).logsumexp(0))
        found = (total - math.log(num_samples), effective, pareto_k(log_w), rise_from_half(log_w))
        return torch.stack(found, 1)

    rows = in_parts(
        estimate,
        len(x),
        max(1, chunk // num_samples),
        name=name,
        store=store,
        vae=vae,
        progress=progress,
    )
    return ImportanceEstimate(*rows.T)


@in_eval_mode
def fit_posterior(
    vae: VAE,
    x: Tensor,
    *,
    steps: int = 500,
    num_samples: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Posterior:
    """The best posterior of each image, by gradient ascent on its ELBO from the encoder's.

    Cremer, Li and Duvenaud, *Inference Suboptimality in Variational Autoencoders* (ICML 2018),
    table 1: q*.

    The encoder's posterior is one of those that are searched. Where it is Gaussian they are all
    diagonal Gaussians; otherwise they are the encoder's, with the noise from any diagonal Gaussian.

    Args:
        vae: The model; its weights do not change.
        x: (N, *shape) in [0, 1].
        steps: Steps of Adam, on each image's own mean and log-variance, of z or of the noise.
        num_samples: Samples of z per step.
        seed: Random seed of the noise.
        progress: Show a bar on a terminal.

    Returns:
        For a Gaussian posterior its mean and log-variance, (N, latent_dim) each: `mean, logvar =
        fit_posterior(vae, x)`. For others a `Posterior`, which `evaluation.bounds.elbo_of` takes.

    Raises:
        ValueError: `VAE.check` refuses x.
    """
    x = vae.check(x)
    noise = seeded_generator(x.device, seed, Stream.FIT)
    with torch.no_grad():
        encoder = vae.encode(x)
        gaussian = isinstance(encoder, DiagonalGaussian)
        nothing = torch.zeros_like(encoder.mean)
        start = encoder if gaussian else DiagonalGaussian(nothing, nothing)
        mean, logvar = (part.clone() for part in start)

    def q() -> Posterior:
        own = DiagonalGaussian(mean, logvar)
        return own if gaussian else WithOtherNoise(encoder, *own)

    mean.requires_grad_()
    logvar.requires_grad_()
    optimizer = torch.optim.Adam([mean, logvar], lr=0.02)
    shape = (num_samples, *mean.shape)
    counted = bar(range(steps), "fit of q(z|x)", show=progress)
    for step in counted:
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        eps = torch.randn(shape, generator=noise, device=x.device, dtype=x.dtype)
        loss = -log_weights(vae, x, q(), eps).mean(0).sum()
        mean.grad, logvar.grad = torch.autograd.grad(loss, [mean, logvar])
        optimizer.step()
    mean, logvar = mean.detach(), logvar.detach()
    return q()
