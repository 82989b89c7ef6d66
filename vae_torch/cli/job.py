"""What Hydra and its launchers call: one run, or one job of a sweep.

The path of a run: train.main -> Hydra -> task -> one_run -> runs.run.run -> training.loop.train. In
a sweep: task -> sweep_job -> one_run; with where=cores, sweep_job is in a child of joblib's worker.
"""

import logging
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from vae_torch.cli.children import KilledError, in_a_child
from vae_torch.cli.compose import (
    COMPOSITION_ERRORS,
    as_hydra_takes_it,
    full_errors,
    in_our_words,
    load_named_plugins,
    register,
    run_settings,
)
from vae_torch.cli.early import conf_dir
from vae_torch.cli.help import train_help
from vae_torch.cli.hooks import UNREPORTED
from vae_torch.cli.messages import (
    EndedError,
    command,
    is_out_of_memory,
    leave_disk_errors_to_main,
    program,
    refuse,
    shown,
    tensorboard,
    typed_as,
)
from vae_torch.cli.sweeps import note_failure, report_sweep
from vae_torch.config import ConfigError, UserError
from vae_torch.runs.folders import FAILED

log = logging.getLogger("vae_torch")


def start(typed: Sequence[str]) -> None:
    """Compose the typed settings and start the run, or the jobs of a sweep."""
    register()
    show_all = full_errors()
    try:
        load_named_plugins(typed)
        if {"-h", "--help"} & set(typed):
            print(train_help(ConfigStore.instance().repo), end="")
            return
        sys.argv[1:] = map(as_hydra_takes_it, typed)
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")(task)()
    except COMPOSITION_ERRORS as error:
        if show_all:
            raise
        refuse(in_our_words(error, typed))
    except ConfigError as error:
        refuse(str(error))
    finally:
        for folder, asked in UNREPORTED:  # a sweep that was stopped, or whose launcher failed
            report_sweep(folder, asked)


def task(cfg: DictConfig) -> float:
    """One run, as Hydra and its launchers call it. Returns its score: see `metrics.score`."""
    job = HydraConfig.get()
    run_dir = Path(job.runtime.output_dir)
    if job.mode is not RunMode.MULTIRUN:
        try:
            elbo = one_run(cfg, run_dir, in_sweep=False)
        except SystemExit:
            remove_if_unused(run_dir)
            raise
        tell_what_next(run_dir, result_of(cfg, elbo), list(cfg.plugins))
        return elbo
    overrides = [str(override) for override in job.overrides.task]
    if job.runtime.choices["hydra/launcher"] != "joblib":
        return sweep_job(cfg, run_dir, overrides)
    # the child has neither Hydra's logging nor the resolvers that joblib's workers get from it
    log_settings = OmegaConf.to_container(job.job_logging, resolve=True)
    try:  # joblib itself drops all jobs when the worker of one is killed
        return in_a_child(logged_job, log_settings, cfg, run_dir, overrides, job.job.num)
    except KilledError as error:
        return note_failure(run_dir, str(error), overrides)


def logged_job(
    log_settings: dict[str, Any],
    cfg: DictConfig,
    run_dir: Path,
    overrides: Sequence[str],
    number: int,
) -> float:
    """`sweep_job` in a process without Hydra."""
    from vae_torch.machine import device_of_job

    register()
    configure_log(OmegaConf.create(log_settings))
    cfg.device = device_of_job(cfg.device, number)
    return sweep_job(cfg, run_dir, overrides)


def sweep_job(cfg: DictConfig, run_dir: Path, overrides: Sequence[str]) -> float:
    """One run of a sweep. After a failure it returns NaN, and the reason is in the run's folder."""
    began = time.monotonic()
    try:
        elbo = one_run(cfg, run_dir, in_sweep=True)
    except EndedError as end:
        reason = end.reason
    except Exception as error:  # a programmer's mistake, but other jobs may be sound
        log.exception("%s", run_dir.name)
        reason = f"{type(error).__name__}: {error}"
    else:
        (run_dir / FAILED).unlink(missing_ok=True)  # from an earlier attempt
        seconds = time.monotonic() - began
        log.info("%s: %s, %.0f s", run_dir.name, result_of(cfg, elbo), seconds)
        return elbo
    return note_failure(run_dir, reason, overrides)


