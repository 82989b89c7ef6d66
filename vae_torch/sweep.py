"""Reading many runs: what each was, how far it came, which setting won and by how much."""

import csv
import io
import json
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

from vae_torch.config import INCIDENTAL, flatten
from vae_torch.figures import DIGIT_COLOURS
from vae_torch.runs.records import RecordError, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# in a run's folder
LOCK = ".lock"  # held by the process that writes it
FAILED = "failed.json"  # why a sweep's job failed
PRUNED = "pruned.json"  # why it was stopped early, and its figure until then

_NO_SETTINGS = ("seed", *INCIDENTAL)  # settings are averaged over the seed

# Unit of a figure, by the last part of its name, and whether higher is better. None: neither
# direction is, since a collapsed model has the lowest KL and a perfect gap.
_NATS = "nats per image"
_FIGURES: dict[str, tuple[str, bool | None]] = {
    "elbo": (_NATS, True),
    "train_elbo": (_NATS, True),
    "reconstruction": (_NATS, True),
    "log_px": (_NATS, True),
    "log_px_exact": (_NATS, True),
    "loss": (_NATS, False),
    "kl": (_NATS, None),
    "gap": (_NATS, None),
    "fitted_gap": (_NATS, None),
    "approximation_gap": (_NATS, None),
    "amortisation_gap": (_NATS, None),
    "mutual_information": (_NATS, None),
    "marginal_kl": (_NATS, None),
    "entropy_floor": (_NATS, None),
    "effective_samples": ("samples", None),
    "active_units": ("dimensions", None),
    "linear_probe_accuracy": ("share of images", True),
    "knn_accuracy": ("share of images", True),
    "seconds": ("seconds", False),
}
_DENSITIES = ("elbo", "train_elbo", "reconstruction", "log_px", "log_px_exact", "loss")
_OBJECTIVE = tuple(f"objective.{key}" for key in ("name", "beta", "free_bits", "num_samples"))
_DATA = ("data.name", "data.binarize", "data.limit_test", "data.hold_out")

# What figures are measured with, in words.
_MEASURED = {
    "data_sha256.test": "test images",
    "data_sha256.train": "training images",
    **dict.fromkeys(_DATA, "settings of the data"),
    "likelihood": "likelihoods",
    "eval.num_samples": "numbers of importance samples",
    "eval.num_images": "numbers of images",
    "eval.seed": "evaluation seeds",
    "eval.checkpoint": "checkpoints",
    **dict.fromkeys(_OBJECTIVE, "objectives"),
}

_ONE = "the one setting"

Key = tuple[Any, ...]


class SweepError(ValueError):
    """Nothing to summarise, or a question about figures that no run has."""


@dataclass
class Run:
    """What a run's folder says."""

    path: Path
    state: str  # finished, running, unfinished, pruned, failed, broken
    reason: str = ""  # of every state but finished
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)  # flat: model.latent_dim -> 2
    metrics: dict[str, float] = field(default_factory=dict)  # final test/elbo, ..., log_px
    data_sha256: dict[str, str] = field(default_factory=dict)  # of the images, by split
    protocols: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the card's figures
    epochs: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl


@dataclass
class Row:
    """One setting: its runs over the seeds."""

    values: Key  # of the table's keys
    runs: list[Run]
    mean: float
    sd: float  # between seeds; NaN for one


