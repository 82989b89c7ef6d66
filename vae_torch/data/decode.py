"""Many image files as pixels, in parallel."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from vae_torch.bars import bar
from vae_torch.data.idx import DataError
from vae_torch.data.pictures import Form, looks, no_bombs, pixels

_CHUNK = 32  # files that one thread reads at a time
_TOLD = 3  # damaged files that a refusal names

Result = TypeVar("Result")


class Named(Protocol):
    """Anything with a file's name."""

    @property
    def name(self) -> str:
        """From the data folder on."""


def form_of(
    root: Path, files: Sequence[Named], size: int | Sequence[int] | None, channels: int | None
) -> tuple[int, int, int]:
    """Height, width and channels of all files; what is not given is looked up in them.

    Raises:
        DataError: They have several sizes, or cannot be read.
    """
    names = [file.name for file in files]
    seen = list(_in_parallel(root, names, looks, "looking at images"))
    channels = channels or max(look[2] for look in seen)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        return height, width, channels
    sizes = {(look[0], look[1]): name for look, name in zip(seen, names, strict=True)}
    if len(sizes) > 1:
        (low, first), (high, last) = min(sizes.items()), max(sizes.items())
        raise DataError(
            f"{root}: images have {len(sizes)} sizes, {low[0]}x{low[1]} ({first}) to "
            f"{high[0]}x{high[1]} ({last}); set data.size=N or [HEIGHT,WIDTH]"
        )
    ((height, width),) = sizes
    return height, width, channels


def decoded(root: Path, files: Sequence[Named], form: Form) -> Iterator[np.ndarray]:
    """The pixels of every file, (C, H, W) uint8, in order.

    Raises:
        DataError: Names the files that cannot be read, once all have been tried.
    """
    names = [file.name for file in files]
    return _in_parallel(root, names, lambda image: pixels(image, form), "decoding images")


def _in_parallel(
    root: Path, names: Sequence[str], read: Callable[[Image.Image], Result], words: str
) -> Iterator[Result]:
    def some(start: int) -> list[Result | Exception]:
        return [_tried(root / name, read) for name in names[start : start + _CHUNK]]

    broken: list[str] = []
    with no_bombs(), ThreadPoolExecutor(_cores()) as pool:
        results = _ahead(pool, some, range(0, len(names), _CHUNK))
        for name, result in zip(bar(names, words, show=True), results, strict=True):
            if isinstance(result, Exception):
                broken.append(f"{name} ({_reason(result)})")
            elif not broken:
                yield result
    if broken:
        more = f" and {len(broken) - _TOLD} more" if len(broken) > _TOLD else ""
        raise DataError(
            f"{root}: {len(broken)} of {len(names)} images cannot be read: "
            f"{', '.join(broken[:_TOLD])}{more}; remove or replace them"
        )


def _ahead(
    pool: ThreadPoolExecutor, some: Callable[[int], list[Result]], starts: Iterable[int]
) -> Iterator[Result]:
    """The results of all chunks, in order; only a few wait to be taken, so that memory is flat."""
    waiting: deque[Future[list[Result]]] = deque()
    for start in starts:
        waiting.append(pool.submit(some, start))
        if len(waiting) > 4 * _cores():
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def _tried(path: Path, read: Callable[[Image.Image], Result]) -> Result | Exception:
    try:
        with Image.open(path) as image:
            return read(image)
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        return error


def _reason(error: Any) -> str:
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    if isinstance(error, UnidentifiedImageError):
        return "no image"
    return " ".join(str(error).split())[:80] or type(error).__name__


def _cores() -> int:
    """Those of this process; of small files, more threads than 16 wait for each other."""
    here = hasattr(os, "sched_getaffinity")
    return min(16, len(os.sched_getaffinity(0)) if here else os.cpu_count() or 1)
