"""Samples, releases, and models made without a command line."""

import hashlib
import io
import json
import math
import re
import shutil
import struct
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from tests.command_lines import run_script
from tests.conftest import REPOSITORY, made_up_digits
from tests.rough import ROUGH
from vae_torch import VAE, draw_samples, load_run, save_run, train
from vae_torch.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from vae_torch.cli.compose import compose
from vae_torch.cli.messages import EndedError
from vae_torch.cli.sample import main as sample_main
from vae_torch.cli.sample import sample_run
from vae_torch.config import ConfigError, SampleConfig
from vae_torch.deploy import portable_files
from vae_torch.parts.likelihoods import DiscretizedLogistic
from vae_torch.runs.origin import start_from
from vae_torch.runs.run import run


@pytest.fixture(scope="module")
def source(undrawn, made_up_root, tmp_path_factory):
    del undrawn
    folder = tmp_path_factory.mktemp("source") / "run"
    run(
        compose(
            [
                *("data=fashion_mnist", f"data.root={made_up_root}", "model.intermediate_dim=16"),
                *("train.epochs=2", "train.figure_every=0", "data.limit_train=100", "threads=1"),
                "data.limit_test=50",
            ]
        ),
        folder,
    )
    return folder


@pytest.fixture(scope="module")
def release(source, tmp_path_factory):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    from vae_torch import export_run

    return export_run(source, tmp_path_factory.mktemp("release") / "fashion")


def seal_again(folder, *more):
    """Renew the hashes, as somebody would who has changed a file on purpose."""
    lines = (
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("model.safetensors", "config.json", *more)
    )
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.mark.parametrize("prior", ["standard", "mixture"])
def test_temperature_scales_the_priors_deviations(prior):
    torch.manual_seed(0)
    vae = VAE((16,), 2, 4, prior=prior, prior_components=1)
    if prior == "mixture":
        vae.prior.means.data.fill_(5.0)
        vae.prior.logvars.data.fill_(2 * math.log(3.0))
    center, deviation = (5.0, 3.0) if prior == "mixture" else (0.0, 1.0)
    for temperature in (0.0, 0.5, 1.0):
        _, z = draw_samples(vae, 20_000, temperature=temperature)
        assert z.mean(0).tolist() == pytest.approx([center] * 2, abs=0.1)
        assert z.std(0).tolist() == pytest.approx([temperature * deviation] * 2, rel=0.03)


def test_temperature_is_that_of_a_flows_noise_and_of_both_layers():
    torch.manual_seed(0)
    flow = VAE((16,), 2, 4, prior="flow").prior
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(3))
    for temperature in (0.0, 0.5):
        z = flow.sample(5, torch.Generator().manual_seed(3), temperature=temperature)
        back = flow.flow().transform(z)  # from z to the noise
        assert torch.allclose(back, temperature * noise, atol=1e-5)
    layers = VAE((16,), 4, 4, posterior="two_layer", prior="two_layer", prior_components=1)
    layers.prior.top.means.data.fill_(5.0)
    for temperature in (0.0, 0.5, 1.0):  # an untrained lower layer is N(0, I)
        _, z = draw_samples(layers, 20_000, temperature=temperature)
        assert z.mean(0).tolist() == pytest.approx([5.0] * 2 + [0.0] * 2, abs=0.1)
        assert z.std(0).tolist() == pytest.approx([temperature] * 4, rel=0.03)


class OwnPrior(torch.nn.Module):
    def log_prob(self, z):
        return -z.abs().sum(-1)

    def sample(self, n, generator=None):
        return torch.rand(n, 2, generator=generator)


def test_a_prior_of_ones_own_may_have_no_temperature():
    vae = VAE((16,), 2, 4, prior=OwnPrior())
    assert draw_samples(vae, 3)[1].shape == (3, 2)
    with pytest.raises(
        ConfigError, match=r"temperature=0\.5 with a prior of your own whose sample"
    ):
        draw_samples(vae, 3, temperature=0.5)


