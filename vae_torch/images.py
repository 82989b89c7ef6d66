"""Batches of images, and the checks on an image's shape and values.

`as_images` checks the shape, `check_pixels` the values.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# The range of pixels that a likelihood has a density for, unless its `pixels` says otherwise.
UNIT_INTERVAL = (0.0, 1.0)


class Batch(NamedTuple):
    """Images and, where there are any, their labels."""

    x: Tensor  # (B, *shape) in [0, 1]
    y: Tensor | None = None  # (B,) int64

    def rows(self, chosen: Tensor | slice) -> "Batch":
        """Some of its images."""
        return Batch(self.x[chosen], None if self.y is None else self.y[chosen])

    def split(self, size: int) -> "Iterator[Batch]":
        """Smaller batches, of `size` images at most."""
        for first in range(0, len(self.x), size):
            yield self.rows(slice(first, first + size))


def as_images(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Images in the shape that a model reads: (B, *any) -> (B, *shape).

    Args:
        x: Images, floats.
        shape: Shape of one image.

    Raises:
        ValueError: Another shape (see `check_shape`), or integer pixels.
    """
    check_shape(x, shape)
    _check_floats(x)
    return x.reshape(len(x), *shape)


def check_shape(x: Tensor, shape: Sequence[int]) -> None:
    """Refuse a tensor that does not hold images of this shape.

    The shapes must be equal once dimensions of size 1 are dropped, or one of them flat. Anything
    else with as many pixels is refused: its channels or rows would be taken for images.

    Args:
        x: (B, *any).
        shape: Of one image.

    Raises:
        ValueError: Shows both shapes.
    """
    if x.ndim > 1 and _same_image(x.shape[1:], shape):
        return
    flat, whole = f"(B, {math.prod(shape)})", f"(B, {', '.join(map(str, shape))})"
    allowed = f"{flat}, or any shape with as many pixels after B"
    if len(_without_ones(shape)) > 1:
        allowed = f"{whole} or {flat}"
    raise ValueError(f"x has shape {tuple(x.shape)}; this model takes {allowed}")


def pair_images(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Images and the decoder's output for them: (B, pixels) and (..., B, pixels).

    Args:
        x: (B, *shape).
        logits: (..., B, *shape), or either of them flat.

    Raises:
        ValueError: Images of different shapes, or different numbers of them.
    """
    if logits.shape[logits.ndim - x.ndim :] == x.shape:
        return x.flatten(1), logits.flatten(logits.ndim - x.ndim + 1)
    places = [  # of B in the shape of logits
        place
        for place, size in enumerate(logits.shape[:-1])
        if x.ndim > 1 and size == len(x) and _same_image(x.shape[1:], logits.shape[place + 1 :])
    ]
    if len(places) != 1:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and logits {tuple(logits.shape)}; both must hold the "
            "same number of images of one shape, (B, *shape) and (..., B, *shape)"
        )
    return x.flatten(1), logits.flatten(places[0] + 1)


def check_pixels(x: Tensor, allowed: tuple[float, float] = UNIT_INTERVAL) -> None:
    """Refuse pixels that are NaN, infinite or out of range.

    Nothing is checked where values cannot be read: in torch.func, torch.compile, a CUDA graph, or
    on the meta device.

    Args:
        x: Pixels, floats.
        allowed: The lowest and the highest value that a pixel may have.

    Raises:
        ValueError: Shows the shape and the range of x, or its type if it holds integers.
    """
    _check_floats(x)
    if x.numel() == 0 or not _can_be_read(x):
        return
    low, high = torch.stack(x.detach().aminmax()).tolist()
    if not (math.isfinite(low) and math.isfinite(high) and allowed[0] <= low <= high <= allowed[1]):
        needed = "in [0, 1] (divide bytes by 255)" if allowed == UNIT_INTERVAL else "and finite"
        raise ValueError(
            f"x of shape {tuple(x.shape)} has values from {low:g} to {high:g}; pixels are floats "
            f"{needed}"
        )


def check_labels(y: Tensor, classes: int) -> None:
    """Refuse labels other than the whole numbers from 0 to `classes` - 1.

    Where values cannot be read, as in `check_pixels`, only their type is checked.

    Raises:
        ValueError: Shows the type, or the range of y.
    """
    allowed = f"labels are whole numbers from 0 to {classes - 1}"
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"y is {y.dtype}; {allowed}")
    if y.numel() == 0 or not _can_be_read(y):
        return
    low, high = torch.stack(y.aminmax()).tolist()
    if low < 0 or high >= classes:
        raise ValueError(f"y has values from {low} to {high}; {allowed}")


def _check_floats(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; pixels are floats in [0, 1] (divide bytes by 255)")


def _same_image(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes describe the same image."""
    a, b = _without_ones(a), _without_ones(b)
    return a == b or (math.prod(a) == math.prod(b) and min(len(a), len(b)) < 2)


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _can_be_read(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or x.is_meta:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())
