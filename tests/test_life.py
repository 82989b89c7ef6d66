"""A run from its start from another run's weights to its end."""

import json

import pytest
import torch

from vae_torch import load_run
from vae_torch.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from vae_torch.cli.compose import compose
from vae_torch.config import ConfigError
from vae_torch.runs.run import run


@pytest.fixture(scope="module")
def settings(made_up_root):
    def make(*more):
        return compose(
            [
                *("data=fashion_mnist", f"data.root={made_up_root}", "model.intermediate_dim=16"),
                *("train.epochs=2", "train.figure_every=0", "data.limit_train=100", "threads=1"),
                *("data.limit_test=50", *more),
            ]
        )

    return make


@pytest.fixture(scope="module")
def source(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "run"
    run(settings(), folder)
    return folder


def state_of(run_dir, which="last"):
    return load_checkpoint(run_dir / "checkpoints" / f"{which}.pt")


class StartedError(Exception):
    pass


def weights_at_the_start(config, run_dir, monkeypatch):
    """What the training loop is given."""
    found = {}

    def train(vae, *_, **__):
        found.update({name: weight.clone() for name, weight in vae.state_dict().items()})
        raise StartedError

    monkeypatch.setattr("vae_torch.runs.run.train", train)
    with pytest.raises(StartedError):
        run(config, run_dir)
    monkeypatch.undo()
    return found


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_starts_from_the_weights_of_another(settings, source, tmp_path, monkeypatch):
    for which in ("last", "best"):
        config = settings(
            f"train.init_from={source}",
            f"train.init_checkpoint={which}",
            "objective=iwae",
            "seed=3",
        )
        started = weights_at_the_start(config, tmp_path / which, monkeypatch)
        assert equal(started, state_of(source, which)["model"])


def test_its_record_names_the_source_and_its_seal(settings, source, tmp_path):
    summary = run(settings(f"train.init_from={source}", "objective=iwae"), tmp_path / "run")
    origin = summary["started_from"]
    seal = (source / "checkpoints" / "last.pt").read_bytes()[-32:].hex()
    assert origin == {
        "path": str(source), "checkpoint": "last", "epoch": 2, "sha256": seal, "fresh": [],
    }  # fmt: skip
    assert state_of(tmp_path / "run")["started_from"] == origin
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["started_from"] == origin
    optimizer = state_of(tmp_path / "run")["optimizer"]["state"]
    assert {float(values["step"]) for values in optimizer.values()} == {2.0}  # not 4: it is fresh


@pytest.mark.parametrize(
    ("asked", "fresh"),
    [
        (["prior=mixture", "prior_components=5"], ["prior"]),
        (["prior=vamp", "prior_components=5"], ["prior"]),
        (["likelihood=continuous_bernoulli"], []),
        (["likelihood=gaussian"], ["likelihood"]),
    ],
)
def test_parts_that_differ_start_fresh(
    settings, source, tmp_path, monkeypatch, asked, fresh, caplog
):
    caplog.set_level("INFO")
    started = weights_at_the_start(
        settings(f"train.init_from={source}", *asked), tmp_path / "from", monkeypatch
    )
    alone = weights_at_the_start(settings(*asked), tmp_path / "alone", monkeypatch)
    theirs = state_of(source)["model"]
    assert started.keys() == alone.keys()
    for name, weight in started.items():
        expected = alone if name.partition(".")[0] in fresh else theirs
        assert torch.equal(weight, expected[name]), name
    (line,) = [m for m in caplog.messages if m.startswith("starting from")]
    assert line.endswith("fresh: " + ", ".join(["optimiser", *fresh]))


def test_a_run_that_was_cut_off_does_not_read_its_source_again(settings, source, tmp_path):
    import shutil

    from vae_torch.training.errors import StoppedError

    copy = shutil.copytree(source, tmp_path / "source")
    config = settings(f"train.init_from={copy}")
    run(config, tmp_path / "whole")

    def stop(metrics, _):
        if metrics["epoch"] == 2:
            raise StoppedError("enough")

    with pytest.raises(StoppedError):
        run(config, tmp_path / "cut", callbacks=[stop])
    shutil.rmtree(copy)
    config.train.resume = "auto"
    resumed = run(config, tmp_path / "cut")
    assert equal(state_of(tmp_path / "cut")["model"], state_of(tmp_path / "whole")["model"])
    assert resumed["started_from"]["path"] == str(copy)


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        (["model.latent_dim=3"], ["model.latent_dim=2 (this run: 3)"]),
        (
            ["model.intermediate_dim=8"],
            ["encoder.", "(16, 784) (this run: (8, 784))", "decoder.", "give this run the sizes"],
        ),
        (["model.depth=2"], ["absent"]),
        (["model=conv"], ["model=mlp, this run model=conv", "no weight would be taken over"]),
    ],
)
def test_weights_that_do_not_fit_are_listed(settings, source, tmp_path, asked, parts):
    with pytest.raises(ConfigError) as error:
        run(settings(f"train.init_from={source}", *asked), tmp_path / "run")
    assert "\n" not in str(error.value)
    for part in ["train.init_from=", *parts]:
        assert part in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_source_of_other_images_is_refused(settings, source, tmp_path):
    state = state_of(source)
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    save_checkpoint(
        {**state, "input_shape": [3, 32, 32]}, tmp_path / "other" / "checkpoints" / "last.pt"
    )
    with pytest.raises(ConfigError, match=r"images of \(3, 32, 32\) \(this run: \(784,\)\)"):
        run(settings(f"train.init_from={tmp_path / 'other'}"), tmp_path / "run")


def test_a_source_that_is_none_is_one_line(settings, source, tmp_path):
    (tmp_path / "bad" / "checkpoints").mkdir(parents=True)
    content = bytearray((source / "checkpoints" / "last.pt").read_bytes())
    content[1000] ^= 1
    (tmp_path / "bad" / "checkpoints" / "last.pt").write_bytes(content)
    for folder, part in (
        (tmp_path / "none", "no such folder"),
        (tmp_path, "has no checkpoints/last.pt"),
        (tmp_path / "bad", "damaged"),
    ):
        with pytest.raises(CheckpointError, match=part) as error:
            run(settings(f"train.init_from={folder}"), tmp_path / "run")
        assert str(error.value).startswith(f"train.init_from={folder}: ")
    with pytest.raises(ConfigError, match=r"without train\.init_from"):
        settings("train.init_checkpoint=best")
    assert load_run(source)
