"""What happens between a command line of train.py and its run.

Launchers and sweeps are prepared before Hydra reads the command line; what cannot run is refused
before Hydra writes.
"""

import copy
import importlib.util
import logging
import os
import re
import shlex
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from _common import cpp_compiler, make_folder, refuse, resolve_device, shown, typed
from vae_torch.config import Config, ConfigError, check
from vae_torch.sweep import LOCK, SweepError, is_running, read_runs

log = logging.getLogger("vae_torch")

# What a choice of hydra/launcher, hydra/sweeper or experiment needs, and the extra that brings it.
PLUGINS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "sweep"),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "cluster"),
    "submitit_slurm": ("hydra_plugins.hydra_submitit_launcher", "cluster"),
    "ray": ("hydra_plugins.hydra_ray_launcher", "ray"),
    "search": ("hydra_plugins.hydra_optuna_sweeper", "search"),
    "optuna": ("hydra_plugins.hydra_optuna_sweeper", "search"),
}

UNREPORTED: list[Path] = []  # the folder of a sweep that is under way


def prepare_launcher() -> None:
    """Before a plugin is looked for: whether it is there, our settings of it, and its workers'."""
    for argument in tuple(sys.argv):
        key, _, name = argument.partition("=")
        if key not in ("hydra/launcher", "hydra/sweeper", "experiment") or name not in PLUGINS:
            continue
        module, extra = PLUGINS[name]
        if not is_installed(module):
            refuse(f"{argument}: not installed; pip install -e '.[{extra}]'")
        added = []  # next to it: argparse takes the overrides from one place only
        if key != "experiment":
            added.append(f"+{key}/settings@{key.replace('/', '.')}={name}")
        if key == "hydra/launcher":
            # read by torch and tqdm when they are imported: in the workers, which inherit them
            os.environ.setdefault("OMP_NUM_THREADS", "1")
            os.environ.setdefault("TQDM_DISABLE", "1")
            os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # two jobs' lines differ in figures only
            paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # of _common
            if not any(a.startswith("threads=") for a in sys.argv):
                added.append("threads=1")
            if not any(a.startswith(("train.resume=", "sweep.dir=")) for a in sys.argv):
                added.append("train.resume=auto")  # a job that is started again goes on
        at = sys.argv.index(argument) + 1
        sys.argv[at:at] = added


def is_installed(module: str) -> bool:
    """Whether a plugin's module is there; without any plugin their package is missing too."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def python_here() -> str:
    """A shell's command for this Python in this folder: what a Ray worker is to be."""
    return shlex.join(["env", f"--chdir={Path.cwd()}", sys.executable])


def name_sweep_dir() -> None:
    """`sweep.dir=DIR` is a sweep's folder, and goes on with what lies there."""
    for i, argument in enumerate(sys.argv):
        if argument.startswith("sweep.dir="):
            sys.argv[i : i + 1] = [f"hydra.{argument}", "train.resume=auto"]


def repeat_overrides() -> None:
    """A run that is continued by its folder keeps the overrides that it was started with.

    New ones come after them and win; Hydra's own settings are not taken from a file.
    """
    given = [a.partition("=")[2] for a in sys.argv if a.startswith("train.resume=")]
    folders = [folder.strip("'").replace("\\'", "'") for folder in given]
    if not folders or folders[-1] in ("", "auto", "null"):
        return
    path = Path(folders[-1]) / ".hydra" / "overrides.yaml"
    if not path.is_file():
        return
    try:
        stored = OmegaConf.load(path)
    except (OSError, OmegaConfBaseException) as error:
        refuse(f"{path}: {' '.join(str(error).split())[:200]}; correct the file")
    if not OmegaConf.is_list(stored):
        refuse(f"{path}: holds no list of overrides; correct the file")
    kept = [str(o) for o in stored if re.match(r"[+~]{0,2}(?!hydra|train\.resume)[a-z]", str(o))]
    sys.argv[1:1] = kept


def after_time(overrides: str) -> str:
    """What follows the time in the name of a run's folder, so that TensorBoard's list reads.

    Nothing for the default run; a file's name may have 255 bytes.
    """
    name = re.sub(r"[^\w.=,+-]+", "_", overrides.replace("experiment=", ""), flags=re.ASCII)
    return f"_{name[:120]}" if name else ""


