"""Hooks that Hydra calls before a run or a sweep, so that an impossible one leaves no files."""

import functools
import os
import re
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from vae_torch.cli.compose import PLUGINS, run_settings
from vae_torch.cli.messages import make_folder, refuse, shown
from vae_torch.cli.sweeps import jobs_of, report_sweep
from vae_torch.config import (
    INCIDENTAL,
    STAGE_KEYS,
    Config,
    ConfigError,
    UserError,
    config_from_dict,
    flatten,
)

# The current sweep: its folder and its jobs' names (None if unknown before it starts). It is
# reported by `on_multirun_end`, or when the command ends before that.
UNREPORTED: list[tuple[Path, list[str] | None]] = []

Hook = Callable[..., None]


def firm(hook: Hook) -> Hook:
    """Let an error in a hook end the program; Hydra would only warn and continue."""

    @functools.wraps(hook)
    def wrapped(*arguments: Any, **named: Any) -> None:
        try:
            hook(*arguments, **named)
        except Exception:
            traceback.print_exc()
            raise SystemExit(1) from None

    return wrapped


class Hooks(Callback):
    """Checks the settings before Hydra touches a folder, and gives Hydra the right folder."""

    @firm
    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """A single run: use a new folder, or that of the run to resume."""
        try:
            settings = _checked(config)
            if any(str(o).startswith("sweep.dir=") for o in config.hydra.overrides.task):
                raise ConfigError(
                    f"sweep.dir={config.sweep.dir}: this is not a sweep; add -m, or name the run's "
                    "folder with hydra.run.dir"
                )
            resume = settings.train.resume
            names_run_dir = any(o.startswith("hydra.run.dir=") for o in _own(config))
            if resume == "auto" and not names_run_dir:
                point_at_interrupted(config, settings)
            elif resume and resume != "auto":
                take_up(config, Path(resume))
            run_dir = usable_folder(config, resume)
            make_folder("hydra.run.dir", run_dir)
            from vae_torch.runs.run import lock_run

            self._lock = lock_run(run_dir)  # before Hydra writes over another process's notes
        except UserError as error:
            refuse(str(error))

    @firm
    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """A sweep: check the values that do not vary; `one_run` checks those of each job."""
        chosen = config.hydra.runtime.choices
        launcher, names = str(chosen["hydra/launcher"]), None
        if launcher in PLUGINS and chosen.get("where", "here") == "here":
            refuse(f"hydra/launcher={launcher}: type {PLUGINS[launcher][0]} instead")
        try:
            _checked(config)
            refuse_climbing(config)
            if chosen["hydra/sweeper"] == "basic":
                params = config.hydra.sweeper.params or {}  # swept by an experiment's file
                more = [f"{key}={value}" for key, value in params.items()]
                swept, names = jobs_of([*more, *config.hydra.overrides.task])
                if any(o.startswith("hydra.sweep.subdir=") for o in _own(config)):
                    names = None
                else:  # passed to each job, which is composed from these overrides and its own
                    with read_write(config), open_dict(config):
                        config.hydra.overrides.hydra.append(
                            "hydra.sweep.subdir='${run_name:${hydra.overrides.task},"
                            f"[{','.join(swept)}]}}'"
                        )
        except ConfigError as error:
            refuse(str(error))
        folder = Path(config.hydra.sweep.dir)
        make_folder("sweep.dir", folder)
        UNREPORTED.append((folder, names))
        if launcher == "joblib":
            signal.signal(signal.SIGINT, functools.partial(_let_runs_end, folder))

    @firm
    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:  # noqa: ARG002
        """Report the jobs and the next command, and set the exit status."""
        if report_sweep(*UNREPORTED.pop()):
            raise SystemExit(1)


def _checked(config: DictConfig) -> Config:
    """The settings of a run, if this machine can run it."""
    settings = run_settings(config)
    # imports torch, so after the checks that need none
    from vae_torch.machine import cpp_compiler, resolve_device
    from vae_torch.training.step import check_can_compile, check_precision

    device = resolve_device(settings.device)
    check_precision(settings.precision, device, compile=settings.compile)
    if settings.compile:
        check_can_compile()
        if device.type == "cpu":
            cpp_compiler()
    return settings


def point_at_interrupted(config: DictConfig, settings: Config) -> None:
    """`train.resume=auto`: use the newest interrupted run of the same settings, if there is one."""
    found, others = interrupted_runs(Path(config.hydra.run.dir).parent.parent, settings)
    if found:
        OmegaConf.update(config, "hydra.run.dir", str(found), force_add=True)
        return
    print("train.resume=auto: no interrupted run of these settings; starting a new one")
    if others:
        path, difference = others[0]
        print(f"  {shown(path)} {difference}; train.resume={shown(path)} resumes it")


def take_up(config: DictConfig, run_dir: Path) -> None:
    """`train.resume=DIR`: use the run's settings from its checkpoint; Hydra's notes stay."""
    if not (run_dir / "checkpoints" / "last.pt").exists():
        raise ConfigError(
            f"train.resume={run_dir}: no such folder, or no checkpoints/last.pt in it; name "
            "the folder of a run that was interrupted"
        )
    from vae_torch.parts.registry import loaded_plugins

    settings = resumed_settings(config, run_dir)
    if absent := [name for name in settings.plugins if name not in loaded_plugins()]:
        raise ConfigError(  # a file alone must not import a module
            f"train.resume={run_dir}: its run has parts of your own; add "
            f"plugins=[{','.join(absent)}]"
        )
    with read_write(config), open_dict(config):
        for key, value in settings.to_dict().items():
            config[key] = value
        config.hydra.run.dir = str(run_dir)
        if (run_dir / ".hydra").exists():
            config.hydra.output_subdir = None


