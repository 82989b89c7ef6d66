"""What a trained model is worth: bounds and their parts over a data set, in nats per image."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vae_torch.config import ObjectiveConfig
from vae_torch.data import seeded_generator
from vae_torch.model import VAE
from vae_torch.objective import objective_terms
from vae_torch.prior import StandardNormal

_NOISE = 3  # tells this module's random stream from those of data order and training noise

Loader = DataLoader[tuple[Tensor, Tensor]]


@torch.no_grad()
def bound_metrics(
    vae: VAE, loader: Loader, objective: ObjectiveConfig, *, beta: float = 1.0, seed: int = 0
) -> dict[str, Any]:
    """Means over a data set of what the training loop logs about it.

    The noise depends on `seed` alone, so the curve of a run moves only where the model moved.

    Returns:
        `loss`, `elbo`, `reconstruction`, `kl` in nats per image, and `kl_per_dim`, one per latent
        dimension, against the standard normal (left out for a learned prior, where it is no part of
        the KL).
    """
    device = next(vae.parameters()).device
    noise = seeded_generator(device, seed, _NOISE)
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    kl_dims = torch.zeros(vae.latent_dim, dtype=torch.float64, device=device)
    images = 0
    for x, _ in loader:
        x = x.to(device)
        eps = torch.randn(
            objective.num_samples, len(x), vae.latent_dim, generator=noise, device=device
        )
        terms = objective_terms(vae, x, eps, objective, beta)
        parts = (terms.loss, terms.elbo.mean(), terms.reconstruction.mean(), terms.kl.mean())
        sums += len(x) * torch.stack(parts)
        kl_dims += len(x) * terms.kl_per_dim
        images += len(x)
    loss, elbo, reconstruction, kl = (sums / images).tolist()
    metrics: dict[str, Any] = {
        "loss": loss,
        "elbo": elbo,
        "reconstruction": reconstruction,
        "kl": kl,
    }
    if isinstance(vae.prior, StandardNormal):
        metrics["kl_per_dim"] = (kl_dims / images).tolist()
    return metrics


@torch.no_grad()
def evaluate_model(vae: VAE, loader: Loader, *, seed: int = 0) -> dict[str, Any]:
    """The plain bound of a model on a data set, with its parts and its uncertainty.

    Args:
        vae: The model.
        loader: Yields (x, label); x in [0, 1].
        seed: Of the noise.

    Returns:
        Each figure as `{"value", "standard_error", "unit", "definition", "num_samples",
        "num_images", "seed"}`: `elbo`, `reconstruction`, `kl`.
    """
    device = next(vae.parameters()).device
    noise = seeded_generator(device, seed, _NOISE)
    per_image: dict[str, list[Tensor]] = {"elbo": [], "reconstruction": [], "kl": []}
    for x, _ in loader:
        x = x.to(device)
        eps = torch.randn(1, len(x), vae.latent_dim, generator=noise, device=device)
        terms = objective_terms(vae, x, eps, ObjectiveConfig())
        for name, per_batch in per_image.items():
            per_batch.append(getattr(terms, name).double().cpu())
    definitions = {
        "elbo": "reconstruction - kl, a lower bound on log p(x)",
        "reconstruction": "E_q(z|x) log p(x|z), summed over pixels, one draw of z",
        "kl": "KL(q(z|x) || p(z)), summed over latent dimensions"
        + (
            ""
            if isinstance(vae.prior, StandardNormal)
            else "; a Monte Carlo estimate from one draw of z"
        ),
    }
    card: dict[str, Any] = {}
    for name, per_batch in per_image.items():
        values = torch.cat(per_batch)
        card[name] = {
            "value": values.mean().item(),
            "standard_error": values.std().item() / math.sqrt(len(values)),
            "unit": "nats per image",
            "definition": definitions[name],
            "num_samples": 1,
            "num_images": len(values),
            "seed": seed,
        }
    return card
