"""Train a VAE: one run, or with -m a sweep.

python scripts/train.py [key=value ...]
"""

import copy
import importlib
import importlib.util
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import hydra
from filelock import FileLock, Timeout
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from _child import KilledError, in_a_child
from _common import (
    EndedError,
    cpp_compiler,
    device_name,
    leave_disk_errors_to_main,
    make_folder,
    quote_paths,
    refuse,
    refuse_broken_files,
    refuse_malformed,
    resolve_device,
    set_products,
    shown,
    slow_bf16,
    tell_interrupts,
    tune_cpu,
    typed,
)
from vae_torch.config import Config, ConfigError, check
from vae_torch.sweep import (
    FAILED,
    LOCK,
    PRUNED,
    SweepError,
    behind_median,
    is_running,
    read_runs,
)

ConfigStore.instance().store(name="schema", node=Config)
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


def main(cfg: DictConfig) -> float:
    """One run. In a sweep, one that fails leaves its reason and lets the others go on."""
    job = HydraConfig.get()
    run_dir = Path(job.runtime.output_dir)
    if job.mode is not RunMode.MULTIRUN:
        return main_run(cfg, run_dir)
    if job.runtime.choices["hydra/launcher"] != "joblib":
        return main_job(cfg, run_dir)
    import_libraries()
    try:  # joblib itself gives up all jobs when the worker of one is killed
        return in_a_child(lambda: main_job(cfg, run_dir))
    except KilledError as error:
        return note_failure(run_dir, str(error))


def main_job(cfg: DictConfig, run_dir: Path) -> float:
    """One run of a sweep: the final test elbo, NaN where it failed."""
    try:
        began = time.monotonic()
        elbo = main_run(cfg, run_dir)
        (run_dir / FAILED).unlink(missing_ok=True)
        log.info("%s: test elbo %.2f, %.0f s", run_dir.name, elbo, time.monotonic() - began)
        return elbo
    except EndedError as end:
        reason = end.reason
    except Exception as error:  # a programmer's mistake, but the other jobs may be sound
        log.exception("%s", run_dir.name)
        reason = f"{type(error).__name__}: {error}"
    return note_failure(run_dir, reason)  # only here, where the error lets go of the run's lock


def note_failure(run_dir: Path, reason: str) -> float:
    """Keep why a job of a sweep failed; its result is NaN."""
    from vae_torch.checkpoint import write_atomically

    log.info("%s: failed: %s", run_dir.name, reason)
    with suppress(OSError):
        if not is_running(run_dir):  # or else it is another process's run
            run_dir.mkdir(exist_ok=True)
            text = json.dumps(
                {"reason": reason, "overrides": list(HydraConfig.get().overrides.task)}
            )
            write_atomically(run_dir / FAILED, (text + "\n").encode())
    return math.nan


def import_libraries() -> None:
    """What a run imports: once in a worker, for all the runs that it forks."""
    for name in (
        "matplotlib.backends.backend_agg",
        "torch._dynamo",
        "torch.utils.tensorboard",
        "tqdm.contrib.logging",
        "vae_torch.data",
        "vae_torch.runlog",
        "vae_torch.train",
    ):
        importlib.import_module(name)
    importlib.import_module("tqdm").tqdm.get_lock()  # a semaphore, which a fork would not give back


def main_run(cfg: DictConfig, run_dir: Path) -> float:
    """One run, from composed settings to a finished folder. Returns the final test elbo."""
    from vae_torch.checkpoint import CheckpointError
    from vae_torch.data import DataError
    from vae_torch.train import DivergedError, StoppedError

    logging.raiseExceptions = False  # where run.log cannot be written, the records say so, once
    threading.excepthook = leave_disk_errors_to_main
    try:
        config = typed(cfg, Config)
        check(config)
        with StopSignals() as signals:
            return run(config, run_dir, OmegaConf.to_yaml(cfg, resolve=True), signals)
    except StoppedError as stopped:
        if (run_dir / "checkpoints" / "last.pt").exists():
            log.info("stopped: %s\n  go on with    %s", stopped, resume_command(run_dir))
        else:
            log.info("stopped: %s; nothing is lost, start it again", stopped)
        remove_if_unused(run_dir)
        sys.exit(128 + signals.number)
    except (ConfigError, DataError, CheckpointError) as error:
        remove_if_unused(run_dir)
        refuse(str(error))
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        remove_if_unused(run_dir)
        refuse("out of memory: lower the model's sizes, data.batch_size or objective.num_samples")
    except DivergedError as error:
        fail(str(error), run_dir)
    except OSError as error:  # a full disk, a folder that was taken away
        fail(f"{error.filename or run_dir}: {error.strerror}", run_dir)


