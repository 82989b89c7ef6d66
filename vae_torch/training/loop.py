"""The training loop."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vae_torch.bars import StepBar
from vae_torch.checkpoint import Checkpoints
from vae_torch.config import (
    CHOICES,
    ConfigError,
    ObjectiveConfig,
    OptimizerConfig,
    check_objective,
    check_optimizer,
)
from vae_torch.data import Data, as_batch, as_loader, batches_in
from vae_torch.evaluation.bounds import bound_metrics
from vae_torch.images import as_images, check_pixels
from vae_torch.parts.objectives import Objective, as_objective, draw_noise, monitor_of
from vae_torch.training.averaging import AveragedWeights
from vae_torch.training.errors import ADVICE, DivergedError, EndRun, StoppedError
from vae_torch.training.progress import Metrics, Progress, plain
from vae_torch.training.schedules import beta_at, learning_rate, samples_at
from vae_torch.training.step import (
    Step,
    captured_step,
    check_precision,
    compiled_step,
    eager_step,
    make_optimizer,
)
from vae_torch.vae import VAE

# An epoch's metrics and the model they belong to -> metrics to add, or nothing.
Callback = Callable[[Metrics, VAE], Mapping[str, Any] | None]

# All of a model's parameters -> an optimiser of your own.
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

_DEFAULT_ADAM = OptimizerConfig(name="adam", lr=1e-3, eps=1e-8, schedule="constant")


def train(
    vae: VAE,
    train_loader: Data,
    test_loader: Data | None = None,
    *,
    epochs: int = 50,
    objective: ObjectiveConfig | Objective | None = None,
    optimizer: OptimizerConfig | MakeOptimizer | None = None,
    schedule: Callable[[float], float] | None = None,
    ema: float = 0.0,
    precision: str = "fp32",
    compile: bool = False,
    seed: int = 0,
    monitor: str = "auto",
    callbacks: Sequence[Callback] = (),
    patience: int | None = None,
    min_delta: float = 0.0,
    log: Callable[[Metrics, VAE], None] | None = None,
    checkpoints: Checkpoints | None = None,
    stop: Callable[[], bool] | None = None,
) -> dict[str, list[Any]]:
    """Train `vae` in place and return its history.

    Data order and noise of every epoch are seeded by (seed, epoch). A run resumes from its
    checkpoint with the same bits as an uninterrupted run, also in the middle of an epoch.

    Args:
        vae: The model, on the device to train on.
        train_loader: One of `mnist_loaders`; another iterable of batches x, [x] or (x, label, ...)
            with x (B, *shape) in [0, 1]; or all images as one tensor or array, bytes or floats in
            [0, 1], which are shuffled and cut into batches of 128.
        test_loader: The same, for validation. Without it there are no `test/...` metrics and no
            `best.pt`.
        epochs: Passes over the training images.
        objective: What to minimise; the ELBO if absent. Settings, or any `Objective`: a function
            of the model, a batch, its noise and the KL's weight that returns a loss per image.
        optimizer: Adam with a learning rate of 1e-3 if absent. Settings, or a function from all
            parameters to an optimiser: `lambda parameters: torch.optim.RMSprop(parameters, 1e-4)`.
        schedule: The learning rate as a function of finished epochs, such as 3.5 in the middle of
            the fourth (whole numbers if the loader has no length). It replaces the settings'
            schedule and holds for all groups of an optimiser of your own. Without it, an optimiser
            of your own keeps its learning rates.
        ema: Decay per step of averaged weights, which are evaluated, logged and kept at the end.
        precision: `bf16` runs matrix multiplications under autocast; `fp16` does so with a gradient
            scaler, uncaptured, for CUDA cards without bf16. Otherwise everything is fp32, as exact
            as `torch.set_float32_matmul_precision` says (convolutions on CUDA:
            `torch.backends.cudnn`). `medium` changes nothing here unless the caller has set it in
            torch, as `scripts/train.py` does.
        compile: Loss, gradient and optimiser as one graph (torch.compile; on CUDA a CUDA graph).
        seed: Seed of the noise, and of the order of images given as one tensor or array.
        monitor: The metric by which `checkpoints` keep the best epoch: see `parts.metrics`. `auto`
            is the bound that is trained.
        callbacks: Each is called after every epoch with its metrics and the model they belong to.
            What it returns is added to the metrics, under names such as `test/mse`. It may raise
            `EndRun` to end the run.
        log: Called afterwards with all metrics of the epoch. It may raise StoppedError, like
            `stop`.
        patience: Epochs without a gain in the monitored metric after which training ends.
        min_delta: An improvement must exceed this to count as a gain; also for schedule=plateau.
        checkpoints: Where to keep the state, and where to continue from. Continuing inside an epoch
            needs the loaders of `mnist_loaders`.
        stop: Called after every step; if it returns true, a checkpoint is written and training
            ends.

    Returns:
        One list per metric, an entry per epoch: `train/loss`, `test/loss`, `train/elbo`, ...;
        nats per image. None marks an epoch without a metric that another epoch has.

    Raises:
        DivergedError: The loss is NaN or infinite; the message names epoch, step and term.
        StoppedError: `stop` returned true.
        CheckpointError: What `checkpoints` holds is damaged, or belongs to another run.
        ConfigError: The settings of objective, optimiser, schedule or compilation do not fit each
            other, the model, the loaders or this torch.
        ValueError: No epoch, no image, patience without test images, an unknown precision, images
            of another shape than the model's, pixels outside [0, 1], or an iterator that can be
            read only once.
    """
    if precision not in CHOICES["precision"]:
        raise ValueError(
            f"precision is {precision!r}; it must be one of {', '.join(CHOICES['precision'])}"
        )
    weight = next(vae.parameters())
    device, dtype = weight.device, weight.dtype
    check_precision(precision, device, compile=compile)
    if patience is not None and (patience < 1 or test_loader is None):
        raise ValueError(
            f"patience is {patience}; it must be 1 or more, and needs a test_loader to judge by"
        )
    batches, tests, steps = _loaders(vae, train_loader, test_loader, epochs, seed)
    asked = objective or ObjectiveConfig()
    scheduled = asked if isinstance(asked, ObjectiveConfig) else ObjectiveConfig()
    check_objective(scheduled)
    minimise = as_objective(asked)
    scheduled = replace(scheduled, num_samples=getattr(minimise, "num_samples", 1))
    own = None if isinstance(optimizer, OptimizerConfig) else optimizer
    settings = optimizer if isinstance(optimizer, OptimizerConfig) else _DEFAULT_ADAM
    _check_optimizer(settings, steps, judged=test_loader is not None)
    if own and compile:
        raise ConfigError(
            "compile=true compiles Adam, AdamW and SGD from settings; with an optimizer of your "
            "own use compile=false"
        )
    if schedule and (settings.schedule != "constant" or settings.warmup_steps):
        raise ConfigError(
            f"a schedule is given beside optimizer.schedule={settings.schedule} and "
            f"optimizer.warmup_steps={settings.warmup_steps}; use one of them"
        )
    opt = own(list(vae.parameters())) if own else make_optimizer(vae, settings)
    averaged = AveragedWeights(vae, ema) if ema else None
    evaluated = averaged.module if averaged else vae
    monitor = monitor_of(minimise) if monitor == "auto" else monitor
    # torch's own first scale, 65536, overflows where the loss is hundreds of nats
    scaler = torch.amp.GradScaler(device.type, init_scale=1024, enabled=precision == "fp16")
    run = Progress(vae, averaged, opt, batches, seed, monitor=monitor, scaler=scaler)
    if checkpoints:
        run.resume(checkpoints)
    # a captured step keeps the learning rate that it was captured with, unless that is a tensor
    captures = device.type == "cuda" and not own and precision != "fp16"
    how = "compile" if compile else "capture" if captures else "eager"
    take_step = _step(
        vae, opt, minimise, precision, batches, scaler, clip_norm=settings.clip_norm, how=how
    )

    def lr_at(step: int) -> float | None:
        if schedule:
            return schedule(run.epoch + (step / steps if steps else 0))
        if own:
            return None
        return learning_rate(
            settings, run.epoch, step, epochs=epochs, steps=steps, since=run.since, falls=falls
        )

    bar = StepBar(epochs, steps)
    while run.epoch < epochs and not run.has_stalled(patience, min_delta):
        began, first, ended = time.perf_counter(), run.step, False
        vae.train()
        beta = beta_at(scheduled, run.epoch)
        beta_tensor = torch.tensor(beta, device=device)  # a float would recompile in every epoch
        samples = samples_at(scheduled, run.epoch)
        falls = run.falls(settings, min_delta)
        run.begin_epoch()
        bar.begin_epoch(run.epoch, run.step)
        try:
            for loaded in batches:
                batch = as_batch(loaded, device, dtype)  # x (B, *shape), y (B,) or None
                if run.order is None:  # not our loader: unchecked images
                    check_pixels(as_images(batch.x, vae.input_shape))
                    vae.of(batch)  # checks the labels, which no captured step can
                noise = draw_noise(minimise, samples, len(batch.x), vae.latent_dim, run.noise)
                means = take_step(batch, noise, beta_tensor, lr_at(run.step))
                if averaged:
                    averaged.update()

                run.count(len(batch.x), means)
                if run.step % 50 == 0 or run.step == steps:
                    bar.show(run.step, run.means()["loss"])
                if stop and stop():
                    of = f" of {steps}" if steps else ""
                    raise StoppedError(f"epoch {run.epoch + 1}, step {run.step}{of}")
                if checkpoints and checkpoints.due():
                    checkpoints.save(run.to_dict())

            seconds = time.perf_counter() - began
            metrics: Metrics = {
                "epoch": run.epoch + 1,
                **_means(run, evaluated, tests, minimise, samples, beta, stop),
                "train/beta": beta,
                "train/lr": float(opt.param_groups[0]["lr"]) if own else lr_at(run.step - 1),
                "train/images_per_second": sum(run.sizes[first:]) / seconds,
                "seconds": time.perf_counter() - began,  # evaluation included
            }
            for callback in callbacks:
                try:
                    metrics |= callback(dict(metrics), evaluated) or {}
                except EndRun:
                    ended = True
            if log:  # if it stops here, the resumed run evaluates and logs the epoch again
                log(metrics, evaluated)
        except StoppedError:
            bar.close()
            if checkpoints:
                checkpoints.save(run.to_dict())
            raise
        improved = run.end_epoch(metrics)
        if checkpoints:
            ended = ended or run.has_stalled(patience, min_delta)
            final = ended or run.epoch == epochs
            checkpoints.save_epoch(run.to_dict(), best=improved, final=final)
        if ended:
            break
    bar.close()
    vae.eval()
    if averaged:
        vae.load_state_dict(evaluated.state_dict())
    return {name: [plain(value) for value in values] for name, values in run.history.items()}


def _loaders(
    vae: VAE, train_loader: Data, test_loader: Data | None, epochs: int, seed: int
) -> tuple[Iterable[Any], Iterable[Any] | None, int | None]:
    """Training batches, test batches, and the number of the former, if known."""
    device = next(vae.parameters()).device
    batches = as_loader(train_loader, vae.input_shape, shuffle=True, seed=seed, device=device)
    tests = test_loader
    if tests is not None:
        tests = as_loader(tests, vae.input_shape, batch_size=1000, device=device)
    steps, test_steps = batches_in(batches), None if tests is None else batches_in(tests)
    if epochs < 1 or 0 in (steps, test_steps):
        raise ValueError(
            f"epochs={epochs}, {steps} training batches and {test_steps} test batches: each must "
            "be 1 or more"
        )
    return batches, tests, steps


def _check_optimizer(settings: OptimizerConfig, steps: int | None, *, judged: bool) -> None:
    check_optimizer(settings)
    if settings.schedule == "plateau" and not judged:
        raise ConfigError(
            "optimizer.schedule=plateau without a test_loader: it needs images to judge by; give "
            "one, or use optimizer.schedule=step"
        )
    counted = settings.schedule in ("cosine", "one_cycle")
    if steps is None and (counted or settings.warmup_steps):
        name, other = ("schedule", "constant") if counted else ("warmup_steps", 0)
        raise ConfigError(
            f"optimizer.{name}={getattr(settings, name)} with a loader that does not know its "
            f"length: it needs the number of steps; use optimizer.{name}={other}, or give the "
            "loader a __len__"
        )


def _step(
    vae: VAE,
    opt: torch.optim.Optimizer,
    objective: Objective,
    precision: str,
    batches: Iterable[Any],
    scaler: torch.amp.GradScaler,
    *,
    clip_norm: float | None,
    how: str,
) -> Step:
    # not read from the first batch: that of a resumed run may be the last of an epoch
    size = getattr(getattr(batches, "batch_sampler", None), "batch_size", None)
    if how == "compile":
        return compiled_step(vae, opt, objective, precision, clip_norm=clip_norm, batch_size=size)
    if how == "capture":
        return captured_step(vae, opt, objective, precision, clip_norm=clip_norm, batch_size=size)
    return eager_step(vae, opt, objective, precision, clip_norm=clip_norm, scaler=scaler)


def _means(
    run: Progress,
    evaluated: VAE,
    tests: Iterable[Any] | None,
    objective: Objective,
    samples: int,
    beta: float,
    stop: Callable[[], bool] | None,
) -> Metrics:
    """The epoch's `train/...` and `test/...`, in nats per image.

    Raises:
        DivergedError: A loss is NaN or infinite.
        ValueError: There was no batch.
    """
    if run.step == 0:
        raise ValueError(
            f"epoch {run.epoch + 1}: the training loader gave no batch; it must give all images "
            "in every epoch"
        )
    means = run.means()
    test: Metrics = {}
    evaluated.eval()
    if tests is None:
        run.refuse_broken_weights()
    else:

        def measured(samples: int | None, beta: float) -> Metrics:
            batches = _until(stop, tests)
            return bound_metrics(
                evaluated, batches, objective, num_samples=samples, beta=beta, seed=run.seed
            )

        test = measured(samples, beta)
        if name := getattr(objective, "bound_name", None):  # comparable across epochs
            final = samples == getattr(objective, "num_samples", samples) and beta == 1
            test[name] = -(test if final else measured(None, 1.0))["loss"]
    if not math.isfinite(test.get("loss", 0.0)):
        raise DivergedError(
            f"epoch {run.epoch + 1}: the test loss is {test['loss']} after the last step, "
            f"the training loss was {means['loss']:.6g}; {ADVICE}"
        )
    train = {f"train/{name}": value for name, value in means.items()}
    return train | {f"test/{name}": value for name, value in test.items()}


def _until(stop: Callable[[], bool] | None, loader: Iterable[Any]) -> Iterator[Any]:
    """The loader's batches until `stop` returns true: a signal does not wait for an evaluation."""
    for batch in loader:
        if stop and stop():
            raise StoppedError("during the evaluation")
        yield batch
