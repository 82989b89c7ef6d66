"""Images as one tensor, and DataLoaders that take whole batches from it.

The images of a split live in memory as one uint8 tensor (MNIST: 47 MB). A batch is one indexing
of it, a small part of a training step; decoding images one by one costs more than the step.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vae_torch.config import CHOICES, Config
from vae_torch.data.idx import DataError
from vae_torch.data.sources import Images, load_images
from vae_torch.images import Batch, check_pixels, check_shape
from vae_torch.seeds import (
    BINARIZE_SEED,
    STATIC_TEST,
    STATIC_TRAIN,
    Stream,
    mix_seed,
    seeded_generator,
)

# The label of an image that has none: no class has this number.
_UNLABELLED = -(2**63)

Loader = DataLoader[tuple[Tensor, Tensor]]  # of x (B, *shape) in [0, 1] and labels (B,)

# What `as_loader` takes: a loader, any other iterable of batches, or the images themselves.
Data = Loader | Iterable[Any] | Tensor | np.ndarray


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
            self.dataset.binarize_generator.manual_seed(
                mix_seed(self.seed, self.epoch, Stream.PIXELS, *rest)
            )
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
        test = Images(binarize_images(test.images, salt=STATIC_TEST), test.labels)
    if binarize == "static":
        train = Images(binarize_images(train.images, salt=STATIC_TRAIN), train.labels)
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


def as_batch(batch: Any, device: torch.device, dtype: torch.dtype) -> Batch:
    """What a loader gives as images and labels on a device.

    Raises:
        ValueError: See `images_of`.
    """
    x = images_of(batch).to(device, dtype, non_blocking=True)
    y = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
    if isinstance(y, np.ndarray):
        y = torch.from_numpy(y)
    if not isinstance(y, Tensor) or y.shape != (len(x),):
        return Batch(x)
    return Batch(x, y.to(device, non_blocking=True))


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
    generator = seeded_generator("cpu", BINARIZE_SEED, salt)
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


def _as_fetched(batch: Any) -> Any:
    return batch
