"""The benchmark files of the literature: binarised MNIST, OMNIGLOT, Caltech-101 silhouettes.

Nothing is downloaded. Each source tells which file it needs and where, and checks its content.
"""

from pathlib import Path
from typing import Any

import numpy as np

from vae_torch.config import in_short
from vae_torch.data.idx import DataError
from vae_torch.data.table import Images, Splits, data_sources

_SIDE = 28
_PIXELS = _SIDE * _SIDE

# Number of images in each file, or in each part of it.
_LAROCHELLE = {"train": 50_000, "valid": 10_000, "test": 10_000}
_OMNIGLOT = {"data": 24_345, "testdata": 8_070}
_CALTECH = {"train": 4_100, "val": 2_264, "test": 2_307}


@data_sources.register("larochelle")
def larochelle(root: Path) -> Splits:
    """MNIST binarised once by Larochelle and Murray (2011): 60,000 and 10,000 images, no labels.

    The last 10,000 training images are its validation images: `data.hold_out=10000`.

    Args:
        root: Holds `binarized_mnist_train.amat`, `..._valid.amat` and `..._test.amat`.

    Raises:
        DataError: A file is missing, or its layout differs from the published one's.
    """
    where = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist"
    train, valid, test = (
        _amat(_found(root, f"binarized_mnist_{part}.amat", where), count)
        for part, count in _LAROCHELLE.items()
    )
    return Splits(Images(np.concatenate([train, valid])), Images(test), mixed=True)


@data_sources.register("omniglot")
def omniglot(root: Path) -> Splits:
    """OMNIGLOT at 28x28, split as by Burda et al. (2016): 24,345 and 8,070 grey images.

    The labels are the alphabets. `data.binarize=dynamic` gives the paper's binary images.

    Args:
        root: Holds `chardata.mat`.

    Raises:
        DataError: The file is missing, or its layout differs from the published one's.
    """
    where = "https://github.com/yburda/iwae/tree/master/datasets/OMNIGLOT"
    path = _found(root, "chardata.mat", where)
    held = _mat(path)
    parts = []
    for (pixels, count), labels in zip(_OMNIGLOT.items(), ("target", "testtarget"), strict=True):
        images = _part(path, held, pixels, (_PIXELS, count)).T
        alphabets = _part(path, held, labels, (50, count)).argmax(0)
        parts.append(Images(_upright(images).astype(np.float32), alphabets))
    return Splits(parts[0], parts[1])


@data_sources.register("caltech101_silhouettes")
def caltech101_silhouettes(root: Path) -> Splits:
    """Caltech-101 silhouettes at 28x28, split 1 of Marlin et al. (2010): 6,364 and 2,307 images.

    The last 2,264 training images are its validation images: `data.hold_out=2264`. Pixels are as
    in the file; some authors exchange black and white.

    Args:
        root: Holds `caltech101_silhouettes_28_split1.mat`.

    Raises:
        DataError: The file is missing, or its layout differs from the published one's.
    """
    where = "https://people.cs.umass.edu/~marlin/data.shtml"
    path = _found(root, "caltech101_silhouettes_28_split1.mat", where)
    held = _mat(path)
    parts = {}
    for part, count in _CALTECH.items():
        images = _part(path, held, f"{part}_data", (count, _PIXELS))
        labels = _part(path, held, f"{part}_labels", (count, 1))[:, 0].astype(np.int64) - 1
        parts[part] = (_upright(images) != 0, labels)
    train, val = parts["train"], parts["val"]
    both = Images(np.concatenate([train[0], val[0]]), np.concatenate([train[1], val[1]]))
    names = [str(np.ravel(name)[0]) for name in np.ravel(held.get("classnames", []))]
    return Splits(both, Images(*parts["test"]), names or None, mixed=True)


def _found(root: Path, name: str, where: str) -> Path:
    """A file in the data folder; the error message says `where` to get it."""
    if not (root / name).is_file():
        raise DataError(f"{root / name}: is missing; get it from {where}")
    return root / name


def _amat(path: Path, count: int) -> np.ndarray:
    """Lines of 784 digits 0 or 1, as (N, 1, 28, 28) bool."""
    text = np.fromfile(path, np.uint8)
    digits = (text == ord("0")) | (text == ord("1"))
    lines = int((text == ord("\n")).sum()) + (len(text) > 0 and text[-1] != ord("\n"))
    blank = np.isin(text[~digits], np.frombuffer(b" \r\n", np.uint8))
    if not blank.all() or lines != count or digits.sum() != count * _PIXELS:
        raise DataError(
            f"{path}: {lines:,} lines, {int(digits.sum()):,} digits; the published file has "
            f"{count:,} lines of {_PIXELS} zeros and ones; download it again"
        )
    pixels: np.ndarray = text[digits] == ord("1")
    return pixels.reshape(-1, 1, _SIDE, _SIDE)


def _mat(path: Path) -> dict[str, Any]:
    """The arrays of a MATLAB file."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError:
        raise DataError(f"{path}: scipy is not installed; pip install scipy") from None
    try:
        held: dict[str, Any] = loadmat(path)
    except Exception as error:  # crafted bytes can raise anything
        raise DataError(f"{path}: no MATLAB file ({in_short(error)}); download it again") from None
    return held


def _part(path: Path, held: dict[str, Any], name: str, shape: tuple[int, int]) -> np.ndarray:
    array = held.get(name)
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype.kind not in "buif":
        has = f"has shape {array.shape}" if isinstance(array, np.ndarray) else "is missing"
        raise DataError(f"{path}: {name} {has}; must have {shape}; download the file again")
    return array


def _upright(images: np.ndarray) -> np.ndarray:
    """Transpose MATLAB's images, stored by columns: (N, 784) -> (N, 1, 28, 28)."""
    return images.reshape(-1, 1, _SIDE, _SIDE).swapaxes(2, 3)
