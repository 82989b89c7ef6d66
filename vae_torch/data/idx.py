"""The IDX format of the MNIST family: files read and verified, arrays written."""

import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np

from vae_torch.config import UserError


class DataError(UserError):
    """Images are missing or damaged: one line that names the file and the remedy."""


def read_idx(path: Path, *, sha256: str | None = None) -> np.ndarray:
    """Read an IDX file of bytes or big-endian int32, plain or `.gz`.

    Args:
        path: The file.
        sha256: SHA-256 of the uncompressed bytes, if known.

    Raises:
        DataError: The message names the file, the fault and the remedy. The size that a header
            claims is checked against the file's size before memory is allocated.
    """
    remedy = "delete the file to fetch it again"
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            header = file.read(4)
            if len(header) < 4 or header[:2] != b"\0\0" or header[2] not in (0x08, 0x0C):
                raise DataError(f"{path}: not an IDX file of bytes; {remedy}")
            if header[3] > 3:
                raise DataError(
                    f"{path}: has {header[3]} dimensions; images have 3, labels 1 or 2; {remedy}"
                )
            dtype = np.dtype(np.uint8) if header[2] == 0x08 else np.dtype(">i4")
            sizes = file.read(4 * header[3])
            shape = tuple(int(n) for n in np.frombuffer(sizes[: len(sizes) // 4 * 4], ">u4"))
            claimed = 4 + 4 * header[3] + math.prod(shape) * dtype.itemsize
            # deflate compresses at most about 1,032 to 1
            most = path.stat().st_size * (1032 if packed else 1)
            if len(shape) != header[3] or not shape or claimed > most:
                raise DataError(f"{path}: truncated; its header claims {claimed:,} bytes; {remedy}")
            body = file.read(claimed + 1 - 4 - len(sizes))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from None
    if len(body) != claimed - 4 - len(sizes):
        word = "truncated" if len(body) < claimed - 4 - len(sizes) else "too long"
        raise DataError(f"{path}: {word}; its header claims {claimed:,} bytes; {remedy}")
    if sha256 is not None:
        digest = hashlib.sha256(header + sizes)
        digest.update(body)
        if digest.hexdigest() != sha256:
            raise DataError(
                f"{path}: altered; its SHA-256 is {digest.hexdigest()[:12]}..., the published "
                f"file's is {sha256[:12]}...; {remedy}"
            )
    array = np.frombuffer(bytearray(body), dtype).reshape(shape)
    return array if dtype == np.uint8 else array.astype(np.int64)


def idx_bytes(array: np.ndarray) -> bytes:
    """A uint8 array in the IDX format: magic, big-endian sizes, bytes."""
    header = bytes([0, 0, 0x08, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()
