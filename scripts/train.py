"""Train a VAE: one run, or with -m a sweep.

python scripts/train.py [key=value ...]
"""

import copy
import logging
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from vae_torch.config import Config, ConfigError, check

ConfigStore.instance().store(name="schema", node=Config)
log = logging.getLogger("vae_torch")


def main(cfg: DictConfig) -> float:
    """One run, from composed settings to a finished folder. Returns the final test elbo."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    from vae_torch.checkpoint import CheckpointError
    from vae_torch.data import DataError
    from vae_torch.train import DivergedError

    try:
        return run(typed(cfg), run_dir, OmegaConf.to_yaml(cfg, resolve=True))
    except (ConfigError, DataError, CheckpointError) as error:
        remove_if_unused(run_dir)
        refuse(str(error))
    except DivergedError as error:
        print(f"train.py: stopped: {error}; see {run_dir}", file=sys.stderr)
        sys.exit(1)


def run(config: Config, run_dir: Path, config_text: str) -> float:
    """Data, model, loop, records: what a run is made of."""
    import torch
    from tqdm.contrib.logging import logging_redirect_tqdm

    from vae_torch import data
    from vae_torch.checkpoint import Checkpoints
    from vae_torch.model import VAE
    from vae_torch.runlog import RunLog
    from vae_torch.train import train

    device = resolve_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)  # of the initial weights; the rest has generators of its own

    train_loader, test_loader = data.mnist_loaders(
        config.data.root,
        name=config.data.name,
        batch_size=config.data.batch_size,
        binarize=config.data.binarize,
        limit_train=config.data.limit_train,
        limit_test=config.data.limit_test,
        hold_out=config.data.hold_out,
        seed=config.seed,
        device=device,
    )
    vae = VAE.from_config(config).to(device)
    checkpoints = Checkpoints(run_dir / "checkpoints", config, every=config.train.checkpoint_every)
    state = checkpoints.load("cpu") if config.train.resume else None
    first_epoch = state["epoch"] if state else 0
    records = RunLog(run_dir, config, config_text=config_text, first_epoch=first_epoch)
    x, labels = next(iter(test_loader))  # enough for every picture
    for more, more_labels in test_loader:
        if len(x) >= 5000:
            break
        x, labels = torch.cat([x, more]), torch.cat([labels, more_labels])

    def record(metrics: dict[str, Any], model: VAE) -> None:
        records.log(metrics)
        epoch = metrics["epoch"]
        log.info(
            "epoch %3d/%d   train elbo %8.2f   test elbo %8.2f = reconstruction %8.2f - kl %.2f"
            "   %.1f s",
            epoch,
            config.train.epochs,
            metrics["train/elbo"],
            metrics["test/elbo"],
            metrics["test/reconstruction"],
            metrics["test/kl"],
            num_train / metrics["train/images_per_second"],
        )
        every = config.train.figure_every
        if epoch == config.train.epochs or (every and epoch % every == 0):
            records.figures(epoch, model, x, labels)

    num_train, num_test = (len(data.image_dataset(ld)) for ld in (train_loader, test_loader))
    log.info(
        "%s: %d training and %d test images, on %s",
        config.data.name,
        num_train,
        num_test,
        device_name(device),
    )
    try:
        with logging_redirect_tqdm():
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
                log=record,
                checkpoints=checkpoints,
            )
        summary = records.finish(
            history,
            {
                "device": device_name(device),
                "data_sha256": {
                    "train": data.data_hash(train_loader),
                    "test": data.data_hash(test_loader),
                },
            },
        )
    finally:
        records.close()
    elbo: float = summary["final"]["test/elbo"]
    tell_what_next(run_dir, elbo)
    return elbo


def typed(cfg: DictConfig) -> Config:
    """The composed settings as a checked `Config`.

    Raises:
        ConfigError: A value that no run can use.
    """
    try:
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    assert isinstance(config, Config)
    check(config)
    return config


def resolve_device(name: str) -> Any:
    """The torch device that `device=` names.

    Raises:
        ConfigError: CUDA is asked for and is not there.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"device={name}: this machine has {count} CUDA devices; use device=cpu")
    return device


def device_name(device: Any) -> str:
    """Device, its model where it has a name, and the threads that a CPU run used."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


class RefuseBadRuns(Callback):
    """Checks the settings before Hydra makes or touches the run folder."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Also points a resumed run at its own folder."""
        settings = self._checked(config)
        resume = settings.train.resume
        if resume and resume != "auto":
            if not (Path(resume) / "checkpoints").is_dir():
                refuse(f"train.resume={resume}: no such folder, or no run with checkpoints in it")
            OmegaConf.update(config, "hydra.run.dir", resume, force_add=True)
        run_dir = Path(config.hydra.run.dir)
        if (run_dir / "summary.json").exists():
            refuse(f"hydra.run.dir={run_dir}: holds a finished run; choose another folder")
        if not resume and (run_dir / "metrics.jsonl").exists():
            refuse(f"hydra.run.dir={run_dir}: holds an unfinished run; add train.resume=auto")
        require_writable("hydra.run.dir", run_dir)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """The values that the sweep does not vary; each job checks its own again."""
        self._checked(config)
        require_writable("hydra.sweep.dir", Path(config.hydra.sweep.dir))

    def _checked(self, config: DictConfig) -> Config:
        settings = copy.deepcopy(config)
        with read_write(settings), open_dict(settings):
            del settings["hydra"]
        try:
            checked = typed(settings)
            resolve_device(checked.device)
        except ConfigError as error:
            refuse(str(error))
        return checked


def require_writable(key: str, folder: Path) -> None:
    """Refuse a folder that cannot be made or written, without leaving one behind."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        refuse(f"{key}={folder}: {existing} cannot be written ({error.strerror})")


def remove_if_unused(run_dir: Path) -> None:
    """Take away a folder in which nothing but Hydra's own notes was written."""
    if {entry.name for entry in run_dir.iterdir()} <= {".hydra", "run.log"}:
        logging.shutdown()
        shutil.rmtree(run_dir)


def refuse(message: str) -> NoReturn:
    """A user's mistake: one line, exit status 2."""
    print(f"train.py: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def tell_what_next(run_dir: Path, elbo: float) -> None:
    """The last lines of a run: where it is and what to open."""
    with_cwd = Path.cwd()
    shown = run_dir.relative_to(with_cwd) if run_dir.is_relative_to(with_cwd) else run_dir
    bin_dir = Path(sys.executable).parent
    tensorboard = bin_dir / "tensorboard"
    if tensorboard.is_relative_to(with_cwd):
        tensorboard = tensorboard.relative_to(with_cwd)
    log.info(
        "\nDone: test elbo %.2f nats per image.\n"
        "  run folder    %s\n"
        "  pictures      %s\n"
        "  curves        %s --logdir %s   then open http://localhost:6006",
        elbo,
        shown,
        shown / "figures",
        tensorboard,
        shown,
    )


if __name__ == "__main__":
    hydra.main(version_base="1.3", config_path="../conf", config_name="train")(main)()
