"""Splits images into those to train on and those to test on."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vae_torch.config import ConfigError
from vae_torch.data.idx import DataError
from vae_torch.data.table import Images, Splits
from vae_torch.seeds import BINARIZE_SEED, HOLD_OUT, seeded_generator

_SHARE = 0.1  # share of the images that a source without test images tests on


class Part(NamedTuple):
    """Some of a source's images."""

    images: Tensor  # (N, *shape)
    labels: Tensor | None  # of these rows, in order
    rows: Tensor | None  # None: all


def divide(
    found: Splits,
    *,
    hold_out: int | float | str = 0,
    classes: Sequence[int | str] | None = None,
    where: str = "data",
) -> tuple[Part, Part]:
    """Split into training and test images: see `data.hold_out` and `data.classes`.

    Held out are the last training images of a source in random order, else a random choice that is
    the same for every run's seed. A source without test images holds out a tenth.
    """
    kept = _numbers(classes, found.classes) if classes is not None else None
    rows = _rows(found.train, kept)
    if hold_out in (0, "test") and found.test is not None:
        train, test = _part(found.train, rows), _part(found.test, _rows(found.test, kept))
    elif hold_out == "test":
        raise ConfigError(
            f"data.hold_out=test: {where} has no test images of its own; give a number or a share "
            "of the training images to test on"
        )
    else:
        train, test = (_part(found.train, some) for some in _held_out(rows, hold_out, found.mixed))
    for part, name in ((train, "training"), (test, "test")):
        if (len(part.images) if part.rows is None else len(part.rows)) == 0:
            raise DataError(f"data.classes={list(classes or [])}: no {name} image belongs to them")
    return train, test


def _held_out(rows: Tensor, hold_out: int | float | str, mixed: bool) -> tuple[Tensor, Tensor]:
    count = float(hold_out or _SHARE)
    if 0 < count < 1:
        count = max(1, round(count * len(rows)))
    if count != int(count) or not 0 < count < len(rows):
        raise DataError(
            f"data.hold_out={hold_out}: must be 0 or more, and leave some of {len(rows)} images to "
            "train on"
        )
    cut = len(rows) - int(count)
    if mixed:
        return rows[:cut], rows[cut:]
    order = torch.randperm(len(rows), generator=seeded_generator("cpu", BINARIZE_SEED, HOLD_OUT))
    return rows[order[:cut].sort().values], rows[order[cut:].sort().values]


def _rows(images: Images, kept: Sequence[int] | None) -> Tensor:
    if kept is None:
        return torch.arange(len(images.images))
    if images.labels is None:
        raise ConfigError("data.classes: the images have no labels; leave it out")
    return torch.isin(images.labels, torch.tensor(kept)).nonzero()[:, 0]


def _part(images: Images, rows: Tensor) -> Part:
    """These rows, in ascending order: a slice if they have no gaps."""
    x, labels = images
    if len(rows) and int(rows[-1] - rows[0]) + 1 == len(rows):
        here = slice(int(rows[0]), int(rows[-1]) + 1)
        return Part(x[here], None if labels is None else labels[here], None)
    return Part(x, None if labels is None else labels[rows], rows)


def _numbers(classes: Sequence[int | str], names: Sequence[str] | None) -> list[int]:
    """The labels of classes: by name if one has that name, else by number."""
    known = {name: number for number, name in enumerate(names or [])}
    numbers = []
    for wanted in classes:
        if str(wanted) in known:
            numbers.append(known[str(wanted)])
        elif isinstance(wanted, int):
            numbers.append(wanted)
        else:
            there = ", ".join(known) if known else "classes without names; give their numbers"
            raise ConfigError(f"data.classes: no class is called {wanted}; there are {there}")
    return numbers