@dataclass
class Summary:
    """A table of settings, best first, and what could not enter it."""

    metric: str
    keys: list[str]
    rows: list[Row]
    left_out: list[Run]
    higher_is_better: bool | None = None  # None: rows are in the order of their settings
    where: list[str] = field(default_factory=list)  # key=value: what tells these runs from others
    differ: list[str] = field(default_factory=list)  # in what these others were measured otherwise

    @property
    def unit(self) -> str:
        """Of the metric; empty where it is not known, or not the same for all runs."""
        losses = {run.settings.get("objective.name") for row in self.rows for run in row.runs}
        if _last(self.metric) == "loss" and "keras" in losses:  # a mean over pixels
            return ""
        return _FIGURES.get(_last(self.metric), ("", None))[0]

    @property
    def held_out(self) -> bool:
        """Whether the metric is of held-out training images instead of the test set."""
        runs = [run for row in self.rows for run in row.runs]
        of_test = self.metric.startswith("test/") or any(self.metric in r.protocols for r in runs)
        return of_test and bool(runs) and all(run.settings.get("data.hold_out") for run in runs)

    @property
    def digits(self) -> int:
        """Decimals that show four digits of the largest mean, and two at least."""
        largest = max((abs(row.mean) for row in self.rows), default=0.0)
        if not 0 < largest < math.inf:
            return 2
        return min(max(2, 3 - math.floor(math.log10(largest))), 8)

    def heading(self) -> str:
        """`test/elbo of held-out images, nats per image (higher is better)`."""
        better = {True: " (higher is better)", False: " (lower is better)", None: ""}
        return (
            self.metric
            + (" of held-out images" if self.held_out else "")
            + (f", {self.unit}" if self.unit else "")
            + better[self.higher_is_better]
        )

    def verdict(self) -> str:
        """Whether the best setting's lead is larger than the noise between seeds."""
        if not self.rows:
            return "No run is finished."
        if len(self.rows) < 2:
            return "There is one setting; nothing to compare."
        if self.higher_is_better is None:
            return (
                f"No better direction of {self.metric} is known, so no setting leads. "
                "--higher-is-better or --lower-is-better ranks them."
            )
        first, second = self.rows[:2]
        lead = abs(first.mean - second.mean)
        name = self.words(first)
        unit = f" {self.unit}" if self.unit else ""
        if len(first.runs) < 2 or len(second.runs) < 2:
            return (
                f"{name} leads by {lead:.3g}{unit}. With one seed each nobody knows how much of it "
                "is luck: add seed=0,1,2."
            )
        error = math.sqrt(sum(row.sd**2 / len(row.runs) for row in (first, second)))
        sure = lead > 2 * error
        return (
            f"{name} leads by {lead:.3g} ± {error:.2g}{unit} (standard error of the difference of "
            f"means over {len(first.runs)} and {len(second.runs)} seeds): "
            + ("more than" if sure else "not more than")
            + " twice its error, "
            + ("no seed noise." if sure else "so the two cannot be told apart.")
        )

    def words(self, row: Row) -> str:
        """`model.latent_dim=8, seed...` of a row."""
        pairs = zip(self.keys, row.values, strict=True)
        return ", ".join(f"{key}={_text(value)}" for key, value in pairs) or _ONE


def read_runs(folder: Path) -> list[Run]:
    """Every run at any depth below `folder`, by path.

    Raises:
        SweepError: No such folder, or no run in it.
    """
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
        # launchers keep notes in hidden folders
        folders[:] = [] if is_run else sorted(f for f in folders if not f.startswith("."))
        if empty or is_run:
            yield Path(path)


def read_run(path: Path) -> Run:
    """One run's folder; damage becomes a state and a reason, never an exception."""
    run = Run(path, "unfinished")
    try:
        if not any(path.iterdir()):
            return Run(path, "broken", "the folder is empty")
        summary = _json(path / "summary.json")
        # a run writes config.yaml as soon as it begins, Hydra's copy is of older ones
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
            run.metrics = {k: v for k, v in summary["final"].items() if _is_number(v)}
            run.metrics["seconds"] = summary["seconds"]
            hashes = summary.get("data_sha256") or {}
            run.data_sha256 = {split: str(sha256) for split, sha256 in hashes.items()}
            card = _json(path / "evaluation.json") or {}
            for name, entry in card.items():
                if isinstance(entry, dict) and _is_number(entry.get("value")):
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


def behind_median(run_dir: Path, *, least: int = 5) -> str | None:
    """Why a run of a sweep is not worth going on with, or None where it is.

    The median rule of Golovin et al., *Google Vizier* (2017), section 3.2.2: its best test elbo so
    far is below the median of what the sweep's other runs had after as many epochs.

    Args:
        run_dir: The run's folder, beside those of the others.
        least: Fewer others are no judges.
    """
    metric = "test/elbo"
    own = [epoch[metric] for epoch in read_metrics(run_dir)]
    others = []
    for path in run_dir.parent.glob("*/metrics.jsonl"):
        if path.parent != run_dir:
            with suppress(RecordError, OSError):
                others.append([epoch[metric] for epoch in read_metrics(path.parent)][: len(own)])
    rivals = [max(elbos) for elbos in others if len(elbos) == len(own)]
    if len(rivals) < least or max(own) >= (median := statistics.median(rivals)):
        return None
    return (
        f"after {len(own)} epochs its best {metric} is {max(own):.2f}, "
        f"the median of {len(rivals)} others {median:.2f}"
    )


