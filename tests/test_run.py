"""A whole run from Python, without Hydra or a command line."""

import json
from dataclasses import replace

import pytest
import torch
from filelock import FileLock

from tests.rough import undrawn
from vae_torch import load_run
from vae_torch.cli.compose import compose
from vae_torch.config import ConfigError
from vae_torch.machine import cores_are_shared, device_of_job
from vae_torch.runs import identity, records
from vae_torch.runs.folders import LOCK, read_runs
from vae_torch.runs.run import run
from vae_torch.training.errors import StoppedError


@pytest.fixture
def settings(made_up_root):
    return compose(
        [
            *("data=fashion_mnist", f"data.root={made_up_root}", "model.intermediate_dim=16"),
            *("train.epochs=3", "train.figure_every=0", "data.limit_train=100", "threads=1"),
        ]
    )


def metrics_of(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if "second" not in name}
        for line in lines
    ]


def test_a_run_from_python_writes_the_files_of_one_from_the_command_line(settings, tmp_path):
    run_dir = tmp_path / "läufe" / "a=b"
    summary = run(settings, run_dir)
    assert summary == json.loads((run_dir / "summary.json").read_text("utf-8"))
    assert [m["epoch"] for m in metrics_of(run_dir)] == [1, 2, 3]
    for name in ("config.yaml", "checkpoints/last.pt", "figures/manifold.png"):
        assert (run_dir / name).stat().st_size > 0, name
    (found,) = read_runs(run_dir)
    assert (found.state, found.settings["model.intermediate_dim"]) == ("finished", 16)
    vae, _ = load_run(run_dir)
    assert vae.intermediate_dim == 16
    with pytest.raises(ConfigError, match="holds a finished run; choose another folder"):
        run(settings, run_dir)


def test_a_callback_sees_every_epoch_and_may_end_the_run(settings, tmp_path, monkeypatch):
    undrawn(monkeypatch.setattr)  # only here: other tests need the pictures
    seen = []

    def stop_at_two(metrics, model):
        seen.append((metrics["epoch"], type(model).__name__))
        if metrics["epoch"] == 2:
            raise StoppedError("enough")

    with pytest.raises(StoppedError, match="enough"):
        run(settings, tmp_path / "cut", callbacks=[stop_at_two])
    assert seen == [(1, "VAE"), (2, "VAE")]
    (stopped,) = read_runs(tmp_path)
    assert (stopped.state, stopped.settings["train.epochs"]) == ("unfinished", 3)
    with pytest.raises(ConfigError, match=r"holds an unfinished run; add train\.resume=auto"):
        run(settings, tmp_path / "cut")
    settings.train.resume = "auto"
    resumed = run(settings, tmp_path / "cut")
    run(settings, tmp_path / "whole")
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    assert run(settings, tmp_path / "cut") == resumed  # finished: its summary is unchanged


def test_a_run_is_not_resumed_with_other_code_without_a_word(
    settings, tmp_path, monkeypatch, caplog
):
    def stop(*_):
        raise StoppedError("enough")

    with pytest.raises(StoppedError):
        run(settings, tmp_path / "run", callbacks=[stop])
    now = identity.versions()
    monkeypatch.setattr(identity, "versions", lambda: now | {"code": "f" * 64})
    settings.train.resume = "auto"
    with pytest.raises(ConfigError, match=r"code .*, this is ffff.*train\.allow_other_code=true"):
        run(settings, tmp_path / "run")
    settings.train.allow_other_code = True
    run(settings, tmp_path / "run")
    assert "its bits may differ from here on" in caplog.text
    with pytest.raises(ConfigError, match=r"summary\.json: its run was made with code"):
        run(
            replace(settings, train=replace(settings.train, allow_other_code=False)),
            tmp_path / "run",
        )


def test_a_picture_that_fails_is_a_warning(settings, tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise ValueError("no picture today")

    for name in ("sample_grid", "growth_frame"):
        monkeypatch.setattr(records, name, fail)
    settings.train.figure_every, settings.train.epochs = 1, 2
    run(settings, tmp_path / "run")
    warned = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert sorted(warned) == [  # once each, in two epochs
        "figures: no growth (ValueError: no picture today)",
        "figures: no samples (ValueError: no picture today)",
    ]
    assert (tmp_path / "run" / "figures" / "manifold.png").exists()
    assert not (tmp_path / "run" / "figures" / "samples.png").exists()


def test_held_out_images_are_not_called_test(settings, tmp_path, caplog):
    settings.data.hold_out = 50
    with caplog.at_level("INFO", "vae_torch"):
        run(settings, tmp_path / "run")
    assert "100 training and 50 held-out images" in caplog.text
    assert "held-out elbo" in caplog.text
    assert "test" not in caplog.text.replace(str(tmp_path), "")


def test_a_run_in_use_or_with_wrong_settings_is_refused(settings, tmp_path):
    (tmp_path / "busy").mkdir()
    with (
        FileLock(tmp_path / "busy" / LOCK),
        pytest.raises(ConfigError, match="another process is writing this run"),
    ):
        run(settings, tmp_path / "busy")
    settings.model.latent_dim = 0
    with pytest.raises(ConfigError, match=r"model\.latent_dim=0"):
        run(settings, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_images_are_found_again_from_any_folder(settings, made_up_root, tmp_path, monkeypatch):
    monkeypatch.chdir(made_up_root.parent)
    settings.data.root = made_up_root.name
    run(settings, tmp_path / "run")
    assert load_run(tmp_path / "run")[1].data.root == str(made_up_root)


def test_compose_names_the_nearest_key():
    assert compose(["model.latent_dim=8"]).model.latent_dim == 8
    for override, words in (
        ("model.latent_dims=8", "did you mean model.latent_dim"),
        ("train.epochs=0", "train.epochs=0: must be"),
        ("where=nowhere", "where=nowhere: must be one of cores"),
    ):
        with pytest.raises(ConfigError, match=words):
            compose([override])


def test_a_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compose(["data.root=~/images"]).data.root == f"{tmp_path}/images"


@pytest.mark.parametrize(
    ("cpu", "wall", "threads", "shared"),
    [(20, 10, 2, False), (10, 10, 2, True), (16, 10, 2, False), (0.1, 0.2, 2, False)],
)
def test_cores_are_shared_where_threads_get_too_little(cpu, wall, threads, shared):
    assert cores_are_shared(cpu, wall, threads) is shared


@pytest.fixture(autouse=True)
def as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("cards", "name", "expected"),
    [
        (4, "auto", ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:0"]),
        (2, "cuda", ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]),
        (4, "cuda:2", ["cuda:2"] * 5),
        (4, "cpu", ["cpu"] * 5),
        (1, "auto", ["auto"] * 5),
        (0, "auto", ["auto"] * 5),
    ],
)
def test_the_jobs_of_a_sweep_are_dealt_over_the_cards(monkeypatch, cards, name, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    assert [device_of_job(name, job) for job in range(5)] == expected
