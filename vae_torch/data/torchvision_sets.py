"""torchvision's image data sets: `data=torchvision data.dataset=CIFAR10`."""

import inspect
import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vae_torch.bars import bar
from vae_torch.config import ConfigError, in_short
from vae_torch.data.cache import cached
from vae_torch.data.fetch import socket_timeout
from vae_torch.data.idx import DataError
from vae_torch.data.pictures import Form, colour, looks, pixels, sides
from vae_torch.data.table import Images, Splits, data_sources


@data_sources.register("torchvision")
def torchvision(
    root: Path,
    *,
    dataset: str | None = None,
    split: str | None = None,
    size: int | list[int] | None = None,
    channels: int | None = None,
    background: str = "white",
) -> Splits:
    """Any image data set of torchvision, downloaded by torchvision and decoded once.

    Args:
        root: The data folder.
        dataset: The class in `torchvision.datasets`: `CIFAR10`, `SVHN`, `Omniglot`, `CelebA`.
        split: Split of the training images, for classes with others than `train`.
        size: As for a folder's images; needed if they have several sizes.
        channels: 1 (grey) or 3 (colour). If absent: as in the first image.
        background: The colour behind transparent pixels.

    Raises:
        ConfigError: No such class, or one that needs more than a folder.
        DataError: It cannot be downloaded, or its images have several sizes.
    """
    kind = _class(dataset)
    colour(background)
    takes = inspect.signature(kind).parameters
    if split is not None and "split" not in takes:
        raise ConfigError(f"data.split={split}: {dataset} has no splits; leave it out")
    train: dict[str, Any] = {"split": split} if split is not None else {}
    test: dict[str, Any] | None = None
    for word, values in (("train", (True, False)), ("split", ("train", "test"))):
        if word in takes and test is None:
            train, test = {word: values[0], **train}, {**train, word: values[1]}
    if "background" in takes and test is None:  # Omniglot
        train, test = {"background": True}, {"background": False}

    found = [_opened(kind, root, options) for options in (train, test) if options is not None]
    form = _form(found[0], size, channels, background, str(dataset))
    content = _content(root)
    parts = [
        _decoded(one, root, (dataset, i, split), content, form, size is None)
        for i, one in enumerate(found)
    ]
    return Splits(parts[0], parts[1] if len(parts) > 1 else None, _names(found[0]))


def _class(name: str | None) -> Any:
    from torchvision import datasets  # slow to import

    kind = getattr(datasets, str(name)) if name in datasets.__all__ else None
    if not inspect.isclass(kind) or "root" not in inspect.signature(kind).parameters:
        raise ConfigError(
            f"data.dataset={name or 'null'}: must be an image data set of torchvision, such as "
            "CIFAR10, SVHN or CelebA"
        )
    return kind


def _opened(kind: Any, root: Path, options: dict[str, Any]) -> Any:
    """The data set from disk; else downloaded into a scratch folder and moved when complete."""
    name = kind.__name__
    downloads = "download" in inspect.signature(kind).parameters
    off = {"download": False} if downloads else {}
    try:
        return kind(root=str(root), **options, **off)
    except TypeError as error:
        raise ConfigError(f"data.dataset={name}: {error}; use data=folder on its files") from None
    except (RuntimeError, OSError, ValueError) as error:
        if not downloads or isinstance(error, ValueError):
            raise DataError(f"data.dataset={name}: {in_short(error)}") from None
    cold = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as scratch:
            with socket_timeout(20), redirect_stdout(io.StringIO()):
                kind(root=scratch, **options, download=True)
            for made in Path(scratch).iterdir():
                if (root / made.name).exists():
                    shutil.copytree(made, root / made.name, dirs_exist_ok=True)
                else:
                    shutil.move(made, root / made.name)
        return kind(root=str(root), **options, **off)
    except (RuntimeError, OSError, ValueError, ModuleNotFoundError) as error:
        if cold:
            with suppress(OSError):
                root.rmdir()
        raise DataError(
            f"data.dataset={name}: not under data.root={root}, and cannot be fetched "
            f"({in_short(error)}); put the files there as torchvision does"
        ) from None


def _form(
    data: Any, size: int | list[int] | None, channels: int | None, background: str, name: str
) -> Form:
    image = data[0][0] if len(data) else None
    if not isinstance(image, Image.Image):
        raise DataError(f"data.dataset={name}: gives a {type(image).__name__}, not an image")
    with image:
        height, width, colours = looks(image)
    if size is not None:
        height, width = sides(size)
    return Form(height, width, channels or colours, background)


def _decoded(
    data: Any, root: Path, which: object, content: object, form: Form, one_size: bool
) -> Images:
    """Pixels and labels, from the cache if it has them."""
    labels: list[int] = []
    name = type(data).__name__

    def parts() -> Iterator[np.ndarray]:
        for i in bar(range(len(data)), "decoding images", show=True):
            try:
                image, label = data[i]
                with image:
                    height, width, _ = looks(image)
                    if one_size and (height, width) != (form.height, form.width):
                        raise DataError(
                            f"data.dataset={name}: image {i} is {height}x{width}, the first "
                            f"{form.height}x{form.width}; set data.size=N or [HEIGHT,WIDTH]"
                        )
                    yield pixels(image, form)
            except DataError:
                raise
            except (OSError, ValueError, SyntaxError) as error:  # raised by Pillow
                raise DataError(
                    f"data.dataset={name}: image {i} cannot be read ({in_short(error)}); replace it"
                ) from None
            labels.append(_number(label))

    shape = (len(data), form.channels, form.height, form.width)
    settings = (which, form, one_size)
    images = cached(root, settings, content, shape, parts)
    numbers = cached(
        root,
        (settings, "labels"),
        content,
        shape[:1],
        lambda: [np.array(labels or [_number(data[i][1]) for i in range(len(data))])],
        dtype="<i8",
    )
    return Images(images, None if (numbers < 0).any() else np.array(numbers))


def _number(label: Any) -> int:
    """A label as a number; -1 if it is none."""
    whole = isinstance(label, int | np.integer) or getattr(label, "shape", None) == ()
    return int(label) if whole else -1


def _names(data: Any) -> list[str] | None:
    names = getattr(data, "classes", None)
    return list(names) if names and all(isinstance(name, str) for name in names) else None


def _content(root: Path) -> list[tuple[str, int, int]]:
    """The files in the data folder except hidden ones."""
    below = ((path, f"/{path.relative_to(root).as_posix()}") for path in sorted(root.rglob("*")))
    found = [(name, path.stat()) for path, name in below if "/." not in name and path.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
