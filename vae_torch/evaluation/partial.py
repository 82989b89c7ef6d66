"""Finished images of an evaluation, kept in a file so that an interrupted evaluation resumes."""

import io
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vae_torch.bars import bar
from vae_torch.files import write_atomically
from vae_torch.machine import wide
from vae_torch.vae import VAE

_EVERY = 10.0  # seconds between writes


class Partial:
    """The values of finished images, by estimate.

    Args:
        path: The file. A damaged one, or one of another protocol, is replaced.
        protocol: Everything that the values depend on: weights, images, samples, random seed.
    """

    def __init__(self, path: Path, protocol: str) -> None:
        self.path, self.protocol = path, protocol
        self._rows: dict[str, Any] = {}
        with suppress(OSError, ValueError, LookupError, zipfile.BadZipFile):
            file = np.load(io.BytesIO(path.read_bytes()))
            if str(file["protocol"]) == protocol:
                self._rows = {name: file[name] for name in file.files if name != "protocol"}

    @property
    def begun(self) -> bool:
        """Whether some images are finished."""
        return bool(self._rows)

    def rows(self, name: str) -> Tensor | None:
        """(images, values); None if the estimate has not begun."""
        found = self._rows.get(name)
        return None if found is None else torch.from_numpy(found)

    def keep(self, name: str, rows: Tensor) -> None:
        """Write the file."""
        self._rows[name] = rows.cpu().numpy()
        file = io.BytesIO()
        arrays: dict[str, Any] = {"protocol": np.array(self.protocol), **self._rows}
        np.savez(file, **arrays)
        write_atomically(self.path, file.getvalue())

    def remove(self) -> None:
        """Delete the file once the card is complete."""
        self.path.unlink(missing_ok=True)


def in_parts(
    work: Callable[[int, int], Tensor],
    images: int,
    at_once: int,
    *,
    vae: VAE,
    name: str,
    store: Partial | None,
    progress: bool,
) -> Tensor:
    """The results of `work(start, stop)` for all images, part by part: (images, values).

    Parts that `store` holds under `name`, and under the class of a conditional model, are not
    computed again.
    """
    name = f"{name}, {images} images"  # another number of them would be other images
    name = name if vae.y is None else f"{name}, class {vae.y.tolist()}"
    known = store.rows(name) if store else None
    at = wide(next(vae.parameters())[:0]).device
    rows = [] if known is None else [known.to(at)]
    done, written = sum(map(len, rows)), time.monotonic()
    for start in bar(range(done, images, at_once), "log p(x)", show=progress):
        rows.append(work(start, min(start + at_once, images)))
        done += len(rows[-1])
        if store and (time.monotonic() - written >= _EVERY or done == images):
            store.keep(name, torch.cat(rows))
            written = time.monotonic()
    return torch.cat(rows)
