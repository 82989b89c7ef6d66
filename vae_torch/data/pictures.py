"""One image file as pixels: any mode, size and orientation that Pillow reads."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps

from vae_torch.config import ConfigError

_ORIENTATION = 0x0112  # of EXIF
_GREY = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class Form(NamedTuple):
    """What every picture of a set is made into."""

    height: int
    width: int
    channels: int
    background: str  # behind transparent pixels


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, from N or [height, width]."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def colour(name: str) -> tuple[int, int, int]:
    """A colour's name, `white` or `#ffffff`, as red, green and blue."""
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
    """An opened file's pixels, (C, H, W) uint8: its first frame, upright, cut to the middle."""
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
    """A grey image of 16 bits; Pillow itself would cut every value at 255."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F" or not (low >= 0 and high <= 65_535):
        raise ValueError(f"grey values from {low:g} to {high:g}; 8 and 16 bits are known")
    if "transparency" in image.info:
        raise ValueError("16-bit grey with transparency; save it with 8 bits")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32_767) // 65_535).astype(np.uint8))


@contextmanager
def no_bombs() -> Iterator[None]:
    """Within, a file that claims more pixels than Pillow's limit is refused, not warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
