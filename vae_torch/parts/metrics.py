"""Metrics: what a name means when runs are compared, chosen or printed.

An objective or a callback may report any number under any name. One that decides something, such as
which epoch was the best, must say which direction is better:

    metrics["mse"] = Metric("lower", digits=4)
"""

from dataclasses import dataclass
from typing import Literal

from vae_torch.config import ConfigError


@dataclass(frozen=True)
class Metric:
    """How to read a number.

    Args:
        better: Which direction is.
        digits: Behind the point, in print.
        unit: What it is measured in.
    """

    better: Literal["higher", "lower"]
    digits: int = 2
    unit: str = ""


# By the name without `train/` or `test/`.
metrics: dict[str, Metric] = {
    "elbo": Metric("higher", unit="nats"),
    "log_px": Metric("higher", unit="nats"),
    "log_px_exact": Metric("higher", unit="nats"),
    "reconstruction": Metric("higher", unit="nats"),
    "loss": Metric("lower", unit="nats"),
    "kl": Metric("lower", unit="nats"),
}


def metric_of(name: str) -> Metric:
    """What `test/elbo` means, or `elbo`.

    Raises:
        ConfigError: Nobody has said so.
    """
    found = metrics.get(name.rpartition("/")[2])
    if found is None:
        raise ConfigError(
            f"{name}: nobody has said which direction is better; known are {', '.join(metrics)}, "
            f'and metrics["{name.rpartition("/")[2]}"] = Metric("lower") in a plug-in adds one'
        )
    return found


def score(name: str, value: float) -> float:
    """The value with the sign that makes higher better."""
    return value if metric_of(name).better == "higher" else -value
