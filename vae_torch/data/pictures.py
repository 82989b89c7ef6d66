"""Reads image files in parallel: any mode, size and orientation that Pillow supports."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from vae_torch.bars import bar
from vae_torch.config import ConfigError, in_short
from vae_torch.data.idx import DataError

_AT_ONCE = 256  # files whose pixels are in memory at once
_TOLD = 3  # damaged files that a message names
_ORIENTATION = 0x0112  # of EXIF
_GREY = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")

Result = TypeVar("Result")


class Form(NamedTuple):
    """The form that all pictures of a set get."""

    height: int
    width: int
    channels: int
    background: str  # behind transparent pixels


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, from N or [height, width]."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def colour(name: str) -> tuple[int, int, int]:
    """A colour name, `white` or `#ffffff`, as red, green and blue."""
    try:
        return ImageColor.getrgb(name)[:3]
    except ValueError:
        raise ConfigError(
            f"data.background={name}: must be a colour, such as white, black or '#ff8800'"
        ) from None


def looks(image: Image.Image) -> tuple[int, int, int]:
    """Height, width and channels of an opened file, upright, before its pixels are read."""
    width, height = image.size
    if image.getexif().get(_ORIENTATION, 1) >= 5:
        width, height = height, width
    return height, width, 1 if image.mode in _GREY else 3


def pixels(image: Image.Image, form: Form) -> np.ndarray:
    """An opened file's pixels, (C, H, W) uint8: its first frame, upright, center-cropped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.has_transparency_data:
        behind = Image.new("RGBA", image.size, colour(form.background))
        image = Image.alpha_composite(behind, image.convert("RGBA"))
    image = image.convert("L" if form.channels == 1 else "RGB")
    if image.size != (form.width, form.height):
        image = ImageOps.fit(image, (form.width, form.height), Image.Resampling.LANCZOS)
    array = np.asarray(image).reshape(form.height, form.width, form.channels)
    return array.transpose(2, 0, 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey image in 8 bits; Pillow would clip every value at 255."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F" or not (low >= 0 and high <= 65_535):
        raise ValueError(f"grey values from {low:g} to {high:g}; 8 and 16 bits are known")
    if "transparency" in image.info:
        raise ValueError("16-bit grey with transparency; save it with 8 bits")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32_767) // 65_535).astype(np.uint8))


@contextmanager
def no_bombs() -> Iterator[None]:
    """Inside the block, a file beyond Pillow's pixel limit raises instead of warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def form_of(
    root: Path, names: Sequence[str], size: int | Sequence[int] | None, channels: int | None
) -> tuple[int, int, int]:
    """Height, width and channels of all files; missing ones are looked up in the files."""
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
    """The pixels of every file, (C, H, W) uint8, in order; damaged files raise at the end."""
    return _in_parallel(root, names, lambda image: pixels(image, form), "decoding images")


def _in_parallel(
    root: Path, names: Sequence[str], read: Callable[[Image.Image], Result], words: str
) -> Iterator[Result]:
    def results(pool: ThreadPoolExecutor) -> Iterator[Result | Exception]:
        for start in range(0, len(names), _AT_ONCE):  # a few at a time, to limit memory
            paths = (root / name for name in names[start : start + _AT_ONCE])
            yield from pool.map(lambda path: _tried(path, read), paths)

    broken: list[str] = []
    # for small files, more than 16 threads wait for each other
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
    except Exception as error:  # Pillow raises almost anything for a damaged file
        return error


def _reason(error: Any) -> str:
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    if isinstance(error, UnidentifiedImageError):
        return "no image"
    return in_short(error, 80)


def _cores() -> int:
    here = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if here else os.cpu_count() or 1
