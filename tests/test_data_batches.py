import math

import numpy as np
import pytest
import torch

from vae_torch import VAE, array_loaders, mnist_loaders, train
from vae_torch.checkpoint import Checkpoints
from vae_torch.config import Config, ConfigError, DataConfig, config_from_dict
from vae_torch.data import (
    DataError,
    Images,
    Splits,
    data_hash,
    data_sources,
    dataset,
    image_dataset,
    loaders_of,
    shape_of,
)
from vae_torch.data.augment import augment_images
from vae_torch.data.splits import divide
from vae_torch.data.table import as_tensors
from vae_torch.training.errors import StoppedError

RNG = np.random.default_rng(0)


def epoch_of(loader, epoch, **progress):
    loader.batch_sampler.set_epoch(epoch, **progress)
    return [batch[0] for batch in loader]


def test_the_mnist_family_keeps_flat_images(made_up_root):
    train, test = mnist_loaders(made_up_root, name="fashion_mnist")
    assert shape_of(train) == shape_of(test) == (784,)
    assert image_dataset(train).image_shape == (1, 28, 28)


def test_images_that_stay_behind_are_moved_batch_by_batch(monkeypatch):
    x = RNG.integers(0, 256, (20, 3, 4), np.uint8)
    monkeypatch.setattr(dataset, "_placed", lambda images, rows, _: (images, rows))
    train, _ = array_loaders(x, y_train=np.arange(20), augment="flip", device="meta")
    images, labels = next(iter(train))
    assert image_dataset(train).images.device.type == "cpu"
    assert {images.device.type, labels.device.type} == {"meta"}
    assert (images.shape, images.dtype) == ((20, 1, 3, 4), torch.float32)


# augmentation


def numbered(h, w):
    """One image whose pixels say where they are."""
    return (torch.arange(h)[:, None] * 16 + torch.arange(w))[None].to(torch.uint8)


def test_a_shift_moves_whole_images_by_up_to_an_eighth_and_repeats_the_edge():
    h, w, n = 16, 9, 4000
    x = numbered(h, w).expand(n, 2, h, w)
    moved = augment_images(x, "shift", generator=torch.Generator().manual_seed(0))
    assert moved.shape == x.shape
    allowed = {}
    for dy in range(-2, 3):
        for dx in range(-1, 2):
            rows = np.clip(np.arange(h) - dy, 0, h - 1)
            columns = np.clip(np.arange(w) - dx, 0, w - 1)
            allowed[bytes((rows[:, None] * 16 + columns).astype(np.uint8))] = (dy, dx)
    counts = dict.fromkeys(allowed.values(), 0)
    for first, second in moved.numpy():
        assert bytes(first) == bytes(second)  # channels move together
        counts[allowed[bytes(np.ascontiguousarray(first))]] += 1
    expected = n / 15
    chi2 = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi2 < 45  # 14 degrees of freedom: p = 4e-5


def test_a_flip_mirrors_every_other_image():
    x = numbered(5, 7).expand(4000, 1, 5, 7)
    moved = augment_images(x, "flip", generator=torch.Generator().manual_seed(0))
    mirrored = (moved == x.flip(3)).all((1, 2, 3))
    assert (mirrored | (moved == x).all((1, 2, 3))).all()
    assert abs(mirrored.double().mean() - 0.5) < 5.5 * math.sqrt(0.25 / 4000)


@pytest.mark.parametrize("augment", ["shift", "flip"])
@pytest.mark.parametrize("binarize", ["none", "dynamic"])
def test_augmentation_depends_on_seed_epoch_and_step_alone(augment, binarize):
    x = RNG.integers(0, 256, (60, 1, 8, 8), np.uint8)

    def loader(seed=1, how=augment):
        return array_loaders(x, batch_size=16, augment=how, binarize=binarize, seed=seed)[0]

    def differs(a, b):
        return any(not torch.equal(i, j) for i, j in zip(a, b, strict=True))

    whole = epoch_of(loader(), 3)
    other = loader()
    epoch_of(other, 0)  # earlier epochs have no influence
    assert not differs(whole, epoch_of(other, 3))
    assert differs(whole, epoch_of(loader(seed=2), 3))
    assert differs(whole, epoch_of(loader(), 4))
    assert differs(whole, epoch_of(loader(how="none"), 3))

    stopped = loader()
    stopped.batch_sampler.set_epoch(3)
    steps = iter(stopped)
    for _ in range(2):
        next(steps)
    state = stopped.batch_sampler.pixels()
    resumed = epoch_of(loader(), 3, skip=2, pixels=state)
    assert not differs(whole[2:], resumed)


