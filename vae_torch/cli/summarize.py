"""One table of many runs: which setting won, by how much, and whether that is more than luck.

python scripts/summarize.py DIR [--metric log_px] [--group-by KEY ...] [--where KEY=VALUE ...]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vae_torch.checkpoint import write_atomically
from vae_torch.cli.messages import Parser, make_folder, refuse, shown, tell_interrupts
from vae_torch.figures import save_png
from vae_torch.sweep import SweepError, plots, read_runs, summarize, to_csv, to_markdown


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: read, fold, print, write."""
    tell_interrupts()
    options = parse(arguments)
    folder = Path(options.folder)
    try:
        runs = read_runs(folder)
        summary = summarize(
            runs, metric=options.metric, group_by=options.group_by, where=options.where
        )
    except SweepError as error:
        refuse(str(error))
    out = Path(options.out or folder)
    make_folder("--out", out)
    text = to_markdown(summary, folder)
    print(text)
    written = ["summary.md", "summary.csv"]
    try:
        write_atomically(out / "summary.md", text.encode())
        write_atomically(out / "summary.csv", to_csv(summary).encode())
        for name, figure in plots(summary).items():
            save_png(figure, out / f"{name}.png")
            written.append(f"{name}.png")
    except OSError as error:
        refuse(f"--out={out}: cannot be written ({error.strerror}); choose another folder")
    print(f"written to {shown(out.resolve())}: {', '.join(written)}")


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
    return parser.parse_args(arguments)
