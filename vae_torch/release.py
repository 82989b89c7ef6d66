"""Reads a release: the weights, settings and hashes that `vae_torch.export` writes.

Nothing in a release is unpickled, and it is believed only where its hashes are right.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from vae_torch.checkpoint import CheckpointError, StoredModel, classes_in
from vae_torch.config import ConfigError, config_from_dict

WEIGHTS, SETTINGS, SUMS = "model.safetensors", "config.json", "SHA256SUMS"
CARD = "evaluation.json"  # where the run had one


def is_release(folder: Path) -> bool:
    """Whether a folder looks like one."""
    return (folder / WEIGHTS).exists() or (folder / SUMS).exists()


def stored_release(folder: Path, device: torch.device | str = "cpu") -> StoredModel:
    """What a release holds, after a look at its hashes.

    Raises:
        CheckpointError: A file is absent, damaged, or of something else.
        ConfigError: Safetensors is absent.
    """
    path = folder / WEIGHTS
    contents = checked_files(folder, SETTINGS, WEIGHTS)
    try:
        settings = json.loads(contents[SETTINGS])
        config = config_from_dict(settings["config"])
        shape, epoch = settings["input_shape"], settings["epoch"]
        own = tuple(map(str, settings.get("own_parts", ())))
        classes = classes_in(settings)
        if not all(type(n) is int and 0 < n < 2**20 for n in shape):
            raise TypeError(f"its images have shape {shape}")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / SETTINGS}: no settings of vae_torch ({_line(error)}); name another release"
        ) from None
    try:
        weights = safetensors_torch().load(contents[WEIGHTS])
    except ConfigError:
        raise
    except Exception as error:  # its own kind, and what odd bytes raise
        raise CheckpointError(
            f"{path}: no safetensors file ({_line(error)}); name another release"
        ) from None
    weights = {name: weight.to(device) for name, weight in weights.items()}
    return StoredModel(
        path,
        weights,
        config,
        tuple(shape),
        epoch if type(epoch) is int else None,
        sha256_of(contents[WEIGHTS]),
        own,
        classes,
    )


def checked_files(folder: Path, *names: str) -> dict[str, bytes]:
    """The content of a release's files, whose hashes are right.

    Raises:
        CheckpointError: One is absent or damaged.
    """
    lines = _read(folder / SUMS).decode("utf-8", "replace").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    contents = {name: _read(folder / name) for name in names}
    for name, content in contents.items():
        if sums.get(name) != sha256_of(content):
            raise CheckpointError(
                f"{folder / name}: damaged, or no release of vae_torch: it is not what {SUMS} "
                "says; fetch it again"
            )
    return contents


def safetensors_torch() -> Any:
    """The module, which the extra `hub` brings.

    Raises:
        ConfigError: It is absent.
    """
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ConfigError(
            "releases need safetensors, which is not installed; pip install -e '.[hub]'"
        ) from None
    return safetensors.torch


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # reading a pipe or a device might never end
        raise CheckpointError(f"{path}: not a file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; no whole release of vae_torch") from None


def sha256_of(content: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