@pytest.mark.parametrize("mixtures", [1, 3])
def test_a_discretized_logistic_samples_its_own_probabilities(mixtures):
    torch.manual_seed(0)
    likelihood = DiscretizedLogistic(mixtures=mixtures, levels=4)
    params = torch.randn(1, 1, likelihood.outputs)
    drawn = likelihood.sample(params.expand(40_000, 1, -1), torch.Generator().manual_seed(0))
    values = torch.arange(4).reshape(4, 1) / 3
    masses = likelihood.log_prob(values, params.expand(4, 1, -1)).exp()
    shares = [(3 * drawn - level).abs().lt(1e-4).double().mean().item() for level in range(4)]
    assert sum(shares) == pytest.approx(1.0)
    assert shares == pytest.approx(masses.tolist(), abs=0.01)  # 4 standard errors


@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous_bernoulli", "gaussian"])
def test_drawn_pixels_have_the_likelihoods_moments(likelihood):
    torch.manual_seed(0)
    vae = VAE((4,), 2, 4, likelihood=likelihood)
    with torch.no_grad():
        vae.decoder.out.weight.zero_()
        vae.decoder.out.bias.copy_(torch.tensor([0.3, 0.5, 0.7, 0.45]))
        if likelihood == "gaussian":
            vae.likelihood.logvar.fill_(2 * math.log(0.05))
    params = vae.decoder.out.bias.detach()
    of_torch = {
        "bernoulli": lambda: torch.distributions.Bernoulli(logits=params),
        "continuous_bernoulli": lambda: torch.distributions.ContinuousBernoulli(logits=params),
        "gaussian": lambda: torch.distributions.Normal(params, 0.05),
    }[likelihood]()
    x, _ = draw_samples(vae, 40_000, pixels="draw")
    assert torch.allclose(x.mean(0), of_torch.mean, atol=0.01)
    assert torch.allclose(x.var(0), of_torch.variance, atol=0.005)
    expected, _ = draw_samples(vae, 2)
    assert torch.allclose(expected[0], of_torch.mean, atol=1e-4)


@pytest.mark.usefixtures("processor_stays")
def test_samples_come_as_a_picture_or_as_arrays(source, tmp_path):
    picture, arrays = tmp_path / "grid.png", tmp_path / "x.npz"
    for out in (picture, arrays):
        done = run_script("sample.py", f"run={source}", "n=5", f"out={out}", "pixels=draw")
        assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    with np.load(arrays) as found:
        assert (found["x"].shape, found["z"].shape) == ((5, 784), (5, 2))
        assert set(np.unique(found["x"])) == {0.0, 1.0}
        again, z = draw_samples(load_run(source)[0], 5, pixels="draw")
        assert np.array_equal(found["z"], z)
        assert np.array_equal(found["x"], again)
    refused = run_script("sample.py", f"run={source}", "out=x.gif")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "out=x.gif: must end in .png or .npz" in refused.stderr
    for asked, line in (
        ("n=0", "n=0: must be a whole number, 1 or more"),
        ("temperature=-1", "temperature=-1.0: must be a number, 0 or more"),
        (f"out={tmp_path}/none/x.png", "cannot be written"),
        ("pixels=median", "pixels=median: must be one of mean, draw"),
        ("reconstruct=true pixels=draw", "with reconstruct=true: both are for samples"),
    ):
        with pytest.raises(EndedError) as ended:
            sample_main([f"run={source}", *asked.split()])
        assert ended.value.code == 2
        assert line in ended.value.reason


