"""Decoded pixels on disk: written once, memory-mapped afterwards."""

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from filelock import FileLock

from vae_torch.data.idx import DataError
from vae_torch.files import replaced

FOLDER = ".vae_torch"


def cached(
    root: Path,
    settings: object,
    content: object,
    shape: tuple[int, ...],
    made: Callable[[], Iterable[np.ndarray]],
    *,
    dtype: str = "|u1",
) -> np.ndarray:
    """An array mapped from a file, which is written first if it does not exist.

    The file lies in `root/.vae_torch`, or in the user's cache folder if that cannot be written. It
    is replaced when the content changes. If several processes need it at once, one writes it.

    Args:
        root: The data folder.
        settings: How the array is made; with `content`, the identity of the file.
        content: What it is made from: any values whose text identifies them.
        shape: Shape of the whole array.
        made: Its parts along the first axis, in order.
        dtype: Type of the array, as NumPy writes it.
    """
    group = _digest((str(root.resolve()), settings))
    name = f"{group}-{_digest((content, shape, dtype))}.npy"
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vae_torch"
    places = (root / FOLDER, user)
    for place in places:
        if (array := _mapped(place / name, shape, dtype)) is not None:
            return array
    reasons = []
    for place in places:
        held = not place.exists()  # by another process
        try:
            place.mkdir(parents=place == user, exist_ok=True)
            lock = FileLock(place / "lock").acquire()
        except OSError as error:
            reasons.append(f"{place}: {error.strerror}")
            continue
        with lock:
            try:
                if _mapped(place / name, shape, dtype) is None:
                    _write(place / name, shape, dtype, made())
                    for old in set(place.glob(f"{group}-*.npy")) - {place / name}:
                        with suppress(OSError):  # some systems refuse to delete a mapped file
                            old.unlink()
            except BaseException:
                if held:
                    (place / "lock").unlink(missing_ok=True)
                    with suppress(OSError):
                        place.rmdir()
                raise
            array = _mapped(place / name, shape, dtype)
        assert array is not None
        return array
    raise DataError(
        f"the decoded images cannot be kept ({'; '.join(reasons)}); set XDG_CACHE_HOME to a folder "
        "that can be written"
    )


def _mapped(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray | None:
    """The file's array, if it exists and is complete."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if (array.shape, array.dtype) == (shape, np.dtype(dtype)) else None


def _write(path: Path, shape: tuple[int, ...], dtype: str, parts: Iterable[np.ndarray]) -> None:
    try:
        with replaced(path) as scratch, scratch.open("wb") as file:
            header = {"descr": dtype, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.ascontiguousarray(part).data)
    except OSError as error:
        raise DataError(
            f"{path.parent}: cannot be written ({error.strerror}); the decoded images need "
            f"{int(np.prod(shape)) * np.dtype(dtype).itemsize:,} bytes there"
        ) from None


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
