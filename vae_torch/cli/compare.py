"""Two evaluated runs, image by image: paired differences with errors, and a plot.

python scripts/compare.py run=A run=B [metric=log_px] [out=comparison.png]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from vae_torch.cli.messages import Parser, refuse, shown, tell_interrupts


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: read both runs, print, plot."""
    tell_interrupts()
    parser = Parser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "words", nargs="*", metavar="key=value",
        help="run=A run=B, evaluated; metric=log_px, for the plot; out=FILE.png, the plot",
    )  # fmt: skip
    words = parser.parse_args(sys.argv[1:] if arguments is None else arguments).words
    given: dict[str, list[str]] = {"run": [], "metric": [], "out": []}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            key, value = "run", word
        if key not in given:
            refuse(f"{key}: no such key; there are run, metric, out")
        given[key].append(value)
    if len(given["run"]) != 2:
        refuse(f"{len(given['run'])} runs given: name two, run=A run=B")
    from vae_torch.evaluation.compare import CompareError, compare_runs, scatter
    from vae_torch.figures import save_png

    runs = (Path(given["run"][0]), Path(given["run"][1]))
    metric = (given["metric"] or ["log_px"])[-1]
    out = Path((given["out"] or ["comparison.png"])[-1])
    try:
        found = compare_runs(*runs)
    except CompareError as error:
        refuse(str(error))
    chosen = next((each for each in found if each.metric == metric), None)
    if chosen is None:
        refuse(f"metric={metric}: must be one of {', '.join(each.metric for each in found)}")
    for each in found:
        print(each.sentence())
    print("± is the error over images; random seeds add to it")
    try:
        save_png(scatter(chosen, (runs[0].name, runs[1].name)), out)
    except OSError as error:
        refuse(f"out={out}: cannot be written ({error.strerror}); choose another file")
    print(f"written to {shown(out.resolve())}")