def run(config: Config, run_dir: Path, config_text: str, signals: "StopSignals") -> float:
    """Data, model, loop, records: what a run is made of."""
    import torch
    from tqdm.contrib.logging import logging_redirect_tqdm

    from vae_torch import data
    from vae_torch.checkpoint import Checkpoints, write_atomically
    from vae_torch.model import VAE
    from vae_torch.runlog import RunLog
    from vae_torch.train import StoppedError, train

    in_sweep = HydraConfig.get().mode is RunMode.MULTIRUN
    lock = lock_run(run_dir, seconds=10 if in_sweep else 0)
    if config.train.resume and (run_dir / "summary.json").exists():  # in a sweep
        done = finished_elbo(run_dir, config)
        log.info("finished already: %s", shown(run_dir))
        return done
    if config.train.prune_after and (run_dir / PRUNED).exists():
        log.info("stopped early already: %s", shown(run_dir))
        return float(json.loads((run_dir / PRUNED).read_text())["elbo"])
    if not config.train.resume and (run_dir / "metrics.jsonl").exists():
        raise ConfigError(f"{run_dir}: holds a run already; two jobs of a sweep need two names")
    device = resolve_device(config.device)
    tune_cpu(config.threads)
    set_products(config.precision)
    if config.precision == "bf16" and (warning := slow_bf16(device)):
        log.warning(warning)
    torch.manual_seed(config.seed)  # of the initial weights; the rest has generators of its own

    train_loader, test_loader = data.loaders_of(config, device)
    hashes = {"train": data.data_hash(train_loader), "test": data.data_hash(test_loader)}
    vae = VAE.from_config(config).to(device)
    checkpoints = Checkpoints(
        run_dir / "checkpoints", config, every=config.train.checkpoint_every, data_sha256=hashes
    )
    state = checkpoints.load("cpu") if config.train.resume else None
    history = state["history"] if state else None
    records = RunLog(run_dir, config, config_text=config_text, history=history)
    train_set, test_set = (data.image_dataset(loader) for loader in (train_loader, test_loader))
    # of jobs that run side by side each writes one line, at its end
    say = log.debug if "TQDM_DISABLE" in os.environ else log.info
    x, labels = test_set.__getitems__(torch.arange(min(5000, len(test_set))))  # for the pictures
    behind: dict[str, Any] = {}  # why the run is not worth going on with

    def record(metrics: dict[str, Any], model: VAE) -> None:
        records.log(metrics)
        epoch = metrics["epoch"]
        speed = metrics["train/images_per_second"]  # 0 where a run goes on after the last step
        say(
            "epoch %3d/%d   train elbo %8.2f   test elbo %8.2f = reconstruction %8.2f - kl %.2f"
            "   %.1f s",
            epoch,
            config.train.epochs,
            metrics["train/elbo"],
            metrics["test/elbo"],
            metrics["test/reconstruction"],
            metrics["test/kl"],
            len(train_set) / speed if speed else 0.0,
        )
        every = config.train.figure_every
        last = epoch == config.train.epochs
        with signals.at_once("drawing the figures"):
            if last or (every and epoch % every == 0):
                records.figures(epoch, model, x, labels)
            if last or (every and (epoch <= 10 or epoch % every == 0)):  # it grows fast at first
                records.growth(epoch, model, x[:10])
        judged = in_sweep and 0 < config.train.prune_after <= epoch and not last
        if judged and (reason := behind_median(run_dir)):
            behind.update(reason=reason, elbo=metrics["test/elbo"])

    say(
        "%s: %d training and %d test images, on %s",
        config.data.name,
        len(train_set),
        len(test_set),
        device_name(device),
    )
    try:
        with logging_redirect_tqdm(), signals.after_a_step():
            history = train(
                vae,
                train_loader,
                test_loader,
                epochs=config.train.epochs,
                objective=config.objective,
                optimizer=config.optimizer,
                ema=config.train.ema,
                precision=config.precision,
                compile=config.compile,
                seed=config.seed,
                log=record,
                checkpoints=checkpoints,
                stop=lambda: signals.received() or bool(behind),
            )
        records.projector(vae, x[:2000], labels[:2000])
        summary = records.finish(
            history,
            {
                "device": device_name(device),
                "data_sha256": hashes,
            },
        )
    except StoppedError:
        if signals.received() or not behind:
            raise
        write_atomically(run_dir / PRUNED, (json.dumps(behind) + "\n").encode())
        log.info("stopped early: %s", behind["reason"])
        return float(behind["elbo"])
    finally:
        with suppress(OSError):  # of a full disk; what is to be said about it is being said
            records.close()
        lock.release()
    elbo: float = summary["final"]["test/elbo"]
    if not in_sweep:
        tell_what_next(run_dir, elbo)
    return elbo