def is_running(run_dir: Path) -> bool:
    """Whether a process holds the run's lock."""
    if not (run_dir / LOCK).exists():
        return False
    try:
        with FileLock(run_dir / LOCK, blocking=False):
            return False
    except Timeout:
        return True


def summarize(
    runs: Sequence[Run],
    *,
    metric: str = "test/elbo",
    group_by: Sequence[str] = (),
    where: Sequence[str] = (),
    higher_is_better: bool | None = None,
) -> Summary:
    """Fold the finished runs of each setting over their seeds.

    Args:
        runs: From `read_runs`.
        metric: A name of summary.json's `final`, or of a figure of evaluation.json.
        group_by: The settings to tell apart; all that differ between the runs when empty.
        where: `key=value` each: only these runs.
        higher_is_better: Direction of the metric; None is what is known of its name.

    Raises:
        SweepError: A condition without `=`, a key or a metric that no run has, or nothing left;
            runs that cannot be compared, since the metric was measured on other images or in
            another way.
    """
    summaries = summarize_each(
        runs, metric=metric, group_by=group_by, where=where, higher_is_better=higher_is_better
    )
    if len(summaries) > 1:
        raise SweepError(f"--metric {metric}: {why_apart(summaries)}")
    return summaries[0]


def summarize_each(
    runs: Sequence[Run],
    *,
    metric: str = "test/elbo",
    group_by: Sequence[str] = (),
    where: Sequence[str] = (),
    higher_is_better: bool | None = None,
) -> list[Summary]:
    """`summarize`, apart for runs that cannot be compared: largest group first.

    Runs can be compared where the metric is of the same images, by their SHA-256 in summary.json
    (without one, by the settings of the data), and under the same likelihood; a loss also of the
    same objective, and a figure of evaluation.json of the same samples, seed and checkpoint.

    Args and errors are those of `summarize`. What is left out stands in the last summary.
    """
    known = sorted({key for run in runs for key in run.settings})
    choices = sorted({"seed", *known, *(key for run in runs for key in _basis(run, metric))})
    wanted = []
    for condition in where:
        key, given, value = condition.partition("=")
        if not given or key not in choices:
            raise SweepError(
                f"--where {condition}: must be key=value; the runs have {_near(key, choices)}"
            )
        wanted.append((key, value))
    for key in group_by:
        if key not in known:
            raise SweepError(f"--group-by {key}: no run has it; they have {_near(key, known)}")
    chosen = [run for run in runs if all(_matches(run, metric, *pair) for pair in wanted)]
    if not chosen:
        raise SweepError(f"--where {' '.join(where)}: no run is left of {len(runs)}")

    finished = [run for run in chosen if run.state == "finished"]
    names = sorted({name for run in finished for name in run.metrics})
    if finished and metric not in names:
        how = f"scripts/evaluate.py run=DIR gives a run its {metric}; " if _of_card(metric) else ""
        raise SweepError(f"--metric {metric}: no run has it; {how}they have {_near(metric, names)}")
    left_out = [run for run in chosen if run.state != "finished"]
    groups: dict[Key, list[Run]] = {}
    seen: dict[Key, Path] = {}
    for run in finished:
        basis = tuple(_basis(run, metric).items())
        whole = (basis, run.seed, *(_at(run, key) for key in known))
        if metric not in run.metrics:
            left_out.append(Run(run.path, "left out", f"has no {metric}"))
        elif whole in seen:  # the same bits again, no second opinion
            left_out.append(Run(run.path, "duplicate", f"same settings and seed as {seen[whole]}"))
        else:
            seen[whole] = run.path
            groups.setdefault(basis, []).append(run)
    members = sorted(groups.values(), key=len, reverse=True) or [[]]
    direction = higher_is_better if higher_is_better is not None else direction_of(metric)
    summaries = [
        Summary(
            metric,
            keys := list(group_by) or [k for k in known if len({_at(run, k) for run in group}) > 1],
            _rows(group, metric, keys, direction),
            [],
            direction,
            conditions,
            _differences(members, metric),
        )
        for group, conditions in zip(members, _tell_apart(members, metric), strict=True)
    ]
    summaries[-1].left_out = left_out
    return summaries


