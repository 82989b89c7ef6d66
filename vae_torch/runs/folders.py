"""Reads a run's folder: its state, settings and metrics."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from vae_torch.config import INCIDENTAL, UserError, flatten
from vae_torch.runs.values import is_number

# Files in a run's folder.
LOCK = ".lock"  # held by the process that writes it
FAILED = "failed.json"  # why a sweep's job failed
PRUNED = "pruned.json"  # why it was stopped early, and its figure then

_NO_SETTINGS = ("seed", *INCIDENTAL)  # these settings do not tell runs apart


class SweepError(UserError):
    """Nothing to summarise, or a key or metric that no run has."""


class RecordError(ValueError):
    """A run's records are damaged: one line that names the file."""


@dataclass
class Run:
    """The content of a run's folder."""

    path: Path
    state: str  # finished, running, unfinished, pruned, failed, broken
    reason: str = ""  # for every state but finished
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)  # flat: model.latent_dim -> 2
    metrics: dict[str, float] = field(default_factory=dict)  # final test/elbo, ..., log_px
    data_sha256: dict[str, str] = field(default_factory=dict)  # of the images, by split
    protocols: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the card's figures
    better: dict[str, str | None] = field(default_factory=dict)  # higher or lower, by metric
    epochs: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl

    def at(self, key: str) -> Any:
        """One of its settings, hashable; None if it lacks the setting."""
        value = self.settings.get(key)
        return tuple(value) if isinstance(value, list) else value


def read_runs(folder: Path) -> list[Run]:
    """All runs at any depth below `folder`, sorted by path."""
    if not folder.is_dir():
        raise SweepError(f"{folder}: no such folder")
    runs = [read_run(path) for path in _run_folders(folder)]
    if not runs:
        raise SweepError(f"{folder}: holds no run; name outputs/, a sweep's folder or a run's")
    return runs


def _run_folders(folder: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        empty = not folders and not files and Path(path) != folder
        is_run = ".hydra" in folders or {"config.yaml", "metrics.jsonl", "summary.json"} & set(
            files
        )
        # hidden folders hold the notes of launchers
        folders[:] = [] if is_run else sorted(f for f in folders if not f.startswith("."))
        if empty or is_run:
            yield Path(path)


def read_run(path: Path) -> Run:
    """Read one run's folder; damage becomes a state and a reason, never an exception."""
    run = Run(path, "unfinished")
    try:
        if not any(path.iterdir()):
            return Run(path, "broken", "the folder is empty")
        summary = _json(path / "summary.json")
        # a run writes config.yaml when it begins; older ones have Hydra's copy only
        files = (path / "config.yaml", path / ".hydra" / "config.yaml")
        stored = summary["config"] if summary else next(filter(None, map(_yaml, files)), None)
        if stored is None:
            return Run(path, "broken", "has neither summary.json nor config.yaml")
        flat = flatten(stored)
        run.seed = int(flat.get("seed", 0))
        run.settings = {k: v for k, v in flat.items() if k not in _NO_SETTINGS}
        run.epochs = read_metrics(path)
        failed, pruned = _json(path / FAILED), _json(path / PRUNED)
        if summary and not failed:  # with both, a later attempt found the run damaged
            run.state = "finished"
            run.metrics = {k: v for k, v in summary["final"].items() if is_number(v)}
            run.metrics["seconds"] = summary["seconds"]
            run.better = dict(summary.get("better") or {})
            hashes = summary.get("data_sha256") or {}
            run.data_sha256 = {split: str(sha256) for split, sha256 in hashes.items()}
            card = _json(path / "evaluation.json") or {}
            for name, entry in card.items():
                if isinstance(entry, dict) and is_number(entry.get("value")):
                    run.metrics[name] = entry["value"]
                    run.protocols[name] = _protocol(card, entry)
            if bad := [k for k, v in summary["final"].items() if v != v]:
                run.state, run.reason = "failed", f"{bad[0]} is NaN"
            return run
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        run.state, run.reason = "broken", f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return run
    done, asked = len(run.epochs), flat.get("train.epochs", "?")
    if is_running(path):
        run.state, run.reason = "running", f"{done} of {asked} epochs"
    elif failed:
        run.state, run.reason = "failed", str(failed.get("reason", "no reason given"))
    elif pruned:
        run.state, run.reason = "pruned", str(pruned.get("reason", "no reason given"))
    else:
        run.reason = f"stopped after {done} of {asked} epochs"
    return run


def _protocol(card: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """How a figure of the evaluation card was measured."""
    protocol = {
        "data_sha256.test": card.get("data", {}).get("sha256"),
        "eval.num_samples": entry.get("num_samples"),
        "eval.num_images": entry.get("num_images"),
        "eval.estimated_images": entry.get("estimated_images"),
        "eval.seed": entry.get("seed"),
        "eval.proposal": entry.get("proposal"),
        "eval.checkpoint": card.get("checkpoint", {}).get("name"),
    }
    return {key: None if value is None else str(value)[:12] for key, value in protocol.items()}


def is_running(run_dir: Path) -> bool:
    """Whether a process holds the run's lock."""
    if not (run_dir / LOCK).exists():
        return False
    try:
        with FileLock(run_dir / LOCK, blocking=False):
            return False
    except Timeout:
        return True


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def _yaml(path: Path) -> Any:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where available
    return yaml.load(path.read_text("utf-8"), loader) if path.exists() else None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The epochs in metrics.jsonl, without a torn last line; other damage is refused."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    epochs = []
    for number, line in enumerate(lines, 1):
        try:
            epochs.append(json.loads(line))
            if not isinstance(epochs[-1]["epoch"], int):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            del epochs[number - 1 :]
            if number < len(lines):
                raise RecordError(f"{path}: line {number} is not the JSON of an epoch") from None
    return epochs
