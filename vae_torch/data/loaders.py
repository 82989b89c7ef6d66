"""DataLoaders over the images of sources: split, binarised, limited."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae_torch.config import Config, DataConfig, validated
from vae_torch.data.batches import Loader, image_loader
from vae_torch.data.dataset import ImageDataset
from vae_torch.data.idx import DataError
from vae_torch.data.pixels import in_parts
from vae_torch.data.splits import Part, divide
from vae_torch.data.table import Splits, as_tensors, load_source
from vae_torch.seeds import BINARIZE_SEED, STATIC_TEST, STATIC_TRAIN, seeded_generator

_log = logging.getLogger("vae_torch")

_EVALUATED = 2**24  # pixels of a test batch, at most; 1,000 images of 28x28 always fit


def loaders_of(config: Config, device: torch.device | str) -> tuple[Loader, Loader]:
    """Training and test loader for a run's config; see `mnist_loaders`."""
    return _loaders(load_source(config.data), config.data, seed=config.seed, device=device)


def mnist_loaders(
    root: str | Path = "data",
    *,
    name: str = "mnist",
    batch_size: int = 128,
    binarize: str = "none",
    limit_train: int | None = None,
    limit_test: int | None = None,
    hold_out: int | float = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Loader, Loader]:
    """The training loader (shuffled) and the test loader (in order), of x (B, 784) and label (B,).

    Args:
        root: The data folder; see `load_images`.
        name: A member of the MNIST family.
        batch_size: Images per batch; the last batch may be smaller.
        binarize: `none` (grey), `dynamic` (training pixels sampled anew every epoch) or `static`
            (sampled once). Both evaluate on the same binarised test set.
        limit_train: Only the first N training images.
        limit_test: Only the first N test images.
        hold_out: Keep the last N training images (or this share of them) for the second loader,
            instead of the test set.
        seed: Random seed of every epoch's order and of dynamic binarisation.
        device: Device of the images.

    Raises:
        DataError: As in `load_images`; or `hold_out` leaves no training images.
        ValueError: An unknown name or binarisation, a size below 1.
    """
    settings = _settings(
        name, root, batch_size, binarize, hold_out, limit_train=limit_train, limit_test=limit_test
    )
    return _loaders(load_source(settings), settings, seed=seed, device=device)


def folder_loaders(
    root: str | Path,
    *,
    size: int | Sequence[int] | None = None,
    channels: int | None = None,
    background: str = "white",
    batch_size: int = 128,
    binarize: str = "none",
    hold_out: int | float | str = 0,
    classes: Sequence[int | str] | None = None,
    augment: str = "none",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Loader, Loader]:
    """Training and test loader of a folder of image files, of x (B, C, H, W) and label (B,).

    Without sub-folders and `labels.csv` there are no labels, and a batch is (x,).

    Args:
        root: The folder. `train` and `test` in it hold training and test images; other sub-folders
            are classes.
        size: Resize and crop to this size: N, or (height, width). Not needed if all have one size.
        channels: 1 (grey) or 3 (colour). If absent: colour if any image has some.
        background: The colour behind transparent pixels: `white`, `#ffffff`.
        batch_size: Images per batch; the last batch may be smaller.
        binarize: As in `mnist_loaders`.
        hold_out: Number or share of training images to test on, the same ones for every `seed`. 0:
            the images in `test`, or a tenth of all if there is no `test`. `test`: only the images
            in `test`.
        classes: Only these classes, by number or name.
        augment: `shift`, `flip` or `none`: of training images, anew every epoch.
        seed: Random seed of every epoch's order, augmentation and dynamic binarisation.
        device: Device of the images.

    Raises:
        DataError: No image, an unreadable one, or images of several sizes without `size`.
        ConfigError: A setting that is not allowed.
    """
    settings = _settings(
        "folder",
        root,
        batch_size,
        binarize,
        hold_out,
        size=list(size) if isinstance(size, Sequence) else size,
        channels=channels,
        background=background,
        classes=None if classes is None else list(classes),
        augment=augment,
    )
    return _loaders(load_source(settings), settings, seed=seed, device=device)


def array_loaders(
    x_train: Any,
    x_test: Any = None,
    *,
    y_train: Any = None,
    y_test: Any = None,
    batch_size: int = 128,
    binarize: str = "none",
    hold_out: int | float = 0,
    augment: str = "none",
    layout: str = "auto",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Loader, Loader | None]:
    """Training and test loader of arrays or tensors, of x (B, C, H, W) or (B, D), and label (B,).

    Args:
        x_train: (N, H, W), (N, H, W, C), (N, C, H, W) or (N, D); bytes, or floats in [0, 1].
        x_test: The same, to test on. Without it and without `hold_out` the second loader is None.
        y_train: (N,) whole numbers. Without them, a batch is (x,).
        y_test: The same.
        batch_size: Images per batch; the last batch may be smaller.
        binarize: As in `mnist_loaders`.
        hold_out: Number or share of training images to test on, instead of `x_test`.
        augment: `shift`, `flip` or `none`: of training images, anew every epoch.
        layout: `NCHW`, `NHWC`, or `auto`: the channels are the dimension of size 4 or less.
        seed: Random seed of every epoch's order, augmentation and dynamic binarisation.
        device: Device of the images.

    Raises:
        DataError: Another shape or type, or values that are NaN or out of range.
        ConfigError: A setting that is not allowed.
    """
    from vae_torch.data.arrays import in_memory

    settings = _settings("array", "data", batch_size, binarize, hold_out, augment=augment)
    found = as_tensors(in_memory(x_train, x_test, y_train, y_test, layout), "array_loaders")
    if found.test is None and not hold_out:
        only = replace(found, test=found.train)  # so that nothing is held out
        return _loaders(only, settings, seed=seed, device=device)[0], None
    return _loaders(found, settings, seed=seed, device=device)


