"""The jobs of a sweep: their names, reasons of failures, and the final report."""

import json
import logging
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser

from vae_torch.cli.messages import command, shown, tensorboard, typed_as
from vae_torch.cli.names import run_name
from vae_torch.config import ConfigError
from vae_torch.files import write_atomically
from vae_torch.runs.folders import FAILED, SweepError, is_running, read_run, read_runs

log = logging.getLogger("vae_torch")


def jobs_of(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The keys that a grid's overrides vary, and a unique name for each job."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    last = {o.get_key_element(): o for o in parsed}  # a repeated key: the last, as in Hydra
    swept = [key for key, o in last.items() if o.is_sweep_override()]
    choices = [
        [f"{key}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [f"{key}={o.get_value_element_as_str()}"]
        for key, o in last.items()
    ]
    names = [run_name(job, swept) for job in product(*choices)]
    # on macOS and Windows, folder names do not differ by case
    count = Counter(map(str.casefold, names))
    for name in names:
        if (times := count[name.casefold()]) > 1:
            raise ConfigError(
                f"{', '.join(swept)}: {times} jobs would share the folder {name or '.'}; sweep "
                "over keys that say what a run is"
            )
    return swept, names


def note_failure(run_dir: Path, reason: str, overrides: Sequence[str]) -> float:
    """Keep the reason of a job's failure; its result is NaN."""
    with suppress(OSError):
        if not is_running(run_dir):  # else another process is running it
            run_dir.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"reason": reason, "overrides": list(overrides)})
            write_atomically(run_dir / FAILED, (text + "\n").encode())
    log.info("%s: failed: %s", run_dir.name, reason)
    return math.nan


def report_sweep(folder: Path, asked: Sequence[str] | None) -> bool:
    """Print the last lines of a sweep: the state of its jobs. Returns whether one is not done.

    `asked` are the names of the jobs, if they are known before they run.
    """
    if asked is None:
        try:
            runs = read_runs(folder)
        except SweepError:  # it failed before its first job
            return True
        missing = 0
    else:
        runs = [read_run(folder / name) for name in asked if (folder / name).is_dir()]
        missing = len(asked) - len(runs)
    count = Counter(run.state for run in runs)
    parts = [f"{count['finished']} of {len(runs) + missing} runs finished"]
    parts += [
        f"{number} {words}"
        for number, words in (
            (count["pruned"], "stopped early"),
            (count["failed"] + count["broken"], "failed"),
            (count["unfinished"] + count["running"], "interrupted"),
            (missing, "not started"),
        )
        if number
    ]
    print(f"\n{', '.join(parts)} in {shown(folder)}")
    lost = [run for run in runs if run.state not in ("finished", "pruned")]
    for run in lost:
        print(f"  {run.path.relative_to(folder)}: {run.state}, {run.reason}")
    unfinished = bool(lost) or missing > 0
    if unfinished:
        print(f"  resume with        the same command, {typed_as('sweep.dir', folder)}")
    print(f"  table and plots    {command('summarize')} {shlex.quote(str(shown(folder)))}")
    print(f"  curves             {tensorboard(folder)}")
    return unfinished
