"""Atomic writes: a file is written beside the old one, then renamed over it."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A scratch file beside `path`, to write and close; it replaces `path` at the end.

    A reader sees the old content or the new one, never a part. Several processes may write the same
    file at once: each has its own scratch file, and the last to finish wins. After an error the old
    file is unchanged and the scratch file is removed.

    Raises:
        OSError: The folder is missing or cannot be written, or the disk is full.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield scratch
        with scratch.open("r+b") as file:
            os.fsync(file.fileno())  # the rename must not reach the disk before the bytes do
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in an existing folder: see `replaced`."""
    with replaced(path) as scratch:
        scratch.write_bytes(content)


def remove_scratch(folder: Path) -> None:
    """Remove the scratch files that killed processes left in a folder and below it.

    Call it only while nothing else writes into the folder.
    """
    for scratch in folder.rglob(".*.part"):
        scratch.unlink(missing_ok=True)