class StopSignals:
    """Ctrl-C and SIGTERM end a run: with StoppedError, or where steps are taken, after the step.

    A second Ctrl-C ends it at once, without a word.
    """

    def __init__(self) -> None:
        self.number = 0
        self._doing: str | None = "before the first step"  # None: `received` is asked

    def received(self) -> bool:
        """Whether the run is to end."""
        return self.number > 0

    def after_a_step(self) -> AbstractContextManager[None]:
        """Within, the training loop asks `received`."""
        return self._now(None, "after the last epoch")

    def at_once(self, doing: str) -> AbstractContextManager[None]:
        """Within, no step is under way that could be broken: it ends where it is."""
        return self._now(doing, None)

    @contextmanager
    def _now(self, doing: str | None, then: str | None) -> Iterator[None]:
        self._set(doing)
        yield
        self._set(then)

    def _set(self, doing: str | None) -> None:
        self._doing = doing
        if self.number and doing:
            self._stop()

    def _stop(self) -> NoReturn:
        from vae_torch.train import StoppedError

        doing, self._doing = self._doing, None  # what follows is not interrupted
        raise StoppedError(doing)

    def __enter__(self) -> "StopSignals":
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows none
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.number and number == signal.SIGINT:
            os._exit(128 + number)
        self.number = number
        if self._doing:
            self._stop()


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
            if checked.compile and device.type == "cpu":
                cpp_compiler()
        except ConfigError as error:
            refuse(str(error))
        return checked


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


def _names_run_dir(config: DictConfig) -> bool:
    return any(str(o).startswith("hydra.run.dir=") for o in config.hydra.overrides.hydra)


def refuse_climbing(config: DictConfig) -> None:
    """A sweep's folders are named by its overrides, and lie inside the sweep's folder."""
    subdir = OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"]  # type: ignore[index,call-overload]
    excluded = tuple(f"{key}=" for key in config.hydra.job.config.override_dirname.exclude_keys)
    named = [str(o) for o in config.hydra.overrides.task if not str(o).startswith(excluded)]
    for override in (*named, f"hydra.sweep.subdir={subdir}"):
        if re.search(r"(^|[=,/'\"])\.\.(/|$)|subdir=/", override):
            refuse(f"{override}: would name a folder outside hydra.sweep.dir; leave out the ..")


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


