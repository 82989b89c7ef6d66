"""Checkpoints: written atomically, sealed with a checksum, loaded without running code.

A checkpoint is what `torch.save` writes plus 40 bytes at the end: a magic word and the SHA-256 of
everything before it. A file with a flipped bit is refused, and `torch.load` still opens the file.

The history of a run grows, so it has a file of its own, `history.jsonl`, to which epochs are only
appended. A checkpoint stores how many of its bytes belong to it, and their SHA-256.
"""

import hashlib
import io
import json
import os
import pickle
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from vae_torch.config import (
    INCIDENTAL,
    Config,
    ConfigError,
    UserError,
    checkpoint_interval,
    config_from_dict,
    flatten,
    in_short,
)
from vae_torch.files import write_atomically
from vae_torch.parts.complete import complete

_MAGIC = b"VAETORCH"
_SEAL = len(_MAGIC) + 32


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or of another model: one line that names the file."""


def save_checkpoint(state: dict[str, Any], *paths: Path) -> None:
    """Write `state` to each path; a reader sees the old file or the new one, never a part."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    sealed = content + _MAGIC + hashlib.sha256(content).digest()
    for path in paths:
        write_atomically(path, sealed)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `save_checkpoint` wrote: tensors and plain values only, nothing that can run.

    Raises:
        CheckpointError: No such file, a damaged file, or one that holds more than data.
    """
    if path.exists() and not path.is_file():  # reading a pipe or a device might never end
        raise CheckpointError(f"{path}: not a file")
    try:
        sealed = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    content, magic, digest = sealed[:-_SEAL], sealed[-_SEAL:-32], sealed[-32:]
    if magic != _MAGIC or hashlib.sha256(content).digest() != digest:
        raise CheckpointError(f"{path}: damaged, or no checkpoint of vae_torch; use another one")
    try:
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors and plain values ({in_short(error, 200)})"
        ) from None
    except Exception as error:  # crafted bytes with a valid seal can raise anything
        raise CheckpointError(f"{path}: torch cannot read it ({in_short(error, 200)})") from None
    parts = [state.get(key) for key in ("config", "model")] if isinstance(state, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise CheckpointError(f"{path}: holds no model with its config")
    state["model"] = _renamed(state["model"])
    if isinstance(state.get("training"), dict):
        state["training"] = _renamed(state["training"])
    return cast(dict[str, Any], state)


def _renamed(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights under their current names: the posterior's heads once belonged to the encoder."""
    head = re.compile(r"^encoder\.(?=(mean|logvar)\.)")
    return {head.sub("posterior.", str(name)): value for name, value in weights.items()}