def one_run(cfg: DictConfig, run_dir: Path, *, in_sweep: bool) -> float:
    """From composed settings to a finished folder; an error becomes one line and an exit status."""
    from vae_torch.parts.metrics import score
    from vae_torch.runs.prune import PrunedError, pruned_elbo, pruning
    from vae_torch.runs.run import run
    from vae_torch.runs.signals import StopSignals
    from vae_torch.training.errors import DivergedError, StoppedError

    logging.raiseExceptions = False  # if run.log cannot be written, the records report it once
    threading.excepthook = leave_disk_errors_to_main
    try:
        with StopSignals() as signals:
            config = run_settings(cfg)
            judges = []
            if in_sweep:
                # the same command again resumes an interrupted run; inside `run` any value means
                # the run in this folder, and only the hooks of a single run search for another
                config.train.resume = "auto"
                if config.train.prune_after:
                    if (elbo := pruned_elbo(run_dir)) is not None:
                        log.info("stopped early already: %s", shown(run_dir))
                        return elbo
                    judges.append(pruning(run_dir, config))
            summary = run(config, run_dir, judges=judges, signals=signals)
            metric = config.train.monitor
            return score(metric, float(summary["final"][metric]))
    except PrunedError as pruned:
        log.info("stopped early: %s", pruned)
        return pruned.elbo
    except StoppedError as stopped:
        if in_sweep:  # the sweep's report says how to resume it
            log.info("%s: stopped: %s", run_dir.name, stopped)
        elif (run_dir / "checkpoints" / "last.pt").exists():
            again = f"{command('train')} {typed_as('train.resume', run_dir)}{naming(cfg.plugins)}"
            log.info("stopped: %s\n  resume with   %s", stopped, again)
        else:
            log.info("stopped: %s; nothing is lost, start it again", stopped)
        sys.exit(128 + signals.number)
    except UserError as error:
        refuse(str(error))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        refuse("out of memory: lower the model's sizes, data.batch_size or objective.num_samples")
    except DivergedError as error:
        fail(str(error), run_dir)
    except OSError as error:  # a full disk, a removed folder
        fail(f"{error.filename or run_dir}: {error.strerror}", run_dir)


def fail(reason: str, run_dir: Path) -> NoReturn:
    """End a failed run with one line: the reason, and what is left of it."""
    kept = run_dir / "checkpoints" / "last.pt"
    if not run_dir.is_dir():  # the kind of error depends on what noticed it first
        reason = f"{run_dir}: No such file or directory"
        left = "the run's folder was moved or removed while the run wrote into it"
    elif kept.exists():
        left = f"the last checkpoint is {kept}"
    else:
        left = "there is no checkpoint yet"
    reason = f"stopped: {' '.join(reason.split())}; {left}"
    print(f"{program()}: {reason}", file=sys.stderr)
    raise EndedError(1, reason)


def remove_if_unused(run_dir: Path) -> None:
    """Remove a folder that holds nothing but notes."""
    from vae_torch.runs.folders import LOCK

    if not run_dir.is_dir():
        return
    notes = {run_dir / LOCK, run_dir / "config.yaml", *run_dir.glob("*.log")}
    if set(run_dir.iterdir()) <= {*notes, run_dir / ".hydra"}:
        logging.shutdown()
        shutil.rmtree(run_dir / ".hydra", ignore_errors=True)
        for path in notes:
            with suppress(OSError):  # Windows keeps an open file, such as the lock
                path.unlink(missing_ok=True)
        with suppress(OSError):  # a link to a folder stays
            run_dir.rmdir()
            run_dir.parent.rmdir()


def result_of(cfg: DictConfig, value: float) -> str:
    """A run's result in words; `value` is what the run returned."""
    from vae_torch.parts.metrics import metric_of, score
    from vae_torch.runs.run import judged_on

    config = run_settings(cfg)
    monitor = config.train.monitor
    name, metric = monitor.removeprefix("test/"), metric_of(monitor)
    unit = f" {metric.unit}" if metric.unit else ""
    return f"{judged_on(config)} {name} {score(monitor, value):.{metric.digits}f}{unit}"


def naming(plugins: Sequence[str]) -> str:
    """What a command line adds to name these plug-ins."""
    return f" plugins=[{','.join(plugins)}]" if plugins else ""


def tell_what_next(run_dir: Path, result: str, plugins: Sequence[str]) -> None:
    """The last lines of a run: where it is and what to type next.

    TensorBoard gets the day's folder, where it shows this run by name beside the others.
    """
    named = any(str(o).startswith("hydra.run.dir=") for o in HydraConfig.get().overrides.hydra)
    run = typed_as("run", run_dir) + naming(plugins)
    log.info(
        "\nDone: %s.\n"
        "  run folder    %s\n"
        "  pictures      %s\n"
        "  evaluate      %s %s\n"
        "  explore       %s %s --open\n"
        "  curves        %s",
        result,
        shown(run_dir),
        shown(run_dir / "figures"),
        command("evaluate"),
        run,
        command("explore"),
        run,
        tensorboard(run_dir if named else run_dir.parent),
    )
