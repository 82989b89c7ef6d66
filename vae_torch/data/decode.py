"""Many image files as pixels, in parallel."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from vae_torch.bars import bar
from vae_torch.data.idx import DataError
from vae_torch.data.pictures import Form, looks, no_bombs, pixels, sides

_AT_ONCE = 512  # files whose pixels are in memory together
_TOLD = 3  # damaged files that a refusal names

Result = TypeVar("Result")


def form_of(
    root: Path, names: Sequence[str], size: int | Sequence[int] | None, channels: int | None
) -> tuple[int, int, int]:
    """Height, width and channels of all files; what is not given is looked up in them."""
    seen = list(_in_parallel(root, names, looks, "looking at images"))
    channels = channels or max(look[2] for look in seen)
    if size is not None:
        return *sides(size), channels
    sizes = {(look[0], look[1]): name for look, name in zip(seen, names, strict=True)}
    if len(sizes) > 1:
        (low, first), (high, last) = min(sizes.items()), max(sizes.items())
        raise DataError(
            f"{root}: images have {len(sizes)} sizes, {low[0]}x{low[1]} ({first}) to "
            f"{high[0]}x{high[1]} ({last}); set data.size=N or [HEIGHT,WIDTH]"
        )
    return *next(iter(sizes)), channels


def decoded(root: Path, names: Sequence[str], form: Form) -> Iterator[np.ndarray]:
    """The pixels of every file, (C, H, W) uint8, in order; damaged ones are refused at the end."""
    return _in_parallel(root, names, lambda image: pixels(image, form), "decoding images")


def _in_parallel(
    root: Path, names: Sequence[str], read: Callable[[Image.Image], Result], words: str
) -> Iterator[Result]:
    def results(pool: ThreadPoolExecutor) -> Iterator[Result | Exception]:
        for start in range(0, len(names), _AT_ONCE):  # not all, so that memory is flat
            paths = (root / name for name in names[start : start + _AT_ONCE])
            yield from pool.map(lambda path: _tried(path, read), paths)

    broken: list[str] = []
    # of small files, more threads than 16 wait for each other
    with no_bombs(), ThreadPoolExecutor(min(16, _cores())) as pool:
        for name, result in zip(bar(names, words, show=True), results(pool), strict=True):
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
    here = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if here else os.cpu_count() or 1
