"""The plots of a summary."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vae_torch.figures import DIGIT_COLOURS, new_axes
from vae_torch.runs.metrics import basis_of
from vae_torch.runs.summary import ONE_SETTING, Row, Summary
from vae_torch.runs.values import Key, as_text, is_number, sort_key

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plots(summary: Summary) -> "dict[str, Figure]":
    """All pictures that the summary allows, by file name."""
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
    tests = {tuple(basis_of(run, "test/elbo").items()) for run in runs}
    if len(tests) == 1 and all(
        {"test/kl", "test/reconstruction"} <= run.metrics.keys() for run in runs
    ):
        pictures["rate_distortion"] = _rate_distortion(summary)
    if any(summary.metric in epoch for run in runs for epoch in run.epochs):
        pictures["learning_curves"] = _learning_curves(summary)
    return pictures


def _by_key(summary: Summary, i: int) -> "Figure":
    """The metric against one swept key: one line per setting of the others."""
    figure, axes = new_axes(8, 4.6)
    lines: dict[Key, list[Row]] = {}
    for row in summary.rows:
        lines.setdefault((*row.values[:i], *row.values[i + 1 :]), []).append(row)
    others = [*summary.keys[:i], *summary.keys[i + 1 :]]
    numeric = all(is_number(row.values[i]) for row in summary.rows)
    places = sorted({row.values[i] for row in summary.rows}, key=sort_key)
    for n, (other, rows) in enumerate(sorted(lines.items(), key=lambda item: sort_key(item[0]))):
        rows = sorted(rows, key=lambda row: sort_key(row.values[i]))
        at = [row.values[i] if numeric else places.index(row.values[i]) for row in rows]
        label = _label(others, other)
        error = [0 if math.isnan(row.sd) else row.sd for row in rows]
        axes.errorbar(
            at, [row.mean for row in rows], error, marker="o", capsize=3, label=label,
            color=DIGIT_COLOURS[n % len(DIGIT_COLOURS)],
        )  # fmt: skip
    if not numeric:
        axes.set_xticks(range(len(places)), [as_text(p) for p in places], rotation=20, ha="right")
    else:
        if min(places) > 0 and max(places) >= 4 * min(places):
            axes.set_xscale("log")
        if len(places) <= 8:
            axes.set_xticks(places, [as_text(place) for place in places])
            axes.minorticks_off()
    axes.set(xlabel=summary.keys[i], ylabel=f"{_two_lines(summary)}; mean ± sd over seeds")
    if others and len(lines) <= len(DIGIT_COLOURS):
        _legend(figure)
    return figure


def _heat_map(summary: Summary) -> "Figure":
    """The metric over two swept keys."""
    figure, axes = new_axes(8, 4.6)
    down, across = (sorted({row.values[i] for row in summary.rows}, key=sort_key) for i in (0, 1))
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
        axis.set_ticks(shown, [as_text(values[k]) for k in shown])
    axes.set(xlabel=summary.keys[1], ylabel=summary.keys[0])
    figure.colorbar(image, label=_two_lines(summary))
    return figure


def _rate_distortion(summary: Summary) -> "Figure":
    """KL against reconstruction, one point per run; the elbo is constant on a dashed line.

    Alemi et al., *Fixing a Broken ELBO* (2018), section 2.
    """
    figure, axes = new_axes(8, 4.6)
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
        start, at = max(left, nats - high), min(right, nats - low)  # its ends inside the axes
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

    figure, axes = new_axes(8, 4.6)
    longest = max(len(run.epochs) for row in summary.rows for run in row.runs)
    skipped = 2 if longest > 5 else 0  # they would flatten the rest
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
    """Rows with a colour each, best first."""
    from matplotlib import colormaps

    for i, row in enumerate(summary.rows):
        few = len(summary.rows) <= len(DIGIT_COLOURS)
        colour = DIGIT_COLOURS[i] if few else colormaps["viridis"](i / len(summary.rows))
        yield row, colour, _label(summary.keys, row.values) or ONE_SETTING


def _label(keys: Sequence[str], values: Key) -> str:
    """`latent_dim=8, prior=vamp`: short, beside a picture."""
    short = [key.rpartition(".")[2] for key in keys]
    names = short if len(set(short)) == len(short) else keys
    return ", ".join(f"{k}={as_text(v)}" for k, v in zip(names, values, strict=True))


def _tell_rows(figure: "Figure", summary: Summary) -> None:
    """Explain the colours of `_coloured`."""
    if len(summary.rows) <= len(DIGIT_COLOURS):
        by_value = sorted(summary.rows, key=lambda row: sort_key(row.values))
        _legend(figure, [_label(summary.keys, row.values) or ONE_SETTING for row in by_value])
    else:
        ends = ("first", "last") if summary.higher_is_better is None else ("best", "worst")
        title = f"dark: {ends[0]} settings of the table, light: {ends[1]}"
        figure.axes[0].set_title(title, fontsize=10)


def _legend(figure: "Figure", order: Sequence[str] = ()) -> None:
    """A legend beside the axes, with labels in this order."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True))
    shown = [label for label in order or labels if label in found]
    figure.legend(
        [found[label] for label in shown], shown,
        loc="outside right upper", fontsize=8, frameon=False,
    )  # fmt: skip


def _two_lines(summary: Summary) -> str:
    """The metric with its unit, and its direction on a second line, for an axis."""
    return summary.heading().replace(" (", "\n(")
