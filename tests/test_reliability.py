"""Runs that are killed, stopped, starved of disk or started twice: by doing the damage."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import REPOSITORY
from vae_torch.checkpoint import Checkpoints, load_checkpoint


def command(made_up_root, run_dir, *more):
    return [
        *(sys.executable, "scripts/train.py", "data=fashion_mnist", f"data.root={made_up_root}"),
        *("model.intermediate_dim=16", f"hydra.run.dir={run_dir}", *more),
    ]


def start(arguments, **options):
    return subprocess.Popen(
        arguments, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        **options,
    )  # fmt: skip


def wait_for(process, beginning):
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(process.stderr.read())


def what_stays(run_dir):
    """All of a run that must not depend on how often it was interrupted."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    metrics = [{k: v for k, v in json.loads(x).items() if "second" not in k} for x in lines]
    model = load_checkpoint(run_dir / "checkpoints" / "last.pt")["model"]
    weights = {name: tensor.numpy().tobytes() for name, tensor in model.items()}
    figures = {p.name: p.read_bytes() for p in (run_dir / "figures").glob("*.png")}
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    points = {
        tag: [(p.step, p.value) for p in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if "second" not in tag
    }
    return metrics, weights, figures, points


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_ends_a_run_that_can_go_on(made_up_root, tmp_path, number):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ["train.epochs=8", "data.binarize=dynamic", "data.batch_size=4"]
    with start(command(made_up_root, cut, *more)) as process:
        wait_for(process, "epoch   2/8")
        process.send_signal(number)
        began = time.monotonic()
        out, error = process.communicate()
        assert time.monotonic() - began < 5
    assert process.returncode == 128 + number
    assert error == ""
    assert f"train.resume={cut}" in out
    state = load_checkpoint(cut / "checkpoints" / "last.pt")
    assert 1 < state["epoch"] + state["step"] / 150 < 8

    settings = (cut / ".hydra" / "config.yaml").read_text()
    for mistake, part in (
        (command(made_up_root, cut, *more), "add train.resume=auto"),
        (
            command(made_up_root, cut, *more, "train.resume=auto", "seed=3"),
            "seed=0, this one has 3",
        ),
    ):
        refused = subprocess.run(mistake, cwd=REPOSITORY, capture_output=True, text=True)
        assert refused.returncode == 2
        assert part in refused.stderr
    assert (cut / ".hydra" / "config.yaml").read_text() == settings

    resume = [sys.executable, "scripts/train.py", f"train.resume={cut}"]  # knows the overrides
    assert subprocess.run(resume, cwd=REPOSITORY, capture_output=True).returncode == 0
    with start(command(made_up_root, whole, *more)) as process:
        process.communicate()
    assert what_stays(cut) == what_stays(whole)


def test_resume_auto_finds_the_newest_interrupted_run_of_these_settings(
    config, composed, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    import train as script

    def interrupted(name, settings, age):
        run_dir = tmp_path / "2026-01-01" / name
        state = {"epoch": 1, "model": {}}
        Checkpoints(run_dir / "checkpoints", settings).save(state)
        when = time.time() - age
        os.utime(run_dir / "checkpoints" / "last.pt", (when, when))
        return run_dir

    interrupted("oldest", config, 400)
    wanted = interrupted("wanted", config, 300)
    running = interrupted("running", config, 250)
    (interrupted("finished", config, 200) / "summary.json").write_text("{}")
    interrupted("other seed", composed("seed=1"), 100)
    with FileLock(running / script.LOCK):
        assert script.newest_interrupted(tmp_path, config) == wanted
    assert script.newest_interrupted(tmp_path, composed("seed=2")) is None


def test_two_processes_cannot_write_one_run(made_up_root, tmp_path):
    arguments = command(made_up_root, tmp_path / "run", "train.epochs=2000")
    with start(arguments) as process:
        wait_for(process, "epoch   2/2000")
        with start([*arguments, "train.resume=auto"]) as second:
            _, error = second.communicate()
        assert second.returncode == 2
        assert "another process is writing this run" in error
        assert process.poll() is None
        process.kill()


def test_a_full_disk_is_told_in_one_line(made_up_root, tmp_path):
    """A limit on file sizes fails the same calls as a full disk, and needs no mount."""
    run_dir = tmp_path / "run"
    arguments = command(made_up_root, run_dir, "train.epochs=400", "train.checkpoint_every=100")
    with start(
        arguments,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    ) as process:
        _, error = process.communicate()
    assert process.returncode == 1
    assert len(error.strip().splitlines()) == 1, error
    assert "File too large" in error
    assert not list(run_dir.glob("checkpoints/.*.part"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["data.binarize=dynamic", "train.ema=0.9", "optimizer=adamw"],
        ["objective=iwae", "objective.num_samples=3", "objective.estimator=dreg"],
        ["objective.beta_warmup_epochs=6", "prior=vamp", "prior_components=20", "precision=bf16"],
    ],
)
def test_killed_at_random_moments_a_run_ends_as_if_it_was_left_alone(made_up_root, tmp_path, more):
    more = [*more, "train.epochs=12", "data.batch_size=10", "train.figure_every=3"]
    with start(command(made_up_root, tmp_path / "whole", *more)) as process:
        process.communicate()
    assert process.returncode == 0
    expected = what_stays(tmp_path / "whole")
    dice = random.Random(0)
    for trial in range(3):
        run_dir = tmp_path / f"cut{trial}"
        for _ in range(9):
            with start(command(made_up_root, run_dir, *more, "train.resume=auto")) as process:
                for line in process.stdout:
                    if "training and" in line:  # the loop begins
                        time.sleep(4 * dice.random())
                        process.kill()
                        break
            if (run_dir / "summary.json").exists():
                break
        with start(command(made_up_root, run_dir, *more, "train.resume=auto")) as process:
            process.communicate()
        assert (run_dir / "summary.json").exists()
        assert what_stays(run_dir) == expected
