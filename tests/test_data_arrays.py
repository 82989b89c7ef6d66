import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.conftest import REPOSITORY
from vae_torch import VAE, array_loaders, train
from vae_torch.config import ConfigError, DataConfig
from vae_torch.data import DataError, data_hash, image_dataset, images_of, labels_of, shape_of
from vae_torch.data.arrays import array
from vae_torch.data.table import load_source

RNG = np.random.default_rng(0)


def batches(loader):
    return torch.cat([batch[0] for batch in loader])


def load(path, **options):
    return load_source(
        DataConfig("array", str(path), batch_size=8, binarize="none", options=options)
    )


def test_keras_mnist_is_read_as_it_is(tmp_path):
    x, y = RNG.integers(0, 256, (30, 28, 28), np.uint8), RNG.integers(0, 10, 30, np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=x[:20], y_train=y[:20], x_test=x[20:], y_test=y[20:])
    found = load(tmp_path / "mnist.npz")
    assert torch.equal(found.train.images, torch.from_numpy(x[:20]))
    assert found.test.labels.tolist() == y[20:].tolist()
    assert found.train.labels.dtype == torch.int64


def test_every_layout_gives_channels_first(tmp_path):
    nchw = RNG.integers(0, 256, (6, 3, 8, 10), np.uint8)
    for name, stored in (("first", nchw), ("last", nchw.transpose(0, 2, 3, 1))):
        np.save(tmp_path / f"{name}.npy", np.ascontiguousarray(stored))
        loader, _ = array_loaders(load(tmp_path / f"{name}.npy").train.images, batch_size=6)
        loader.batch_sampler.shuffle = False
        assert shape_of(loader) == (3, 8, 10)
        np.testing.assert_array_equal(batches(loader).numpy(), nchw / np.float32(255))
    for stored, shape in (
        (nchw[:, 0], (1, 8, 10)),
        (nchw[:, 0].reshape(6, -1), (80,)),
        (nchw[:, :1], (1, 8, 10)),
    ):
        assert shape_of(array_loaders(stored)[0]) == shape


@pytest.mark.parametrize("shape", [(5, 3, 32, 3), (5, 16, 32, 32)])
def test_an_ambiguous_layout_is_asked_for(tmp_path, shape):
    x = RNG.integers(0, 256, shape, np.uint8)
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(
        ConfigError, match=r"channels first or last; set data\.options\.layout=NCHW or NHWC"
    ):
        load(tmp_path / "x.npy")
    assert load(tmp_path / "x.npy", layout="NCHW").train.images.shape == shape
    last = load(tmp_path / "x.npy", layout="NHWC").train.images
    np.testing.assert_array_equal(last.numpy(), np.moveaxis(x, 3, 1))
    with pytest.raises(ConfigError, match=r"data\.options\.layout=sideways"):
        load(tmp_path / "x.npy", layout="sideways")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", bool])
def test_floats_stay_and_bytes_are_divided(tmp_path, dtype):
    x = (RNG.random((9, 4, 4)) > 0.5).astype(dtype) if dtype is bool else None
    x = RNG.random((9, 4, 4)).astype(dtype) if x is None else x
    np.savez(tmp_path / "x.npz", x=x)
    loader, _ = array_loaders(load(tmp_path / "x.npz").train.images, batch_size=9)
    loader.batch_sampler.shuffle = False
    np.testing.assert_array_equal(batches(loader)[:, 0].numpy(), x.astype(np.float32))


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def with_nan():
    x = RNG.random((4, 3, 3))
    x[2, 1, 1] = math.nan
    return x


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (with_nan(), "values from nan to nan; floats must lie in"),
        (RNG.random((4, 3, 3)) * 255, r"values from .* to 2.*divide"),
        (np.arange(64.0).reshape(1, 8, 8) % 17, r"values from 0 to 16; .*divide"),  # load_digits
        (np.full((4, 3), -0.1), "from -0.1"),
        (np.full((4, 3), np.inf), "to inf"),
        (np.zeros((4, 3), np.int64), r"torch\.int64; must be bytes"),
        (np.zeros((4, 3), complex), "complex128"),
        (np.array([["a", "b"]]), "<U1"),
        (np.zeros((4, 3), "datetime64[s]"), "datetime64"),
        (np.array([[Evil(), 1]], dtype=object), "holds Python objects"),
        (np.zeros((0, 8, 8)), r"shape \(0, 8, 8\)"),
        (np.zeros(5), r"shape \(5,\)"),
        (np.zeros((2, 2, 2, 2, 2)), r"shape \(2, 2, 2, 2, 2\)"),
        (np.float32(1), r"shape \(\)"),
    ],
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays_that_are_not_images_are_reported_in_one_line(tmp_path, capsys, x, words, suffix):
    path = tmp_path / f"x.{suffix}"
    if suffix == "npy":
        np.save(path, x, allow_pickle=True)
    else:
        np.savez(path, x=x)
    with pytest.raises(DataError, match=words) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Evil()),
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\x10\x00{'descr': print(}",
        b"PK\x03\x04 not a zip",
        b"text",
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '|u1', 'fortran_order': False, 'shape': (9, 9), }".ljust(117)
        + b"\n",
    ],
)
def test_files_that_are_not_arrays_are_reported_and_never_unpickled(
    tmp_path, capsys, content, suffix
):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=str(path)):
        load(path)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"x": np.zeros((4, 9)), "y": np.zeros(3, int)}, "3 labels for 4 images"),
        ({"x": np.zeros((4, 9)), "y": np.zeros(4)}, "whole numbers"),
        ({"x": np.zeros((4, 9)), "y": np.zeros((4, 10), int)}, r"shape \(4, 10\)"),
        ({"images": np.zeros((4, 9))}, "holds images; must hold x, or x_train"),
        ({"x_train": np.zeros((4, 9)), "x_test": np.zeros((4, 8))}, r"shape \(9,\), test images"),
        ({"x_train": np.zeros((4, 9)), "y_test": np.zeros(4, int)}, "y_test without x_test"),
        (
            {
                "x_train": np.zeros((2, 9)),
                "x_test": np.zeros((2, 9)),
                "y_train": np.array(["a", "b"]),
                "y_test": np.zeros(2, int),
            },
            "words in one part and numbers",
        ),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_reported(tmp_path, held, words):
    np.savez(tmp_path / "x.npz", **held)
    with pytest.raises(DataError, match=words):
        load(tmp_path / "x.npz")