def finished_elbo(run_dir: Path, config: Config) -> float:
    """The result of a run that is done, if it is this one.

    Raises:
        ConfigError: Its summary is damaged, or was written by another version.
        CheckpointError: Its checkpoint is damaged, or of other settings.
    """
    from vae_torch.checkpoint import Checkpoints
    from vae_torch.runlog import versions

    path = run_dir / "summary.json"
    state = Checkpoints(run_dir / "checkpoints", config).load("cpu")  # sealed: nobody edited it
    try:
        summary = json.loads(path.read_text())
        elbo, had = float(summary["final"]["test/elbo"]), summary["versions"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: damaged; remove its folder to run it again") from None
    if (
        state is None
        or state["epoch"] < config.train.epochs
        or state["history"]["test/elbo"][-1] != elbo
    ):
        raise ConfigError(
            f"{path}: does not fit the checkpoint beside it; remove its folder to run it again"
        )
    now = versions()
    for name in ("vae_torch", "torch", "code"):
        if had.get(name) != now[name]:
            raise ConfigError(
                f"{path}: is of {name} {str(had.get(name))[:12]}, this is {now[name][:12]}; "
                "choose another sweep.dir, or remove its folder to run it again"
            )
    return elbo


def after_time(overrides: str) -> str:
    """What follows the time in the name of a run's folder, so that TensorBoard's list reads.

    Nothing for the default run; a file's name may have 255 bytes.
    """
    name = re.sub(r"[^\w.=,+-]+", "_", overrides.replace("experiment=", ""), flags=re.ASCII)
    return f"_{name[:120]}" if name else ""


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


def name_sweep_dir() -> None:
    """`sweep.dir=DIR` is a sweep's folder, and goes on with what lies there."""
    for i, argument in enumerate(sys.argv):
        if argument.startswith("sweep.dir="):
            sys.argv[i : i + 1] = [f"hydra.{argument}", "train.resume=auto"]


def is_installed(module: str) -> bool:
    """Whether a plugin's module is there; without any plugin their package is missing too."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def prepare_launcher() -> None:
    """Before a plugin is looked for: whether it is there, our settings of it, and its workers'."""
    for argument in tuple(sys.argv):
        key, _, name = argument.partition("=")
        if key not in ("hydra/launcher", "hydra/sweeper", "experiment") or name not in PLUGINS:
            continue
        module, extra = PLUGINS[name]
        if not is_installed(module):
            refuse(f"{argument}: not installed; pip install 'vae-torch[{extra}]'")
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


def python_here() -> str:
    """A shell's command for this Python in this folder: what a Ray worker is to be."""
    return shlex.join(["env", f"--chdir={Path.cwd()}", sys.executable])


def resume_command(run_dir: Path) -> str:
    """What to type to go on."""
    name = f"train.resume={shown(run_dir)}"
    return f"{shown(Path(sys.executable))} scripts/train.py {shlex.quote(name)}"


def fail(reason: str, run_dir: Path) -> NoReturn:
    """A run that broke: one line that says why and what is left of it."""
    kept = run_dir / "checkpoints" / "last.pt"
    left = f"the last checkpoint is {kept}" if kept.exists() else "there is no checkpoint yet"
    reason = f"stopped: {' '.join(reason.split())}; {left}"
    print(f"train.py: {reason}", file=sys.stderr)
    raise EndedError(1, reason)


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


def remove_if_unused(run_dir: Path) -> None:
    """Take away a folder in which nothing but Hydra's own notes was written."""
    logs = list(run_dir.glob("*.log"))
    if set(run_dir.iterdir()) <= {run_dir / ".hydra", run_dir / LOCK, *logs}:
        logging.shutdown()
        (run_dir / LOCK).unlink(missing_ok=True)
        shutil.rmtree(run_dir / ".hydra", ignore_errors=True)
        for path in logs:
            path.unlink()
        with suppress(OSError):  # a link to a folder stays
            run_dir.rmdir()
            run_dir.parent.rmdir()


def tell_what_next(run_dir: Path, elbo: float) -> None:
    """The last lines of a run: where it is and what to open.

    TensorBoard is given the day's folder, beside whose other runs it calls this one by its name.
    """
    tensorboard = shown(Path(sys.executable).parent / "tensorboard")
    named = any(str(o).startswith("hydra.run.dir=") for o in HydraConfig.get().overrides.hydra)
    log.info(
        "\nDone: test elbo %.2f nats per image.\n"
        "  run folder    %s\n"
        "  pictures      %s\n"
        "  curves        %s --logdir %s   then open http://localhost:6006",
        elbo,
        shown(run_dir),
        shown(run_dir / "figures"),
        tensorboard,
        shown(run_dir if named else run_dir.parent),
    )


if __name__ == "__main__":
    tell_interrupts()
    refuse_broken_files()
    OmegaConf.register_new_resolver("after_time", after_time)
    OmegaConf.register_new_resolver("python_here", python_here)
    prepare_launcher()
    name_sweep_dir()
    quote_paths("hydra.run.dir", "hydra.sweep.dir", "train.resume", "data.root")
    repeat_overrides()
    refuse_malformed("model", "data", "objective", "optimizer")
    try:
        hydra.main(version_base="1.3", config_path="../conf", config_name="train")(main)()
    finally:
        for folder in UNREPORTED:  # a sweep that was stopped, or whose launcher broke
            report(folder)