def usable_folder(config: DictConfig, resume: str | None) -> Path:
    """The run's folder: empty, or holding a run that can be resumed with these settings."""
    from vae_torch.runs.run import refuse_other_run
    from vae_torch.runs.stages import goes_on

    try:
        run_dir = Path(config.hydra.run.dir)
        if not resume and os.path.lexists(run_dir) and any(run_dir.iterdir()):
            try:
                refuse_other_run(run_dir)
            except ConfigError as error:
                refuse(f"hydra.run.dir={error}")
            refuse(f"hydra.run.dir={run_dir}: is not empty; choose another folder")
        settings = run_settings(config)
        if (run_dir / "summary.json").exists() and not goes_on(run_dir, settings):
            refuse(
                f"train.resume={resume}: the run in {run_dir} is finished; "
                "choose another hydra.run.dir for a new one, or continue it with more "
                f"epochs: train.resume={shown(run_dir)} train.epochs=N"
            )
        if resume:  # before Hydra writes other settings over the run's
            refuse_unfit_checkpoint(run_dir, settings)
    except (OSError, OmegaConfBaseException) as error:
        refuse(f"hydra.run.dir: cannot be used ({str(error)[:300]}); choose another folder")
    return run_dir


def _let_runs_end(folder: Path, *_: object) -> None:
    """On Ctrl-C, give the runs ten seconds to end before joblib kills its workers.

    A second Ctrl-C does not wait.
    """
    from vae_torch.runs.folders import is_running

    signal.signal(signal.SIGINT, signal.default_int_handler)
    until = time.monotonic() + 10
    while time.monotonic() < until and any(map(is_running, folder.iterdir())):
        time.sleep(0.1)
    raise KeyboardInterrupt


def resumed_settings(config: DictConfig, run_dir: Path) -> Config:
    """The settings that a run was started with, plus allowed changes from the command line."""
    from vae_torch.checkpoint import load_checkpoint

    path = run_dir / "checkpoints" / "last.pt"
    state = load_checkpoint(path)
    stored = config_from_dict(state["config"])
    was = flatten(stored.to_dict())
    given = flatten(run_settings(config).to_dict())
    typed = {str(o).lstrip("+").partition("=")[0] for o in config.hydra.overrides.task}
    default = flatten(run_settings(hydra.compose(config.hydra.job.config_name, [])).to_dict())
    for key in given:  # by name, or through a group's file
        if key not in typed and given[key] == default[key]:
            continue
        if key in INCIDENTAL or key in STAGE_KEYS:
            *groups, name = key.split(".")
            setattr(functools.reduce(getattr, groups, stored), name, given[key])
        elif was[key] != given[key]:
            raise ConfigError(
                f"{path}: its run had {key}={was[key]}, this one has {given[key]}; "
                "resume with the settings that it was started with"
            )
    return stored


def interrupted_runs(outputs: Path, settings: Config) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest unfinished run of these settings below `outputs`, at most two levels, and others.

    The others come newest first, with how their settings differ.
    """
    from vae_torch.checkpoint import CheckpointError, Checkpoints
    from vae_torch.runs.folders import is_running

    others = []
    kept = [*outputs.glob("*/checkpoints/last.pt"), *outputs.glob("*/*/checkpoints/last.pt")]
    found = sorted(kept, key=lambda path: -path.stat().st_mtime)
    for run_dir in (path.parent.parent for path in found):
        if (run_dir / "summary.json").exists() or is_running(run_dir):
            continue
        try:
            Checkpoints(run_dir / "checkpoints", settings).load("cpu")
        except CheckpointError as error:
            words = re.search(r"its run (had \S+), this one has ([^;]+)", str(error))
            others.append((run_dir, f"{words[1]}, not {words[2]}" if words else "is damaged"))
        else:
            return run_dir, others
    return None, others


def refuse_unfit_checkpoint(run_dir: Path, settings: Config) -> None:
    """A run resumes only with its own settings, and with weights that fit them."""
    from vae_torch.checkpoint import Checkpoints
    from vae_torch.runs.identity import refuse_other_code
    from vae_torch.runs.stages import load_stage
    from vae_torch.stored import load_run

    state = load_stage(Checkpoints(run_dir / "checkpoints", settings), settings)
    if state:
        load_run(run_dir, plugins=settings.plugins)
        path = run_dir / "checkpoints" / "last.pt"
        allowed = settings.train.allow_other_code
        refuse_other_code(state.get("versions"), path=path, allowed=allowed)


def refuse_climbing(config: DictConfig) -> None:
    """All folders of a sweep must lie inside the sweep's."""
    for override in _own(config):
        if override.startswith("hydra.sweep.subdir=") and re.search(
            r"(^|[=/'\"])\.\.(/|$)|subdir=['\"]?/", override
        ):
            refuse(f"{override}: would name a folder outside sweep.dir; leave out the ..")


def _own(config: DictConfig) -> list[str]:
    """The overrides of Hydra's settings, with their interpolations."""
    stored = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)
    assert isinstance(stored, list)
    return [str(override) for override in stored]