def test_reconstructions_stand_beside_their_originals(source, made_up_root, tmp_path):
    asked = (f"run={source}", "n=3", "reconstruct=true", f"data_root={made_up_root}")
    for out in ("grid.png", "x.npz"):
        done = run_script("sample.py", *asked, f"out={tmp_path / out}")
        assert done.returncode == 0, done.stderr
    x = torch.from_numpy(made_up_digits(200, 1)[0][:3] / np.float32(255)).reshape(3, 784)
    with np.load(tmp_path / "x.npz") as found:
        assert np.array_equal(found["x"], x)
        again = load_run(source)[0].reconstruct(x)
        assert np.allclose(found["reconstruction"], again, atol=1e-6)
    with Image.open(tmp_path / "grid.png") as picture:
        grid = np.asarray(picture)[::3, ::3] / 255  # two pairs a row, 2 white pixels between
    assert grid.shape == (2 * 30 + 2, 4 * 30 + 2)
    assert np.allclose(grid[2:30, 2:30], x[0].reshape(28, 28), atol=0.01)
    assert np.allclose(grid[2:30, 32:60], again[0].reshape(28, 28), atol=0.01)
    assert np.allclose(grid[32:60, 2:30], x[2].reshape(28, 28), atol=0.01)


@pytest.mark.parametrize(
    ("shape", "size"), [((3, 8, 8), (2 * 10 + 2, 3)), ((3, 300, 200), (2 * 130 + 2, 3))], ids=str
)
def test_samples_of_colour_images_are_in_colour(tmp_path, shape, size):
    save_run(VAE(shape, 2, 4, likelihood="gaussian"), tmp_path / "run")
    config = SampleConfig(
        run=str(tmp_path / "run"), device="cpu", checkpoint="last", n=3, seed=0, pixels="draw",
        out=str(tmp_path / "x.png"), temperature=0.5,
    )  # fmt: skip
    with Image.open(sample_run(config)) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[2] == size[1]
    assert pixels.shape[0] % size[0] == 0
    assert (pixels[..., 0] != pixels[..., 1]).any()
    save_run(VAE((6,), 2, 4), tmp_path / "vectors")
    config.run = str(tmp_path / "vectors")
    with pytest.raises(ConfigError, match=r"x\.png: images have shape .* write a \.npz"):
        sample_run(config)


def test_a_release_is_the_runs_model_without_its_optimiser(source, release):
    ours, config = load_run(source)
    theirs, released = load_run(release)
    assert all(
        torch.equal(weight, theirs.state_dict()[name]) for name, weight in ours.state_dict().items()
    )
    assert released.model == config.model
    assert str(source) not in (release / "config.json").read_text()
    assert released.data.root == "data"
    size = sum(path.stat().st_size for path in release.iterdir())
    assert size < (source / "checkpoints" / "last.pt").stat().st_size / 2
    hashes = json.loads((source / "summary.json").read_text())["data_sha256"]
    card = (release / "README.md").read_text()
    for part in (hashes["train"], hashes["test"], "load_run", "`mlp`", "It has not been evaluated"):
        assert part in card
    from safetensors.torch import load_file

    assert load_file(release / "model.safetensors").keys() == ours.state_dict().keys()


def test_half_floats_halve_a_release(source, release, tmp_path):
    from vae_torch import export_run

    made = export_run(source, tmp_path / "half", half=True)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (made, release)]
    assert sizes[0] < 0.55 * sizes[1]
    ours, theirs = (load_run(folder)[0].state_dict() for folder in (source, made))
    for name, weight in ours.items():
        assert theirs[name].dtype == torch.float32
        assert torch.equal(theirs[name], weight.half().float())
    state = load_checkpoint(source / "checkpoints" / "last.pt")
    state["model"]["decoder.out.bias"] = torch.full((784,), 1e5)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    save_checkpoint(state, tmp_path / "run" / "checkpoints" / "last.pt")
    with pytest.raises(ConfigError, match=r"half=true: decoder\.out\.bias has weights above 65504"):
        export_run(tmp_path / "run", tmp_path / "large", half=True)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"architecture": "conv", "likelihood": "discretized_logistic"},
        {"architecture": "residual", "likelihood": "continuous_bernoulli"},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["torchscript", pytest.param("onnx", marks=pytest.mark.slow)])
