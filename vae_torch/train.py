"""The training loop."""

import logging
import math
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from vae_torch.checkpoint import CheckpointError, Checkpoints
from vae_torch.config import (
    CHOICES,
    ConfigError,
    ObjectiveConfig,
    OptimizerConfig,
    check_objective,
    check_optimizer,
)
from vae_torch.data import Data, EpochBatches, as_loader, batches_in, images_of, mix_seed
from vae_torch.evaluate import bound_metrics
from vae_torch.likelihood import as_images, check_pixels
from vae_torch.model import VAE
from vae_torch.step import TERMS, compiled_step, eager_step, make_optimizer

Metrics = dict[str, Any]

_log = logging.getLogger("vae_torch")

_ADVICE = "try a smaller optimizer.lr, precision=fp32, or objective.beta_warmup_epochs"
_NOISE = 2  # tells the noise of z from the data order, which is seeded by (seed, epoch) too
_DEFAULT_ADAM = OptimizerConfig(name="adam", lr=1e-3, eps=1e-8, schedule="constant")


class DivergedError(ArithmeticError):
    """The loss is no number any more."""


class StoppedError(Exception):
    """`stop` or `log` asked the loop to end; what was done so far is in the checkpoint."""


def train(
    vae: VAE,
    train_loader: Data,
    test_loader: Data | None = None,
    *,
    epochs: int = 50,
    objective: ObjectiveConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    ema: float = 0.0,
    precision: str = "fp32",
    compile: bool = False,
    seed: int = 0,
    log: Callable[[Metrics, VAE], None] | None = None,
    checkpoints: Checkpoints | None = None,
    stop: Callable[[], bool] | None = None,
) -> dict[str, list[Any]]:
    """Train `vae` in place and return its history.

    Every epoch's data order and noise are seeded by (seed, epoch). A run continues from its
    checkpoint, in the middle of an epoch too, with the bits that it would have had.

    Args:
        vae: The model, on the device to train on.
        train_loader: One of `mnist_loaders`; another iterable of batches x, [x] or (x, label, ...)
            with x (B, *shape) in [0, 1]; or all images as one tensor or array, bytes or floats in
            [0, 1], which are shuffled and cut into batches of 128.
        test_loader: The same, for validation. Without it there are no `test/...` metrics and no
            `best.pt`: nothing tells which epoch is the best.
        epochs: Passes over the training images.
        objective: What to minimise; the ELBO when absent.
        optimizer: Adam with a learning rate of 1e-3 when absent.
        ema: Decay per step of averaged weights; they are evaluated, logged and kept in the end.
        precision: `bf16` for autocast matrix products; else tensors and products are fp32, as
            exact as `torch.set_float32_matmul_precision` says (convolutions on CUDA:
            `torch.backends.cudnn`): `medium` does nothing here unless the caller has asked torch
            for it, as `scripts/train.py` does.
        compile: Loss, gradient and optimiser as one graph (torch.compile; on CUDA a CUDA graph).
        seed: Of the noise, and of the order of images that come as one tensor or array.
        log: Called after every epoch with its metrics and the model they belong to. It may raise
            StoppedError, as `stop` does.
        checkpoints: Where to keep the state, and where to continue from. Continuing inside an epoch
            needs the loaders of `mnist_loaders`.
        stop: Asked after every step; when true, a checkpoint is written and the loop ends.

    Returns:
        One list per metric, an entry per epoch: `train/loss`, `test/loss`, `train/elbo`, ...;
        nats per image. None stands where an epoch lacks a metric that another has.

    Raises:
        DivergedError: The loss is NaN or infinite: says in which epoch, step and term.
        StoppedError: `stop` said so.
        CheckpointError: What `checkpoints` holds is damaged, or of another run.
        ConfigError: The objective has options that it would ignore or that do not go with the
            model, the optimiser has some that mean nothing, torch is too old to compile, or a
            cosine schedule meets a loader that does not know its length.
        ValueError: No epoch, no image, an unknown precision, images of another shape than the
            model's, pixels outside [0, 1], or an iterator, which ends with the first epoch.
    """
    if precision not in CHOICES["precision"]:
        raise ValueError(f"precision is {precision!r}; known are {', '.join(CHOICES['precision'])}")
    device = next(vae.parameters()).device
    batches = as_loader(train_loader, vae.input_shape, shuffle=True, seed=seed, device=device)
    tests = test_loader
    if tests is not None:
        tests = as_loader(tests, vae.input_shape, batch_size=1000, device=device)
    steps, test_steps = batches_in(batches), None if tests is None else batches_in(tests)
    if epochs < 1 or 0 in (steps, test_steps):
        raise ValueError(
            f"epochs={epochs}, {steps} batches to train on and {test_steps} to test on: each must "
            "be 1 or more"
        )
    objective = objective or ObjectiveConfig()
    check_objective(objective, likelihood=vae.likelihood.name, prior=vae.prior.name)
    settings = optimizer or _DEFAULT_ADAM
    check_optimizer(settings)
    if steps is None and settings.schedule != "constant":
        raise ConfigError(
            f"optimizer.schedule={settings.schedule} with a loader that does not know its length: "
            "it needs the number of steps; use optimizer.schedule=constant, or give the loader a "
            "__len__"
        )
    opt = make_optimizer(vae, settings)
    averaged = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(ema)) if ema else None
    evaluated: VAE = averaged.module if averaged else vae  # type: ignore[assignment]
    run = _Progress(vae, averaged, opt, batches, seed)
    if checkpoints and (state := checkpoints.load(device)):
        try:
            run.load(state)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{checkpoints.folder}/last.pt: {error!r}"[:300]) from None

    take_step = eager_step(vae, opt, objective, precision)
    if compile:
        # not learned from the first batch: a continued run's may be the last of an epoch
        size = getattr(getattr(batches, "batch_sampler", None), "batch_size", None)
        take_step = compiled_step(vae, opt, objective, precision, batch_size=size)

    total = None if steps is None else epochs * steps
    taken = run.epoch * (steps or 0) + run.step
    bar = tqdm(total=total, initial=taken, disable=None, unit="step", leave=False)
    dtype = next(vae.parameters()).dtype
    while run.epoch < epochs:
        began, first = time.perf_counter(), run.step
        beta = beta_at(objective, run.epoch)
        epoch_objective = replace(objective, num_samples=samples_at(objective, run.epoch))
        beta_tensor = torch.tensor(beta, device=device)  # a float would be compiled every epoch
        run.begin_epoch()

        try:
            for batch in batches:
                x = images_of(batch)
                if run.order is None:  # not our loader, which makes no others
                    check_pixels(as_images(x, vae.input_shape))
                x = x.to(device, dtype, non_blocking=True)
                shape = (epoch_objective.num_samples, len(x), vae.latent_dim)
                eps = torch.randn(shape, generator=run.noise, device=device)
                choice = None
                if objective.resample:
                    choice = torch.rand(len(x), generator=run.noise, device=device)
                progress = (run.epoch + run.step / steps) / epochs if steps else 0.0
                lr = settings.lr * lr_factor(settings.schedule, progress)
                terms = take_step(x, eps, choice, beta_tensor, lr)
                if averaged:
                    averaged.update_parameters(vae)

                run.count(len(x), terms)
                taken += 1
                if run.step % 50 == 0 or run.step == steps:
                    loss = run.means()["loss"]
                    bar.update(taken - bar.n)
                    bar.set_description(f"epoch {run.epoch + 1}/{epochs}", refresh=False)
                    bar.set_postfix_str(f"train loss {loss:.2f}", refresh=False)
                if stop and stop():
                    of = f" of {steps}" if steps else ""
                    raise StoppedError(f"epoch {run.epoch + 1}, step {run.step}{of}")
                if checkpoints and checkpoints.due():
                    checkpoints.save(run.to_dict())

            if run.step == 0:
                raise ValueError(
                    f"epoch {run.epoch + 1}: the training loader gave no batch; it must give the "
                    "images anew in every epoch"
                )
            seconds = time.perf_counter() - began
            means = run.means()
            test: Metrics = {}
            if tests is None:
                run.refuse_broken_weights()
            else:
                test = bound_metrics(
                    evaluated, _until(stop, tests), epoch_objective, beta=beta, seed=seed
                )
            if not math.isfinite(test.get("loss", 0.0)):
                raise DivergedError(
                    f"epoch {run.epoch + 1}: the test loss is {test['loss']} after the last step, "
                    f"the training loss was {means['loss']:.6g}; {_ADVICE}"
                )
            metrics: Metrics = {
                "epoch": run.epoch + 1,
                **{f"train/{name}": value for name, value in means.items()},
                **{f"test/{name}": value for name, value in test.items()},
                "train/beta": beta,
                "train/lr": opt.param_groups[0]["lr"],
                "train/images_per_second": sum(run.sizes[first:]) / seconds,
                "seconds": time.perf_counter() - began,  # evaluation included
            }
            if log:  # asked to stop in it, a continued run evaluates and logs the epoch again
                log(metrics, evaluated)
        except StoppedError:
            bar.close()
            if checkpoints:
                checkpoints.save(run.to_dict())
            raise
        improved = run.end_epoch(metrics)
        if checkpoints:
            checkpoints.save_epoch(run.to_dict(), best=improved, final=run.epoch == epochs)
    bar.close()
    if averaged:
        vae.load_state_dict(evaluated.state_dict())
    return {name: [_plain(value) for value in values] for name, values in run.history.items()}


