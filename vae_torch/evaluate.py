"""How good a trained model is: bounds, log p(x), and the use of its latents. Nats per image.

`bound_metrics` computes what the training loop logs. `evaluate_model` fills the evaluation card,
from functions that also work alone and return one value per image; `evaluate_images` returns these
values beside the card. They live in `vae_torch.evaluation`.
"""

from vae_torch.evaluation.bounds import bound_metrics, posterior_elbo
from vae_torch.evaluation.card import Evaluation, evaluate_images, evaluate_model
from vae_torch.evaluation.importance import (
    ImportanceEstimate,
    fit_posterior,
    importance_log_px,
)
from vae_torch.evaluation.latents import aggregate_kl
from vae_torch.evaluation.verdict import verdict

__all__ = [
    "Evaluation",
    "ImportanceEstimate",
    "aggregate_kl",
    "bound_metrics",
    "evaluate_images",
    "evaluate_model",
    "fit_posterior",
    "importance_log_px",
    "posterior_elbo",
    "verdict",
]
