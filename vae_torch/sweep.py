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
from vae_torch.runlog import RecordError, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# in a run's folder
LOCK = ".lock"  # held by the process that writes it
FAILED = "failed.json"  # why a sweep's job failed
PRUNED = "pruned.json"  # why it was stopped early, and its figure until then

_NO_SETTINGS = ("seed", *INCIDENTAL)  # settings are averaged over the seed
_LOWER_IS_BETTER = ("loss", "kl", "seconds", "gap")

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

    def verdict(self) -> str:
        """Whether the best setting's lead is larger than the noise between seeds."""
        if not self.rows:
            return "No run is finished."
        if len(self.rows) < 2:
            return "There is one setting; nothing to compare."
        first, second = self.rows[:2]
        lead = abs(first.mean - second.mean)
        name = self.words(first)
        if len(first.runs) < 2 or len(second.runs) < 2:
            return (
                f"{name} leads by {lead:.3g}. With one seed each nobody knows how much of it is "
                "luck: add seed=0,1,2."
            )
        error = math.sqrt(sum(row.sd**2 / len(row.runs) for row in (first, second)))
        sure = lead > 2 * error
        return (
            f"{name} leads by {lead:.3g} ± {error:.2g} (standard error of the difference of means "
            f"over {len(first.runs)} and {len(second.runs)} seeds): "
            + ("more than" if sure else "not more than")
            + " twice its error, "
            + ("no seed noise." if sure else "so the two cannot be told apart.")
        )

    def words(self, row: Row) -> str:
        """`model.latent_dim=8, seed...` of a row."""
        pairs = zip(self.keys, row.values, strict=True)
        return ", ".join(f"{key}={_text(value)}" for key, value in pairs) or "the one setting"


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
        is_run = ".hydra" in folders or {"metrics.jsonl", "summary.json"} & set(files)
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
        stored = summary["config"] if summary else _yaml(path / ".hydra" / "config.yaml")
        if stored is None:
            return Run(path, "broken", "has neither summary.json nor .hydra/config.yaml")
        flat = flatten(stored)
        run.seed = int(flat.get("seed", 0))
        run.settings = {k: v for k, v in flat.items() if k not in _NO_SETTINGS}
        run.epochs = read_metrics(path)
        failed, pruned = _json(path / FAILED), _json(path / PRUNED)
        if summary and not failed:  # with both, a later attempt found the run damaged
            run.state = "finished"
            run.metrics = {k: v for k, v in summary["final"].items() if _is_number(v)}
            run.metrics["seconds"] = summary["seconds"]
            card = _json(path / "evaluation.json") or {}
            for name, entry in card.items():
                if isinstance(entry, dict) and _is_number(entry.get("value")):
                    run.metrics[name] = entry["value"]
            if bad := [k for k, v in summary["final"].items() if v != v]:
                run.state, run.reason = "failed", f"{bad[0]} is NaN"
            return run
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, RecordError) as error:
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
) -> Summary:
    """Fold the finished runs of each setting over their seeds.

    Args:
        runs: From `read_runs`.
        metric: A name of summary.json's `final`, or of a figure of evaluation.json.
        group_by: The settings to tell apart; all that differ between the runs when empty.
        where: `key=value` each: only these runs.

    Raises:
        SweepError: A condition without `=`, a key or a metric that no run has, or nothing left.
    """
    known = sorted({key for run in runs for key in run.settings})
    wanted = []
    for condition in where:
        key, given, value = condition.partition("=")
        if not given or key not in (*known, "seed"):
            raise SweepError(
                f"--where {condition}: must be key=value; the runs have "
                + _near(key, ["seed", *known])
            )
        wanted.append((key, value))
    for key in group_by:
        if key not in known:
            raise SweepError(f"--group-by {key}: no run has it; they have {_near(key, known)}")
    chosen = [run for run in runs if all(_matches(run, *pair) for pair in wanted)]
    if not chosen:
        raise SweepError(f"--where {' '.join(where)}: no run is left of {len(runs)}")

    finished = [run for run in chosen if run.state == "finished"]
    names = sorted({name for run in finished for name in run.metrics})
    if finished and metric not in names:
        raise SweepError(f"--metric {metric}: no run has it; they have {_near(metric, names)}")
    left_out = [run for run in chosen if run.state != "finished"]
    keys = list(group_by) or [k for k in known if len({_at(run, k) for run in finished}) > 1]

    groups: dict[Key, list[Run]] = {}
    seen: dict[Key, Path] = {}
    for run in finished:
        whole = (run.seed, *(_at(run, key) for key in known))
        if metric not in run.metrics:
            left_out.append(Run(run.path, "left out", f"has no {metric}"))
        elif whole in seen:  # the same bits again, no second opinion
            left_out.append(Run(run.path, "duplicate", f"same settings and seed as {seen[whole]}"))
        else:
            seen[whole] = run.path
            groups.setdefault(tuple(_at(run, key) for key in keys), []).append(run)
    rows = []
    for values, members in groups.items():
        found = [run.metrics[metric] for run in members]
        sd = statistics.stdev(found) if len(found) > 1 else math.nan
        rows.append(Row(values, members, statistics.fmean(found), sd))
    rows.sort(key=lambda row: row.mean, reverse=higher_is_better(metric))
    return Summary(metric, keys, rows, left_out)


def higher_is_better(metric: str) -> bool:
    """Which way a figure points: `elbo` and `log_px` up, `loss` and `kl` down."""
    return not metric.rsplit("/")[-1].endswith(_LOWER_IS_BETTER)


