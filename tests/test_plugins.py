import json
import math
import shutil
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.command_lines import REPOSITORY, run_script
from tests.rough import FEW_POINTS, UNDRAWN, hardly_fitted, undrawn
from tests.test_life import what_training_made
from vae_torch import VAE, ConfigError, compose, load_run, save_run, train
from vae_torch.checkpoint import CheckpointError, Checkpoints
from vae_torch.cli import evaluate
from vae_torch.images import Batch
from vae_torch.parts.metrics import Metric, metrics
from vae_torch.parts.objectives import bound
from vae_torch.parts.registry import Table, load_plugins
from vae_torch.runs.run import run
from vae_torch.training.errors import EndRun, StoppedError

PLUGIN = "plugins=[tests.my_parts]"
OWN = (PLUGIN, "data=stripes", "data.batch_size=50", "model=mine", "model.options.width=16",
       "objective=weighted", "posterior=round", "prior=wide", "likelihood=laplace",
       "train.figure_every=0", "train.epochs=2", "threads=1")  # fmt: skip


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "run"
    order = (*OWN, "train.monitor=test/mse", f"hydra.run.dir={folder}")
    done = run_script("train.py", *order, before=UNDRAWN)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_parts_of_ones_own_train_from_the_command_line(own_run):
    folder, done = own_run
    assert "Done: test mse 0." in done.stdout
    assert f"run={folder} {PLUGIN}" in done.stdout
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"test/elbo", "train/mse", "test/mse", "train/loss"} <= last.keys()
    assert "train/elbo" not in last  # the objective has not computed it
    better = json.loads((folder / "summary.json").read_text())["better"]
    assert better["test/mse"] == "lower"
    assert better["test/kl"] is None
    vae, config = load_run(folder, plugins=["tests.my_parts"])
    assert config.model.options == {"width": 16, "dropout": 0.1}
    assert config.prior_options == {"scale": 2.0}
    assert vae.input_shape == (1, 6, 6)
    assert not vae.training
    assert vae.sample(3).shape == (3, 1, 6, 6)


def test_a_run_with_parts_of_ones_own_is_evaluated_and_summarised(own_run):
    folder, _ = own_run
    few = ("eval.num_samples=50", "eval.fit_samples=50", "eval.fit_images=1", "eval.limit=4")
    done = run_script("evaluate.py", f"run={folder}", PLUGIN, *few, before=FEW_POINTS)
    assert done.returncode == 0, done.stderr
    card = json.loads((folder / "evaluation.json").read_text())
    exact, fitted = card["log_px_exact"], card["log_px"]  # a likelihood that is not affine in x
    assert abs(exact["value"] - fitted["value"]) < 5 * fitted["standard_error"]
    done = run_script("explore.py", f"run={folder}", PLUGIN)
    assert done.returncode == 0, done.stderr  # two latents: a grid of decoded images
    assert (folder / "explorer.html").stat().st_size > 10_000


