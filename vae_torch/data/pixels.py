"""Checks on images and labels of any source."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vae_torch.data.idx import DataError
from vae_torch.machine import wide

_CHUNK = 2**24  # pixels checked at once: a mapped file is never in memory as a whole


def as_pixels(images: Any, where: str) -> Tensor:
    """Images as a tensor (N, *shape), bytes or floats in [0, 1]; mapped files stay mapped.

    Booleans become the bytes 0 and 255. `where` begins a DataError's message.
    """
    if isinstance(images, np.ndarray):
        images = tensor_of(images, where)
    if not isinstance(images, Tensor):
        raise DataError(f"{where} are a {type(images).__name__}; must be an array or a tensor")
    x: Tensor = images
    if x.ndim < 2 or x.numel() == 0:
        raise DataError(f"{where} have shape {tuple(x.shape)}; must be (N, *shape), N >= 1")
    if x.dtype == torch.bool:
        x = x.to(torch.uint8) * 255
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        raise DataError(f"{where} are {x.dtype}; must be bytes (uint8), or floats in [0, 1]")
    extremes = wide(torch.stack([torch.stack(part.aminmax()) for part in in_parts(x)]))
    low, high = extremes[:, 0].min().item(), extremes[:, 1].max().item()  # NaN gives NaN
    if not 0 <= low <= high <= 1:
        raise DataError(
            f"{where} have values from {low:g} to {high:g}; floats must lie in [0, 1]: divide them "
            "by the highest value that a pixel can have (255 of bytes)"
        )
    return x


def tensor_of(array: np.ndarray, where: str = "images") -> Tensor:
    """An array as a tensor, sharing its memory if possible."""
    if array.dtype.kind not in "buif":
        raise DataError(f"{where} are {array.dtype}; must be bytes (uint8), or floats in [0, 1]")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 for stride in array.strides) or array.dtype == np.longdouble:
        array = np.ascontiguousarray(array, np.float64 if array.dtype.kind == "f" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # read-only: nothing writes into it
        return torch.from_numpy(array)


def in_parts(
    images: Tensor, rows: Tensor | None = None, *, pixels: int = _CHUNK
) -> Iterator[Tensor]:
    """The images, or those at `rows`, in order, some at a time: as many as have `pixels`."""
    step = max(1, pixels // max(1, images[0].numel()))
    if rows is None:
        yield from images.split(step)
    else:
        for some in rows.split(step):
            yield images.index_select(0, some)


def as_labels(labels: Any, count: int, where: str) -> Tensor:
    """Labels as (N,) int64."""
    y = tensor_of(labels, where) if isinstance(labels, np.ndarray) else torch.as_tensor(labels)
    if y.ndim == 2 and y.shape[1] == 1:  # as in Keras' CIFAR-10
        y = y[:, 0]
    if y.ndim != 1 or y.is_floating_point() or y.dtype == torch.bool:
        raise DataError(
            f"{where} have labels of shape {tuple(y.shape)}, {y.dtype}; must be (N,) whole numbers"
        )
    if len(y) != count:
        raise DataError(f"{where}: {len(y)} labels for {count} images; each needs one")
    return y.to(torch.int64)
