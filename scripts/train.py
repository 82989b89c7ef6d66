"""Train a VAE: one run, or with -m a sweep.

python scripts/train.py [key=value ...]
"""

import importlib
import importlib.util
import json
import logging
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from _child import KilledError, in_a_child
from _common import (
    EndedError,
    bf16_factor,
    device_name,
    leave_disk_errors_to_main,
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
from _launch import (
    UNREPORTED,
    after_time,
    lock_run,
    name_sweep_dir,
    prepare_launcher,
    python_here,
    repeat_overrides,
    report,
)
from vae_torch.config import Config, ConfigError, check
from vae_torch.sweep import (
    FAILED,
    LOCK,
    PRUNED,
    behind_median,
    is_running,
)

ConfigStore.instance().store(name="schema", node=Config)
log = logging.getLogger("vae_torch")


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
    set_products(config.precision, device)
    if config.precision == "bf16" and device.type == "cpu" and (factor := bf16_factor()) > 1:
        log.warning(slow_bf16(factor))
    if config.train.epochs <= (early := config.objective.early_epochs):
        log.warning("objective.early_epochs=%d: the run has no epoch of more draws", early)
    torch.manual_seed(config.seed)  # of the initial weights; the rest has generators of its own

    train_loader, test_loader = data.loaders_of(config, device)
    hashes = {"train": data.data_hash(train_loader), "test": data.data_hash(test_loader)}
    vae = VAE.from_config(config).to(device)
    if config.model.mean_bias:
        vae.init_output_bias(data.image_dataset(train_loader).mean())
    checkpoints = Checkpoints(
        run_dir / "checkpoints", config, every=config.train.checkpoint_every, data_sha256=hashes
    )
    state = checkpoints.load("cpu") if config.train.resume else None
    history = state["history"] if state else None
    records = RunLog(run_dir, config, config_text=config_text, history=history)
    train_set, test_set = (data.image_dataset(loader) for loader in (train_loader, test_loader))
    # of jobs that run side by side each writes one line, at its end
    say = log.debug if "TQDM_DISABLE" in os.environ else log.info
    x, labels = test_set.first(5000)  # for the pictures
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