def _rows(runs: list[Run], metric: str, keys: list[str], direction: bool | None) -> list[Row]:
    """One per setting: best first, or by the settings where no end is better."""
    settings: dict[Key, list[Run]] = {}
    for run in runs:
        settings.setdefault(tuple(_at(run, key) for key in keys), []).append(run)
    rows = []
    for values, members in settings.items():
        found = [run.metrics[metric] for run in members]
        sd = statistics.stdev(found) if len(found) > 1 else math.nan
        rows.append(Row(values, members, statistics.fmean(found), sd))
    if direction is None:
        return sorted(rows, key=lambda row: _order(row.values))
    return sorted(rows, key=lambda row: row.mean, reverse=direction)


def _protocol(card: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """How a figure of the evaluation card was measured."""
    protocol = {
        "data_sha256.test": card.get("data", {}).get("sha256"),
        "eval.num_samples": entry.get("num_samples"),
        "eval.num_images": entry.get("num_images"),
        "eval.seed": entry.get("seed"),
        "eval.checkpoint": card.get("checkpoint", {}).get("name"),
    }
    return {key: None if value is None else str(value)[:12] for key, value in protocol.items()}


def _basis(run: Run, metric: str) -> dict[str, Any]:
    """What a figure depends on besides the model: runs are compared where all of it is equal."""
    basis = dict(run.protocols.get(metric, {}))
    split = "train" if metric == "train_elbo" else metric.partition("/")[0]
    if split in ("train", "test"):
        basis.pop("data_sha256.test", None)
        basis[f"data_sha256.{split}"] = run.data_sha256.get(split, "")[:12] or None
    if None in (basis.get("data_sha256.test", ""), basis.get("data_sha256.train", "")):
        defaults = {"data.binarize": "none", "data.hold_out": 0}
        basis |= {key: run.settings.get(key) or defaults.get(key) for key in _DATA}
    if split == "train":  # the hash is of the grey images where they are binarised dynamically
        basis.setdefault("data.binarize", run.settings.get("data.binarize"))
    if _last(metric) in _DENSITIES:
        basis["likelihood"] = run.settings.get("likelihood")
    if _last(metric) == "loss":
        basis |= {key: run.settings.get(key) for key in _OBJECTIVE}
    return basis


def _tell_apart(groups: list[list[Run]], metric: str) -> list[list[str]]:
    """For each group the conditions that choose it: `data.limit_test=500`, ..."""
    if len(groups) < 2:
        return [[] for _ in groups]
    bases = [_basis(group[0], metric) for group in groups]
    known = dict.fromkeys((*_DATA, *(key for basis in bases for key in basis)))
    hashes = [key for key in known if key.startswith("data_sha256")]
    keys = [key for key in known if key not in hashes]
    values = {
        key: [
            {basis[key]} if key in basis else {_at(run, key) for run in group}
            for basis, group in zip(bases, groups, strict=True)
        ]
        for key in keys
    }
    differing = [key for key in keys if any(has != values[key][0] for has in values[key])]
    found = []
    for i, basis in enumerate(bases):
        own = [key for key in differing if len(values[key][i]) == 1]
        where = [f"{key}={_text(*values[key][i])}" for key in own]
        alike = (
            all(values[key][i] <= values[key][j] for key in own)
            for j in range(len(groups))
            if j != i
        )
        if any(basis.get(key) is None for key in hashes) or any(alike):
            where += [f"{key}={_text(basis.get(key))}" for key in hashes]
        found.append(where)
    return found


def _differences(groups: list[list[Run]], metric: str) -> list[str]:
    """In what the groups were measured differently, in words."""
    bases = [_basis(group[0], metric) for group in groups if group]
    keys = dict.fromkeys(key for basis in bases for key in basis)
    differing = [key for key in keys if len({basis.get(key, ...) for basis in bases}) > 1]
    return list(dict.fromkeys(_MEASURED[key] for key in differing))


def why_apart(summaries: Sequence[Summary]) -> str:
    """One sentence on several summaries: why they are several, and how to choose one."""
    unknown = any(w.startswith("data_sha256") and w.endswith("null") for w in summaries[-1].where)
    return (
        f"{len(summaries)} groups of runs cannot be compared, since they have different "
        f"{', '.join(summaries[0].differ)}; choose one with --where, for example --where "
        f"{' '.join(summaries[0].where)}" + (" (null: not recorded)" if unknown else "")
    )


def direction_of(metric: str) -> bool | None:
    """Whether a figure is better the higher it is; None where neither is, or it is not known."""
    return _FIGURES.get(_last(metric), ("", None))[1]


def higher_is_better(metric: str) -> bool:
    """Whether a figure is known to be better the higher it is: `elbo`, `log_px`, accuracies."""
    return direction_of(metric) is True


def _last(metric: str) -> str:
    return metric.rpartition("/")[2]


def _of_card(metric: str) -> bool:
    """Whether scripts/evaluate.py gives a run this figure."""
    return "/" not in metric and metric in _FIGURES and metric != "seconds"


def to_csv(summary: Summary, *others: Summary) -> str:
    """One line per setting; of several summaries, with the runs' conditions in a first column."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = [*summary.keys, *(key for other in others for key in other.keys)]
    keys = list(dict.fromkeys(columns))
    group = ["runs"] if others else []
    writer.writerow([*group, *keys, summary.metric, "sd", "n", "seeds", "seconds"])
    for each in (summary, *others):
        for row in each.rows:
            seeds = " ".join(str(run.seed) for run in row.runs)
            seconds = statistics.fmean(run.metrics["seconds"] for run in row.runs)
            sd = "" if math.isnan(row.sd) else row.sd
            settings = [_text(_at(row.runs[0], key)) for key in keys]
            settings = [_text(v) for v in row.values] if not others else settings
            whose = [" ".join(each.where)] if others else []
            writer.writerow([*whose, *settings, row.mean, sd, len(row.runs), seeds, seconds])
    return file.getvalue()


def to_markdown(summary: Summary, root: Path) -> str:
    """The table, what it says, and what is not in it."""
    seconds = [statistics.fmean(run.metrics["seconds"] for run in row.runs) for row in summary.rows]
    unit, size = ("minutes", 60) if min(seconds, default=60) >= 60 else ("seconds", 1)
    count = sum(len(row.runs) for row in summary.rows)
    title = [f"## {' '.join(summary.where)} ({count} run{'s' if count > 1 else ''})", ""]
    lines = [
        *(title if summary.where else []),
        "| " + " | ".join([*summary.keys, f"{summary.heading()}: mean ± sd", "n", unit]) + " |",
        "|" + "---|" * (len(summary.keys) + 3),
    ]
    digits = summary.digits
    for row, took in zip(summary.rows, seconds, strict=True):
        spread = "" if math.isnan(row.sd) else f" ± {row.sd:.{digits}f}"
        cells = (f"{row.mean:.{digits}f}{spread}", str(len(row.runs)), f"{took / size:.1f}")
        lines.append("| " + " | ".join([*(_text(v) for v in row.values), *cells]) + " |")
    lines += ["", summary.verdict()]
    if summary.where and len(summary.rows) == 1:  # no column says which
        places = [f"`{_place(run, root)}`" for run in summary.rows[0].runs]
        lines[-1] += f" Of {', '.join(places)}."
    if summary.held_out:
        lines += ["", "Held-out images: the last data.hold_out training images, not the test set."]
    if summary.left_out:
        lines += ["", f"Not in the table ({len(summary.left_out)}):", ""]
        for run in summary.left_out:
            lines.append(f"- `{_place(run, root)}`: {run.state}, {run.reason}")
        if any(run.state == "left out" for run in summary.left_out) and _of_card(summary.metric):
            lines += ["", f"`scripts/evaluate.py run=DIR` gives a run its {summary.metric}."]
    return "\n".join(lines) + "\n"


def _place(run: Run, root: Path) -> str:
    return str(run.path.relative_to(root)) if run.path != root else run.path.name


def plots(summary: Summary) -> "dict[str, Figure]":
    """The pictures that the summary allows, by file name."""
    pictures: dict[str, Figure] = {}
    if not summary.rows:
        return pictures
    for i, key in enumerate(summary.keys):
        pictures[f"{summary.metric} by {key}".replace("/", "_").replace(" ", "_")] = _by_key(
            summary, i
        )
    if len(summary.keys) == 2:
        pictures["heat_map"] = _heat_map(summary)
    runs = [run for row in summary.rows for run in row.runs]
    tests = {tuple(_basis(run, "test/elbo").items()) for run in runs}
    if len(tests) == 1 and all(
        {"test/kl", "test/reconstruction"} <= run.metrics.keys() for run in runs
    ):
        pictures["rate_distortion"] = _rate_distortion(summary)
    if any(summary.metric in epoch for run in runs for epoch in run.epochs):
        pictures["learning_curves"] = _learning_curves(summary)
    return pictures


def _by_key(summary: Summary, i: int) -> "Figure":
    """The metric against one swept key: a line per setting of the others."""
    figure, axes = _axes()
    lines: dict[Key, list[Row]] = {}
    for row in summary.rows:
        lines.setdefault((*row.values[:i], *row.values[i + 1 :]), []).append(row)
    others = [*summary.keys[:i], *summary.keys[i + 1 :]]
    numeric = all(_is_number(row.values[i]) for row in summary.rows)
    places = sorted({row.values[i] for row in summary.rows}, key=_order)
    for n, (other, rows) in enumerate(sorted(lines.items(), key=lambda item: _order(item[0]))):
        rows = sorted(rows, key=lambda row: _order(row.values[i]))
        at = [row.values[i] if numeric else places.index(row.values[i]) for row in rows]
        label = _label(others, other)
        error = [0 if math.isnan(row.sd) else row.sd for row in rows]
        axes.errorbar(
            at, [row.mean for row in rows], error, marker="o", capsize=3, label=label,
            color=DIGIT_COLOURS[n % len(DIGIT_COLOURS)],
        )  # fmt: skip
    if not numeric:
        axes.set_xticks(range(len(places)), [_text(p) for p in places], rotation=20, ha="right")
    else:
        if min(places) > 0 and max(places) >= 4 * min(places):
            axes.set_xscale("log")
        if len(places) <= 8:
            axes.set_xticks(places, [_text(place) for place in places])
            axes.minorticks_off()
    axes.set(xlabel=summary.keys[i], ylabel=f"{_two_lines(summary)}; mean ± sd over seeds")
    if others and len(lines) <= len(DIGIT_COLOURS):
        _legend(figure)
    return figure


def _heat_map(summary: Summary) -> "Figure":
    """The metric over two swept keys."""
    figure, axes = _axes()
    down, across = (sorted({row.values[i] for row in summary.rows}, key=_order) for i in (0, 1))
    table = [[math.nan] * len(across) for _ in down]
    for row in summary.rows:
        table[down.index(row.values[0])][across.index(row.values[1])] = row.mean
    lower = summary.higher_is_better is False
    image = axes.imshow(table, cmap="cividis_r" if lower else "cividis", aspect="auto")
    middle = (image.norm.vmin + image.norm.vmax) / 2
    for i, line in enumerate(table):
        for j, value in enumerate(line):
            if len(across) > 10 or math.isnan(value):  # no room, or no run
                continue
            colour = "white" if (value < middle) != lower else "black"
            text = f"{value:.{summary.digits}f}"
            axes.text(j, i, text, ha="center", va="center", color=colour)
    for axis, values in ((axes.xaxis, across), (axes.yaxis, down)):
        shown = range(0, len(values), math.ceil(len(values) / 16))
        axis.set_ticks(shown, [_text(values[k]) for k in shown])
    axes.set(xlabel=summary.keys[1], ylabel=summary.keys[0])
    figure.colorbar(image, label=_two_lines(summary))
    return figure


def _rate_distortion(summary: Summary) -> "Figure":
    """KL against reconstruction, one point per run; on a dashed line the elbo is the same.

    Alemi et al., *Fixing a Broken ELBO* (2018), section 2.
    """
    figure, axes = _axes()
    for row, colour, label in _coloured(summary):
        kl = [run.metrics["test/kl"] for run in row.runs]
        distortion = [-run.metrics["test/reconstruction"] for run in row.runs]
        axes.scatter(kl, distortion, s=30, color=colour, label=label, zorder=3)
    axes.margins(0.15)
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    bottom, top = left + low, right + high
    least = max(top - bottom, 1e-9) / 8  # nats between two lines: 1, 2 or 5 times a power of ten
    power = 10.0 ** math.floor(math.log10(least))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= least)
    for nats in [step * k for k in range(math.ceil(bottom / step), math.floor(top / step) + 1)]:
        axes.plot([left, right], [nats - left, nats - right], "--", color="#999999", lw=0.8)
        start, at = max(left, nats - high), min(right, nats - low)  # where it enters and leaves
        if at - start > (right - left) / 5:
            axes.annotate(
                f"elbo {-nats:g}", (at, nats - at), fontsize=8, color="#555555",
                ha="right", va="center" if at == right else "bottom",
                bbox={"fc": "white", "ec": "none", "pad": 0.5},
            )  # fmt: skip
    axes.set(xlim=(left, right), ylim=(low, high))
    axes.set(
        xlabel="rate: KL, nats per image", ylabel="distortion: -reconstruction, nats per image"
    )
    _tell_rows(figure, summary)
    return figure


def _learning_curves(summary: Summary) -> "Figure":
    """The metric by epoch, one line per run."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes()
    longest = max(len(run.epochs) for row in summary.rows for run in row.runs)
    skipped = 2 if longest > 5 else 0  # they would press all that matters into a line
    for row, colour, label in _coloured(summary):
        for i, run in enumerate(row.runs):
            points = [(e["epoch"], e[summary.metric]) for e in run.epochs if summary.metric in e]
            points = points[skipped:] or points
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, lw=1, label="" if i else label)
                if len(points) == 1:
                    axes.plot(*points[0], marker="o", ms=4, color=colour)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    without = f" (without the first {skipped})" if skipped else ""
    axes.set(xlabel=f"epoch{without}", ylabel=_two_lines(summary))
    _tell_rows(figure, summary)
    return figure


