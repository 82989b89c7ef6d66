"""The ELBO: means over a data set, values per image, and the ELBO of any Gaussian posterior."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from vae_torch.config import ObjectiveConfig
from vae_torch.data import Data, as_batch, as_loader
from vae_torch.images import Batch
from vae_torch.machine import wide
from vae_torch.parts.likelihoods import bits_per_dim
from vae_torch.parts.objectives import (
    Noise,
    Objective,
    as_objective,
    bound,
    log_weights,
    loss_and_metrics,
)
from vae_torch.parts.posteriors import DiagonalGaussian, Posterior
from vae_torch.seeds import Stream, seeded_generator
from vae_torch.vae import VAE, in_eval_mode


@in_eval_mode
@torch.no_grad()
def bound_metrics(
    vae: VAE,
    loader: Data,
    objective: ObjectiveConfig | Objective,
    *,
    num_samples: int | None = None,
    beta: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Means over a data set of what the training loop logs.

    The noise depends on `seed` and the number of samples alone, so a run's curves change only where
    the model does; that of `loss` also where beta or the number of samples changes.

    Args:
        vae: The model.
        loader: Batches x, [x] or (x, label, ...), or all images as one tensor or array.
        objective: The objective whose loss is computed.
        num_samples: Samples of z per image; None: the objective's own number.
        beta: Weight of the KL.
        seed: Random seed of the noise.

    Returns:
        `loss`, `elbo`, `reconstruction`, `kl` in nats per image, the objective's other metrics, and
        `kl_per_dim`, one per latent dimension, where the KL has a closed form. The elbo's
        `bits_per_dim` where the likelihood has `levels`.

    Raises:
        ValueError: No image, or images that `VAE.check` refuses.
    """
    weight = next(vae.parameters())
    device = weight.device
    batches: Iterable[Any] = loader  # one pass: an iterator is enough
    if not isinstance(loader, Iterator):
        batches = as_loader(loader, vae.input_shape, batch_size=1000, device=device)
    generator = seeded_generator(device, seed, Stream.BOUND)
    minimise = as_objective(objective)
    draws: int = getattr(minimise, "num_samples", 1) if num_samples is None else num_samples
    sums: dict[str, Tensor] = {}  # float64: () each, or (n,)
    images = 0
    at_once = math.ceil(1000 / draws)  # images: more would not stay in a cache
    for loaded in batches:
        whole = as_batch(loaded, device, weight.dtype)
        for part in Batch(vae.check(whole.x), whole.y).split(at_once):
            shape = (draws, len(part.x), vae.latent_dim)
            eps = torch.randn(shape, generator=generator, device=device)
            loss, metrics = loss_and_metrics(minimise, vae, part, Noise(eps), beta)
            if not {"reconstruction", "kl"} <= metrics.keys():  # the plain ELBO is always reported
                metrics = {**bound(vae, part, eps).metrics(), **metrics}
            elbo = metrics["reconstruction"] - metrics["kl"]
            for name, values in {"loss": loss, "elbo": elbo, **metrics}.items():
                mean = values.mean(0) if values.ndim else values
                sums[name] = sums.get(name, 0) + wide(len(part.x) * mean)
            images += len(part.x)
    if not images:
        raise ValueError("there is no image to evaluate; the loader gave no batch")
    means: dict[str, Any] = {name: (total / images).tolist() for name, total in sums.items()}
    bits = bits_per_dim(vae.likelihood, means["elbo"], vae.input_shape)
    return means if bits is None else {**means, "bits_per_dim": bits}


@torch.no_grad()
def bounds_of(vae: VAE, batches: Iterable[Batch], seed: int) -> Tensor:
    """ELBO, reconstruction and KL of each image from one sample of z: (3, N) nats, in double."""
    device = next(vae.parameters()).device
    noise = seeded_generator(device, seed, Stream.BOUND)
    rows = []
    for batch in batches:
        for part in batch.split(1000):  # limits the decoder's memory
            x = part.x.to(device)
            eps = torch.randn((1, len(x), vae.latent_dim), generator=noise, device=device)
            parts = bound(vae, Batch(x, part.y), eps.to(x.dtype))
            elbo = parts.reconstruction - parts.kl
            rows.append(wide(torch.stack([elbo, parts.reconstruction, parts.kl])))
    return torch.cat(rows, 1)


@torch.no_grad()
def posterior_elbo(
    vae: VAE, x: Tensor, mean: Tensor, logvar: Tensor, *, num_samples: int = 1000, seed: int = 0
) -> Tensor:
    """The ELBO of any Gaussian posteriors N(mean, exp(logvar)): (N,) nats, by Monte Carlo.

    Raises:
        ValueError: `VAE.check` refuses x.
    """
    return elbo_of(vae, x, DiagonalGaussian(mean, logvar), num_samples=num_samples, seed=seed)


@in_eval_mode
@torch.no_grad()
def elbo_of(vae: VAE, x: Tensor, q: Posterior, *, num_samples: int = 1000, seed: int = 0) -> Tensor:
    """The ELBO of any posteriors of these images: (N,) nats, by Monte Carlo.

    Raises:
        ValueError: `VAE.check` refuses x.
    """
    x = vae.check(x)
    noise = seeded_generator(x.device, seed, Stream.FIT, 1)
    total = wide(x.new_zeros(len(x)))
    done = 0
    while done < num_samples:  # twenty at a time limit the memory
        shape = (min(20, num_samples - done), len(x), vae.latent_dim)
        eps = torch.randn(shape, generator=noise, device=x.device, dtype=x.dtype)
        total += wide(log_weights(vae, x, q, eps)).sum(0)
        done += shape[0]
    return total / num_samples
