"""Schedules: the weight of the KL, the number of samples, and the learning rate."""

import math
from collections.abc import Sequence

from vae_torch.config import ObjectiveConfig, OptimizerConfig


def beta_at(objective: ObjectiveConfig, epoch: int) -> float:
    """The KL's weight in this epoch (counted from 0): linear up to `beta`, then constant."""
    warmup = objective.beta_warmup_epochs
    return objective.beta * (min(1.0, (epoch + 1) / warmup) if warmup > 0 else 1.0)


def samples_at(objective: ObjectiveConfig, epoch: int) -> int:
    """Samples of z per image in this epoch (counted from 0)."""
    early = objective.early_samples
    return early if early and epoch < objective.early_epochs else objective.num_samples


def learning_rate(
    settings: OptimizerConfig,
    epoch: int,
    step: int,
    *,
    epochs: int,
    steps: int | None,
    since: tuple[int, int] = (0, 0),
    falls: int = 0,
) -> float:
    """The learning rate of a step: a function of the place in the run and of `falls` alone.

    Args:
        settings: The peak, the schedule and the warm-up.
        epoch: Finished ones.
        step: Of the epoch, counted from 0.
        epochs: Of the whole run.
        steps: Of an epoch; None where the loader does not know: constant and `step` need none.
        since: Epoch and step at which the schedule began; later than 0 in a run made longer.
        falls: Of `plateau`, so far: see `falls_of`.
    """
    began = since[0] + since[1] / (steps or 1)
    done = (epoch + step / steps - began) / (epochs - began) if steps else 0.0
    lr = settings.lr * lr_factor(settings.schedule, done)
    if settings.schedule == "step" and settings.step_epochs:
        falls = (epoch - since[0]) // settings.step_epochs
    lr *= settings.step_factor**falls
    if settings.warmup_steps and steps:
        taken = (epoch - since[0]) * steps + step - since[1]
        lr *= min(1.0, (taken + 1) / settings.warmup_steps)
    return lr


def falls_of(scores: Sequence[float | None], epochs: int, min_delta: float = 0.0) -> int:
    """How often the learning rate of `plateau` has fallen: torch's `ReduceLROnPlateau`.

    A function of the history alone, so that a resumed run has the bits of an uninterrupted one.

    Args:
        scores: One per epoch, higher is better; None where it was not measured.
        epochs: Without a gain, after which it falls: one more than the patience of torch's class.
        min_delta: What an epoch must be better by to count as a gain.
    """
    best, waited, falls = -math.inf, 0, 0
    for score in scores:
        if score is not None and score > best + min_delta:
            best, waited = score, 0
            continue
        waited += 1
        if waited == epochs:
            waited, falls = 0, falls + 1
    return falls


_RISE = 0.3  # fraction of one cycle; this and the next two are the defaults of torch's OneCycleLR
_LOW, _LOWEST = 1 / 25, 1 / 25e4


def lr_factor(schedule: str, progress: float) -> float:
    """What the learning rate is multiplied by after this fraction of the run, 0 <= progress < 1.

    `cosine` falls to 0 (Loshchilov and Hutter, 2017). `one_cycle` rises from 1/25 to 1 over three
    tenths of the run and falls to almost 0 (Smith and Topin, 2018).
    """
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "one_cycle":
        if progress < _RISE:
            return _between(_LOW, 1.0, progress / _RISE)
        return _between(1.0, _LOWEST, (progress - _RISE) / (1 - _RISE))
    return 1.0


def _between(start: float, end: float, done: float) -> float:
    """Half a cosine from start to end."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))
