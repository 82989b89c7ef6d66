"""A summary as Markdown and as CSV."""

import csv
import io
import math
import statistics
from pathlib import Path

from vae_torch.runs.folders import Run
from vae_torch.runs.metrics import of_card
from vae_torch.runs.summary import Summary
from vae_torch.runs.values import as_text


def to_csv(summary: Summary, *others: Summary) -> str:
    """One line per setting; for several summaries, their conditions are the first column."""
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
            settings = [as_text(row.runs[0].at(key)) for key in keys]
            settings = [as_text(v) for v in row.values] if not others else settings
            whose = [" ".join(each.where)] if others else []
            writer.writerow([*whose, *settings, row.mean, sd, len(row.runs), seeds, seconds])
    return file.getvalue()


def to_markdown(summary: Summary, root: Path) -> str:
    """The table, its verdict, and the runs left out."""
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
        lines.append("| " + " | ".join([*(as_text(v) for v in row.values), *cells]) + " |")
    lines += ["", summary.verdict()]
    if summary.where and len(summary.rows) == 1:  # no column tells which
        places = [f"`{_place(run, root)}`" for run in summary.rows[0].runs]
        lines[-1] += f" Of {', '.join(places)}."
    if summary.held_out:
        lines += ["", "Held-out images: the last data.hold_out training images, not the test set."]
    if summary.left_out:
        lines += ["", f"Not in the table ({len(summary.left_out)}):", ""]
        for run in summary.left_out:
            lines.append(f"- `{_place(run, root)}`: {run.state}, {run.reason}")
        if any(run.state == "left out" for run in summary.left_out) and of_card(summary.metric):
            lines += ["", f"`scripts/evaluate.py run=DIR` gives a run its {summary.metric}."]
    return "\n".join(lines) + "\n"


def _place(run: Run, root: Path) -> str:
    return str(run.path.relative_to(root)) if run.path != root else run.path.name
