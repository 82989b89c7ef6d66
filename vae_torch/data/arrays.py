"""NumPy arrays as images: `data=array data.root=FILE.npz` or `FILE.npy`."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vae_torch.config import ConfigError, in_short
from vae_torch.data.idx import DataError
from vae_torch.data.table import Images, Splits, data_sources

Layout = Literal["auto", "NCHW", "NHWC"]
_NAMES = ("x", "x_train", "x_test", "y", "y_train", "y_test")
_MAGIC = b"\x93NUMPY"
_CHANNELS = 4  # at most, if the layout is not given


@data_sources.register("array")
def array(root: Path, *, layout: Layout = "auto") -> Splits:
    """Read the arrays of a file; a `.npy` is memory-mapped, so it may be larger than memory.

    Args:
        root: A `.npy` with the images; or a `.npz` with `x`, or `x_train` and `x_test`, and
            their labels `y`, or `y_train` and `y_test`.
        layout: Position of the channels; `auto`: the dimension of size 4 or less.

    Raises:
        DataError: The file cannot be read or holds no images; nothing in it is ever unpickled.
        ConfigError: `root` is not such a file, or the position of the channels is ambiguous.
    """
    if root.suffix not in (".npy", ".npz") or not root.is_file():
        raise ConfigError(f"data.root={root}: must be a .npz or .npy file")
    held = _opened(root)
    trained, tested = ("x", None) if "x" in held else ("x_train", "x_test")
    if trained not in held:
        raise DataError(
            f"{root}: holds {', '.join(sorted(held)) or 'nothing'}; must hold x, or x_train and "
            "x_test, and may hold their labels y, or y_train and y_test"
        )
    try:
        return in_memory(
            held[trained],
            held.get(tested) if tested else None,
            held.get(trained.replace("x", "y")),
            held.get("y_test") if tested else None,
            layout,
        )
    except DataError as error:
        raise DataError(f"{root}: {error}") from None


def in_memory(x_train: Any, x_test: Any, y_train: Any, y_test: Any, layout: str) -> Splits:
    """Arrays or tensors as the images of a source; labels may be words."""
    if x_test is None and y_test is not None:
        raise DataError("y_test without x_test: labels need images; give both or neither")
    classes = None
    labels = [None if y is None else np.asarray(y) for y in (y_train, y_test)]
    given = [y for y in labels if y is not None]
    words = [y.astype(str).ravel() for y in given if y.dtype.kind in "US"]
    if words and len(words) < len(given):
        raise DataError("labels are words in one part and numbers in the other; use one kind")
    if words:
        names = np.unique(np.concatenate(words))
        classes = names.tolist()
        labels = [y if y is None else np.searchsorted(names, y.astype(str).ravel()) for y in labels]
    train = Images(_channels_first(x_train, layout), labels[0])
    test = None if x_test is None else Images(_channels_first(x_test, layout), labels[1])
    return Splits(train, test, classes)


def _opened(path: Path) -> Mapping[str, Any]:
    """The arrays of a file, by name; those of a `.npy` are mapped, as `x`."""
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) == _MAGIC:
                return {"x": np.load(path, mmap_mode="r", allow_pickle=False)}
            file.seek(0)
            if not zipfile.is_zipfile(file):
                raise ValueError("no NumPy file")
            file.seek(0)
            with np.load(file, allow_pickle=False) as held:
                return {name: held[name] if name in _NAMES else None for name in held.files}
    except Exception as error:  # crafted bytes can raise anything
        reason = in_short(error)
        if "pickle" in reason or "bject" in reason:
            reason = "it holds Python objects, which may run code"
        raise DataError(
            f"{path}: refused ({reason}); save plain numbers with numpy.save or numpy.savez"
        ) from None


def _channels_first(x: Any, layout: str) -> Any:
    """(N, H, W, C) as (N, C, H, W), without a copy; other shapes are unchanged."""
    if not isinstance(x, np.ndarray | torch.Tensor) or x.ndim != 4:
        if isinstance(x, np.ndarray | torch.Tensor) and x.ndim not in (2, 3):
            raise DataError(
                f"images have shape {tuple(x.shape)}; must be (N, H, W), (N, H, W, C), "
                "(N, C, H, W) or (N, D)"
            )
        return x
    first, last = x.shape[1] <= _CHANNELS, x.shape[3] <= _CHANNELS
    if layout == "auto" and first == last:
        raise ConfigError(
            f"data.options.layout=auto: images of shape {tuple(x.shape[1:])} may have their "
            "channels first or last; set data.options.layout=NCHW or NHWC"
        )
    if layout == "NCHW" or (layout == "auto" and first):
        return x
    return x.transpose(0, 3, 1, 2) if isinstance(x, np.ndarray) else x.permute(0, 3, 1, 2)