class RefuseBadRuns(Callback):
    """Checks the settings before Hydra makes or touches the run folder."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Also points a resumed run at its own folder."""
        settings = self._checked(config)
        resume = settings.train.resume
        if resume == "auto" and not _names_run_dir(config):
            found = newest_interrupted(Path(config.hydra.run.dir).parent.parent, settings)
            if found:
                log.info("going on with %s", shown(found))
                OmegaConf.update(config, "hydra.run.dir", str(found), force_add=True)
        elif resume and resume != "auto":
            if not (Path(resume) / "checkpoints" / "last.pt").exists():
                refuse(
                    f"train.resume={resume}: no such folder, or no checkpoints/last.pt in it; "
                    "name the folder of a run that was interrupted"
                )
            OmegaConf.update(config, "hydra.run.dir", resume, force_add=True)
        try:
            run_dir = Path(config.hydra.run.dir)
            if not resume and os.path.lexists(run_dir) and any(run_dir.iterdir()):
                refuse_occupied(run_dir)
            if (run_dir / "summary.json").exists():
                refuse(
                    f"train.resume={resume}: the run in {run_dir} is finished; "
                    "choose another hydra.run.dir for a new one"
                )
            if resume:  # before Hydra writes other settings over those of the run
                refuse_unfit_checkpoint(run_dir, settings)
        except (OSError, OmegaConfBaseException) as error:
            refuse(f"hydra.run.dir: cannot be used ({str(error)[:300]}); choose another folder")
        make_folder("hydra.run.dir", run_dir)
        self._lock = lock_run(run_dir)  # before Hydra writes its notes over another process's

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """The values that the sweep does not vary; each job checks its own again."""
        self._checked(config)
        refuse_climbing(config)
        folder = Path(config.hydra.sweep.dir)
        make_folder("hydra.sweep.dir", folder)
        UNREPORTED.append(folder)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:  # noqa: ARG002
        """What became of the jobs, what to type next, and an exit status that tells."""
        if report(UNREPORTED.pop()):
            sys.exit(1)

    def _checked(self, config: DictConfig) -> Config:
        settings = copy.deepcopy(config)
        with read_write(settings), open_dict(settings):
            del settings["hydra"]
        try:
            checked = typed(settings, Config)
            check(checked)
            device = resolve_device(checked.device)
            if checked.compile:
                from vae_torch.step import check_can_compile  # torch takes a second to import

                check_can_compile()
                if device.type == "cpu":
                    cpp_compiler()
        except ConfigError as error:
            refuse(str(error))
        return checked


def lock_run(run_dir: Path, *, seconds: float = 0) -> FileLock:
    """The run's folder for this process alone; locking it again in this process counts.

    Args:
        run_dir: The folder.
        seconds: To wait: the runs of a sweep that was killed take a moment to end.
    """
    lock = FileLock(run_dir.absolute() / LOCK, is_singleton=True)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        refuse(f"hydra.run.dir={run_dir}: another process is writing this run; wait for it")
    return lock


def newest_interrupted(outputs: Path, settings: Config) -> Path | None:
    """The youngest unfinished run of the same settings below `outputs/<date>/<time>`."""
    from vae_torch.checkpoint import CheckpointError, Checkpoints

    found = sorted(outputs.glob("*/*/checkpoints/last.pt"), key=lambda p: -p.stat().st_mtime)
    for run_dir in (path.parent.parent for path in found):
        if (run_dir / "summary.json").exists() or is_running(run_dir):
            continue
        with suppress(CheckpointError):
            Checkpoints(run_dir / "checkpoints", settings).load("cpu")
            return run_dir
    return None


def refuse_unfit_checkpoint(run_dir: Path, settings: Config) -> None:
    """A run goes on with the settings that it was started with."""
    from vae_torch.checkpoint import CheckpointError, Checkpoints

    try:
        Checkpoints(run_dir / "checkpoints", settings).load("cpu")
    except CheckpointError as error:
        refuse(str(error))


def refuse_occupied(run_dir: Path) -> None:
    """A new run starts in a folder of its own."""
    if (run_dir / "summary.json").exists():
        refuse(f"hydra.run.dir={run_dir}: holds a finished run; choose another folder")
    if (run_dir / "metrics.jsonl").exists():
        refuse(f"hydra.run.dir={run_dir}: holds an unfinished run; add train.resume=auto")
    refuse(f"hydra.run.dir={run_dir}: is not empty; choose another folder")


def refuse_climbing(config: DictConfig) -> None:
    """A sweep's folders are named by its overrides, and lie inside the sweep's folder."""
    subdir = OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"]  # type: ignore[index,call-overload]
    excluded = tuple(f"{key}=" for key in config.hydra.job.config.override_dirname.exclude_keys)
    named = [str(o) for o in config.hydra.overrides.task if not str(o).startswith(excluded)]
    for override in (*named, f"hydra.sweep.subdir={subdir}"):
        if re.search(r"(^|[=,/'\"])\.\.(/|$)|subdir=/", override):
            refuse(f"{override}: would name a folder outside hydra.sweep.dir; leave out the ..")


def _names_run_dir(config: DictConfig) -> bool:
    return any(str(o).startswith("hydra.run.dir=") for o in config.hydra.overrides.hydra)


def report(folder: Path) -> bool:
    """The last lines of a sweep: what became of its jobs. Whether one of them is not done."""
    try:
        runs = read_runs(folder)
    except SweepError:  # it broke before its first job
        return True
    count = Counter(run.state for run in runs)
    pruned = f", {count['pruned']} stopped early" if count["pruned"] else ""
    print(f"\n{count['finished']} of {len(runs)} runs finished{pruned} in {shown(folder)}")
    lost = [run for run in runs if run.state not in ("finished", "pruned")]
    for run in lost:
        print(f"  {run.path.relative_to(folder)}: {run.state}, {run.reason}")
    place = shlex.quote(str(shown(folder)))
    if lost:
        print(f"  go on with         the same command, sweep.dir={place}")
    print(f"  table and plots    {shown(Path(sys.executable))} scripts/summarize.py {place}")
    tensorboard = shown(Path(sys.executable).parent / "tensorboard")
    print(f"  curves             {tensorboard} --logdir {place}")
    return bool(lost)
