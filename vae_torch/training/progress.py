"""The state of training that a checkpoint keeps, so that a resumed run has the same bits."""

import logging
import math
from array import array
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vae_torch.checkpoint import CheckpointError, Checkpoints
from vae_torch.config import OptimizerConfig
from vae_torch.data import EpochBatches, batches_in
from vae_torch.parts.metrics import score, scores_of
from vae_torch.seeds import Stream, mix_seed
from vae_torch.training.averaging import AveragedWeights
from vae_torch.training.errors import ADVICE, DivergedError
from vae_torch.training.patience import has_stalled
from vae_torch.training.schedules import falls_of
from vae_torch.training.step import Means
from vae_torch.vae import VAE

Metrics = dict[str, Any]

_log = logging.getLogger("vae_torch")


class Progress:
    """The state of training: all that a checkpoint needs to resume with the same bits."""

    def __init__(
        self,
        vae: VAE,
        averaged: AveragedWeights | None,
        optimizer: torch.optim.Optimizer,
        loader: Iterable[Any],
        seed: int,
        *,
        monitor: str = "test/elbo",
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        device = next(vae.parameters()).device
        self.vae, self.averaged, self.optimizer = vae, averaged, optimizer
        order = getattr(loader, "batch_sampler", None)
        self.order = order if isinstance(order, EpochBatches) else None
        self.seed, self.monitor, self.scaler = seed, monitor, scaler
        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps of the current epoch
        self.best = -math.inf
        self.since = (0, 0)  # epoch and step at which the learning rate's schedule began
        self.history: dict[str, list[Any]] = {}  # lists of numbers per epoch become arrays
        self.noise = torch.Generator(device)
        self.steps = batches_in(loader) or 100
        # means of the epoch's steps, (steps, names): kept on the device, since reading them is slow
        self.names: tuple[str, ...] = ()
        self.record: Tensor | None = None
        self.sizes: list[int] = []  # images of these steps

    def begin_epoch(self) -> None:
        """Seed the epoch's order and noise, unless `resume` has just restored them."""
        if self.step == 0:
            self.sizes = []
            self.noise.manual_seed(mix_seed(self.seed, self.epoch, Stream.NOISE))
            if self.order:
                self.order.set_epoch(self.epoch)

    def count(self, images: int, means: Means) -> None:
        """Record a finished step."""
        names, values = means
        if self.record is None or (self.step == 0 and names != self.names):
            self.names, self.record = names, values.new_zeros(self.steps, len(names))
        if names != self.names:
            raise ValueError(
                f"the objective's metrics were {', '.join(self.names)} and are {', '.join(names)}; "
                "they must be the same in every step of an epoch"
            )
        if self.step == len(self.record):  # the loader did not know its length
            self.record = torch.cat([self.record, torch.zeros_like(self.record)])
        self.record[self.step] = values
        self.sizes.append(images)
        self.step += 1

    def means(self) -> dict[str, float]:
        """The means over the images of the epoch so far.

        Raises:
            DivergedError: A step's loss was NaN or infinite.
        """
        if self.record is None:
            return {}
        steps = self.record[: self.step].cpu().double()
        bad = (~steps.isfinite()).any(1).nonzero()
        if len(bad):
            at = int(bad[0])
            now, last = (
                ", ".join(f"{n} {v:.6g}" for n, v in zip(self.names, row.tolist(), strict=True))
                for row in (steps[at], steps[max(at - 1, 0)])
            )
            before = f" (the step before: {last})" if at else ""
            raise DivergedError(f"epoch {self.epoch + 1}, step {at + 1}: {now}{before}; {ADVICE}")
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        means = ((sizes @ steps) / sizes.sum()).tolist()
        return with_elbo(dict(zip(self.names, means, strict=True)))

    def end_epoch(self, metrics: Metrics) -> bool:
        """Add an epoch to the history; return whether its monitored metric is the best so far."""
        for name in [*self.history, *(name for name in metrics if name not in self.history)]:
            values = self.history.setdefault(name, [None] * self.epoch)
            values.append(_compact(metrics.get(name)))
        now = -math.inf
        if self.monitor in metrics:
            now = score(self.monitor, metrics[self.monitor])
        improved = bool(now > self.best)
        self.best = max(self.best, now)
        self.epoch, self.step = self.epoch + 1, 0
        return improved

    def has_stalled(self, patience: int | None, min_delta: float) -> bool:
        """Whether the monitored metric has not improved for `patience` epochs."""
        return has_stalled(self._scores(), patience, min_delta)

    def falls(self, settings: OptimizerConfig, min_delta: float) -> int:
        """How often the learning rate of schedule=plateau has fallen since the schedule began."""
        if settings.schedule != "plateau" or settings.step_epochs is None:
            return 0
        return falls_of(self._scores()[self.since[0] :], settings.step_epochs, min_delta)

    def _scores(self) -> list[float | None]:
        return scores_of(self.monitor, self.history.get(self.monitor, ()))

    def to_dict(self) -> dict[str, Any]:
        """The state as a checkpoint stores it.

        Raises:
            DivergedError: A loss or a weight is NaN or infinite.
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
        state["random"] = {"cpu": torch.get_rng_state()}  # torch's own generators: of dropout, say
        if self.noise.device.type == "cuda":
            state["random"]["cuda"] = torch.cuda.get_rng_state(self.noise.device)
        if self.scaler and self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        if self.since != (0, 0):
            state["since"] = list(self.since)
        if self.averaged:
            state["training"] = self.vae.state_dict()
            state["averaged_steps"] = self.averaged.steps
        if self.step:
            self.refuse_broken_weights()
            state["device"] = self.noise.device.type
            state["noise"] = self.noise.get_state()
            state["pixels"] = self.order.pixels() if self.order else None
            assert self.record is not None
            state["names"] = list(self.names)
            state["record"] = self.record[: self.step].clone()
            state["sizes"] = self.sizes
        return state

    def refuse_broken_weights(self) -> None:
        """Check losses and weights that no evaluation has checked.

        Raises:
            DivergedError: A loss or a weight is NaN or infinite.
        """
        self.means()
        if not all(parameter.isfinite().all() for parameter in self.vae.parameters()):
            raise DivergedError(
                f"epoch {self.epoch + 1}, step {self.step}: the gradient is NaN or infinite; "
                f"{ADVICE}"
            )

    def resume(self, checkpoints: Checkpoints) -> None:
        """Continue from the last checkpoint, if there is one.

        Raises:
            CheckpointError: It is damaged, or of another run.
        """
        state = checkpoints.load(self.noise.device)
        if state is None:
            return
        try:
            self._load(state)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{checkpoints.folder}/last.pt: {error!r}"[:300]) from None

    def _load(self, state: dict[str, Any]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]
        self.best = state["best"]
        epoch, step = state.get("since", (0, 0))
        self.since = (epoch, step)
        self.history = {n: [_compact(v) for v in values] for n, values in state["history"].items()}
        random = state.get("random", {})
        if "cpu" in random:
            torch.set_rng_state(random["cpu"].cpu())
        if "cuda" in random and self.noise.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"].cpu(), self.noise.device)
        self.vae.load_state_dict(state["training"] if self.averaged else state["model"])
        # settings come from this run: some depend on the device, the rest are equal
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(
            {"state": state["optimizer"]["state"], "param_groups": groups}
        )
        if self.scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self.averaged:
            self.averaged.module.load_state_dict(state["model"])
            self.averaged.steps = state["averaged_steps"]
        if self.step:
            if self.order is None:
                raise ValueError("continuing inside an epoch needs the loaders of mnist_loaders")
            pixels = state["pixels"]
            if self._is_of_this_device(state):
                self.noise.set_state(state["noise"].cpu())
            else:
                pixels = None  # the order of images does not depend on the device
                self.noise.manual_seed(mix_seed(self.seed, self.epoch, Stream.NOISE, self.step))
                _log.warning(
                    "the checkpoint comes from a run on %s: from epoch %d, step %d on, the noise "
                    "differs from that of an uninterrupted run",
                    state.get("device", "another device"),
                    self.epoch + 1,
                    self.step + 1,
                )
            self.order.set_epoch(self.epoch, skip=self.step, pixels=pixels)
            had = state["record"]
            of_older_ones = ("loss", "reconstruction", "kl")
            self.names = tuple(state.get("names", of_older_ones))
            self.record = had.new_zeros(max(self.steps, self.step), len(self.names))
            self.record[: self.step] = had
            self.sizes = state["sizes"]

    def _is_of_this_device(self, state: dict[str, Any]) -> bool:
        """Whether the generator states in a checkpoint are for this kind of device."""
        here = self.noise.device.type
        own, pixels = self.noise.get_state(), self.order.pixels() if self.order else None
        if state.get("device", here) != here or state["noise"].shape != own.shape:  # older: no key
            return False
        return pixels is None or state["pixels"] is None or state["pixels"].shape == pixels.shape


def with_elbo(means: dict[str, float]) -> dict[str, float]:
    """Add the plain ELBO, reconstruction - kl, where both terms are known."""
    if not {"reconstruction", "kl"} <= means.keys():
        return means
    elbo = {"elbo": means["reconstruction"] - means["kl"]}
    return {"loss": means["loss"], **elbo, **means}


def _compact(value: Any) -> Any:
    """A list of floats in a quarter of its memory, which matters after 10,000 epochs."""
    return array("d", value) if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """A value of the history as numbers and lists of them."""
    return value.tolist() if isinstance(value, array) else value
