"""A whole run: settings in, a finished run folder out."""

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from tqdm.contrib.logging import logging_redirect_tqdm

from vae_torch import data
from vae_torch.callbacks import callbacks as named
from vae_torch.checkpoint import Checkpoints
from vae_torch.config import Config, ConfigError, check
from vae_torch.files import remove_scratch, write_atomically
from vae_torch.machine import (
    BusyCores,
    bf16_factor,
    device_name,
    resolve_device,
    set_products,
    slow_bf16,
    tune_cpu,
)
from vae_torch.parts.complete import complete
from vae_torch.parts.registry import load_plugins
from vae_torch.runs.folders import LOCK
from vae_torch.runs.identity import refuse_other_code, versions
from vae_torch.runs.origin import origin_line, start_from
from vae_torch.runs.records import Records
from vae_torch.runs.signals import StopSignals
from vae_torch.runs.stages import (
    begin_stage,
    early_line,
    goes_on,
    growth_is_due,
    load_stage,
    stopped_early,
)
from vae_torch.training.loop import Callback, train
from vae_torch.vae import VAE

Judge = Callable[[dict[str, Any], VAE], None]

log = logging.getLogger("vae_torch")


def run(
    config: Config,
    run_dir: str | Path,
    *,
    callbacks: Sequence[Callback] = (),
    judges: Sequence[Judge] = (),
    signals: StopSignals | None = None,
) -> dict[str, Any]:
    """Make a whole run: data, model, training, records and pictures, in a folder of its own.

    With `config.train.resume` set, the run in `run_dir` is resumed; if it is finished, its summary
    is returned. Without it the folder must hold no run. With a folder as `config.train.resume` and
    more `config.train.epochs`, a finished run continues. In the main thread, Ctrl-C and SIGTERM end
    the run after a checkpoint. Sets torch's seed, threads and precision of matrix multiplications
    for the whole process.

    Args:
        config: From `vae_torch.compose`, or a `Config` of your own.
        run_dir: The run's folder; made if absent.
        callbacks: Each is called after every epoch with its metrics and the model they belong to,
            and may add metrics or end the run: see `train`.
        judges: The same, called once the epoch is on record. StoppedError from one ends the run.
        signals: Already entered, for a caller who needs to know which signal came.

    Returns:
        What `summary.json` holds: final metrics, versions, seconds, settings.

    Raises:
        ConfigError: A setting is not allowed, or the folder is in use or holds another run.
        DataError: The images are not available.
        CheckpointError: The run to resume is damaged, or has other settings or images.
        DivergedError: The loss became NaN or infinite.
        StoppedError: A signal or a callback ended the run; a checkpoint keeps what was done.
        OSError: The folder can no longer be written.
    """
    if signals is None:
        with StopSignals() as signals:
            return run(config, run_dir, callbacks=callbacks, judges=judges, signals=signals)
    check(config)
    load_plugins(config.plugins)
    config = complete(config)
    run_dir = Path(run_dir).expanduser()
    run_dir.mkdir(parents=True, exist_ok=True)
    # a killed run takes a moment to end before it can be resumed
    with lock_run(run_dir, seconds=10 if config.train.resume else 0):
        if not config.train.resume:
            refuse_other_run(run_dir)
        elif (run_dir / "summary.json").exists() and not goes_on(run_dir, config):
            log.info("finished already: %s", run_dir)
            return finished_summary(run_dir, config)
        remove_scratch(run_dir)  # left by a killed process
        with ExitStack() as stack:
            known = {"config": config, "run_dir": run_dir}
            own = [named.build(name, {}, context=known) for name in config.train.callbacks]
            watching = [*callbacks, *map(stack.enter_context, own)]
            return _run(config, run_dir, watching, judges, signals)


