"""Metrics: how to read a number when runs are compared, chosen or printed.

An objective or a callback may report any number under any name. If a number decides something, such
as which epoch is the best, it must say which direction is better:

    metrics["mse"] = Metric("lower", digits=4)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from vae_torch.config import ConfigError


@dataclass(frozen=True)
class Metric:
    """How to read a number.

    Args:
        better: `higher` or `lower`; None where neither is better: a collapsed model has the lowest
            KL and a perfect gap.
        digits: Decimals in print.
        unit: Its unit.
        density: Whether it is of log p(x). Then it does not compare between likelihoods, nor
            between models with and without labels.
    """

    better: Literal["higher", "lower"] | None
    digits: int = 2
    unit: str = ""
    density: bool = False


_NATS = "nats per image"

# By the name without `train/` or `test/`.
metrics: dict[str, Metric] = {
    **dict.fromkeys(
        (
            "elbo", "iw_elbo", "train_elbo", "reconstruction", "log_px", "log_px_exact",
            "log_px_encoder", "log_px_ais", "train_log_px",
        ),
        Metric("higher", unit=_NATS, density=True),
    ),
    "loss": Metric("lower", unit=_NATS, density=True),
    **dict.fromkeys(
        (
            "kl", "gap", "fitted_gap", "approximation_gap", "amortisation_gap", "train_gap",
            "ais_difference", "ais_width", "mutual_information", "mutual_information_upper",
            "marginal_kl", "marginal_kl_lower", "entropy_floor", "total_correlation",
            "dimension_kl",
        ),
        Metric(None, unit=_NATS),
    ),
    "bits_per_dim": Metric("lower", digits=3, unit="bits per dimension", density=True),
    "effective_samples": Metric(None, unit="samples"),
    "active_units": Metric(None, digits=0, unit="dimensions"),
    "linear_probe_accuracy": Metric("higher", digits=3, unit="share of images"),
    "knn_accuracy": Metric("higher", digits=3, unit="share of images"),
    "seconds": Metric("lower", unit="seconds"),
}  # fmt: skip


def metric_of(name: str) -> Metric:
    """The metric behind a name such as `test/elbo` or `elbo`, if it can decide something.

    Raises:
        ConfigError: Neither direction is better, or the name is unknown.
    """
    last = name.rpartition("/")[2]
    found = metrics.get(last)
    if found is not None and found.better is None:
        raise ConfigError(f"{name}: neither direction of it is better; choose another metric")
    if found is None:
        known = ", ".join(key for key, metric in metrics.items() if metric.better)
        raise ConfigError(
            f"{name}: unknown whether higher or lower is better; use one of {known}, or add "
            f'metrics["{last}"] = Metric("lower") in a plug-in'
        )
    return found


def scores_of(name: str, values: Iterable[float | None]) -> list[float | None]:
    """The score of each value; None stays None."""
    return [None if value is None else score(name, value) for value in values]


def score(name: str, value: float) -> float:
    """The value with the sign that makes higher better."""
    return value if metric_of(name).better == "higher" else -value
