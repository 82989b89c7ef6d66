"""Images as one tensor, fetched in whole batches, and the order of an epoch.

A batch is one indexing of the tensor, which costs little of a training step; decoding images one by
one costs more than the step. The tensor may be a memory-mapped file that is larger than memory.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from vae_torch.config import ConfigError
from vae_torch.data.augment import augment_images
from vae_torch.data.pixels import in_parts
from vae_torch.images import check_pixels
from vae_torch.machine import wide
from vae_torch.seeds import Stream, mix_seed, seeded_generator

Batch = tuple[Tensor, ...]  # x (B, *shape) float32 in [0, 1], and labels (B,) if there are any


class ImageDataset(Dataset[Batch]):
    """Images as one tensor on one device; a whole batch is fetched at once.

    Args:
        images: (N, *shape), bytes (uint8) or floats in [0, 1]. Bytes are divided by 255 when they
            are fetched.
        labels: (N,) int64, or None: a batch is then (x,).
        rows: Indices of the images to use; all if absent. `labels` are of these.
        flat: Batches are (B, pixels); else (B, C, H, W), with C = 1 for images without channels, or
            (B, D) for vectors.
        augment: `shift`, `flip` or `none`: what `augment_images` does to every batch.
        binarize_generator: If given, each fetch samples binary pixels with the grey values as
            probabilities (dynamic binarisation).
        classes: The names of the classes, by label.
        device: Device of the tensors and the batches. Images that fill more than half of a GPU's
            free memory stay where they are, and their batches are moved.

    Raises:
        ValueError: No image, pixels that are neither bytes nor floats in [0, 1], or another number
            of labels than of images.
        ConfigError: Vectors with `augment`.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        flat: bool = True,
        augment: str = "none",
        binarize_generator: torch.Generator | None = None,
        classes: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if images.ndim < 2 or images.numel() == 0:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; must be (N, *shape), N >= 1"
            )
        count = len(images) if rows is None else len(rows)
        if labels is not None and len(labels) != count:
            raise ValueError(f"{len(labels)} labels for {count} images; each needs one")
        if images.dtype != torch.uint8:
            for part in in_parts(images):
                check_pixels(part)
        sides = tuple(images.shape[1:])
        self.image_shape = (1, *sides) if len(sides) == 2 else sides  # (C, H, W) or (D,)
        self.shape = (math.prod(sides),) if flat else self.image_shape  # of a batch's images
        if augment != "none" and len(self.image_shape) != 3:
            raise ConfigError(
                f"data.augment={augment}: the images are vectors of {math.prod(sides)} values; "
                "give them as (N, C, H, W), or leave it out"
            )
        self.classes = classes
        self.augment = augment
        self.augment_generator = torch.Generator()
        self.binarize_generator = binarize_generator
        self.device = torch.device(device)
        images, rows = _placed(images, rows, self.device)
        self._apart = images.device.type != self.device.type
        # a view, unless the channels come last
        self.images = images.flatten(1) if images.is_contiguous() else images
        self.rows = None if rows is None else rows.to(images.device)
        self.labels = None if labels is None else labels.to(images.device)
        self._count = count

    def __len__(self) -> int:
        return self._count

    def mean(self) -> Tensor:
        """The mean image, (pixels,) float32 in [0, 1]."""
        if self.images.dtype != torch.uint8:
            sums = [wide(part.flatten(1)).sum(0) for part in in_parts(self.images, self.rows)]
            return (sum(sums[1:], sums[0]) / len(self)).float()
        size = int(self.images[0].numel())
        total = torch.zeros(size, dtype=torch.int64, device=self.images.device)
        for part in in_parts(self.images, self.rows, pixels=2**20):  # int64 takes eight times more
            total += part.flatten(1).sum(0)
        if self.rows is None:
            return (total / (255 * len(self))).float()
        return (wide(total) / len(self) / 255).float()

    def __getitem__(self, index: int) -> Batch:
        return tuple(of_one[0] for of_one in self.__getitems__(torch.tensor([index])))

    def __getitems__(self, indices: Tensor) -> Batch:
        """Pixels x (B, *shape) float32 in [0, 1], and labels (B,) if there are any."""
        indices = torch.as_tensor(indices, device=self.images.device)
        x = self.images.index_select(0, indices if self.rows is None else self.rows[indices])
        if self._apart:
            x = x.to(self.device)
        if self.augment != "none":
            x = x.reshape(-1, *self.image_shape)
            x = augment_images(x, self.augment, generator=self.augment_generator)
        if x.shape[1:] != self.shape:
            x = x.reshape(-1, *self.shape)
        x = x.float().div_(255) if x.dtype == torch.uint8 else x.float()
        if self.binarize_generator is not None:
            x = torch.bernoulli(x, generator=self.binarize_generator)
        if self.labels is None:
            return (x,)
        labels = self.labels.index_select(0, indices)
        return x, labels.to(self.device) if self._apart else labels

    def first(self, n: int) -> tuple[Tensor, Tensor | None]:
        """The first n images, or all if there are fewer, and their labels or None."""
        x, *labels = self.__getitems__(torch.arange(min(n, len(self))))
        return x, labels[0] if labels else None


class EpochBatches(Sampler[Tensor]):
    """Batches of indices, shuffled by (seed, epoch) alone.

    `set_epoch(n)` chooses the order, as in torch's DistributedSampler; without it, every pass moves
    to the next epoch. It also seeds the random pixels of the dataset.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, *, shuffle: bool, seed: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, *, skip: int = 0, pixels: Tensor | None = None) -> None:
        """Make the next pass follow the order of this epoch.

        Args:
            epoch: Counted from 0.
            skip: Batches to leave out, because a stopped run has used them.
            pixels: The result of `pixels()` after the last of these. Without it, the binary pixels
                of the remaining batches are seeded by (seed, epoch, skip).
        """
        self.epoch, self._skip, self._pixels = epoch, skip, pixels

    def pixels(self) -> Tensor | None:
        """The state of the generator of binary pixels, if there is one."""
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
        epoch, skip = self.epoch, self._skip
        batches = order.to(self.dataset.images.device).split(self.batch_size)[skip:]
        self.set_epoch(epoch + 1)
        for step, batch in enumerate(batches, skip):
            if self.dataset.augment != "none":  # a batch is fetched before the next
                self.dataset.augment_generator.manual_seed(
                    mix_seed(self.seed, epoch, Stream.AUGMENT, step)
                )
            yield batch


def _placed(
    images: Tensor, rows: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The images on the device if they leave enough room there, else unchanged."""
    if device.type == images.device.type:
        return images.to(device), rows
    count = len(images) if rows is None else len(rows)
    size = images[0].numel() * images.element_size() * count
    if device.type == "cuda" and size > torch.cuda.mem_get_info(device)[0] // 2:
        return images, rows
    return (images if rows is None else images.index_select(0, rows)).to(device), None