def test_a_stopped_run_on_augmented_unlabelled_images_resumes_with_the_same_bits(tmp_path, config):
    x = RNG.integers(0, 256, (60, 6, 6), np.uint8)

    def run(folder, stop=None):
        torch.manual_seed(0)
        vae = VAE((1, 6, 6), latent_dim=2, intermediate_dim=8)
        loaders = array_loaders(x, x, batch_size=16, augment="shift", binarize="dynamic")
        checkpoints = Checkpoints(tmp_path / folder, config)
        history = train(vae, *loaders, epochs=3, checkpoints=checkpoints, stop=stop)
        return history["train/elbo"], vae.state_dict()

    asked = iter(range(1000))
    with pytest.raises(StoppedError):
        run("cut", stop=lambda: next(asked) == 6)  # inside the second epoch
    (elbo, weights), (expected, expected_weights) = run("cut"), run("whole")
    assert elbo == expected
    assert all(torch.equal(weights[name], w) for name, w in expected_weights.items())


def test_only_training_images_are_augmented():
    x = RNG.integers(0, 256, (20, 8, 8), np.uint8)
    _, test = array_loaders(x, x, augment="shift")
    np.testing.assert_array_equal(next(iter(test))[0][:, 0].numpy(), x / np.float32(255))


def test_mnist_can_be_augmented_and_vectors_cannot(made_up_root, composed):
    settings = ["data=fashion_mnist", f"data.root={made_up_root}", "data.augment=shift"]
    train, _ = loaders_of(composed(*settings), "cpu")
    plain, _ = loaders_of(composed(*settings[:2]), "cpu")
    x, y = epoch_of(train, 0)[0], epoch_of(plain, 0)[0]
    assert x.shape == y.shape == (128, 784)
    assert not torch.equal(x, y)
    assert data_hash(train) == data_hash(plain)
    with pytest.raises(ConfigError, match=r"data\.augment=shift: the images are vectors of 6"):
        array_loaders(np.zeros((4, 6)), augment="shift")


# splits


def splits(n=10, **settings):
    x = np.arange(n, dtype=np.uint8)[:, None].repeat(3, 1)
    return as_tensors(Splits(Images(x, np.arange(n) % 3), **settings), "data=x")


@pytest.mark.parametrize(
    ("hold_out", "held"), [(0, 1), (1, 1), (4, 4), (0.25, 2), (0.01, 1), (9, 9), (0.85, 8)]
)
@pytest.mark.parametrize("mixed", [False, True])
def test_held_out_and_training_images_are_all_images_once(hold_out, held, mixed):
    train, test = divide(splits(mixed=mixed), hold_out=hold_out)

    def rows(part):
        return (part.images if part.rows is None else part.images[part.rows])[:, 0].tolist()

    assert len(rows(test)) == held
    assert sorted(rows(train) + rows(test)) == list(range(10))
    assert not mixed or rows(test) == list(range(10 - held, 10))
    for part in (train, test):
        assert part.labels.tolist() == [number % 3 for number in rows(part)]


@pytest.mark.parametrize("hold_out", [10, 11, -1, 2.5, 1.5, math.nan])
def test_a_hold_out_that_leaves_nothing_is_refused(hold_out):
    with pytest.raises((DataError, ConfigError), match=f"data.hold_out={hold_out}"):
        array_loaders(np.zeros((10, 3)), hold_out=hold_out)


def test_a_test_set_that_is_not_there_is_asked_for():
    with pytest.raises(ConfigError, match=r"data\.hold_out=test: data has no test images"):
        divide(splits(), hold_out="test")