def test_a_network_that_views_the_result_of_a_convolution_is_trained_and_evaluated(
    tmp_path, monkeypatch
):
    """`view` refuses tensors that are laid out channels last, as the built-in convolutions are."""
    (tmp_path / "viewing_parts.py").write_text(
        "from torch import nn\n"
        "from vae_torch.parts.networks import networks\n"
        "class Viewed(nn.Conv2d):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x).view(len(x), -1)\n"
        "@networks.register('viewing')\n"
        "class Viewing:\n"
        "    def encoder(self, shape):\n"
        "        return Viewed(shape[0], 4, 3)\n"
        "    def decoder(self, latent_dim, shape):\n"
        "        pixels = shape[0] * shape[1] * shape[2]\n"
        "        return nn.Sequential(nn.Linear(latent_dim, pixels), nn.Unflatten(1, shape))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    undrawn(monkeypatch.setattr)
    hardly_fitted(monkeypatch.setattr)
    plugins = "plugins=[tests.my_parts,viewing_parts]"
    run(compose([plugins, *STRIPES, "model=viewing"]), "viewed")
    few = ("eval.num_samples=20", "eval.fit_samples=20", "eval.fit_images=1", "eval.limit=4")
    evaluate.main(["run=viewed", plugins, *few, "eval.exact=false"])
    assert json.loads(Path("viewed/evaluation.json").read_text("utf-8"))["elbo"]["value"] < 0


def test_nothing_is_imported_because_a_file_says_so(own_run, monkeypatch):
    folder, _ = own_run
    monkeypatch.setattr("vae_torch.parts.registry._loaded", {})
    with pytest.raises(CheckpointError, match=r"add plugins=\[tests.my_parts\].*load_run"):
        load_run(folder)
    done = run_script("evaluate.py", f"run={folder}")
    assert done.returncode == 2
    assert "plugins=[tests.my_parts]" in done.stderr


def test_options_of_ones_own_are_swept(tmp_path):
    sweep = tmp_path / "sweep"
    swept = ("-m", *OWN, "model.options.width=8,x", f"sweep.dir={sweep}")
    done = run_script("train.py", *swept, before=UNDRAWN)
    assert "1 of 2 runs finished" in done.stdout
    assert "model.options.width=x: input should be a valid integer" in done.stdout + done.stderr
    table = run_script("summarize.py", str(sweep), "--metric", "test/mse")
    assert "direction" in table.stdout or "mse" in table.stdout
    assert table.returncode == 0, table.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plugins=[absent_parts]"], "plugins=[absent_parts]: no such module"),
        (["plugins=[tests.broken_parts]"], "fails on import (ZeroDivisionError"),
        (["model=mine"], "one of your own needs plugins=[my_parts]"),
        (
            [PLUGIN, "model=mine", "model.options.widht=3"],
            "did you mean width? its options are width",
        ),
        ([PLUGIN, "model=mine", "model.depth=3"], "depth=3 with model=mine: it has no depth"),
        ([PLUGIN, "prior=wyde"], "prior=wyde: must be one of"),
    ],
)
def test_mistakes_with_plugins_are_one_line(arguments, words, made_up_root, tmp_path):
    data = ("data=fashion_mnist", f"data.root={made_up_root}")
    done = run_script("train.py", *arguments, *data, f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_plugin_lies_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "parts_beside_me.py").write_text(
        "from torch import nn\n"
        "from vae_torch.parts.priors import priors, StandardNormal\n"
        "@priors.register('beside')\n"
        "class Beside(StandardNormal):\n"
        "    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = compose(["plugins=[parts_beside_me]", "prior=beside"])
    assert config.prior == "beside"


def test_two_parts_of_one_name_are_refused():
    table = Table("colour", "colour_options")
    table.register("red")(nn.Identity)
    table.register("red")(nn.Identity)  # the same class again, from a second import of its module
    with pytest.raises(ConfigError, match=r"colour=red: .*Linear takes a name that .*Identity has"):
        table.register("red")(nn.Linear)


def test_a_changed_plugin_is_other_code(tmp_path, monkeypatch):
    source = tmp_path / "changing_parts.py"
    source.write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("vae_torch.parts.registry._loaded", {})
    from vae_torch.runs.identity import refuse_other_code, versions

    load_plugins(["changing_parts"])
    had = versions()
    source.write_text("VALUE = 1  # a comment\n")
    refuse_other_code(had, path=tmp_path, allowed=False)
    source.write_text("VALUE = 2\n")
    with pytest.raises(ConfigError, match="plug-in changing_parts"):
        refuse_other_code(had, path=tmp_path, allowed=False)


def metrics_of(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    timed = ("seconds", "train/images_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


@pytest.mark.parametrize("step", [3, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (6, 9))])
def test_a_network_with_dropout_resumes_to_the_bit(tmp_path, step):
    load_plugins(["tests.my_parts"])
    config = compose([*OWN, "train.epochs=3"])

    def trained(folder, stop=None):
        from vae_torch.data import loaders_of

        torch.manual_seed(0)
        vae = VAE.from_config(config, (1, 6, 6))
        kept = Checkpoints(tmp_path / folder, config, input_shape=(1, 6, 6))
        loaders = loaders_of(config, "cpu")
        history = train(
            vae, *loaders, epochs=3, objective=config.objective, checkpoints=kept, stop=stop
        )
        return history["test/loss"], vae.state_dict()

    asked = iter(range(1, 1000))
    with pytest.raises(StoppedError):
        trained("cut", stop=lambda: next(asked) == step)
    torch.rand(100)  # random numbers that another program takes in between
    (losses, weights), (expected, others) = trained("cut"), trained("whole")
    assert losses == expected
    assert all(torch.equal(weights[name], others[name]) for name in others)


@pytest.mark.parametrize(
    "parts",
    [
        ["posterior=flow", "prior=flow"],
        ["likelihood=discretized_logistic"],
        ["likelihood=pixelcnn"],
    ],
)
def test_a_run_of_every_built_in_part_comes_back(tmp_path, parts):
    small = ["data.name=stripes", "train.figure_every=0", "train.epochs=1", "threads=1"]
    load_plugins(["tests.my_parts"])
    config = compose([PLUGIN, *small, "model.intermediate_dim=8", *parts])
    found = []
    run(config, tmp_path / "run", judges=[lambda _, vae: found.append(deepcopy(vae))])
    before = torch.get_rng_state()
    vae, _ = load_run(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)
    x, eps = torch.rand(3, 1, 6, 6), torch.randn(3, 2)
    assert torch.equal(vae(x, eps=eps).logits, found[0].eval()(x, eps=eps).logits)
    z = torch.randn(5, 2)
    assert torch.equal(vae.log_prior(z), found[0].log_prior(z))


def test_callbacks_add_metrics_and_end_the_run(monkeypatch):
    monkeypatch.setitem(metrics, "count", Metric("lower"))
    x = torch.rand(100, 36, generator=torch.Generator().manual_seed(0))

    def every_second(epoch, vae):
        assert not vae.training
        if epoch["epoch"] == 5:
            raise EndRun
        return {"test/count": float(epoch["epoch"])} if epoch["epoch"] % 2 == 0 else None

    vae = VAE((36,), 2, 8)
    history = train(vae, x, x[:20], epochs=9, callbacks=[every_second])
    assert history["test/count"] == [None, 2.0, None, 4.0, None]
    assert len(history["test/elbo"]) == 5


def test_best_is_by_the_monitored_metric(tmp_path, config, monkeypatch):
    monkeypatch.setitem(metrics, "count", Metric("lower"))
    counts = iter([3.0, 1.0, 2.0])
    x = torch.rand(100, 784)
    train(
        VAE((784,), 2, 8),
        x,
        x[:20],
        epochs=3,
        monitor="test/count",
        callbacks=[lambda *_: {"test/count": next(counts)}],
        checkpoints=Checkpoints(tmp_path, config),
    )
    assert torch.load(tmp_path / "best.pt", weights_only=True)["epoch"] == 2
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 3


def test_a_function_is_an_objective():
    x = torch.rand(60, 36, generator=torch.Generator().manual_seed(0)).round()
    y = (x[:, 0] > 0.5).long()
    seen = []

    def objective(vae, batch, noise, beta):
        seen.append(batch.y)
        parts = bound(vae, batch, noise.eps)
        return beta * parts.kl - parts.reconstruction

    torch.manual_seed(0)
    first = VAE((36,), 2, 8)
    second = VAE((36,), 2, 8)
    second.load_state_dict(first.state_dict())
    pairs = [(x[:30], y[:30]), (x[30:], y[30:])]
    history = train(first, pairs, x, epochs=2, objective=objective)
    expected = train(second, pairs, x, epochs=2)
    assert history["test/elbo"] == expected["test/elbo"]
    assert torch.equal(seen[0], y[:30])
    with pytest.raises(ValueError, match=r"a loss of shape \(2,\).*\(30,\)"):
        train(first, pairs, epochs=1, objective=lambda *_: torch.zeros(2, requires_grad=True))


def test_training_steps_are_in_train_mode_and_nothing_else_is():
    modes = []

    class Spy(nn.Module):
        def forward(self, x):
            modes.append(self.training)
            return x

    vae = VAE((36,), 2, 8)
    vae.encoder.trunk.append(Spy())
    x = torch.rand(40, 36)
    train(vae, x, x[:10], epochs=1)
    assert modes == [True, False]
    vae.train()
    vae.reconstruct(x)
    assert modes[-1] is False
    assert vae.training


def test_a_gaussians_sigma_is_the_residual_from_the_first_epoch():
    x = torch.rand(200, 36, generator=torch.Generator().manual_seed(0))
    vae = VAE((36,), 2, 8, likelihood="gaussian")
    train(vae, x, x[:50], epochs=1)
    residual = (x - vae.decode(vae.encode(x).mean)).square().mean().sqrt().item()
    assert math.exp(0.5 * vae.likelihood.logvar.item()) == pytest.approx(residual, rel=0.1)


def test_a_batch_is_images_and_labels():
    x, y = Batch(torch.rand(3, 4), torch.arange(3))
    assert len(x) == len(y) == 3
    assert Batch(x).y is None


def test_a_whole_run_takes_callbacks(tmp_path):
    load_plugins(["tests.my_parts"])
    config = compose([*OWN, "train.epochs=1"])
    summary = run(config, tmp_path / "run", callbacks=[lambda *_: {"test/extra": 1.5}])
    assert summary["final"]["test/extra"] == 1.5


def test_parts_of_ones_own_resume_to_the_bit_after_a_kill(own_run, tmp_path):
    order = (*OWN, "train.monitor=test/mse", f"hydra.run.dir={tmp_path / 'run'}")
    killed = run_script("train.py", *order, killed=("step", 6), before=UNDRAWN)
    assert killed.returncode == -9
    resume = f"train.resume={tmp_path / 'run'}"
    refused = run_script("train.py", resume)  # nothing is imported because a file says so
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert f"{resume}: its run has parts of your own; add {PLUGIN}" in refused.stderr
    done = run_script("train.py", resume, PLUGIN, before=UNDRAWN)
    assert done.returncode == 0, done.stderr
    assert what_training_made(tmp_path / "run") == what_training_made(own_run[0])


# Settings that choose a part of each kind, and those that are swept.
LIVES = {
    "network": (["model=mine"], "model.options.width=4,8"),
    "posterior": (["model.intermediate_dim=8"], "posterior=gaussian,round"),
    "prior": (["model.intermediate_dim=8", "prior=wide"], "prior_options.scale=1.0,2.0"),
    "likelihood": (["model.intermediate_dim=8"], "likelihood=gaussian,laplace"),
    "objective": (
        ["model.intermediate_dim=8", "objective=weighted"],
        "objective.options.strength=1.0,2.0",
    ),
    "metric": (
        ["model.intermediate_dim=8", "objective=weighted", "train.monitor=test/mse"],
        "objective.options.strength=1.0,2.0",
    ),
    "data source": (["model.intermediate_dim=8"], "data.options.count=100,120"),
}
STRIPES = ("data=stripes", "data.batch_size=50", "train.figure_every=0", "train.epochs=2",
           "threads=1")  # fmt: skip


@pytest.fixture
def folder_of_ones_own(tmp_path):
    """A folder with the how-to pages' parts and nothing of the package."""
    shutil.copy(REPOSITORY / "tests" / "my_parts.py", tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("kind", LIVES)
def test_a_part_of_every_kind_is_swept_killed_resumed_summarised_and_evaluated(
    folder_of_ones_own, kind
):
    settings, swept = LIVES[kind]
    mine = ("plugins=[my_parts]",)

    def done(script, *arguments, killed=None):
        ended = run_script(script, *arguments, cwd=folder_of_ones_own, killed=killed)
        assert ended.returncode == (-9 if killed else 0), ended.stderr
        return ended.stdout

    def sweep(name, killed=None):
        order = ("-m", *mine, *STRIPES, *settings, swept, f"sweep.dir={name}")
        done("train.py", *order, killed=killed)

    sweep("whole")
    sweep("cut", killed=("step", 3))
    sweep("cut")
    jobs = sorted(found.parent for found in folder_of_ones_own.glob("whole/*/summary.json"))
    assert len(jobs) == 2
    for job in jobs:
        cut = folder_of_ones_own / "cut" / job.name
        assert what_training_made(cut) == what_training_made(job)
    assert swept.partition("=")[0] in done("summarize.py", "whole")
    few = ("eval.num_samples=20", "eval.fit_samples=20", "eval.fit_images=2", "eval.limit=10")
    done("evaluate.py", f"run={jobs[1]}", *mine, *few)
    card = json.loads((jobs[1] / "evaluation.json").read_text())
    error = card["log_px"]["standard_error"]
    assert abs(card["log_px_exact"]["value"] - card["log_px"]["value"]) < 5 * error
    done("explore.py", f"run={jobs[1]}", *mine)  # two latents: at least a grid of its images


@pytest.mark.slow
def test_a_run_with_a_callback_resumes_to_the_bit_after_a_kill(folder_of_ones_own):
    script = folder_of_ones_own / "train_mine.py"
    script.write_text(
        "import sys\n"
        "from vae_torch import compose, run\n"
        "settings = ['plugins=[my_parts]', 'train.resume=auto', *sys.argv[2:]]\n"
        "count = lambda metrics, vae: {'test/drawn': float(vae.sample(4).mean())}\n"
        "run(compose(settings), sys.argv[1], callbacks=[count])\n"
    )
    for folder, killed, status in (("whole", None, 0), ("cut", ("step", 6), -9), ("cut", None, 0)):
        order = (folder, *STRIPES, "model=mine", "model.options.dropout=0.5")
        ended = run_script(script, *order, cwd=folder_of_ones_own, killed=killed)
        assert ended.returncode == status, ended.stderr
    cut, whole = (what_training_made(folder_of_ones_own / name) for name in ("cut", "whole"))
    assert cut == whole
    assert "test/drawn" in cut["metrics.jsonl"][-1]


def test_a_saved_model_names_the_plugins_that_it_needs_and_no_others(tmp_path):
    load_plugins(["tests.my_parts"])
    save_run(VAE((20,), 2, 8), tmp_path / "plain")
    assert load_run(tmp_path / "plain")[1].plugins == []
    save_run(VAE((20,), 2, 8, prior="wide"), tmp_path / "own")
    assert load_run(tmp_path / "own", plugins=["tests.my_parts"])[1].plugins == ["tests.my_parts"]
