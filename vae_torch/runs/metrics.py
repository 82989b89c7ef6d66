"""Metrics of many runs: units, directions, and the conditions of their measurement."""

from typing import Any

from vae_torch.parts.metrics import metrics
from vae_torch.runs.folders import Run

_OBJECTIVE = tuple(f"objective.{key}" for key in ("name", "beta", "free_bits", "num_samples"))
DATA = ("data.name", "data.binarize", "data.limit_test", "data.hold_out")

# The conditions of a measurement, in words.
MEASURED = {
    "data_sha256.test": "test images",
    "data_sha256.train": "training images",
    **dict.fromkeys(DATA, "settings of the data"),
    "likelihood": "likelihoods",
    "model.conditional": "models with and without labels",
    "eval.num_samples": "numbers of importance samples",
    "eval.proposal": "proposals of the importance samples",
    **dict.fromkeys(("eval.num_images", "eval.estimated_images"), "numbers of images"),
    "eval.seed": "evaluation seeds",
    "eval.checkpoint": "checkpoints",
    **dict.fromkeys(_OBJECTIVE, "objectives"),
}


def unit_of(metric: str) -> str:
    """The unit of a metric; empty if unknown."""
    known = metrics.get(last_part(metric))
    return known.unit if known else ""


def direction_of(metric: str) -> bool | None:
    """Whether higher is better; None if neither direction is, or if it is unknown."""
    known = metrics.get(last_part(metric))
    return known.better == "higher" if known and known.better else None


def higher_is_better(metric: str) -> bool:
    """Whether higher is known to be better, as for `elbo`, `log_px` and accuracies."""
    return direction_of(metric) is True


def last_part(metric: str) -> str:
    """`elbo` of `test/elbo`."""
    return metric.rpartition("/")[2]


def of_card(metric: str) -> bool:
    """Whether scripts/evaluate.py measures this metric."""
    return "/" not in metric and metric in metrics and metric != "seconds"


def basis_of(run: Run, metric: str) -> dict[str, Any]:
    """What a metric depends on besides the model; runs compare only if all of it is equal."""
    basis = dict(run.protocols.get(metric, {}))
    split = "train" if metric.startswith("train_") else metric.partition("/")[0]
    if split in ("train", "test"):
        basis.pop("data_sha256.test", None)
        basis[f"data_sha256.{split}"] = run.data_sha256.get(split, "")[:12] or None
    if None in (basis.get("data_sha256.test", ""), basis.get("data_sha256.train", "")):
        defaults = {"data.binarize": "none", "data.hold_out": 0}
        basis |= {key: run.settings.get(key) or defaults.get(key) for key in DATA}
    if split == "train":  # dynamically binarised images have the hash of the grey ones
        basis.setdefault("data.binarize", run.settings.get("data.binarize"))
    known = metrics.get(last_part(metric))
    if known and known.density:
        basis["likelihood"] = run.settings.get("likelihood")
        basis["model.conditional"] = bool(run.settings.get("model.conditional"))
    if last_part(metric) in ("loss", "iw_elbo"):
        basis |= {key: run.settings.get(key) for key in _OBJECTIVE}
    return basis
