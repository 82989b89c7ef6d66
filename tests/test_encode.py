"""Latents and log p(x) of images: right values, files, and what is refused."""

import csv
import importlib.util
import math
import sys
import types
from itertools import count

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.command_lines import run_script
from tests.test_figures import BoxOf
from vae_torch import VAE, encode_images, encoded_batches
from vae_torch.cli import encode as command
from vae_torch.cli.messages import EndedError
from vae_torch.evaluate import importance_log_px
from vae_torch.parts.likelihoods import Gaussian


class Constant(nn.Module):
    """A posterior without an encoder: N(W x + b, S) with a diagonal S."""

    def __init__(self, weight, bias, logvar):
        super().__init__()
        self.weight, self.bias, self.logvar = (
            nn.Parameter(part) for part in (weight, bias, logvar)
        )

    def forward(self, h):
        from vae_torch.parts.posteriors import DiagonalGaussian

        mean = h @ self.weight.T + self.bias
        return DiagonalGaussian(mean, self.logvar.expand_as(mean))


def linear_model(pixels=12, latent_dim=2, sigma=0.08):
    """Probabilistic PCA: p(x) is a Gaussian, and its exact posterior is the model's.

    The decoder's columns are orthogonal, so that the exact posterior is diagonal: Tipping and
    Bishop, *Probabilistic Principal Component Analysis* (1999), section 3.
    """
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(pixels, latent_dim)).Q * torch.tensor([0.3, 0.15])
    centre = torch.full((pixels,), 0.5)
    decoder = nn.Linear(latent_dim, pixels)
    precision = 1 + (basis**2).sum(0) / sigma**2
    gain = basis.T / sigma**2 / precision[:, None]
    likelihood = Gaussian()
    vae = VAE(
        (pixels,), latent_dim, likelihood=likelihood, encoder=nn.Flatten(), decoder=decoder,
        posterior=Constant(gain, -gain @ centre, -precision.log()),
    )  # fmt: skip
    with torch.no_grad():
        decoder.weight.copy_(basis)
        decoder.bias.copy_(centre)
        likelihood.logvar.fill_(2 * math.log(sigma))
    covariance = basis @ basis.T + sigma**2 * torch.eye(pixels)
    return vae, torch.distributions.MultivariateNormal(centre, covariance)


def test_log_px_and_elbo_are_those_of_probabilistic_pca():
    vae, exact = linear_model()
    x = exact.sample((40,)).clamp(0, 1)
    found = encode_images(vae, x, num_samples=50)
    right = exact.log_prob(x).double()
    torch.testing.assert_close(found.log_px, right, rtol=0, atol=1e-3)  # the posterior is exact
    torch.testing.assert_close(found.elbo, right, rtol=0, atol=1.5)  # 50 samples of z, an exact KL
    assert (found.elbo - right).mean().abs() < 0.1
    torch.testing.assert_close(found.mean, vae.encode(x).mean)
    torch.testing.assert_close(found.logvar, vae.encode(x).logvar.expand(40, 2))
    assert found.labels is None
    assert found.reconstruction is None


def auroc(scores, positive):
    """The share of pairs in which the positive one has the higher score: Mann and Whitney."""
    pairs = scores[positive][:, None] - scores[~positive][None]
    return ((pairs > 0).double() + 0.5 * (pairs == 0)).mean().item()


def test_anomalies_are_found_as_well_as_the_density_that_made_the_images_can():
    from sklearn.metrics import roc_auc_score

    vae, exact = linear_model()
    normal = exact.sample((300,)).clamp(0, 1)
    strange = (exact.sample((100,)) + 0.12 * torch.randn(100, 12)).clamp(0, 1)
    x, anomaly = torch.cat([normal, strange]), torch.arange(400) >= 300
    with torch.no_grad():  # a wrong posterior: importance sampling must correct for it
        vae.posterior.logvar += 0.7
    found = encode_images(vae, x, num_samples=500)
    best = roc_auc_score(anomaly, -exact.log_prob(x))  # no test is better (Neyman-Pearson)
    assert 0.8 < best < 0.99
    assert auroc(-found.log_px, anomaly) == pytest.approx(best, abs=0.002)
    assert roc_auc_score(anomaly, -found.elbo) == pytest.approx(best, abs=0.01)


