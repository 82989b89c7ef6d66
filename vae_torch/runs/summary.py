"""Averages runs over their seeds: which setting is best, and by how much."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from vae_torch.runs.folders import Run, SweepError
from vae_torch.runs.metrics import (
    DATA,
    MEASURED,
    basis_of,
    direction_of,
    last_part,
    of_card,
    unit_of,
)
from vae_torch.runs.values import Key, as_text, is_number, sort_key

ONE_SETTING = "the one setting"
_SIGNIFICANT = 0.05  # p-value below which a lead is called unlikely to be noise


@dataclass
class Row:
    """One setting, with its runs over the seeds."""

    values: Key  # of the table's keys
    runs: list[Run]
    mean: float
    sd: float  # between seeds; NaN for one


@dataclass
class Summary:
    """A table of settings, best first, and the runs left out of it."""

    metric: str
    keys: list[str]
    rows: list[Row]
    left_out: list[Run]
    higher_is_better: bool | None = None  # None: rows are sorted by their settings
    where: list[str] = field(default_factory=list)  # key=value: what selects these runs
    differ: list[str] = field(default_factory=list)  # how other groups were measured differently

    @property
    def unit(self) -> str:
        """The metric's unit; empty if unknown, or not the same for all runs."""
        losses = {run.settings.get("objective.name") for row in self.rows for run in row.runs}
        if last_part(self.metric) == "loss" and "keras" in losses:  # a mean over pixels
            return ""
        return unit_of(self.metric)

    @property
    def held_out(self) -> bool:
        """Whether the metric is of held-out training images instead of the test set."""
        runs = [run for row in self.rows for run in row.runs]
        of_test = self.metric.startswith("test/") or any(self.metric in r.protocols for r in runs)
        return of_test and bool(runs) and all(run.settings.get("data.hold_out") for run in runs)

    @property
    def digits(self) -> int:
        """Decimals that show two digits of the smallest standard error of a row's mean.

        Without errors: four digits of the largest mean, and at least two decimals.
        """
        errors = [row.sd / math.sqrt(len(row.runs)) for row in self.rows if row.sd > 0]
        if errors:
            return min(max(0, 1 - math.floor(math.log10(min(errors)))), 8)
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
        chosen = "held-out images" if self.held_out else "the test set"
        optimistic = (
            f" It is the best of {len(self.rows)} settings on {chosen}, so its own figure is "
            "optimistic."
            if len(self.rows) > 2
            else ""
        )
        if len(first.runs) < 2 or len(second.runs) < 2:
            return (
                f"{name} leads by {lead:.3g}{unit}. With one seed each, nobody knows how much of "
                f"it is chance: add seed=0,1,2.{optimistic}"
            )
        error, p = welch(first, second)
        sure = p < _SIGNIFICANT
        return (
            f"{name} leads by {lead:.3g} ± {error:.2g}{unit} (standard error of the difference of "
            f"means over {len(first.runs)} and {len(second.runs)} seeds; Welch's t-test: p = "
            f"{p:.2g}): "
            + ("unlikely to be seed noise." if sure else "the two cannot be told apart.")
            + optimistic
        )

    def words(self, row: Row) -> str:
        """`model.latent_dim=8, seed...` of a row."""
        pairs = zip(self.keys, row.values, strict=True)
        return ", ".join(f"{key}={as_text(value)}" for key, value in pairs) or ONE_SETTING


def welch(first: Row, second: Row) -> tuple[float, float]:
    """Standard error of the difference of two settings' means, and its two-sided p-value.

    Welch's t-test, which does not assume equal variances.

    Raises:
        ValueError: A setting has only one run.
    """
    if min(len(first.runs), len(second.runs)) < 2:
        raise ValueError("Welch's t-test needs two or more runs of each setting")
    from scipy.special import stdtr

    parts = [(row.sd**2 / len(row.runs), len(row.runs) - 1) for row in (first, second)]
    variance = sum(part for part, _ in parts)
    lead = abs(first.mean - second.mean)
    if variance == 0:
        return 0.0, 1.0 if lead == 0 else 0.0
    freedom = variance**2 / sum(part**2 / n for part, n in parts)
    return math.sqrt(variance), 2 * float(stdtr(freedom, -lead / math.sqrt(variance)))


