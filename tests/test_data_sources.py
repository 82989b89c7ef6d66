import gzip
import hashlib
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, EMNIST, SVHN, CelebA, Omniglot

from tests.conftest import made_up_digits
from vae_torch import load_images, mnist_loaders
from vae_torch.config import ConfigError, DataConfig
from vae_torch.data import DataError, benchmarks, idx_bytes, loaders_of, shape_of, sources
from vae_torch.data.table import load_source

RNG = np.random.default_rng(0)


def load(name, root, **settings):
    return load_source(DataConfig(name, str(root), batch_size=8, binarize="none", **settings))


def unreachable(*_, **__):
    raise OSError("Name or service not known")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(sources, "_from_torchvision", unreachable)
    monkeypatch.setattr(sources, "_from_wheel", unreachable)


# the MNIST family


@pytest.mark.parametrize("place", ["FashionMNIST/raw", "FashionMNIST", "fashion-mnist"])
@pytest.mark.parametrize("spelling", ["-idx", ".idx"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.usefixtures("offline")
def test_files_are_found_in_every_usual_place_and_spelling(
    made_up_root, tmp_path, place, spelling, packed
):
    (tmp_path / place).mkdir(parents=True)
    for path in (made_up_root / "FashionMNIST" / "raw").iterdir():
        target = tmp_path / place / path.name.replace("-idx", spelling)
        if packed:
            target.with_name(f"{target.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
        else:
            shutil.copy(path, target)
    for split in ("train", "test"):
        ours = load_images("fashion_mnist", root=tmp_path, split=split)
        expected = load_images("fashion_mnist", root=made_up_root, split=split)
        assert torch.equal(ours.images, expected.images)


@pytest.fixture
def published(made_up_root, monkeypatch):
    """The made-up files as if they had been published."""
    raw = made_up_root / "FashionMNIST" / "raw"
    files = [
        f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    ]
    known = [hashlib.sha256((raw / f"{file}-ubyte").read_bytes()).hexdigest() for file in files]
    monkeypatch.setitem(sources._SHA256, "fashion_mnist", known)
    monkeypatch.setattr(sources, "_PUBLISHED", (600, 200))
    return raw


@pytest.mark.usefixtures("offline")
def test_published_files_may_lie_right_under_the_root(published, tmp_path):
    for path in published.iterdir():
        shutil.copy(path, tmp_path)
    assert len(load_images("fashion_mnist", root=tmp_path).images) == 600
    with pytest.raises(DataError, match=r"data.name=kmnist: not under"):
        load_images("kmnist", root=tmp_path)


@pytest.mark.usefixtures("offline")
def test_debians_installed_folder_is_found(published, tmp_path, monkeypatch):
    shutil.copytree(published, tmp_path / "share" / "fashion-mnist")
    monkeypatch.setattr(sources, "_SYSTEM", tmp_path / "share")
    for root in (tmp_path / "data", tmp_path / "share", tmp_path / "share" / "fashion-mnist"):
        assert len(load_images("fashion_mnist", root=root, split="test").images) == 200
    assert not (tmp_path / "data").exists()


def test_altered_fashion_mnist_is_refused(published, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    shutil.copytree(published, raw)
    content = bytearray((raw / "train-images-idx3-ubyte").read_bytes())
    content[1000] ^= 1
    (raw / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte: altered.*delete"):
        load_images("fashion_mnist", root=tmp_path)


@pytest.mark.usefixtures("offline")
def test_a_failed_try_leaves_nothing_behind(tmp_path):
    (tmp_path / "system").mkdir()
    (tmp_path / "system" / "something").write_text("of others")
    for root in (tmp_path / "system", tmp_path / "new"):
        for name in ("mnist", "fashion_mnist", "emnist"):
            with pytest.raises(DataError, match="Name or service not known"):
                load_images(name, root=root)
    assert [p.name for p in tmp_path.rglob("*")] == ["system", "something"]


def emnist_files(root, split, labels):
    raw = root / "EMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    images, _ = made_up_digits(len(labels), 0)
    for part in ("train", "test"):
        (raw / f"emnist-{split}-{part}-images-idx3-ubyte").write_bytes(
            idx_bytes(np.ascontiguousarray(images.transpose(0, 2, 1)))
        )
        (raw / f"emnist-{split}-{part}-labels-idx1-ubyte").write_bytes(
            idx_bytes(np.array(labels, np.uint8))
        )
    return images


def test_emnists_splits_are_torchvisions(tmp_path):
    for split in ("letters", "balanced", "digits"):
        top = {"letters": 26, "balanced": 46, "digits": 9}[split]
        images = emnist_files(tmp_path, split, [1, top, 2])
        found = load("emnist", tmp_path, split=split)
        assert found.train.labels.tolist() == [1, top, 2]
        np.testing.assert_array_equal(found.train.images, images)
        theirs = EMNIST(tmp_path, split=split, train=True)
        assert torch.equal(theirs.data.transpose(1, 2), found.train.images)
        assert torch.equal(theirs.targets, found.train.labels)
    emnist_files(tmp_path, "digits", [1, 10, 2])
    with pytest.raises(DataError, match=r"has a label 10; emnist's are 0 to 9"):
        load("emnist", tmp_path, split="digits")
    with pytest.raises(ConfigError, match=r"data\.split=words: must be one of byclass"):
        load("emnist", tmp_path, split="words")


def test_settings_of_other_sources_are_refused(made_up_root):
    with pytest.raises(ConfigError, match=r"data\.size=32: data=fashion_mnist has no such setting"):
        load("fashion_mnist", made_up_root, size=32)
    with pytest.raises(ValueError, match="batch_size=0: must be a whole number"):
        mnist_loaders(made_up_root, name="fashion_mnist", batch_size=0)


# the benchmark files


def amat(path, images):
    lines = (" ".join(map(str, row)) + "\n" for row in images.reshape(len(images), -1))
    path.write_text("".join(lines))


def test_larochelles_files_are_read_with_validation_images_last(tmp_path, monkeypatch, composed):
    monkeypatch.setattr(benchmarks, "_LAROCHELLE", {"train": 6, "valid": 3, "test": 2})
    x = RNG.integers(0, 2, (11, 784))
    for part, rows in (("train", x[:6]), ("valid", x[6:9]), ("test", x[9:])):
        amat(tmp_path / f"binarized_mnist_{part}.amat", rows)
    found = load("larochelle", tmp_path)
    expected = 255 * x.reshape(-1, 1, 28, 28)
    np.testing.assert_array_equal(found.train.images, expected[:9])
    np.testing.assert_array_equal(found.test.images, expected[9:])
    overrides = ["data=larochelle", f"data.root={tmp_path}", "data.hold_out=3"]
    train, valid = loaders_of(composed(*overrides), "cpu")
    assert shape_of(train) == (1, 28, 28)
    np.testing.assert_array_equal(next(iter(valid))[0], expected[6:9] / 255)
    for content in ("0 1\n" * 2, "0 1 2\n", ""):
        (tmp_path / "binarized_mnist_test.amat").write_text(content)
        with pytest.raises(DataError, match=r"test\.amat: . lines, .*published file has 2 lines"):
            load("larochelle", tmp_path)
    (tmp_path / "binarized_mnist_test.amat").unlink()
    with pytest.raises(DataError, match=r"test\.amat: is missing; get it from http"):
        load("larochelle", tmp_path)


def test_the_published_counts_of_the_benchmarks():
    assert benchmarks._LAROCHELLE == {"train": 50_000, "valid": 10_000, "test": 10_000}
    assert benchmarks._OMNIGLOT == {"data": 24_345, "testdata": 8_070}
    assert benchmarks._CALTECH == {"train": 4_100, "val": 2_264, "test": 2_307}


def column_after_column(images):
    """As MATLAB stores them: (N, 28, 28) -> (N, 784)."""
    return np.stack([image.flatten(order="F") for image in images])


def test_omniglot_is_upright_with_its_alphabets(tmp_path, monkeypatch):
    io = pytest.importorskip("scipy.io")
    monkeypatch.setattr(benchmarks, "_OMNIGLOT", {"data": 5, "testdata": 3})
    x, y = RNG.random((8, 28, 28)), RNG.integers(0, 50, 8)
    flat, one_hot = column_after_column(x).T, np.eye(50)[y].T
    held = {
        "data": flat[:, :5],
        "testdata": flat[:, 5:],
        "target": one_hot[:, :5],
        "testtarget": one_hot[:, 5:],
    }
    io.savemat(tmp_path / "chardata.mat", held)
    found = load("omniglot", tmp_path)
    np.testing.assert_array_equal(found.train.images[:, 0], x[:5].astype(np.float32))
    np.testing.assert_array_equal(found.test.images[:, 0], x[5:].astype(np.float32))
    assert found.train.labels.tolist() + found.test.labels.tolist() == y.tolist()
    io.savemat(tmp_path / "chardata.mat", {**held, "testdata": flat[:, :1]})
    with pytest.raises(DataError, match=r"testdata has shape \(784, 1\); must have \(784, 3\)"):
        load("omniglot", tmp_path)
    for content in (b"", b"MATLAB 5.0", RNG.bytes(1000)):
        (tmp_path / "chardata.mat").write_bytes(content)
        with pytest.raises(DataError, match=r"chardata\.mat: no MATLAB file"):
            load("omniglot", tmp_path)


def test_silhouettes_are_upright_with_their_classes(tmp_path, monkeypatch):
    io = pytest.importorskip("scipy.io")
    counts = {"train": 4, "val": 2, "test": 3}
    monkeypatch.setattr(benchmarks, "_CALTECH", counts)
    held, x, y = {}, {}, {}
    for part, count in counts.items():
        x[part], y[part] = RNG.integers(0, 2, (count, 28, 28), np.uint8), RNG.integers(0, 3, count)
        held[f"{part}_data"] = column_after_column(x[part])
        held[f"{part}_labels"] = y[part][:, None] + 1
    held["classnames"] = np.array([["ant", "bass", "chair"]], dtype=object)
    io.savemat(tmp_path / "caltech101_silhouettes_28_split1.mat", held)
    found = load("caltech101_silhouettes", tmp_path)
    both = np.concatenate([x["train"], x["val"]])
    np.testing.assert_array_equal(found.train.images[:, 0], 255 * both)
    np.testing.assert_array_equal(found.test.images[:, 0], 255 * x["test"])
    assert found.train.labels.tolist() == [*y["train"], *y["val"]]
    assert found.classes == ["ant", "bass", "chair"]


# torchvision


def cifar(root, monkeypatch):
    """Made-up CIFAR-10 as torchvision unpacks it; returns images (N, 32, 32, 3) and labels."""
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    x, y = RNG.integers(0, 256, (12, 32, 32, 3), np.uint8), RNG.integers(0, 10, 12).tolist()

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    def part(rows):
        flat = x[rows].transpose(0, 3, 1, 2).reshape(-1, 3072)
        return {"data": flat, "labels": y[rows]}

    monkeypatch.setattr(CIFAR10, "train_list", [write("data_batch_1", part(slice(0, 8)))])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", part(slice(8, 12)))])
    names = [f"class {i}" for i in range(10)]
    file, md5 = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": file, "key": "label_names", "md5": md5})
    return x, y


def test_cifar_is_read_in_colour_and_only_once(tmp_path, monkeypatch):
    x, y = cifar(tmp_path, monkeypatch)
    counted = []
    real = CIFAR10.__getitem__
    monkeypatch.setattr(CIFAR10, "__getitem__", lambda *a: counted.append(1) or real(*a))
    for _ in range(2):
        found = load("torchvision", tmp_path, dataset="CIFAR10")
        np.testing.assert_array_equal(found.train.images, x[:8].transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(found.test.images, x[8:].transpose(0, 3, 1, 2))
        assert found.train.labels.tolist() + found.test.labels.tolist() == y
        assert found.classes == [f"class {i}" for i in range(10)]
    assert len(counted) == 12 + 2  # and each start reads the first image for the shape
    grey = load("torchvision", tmp_path, dataset="CIFAR10", size=16, channels=1)
    assert grey.train.images.shape == (8, 1, 16, 16)


def test_svhns_splits_are_chosen(tmp_path, monkeypatch):
    io = pytest.importorskip("scipy.io")
    x = {
        part: RNG.integers(0, 256, (32, 32, 3, 5), np.uint8) for part in ("train", "test", "extra")
    }
    for part, images in x.items():
        path = tmp_path / f"{part}_32x32.mat"
        io.savemat(path, {"X": images, "y": np.array([[1], [2], [10], [4], [5]])})
        url, _, _ = SVHN.split_list[part]
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setitem(SVHN.split_list, part, [url, path.name, md5])
    for split, part in ((None, "train"), ("extra", "extra")):
        found = load("torchvision", tmp_path, dataset="SVHN", split=split)
        np.testing.assert_array_equal(found.train.images, x[part].transpose(3, 2, 0, 1))
        np.testing.assert_array_equal(found.test.images, x["test"].transpose(3, 2, 0, 1))
        assert found.train.labels.tolist() == [1, 2, 0, 4, 5]


def test_omniglot_of_torchvision_has_background_and_evaluation_alphabets(tmp_path, monkeypatch):
    hashes = {}
    for part, n in (("images_background", 3), ("images_evaluation", 2)):
        base = tmp_path / "omniglot-py" / part / "Latin" / "character01"
        base.mkdir(parents=True)
        for i in range(n):
            Image.fromarray(np.eye(105, dtype=bool)).save(base / f"{i}.png")
        archive = tmp_path / "omniglot-py" / f"{part}.zip"
        with zipfile.ZipFile(archive, "w") as opened:
            opened.write(base / "0.png")
        hashes[part] = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(Omniglot, "zips_md5", hashes)
    found = load("torchvision", tmp_path, dataset="Omniglot", size=28)
    assert (found.train.images.shape, found.test.images.shape) == ((3, 1, 28, 28), (2, 1, 28, 28))


def test_celeba_needs_a_size_and_has_no_single_label(tmp_path, monkeypatch):
    base = tmp_path / "celeba"
    (base / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06}.jpg" for i in range(6)]
    for i, name in enumerate(names):
        Image.new("RGB", (20, 30 + i), (40 * i, 0, 0)).save(base / "img_align_celeba" / name)
    (base / "list_eval_partition.txt").write_text(
        "".join(f"{name} {2 * (i > 3)}\n" for i, name in enumerate(names))
    )
    for file, width in (
        ("identity_CelebA.txt", 1),
        ("list_bbox_celeba.txt", 4),
        ("list_landmarks_align_celeba.txt", 10),
        ("list_attr_celeba.txt", 3),
    ):
        rows = "".join(f"{name} {' '.join(['1'] * width)}\n" for name in names)
        head = "" if width == 1 else f"6\n{' '.join(f'c{i}' for i in range(width))}\n"
        (base / file).write_text(head + rows)
    monkeypatch.setattr(CelebA, "_check_integrity", lambda *_: True)
    with pytest.raises(DataError, match=r"image 1 is 31x20, the first 30x20; set data\.size"):
        load("torchvision", tmp_path, dataset="CelebA")
    assert not (tmp_path / ".vae_torch").exists()
    found = load("torchvision", tmp_path, dataset="CelebA", size=16)
    assert found.train.images.shape == (4, 3, 16, 16)
    assert found.test.images.shape == (2, 3, 16, 16)
    assert found.train.labels is None
    (base / "img_align_celeba" / names[2]).write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"data.dataset=CelebA: image 2 cannot be read \(cannot id"):
        load("torchvision", tmp_path, dataset="CelebA", size=16)


def test_a_download_arrives_whole_or_leaves_nothing(tmp_path, monkeypatch):
    cifar(tmp_path / "mirror", monkeypatch)
    root = tmp_path / "data"

    def download(self):
        base = tmp_path / "mirror" / "cifar-10-batches-py"
        shutil.copytree(base, f"{self.root}/cifar-10-batches-py")
        if broken:
            (tmp_path / "reached").touch()
            raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(CIFAR10, "download", download)
    broken = True
    with pytest.raises(DataError, match=r"cannot be fetched \(File not found or corrupted"):
        load("torchvision", root, dataset="CIFAR10")
    assert (tmp_path / "reached").exists()
    assert not root.exists()
    broken = False
    assert len(load("torchvision", root, dataset="CIFAR10").train.images) == 8
    assert sorted(p.name for p in root.iterdir()) == [".vae_torch", "cifar-10-batches-py"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "data.dataset=null: must be an image data set of torchvision"),
        ({"dataset": "Cifar10"}, "data.dataset=Cifar10: must be"),
        ({"dataset": "FakeData"}, "data.dataset=FakeData: must be"),
        ({"dataset": "wrap_dataset_for_transforms_v2"}, "must be an image data set"),
        ({"dataset": "CocoDetection"}, "data.dataset=CocoDetection: .*missing"),
        ({"dataset": "CIFAR10", "split": "train"}, "data.split=train: CIFAR10 has no splits"),
        ({"dataset": "SVHN", "split": "trian"}, "trian"),
    ],
)
def test_data_sets_that_cannot_be_used_are_reported(tmp_path, settings, words):
    with pytest.raises((ConfigError, DataError), match=words):
        load("torchvision", tmp_path, **settings)