class _Progress:
    """How far a run has come: all that a checkpoint keeps, so that the rest is the same bits."""

    def __init__(
        self,
        vae: VAE,
        averaged: AveragedModel | None,
        optimizer: torch.optim.Optimizer,
        loader: Iterable[Any],
        seed: int,
    ) -> None:
        device = next(vae.parameters()).device
        self.vae, self.averaged, self.optimizer = vae, averaged, optimizer
        order = getattr(loader, "batch_sampler", None)
        self.order = order if isinstance(order, EpochBatches) else None
        self.seed = seed
        self.epoch = 0  # finished ones
        self.step = 0  # of the epoch under way
        self.best = -math.inf
        self.history: dict[str, list[Any]] = {}  # of many numbers an epoch: as arrays
        self.noise = torch.Generator(device)
        # loss, reconstruction and kl of the epoch's steps: on the device, to be read rarely
        self.record = torch.zeros(batches_in(loader) or 100, 3, device=device)
        self.sizes: list[int] = []  # images of these steps

    def begin_epoch(self) -> None:
        """Seed the epoch's order and noise, unless `load` has just put them in its middle."""
        if self.step == 0:
            self.sizes = []
            self.noise.manual_seed(mix_seed(self.seed, self.epoch, _NOISE))
            if self.order:
                self.order.set_epoch(self.epoch)

    def count(self, images: int, terms: Tensor) -> None:
        """One step is done, with these means of TERMS."""
        if self.step == len(self.record):  # a loader that did not know its length
            self.record = torch.cat([self.record, torch.zeros_like(self.record)])
        self.record[self.step] = terms
        self.sizes.append(images)
        self.step += 1

    def means(self) -> dict[str, float]:
        """Over the images of the epoch so far.

        Raises:
            DivergedError: A step's loss was NaN or infinite.
        """
        steps = self.record[: self.step].double().cpu()
        bad = (~steps.isfinite()).any(1).nonzero()
        if len(bad):
            at = int(bad[0])
            now, last = (
                ", ".join(f"{n} {v:.6g}" for n, v in zip(TERMS, row.tolist(), strict=True))
                for row in (steps[at], steps[max(at - 1, 0)])
            )
            before = f" (the step before: {last})" if at else ""
            raise DivergedError(f"epoch {self.epoch + 1}, step {at + 1}: {now}{before}; {_ADVICE}")
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        loss, reconstruction, kl = ((sizes @ steps) / sizes.sum()).tolist()
        return {
            "loss": loss,
            "elbo": reconstruction - kl,
            "reconstruction": reconstruction,
            "kl": kl,
        }

    def end_epoch(self, metrics: Metrics) -> bool:
        """Add to the history; whether the test elbo, where there is one, is the best so far."""
        for name in [*self.history, *(name for name in metrics if name not in self.history)]:
            values = self.history.setdefault(name, [None] * self.epoch)
            values.append(_compact(metrics.get(name)))
        elbo = metrics.get("test/elbo", -math.inf)
        improved = bool(elbo > self.best)
        self.best = max(self.best, elbo)
        self.epoch, self.step = self.epoch + 1, 0
        return improved

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint.

        Raises:
            DivergedError: There is nothing worth keeping.
        """
        evaluated = self.averaged.module if self.averaged else self.vae
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "history": self.history,
            "model": evaluated.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.averaged:
            state["training"] = self.vae.state_dict()
            state["averaged_steps"] = int(self.averaged.n_averaged)
        if self.step:
            self.refuse_broken_weights()
            state["device"] = self.noise.device.type
            state["noise"] = self.noise.get_state()
            state["pixels"] = self.order.pixels() if self.order else None
            state["record"] = self.record[: self.step].clone()
            state["sizes"] = self.sizes
        return state

    def refuse_broken_weights(self) -> None:
        """Where no evaluation has looked at them.

        Raises:
            DivergedError: A loss or a weight is NaN or infinite.
        """
        self.means()
        if not all(parameter.isfinite().all() for parameter in self.vae.parameters()):
            raise DivergedError(
                f"epoch {self.epoch + 1}, step {self.step}: the gradient is NaN or infinite; "
                f"{_ADVICE}"
            )

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `to_dict`."""
        self.epoch, self.step = state["epoch"], state["step"]
        self.best = state["best"]
        self.history = {n: [_compact(v) for v in values] for n, values in state["history"].items()}
        self.vae.load_state_dict(state["training"] if self.averaged else state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.averaged:
            self.averaged.module.load_state_dict(state["model"])
            self.averaged.n_averaged.fill_(state["averaged_steps"])
        if self.step:
            if self.order is None:
                raise ValueError("continuing inside an epoch needs the loaders of mnist_loaders")
            pixels = state["pixels"]
            if self._is_of_this_device(state):
                self.noise.set_state(state["noise"].cpu())
            else:
                pixels = None  # the order of the images does not depend on the device
                self.noise.manual_seed(mix_seed(self.seed, self.epoch, _NOISE, self.step))
                _log.warning(
                    "the checkpoint is of a run on %s: from epoch %d, step %d on, the noise is "
                    "another one than an uninterrupted run has",
                    state.get("device", "another device"),
                    self.epoch + 1,
                    self.step + 1,
                )
            self.order.set_epoch(self.epoch, skip=self.step, pixels=pixels)
            self.record[: self.step] = state["record"]
            self.sizes = state["sizes"]

    def _is_of_this_device(self, state: dict[str, Any]) -> bool:
        """Whether the generators' states in a checkpoint are of this kind of device."""
        here = self.noise.device.type
        own, pixels = self.noise.get_state(), self.order.pixels() if self.order else None
        if state.get("device", here) != here or state["noise"].shape != own.shape:  # older: no key
            return False
        return pixels is None or state["pixels"] is None or state["pixels"].shape == pixels.shape


def _compact(value: Any) -> Any:
    """A list of floats in a quarter of its memory: of 10,000 epochs it would be felt."""
    return array("d", value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """Undoes `_compact`."""
    return value.tolist() if isinstance(value, array) else value


def _until(stop: Callable[[], bool] | None, loader: Iterable[Any]) -> Iterator[Any]:
    """The loader's batches until `stop` says so: a signal does not wait for an evaluation."""
    for batch in loader:
        if stop and stop():
            raise StoppedError("during the evaluation")
        yield batch


def beta_at(objective: ObjectiveConfig, epoch: int) -> float:
    """The KL's weight in this epoch (counted from 0): linear up to `beta`, then constant."""
    warmup = objective.beta_warmup_epochs
    return objective.beta * (min(1.0, (epoch + 1) / warmup) if warmup > 0 else 1.0)


def samples_at(objective: ObjectiveConfig, epoch: int) -> int:
    """Draws of z per image in this epoch (counted from 0)."""
    early = objective.early_samples
    return early if early and epoch < objective.early_epochs else objective.num_samples


def lr_factor(schedule: str, progress: float) -> float:
    """What the learning rate is multiplied by after this fraction of the run, 0 <= progress < 1.

    `cosine` falls to 0 (Loshchilov and Hutter, 2017).
    """
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
