"""Stops runs of a sweep that are behind the others."""

import json
import math
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

from vae_torch.config import Config
from vae_torch.files import write_atomically
from vae_torch.parts.metrics import metric_of, score
from vae_torch.runs.folders import PRUNED, RecordError, read_metrics
from vae_torch.runs.run import Judge
from vae_torch.training.errors import StoppedError
from vae_torch.vae import VAE


class PrunedError(StoppedError):
    """A run of a sweep is behind the others."""

    def __init__(self, reason: str, elbo: float) -> None:
        super().__init__(reason)
        self.elbo = elbo


def behind_median(run_dir: Path, *, metric: str = "test/elbo", least: int = 5) -> str | None:
    """Why a run of a sweep should stop early, or None if it should continue.

    Its best value so far is below the median of the sweep's other runs after as many epochs. The
    median rule of Golovin et al., *Google Vizier* (2017), section 3.2.2, is similar, but compares
    the best value so far with running averages of completed runs.

    Args:
        run_dir: The run's folder, beside those of the others.
        metric: The metric that decides.
        least: Number of other runs needed for a decision.
    """
    own = _scores(run_dir, metric)
    others = []
    for path in run_dir.parent.glob("*/metrics.jsonl"):
        if path.parent != run_dir:
            with suppress(RecordError, OSError):
                others.append(_scores(path.parent, metric)[: len(own)])
    rivals = [max(scores) for scores in others if len(scores) == len(own)]
    if len(rivals) < least or max(own) >= (median := statistics.median(rivals)):
        return None
    sign = 1 if metric_of(metric).better == "higher" else -1
    best, middle = sign * max(own), sign * median
    return (
        f"after {len(own)} epochs its best {metric} is {best:.2f}, "
        f"the median of {len(rivals)} others {middle:.2f}"
    )


def _scores(run_dir: Path, metric: str) -> list[float]:
    """A run's values by epoch, higher is better; an epoch without one counts as the worst."""
    return [
        score(metric, epoch[metric]) if metric in epoch else -math.inf
        for epoch in read_metrics(run_dir)
    ]


def pruning(run_dir: Path, config: Config) -> Judge:
    """A callback that stops a run when `behind_median` gives a reason."""

    def judge(metrics: dict[str, Any], vae: VAE) -> None:  # noqa: ARG001
        epoch = metrics["epoch"]
        if config.train.prune_after <= epoch < config.train.epochs and (
            reason := behind_median(run_dir, metric=config.train.monitor)
        ):
            elbo = score(config.train.monitor, metrics[config.train.monitor])
            text = json.dumps({"reason": reason, "elbo": elbo})
            write_atomically(run_dir / PRUNED, (text + "\n").encode())
            raise PrunedError(reason, elbo)

    return judge


def pruned_elbo(run_dir: Path) -> float | None:
    """The last test elbo of a run that was stopped early, else None."""
    path = run_dir / PRUNED
    return float(json.loads(path.read_text("utf-8"))["elbo"]) if path.exists() else None