def test_other_programs_encode_and_decode_as_torch_does(kind, form):
    torch.manual_seed(1)
    vae = VAE((1, 12, 12), 3, 8, **kind).eval()
    x, z = torch.rand(7, 1, 12, 12), 2 * torch.randn(7, 3)
    files = portable_files(vae, [form])
    for part, given, expected in (
        ("encoder", x, list(vae.encode(x))),
        ("decoder", z, [vae.likelihood.mean(vae.decode(z))]),
    ):
        if form == "onnx":
            runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
            session = runtime.InferenceSession(files[f"{part}.onnx"])
            found = session.run(None, {session.get_inputs()[0].name: given.numpy()})
            found = list(map(torch.from_numpy, found))
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                found = torch.jit.load(io.BytesIO(files[f"{part}.pt"]))(given)
            found = [found] if isinstance(found, torch.Tensor) else list(found)
        for ours, theirs in zip(expected, found, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_no_other_program_can_do_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"formats=\[torchscript\] needs a Gaussian q\(z\|x\)"):
        portable_files(VAE((8,), 2, 4, posterior="flow"), ["torchscript"])

    class Loud(torch.nn.Linear):
        def forward(self, z):
            return super().forward(z) * (2.0 if len(z) == 2 else 1.0)  # two rows, as traced

    vae = VAE((8,), 2, 4, encoder=torch.nn.Linear(8, 4), decoder=Loud(2, 8))
    with pytest.raises(ConfigError, match="the decoder differs from PyTorch by"):
        portable_files(vae, ["torchscript"])
    for kind in ("onnx", "torchscript"):
        with pytest.raises(ConfigError, match=r"with likelihood=pixelcnn: .* leave the formats"):
            portable_files(VAE((16,), 2, 4, likelihood="pixelcnn"), [kind])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"needs onnxruntime, .* pip install -e '\.\[onnx\]'"):
        portable_files(VAE((8,), 2, 4), ["onnx"])


