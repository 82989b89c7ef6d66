"""Files that are whole at every moment: written beside, then renamed over the old ones."""

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file: a reader sees the old content or the new, never a part.

    Several processes may write the same file at once: each has a scratch file of its own, and the
    last to finish wins. After an error the old file is still there and the scratch file is gone.

    Args:
        path: The file. Its folder must exist.
        content: All of its bytes.

    Raises:
        OSError: The folder is gone or cannot be written, or the disk is full.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with scratch.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the bytes do
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def remove_scratch(folder: Path) -> None:
    """Remove the scratch files that killed processes left in a folder and below it.

    Call it only while nothing else writes into the folder.
    """
    for scratch in folder.rglob(".*.part"):
        scratch.unlink(missing_ok=True)