def _settings(
    name: str, root: str | Path, batch_size: int, binarize: str, hold_out: object, **rest: Any
) -> DataConfig:
    """The arguments of a loader function as a run's settings, checked."""
    given = {"batch_size": batch_size, "binarize": binarize, "hold_out": hold_out, **rest}
    return validated(DataConfig, {"name": name, "root": str(root), **given})


def _loaders(
    found: Splits, settings: DataConfig, *, seed: int, device: torch.device | str
) -> tuple[Loader, Loader]:
    """Split, limit and binarise a source's images, and make loaders."""
    where = f"data={settings.name}"
    if found.test is None and settings.hold_out == 0:
        _log.info("%s: no test images of its own; a tenth of the images is the test set", where)
    train, test = divide(found, hold_out=settings.hold_out, classes=settings.classes, where=where)
    train, test = _limited(train, settings.limit_train), _limited(test, settings.limit_test)
    if settings.binarize != "none":
        test = _binarized(test, STATIC_TEST)
    if settings.binarize == "static":
        train = _binarized(train, STATIC_TRAIN)
    made = partial(ImageDataset, flat=found.flat, classes=found.classes, device=device)
    train_set = made(
        train.images,
        train.labels,
        rows=train.rows,
        augment=settings.augment,
        binarize_generator=torch.Generator(device) if settings.binarize == "dynamic" else None,
    )
    test_set = made(test.images, test.labels, rows=test.rows)
    at_once = min(1000, max(1, _EVALUATED // test.images[0].numel()))
    return (
        image_loader(train_set, settings.batch_size, shuffle=True, seed=seed),
        image_loader(test_set, max(settings.batch_size, at_once)),
    )


def _limited(part: Part, limit: int | None) -> Part:
    images, labels, rows = part
    if rows is None:
        images = images[:limit]
    else:
        rows = rows[:limit]
    return Part(images, None if labels is None else labels[:limit], rows)


def _binarized(part: Part, salt: int) -> Part:
    images = part.images if part.rows is None else part.images.index_select(0, part.rows)
    return Part(binarize_images(images, salt=salt), part.labels, None)


def binarize_images(images: Tensor, *, salt: int = 0) -> Tensor:
    """Grey values as probabilities, sampled once: (N, ...) -> (N, ...) uint8 of 0 and 255.

    The sample depends on `salt` and the images alone, never on a run's seed.

    Args:
        images: Bytes, or floats in [0, 1].
        salt: Another number gives another sample.
    """
    generator = seeded_generator("cpu", BINARIZE_SEED, salt)
    grey = images.float().div_(255) if images.dtype == torch.uint8 else images
    drawn = torch.bernoulli(grey, generator=generator)
    return drawn.mul_(255).to(torch.uint8)


def data_hash(loader: Loader) -> str:
    """SHA-256 of a loader's images and labels, after limits and binarisation."""
    dataset = image_dataset(loader)
    digest = hashlib.sha256()
    for part in in_parts(dataset.images, dataset.rows):
        digest.update(part.cpu().contiguous().numpy().data)
    if dataset.labels is not None:
        digest.update(dataset.labels.cpu().numpy().tobytes())
    if dataset.shape != (dataset.images[0].numel(),):
        digest.update(str(dataset.shape).encode())
    return digest.hexdigest()


def shape_of(loader: Loader) -> tuple[int, ...]:
    """The shape of an image in a loader's batches, for the model: (784,), (3, 64, 64)."""
    return image_dataset(loader).shape


def classes_of(*loaders: Loader) -> int:
    """Number of classes of a conditional model: all named ones, or up to the highest label.

    Raises:
        DataError: Images without labels.
    """
    sets = [image_dataset(loader) for loader in loaders]
    if any(each.labels is None for each in sets):
        raise DataError(
            "model.conditional=true: the images have no labels; use a source with labels, or leave "
            "it out"
        )
    highest = max(int(each.labels.max()) for each in sets if each.labels is not None)
    return max(highest + 1, *(len(each.classes or ()) for each in sets))


def image_dataset(loader: Loader) -> ImageDataset:
    """The data set behind one of this package's loaders."""
    assert isinstance(loader.dataset, ImageDataset)
    return loader.dataset
