"""The training loop."""

import math
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from vae_torch.checkpoint import CheckpointError, Checkpoints
from vae_torch.config import (
    CHOICES,
    ObjectiveConfig,
    OptimizerConfig,
    check_objective,
    check_optimizer,
)
from vae_torch.data import EpochBatches, Loader, mix_seed
from vae_torch.evaluate import bound_metrics
from vae_torch.model import VAE
from vae_torch.step import TERMS, compiled_step, eager_step, make_optimizer

Metrics = dict[str, Any]

_ADVICE = "try a smaller optimizer.lr, precision=fp32, or objective.beta_warmup_epochs"
_NOISE = 2  # tells the noise of z from the data order, which is seeded by (seed, epoch) too
_DEFAULT_ADAM = OptimizerConfig(name="adam", lr=1e-3, eps=1e-8, schedule="constant")


class DivergedError(ArithmeticError):
    """The loss is no number any more."""


class StoppedError(Exception):
    """`stop` or `log` asked the loop to end; what was done so far is in the checkpoint."""


def train(
    vae: VAE,
    train_loader: Loader,
    test_loader: Loader,
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
        train_loader: Yields (x, label), x (B, *shape) in [0, 1]. See `mnist_loaders`.
        test_loader: The same, for validation.
        epochs: Passes over the training images.
        objective: What to minimise; the ELBO when absent.
        optimizer: Adam with a learning rate of 1e-3 when absent.
        ema: Decay per step of averaged weights; they are evaluated, logged and kept in the end.
        precision: `bf16` for autocast matrix products; else tensors and products are fp32, as
            exact as `torch.set_float32_matmul_precision` says (convolutions on CUDA:
            `torch.backends.cudnn`): `medium` does nothing here unless the caller has asked torch
            for it, as `scripts/train.py` does.
        compile: Loss, gradient and optimiser as one graph (torch.compile; on CUDA a CUDA graph).
        seed: Of the noise.
        log: Called after every epoch with its metrics and the model they belong to. It may raise
            StoppedError, as `stop` does.
        checkpoints: Where to keep the state, and where to continue from. Continuing inside an epoch
            needs the loaders of `mnist_loaders`.
        stop: Asked after every step; when true, a checkpoint is written and the loop ends.

    Returns:
        One list per metric, an entry per epoch: `train/loss`, `test/loss`, `train/elbo`, ...;
        nats per image.

    Raises:
        DivergedError: The loss is NaN or infinite: says in which epoch, step and term.
        StoppedError: `stop` said so.
        CheckpointError: What `checkpoints` holds is damaged, or of another run.
        ConfigError: The objective has options that it would ignore or that do not go with the
            model, the optimiser has some that mean nothing, or torch is too old to compile.
        ValueError: No epoch, no image, an unknown precision, or pixels outside [0, 1].
    """
    if precision not in CHOICES["precision"]:
        raise ValueError(f"precision is {precision!r}; known are {', '.join(CHOICES['precision'])}")
    if epochs < 1 or not len(train_loader) or not len(test_loader):
        raise ValueError(
            f"epochs={epochs}, {len(train_loader)} batches to train on and {len(test_loader)} to "
            "test on: each must be 1 or more"
        )
    objective = objective or ObjectiveConfig()
    check_objective(objective, likelihood=vae.likelihood.name, prior=vae.prior.name)
    settings = optimizer or _DEFAULT_ADAM
    check_optimizer(settings)
    device = next(vae.parameters()).device
    opt = make_optimizer(vae, settings)
    averaged = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(ema)) if ema else None
    evaluated: VAE = averaged.module if averaged else vae  # type: ignore[assignment]
    run = _Progress(vae, averaged, opt, train_loader)
    if checkpoints and (state := checkpoints.load(device)):
        try:
            run.load(state)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{checkpoints.folder}/last.pt: {error!r}"[:300]) from None

    take_step = eager_step(vae, opt, objective, precision)
    if compile:
        # not learned from the first batch: a continued run's may be the last of an epoch
        size = getattr(train_loader.batch_sampler, "batch_size", None)
        take_step = compiled_step(vae, opt, objective, precision, batch_size=size)

    steps = len(train_loader)
    done = run.epoch * steps + run.step
    bar = tqdm(total=epochs * steps, initial=done, disable=None, unit="step", leave=False)
    while run.epoch < epochs:
        began, first = time.perf_counter(), run.step
        beta = beta_at(objective, run.epoch)
        epoch_objective = replace(objective, num_samples=samples_at(objective, run.epoch))
        beta_tensor = torch.tensor(beta, device=device)  # a float would be compiled every epoch
        run.begin_epoch(seed)

        try:
            for x, _ in train_loader:
                if run.order is None:  # not our loader, which makes no others
                    _check_pixels(x)
                x = x.to(device, non_blocking=True)
                shape = (epoch_objective.num_samples, len(x), vae.latent_dim)
                eps = torch.randn(shape, generator=run.noise, device=device)
                choice = None
                if objective.resample:
                    choice = torch.rand(len(x), generator=run.noise, device=device)
                progress = (run.epoch + run.step / steps) / epochs
                lr = settings.lr * lr_factor(settings.schedule, progress)
                terms = take_step(x, eps, choice, beta_tensor, lr)
                if averaged:
                    averaged.update_parameters(vae)

                run.count(len(x), terms)
                if run.step % 50 == 0 or run.step == steps:
                    loss = run.means()["loss"]
                    bar.update(run.epoch * steps + run.step - bar.n)
                    bar.set_description(f"epoch {run.epoch + 1}/{epochs}", refresh=False)
                    bar.set_postfix_str(f"train loss {loss:.2f}", refresh=False)
                if stop and stop():
                    raise StoppedError(f"epoch {run.epoch + 1}, step {run.step} of {steps}")
                if checkpoints and checkpoints.due():
                    checkpoints.save(run.to_dict())

            seconds = time.perf_counter() - began
            means = run.means()
            test = bound_metrics(
                evaluated, _until(stop, test_loader), epoch_objective, beta=beta, seed=seed
            )
            if not math.isfinite(test["loss"]):
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
        loader: Loader,
    ) -> None:
        device = next(vae.parameters()).device
        self.vae, self.averaged, self.optimizer = vae, averaged, optimizer
        self.order = (
            loader.batch_sampler if isinstance(loader.batch_sampler, EpochBatches) else None
        )
        self.epoch = 0  # finished ones
        self.step = 0  # of the epoch under way
        self.best = -math.inf
        self.history: dict[str, list[Any]] = {}  # of many numbers an epoch: as arrays
        self.noise = torch.Generator(device)
        # loss, reconstruction and kl of the epoch's steps: on the device, to be read rarely
        self.record = torch.zeros(len(loader), 3, device=device)
        self.sizes: list[int] = []  # images of these steps

    def begin_epoch(self, seed: int) -> None:
        """Seed the epoch's order and noise, unless `load` has just put them in its middle."""
        if self.step == 0:
            self.sizes = []
            self.noise.manual_seed(mix_seed(seed, self.epoch, _NOISE))
            if self.order:
                self.order.set_epoch(self.epoch)

    def count(self, images: int, terms: Tensor) -> None:
        """One step is done, with these means of TERMS."""
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
        """Add to the history; whether the test elbo is the best so far."""
        for name, value in metrics.items():
            self.history.setdefault(name, []).append(_compact(value))
        improved = bool(metrics["test/elbo"] > self.best)
        self.best = max(self.best, metrics["test/elbo"])
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
            self._refuse_broken_weights()
            state["noise"] = self.noise.get_state()
            state["pixels"] = self.order.pixels() if self.order else None
            state["record"] = self.record[: self.step].clone()
            state["sizes"] = self.sizes
        return state

    def _refuse_broken_weights(self) -> None:
        """Inside an epoch no evaluation has looked at them yet."""
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
            self.noise.set_state(state["noise"].cpu())
            self.order.set_epoch(self.epoch, skip=self.step, pixels=state["pixels"])
            self.record[: self.step] = state["record"]
            self.sizes = state["sizes"]


def _compact(value: Any) -> Any:
    """A list of floats in a quarter of its memory: of 10,000 epochs it would be felt."""
    return array("d", value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """Undoes `_compact`."""
    return value.tolist() if isinstance(value, array) else value


def _until(
    stop: Callable[[], bool] | None, loader: Loader
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The loader's batches until `stop` says so: a signal does not wait for an evaluation."""
    for batch in loader:
        if stop and stop():
            raise StoppedError("during the evaluation")
        if not isinstance(loader.batch_sampler, EpochBatches):
            _check_pixels(batch[0])
        yield batch


def _check_pixels(x: torch.Tensor) -> None:
    low, high = (float(end) for end in x.aminmax())
    if not (low >= 0 and high <= 1):  # NaN too
        raise ValueError(
            f"x of shape {tuple(x.shape)} has values from {low:g} to {high:g}; pixels are floats "
            "in [0, 1] (divide bytes by 255)"
        )


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