def test_neither_batches_nor_chunks_change_a_figure(small_vae):
    x = torch.rand(23, 784)
    whole = encode_images(small_vae, x, num_samples=7, reconstructions=True)
    batches = encode_images(small_vae, x.split(5), num_samples=7, chunk=3, reconstructions=True)
    for name in ("mean", "logvar", "elbo", "log_px", "reconstruction"):
        torch.testing.assert_close(
            getattr(batches, name), getattr(whole, name), rtol=1e-5, atol=1e-4
        )
    card = importance_log_px(small_vae, x, num_samples=7)  # what the evaluation card holds
    torch.testing.assert_close(whole.log_px, card.log_px, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(whole.reconstruction, small_vae.reconstruct(x))
    assert not torch.equal(encode_images(small_vae, x, num_samples=7, seed=1).elbo, whole.elbo)


def test_labels_and_bytes_are_taken_as_training_takes_them(small_vae):
    x = torch.randint(0, 256, (6, 28, 28), dtype=torch.uint8)
    labels = torch.arange(6)
    found = encode_images(small_vae, [(x, labels)], num_samples=2)
    assert torch.equal(found.labels, labels)
    torch.testing.assert_close(found.mean, small_vae.encode(x.flatten(1) / 255).mean.detach())
    assert encode_images(small_vae, [(x, labels), (x,)], num_samples=2).labels is None


def test_images_without_end_are_encoded_as_they_come(small_vae):
    endless = (torch.rand(4, 784) for _ in count())
    batches = encoded_batches(small_vae, endless, num_samples=2)
    assert [len(next(batches).mean) for _ in range(3)] == [4, 4, 4]


def test_a_posterior_that_is_not_a_gaussian_has_no_log_variance():
    vae, x = VAE(latent_dim=2, intermediate_dim=16, posterior=BoxOf(2)), torch.rand(5, 784)
    found = encode_images(vae, x, num_samples=3)
    assert found.logvar is None
    assert found.log_px.isfinite().all()


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.Dropout(0.5))

    def forward(self, x):
        return self.layers(x)


def test_a_model_in_train_mode_is_encoded_in_eval_mode_and_stays_in_train_mode():
    vae = VAE((784,), 2, 16, encoder=Dropped()).train()
    x = torch.rand(8, 784)
    first, second = (encode_images(vae, x, num_samples=2) for _ in range(2))
    assert torch.equal(first.mean, second.mean)
    assert vae.training


@pytest.mark.parametrize(
    ("options", "words"), [({"num_samples": 0}, "num_samples=0"), ({"chunk": 0}, "chunk=0")]
)
def test_sizes_below_one_are_refused(small_vae, options, words):
    with pytest.raises(ValueError, match=words):
        encode_images(small_vae, torch.rand(2, 784), **options)


def test_no_image_and_other_images_are_refused(small_vae):
    with pytest.raises(ValueError, match="no image to encode"):
        encode_images(small_vae, [])
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\)"):
        encode_images(small_vae, [torch.rand(2, 3, 8, 8)])


# scripts/encode.py.


