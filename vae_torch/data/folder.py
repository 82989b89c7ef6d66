"""A folder of image files: `data=folder data.root=DIR`."""

import csv
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vae_torch.config import ConfigError
from vae_torch.data.cache import cached
from vae_torch.data.idx import DataError
from vae_torch.data.pictures import Form, colour, decoded, form_of, sides
from vae_torch.data.table import Images, Splits, data_sources

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif"}
_LABELS = "labels.csv"

_log = logging.getLogger("vae_torch")


class File(NamedTuple):
    """An image file, with values that change when its content does."""

    name: str  # path in the data folder, with /
    size: int  # bytes
    changed: int  # nanoseconds


@data_sources.register("folder")
def folder(
    root: Path,
    *,
    size: int | list[int] | None = None,
    channels: int | None = None,
    background: str = "white",
) -> Splits:
    """PNG, JPEG, BMP, WebP and GIF files, decoded once into a memory-mapped cache.

    Args:
        root: The folder. Its sub-folders `train` and `test`, if both exist, hold training and test
            images. Other sub-folders are classes, unless a `labels.csv` lists files and labels.
        size: Of all images: N or [height, width]. They are resized and center-cropped.
        channels: 1 (grey) or 3 (colour). If absent: 3 if any file has colours.
        background: The colour behind transparent pixels.

    Raises:
        DataError: No image, an unreadable one, or images of several sizes without `size`.
        ConfigError: No such folder, or a setting that is not allowed.
    """
    if not root.is_dir():
        raise ConfigError(f"data.root={root}: no such folder")
    colour(background)
    files, others = _listed(root)
    if not files:
        raise DataError(
            f"{root}: holds no images, which end in {', '.join(sorted(_SUFFIXES))}; name the "
            "folder with data.root"
        )
    if others:
        _log.info("%s: %d files that are not images are left out: %s", root, len(others), others[0])
    splits = _splits(files)
    names, labels = _labels(root, files, inside=1 if len(splits) == 2 else 0)
    form = Form(*_form(root, files, size, channels), background)
    shape = (len(files), form.channels, form.height, form.width)
    paths = [file.name for file in files]
    images = cached(root, form, files, shape, lambda: decoded(root, paths, form))
    parts = [Images(images[part], None if labels is None else labels[part]) for part in splits]
    return Splits(parts[0], parts[1] if len(parts) == 2 else None, names)


def image_files(root: Path) -> list[list[str]]:
    """The names of a folder's image files, in the order of the images that `folder` returns.

    These are all files, or those in `train` and those in `test` if both exist.
    """
    files = _listed(root)[0]
    return [[file.name for file in files[part]] for part in _splits(files)]


def _form(
    root: Path, files: Sequence[File], size: int | list[int] | None, channels: int | None
) -> tuple[int, int, int]:
    """Height, width and channels: the given values, or those of the files, cached by content."""
    if size is not None and channels is not None:
        return *sides(size), channels
    paths = [file.name for file in files]
    found = cached(
        root,
        ("form", size, channels),
        files,
        (3,),
        lambda: [np.array(form_of(root, paths, size, channels))],
        dtype="<i8",
    )
    height, width, channels = found.tolist()
    return height, width, channels


def _listed(root: Path) -> tuple[list[File], list[str]]:
    """The image files below a folder, by name, and the names of the other files."""
    files, others = [], []
    for name, entry in _walk(str(root), "", ()):
        if f".{entry.name.rpartition('.')[2].lower()}" not in _SUFFIXES:
            if entry.name != _LABELS:
                others.append(name)
            continue
        try:
            stat = entry.stat()
        except OSError as error:
            raise DataError(
                f"{root / name}: cannot be read ({error.strerror}); remove it"
            ) from None
        files.append(File(name, stat.st_size, stat.st_mtime_ns))
    return files, others


def _walk(folder: str, name: str, above: tuple[str, ...]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """The files below a folder except hidden ones. Links to a folder above are not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); check the rights") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        try:
            inner = entry.is_dir()
        except OSError:  # a link to itself: reported when it is read
            inner = False
        if inner:
            yield from _walk(entry.path, f"{name}{entry.name}/", (*above, real))
        else:
            yield name + entry.name, entry


def _splits(files: Sequence[File]) -> list[slice]:
    """All files; or those in `train` and those in `test`, if both exist."""
    tops = [file.name.split("/")[0] if "/" in file.name else "" for file in files]
    parts = {"train", "test"}
    if not parts <= set(tops):
        return [slice(0, len(files))]
    if set(tops) != parts:
        odd = next(file.name for file, top in zip(files, tops, strict=True) if top not in parts)
        raise DataError(f"{odd}: lies beside train and test; move it into one of them")
    cut = tops.index("train")  # sorted by name, test comes first
    return [slice(cut, len(files)), slice(0, cut)]


def _labels(
    root: Path, files: Sequence[File], *, inside: int
) -> tuple[list[str] | None, np.ndarray | None]:
    """Class names and labels, from `labels.csv`, else from the sub-folder `inside` levels down."""
    if (root / _LABELS).is_file():
        words = _listed_labels(root / _LABELS, files)
    else:
        deep = [file.name.split("/")[inside:-1] for file in files]
        if not any(deep):
            return None, None
        if not all(deep):
            odd = files[next(i for i, folders in enumerate(deep) if not folders)].name
            raise DataError(
                f"{root}: {odd} lies beside sub-folders, which are classes; move it into one of "
                f"them, or write a {_LABELS} with lines FILE,LABEL"
            )
        words = [folders[0] for folders in deep]
    whole = all(word.isdecimal() for word in words)
    names = sorted(set(words), key=(lambda word: (int(word), word)) if whole else None)
    number = {name: i for i, name in enumerate(names)}
    return names, np.array([number[word] for word in words])


def _listed_labels(path: Path, files: Sequence[File]) -> list[str]:
    """The label of every file, from lines FILE,LABEL, perhaps below a line with column names."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            rows = [(n, row) for n, row in enumerate(csv.reader(lines), 1) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); it must be UTF-8 text") from None
    known = {file.name for file in files}
    found: dict[str, str] = {}
    for line, row in rows:
        name, label = (row[0].strip(), row[1].strip()) if len(row) == 2 else ("", "")
        if line == 1 and name not in known and Path(name).suffix.lower() not in _SUFFIXES:
            continue  # column names
        if not label or name not in known or found.setdefault(name, label) != label:
            wrong = "two labels" if name in found else "no image beside it"
            wrong = wrong if label else "not FILE,LABEL"
            raise DataError(f"{path}: line {line}, {','.join(row)}: {wrong}; correct it")
    if len(found) < len(known):
        odd = min(known - set(found))
        raise DataError(f"{path}: {odd} is not in it; give it a label, or remove the file")
    return [found[file.name] for file in files]