def test_labels_may_be_words_or_a_column(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 9)), y=np.array(["dog", "cat", "dog"]))
    found = load(tmp_path / "x.npz")
    assert (found.classes, found.train.labels.tolist()) == (["cat", "dog"], [1, 0, 1])
    train_loader, _ = array_loaders(np.zeros((3, 9)), y_train=np.array([[4], [5], [6]]))
    assert sorted(next(iter(train_loader))[1].tolist()) == [4, 5, 6]


def test_other_files_and_one_image_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"must be a \.npz or \.npy file"):
        array(tmp_path)
    with pytest.raises(DataError, match=r"leave some of 1 images"):
        array_loaders(np.zeros((1, 9)), hold_out=1)
    loader, none = array_loaders(np.zeros((1, 9)))
    assert none is None
    assert len(image_dataset(loader)) == 1


def test_train_takes_these_loaders_without_labels_and_without_a_test_loader():
    loader, test = array_loaders(RNG.random((20, 6)), batch_size=7)
    assert [len(batch) for batch in loader] == [1, 1, 1]
    history = train(VAE((6,), latent_dim=2, intermediate_dim=4), loader, test, epochs=2)
    assert len(history["train/elbo"]) == 2
    assert "test/elbo" not in history


def test_batches_may_be_dictionaries():
    x, y = torch.rand(4, 6), torch.arange(4)
    assert torch.equal(images_of({"image": x, "label": y}), x)
    assert torch.equal(labels_of({"image": x, "label": y}), y)
    assert labels_of({"image": x}) is None
    assert torch.equal(images_of([(255 * x).to(torch.uint8)]), (255 * x).floor() / 255)
    assert images_of(x) is x
    with pytest.raises(ValueError, match="a batch is a dict without images"):
        images_of({"pixels": x})
    vae = VAE((6,), latent_dim=2, intermediate_dim=4)
    history = train(vae, [{"image": x, "label": y}], [{"image": x}], epochs=1)
    assert math.isfinite(history["test/elbo"][0])


def test_the_hash_tells_content_labels_and_shape_apart():
    x, y = RNG.integers(0, 256, (8, 5, 6), np.uint8), np.arange(8)
    other = x.copy()
    other[3, 2, 1] ^= 1
    hashes = [
        data_hash(array_loaders(images, y_train=labels)[0])
        for images, labels in ((x, y), (x, None), (other, y), (x, y[::-1]), (x.reshape(8, 6, 5), y))
    ]
    assert len(set(hashes)) == 5
    last = np.stack([x, x, x], 3)
    assert data_hash(array_loaders(last)[0]) == data_hash(
        array_loaders(np.ascontiguousarray(last.transpose(0, 3, 1, 2)))[0]
    )


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_images_larger_than_memory_give_the_same_batches(tmp_path):
    shape, limit = (3_000, 256, 256, 3), 2**28  # of 0.6 GB: more than twice the limit
    images = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, shape)
    images[5] = 7  # the file stays sparse
    images[2_821] = 9
    del images
    script = """
import resource, sys, torch
torch.set_num_threads(1)
import vae_torch.data.arrays
from vae_torch.data import data_hash
from vae_torch.data.loaders import _loaders, _settings
from vae_torch.data.table import load_source
used = sum(int(line.split()[1]) for line in open("/proc/self/status") if "VmData" in line) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[2]),) * 2)
try:
    bytearray(int(sys.argv[2]) + 2**20)
    raise SystemExit("the limit does not hold")
except MemoryError:
    pass
settings = _settings("array", sys.argv[1], 16, "none", 0.1)
train, test = _loaders(load_source(settings), settings, seed=0, device="cpu")
data_hash(train), train.dataset.mean()
seen = {}
for loader in (train, test):
    for (x,) in loader:
        for image in x[x.amax((1, 2, 3)) > 0]:
            seen[round(255 * image.max().item())] = image.shape
print(len(train.dataset), len(test.dataset), sorted(seen), set(seen.values()))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "x.npy"), str(limit)]
    told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert told.stdout.strip() == "2700 300 [7, 9] {torch.Size([3, 256, 256])}", told.stderr
