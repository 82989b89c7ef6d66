"""Anything that holds images as batches, and the content of a batch."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vae_torch import images
from vae_torch.data.dataset import Batch, EpochBatches, ImageDataset
from vae_torch.data.pixels import tensor_of
from vae_torch.data.table import Images
from vae_torch.images import check_shape

Loader = DataLoader[Batch]  # of x (B, *shape) in [0, 1], and labels (B,) if there are any

# What `as_loader` takes: a loader, any other iterable of batches, or the images themselves.
Data = Loader | Iterable[Any] | Tensor | np.ndarray


def image_loader(
    dataset: ImageDataset, batch_size: int, *, shuffle: bool = False, seed: int = 0
) -> Loader:
    """A DataLoader that fetches whole batches, shuffled by `seed` in a new order every epoch."""
    return DataLoader(
        dataset,
        batch_sampler=EpochBatches(dataset, batch_size, shuffle=shuffle, seed=seed),  # type: ignore[arg-type]
        collate_fn=_as_fetched,
        # DataLoader draws a seed for workers, even without any; keep the global generator unchanged
        generator=torch.Generator(),
    )


def _as_fetched(batch: Any) -> Any:
    return batch


def as_loader(
    data: Data,
    input_shape: Sequence[int],
    *,
    batch_size: int = 128,
    shuffle: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Iterable[Any]:
    """Images in any form as an iterable of batches that can be repeated.

    Args:
        data: A DataLoader or another iterable of batches, which is unchanged; or the images
            themselves, (N, *shape) bytes or floats in [0, 1]: a tensor, an array, or `Images`.
        input_shape: Shape of the model's images.
        batch_size: Batch size of a loader that is made here, as are the next three.
        shuffle: Shuffle anew in every epoch.
        seed: Random seed of the order.
        device: Device of the images.

    Raises:
        ValueError: Images of another shape or type, or batches that can be read only once.
    """
    if isinstance(data, np.ndarray | Tensor):
        data = Images(data)
    if isinstance(data, Images):
        images = tensor_of(data.images) if isinstance(data.images, np.ndarray) else data.images
        check_shape(images, input_shape)
        dataset = ImageDataset(images, data.labels, device=device)
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
    """The images x of a batch: x alone, [x], (x, label), (x, label, anything), or {"image": x}.

    Bytes are divided by 255; floats are unchanged.

    Raises:
        ValueError: It holds no tensor or array of images.
    """
    x = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if isinstance(batch, dict):
        x = batch.get("image")
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(np.ascontiguousarray(x))
    if not isinstance(x, Tensor):
        raise ValueError(
            f"a batch is a {type(batch).__name__} without images in front; it must be x, [x], "
            '(x, label), or {"image": x, "label": label}, x a tensor (B, *shape)'
        )
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def labels_of(batch: Any) -> Tensor | None:
    """The labels (B,) of a batch, if all of its images have one: see `images_of`."""
    if isinstance(batch, dict):
        labels = batch.get("label")
    else:
        labels = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
    labels = torch.as_tensor(labels) if isinstance(labels, np.ndarray) else labels
    if not isinstance(labels, Tensor) or labels.shape != (len(images_of(batch)),):
        return None
    return labels


def as_batch(batch: Any, device: torch.device, dtype: torch.dtype) -> images.Batch:
    """A loader's batch as images and labels on a device: see `images_of`."""
    x, y = images_of(batch), labels_of(batch)
    x = x.to(device, dtype, non_blocking=True)
    return images.Batch(x, None if y is None else y.to(device, non_blocking=True))


def batches_in(loader: Iterable[Any]) -> int | None:
    """The number of batches in an epoch; None if the loader does not know."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # e.g. a DataLoader over an IterableDataset
        return None