def _coloured(summary: Summary) -> Iterator[tuple[Row, Any, str]]:
    """Rows with a colour each: best first."""
    from matplotlib import colormaps

    for i, row in enumerate(summary.rows):
        few = len(summary.rows) <= len(DIGIT_COLOURS)
        colour = DIGIT_COLOURS[i] if few else colormaps["viridis"](i / len(summary.rows))
        yield row, colour, _label(summary.keys, row.values) or _ONE


def _label(keys: Sequence[str], values: Key) -> str:
    """`latent_dim=8, prior=vamp`: short, beside a picture."""
    short = [key.rpartition(".")[2] for key in keys]
    names = short if len(set(short)) == len(short) else keys
    return ", ".join(f"{k}={_text(v)}" for k, v in zip(names, values, strict=True))


def _tell_rows(figure: "Figure", summary: Summary) -> None:
    """What the colours of `_coloured` mean."""
    if len(summary.rows) <= len(DIGIT_COLOURS):
        by_value = sorted(summary.rows, key=lambda row: _order(row.values))
        _legend(figure, [_label(summary.keys, row.values) or _ONE for row in by_value])
    else:
        ends = ("first", "last") if summary.higher_is_better is None else ("best", "worst")
        title = f"dark: {ends[0]} settings of the table, light: {ends[1]}"
        figure.axes[0].set_title(title, fontsize=10)