def test_a_release_takes_other_formats_and_the_page_along(source, tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    copy = shutil.copytree(source, tmp_path / "run")
    asked = [f"run={copy}", f"out={tmp_path / 'release'}", "explorer=true"]
    refused = run_script("export.py", *asked)
    assert refused.returncode == 2
    assert refused.stderr.startswith("export.py: explorer=true: ")
    assert refused.stderr.count("\n") == 1
    (copy / "explorer.html").write_text("the page")
    done = run_script("export.py", *asked, "formats=[torchscript]")
    assert done.returncode == 0, done.stderr
    made = tmp_path / "release"
    assert (made / "explorer.html").read_text() == "the page"
    assert "`decoder.pt` turns z (B, 2)" in " ".join((made / "README.md").read_text().split())
    assert len((made / "SHA256SUMS").read_text().splitlines()) == 5
    assert load_run(made)[1].model.latent_dim == 2


@pytest.fixture(scope="module")
def evaluated(made_up_root, tmp_path_factory):
    """A folder with one release, of the notebook's objective, and its card."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    from vae_torch import export_run

    folder = tmp_path_factory.mktemp("evaluated")
    overrides = ["data=fashion_mnist", f"data.root={made_up_root}", "model.intermediate_dim=8"]
    overrides += ["objective=keras", "train.epochs=1", "train.figure_every=0", "threads=1"]
    overrides += ["data.limit_train=50", "data.limit_test=10"]
    run(compose(overrides), folder / "run")
    fast = ("eval.num_samples=2", "eval.fit_samples=2", "eval.fit_images=1")
    done = run_script("evaluate.py", f"run={folder / 'run'}", *fast, before=ROUGH)
    assert done.returncode == 0, done.stderr
    export_run(folder / "run", folder / "pretrained" / "tiny", half=True)
    return folder / "pretrained"


def rows_of(verified):
    lines = [line.split() for line in verified.stdout.splitlines() if line.startswith("tiny")]
    return {words[1]: ([float(word) for word in words[-5:-1]], words[-1]) for words in lines}


def test_a_release_is_verified(made_up_root, evaluated, tmp_path):
    where = f"data_root={made_up_root}"
    good = run_script("reproduce.py", "verify", "tiny", f"pretrained={evaluated}", where)
    assert good.returncode == 0, good.stdout + good.stderr
    rows = rows_of(good)
    assert list(rows) == ["loss", "elbo", "reconstruction", "kl", "log_px_exact"]
    card = json.loads((evaluated / "tiny" / "evaluation.json").read_text())
    for name in ("elbo", "reconstruction", "kl", "log_px_exact"):
        assert rows[name][0][0] == pytest.approx(card[name]["value"], abs=1e-4)
    summary = json.loads((evaluated.parent / "run" / "summary.json").read_text())
    assert rows["loss"][0][0] == pytest.approx(summary["final"]["test/loss"], abs=1e-4)
    assert all(row[-1] == "yes" and row[0][2] < 0.01 for row in rows.values())

    wrong = shutil.copytree(evaluated, tmp_path / "wrong")
    card["kl"]["value"] += 0.5
    text = json.dumps(card)
    (wrong / "tiny" / "evaluation.json").write_text(text)
    refused = run_script("reproduce.py", "verify", f"pretrained={wrong}", where)
    assert refused.returncode == 2
    assert "evaluation.json: damaged" in refused.stderr
    seal_again(wrong / "tiny", "evaluation.json")
    bad = run_script("reproduce.py", "verify", f"pretrained={wrong}", where)
    assert bad.returncode == 1
    assert [name for name, row in rows_of(bad).items() if row[-1] == "NO"] == ["kl"]


def test_a_release_is_not_evaluated_but_verified(release):
    refused = run_script("evaluate.py", f"run={release}")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert f"reproduce.py verify {release.name} pretrained={release.parent}" in refused.stderr


def test_what_cannot_be_verified_is_one_line(made_up_root, evaluated, release, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(release, other / "bare")
    shutil.copytree(evaluated / "tiny", other / "foreign")
    settings = json.loads((other / "foreign" / "config.json").read_text())
    settings["data_sha256"]["test"] = "0" * 64
    (other / "foreign" / "config.json").write_text(json.dumps(settings))
    seal_again(other / "foreign", "evaluation.json")
    for asked, folder, line in (
        (["verify", "bare"], other, "evaluation.json: No such file"),
        (["verify", "foreign"], other, "its run had other images or labels than data root"),
        (["verify", "nothing"], other, "nothing: no such folder"),
        (["verify"], tmp_path / "none", "holds no release"),
        (["check"], other, "check: must be verify or picture, or a setting"),
    ):
        where = (f"pretrained={folder}", f"data_root={made_up_root}")
        refused = run_script("reproduce.py", *asked, *where)
        assert refused.returncode == 2, asked
        assert line in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_the_pretrained_releases_are_whole():
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    folders = [path.parent for path in sorted((REPOSITORY / "pretrained").glob("*/SHA256SUMS"))]
    if not folders:
        pytest.skip("there is no release in pretrained/")
    for folder in folders:
        lines = (folder / "SHA256SUMS").read_text().splitlines()
        sums = {name: digest for digest, name in map(str.split, lines)}
        assert {"model.safetensors", "config.json", "evaluation.json"} <= sums.keys()
        for name, digest in sums.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        vae, config = load_run(folder)
        assert vae.sample(2).shape == (2, 784)
        assert config.data.name == "mnist"
    files = [path for folder in folders for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) < 15_000_000


def test_a_run_starts_from_a_release(made_up_root, release, tmp_path):
    summary = run(
        compose(
            [
                *("data=fashion_mnist", f"data.root={made_up_root}", "model.intermediate_dim=16"),
                *("train.epochs=1", "train.figure_every=0", "data.limit_train=100", "threads=1"),
                *("data.limit_test=50", f"train.init_from={release}", "objective=iwae"),
            ]
        ),
        tmp_path,
    )
    weights = (release / "model.safetensors").read_bytes()
    assert summary["started_from"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert summary["started_from"]["epoch"] == 2


def test_the_command_line_exports_with_the_evaluation_card(source, tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    copy = shutil.copytree(source, tmp_path / "run")
    fast = ("eval.num_samples=5", "eval.fit_samples=5", "eval.fit_images=2", "eval.limit=5")
    assert run_script("evaluate.py", f"run={copy}", *fast, before=ROUGH).returncode == 0
    done = run_script("export.py", f"run={copy}", f"out={tmp_path / 'release'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "release")
    measured = json.loads((copy / "evaluation.json").read_text())["elbo"]
    card = (tmp_path / "release" / "README.md").read_text()
    (row,) = (line for line in card.splitlines() if line.startswith("| `kl`"))
    assert row.count("|") - row.count(r"\|") == 5  # the bars of KL(q(z|x) || p(z)) end no cell
    figure = re.search(r"`elbo` \| (\S+) ± (\S+) nats per image \| (\d+) ", card)
    assert float(figure[1]) == pytest.approx(measured["value"], abs=0.005)
    assert float(figure[2]) == pytest.approx(measured["standard_error"], abs=0.005)
    assert int(figure[3]) == measured["num_images"]
    for asked, line in (
        ([f"run={copy}", f"out={tmp_path / 'release'}"], "is not empty; name a new folder"),
        ([f"run={tmp_path / 'none'}", f"out={tmp_path / 'new'}"], "no such folder"),
        ([f"run={copy}"], "out"),
    ):
        refused = run_script("export.py", *asked)
        assert refused.returncode == 2
        assert line in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def changed_byte(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)


def with_terabytes(folder):
    header = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    seal_again(folder)


def with_a_long_header(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62))
    seal_again(folder)


def with_a_pickle(folder):
    torch.save({"a": torch.zeros(1)}, folder / "model.safetensors")
    seal_again(folder)


def with_other_settings(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    seal_again(folder)


def with_a_wider_model(folder):
    values = json.loads((folder / "config.json").read_text())
    values["config"]["model"]["intermediate_dim"] = 99_999
    (folder / "config.json").write_text(json.dumps(values))
    seal_again(folder)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda f: changed_byte(f, "model.safetensors"), "model.safetensors: damaged"),
        (lambda f: changed_byte(f, "config.json"), "config.json: damaged"),
        (lambda f: changed_byte(f, "SHA256SUMS"), "damaged, or no release"),
        (lambda f: (f / "SHA256SUMS").unlink(), "no whole release of vae_torch"),
        (lambda f: (f / "config.json").unlink(), "no whole release of vae_torch"),
        (with_terabytes, "no safetensors file"),
        (with_a_long_header, "no safetensors file"),
        (with_a_pickle, "no safetensors file"),
        (with_other_settings, "no settings of vae_torch"),
        (with_a_wider_model, "does not fit its own config"),
    ],
    ids=range(10),
)
def test_damaged_and_foreign_releases_are_one_line(release, tmp_path, damage, line):
    folder = shutil.copytree(release, tmp_path / "release")
    damage(folder)
    with pytest.raises((CheckpointError, ConfigError)) as error:
        load_run(folder)
    assert line in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    if damage is not with_a_wider_model:  # whose weights no run has been asked to fit
        start = compose([f"train.init_from={folder}", f"data.root={tmp_path}"])
        with pytest.raises(CheckpointError, match=f"^train.init_from={re.escape(str(folder))}: "):
            start_from(VAE(intermediate_dim=16), start)


def test_a_release_with_a_plug_in_says_so_and_is_refused_without_it(source, release, tmp_path):
    from vae_torch import export_run

    state = load_checkpoint(source / "checkpoints" / "last.pt")
    state["config"]["plugins"] = ["my_parts"]
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    save_checkpoint(state, tmp_path / "run" / "checkpoints" / "last.pt")
    made = export_run(tmp_path / "run", tmp_path / "release")
    card = (made / "README.md").read_text()
    assert 'it loads only where "my_parts" can be' in " ".join(card.split())
    assert 'plugins=["my_parts"])' in card
    with pytest.raises(CheckpointError, match=r"add plugins=\[my_parts\]"):
        load_run(made)
    assert "my_parts" not in (release / "README.md").read_text()


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"architecture": "conv", "activation": "silu"},
        {"depth": 2, "prior": "vamp", "prior_components": 3},
        {"prior": "mixture", "prior_options": {"components": 4}, "likelihood": "gaussian"},
    ],
    ids=str,
)
def test_a_model_from_python_comes_back(tmp_path, kind):
    vae = VAE((1, 8, 8), 3, 8, **kind)
    train(vae, torch.rand(20, 1, 8, 8), epochs=1)
    assert save_run(vae, tmp_path / "run") == tmp_path / "run"
    again, config = load_run(tmp_path / "run")
    assert (config.model.latent_dim, again.input_shape) == (3, (1, 8, 8))
    x, eps = torch.rand(5, 1, 8, 8), torch.randn(5, 3)
    ours, theirs = vae(x, eps=eps), again(x, eps=eps)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(vae.log_prior(eps), again.log_prior(eps))
    x, logits = x, ours.logits
    assert torch.equal(vae.likelihood.log_prob(x, logits), again.likelihood.log_prob(x, logits))
    with pytest.raises(ConfigError, match="holds a run already; choose another folder"):
        save_run(vae, tmp_path / "run")


def own(width=8):
    torch.manual_seed(width)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, width))
    return VAE((64,), 3, 8, encoder=encoder, decoder=torch.nn.Linear(3, 64))


def test_a_model_with_modules_of_its_own_needs_one_to_load_into(tmp_path):
    vae = own()
    train(vae, torch.rand(20, 64), epochs=1)
    save_run(vae, tmp_path)
    with pytest.raises(CheckpointError, match=r"its encoder and decoder were .* into=vae\)"):
        load_run(tmp_path)
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    from vae_torch import export_run

    with pytest.raises(CheckpointError, match=r"into=vae\)"):
        load_run(export_run(tmp_path, tmp_path / "release"))
    load_run(tmp_path / "release", into=own())
    fresh = own()
    again, _ = load_run(tmp_path, into=fresh)
    assert again is fresh
    weights = vae.state_dict()
    assert all(torch.equal(weights[name], w) for name, w in again.state_dict().items())
    with pytest.raises(CheckpointError, match=r"encoder\.1\.weight \(8, 64\) \(into: \(9, 64\)\)"):
        load_run(tmp_path, into=own(9))


def test_the_hubs_conventions_are_kept(release, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    from vae_torch.hub import HubRelease

    here = HubRelease.from_pretrained(str(release))
    here.save_pretrained(tmp_path / "saved")
    pushed = tmp_path / "hub"

    def create_repo(_, repo_id, **__):
        return hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(_, *, repo_id, folder_path, **__):
        shutil.copytree(folder_path, pushed / repo_id)

    monkeypatch.setattr(hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload_folder)
    here.push_to_hub("me/fashion")
    ours = load_run(release)[0].state_dict()
    for folder in (tmp_path / "saved", pushed / "me" / "fashion"):
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
            p.name: p.read_bytes() for p in release.iterdir()
        }
        theirs = load_run(HubRelease.from_pretrained(folder).folder)[0].state_dict()
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
