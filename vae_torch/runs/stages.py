"""Continues a finished run: `train.resume=DIR train.epochs=100`.

With a constant learning rate the longer run has the same bits as one started with as many epochs. A
schedule that has ended must be replaced; the new one begins at the current epoch.
"""

import json
from pathlib import Path
from typing import Any

from vae_torch.checkpoint import Checkpoints, load_checkpoint
from vae_torch.config import STAGE_KEYS, Config, ConfigError, config_from_dict, flatten
from vae_torch.parts.complete import complete
from vae_torch.parts.metrics import scores_of
from vae_torch.training.patience import has_stalled

# Schedules that end with the run: with more epochs, the user must say how they continue.
_ENDING = ("cosine", "one_cycle")


def goes_on(run_dir: Path, config: Config) -> bool:
    """Whether a run with a summary is asked for more epochs than it has done."""
    path = run_dir / "checkpoints" / "last.pt"
    if config.train.resume in (None, "auto") or not path.exists():
        return False
    state = load_checkpoint(path)
    try:
        stages = json.loads((run_dir / "summary.json").read_text("utf-8")).get("stages", [])
    except (ValueError, AttributeError):  # damaged: `finished_summary` reports it
        return False
    # also a run that was continued and then killed before its summary was removed
    return bool(len(stages) != len(state.get("stages", [])) or _changed(state, config))


def load_stage(checkpoints: Checkpoints, config: Config) -> dict[str, Any] | None:
    """A run's last state; a run resumed by name may have been started with fewer epochs."""
    longer = config.train.resume not in (None, "auto")
    state = checkpoints.load("cpu", but_for=STAGE_KEYS if longer else ())
    if state is None or not longer:
        return state
    path = checkpoints.folder / "last.pt"
    changed, was = _changed(state, config), config_from_dict(state["config"])
    done, epochs = state["epoch"], config.train.epochs
    if changed and epochs <= done:
        raise ConfigError(
            f"train.epochs={epochs}: the run in {path.parent.parent} has already done {done} "
            f"epochs; it must be {done + 1} or more"
        )
    if changed and (early := stopped_early(state["history"], config)):
        raise ConfigError(
            f"train.patience={config.train.patience}: the run in {path.parent.parent} has stopped "
            f"early after epoch {early['after_epoch']}; to continue, set a longer train.patience, "
            "or train.patience=null"
        )
    settings = [key for key in changed if key.startswith("optimizer.")]
    if settings and epochs <= was.train.epochs:
        key = settings[0]
        raise ConfigError(
            f"{path}: its run had {key}={flatten(was.to_dict())[key]}, this one has "
            f"{changed[key]}; resume with the settings that it was started with, or with more "
            f"train.epochs than {was.train.epochs}"
        )
    if "train.epochs" in changed and not settings and was.optimizer.schedule in _ENDING:
        raise ConfigError(
            f"train.epochs={epochs}: the run in {path.parent.parent} has "
            f"optimizer.schedule={was.optimizer.schedule}, which ended after {was.train.epochs} "
            "epochs; choose how it continues: optimizer.schedule=constant with an optimizer.lr, or "
            f"{was.optimizer.schedule} again with another optimizer.lr"
        )
    return state


def begin_stage(checkpoints: Checkpoints, state: dict[str, Any]) -> None:
    """Write the settings of a longer run into its last checkpoint, which makes it unfinished.

    The checkpoints hold the settings of the longer run; `state` is what `load_stage` returned.
    """
    config = checkpoints.config
    run_dir = checkpoints.folder.parent
    if changed := _changed(state, config):
        was = config_from_dict(state["config"])
        if not checkpoints.stages:
            checkpoints.stages = [_stage(0, 0, was)]
        checkpoints.stages.append(_stage(state["epoch"], state["step"], config))
        if any(key.startswith("optimizer.") for key in changed):
            state["since"] = [state["epoch"], state["step"]]
        if not growth_is_due(config, state["epoch"]):  # it was drawn because it was the last epoch
            frame = run_dir / "figures" / "growth" / f"{state['epoch']:06}.png"
            frame.unlink(missing_ok=True)
        checkpoints.save(state)
    (run_dir / "summary.json").unlink(missing_ok=True)


def growth_is_due(config: Config, epoch: int) -> bool:
    """Whether this epoch is a frame of the animation; the last epoch always is."""
    every = config.train.figure_every
    return bool(every and (epoch <= 10 or epoch % every == 0))  # often at first


def stopped_early(history: dict[str, list[Any]], config: Config) -> dict[str, Any] | None:
    """Where and why a run ended before its last epoch, for the record; else None."""
    wanted = config.train
    scores = scores_of(wanted.monitor, history[wanted.monitor])
    if len(scores) >= wanted.epochs or not has_stalled(scores, wanted.patience, wanted.min_delta):
        return None
    return {
        "after_epoch": len(scores),
        "best_epoch": scores.index(max(s for s in scores if s is not None)) + 1,
        "monitor": wanted.monitor,
        "patience": wanted.patience,
        "min_delta": wanted.min_delta,
    }


def early_line(early: dict[str, Any]) -> str:
    """The line about early stopping."""
    by = f" by more than {early['min_delta']}" if early["min_delta"] else ""
    metric = early["monitor"].replace("/", " ")
    return (
        f"stopped early after epoch {early['after_epoch']}: no better {metric}{by} for "
        f"{early['patience']} epochs; the best is that of epoch {early['best_epoch']}, in best.pt"
    )


def _stage(epoch: int, step: int, config: Config) -> dict[str, Any]:
    flat = flatten(config.to_dict())
    return {"after_epoch": epoch, "step": step, **{key: flat[key] for key in STAGE_KEYS}}


def _changed(state: dict[str, Any], config: Config) -> dict[str, Any]:
    """The settings of a continued run that differ from before."""
    was = flatten(complete(config_from_dict(state["config"])).to_dict())
    now = flatten(config.to_dict())
    return {key: now[key] for key in STAGE_KEYS if was[key] != now[key]}
