"""What the scripts share: typed settings, the device, and how a mistake is told."""

import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vae_torch.config import ConfigError

Settings = TypeVar("Settings")


def typed(cfg: DictConfig, schema: type[Settings]) -> Settings:
    """Composed settings as an instance of the dataclass that they were composed for.

    Raises:
        ConfigError: A mandatory value is missing.
    """
    try:
        settings = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    assert isinstance(settings, schema)
    return settings


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


def refuse(message: str) -> NoReturn:
    """A user's mistake: one line, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def shown(path: Path) -> Path:
    """A path as a user would type it here."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
