"""Concurrency: runs that share an empty data folder, readers of an active run, a full disk."""

import json
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.command_lines import run_script, start_script
from tests.conftest import REPOSITORY
from vae_torch import load_run
from vae_torch.runs.folders import read_metrics

# scripts/train.py, with a folder that counts requests as MNIST's mirror
COLD = """
import runpy, sys, time
from pathlib import Path
root, source = Path(sys.argv[1]), Path(sys.argv[2])
sys.argv = ["scripts/train.py", *sys.argv[3:]]
sys.path.insert(0, "scripts")
from vae_torch.data import sources
def mirror(name, scratch):
    with open(root.parent / "fetches", "a") as log: log.write("x")
    for path in source.iterdir():
        time.sleep(0.2)
        (scratch / path.name).write_bytes(path.read_bytes())
    return scratch
sources._from_torchvision = mirror
runpy.run_path("scripts/train.py", run_name="__main__")
"""


@pytest.mark.parametrize("runs", [pytest.param(16, id="sixteen", marks=pytest.mark.slow)])
def test_runs_started_at_once_fetch_once_and_are_all_right(made_up_root, tmp_path, runs):
    order = [
        *(sys.executable, "-c", COLD, tmp_path / "data", made_up_root / "FashionMNIST" / "raw"),
        *("data=fashion_mnist", f"data.root={tmp_path / 'data'}", "model.intermediate_dim=8"),
        *("train.epochs=1", "data.limit_train=50", "data.limit_test=50", "threads=1"),
    ]
    started = [
        subprocess.Popen(
            [*order, f"seed={n % 4}", f"hydra.run.dir={tmp_path / str(n)}"],
            cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for n in range(runs)
    ]  # fmt: skip
    for process in started:
        _, error = process.communicate()
        assert process.returncode == 0, error
    assert (tmp_path / "fetches").read_text() == "x"
    finals = [
        json.loads((tmp_path / str(n) / "summary.json").read_text())["final"]["test/elbo"]
        for n in range(runs)
    ]
    assert finals == finals[:4] * (runs // 4)  # equal for equal seeds
    assert len(set(finals)) == 4


def test_a_reader_sees_a_consistent_state_of_a_run_that_is_written(made_up_root, tmp_path):
    run_dir = tmp_path / "run"
    with start_script("train.py", *endless(made_up_root, run_dir)) as process:
        process.wait_for("epoch   3/")
        last, reads = 0, 0
        while reads < 15 or last < 10:
            vae, config = load_run(run_dir)
            assert config.model.intermediate_dim == vae.intermediate_dim
            epochs = [m["epoch"] for m in read_metrics(run_dir)]
            assert epochs == list(range(1, len(epochs) + 1))
            assert len(epochs) >= last
            last, reads = len(epochs), reads + 1
            assert not process.has_ended()
        points = EventAccumulator(str(run_dir / "tensorboard")).Reload().Scalars("test/elbo")
        assert [p.step for p in points] == list(range(1, len(points) + 1))


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MB; skipped where mounting is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a file system is not allowed here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def settings_of(made_up_root, run_dir, *more):
    return [
        *("data=fashion_mnist", f"data.root={made_up_root}", "model.intermediate_dim=16"),
        *("data.limit_train=100", "data.limit_test=50"),
        *("train.figure_every=0", f"hydra.run.dir={run_dir}", *more),
    ]


def endless(made_up_root, run_dir):
    return settings_of(made_up_root, run_dir, "train.epochs=100000")


def test_a_disk_that_fills_leaves_the_last_checkpoint(made_up_root, tiny_disk):
    with start_script("train.py", *endless(made_up_root, tiny_disk / "run")) as process:
        process.wait_for("epoch   3/")
        with (tiny_disk / "filler").open("wb", buffering=0) as filler:
            # the rename of a run may free space on the full disk
            while not process.has_ended():
                with suppress(OSError):
                    while filler.write(bytes(4096)):
                        pass
                time.sleep(0.01)
        ended = process.end()
    assert ended.status == 1
    (said,) = ended.error.strip().splitlines()
    assert "No space left on device" in said
    assert "the last checkpoint is" in said
    load_run(tiny_disk / "run")
    (tiny_disk / "filler").unlink()
    epochs = [m["epoch"] for m in read_metrics(tiny_disk / "run")]
    assert epochs == list(range(1, len(epochs) + 1))


def test_a_read_only_folder_is_refused(made_up_root, tiny_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    ended = run_script("train.py", *settings_of(made_up_root, tiny_disk / "run", "train.epochs=1"))
    assert ended.returncode == 2
    (said,) = ended.stderr.splitlines()
    assert "Read-only file system" in said
    assert "choose another folder" in said


def test_a_folder_taken_away_is_reported_in_one_line(made_up_root, tmp_path):
    run_dir = tmp_path / "run"
    with start_script("train.py", *endless(made_up_root, run_dir)) as process:
        process.wait_for("epoch   3/")
        run_dir.rename(tmp_path / "elsewhere")
        ended = process.end()
    assert ended.status == 1
    (said,) = ended.error.strip().splitlines()
    assert f"{run_dir}: No such file or directory" in said
    assert said.endswith("the run's folder was moved or removed while the run wrote into it")
    assert not run_dir.exists()
    load_run(tmp_path / "elsewhere")