def test_classes_are_kept_in_both_parts():
    found = splits(12, test=Images(np.zeros((3, 3), np.uint8), np.array([2, 1, 2])))
    train, test = divide(found, classes=[2])
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == {2}
    assert (len(train.labels), len(test.labels)) == (4, 2)
    with pytest.raises(DataError, match=r"data\.classes=\[0\]: no test image belongs to them"):
        divide(found, classes=[0])
    with pytest.raises(ConfigError, match="the images have no labels"):
        divide(as_tensors(Splits(Images(np.zeros((4, 3)))), "data=x"), classes=[0])


def test_limits_and_batches_of_chosen_rows(made_up_root, composed):
    overrides = ["data=fashion_mnist", f"data.root={made_up_root}", "data.classes=[3,5]"]
    train, test = loaders_of(composed(*overrides, "data.limit_train=20"), "cpu")
    whole, _ = loaders_of(composed(*overrides[:2]), "cpu")
    wanted = [i for i, y in enumerate(whole.dataset.labels.tolist()) if y in (3, 5)][:20]
    x, labels = train.dataset.first(100)
    assert torch.equal(x, whole.dataset.images[wanted].float() / 255)
    torch.testing.assert_close(train.dataset.mean(), x.double().mean(0).float())
    assert set(labels.tolist()) == {3, 5}
    assert set(test.dataset.labels.tolist()) == {3, 5}


# a data source of the user's own


def test_a_source_of_ones_own_needs_one_function(composed, monkeypatch):
    monkeypatch.setattr(data_sources, "_parts", dict(data_sources._parts))

    @data_sources.register("striped")
    def striped(_, *, count: int = 20, size: int = 6):
        x = torch.zeros(count, size, size)
        x[:, ::2] = 1
        return Splits(Images(x))

    config = composed("data.name=striped", "data.options.count=30", "data.size=8")
    train, test = loaders_of(config, "cpu")
    assert shape_of(train) == (1, 8, 8)
    assert (len(image_dataset(train)), len(image_dataset(test))) == (27, 3)
    assert config_from_dict(config.to_dict()) == config
    for overrides, words in (
        (["data.options.cuont=3"], r"data\.options\.cuont: no option of .*did you mean count"),
        (["data.options.count=many"], r"data\.options\.count=many"),
        (["data.channels=3"], r"data\.channels=3: data=striped has no such setting"),
        (["data.name=strypes"], r"strypes: must be one of mnist, .* plugins="),
    ):
        with pytest.raises(ConfigError, match=words):
            loaders_of(composed("data.name=striped", *overrides), "cpu")


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (Images(np.zeros((3, 4)), [1, 2]), "data=mine: training images: 2 labels for 3 images"),
        (Images(np.full((3, 4), 255.0)), "data=mine: training images have values from 255"),
        (Images([[1, 2]]), "training images are a list; must be an array or a tensor"),
        (Images(np.zeros((0, 4))), r"shape \(0, 4\)"),
    ],
)
def test_what_a_source_returns_is_checked(returned, words):
    with pytest.raises(DataError, match=words):
        as_tensors(Splits(returned), "data=mine")


def test_settings_of_older_runs_still_load(config):
    older = config.to_dict()
    for key in ("classes", "augment", "size", "channels", "background", "split", "dataset"):
        del older["data"][key]
    del older["data"]["options"]
    assert config_from_dict(older) == config
    assert isinstance(config, Config)
    assert isinstance(config.data, DataConfig)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.hold_out=x", "a number of images, 0 or more, a share below 1, or test"),
        ("data.hold_out=1.5", "a share below 1"),
        ("data.hold_out=true", "a share below 1"),
        ("data.size=0", r"N or \[HEIGHT,WIDTH\], each 1 to 4096"),
        ("data.size=[32]", r"N or \[HEIGHT,WIDTH\]"),
        ("data.size=large", r"N or \[HEIGHT,WIDTH\]"),
        ("data.channels=2", r"1 \(grey\) or 3 \(colour\)"),
        ("data.augment=spin", "one of none, shift, flip"),
        ("data.classes=5", "data.classes=5"),
    ],
)
def test_settings_that_are_not_allowed_name_what_is(composed, override, words):
    with pytest.raises(ConfigError, match=words):
        composed(override)