def _run(
    config: Config,
    run_dir: Path,
    callbacks: Sequence[Callback],
    judges: Sequence[Judge],
    signals: StopSignals,
) -> dict[str, Any]:
    device = _prepare_machine(config)
    train_loader, test_loader = data.loaders_of(config, device)
    train_set, test_set = (data.image_dataset(loader) for loader in (train_loader, test_loader))
    hashes = {"train": data.data_hash(train_loader), "test": data.data_hash(test_loader)}
    classes = data.classes_of(train_loader, test_loader) if config.model.conditional else None
    vae = VAE.from_config(config, data.shape_of(train_loader), classes).to(device)
    _warn_of_pixels(config, train_set)
    if config.model.mean_bias:
        vae.init_output_bias(train_set.mean())
    kept = _to_be_kept(config)
    checkpoints = Checkpoints(
        run_dir / "checkpoints",
        kept,
        every=config.train.checkpoint_every,
        data_sha256=hashes,
        versions=versions(),
        input_shape=vae.input_shape,
        classes=classes,
    )
    state = load_stage(checkpoints, config) if config.train.resume else None
    if state:
        refuse_other_code(
            state.get("versions"),
            path=run_dir / "checkpoints" / "last.pt",
            allowed=config.train.allow_other_code,
        )
        begin_stage(checkpoints, state)
    elif config.train.init_from:
        checkpoints.started_from = start_from(vae, kept)
        say("%s", origin_line(checkpoints.started_from))
    config_text = yaml.safe_dump(kept.to_dict(), sort_keys=False)
    write_atomically(run_dir / "config.yaml", config_text.encode())
    records = Records(
        run_dir,
        kept,
        config_text=config_text,
        history=state["history"] if state else None,
        class_names=test_set.classes,
    )
    x, labels = test_set.first(min(5000, max(10, 2**26 // math.prod(vae.input_shape))))  # to draw
    images = f"{len(train_set)} training and {len(test_set)} {judged_on(config)} images"
    say("%s: %s, on %s", config.data.name, images, device_name(device))
    if state:
        where = f", step {state['step']}" if state["step"] else ""
        say("resuming after epoch %d%s: %s", state["epoch"], where, run_dir)
    density = f"likelihood={config.likelihood}"
    busy = BusyCores(torch.get_num_threads() if device.type == "cpu" else 1)

    def record(metrics: dict[str, Any], model: VAE) -> None:
        epoch, every = metrics["epoch"], config.train.figure_every
        last = epoch == config.train.epochs
        records.log(metrics)
        say("%s", epoch_line(metrics, config, len(train_set)))
        if last and metrics["test/elbo"] > 0:
            say("The elbo is positive: %s is a density of pixels, which can exceed 1.", density)
        if hint := busy.hint():
            log.warning("%s", hint)
        with signals.at_once("drawing the figures"):
            if last or (every and epoch % every == 0):
                records.figures(epoch, model, x, labels)
            if last or growth_is_due(config, epoch):
                records.growth(epoch, model, x, labels)
        for judge in judges:
            judge(metrics, model)

    try:
        with logging_redirect_tqdm(), signals.while_training():
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
                monitor=config.train.monitor,
                callbacks=callbacks,
                patience=config.train.patience,
                min_delta=config.train.min_delta,
                log=record,
                checkpoints=checkpoints,
                stop=signals.received,
            )
        facts: dict[str, Any] = {"device": device_name(device), "data_sha256": hashes}
        if early := stopped_early(history, config):
            say("%s", early_line(early))
            facts["stopped_early"] = early
            with signals.at_once("drawing the figures"):  # no epoch knew that it would be the last
                records.figures(early["after_epoch"], vae, x, labels)
                records.growth(early["after_epoch"], vae, x, labels)
        records.projector(vae, x[:2000], None if labels is None else labels[:2000])
        if checkpoints.started_from:
            facts["started_from"] = checkpoints.started_from
        if checkpoints.stages:
            facts["stages"] = checkpoints.stages
        return records.finish(history, facts)
    finally:
        with suppress(OSError):  # a full disk, which another message reports
            records.close()


def _has_bf16(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _prepare_machine(config: Config) -> torch.device:
    """Set threads, precision and torch's seed; warn of settings that are slow or useless here."""
    device = resolve_device(config.device)
    tune_cpu(config.threads)
    set_products(config.precision, device)
    if config.precision == "bf16" and device.type == "cpu" and (factor := bf16_factor()) > 1:
        log.warning(slow_bf16(factor))
    if config.precision == "bf16" and device.type == "cuda" and not _has_bf16(device):
        log.warning(
            "precision=bf16: %s has no bf16 arithmetic and emulates it slowly; use precision=fp16",
            device_name(device),
        )
    if config.train.epochs <= (early := config.objective.early_epochs):
        log.warning("objective.early_epochs=%d: the run has no epoch of more samples", early)
    torch.manual_seed(config.seed)  # for the initial weights; everything else has its own generator
    return device


def _warn_of_pixels(config: Config, images: data.ImageDataset) -> None:
    """Warn of colours under `bernoulli`, and of other pixels than 0 and 1 under `pixelcnn`."""
    if config.data.binarize != "none":
        return
    if config.likelihood == "bernoulli" and len(images.shape) == 3 and images.shape[0] == 3:
        log.warning(
            "likelihood=bernoulli with colour images is not a density of colours; use "
            "likelihood=discretized_logistic or gaussian"
        )
    if config.likelihood == "pixelcnn":
        x, _ = images.first(100)
        if not ((x == 0) | (x == 1)).all():
            log.warning(
                "likelihood=pixelcnn draws black and white pixels, and these images have others; "
                "use data.binarize=dynamic, or likelihood=discretized_logistic"
            )


def _to_be_kept(config: Config) -> Config:
    """The settings as the run's files keep them: with an absolute path to the images."""
    root = str(Path(config.data.root).absolute())
    return replace(
        config,
        data=replace(config.data, root=root),
        train=replace(config.train, resume=None),  # how it was started this time is not part of it
    )


def say(line: str, *values: object) -> None:
    """Print a line of a run's report; jobs that run side by side print only their last one."""
    level = logging.DEBUG if "TQDM_DISABLE" in os.environ else logging.INFO
    log.log(level, line, *values)


def judged_on(config: Config) -> str:
    """The name of the images behind a run's `test/...` metrics."""
    return "held-out" if config.data.hold_out else "test"


def epoch_line(metrics: dict[str, Any], config: Config, images: int) -> str:
    """The line that a run prints after an epoch; nats per image."""
    speed = metrics["train/images_per_second"]  # 0 if a run resumes after the last step
    judged = judged_on(config)
    of = "elbo" if "train/elbo" in metrics else "loss"  # not every objective computes it
    bits = metrics.get("test/bits_per_dim")
    return (
        f"epoch {metrics['epoch']:3d}/{config.train.epochs}"
        f"   train {of} {metrics[f'train/{of}']:8.2f}   {judged} elbo {metrics['test/elbo']:8.2f}"
        f" = reconstruction {metrics['test/reconstruction']:8.2f} - kl {metrics['test/kl']:.2f}"
        + ("" if bits is None else f"   {bits:.3f} bits per dim")
        + f"   {images / speed if speed else 0.0:.1f} s"
    )


def lock_run(run_dir: Path, *, seconds: float = 0) -> AbstractContextManager[Any]:
    """Lock the run's folder for this process, waiting up to `seconds`.

    The same process may lock it several times.
    """
    lock = FileLock(run_dir.absolute() / LOCK, is_singleton=True)
    try:
        return lock.acquire(timeout=seconds)
    except Timeout:
        raise ConfigError(f"{run_dir}: another process is writing this run; wait for it") from None


def refuse_other_run(run_dir: Path) -> None:
    """A new run needs a folder without a run."""
    if (run_dir / "summary.json").exists():
        raise ConfigError(f"{run_dir}: holds a finished run; choose another folder")
    if (run_dir / "metrics.jsonl").exists():
        raise ConfigError(
            f"{run_dir}: holds an unfinished run; add train.resume=auto to resume it, or choose "
            "another folder"
        )


def finished_summary(run_dir: Path, config: Config) -> dict[str, Any]:
    """The summary of a finished run, if it is this run, undamaged and made by this code."""
    path = run_dir / "summary.json"
    state = Checkpoints(run_dir / "checkpoints", config).load("cpu")  # sealed: nobody has edited it
    try:
        summary: dict[str, Any] = json.loads(path.read_text("utf-8"))
        elbo, had = float(summary["final"]["test/elbo"]), summary["versions"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: damaged; remove its folder to run it again") from None
    if (
        state is None
        or (state["epoch"] < config.train.epochs and not stopped_early(state["history"], config))
        or state["history"]["test/elbo"][-1] != elbo
    ):
        raise ConfigError(
            f"{path}: does not fit the checkpoint beside it; remove its folder to run it again"
        )
    refuse_other_code(had, path=path, allowed=config.train.allow_other_code)
    return summary
