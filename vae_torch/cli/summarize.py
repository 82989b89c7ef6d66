"""One table of many runs: the best setting, its lead, and whether the lead is more than chance.

python scripts/summarize.py DIR [--metric log_px] [--group-by KEY ...] [--where KEY=VALUE ...]
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vae_torch.cli.messages import (
    Parser,
    make_folder,
    program,
    refuse,
    shown,
    tell_interrupts,
    told,
)
from vae_torch.files import write_atomically
from vae_torch.runs.folders import SweepError, read_runs
from vae_torch.runs.summary import summarize_each, why_apart
from vae_torch.runs.summary_tables import to_csv, to_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: read, average, print, write."""
    tell_interrupts()
    options = parse(arguments)
    from vae_torch.runs.summary_plots import plots  # torch, for which --help need not wait

    folder = Path(options.folder)
    out = Path(options.out or folder)
    try:
        summaries = summarize_each(
            read_runs(folder),
            metric=options.metric,
            group_by=options.group_by,
            where=options.where,
            higher_is_better=options.higher_is_better,
        )
    except SweepError as error:
        refuse(str(error))
    make_folder("--out", out)
    several = len(summaries) > 1
    note = f"{why_apart(summaries)}\n\n" if several else ""
    text = note + "\n".join(to_markdown(summary, folder) for summary in summaries)
    print(text)
    question = f"`{program()} {shlex.join(arguments or sys.argv[1:])}`\n\n"
    pictures = {
        f"{i}_{name}" if several else name: figure
        for i, summary in enumerate(summaries, 1)
        if not several or len(summary.rows) > 1
        for name, figure in plots(summary).items()
    }
    with told(f"--out={out}", "choose another folder"):
        write_atomically(out / "summary.md", (question + text).encode())
        write_atomically(out / "summary.csv", to_csv(*summaries).encode())
        write_pictures(out / "summary", pictures)
    written = ["summary.md", "summary.csv"]
    if pictures:
        written.append(f"summary/ ({len(pictures)} pictures)")
    print(f"written to {shown(out.resolve())}: {', '.join(written)}")


def write_pictures(folder: Path, pictures: "dict[str, Figure]") -> None:
    """Write the plots of this question and remove those of the previous one.

    `pictures.json` lists the written files, so that nothing else is ever deleted.
    """
    record = folder / "pictures.json"
    with suppress(FileNotFoundError, ValueError, TypeError):
        for name in json.loads(record.read_text("utf-8")):
            (folder / Path(name).name).unlink(missing_ok=True)
        record.unlink()
    if not pictures:
        with suppress(OSError):  # missing, or it holds other files
            folder.rmdir()
        return
    from vae_torch.figures import save_png

    folder.mkdir(exist_ok=True)
    names = [f"{name}.png" for name in pictures]
    write_atomically(record, (json.dumps(names, indent=2) + "\n").encode())
    for name, figure in zip(names, pictures.values(), strict=True):
        save_png(figure, folder / name)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", metavar="DIR", help="a sweep, several, or outputs/")
    parser.add_argument("--metric", default="test/elbo", help="of summary.json or evaluation.json")
    parser.add_argument("--group-by", nargs="+", default=[], metavar="KEY", help="only these keys")
    parser.add_argument(
        "--where", nargs="+", default=[], metavar="KEY=VALUE", help="only these runs"
    )
    parser.add_argument("--out", metavar="DIR", help="where the files go; DIR itself if left out")
    direction = parser.add_mutually_exclusive_group()
    words = "rank by a metric whose direction is unknown"
    direction.add_argument("--higher-is-better", action="store_true", default=None, help=words)
    direction.add_argument(
        "--lower-is-better", action="store_false", default=None, dest="higher_is_better"
    )
    return parser.parse_args(arguments)