def _legend(figure: "Figure", order: Sequence[str] = ()) -> None:
    """Beside the axes, where it hides nothing; labels in this order."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True))
    shown = [label for label in order or labels if label in found]
    figure.legend(
        [found[label] for label in shown], shown,
        loc="outside right upper", fontsize=8, frameon=False,
    )  # fmt: skip


def _two_lines(summary: Summary) -> str:
    """The metric with its unit, and its direction in a second line: for an axis."""
    return summary.heading().replace(" (", "\n(")


def _axes() -> "tuple[Figure, Any]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _near(word: str, known: Sequence[str]) -> str:
    """Those that may have been meant, or all of them."""
    return ", ".join(get_close_matches(word, known) or known)


def _matches(run: Run, metric: str, key: str, value: str) -> bool:
    basis = _basis(run, metric)
    have = run.seed if key == "seed" else basis[key] if key in basis else _at(run, key)
    if _is_number(have):
        try:
            return bool(float(value) == have)
        except ValueError:
            return False
    return value in (_text(have), "none" if have is None else str(have))


def _at(run: Run, key: str) -> Any:
    value = run.settings.get(key)
    return tuple(value) if isinstance(value, list) else value


def _text(value: Any) -> str:
    """A value as Hydra's command line takes it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return f"[{','.join(map(_text, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _order(value: Any) -> Any:
    """Numbers by size, then words; None first."""
    if isinstance(value, tuple):
        return tuple(_order(part) for part in value)
    return (0, value, "") if _is_number(value) else (1, 0, _text(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def _yaml(path: Path) -> Any:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where it is there
    return yaml.load(path.read_text("utf-8"), loader) if path.exists() else None
