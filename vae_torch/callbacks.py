"""Callbacks that watch a run: `train.callbacks=[wandb]`, or one of your own by its name.

One of your own is a context manager in a plug-in. It yields a callback of `train`:

    @callbacks.register("mine")
    @contextmanager
    def mine(config: Config, run_dir: Path) -> Iterator[Callback]:
        yield lambda metrics, vae: {"test/answer": 42.0}
"""

import hashlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm.auto import tqdm

from vae_torch.config import Config, ConfigError, flatten
from vae_torch.parts.registry import Table
from vae_torch.vae import VAE

Callback = Callable[[dict[str, Any], VAE], Mapping[str, Any] | None]

callbacks: "Table[Callable[..., AbstractContextManager[Callback]]]" = Table(
    "train.callbacks", "train.callbacks"
)


def print_epochs(metrics: Mapping[str, Any], vae: VAE) -> None:
    """Print a line for each epoch: `train(vae, images, callbacks=[print_epochs])`."""
    del vae
    parts = [
        f"{name} {metrics[name]:.2f}"
        for name in ("train/loss", "test/loss", "test/elbo", "test/kl")
        if name in metrics
    ]
    tqdm.write(f"epoch {metrics['epoch']}   {'   '.join(parts)}")  # above the bar


@callbacks.register("wandb")
@contextmanager
def wandb(config: Config, run_dir: Path) -> Iterator[Callback]:
    """Weights & Biases; environment variables set the rest: WANDB_PROJECT, WANDB_MODE=offline."""
    library = _imported("wandb")
    with library.init(
        project=os.environ.get("WANDB_PROJECT", "vae_torch"),
        name=run_dir.name,
        id=hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:16],  # a resumed run's too
        resume="allow",
        dir=str(run_dir),
        config=flatten(config.to_dict()),
    ) as run:
        yield lambda metrics, _: run.log(_numbers(metrics), step=metrics["epoch"])


@callbacks.register("mlflow")
@contextmanager
def mlflow(config: Config, run_dir: Path) -> Iterator[Callback]:
    """MLflow; environment variables set the rest: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME."""
    library = _imported("mlflow")
    with library.start_run(run_name=run_dir.name, tags={"run_dir": str(run_dir.absolute())}):
        library.log_params({key: str(v)[:500] for key, v in flatten(config.to_dict()).items()})
        yield lambda metrics, _: library.log_metrics(_numbers(metrics), step=metrics["epoch"])


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """One number per name; a list becomes `test/kl_per_dim/1` and so on."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, list):
            found |= {f"{name}/{i}": float(part) for i, part in enumerate(value, 1)}
        elif isinstance(value, int | float):
            found[name] = float(value)
    return found


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ConfigError(
            f"train.callbacks=[{name}]: needs {name}, which is not installed; pip install -e "
            f"'.[{name}]'"
        ) from None
