"""The table of data sources, and the return value of a source.

A source is a function under a name:

    @data_sources.register("blobs")
    def blobs(root: Path, *, count: int = 1000) -> Splits:
        return Splits(Images(x_train, labels), Images(x_test, more_labels))

It gets `data.root`. Its keyword-only arguments are its options: `data.options.count=500`. Options
called `size`, `channels`, `background`, `split` or `dataset` are set as `data.size` and so on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from vae_torch.config import ConfigError, DataConfig
from vae_torch.data.idx import DataError
from vae_torch.data.pixels import as_labels, as_pixels
from vae_torch.parts.registry import Table

SHARED = ("size", "channels", "background", "split", "dataset")  # settings that sources may take


class Images(NamedTuple):
    """Images and their labels, as a source returns them."""

    images: Any  # (N, C, H, W), (N, H, W) or (N, D): bytes, or floats in [0, 1]; array or tensor
    labels: Any = None  # (N,) whole numbers, or None


@dataclass(frozen=True)
class Splits:
    """The return value of a source.

    Args:
        train: The training images.
        test: The test images; None if the source has none of its own.
        classes: Names of the classes, by label.
        flat: Batches are (B, pixels), as MNIST's are, not (B, C, H, W).
        mixed: The training images are in random order, so that `data.hold_out` takes the last ones.
    """

    train: Images
    test: Images | None = None
    classes: Sequence[str] | None = None
    flat: bool = False
    mixed: bool = False


data_sources: Table[Callable[..., Splits]] = Table("data.name", "data.options")


def load_source(config: DataConfig) -> Splits:
    """Load the source that the settings name; the result is checked and holds tensors."""
    accepted = data_sources.accepts(config.name)
    given = {key: value for key in SHARED if (value := getattr(config, key)) is not None}
    for key, value in given.items():
        if key not in accepted:
            raise ConfigError(
                f"data.{key}={value}: data={config.name} has no such setting; leave it out"
            )
    options = data_sources.checked(config.name, {**config.options, **given})
    return as_tensors(
        data_sources[config.name](Path(config.root), **options), f"data={config.name}"
    )


def as_tensors(found: Splits, where: str) -> Splits:
    """Splits whose images and labels are tensors of equal length; labels are int64."""
    train = _pair(found.train, f"{where}: training images")
    test = found.test and _pair(found.test, f"{where}: test images")
    if test and test.images.shape[1:] != train.images.shape[1:]:
        raise DataError(
            f"{where}: training images have shape {tuple(train.images.shape[1:])}, test images "
            f"{tuple(test.images.shape[1:])}; they must agree"
        )
    return replace(found, train=train, test=test)


def _pair(pair: Images, where: str) -> Images:
    images, labels = Images(*pair)
    x = as_pixels(images, where)
    return Images(x, None if labels is None else as_labels(labels, len(x), where))
