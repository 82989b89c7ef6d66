"""The ELBO: its means over a data set, its values per image, and that of any Gaussian posterior."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from vae_torch.config import ObjectiveConfig
from vae_torch.data import Data, as_loader, images_of
from vae_torch.model import VAE
from vae_torch.objective import log_weights, objective_terms
from vae_torch.prior import StandardNormal
from vae_torch.seeds import Stream, seeded_generator


@torch.no_grad()
def bound_metrics(
    vae: VAE,
    loader: Data,
    objective: ObjectiveConfig,
    *,
    beta: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Means over a data set of what the training loop logs about it.

    The noise depends on `seed` and the number of draws alone, so the curves of a run move where the
    model moved; `loss` also where beta or the number of draws does.

    Args:
        vae: The model.
        loader: Batches x, [x] or (x, label, ...), or all images as one tensor or array.
        objective: Whose loss.
        beta: The KL's weight.
        seed: Of the noise.

    Returns:
        `loss`, `elbo`, `reconstruction`, `kl` in nats per image, and `kl_per_dim`, one per latent
        dimension, against the standard normal (left out for a learned prior, where it is no part of
        the KL).

    Raises:
        ValueError: No image, or images that `VAE.check` refuses.
    """
    weight = next(vae.parameters())
    device = weight.device
    batches: Iterable[Any] = loader  # one pass: an iterator will do
    if not isinstance(loader, Iterator):
        batches = as_loader(loader, vae.input_shape, batch_size=1000, device=device)
    noise = seeded_generator(device, seed, Stream.BOUND)
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    kl_dims = torch.zeros(vae.latent_dim, dtype=torch.float64, device=device)
    images = 0
    at_once = math.ceil(1000 / objective.num_samples)  # images: more would not stay in a cache
    for batch in batches:
        for x in vae.check(images_of(batch)).to(weight).split(at_once):
            shape = (objective.num_samples, len(x), vae.latent_dim)
            eps = torch.randn(shape, generator=noise, device=device)
            terms = objective_terms(vae, x, eps, objective, beta)
            parts = (terms.loss, terms.elbo.mean(), terms.reconstruction.mean(), terms.kl.mean())
            sums += len(x) * torch.stack(parts)
            kl_dims += len(x) * terms.kl_per_dim
            images += len(x)
    if not images:
        raise ValueError("there is no image to evaluate; the loader gave no batch")
    names = ("loss", "elbo", "reconstruction", "kl")
    metrics: dict[str, Any] = dict(zip(names, (sums / images).tolist(), strict=True))
    if isinstance(vae.prior, StandardNormal):
        metrics["kl_per_dim"] = (kl_dims / images).tolist()
    return metrics


@torch.no_grad()
def bounds_of(vae: VAE, batches: Iterable[Tensor], seed: int) -> Tensor:
    """The elbo, reconstruction and KL of each image from one draw of z: (3, N) nats, in double."""
    device = next(vae.parameters()).device
    noise = seeded_generator(device, seed, Stream.BOUND)
    rows = []
    for batch in batches:
        for part in batch.to(device).split(1000):  # bounds the decoder's memory
            eps = torch.randn((1, len(part), vae.latent_dim), generator=noise, device=device)
            terms = objective_terms(vae, part, eps.to(part.dtype), ObjectiveConfig())
            rows.append(torch.stack([terms.elbo, terms.reconstruction, terms.kl]).double())
    return torch.cat(rows, 1)


@torch.no_grad()
def posterior_elbo(
    vae: VAE, x: Tensor, mean: Tensor, logvar: Tensor, *, num_samples: int = 1000, seed: int = 0
) -> Tensor:
    """The ELBO of any Gaussian posteriors N(mean, exp(logvar)): (N,) nats, by Monte Carlo.

    Raises:
        ValueError: `VAE.check` refuses x.
    """
    x = vae.check(x)
    noise = seeded_generator(x.device, seed, Stream.FIT, 1)
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    done = 0
    while done < num_samples:  # twenty at a time bound the memory
        shape = (min(20, num_samples - done), *mean.shape)
        eps = torch.randn(shape, generator=noise, device=x.device, dtype=x.dtype)
        total += log_weights(vae, x, (mean, logvar), eps).double().sum(0)
        done += shape[0]
    return total / num_samples