def colour_folder(folder, per_class=12):
    """Small colour images of two classes, as PNG files."""
    random = np.random.default_rng(0)
    for name, ink in (("red", 0), ("blue", 2)):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = random.integers(0, 60, (10, 14, 3)).astype(np.uint8)
            pixels[..., ink] += 150
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def colour_run(tmp_path_factory):
    """A finished run on colour images, its images, and the output of training."""
    root = tmp_path_factory.mktemp("encode")
    images = colour_folder(root / "images")
    done = run_script(
        "train.py", "data=folder", f"data.root={images}", "model.intermediate_dim=16",
        "train.epochs=2", "threads=1", "data.batch_size=8", f"hydra.run.dir={root / 'run'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return root / "run", images, done


def encode(*arguments, **options):
    done = run_script("encode.py", *arguments, "num_samples=5", **options)
    assert done.returncode == 0, done.stderr
    return done


def test_colour_with_bernoulli_is_warned_of_once_in_a_run(colour_run):
    _, _, done = colour_run
    said = done.stdout + done.stderr
    assert said.count("likelihood=bernoulli with colour images") == 1
    assert "discretized_logistic or gaussian" in said


def test_a_folder_becomes_an_npz(colour_run, tmp_path):
    from vae_torch import load_run

    run_dir, images, _ = colour_run
    out = tmp_path / "latents.npz"
    done = encode(f"run={run_dir}", f"images={images}", f"out={out}", "reconstructions=true")
    assert done.stdout.startswith(f"{out}: 24 images, in the mean elbo -")
    with np.load(out) as found:
        held = dict(found)
    assert sorted(held) == [
        "classes", "elbo", "files", "labels", "log_px", "logvar", "mean", "reconstruction",
    ]  # fmt: skip
    vae, _ = load_run(run_dir)
    files = sorted(images.rglob("*.png"))
    assert held["files"].tolist() == [str(file.relative_to(images)) for file in files]
    assert [held["classes"][k] for k in held["labels"]] == [file.parent.name for file in files]
    x = torch.stack([torch.tensor(np.asarray(Image.open(f))).movedim(-1, 0) / 255 for f in files])
    mean, logvar = vae.encode(x)
    np.testing.assert_allclose(held["mean"], mean.detach(), atol=1e-5)
    np.testing.assert_allclose(held["logvar"], logvar.detach(), atol=1e-5)
    np.testing.assert_allclose(held["reconstruction"], vae.reconstruct(x), atol=1e-5)
    log_px = importance_log_px(vae, x, num_samples=5).log_px
    np.testing.assert_allclose(held["log_px"], log_px, rtol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["latents.npz"]  # no scratch files


def test_a_table_has_a_line_for_each_image(colour_run, tmp_path):
    run_dir, images, _ = colour_run
    encode(f"run={run_dir}", f"images={images}", f"out={tmp_path / 'a.csv'}")
    encode(f"run={run_dir}", f"images={images}", f"out={tmp_path / 'a.npz'}")
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "image", "file", "label", "class", "elbo", "log_px",
        "mean_1", "mean_2", "logvar_1", "logvar_2",
    ]  # fmt: skip
    with np.load(tmp_path / "a.npz") as held:
        for column, name in (("elbo", "elbo"), ("log_px", "log_px"), ("label", "labels")):
            np.testing.assert_allclose([float(row[column]) for row in rows], held[name])
        np.testing.assert_allclose([float(row["mean_2"]) for row in rows], held["mean"][:, 1])
    assert rows[0]["file"] == "blue/00.png"
    assert rows[0]["class"] == "blue"


def test_the_runs_own_images_and_arrays(colour_run, tmp_path):
    run_dir, _, _ = colour_run
    sizes = {}
    for split in ("train", "test"):
        encode(f"run={run_dir}", f"split={split}", f"out={tmp_path / 'own.npz'}")
        with np.load(tmp_path / "own.npz") as held:
            sizes[split] = len(held["mean"])
    assert sizes == {"train": 22, "test": 2}
    x = np.random.default_rng(0).random((7, 10, 14, 3), np.float32)
    np.save(tmp_path / "x.npy", x)
    encode(f"run={run_dir}", f"images={tmp_path / 'x.npy'}", f"out={tmp_path / 'x.csv'}")
    rows = (tmp_path / "x.csv").read_text().splitlines()
    assert rows[0].startswith("image,elbo,log_px,mean_1")
    assert len(rows) == 8


def test_parquet_is_written_by_pyarrow(monkeypatch, tmp_path, small_vae):
    written = []

    class ParquetWriter:
        def __init__(self, path, schema):
            path.write_bytes(b"parquet")
            assert schema == "schema"

        def write_table(self, table):
            written.append(table.columns)

        def close(self):
            written.append("closed")

    arrow, parquet = types.ModuleType("pyarrow"), types.ModuleType("pyarrow.parquet")
    arrow.table = lambda columns: types.SimpleNamespace(columns=columns, schema="schema")
    parquet.ParquetWriter = ParquetWriter
    monkeypatch.setitem(sys.modules, "pyarrow", arrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    x = torch.rand(6, 784)
    batches = encoded_batches(small_vae, list(x.split(4)), num_samples=2)
    images = types.SimpleNamespace(classes=None)
    command.write_parquet(tmp_path / "a.parquet", batches, command.Source(images, None))
    assert [len(columns["elbo"]) for columns in written[:2]] == [4, 2]
    assert written[1]["image"] == [4, 5]
    assert written[2] == "closed"
    assert (tmp_path / "a.parquet").exists()


@pytest.mark.usefixtures("processor_stays")
def test_what_cannot_be_encoded_is_refused_in_one_line(colour_run, tmp_path):
    run_dir, images, _ = colour_run
    np.save(tmp_path / "grey.npy", np.zeros((3, 10, 14), np.uint8))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("")
    out, run, own = f"out={tmp_path / 'a.npz'}", f"run={run_dir}", f"images={images}"
    cases = [
        ([run, own], "out is missing"),
        ([own, out], "run is missing: name a run folder"),
        ([run, own, "out=a.txt"], "out=a.txt: must end in .npz, .csv, .parquet"),
        ([run, own, f"out={tmp_path}/no/a.npz"], "its folder does not exist"),
        ([run, own, f"out={tmp_path}/a.csv", "reconstructions=true"], "a table holds no images"),
        ([run, out, f"images={tmp_path}/nothing"], "must be a folder of images, or a .npz or .npy"),
        ([run, out, f"images={tmp_path}/a.txt"], "must be a folder of images, or a .npz or .npy"),
        ([run, out, f"images={tmp_path}/empty"], "holds no images"),
        ([run, out, f"images={tmp_path}/objects.npy"], "it holds Python objects"),
        ([run, out, f"images={tmp_path}/grey.npy"], "this model takes (B, 3, 10, 14)"),
        ([run, out, own, "num_samples=0"], "num_samples=0: must be a whole number, 1 or more"),
        ([run, out, own, "split=both"], "split=both: must be one of train, test"),
        ([run, out, own, "plugins=[no_such_parts]"], "no_such_parts"),
        ([f"run={tmp_path}", out, own], "has no checkpoints/last.pt"),
    ]
    done = run_script("encode.py", *cases[0][0])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"encode.py: {cases[0][1]}"), done.stderr
    for arguments, words in cases:
        with pytest.raises(EndedError) as ended:
            command.main(list(map(str, arguments)))
        assert ended.value.code == 2
        assert words in ended.value.reason, (arguments, ended.value.reason)
    assert not list(tmp_path.glob("a.*z"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_parquet_without_pyarrow_is_refused_in_one_line(colour_run, tmp_path):
    done = run_script("encode.py", f"run={colour_run[0]}", f"out={tmp_path / 'a.parquet'}")
    assert done.returncode == 2
    assert "needs pyarrow, which is not installed; pip install pyarrow" in done.stderr
