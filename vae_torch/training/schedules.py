"""What changes from epoch to epoch: the weight of the KL, samples, the learning rate."""

import math

from vae_torch.config import ObjectiveConfig


def beta_at(objective: ObjectiveConfig, epoch: int) -> float:
    """The KL's weight in this epoch (counted from 0): linear up to `beta`, then constant."""
    warmup = objective.beta_warmup_epochs
    return objective.beta * (min(1.0, (epoch + 1) / warmup) if warmup > 0 else 1.0)


def samples_at(objective: ObjectiveConfig, epoch: int) -> int:
    """Draws of z per image in this epoch (counted from 0)."""
    early = objective.early_samples
    return early if early and epoch < objective.early_epochs else objective.num_samples


def lr_factor(schedule: str, progress: float) -> float:
    """What the learning rate is multiplied by after this fraction of the run, 0 <= progress < 1.

    `cosine` falls to 0 (Loshchilov and Hutter, 2017).
    """
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
