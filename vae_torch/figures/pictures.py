"""Images as pictures, grey (N, H, W) or colour (N, 3, H, W), and pictures as files."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vae_torch.files import write_atomically
from vae_torch.vae import VAE

if TYPE_CHECKING:  # half a second that runs without figures save
    from matplotlib.figure import Figure


_DECODED = 2**24  # pixels at once: limits memory


class NoPicturesError(ValueError):
    """Images that cannot be drawn: vectors, or channels other than grey and RGB."""


def pictures(vae: VAE, x: Tensor) -> Tensor:
    """Images of a model, flat or not, as pictures on the CPU.

    Returns:
        (N, H, W) grey, or (N, 3, H, W) colour.

    Raises:
        NoPicturesError: The model's images cannot be drawn.
    """
    return as_pictures(x.reshape(-1, *vae.input_shape))


@torch.no_grad()
def decoded_pictures(vae: VAE, z: Tensor) -> Tensor:
    """Expected pixels of latents (n, latent_dim), as `pictures` gives them."""
    at_once = max(1, _DECODED // math.prod(vae.input_shape))
    parts = z.to(next(vae.parameters())).split(at_once)
    return pictures(vae, torch.cat([vae.likelihood.mean(vae.decode(part)).cpu() for part in parts]))


def as_pictures(images: Tensor) -> Tensor:
    """(N, pixels), (N, H, W), (N, 1, H, W) or (N, 3, H, W) -> (N, H, W) or (N, 3, H, W), CPU.

    Raises:
        NoPicturesError: Another shape; flat images must be square.
    """
    images = images.detach().cpu()
    shape = tuple(images.shape)
    if images.ndim == 2:
        side = round(shape[1] ** 0.5)
        if side * side != shape[1]:
            raise NoPicturesError(f"images have shape {shape}; flat ones must be square")
        return images.reshape(-1, side, side)
    if images.ndim == 4 and shape[1] == 3:
        return images
    if images.ndim < 3 or any(size != 1 for size in shape[1:-2]):
        raise NoPicturesError(
            f"images have shape {shape}; they must be grey or colour: (N, height, width), "
            "(N, 1, height, width) or (N, 3, height, width)"
        )
    return images.reshape(len(images), *shape[-2:])


def shrunk(images: Tensor, longest: int) -> Tensor:
    """Pictures (..., H, W) with sides of at most `longest` pixels; smaller ones are unchanged."""
    sides = images.shape[-2:]
    if max(sides) <= longest:
        return images
    size = [max(1, round(side * longest / max(sides))) for side in sides]
    channels = images.reshape(len(images), -1, *sides)
    small = torch.nn.functional.interpolate(channels, size, mode="area")
    return small.reshape(*images.shape[:-2], *size)


def to_pixels(picture: "Tensor | Figure") -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 of a grid or a plot."""
    if isinstance(picture, Tensor):
        return (picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def to_png(picture: "Tensor | Figure | np.ndarray", *, scale: int = 1) -> bytes:
    """A grid or plot as a PNG file; `scale` repeats each pixel, for grids of small images."""
    from PIL import Image

    pixels = picture if isinstance(picture, np.ndarray) else to_pixels(picture)
    if scale > 1:
        pixels = pixels.repeat(scale, 0).repeat(scale, 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def save_png(picture: "Tensor | Figure | np.ndarray", path: str | Path, *, scale: int = 1) -> None:
    """Write `to_png`."""
    write_atomically(Path(path), to_png(picture, scale=scale))


def read_png(path: Path) -> np.ndarray:
    """Read a file that `save_png` wrote."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image)


def save_gif(frames: Sequence[np.ndarray], path: str | Path, *, milliseconds: int = 250) -> None:
    """Write frames, grey or colour, as an animation that loops and pauses on its last frame.

    Raises:
        ValueError: No frame.
    """
    from PIL import Image

    if not frames:
        raise ValueError("no frames: an animation needs one or more")
    first, *rest = (Image.fromarray(frame) for frame in frames)
    buffer = io.BytesIO()
    durations = [milliseconds] * len(rest) + [2000]
    first.save(buffer, "gif", save_all=True, append_images=rest, duration=durations, loop=0)
    write_atomically(Path(path), buffer.getvalue())
