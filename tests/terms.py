"""The terms of an objective for one batch, one attribute each."""

from typing import NamedTuple

from torch import Tensor

from vae_torch.images import Batch
from vae_torch.parts.objectives import Noise, as_objective, loss_and_metrics


class Terms(NamedTuple):
    loss: Tensor  # ()
    elbo: Tensor  # (B,)
    reconstruction: Tensor  # (B,)
    kl: Tensor  # (B,)
    kl_per_dim: Tensor | None  # (latent_dim,)


def objective_terms(vae, x, eps, objective, beta=1.0, choice=None) -> Terms:
    loss, metrics = loss_and_metrics(
        as_objective(objective), vae, Batch(x), Noise(eps, choice), beta
    )
    reconstruction, kl = metrics["reconstruction"], metrics["kl"]
    per_dim = metrics.get("kl_per_dim")
    dims = None if per_dim is None else per_dim.mean(0)
    return Terms(loss.mean(), reconstruction - kl, reconstruction, kl, dims)