def summarize(
    runs: Sequence[Run],
    *,
    metric: str = "test/elbo",
    group_by: Sequence[str] = (),
    where: Sequence[str] = (),
    higher_is_better: bool | None = None,
) -> Summary:
    """Average the finished runs of each setting over their seeds.

    Args:
        runs: From `read_runs`.
        metric: An entry of `final` in summary.json, or a figure of evaluation.json.
        group_by: The settings to compare; if empty, all that differ between the runs.
        where: Conditions `key=value` that select runs.
        higher_is_better: Direction of the metric; None: what is known about its name.

    Raises:
        SweepError: A condition without `=`, a key or metric that no run has, or no run left; or
            runs that cannot be compared, because the metric was measured on other images or in
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
    """`summarize` for groups of runs that can be compared, largest group first.

    Runs can be compared if the metric is of the same images, by their SHA-256 in summary.json (or
    by the data settings, without one), and the likelihood is the same. A loss also needs the same
    objective; a figure of evaluation.json the same samples, seed and checkpoint.

    Arguments and errors are those of `summarize`. Runs left out are in the last summary.
    """
    known = sorted({key for run in runs for key in run.settings})
    chosen = _chosen(runs, metric, where, group_by)
    groups, left_out = _comparable(chosen, metric, known)
    groups = groups or [[]]
    direction = higher_is_better if higher_is_better is not None else direction_of(metric)
    recorded = {run.better.get(metric) for group in groups for run in group}
    if direction is None and len(recorded) == 1:  # a metric of a plug-in that is not loaded
        direction = {"higher": True, "lower": False}.get(str(*recorded))
    summaries = [
        Summary(
            metric,
            keys := list(group_by) or [k for k in known if len({run.at(k) for run in group}) > 1],
            _rows(group, metric, keys, direction),
            [],
            direction,
            conditions,
            _differences(groups, metric),
        )
        for group, conditions in zip(groups, _tell_apart(groups, metric), strict=True)
    ]
    summaries[-1].left_out = left_out
    return summaries


def _chosen(
    runs: Sequence[Run], metric: str, where: Sequence[str], group_by: Sequence[str]
) -> list[Run]:
    """The runs that meet all conditions.

    Raises:
        SweepError: As in `summarize`.
    """
    known = sorted({key for run in runs for key in run.settings})
    choices = sorted({"seed", *known, *(key for run in runs for key in basis_of(run, metric))})
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
    return chosen


def _comparable(
    runs: Sequence[Run], metric: str, known: Sequence[str]
) -> tuple[list[list[Run]], list[Run]]:
    """Groups of finished runs that can be compared, and the runs left out.

    Raises:
        SweepError: No finished run has the metric.
    """
    finished = [run for run in runs if run.state == "finished"]
    names = sorted({name for run in finished for name in run.metrics})
    if finished and metric not in names:
        how = f"scripts/evaluate.py run=DIR gives a run its {metric}; " if of_card(metric) else ""
        raise SweepError(f"--metric {metric}: no run has it; {how}they have {_near(metric, names)}")
    left_out = [run for run in runs if run.state != "finished"]
    groups: dict[Key, list[Run]] = {}
    seen: dict[Key, Path] = {}
    for run in finished:
        basis = tuple(basis_of(run, metric).items())
        whole = (basis, run.seed, *(run.at(key) for key in known))
        if metric not in run.metrics:
            left_out.append(Run(run.path, "left out", f"has no {metric}"))
        elif whole in seen:  # the same bits again are not a second sample
            left_out.append(Run(run.path, "duplicate", f"same settings and seed as {seen[whole]}"))
        else:
            seen[whole] = run.path
            groups.setdefault(basis, []).append(run)
    return sorted(groups.values(), key=len, reverse=True), left_out


def _rows(runs: list[Run], metric: str, keys: list[str], direction: bool | None) -> list[Row]:
    """One row per setting: best first, or by setting if no direction is better."""
    settings: dict[Key, list[Run]] = {}
    for run in runs:
        settings.setdefault(tuple(run.at(key) for key in keys), []).append(run)
    rows = []
    for values, members in settings.items():
        found = [run.metrics[metric] for run in members]
        sd = statistics.stdev(found) if len(found) > 1 else math.nan
        rows.append(Row(values, members, statistics.fmean(found), sd))
    if direction is None:
        return sorted(rows, key=lambda row: sort_key(row.values))
    return sorted(rows, key=lambda row: row.mean, reverse=direction)


def _tell_apart(groups: list[list[Run]], metric: str) -> list[list[str]]:
    """The conditions that select each group: `data.limit_test=500`, ..."""
    if len(groups) < 2:
        return [[] for _ in groups]
    bases = [basis_of(group[0], metric) for group in groups]
    known = dict.fromkeys((*DATA, *(key for basis in bases for key in basis)))
    hashes = [key for key in known if key.startswith("data_sha256")]
    keys = [key for key in known if key not in hashes]
    values = {
        key: [
            {basis[key]} if key in basis else {run.at(key) for run in group}
            for basis, group in zip(bases, groups, strict=True)
        ]
        for key in keys
    }
    differing = [key for key in keys if any(has != values[key][0] for has in values[key])]
    found = []
    for i, basis in enumerate(bases):
        own = [key for key in differing if len(values[key][i]) == 1]
        where = [f"{key}={as_text(*values[key][i])}" for key in own]
        alike = (
            all(values[key][i] <= values[key][j] for key in own)
            for j in range(len(groups))
            if j != i
        )
        if any(basis.get(key) is None for key in hashes) or any(alike):
            where += [f"{key}={as_text(basis.get(key))}" for key in hashes]
        found.append(where)
    return found


def _differences(groups: list[list[Run]], metric: str) -> list[str]:
    """How the groups were measured differently, in words."""
    bases = [basis_of(group[0], metric) for group in groups if group]
    keys = dict.fromkeys(key for basis in bases for key in basis)
    differing = [key for key in keys if len({basis.get(key, ...) for basis in bases}) > 1]
    return list(dict.fromkeys(MEASURED[key] for key in differing))


def why_apart(summaries: Sequence[Summary]) -> str:
    """One sentence on why there are several summaries, and how to choose one."""
    unknown = any(w.startswith("data_sha256") and w.endswith("null") for w in summaries[-1].where)
    return (
        f"{len(summaries)} groups of runs cannot be compared, since they have different "
        f"{', '.join(summaries[0].differ)}; choose one with --where, for example --where "
        f"{' '.join(summaries[0].where)}" + (" (null: not recorded)" if unknown else "")
    )


def _near(word: str, known: Sequence[str]) -> str:
    """Names that may have been meant, or all."""
    return ", ".join(get_close_matches(word, known) or known)


def _matches(run: Run, metric: str, key: str, value: str) -> bool:
    basis = basis_of(run, metric)
    have = run.seed if key == "seed" else basis[key] if key in basis else run.at(key)
    if is_number(have):
        try:
            return bool(float(value) == have)
        except ValueError:
            return False
    return value in (as_text(have), "none" if have is None else str(have))
