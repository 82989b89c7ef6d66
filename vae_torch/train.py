"""The training loop."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from vae_torch.checkpoint import Checkpoints
from vae_torch.config import ObjectiveConfig, OptimizerConfig, check_objective
from vae_torch.data import EpochBatches, seeded_generator
from vae_torch.evaluate import Loader, bound_metrics
from vae_torch.model import VAE
from vae_torch.objective import objective_terms

Metrics = dict[str, Any]

_NOISE = 2  # tells the noise of z from the data order, which is seeded by (seed, epoch) too
_NOTEBOOK_ADAM = OptimizerConfig(name="adam", lr=1e-3, eps=1e-8, schedule="constant")


class DivergedError(ArithmeticError):
    """The loss is no number any more."""


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
) -> dict[str, list[Any]]:
    """Train `vae` in place and return its history.

    Every epoch's data order and noise are seeded by (seed, epoch), so an epoch can be repeated, and
    a run continued, from the weights and the optimiser's state alone.

    Args:
        vae: The model, on the device to train on.
        train_loader: Yields (x, label), x (B, *shape) in [0, 1]. See `mnist_loaders`.
        test_loader: The same, for validation.
        epochs: Passes over the training images.
        objective: What to minimise; the ELBO when absent.
        optimizer: Adam with a learning rate of 1e-3 when absent.
        ema: Decay per step of averaged weights; they are evaluated, logged and kept in the end.
        precision: `fp32`, or `bf16` for autocast matrix products.
        compile: Compile the loss and its gradient with torch.compile.
        seed: Of the noise.
        log: Called after every epoch with its metrics and the model they belong to.
        checkpoints: Where to keep the state, and where to continue from.

    Returns:
        One list per metric, an entry per epoch: `train/loss`, `test/loss`, `train/elbo`, ...;
        nats per image.

    Raises:
        DivergedError: The loss is NaN or infinite.
        ConfigError: The objective has options that it would ignore.
    """
    objective = objective or ObjectiveConfig()
    check_objective(objective)
    settings = optimizer or _NOTEBOOK_ADAM
    device = next(vae.parameters()).device
    stepper = make_optimizer(vae, settings)
    averaged = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(ema)) if ema else None
    evaluated: VAE = averaged.module if averaged else vae  # type: ignore[assignment]
    terms_of = torch.compile(objective_terms, dynamic=False) if compile else objective_terms

    start, best, history = 0, -math.inf, dict[str, list[Any]]()
    if checkpoints and (state := checkpoints.load(device)):
        start, best, history = state["epoch"], state["best"], state["history"]
        vae.load_state_dict(state["training"] if averaged else state["model"])
        stepper.load_state_dict(state["optimizer"])
        if averaged:
            averaged.module.load_state_dict(state["model"])
            averaged.n_averaged.fill_(state["averaged_steps"])

    steps = len(train_loader)
    bar = tqdm(total=epochs * steps, initial=start * steps, disable=None, unit="step", leave=False)
    for epoch in range(start, epochs):
        began = time.perf_counter()
        beta = beta_at(objective, epoch)
        weight = torch.tensor(beta, device=device)  # a float would be compiled anew every epoch
        noise = seeded_generator(device, seed, epoch, _NOISE)
        if isinstance(train_loader.batch_sampler, EpochBatches):
            train_loader.batch_sampler.set_epoch(epoch)
        sums = torch.zeros(3, device=device, dtype=torch.float64)  # stays there: no sync per step
        images = 0

        for batch, (x, _) in enumerate(train_loader):
            x = x.to(device, non_blocking=True)
            shape = (objective.num_samples, len(x), vae.latent_dim)
            eps = torch.randn(shape, generator=noise, device=device)
            lr = settings.lr * lr_factor(settings.schedule, (epoch + batch / steps) / epochs)
            for group in stepper.param_groups:
                group["lr"] = lr

            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                terms = terms_of(vae, x, eps, objective, weight)
            stepper.zero_grad(set_to_none=True)
            terms.loss.backward()
            stepper.step()
            if averaged:
                averaged.update_parameters(vae)

            sums += torch.stack(
                (len(x) * terms.loss.detach(), terms.reconstruction.sum(), terms.kl.sum())
            )
            images += len(x)
            if batch % 50 == 49 or batch == steps - 1:
                bar.update(batch % 50 + 1)
                if not bar.disable:
                    bar.set_description(f"epoch {epoch + 1}/{epochs}", refresh=False)
                    bar.set_postfix_str(f"train loss {sums[0].item() / images:.2f}", refresh=False)

        loss, reconstruction, kl = (sums / images).tolist()
        seconds = time.perf_counter() - began
        if not math.isfinite(loss):
            raise DivergedError(
                f"epoch {epoch + 1}: the training loss is {loss} (reconstruction "
                f"{reconstruction}, kl {kl}); try a smaller optimizer.lr"
            )
        test = bound_metrics(evaluated, test_loader, objective, beta=beta, seed=seed)
        metrics: Metrics = {
            "epoch": epoch + 1,
            "train/loss": loss,
            "train/elbo": reconstruction - kl,
            "train/reconstruction": reconstruction,
            "train/kl": kl,
            **{f"test/{name}": value for name, value in test.items()},
            "train/beta": beta,
            "train/lr": lr,
            "train/images_per_second": images / seconds,
            "seconds": time.perf_counter() - began,  # evaluation included
        }
        for name, value in metrics.items():
            history.setdefault(name, []).append(value)
        if log:
            log(metrics, evaluated)
        if checkpoints:
            improved = metrics["test/elbo"] > best
            best = max(best, metrics["test/elbo"])
            state = {
                "epoch": epoch + 1,
                "best": best,
                "history": history,
                "model": evaluated.state_dict(),
                "optimizer": stepper.state_dict(),
            }
            if averaged:
                state["training"] = vae.state_dict()
                state["averaged_steps"] = int(averaged.n_averaged)
            checkpoints.save(state, best=improved, final=epoch + 1 == epochs)
    bar.close()
    if averaged:
        vae.load_state_dict(evaluated.state_dict())
    return history


def make_optimizer(vae: VAE, settings: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser that the settings name, over all of the model's parameters."""
    parameters = list(vae.parameters())
    decay = settings.weight_decay
    if settings.name == "sgd":
        return torch.optim.SGD(parameters, settings.lr, weight_decay=decay, fused=True)
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(parameters, settings.lr, eps=settings.eps, weight_decay=decay, fused=True)


def beta_at(objective: ObjectiveConfig, epoch: int) -> float:
    """The KL's weight in this epoch (counted from 0): linear up to `beta`, then constant."""
    warmup = objective.beta_warmup_epochs
    return objective.beta * (min(1.0, (epoch + 1) / warmup) if warmup > 0 else 1.0)


def lr_factor(schedule: str, progress: float) -> float:
    """What the learning rate is multiplied by after this fraction of the run, 0 <= progress < 1.

    `cosine` falls to 0 (Loshchilov and Hutter, 2017). `burda` is the staircase of Burda et al.
    (2016), section 5: 10^(-i/7) for 3^i of 3,280 epochs, i = 0..7, stretched to the run's length.
    """
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "burda":
        stair = next(i for i in range(8) if progress * 3280 < (3 ** (i + 1) - 1) / 2 or i == 7)
        return float(10 ** (-stair / 7))
    return 1.0