class Checkpoints:
    """The checkpoints of one run: `last.pt` at intervals, `best.pt` when the test ELBO rises.

    Args:
        folder: `<run>/checkpoints`; made at the first write. Missing parents are made at once. A
            folder that is moved away later is not made again.
        config: The run's settings; stored inside, so that a checkpoint explains itself.
        every: Interval between two `last.pt`: epochs, or minutes as in `"10min"`. The final epoch
            and a run that is asked to stop always write one.
        data_sha256: SHA-256 of images and labels, by split. A run does not resume with other data.
        versions: Versions of code and libraries; stored inside.
        input_shape: Shape of the model's images; stored inside.
        classes: Number of classes of a conditional model; stored inside.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        *,
        every: int | str = 1,
        data_sha256: dict[str, str] | None = None,
        versions: dict[str, str] | None = None,
        input_shape: Sequence[int] = (784,),
        classes: int | None = None,
    ) -> None:
        self.versions = versions
        self.input_shape, self.classes = list(input_shape), classes
        self.started_from: dict[str, Any] | None = None  # another run's weights: see runs.origin
        self.stages: list[dict[str, Any]] = []  # of a run that was made longer: see runs.stages
        self.folder = folder
        self.config = config
        self.data_sha256 = data_sha256
        self.epochs, self.seconds = checkpoint_interval(every)
        self._saved = time.monotonic()
        self._history = _History(folder / "history.jsonl")
        self._made = False
        self._parents = not folder.parent.exists()  # to be made too

    def due(self) -> bool:
        """Whether the interval in minutes has passed."""
        return time.monotonic() - self._saved >= self.seconds

    def save(self, state: dict[str, Any]) -> None:
        """Write a state as `last.pt`."""
        self._write(["last.pt"], state)

    def save_epoch(self, state: dict[str, Any], *, best: bool, final: bool) -> None:
        """Write the state of a finished epoch if it is due or the best so far."""
        names = ["best.pt"] if best else []
        if final or (self.epochs and state["epoch"] % self.epochs == 0) or self.due():
            names.append("last.pt")  # last: a run killed between the two does the epoch again
        if names:
            self._write(names, state)

    def _write(self, names: list[str], state: dict[str, Any]) -> None:
        if not self._made:
            with suppress(FileExistsError):
                self.folder.mkdir(parents=self._parents)
            self._made = True
        rest = {key: value for key, value in state.items() if key != "history"}
        sealed = self._history.write(state.get("history", {}))
        about: dict[str, Any] = {
            "config": self.config.to_dict(),
            "data_sha256": self.data_sha256,
            "versions": self.versions,
            "input_shape": self.input_shape,
        }
        if self.classes:
            about["classes"] = self.classes
        if self.started_from:
            about["started_from"] = self.started_from
        if self.stages:
            about["stages"] = self.stages
        paths = [self.folder / name for name in names]
        save_checkpoint({**rest, **about, "history_seal": sealed}, *paths)
        if "last.pt" in names:
            self._saved = time.monotonic()

    def load(
        self, device: torch.device | str, *, but_for: Sequence[str] = ()
    ) -> dict[str, Any] | None:
        """The last state with its history, or None if the run has none yet.

        Args:
            device: Device of its tensors.
            but_for: Keys whose values may differ from the checkpoint's.

        Raises:
            CheckpointError: It or its history is damaged, or it is of a run with another config.
        """
        path = self.folder / "last.pt"
        if not path.exists():
            return None
        state = load_checkpoint(path, device)
        try:  # both ways: keys that are newer than the file get their defaults
            was = _what_matters(complete(config_from_dict(state["config"])).to_dict())
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from None
        now = _what_matters(complete(self.config).to_dict())
        for key in was.keys() | now.keys():
            if key not in but_for and was.get(key) != now.get(key):
                raise CheckpointError(
                    f"{path}: its run had {key}={was.get(key)}, this one has {now.get(key)}; "
                    "resume with the settings that it was started with"
                )
        if self.data_sha256:
            refuse_other_data(path, state, self.data_sha256, self.config.data.root)
        self.started_from = state.get("started_from")
        self.stages = state.get("stages", [])
        if "history" not in state:  # as in older checkpoints
            seal = state.get("history_seal")
            if not isinstance(seal, dict) or list(map(type, seal.values())) != [int, str]:
                raise CheckpointError(f"{path}: holds no seal of its history")
            state["history"] = self._history.read(*seal.values())
        return state


class _History:
    """`history.jsonl`: a line per epoch, written before the checkpoint that needs it.

    Bytes after those of the last checkpoint come from a run that was killed in between, or from a
    torn line; the next line overwrites them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._epochs = self._size = 0  # as of the last checkpoint
        self._sum = hashlib.sha256()

    def write(self, history: dict[str, list[Any]]) -> dict[str, Any]:
        """Add the epochs that are not in the file yet; returns the seal for a checkpoint."""
        epochs = len(next(iter(history.values()), []))
        if epochs > self._epochs:
            lines = "".join(history_lines(history, self._epochs)).encode()
            with self.path.open("r+b" if self._size else "wb") as file:
                file.seek(self._size)
                file.truncate()
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
            self._epochs, self._size = epochs, self._size + len(lines)
            self._sum.update(lines)
        return {"size": self._size, "sha256": self._sum.hexdigest()}

    def read(self, size: int, sha256: str) -> dict[str, list[Any]]:
        """The sealed bytes, as one list per metric; `write` continues after them."""
        try:
            with self.path.open("rb") as file:
                content = file.read(size)
        except OSError as error:
            if size:
                raise CheckpointError(f"{self.path}: {error.strerror}; put it back") from None
            content = b""
        self._sum = hashlib.sha256(content)
        if self._sum.hexdigest() != sha256:
            raise CheckpointError(
                f"{self.path}: damaged, or not of the last.pt beside it; put back the right one"
            )
        rows = [json.loads(line) for line in content.splitlines()]
        self._epochs, self._size = len(rows), size
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}


def refuse_other_data(path: Path, state: dict[str, Any], now: dict[str, str], root: str) -> None:
    """Refuse to resume or evaluate a run with other images or labels than it was started with.

    `now`: SHA-256 by split of the data under `root`; `state`: the content of the checkpoint at
    `path`.
    """
    had = state.get("data_sha256")
    if isinstance(had, dict) and any(str(had.get(split)) != now[split] for split in now):
        raise CheckpointError(
            f"{path}: its run had other images or labels than data root {root} holds now; name the "
            "folder with the original ones"
        )


def history_lines(history: dict[str, list[Any]], first: int = 0) -> list[str]:
    """One line of JSON per epoch of a history, from its `first` on.

    A line leaves out the metrics that its epoch lacks, which are None in the history.
    """
    lines = []
    for row in zip(*(values[first:] for values in history.values()), strict=True):
        metrics = {name: v for name, v in zip(history, row, strict=True) if v is not None}
        lines.append(json.dumps(metrics, default=list) + "\n")
    return lines


class StoredModel(NamedTuple):
    """The weights of a run, and what is known about them."""

    path: Path  # of the file
    weights: dict[str, Any]
    config: Config
    input_shape: tuple[int, ...]
    epoch: int | None
    sha256: str  # the checkpoint's seal
    own_parts: tuple[str, ...] = ()  # modules that were passed to the model
    classes: int | None = None  # of a conditional model


def classes_in(state: dict[str, Any]) -> int | None:
    """Number of classes of a conditional model, else None.

    Raises:
        TypeError: It is not a number of classes.
    """
    classes = state.get("classes")
    if classes is None or (type(classes) is int and 0 < classes < 2**20):
        return classes
    raise TypeError(f"it has {classes} classes")


def _what_matters(config: dict[str, Any]) -> dict[str, Any]:
    """Flat keys that must not change when a run continues."""
    return {
        key: value if isinstance(value, int | float | str | None) else repr(value)
        for key, value in flatten(config).items()
        if key not in INCIDENTAL
    }