def to_csv(summary: Summary) -> str:
    """One line per setting."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*summary.keys, summary.metric, "sd", "n", "seeds", "seconds"])
    for row in summary.rows:
        seeds = " ".join(str(run.seed) for run in row.runs)
        seconds = statistics.fmean(run.metrics["seconds"] for run in row.runs)
        figures = (row.mean, "" if math.isnan(row.sd) else row.sd, len(row.runs), seeds, seconds)
        writer.writerow([*(_text(v) for v in row.values), *figures])
    return file.getvalue()


def to_markdown(summary: Summary, root: Path) -> str:
    """The table, what it says, and what is not in it."""
    lines = [
        "| " + " | ".join([*summary.keys, f"{summary.metric}: mean ± sd", "n", "minutes"]) + " |",
        "|" + "---|" * (len(summary.keys) + 3),
    ]
    for row in summary.rows:
        spread = "" if math.isnan(row.sd) else f" ± {row.sd:.2f}"
        minutes = statistics.fmean(run.metrics["seconds"] for run in row.runs) / 60
        cells = (f"{row.mean:.2f}{spread}", str(len(row.runs)), f"{minutes:.1f}")
        lines.append("| " + " | ".join([*(_text(v) for v in row.values), *cells]) + " |")
    lines += ["", summary.verdict()]
    if summary.left_out:
        lines += ["", f"Not in the table ({len(summary.left_out)}):", ""]
        for run in summary.left_out:
            place = run.path.relative_to(root) if run.path != root else run.path.name
            lines.append(f"- `{place}`: {run.state}, {run.reason}")
    return "\n".join(lines) + "\n"


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
    if all({"test/kl", "test/reconstruction"} <= run.metrics.keys() for run in runs):
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
    axes.set(xlabel=summary.keys[i], ylabel=f"{summary.metric}, mean ± sd over seeds")
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
    cmap = "cividis" if higher_is_better(summary.metric) else "cividis_r"
    image = axes.imshow(table, cmap=cmap, aspect="auto")
    middle = (image.norm.vmin + image.norm.vmax) / 2
    for i, line in enumerate(table):
        for j, value in enumerate(line):
            if len(across) > 10 or math.isnan(value):  # no room, or no run
                continue
            dark = (value < middle) == higher_is_better(summary.metric)
            colour = "white" if dark else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour)
    for axis, values in ((axes.xaxis, across), (axes.yaxis, down)):
        shown = range(0, len(values), math.ceil(len(values) / 16))
        axis.set_ticks(shown, [_text(values[k]) for k in shown])
    axes.set(xlabel=summary.keys[1], ylabel=summary.keys[0])
    figure.colorbar(image, label=summary.metric)
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
                ha="right", va="center", bbox={"fc": "white", "ec": "none", "pad": 0.5},
            )  # fmt: skip
    axes.set(xlim=(left, right), ylim=(low, high))
    axes.set(xlabel="rate: KL, nats per image", ylabel="distortion: -reconstruction, nats")
    _tell_rows(figure, summary)
    return figure


def _learning_curves(summary: Summary) -> "Figure":
    """The metric by epoch, one line per run."""
    figure, axes = _axes()
    for row, colour, label in _coloured(summary):
        for i, run in enumerate(row.runs):
            points = [(e["epoch"], e[summary.metric]) for e in run.epochs if summary.metric in e]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, lw=1, label="" if i else label)
    axes.set(xlabel="epoch", ylabel=summary.metric)
    # the first epochs would press all that matters into a line
    late = [e[summary.metric] for row in summary.rows for r in row.runs for e in r.epochs[2:]]
    if late:
        room = 0.05 * (max(late) - min(late)) or 1
        axes.set_ylim(min(late) - room, max(late) + room)
    _tell_rows(figure, summary)
    return figure


def _coloured(summary: Summary) -> Iterator[tuple[Row, Any, str]]:
    """Rows with a colour each: best first."""
    from matplotlib import colormaps

    for i, row in enumerate(summary.rows):
        few = len(summary.rows) <= len(DIGIT_COLOURS)
        colour = DIGIT_COLOURS[i] if few else colormaps["viridis"](i / len(summary.rows))
        yield row, colour, _label(summary.keys, row.values) or "the one setting"


def _label(keys: Sequence[str], values: Key) -> str:
    """`latent_dim=8, prior=vamp`: short, beside a picture."""
    short = [key.rpartition(".")[2] for key in keys]
    names = short if len(set(short)) == len(short) else keys
    return ", ".join(f"{k}={_text(v)}" for k, v in zip(names, values, strict=True))


def _tell_rows(figure: "Figure", summary: Summary) -> None:
    """What the colours of `_coloured` mean."""
    if len(summary.rows) <= len(DIGIT_COLOURS):
        _legend(figure)
    else:
        figure.axes[0].set_title("dark: best settings, light: worst", fontsize=10)


def _legend(figure: "Figure") -> None:
    """Beside the axes, where it hides nothing."""
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)


def _axes() -> "tuple[Figure, Any]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _near(word: str, known: Sequence[str]) -> str:
    """Those that may have been meant, or all of them."""
    return ", ".join(get_close_matches(word, known) or known)


def _matches(run: Run, key: str, value: str) -> bool:
    have = run.seed if key == "seed" else _at(run, key)
    if _is_number(have):
        try:
            return bool(float(value) == have)
        except ValueError:
            return False
    return _text(have) == value


def _at(run: Run, key: str) -> Any:
    value = run.settings.get(key)
    return tuple(value) if isinstance(value, list) else value


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


def _order(value: Any) -> Any:
    """Numbers by size, then words; None first."""
    if isinstance(value, tuple):
        return tuple(_order(part) for part in value)
    return (0, value, "") if _is_number(value) else (1, 0, _text(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _yaml(path: Path) -> Any:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where it is there
    return yaml.load(path.read_text(), loader) if path.exists() else None
