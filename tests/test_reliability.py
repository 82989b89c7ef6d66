"""Runs that are killed, stopped, starved of disk or started twice: by doing the damage."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.command_lines import CommandLines
from tests.conftest import REPOSITORY
from vae_torch.checkpoint import Checkpoints, load_checkpoint, load_run


@pytest.fixture(scope="module")
def command_lines():
    lines = CommandLines()
    yield lines
    lines.close()


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
    stays = {}
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    stays["metrics"] = [without_times(json.loads(line)) for line in lines]
    config = load_run(run_dir)[1]
    history = Checkpoints(run_dir / "checkpoints", config).load("cpu")["history"]
    stays["history"] = without_times(history)
    for name in ("last.pt", "best.pt"):
        state = load_checkpoint(run_dir / "checkpoints" / name)
        stays[name] = {key: state[key] for key in ("epoch", "step", "best")}
        for part in ("model", "training"):
            weights = state.get(part, {}).items()
            stays[name][part] = {name: tensor.numpy().tobytes() for name, tensor in weights}
    folder = run_dir / "figures"
    stays["figures"] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    stays["points"] = {
        tag: [(point.step, point.value) for point in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if "second" not in tag
    }
    return stays


def without_times(metrics):
    return {name: value for name, value in metrics.items() if "second" not in name}


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


# Settings, and where a run of them is killed: every moment in a process that goes on where the one
# before was killed. The first of them leaves no checkpoint, the last are after the last epoch.
CAMPAIGN = {
    "elbo, warm-up, averaged weights, dynamic": (
        ["data.binarize=dynamic", "train.ema=0.9", "objective.beta_warmup_epochs=6"],
        [
            ("half", 1, "last.pt"),
            ("step", 130),
            ("evaluation", 2),
            ("half", 2, "last.pt"),
            ("before", 2, "last.pt"),
            ("after", 1, "samples.png"),
            ("half", 3, "metrics.jsonl"),  # its first write puts the old lines in order
            ("half", 1, "growth.gif"),
            ("before", 1, "growth.gif"),
        ],
    ),
    "iwae, dreg, averaged weights, grey": (
        [
            *("objective=iwae", "objective.num_samples=3", "objective.estimator=dreg"),
            *("train.ema=0.9", "optimizer=adamw"),
        ],
        [
            ("after", 2, "metrics.jsonl"),
            ("before", 1, "last.pt"),
            ("half", 2, "best.pt"),
            ("before", 1, "best.pt"),
            ("after", 1, "best.pt"),
            ("half", 2, "history.jsonl"),
            ("after", 2, "history.jsonl"),
            ("half", 1, "kl.png"),
            ("before", 1, "interpolation.png"),
            ("half", 1, "summary.json"),
            ("before", 1, "summary.json"),
        ],
    ),
    "elbo, bf16, static, checkpoints inside the epochs": (
        [
            *("precision=bf16", "data.binarize=static", "train.checkpoint_every=0.001min"),
            *("optimizer=adamw", "train.ema=0.5"),
        ],
        [
            ("half", 4, "last.pt"),
            ("step", 75),
            ("before", 5, "last.pt"),
            ("step", 20),
            ("evaluation", 1),
            ("after", 6, "last.pt"),
            ("half", 1, "latent.png"),
            ("record", 60),
            ("evaluation", 2),
        ],
    ),
    "iwae, vamp, bf16, dynamic, 100 latents, every third epoch": (
        [
            *("objective=iwae", "objective.num_samples=2", "precision=bf16", "prior=vamp"),
            *("prior_components=20", "data.binarize=dynamic", "model.latent_dim=100"),
            "train.checkpoint_every=3",
        ],
        [
            ("half", 1, "last.pt"),
            ("half", 1, "metrics.jsonl"),
            ("before", 1, "metrics.jsonl"),
            ("evaluation", 3),
            ("after", 1, "last.pt"),
            ("half", 2, "best.pt"),
            ("half", 1, "000005.png"),
            ("record", 40),
            ("after", 1, "reconstructions.png"),
        ],
    ),
    "elbo, standard prior, grey, 100 latents": (
        ["model.latent_dim=100", "train.ema=0.9"],
        [
            ("half", 1, "best.pt"),  # TensorBoard has points of the first epoch on disk by now
            ("before", 1, "last.pt"),
            ("record", 150),
            ("half", 1, "000003.png"),
            ("after", 1, "traversal.png"),
            ("step", 90),
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CAMPAIGN)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_was_left_alone(
    command_lines, made_up_root, tmp_path, name
):
    settings, moments = CAMPAIGN[name]

    def run(run_dir, killed=None):
        time.sleep(1)  # TensorBoard takes its files in the order of their seconds
        order = command(made_up_root, run_dir, *settings, "train.epochs=12", "data.batch_size=10")
        more = ("train.figure_every=3", "train.resume=auto")
        return command_lines.run("train.py", *order[2:], *more, killed=killed)

    began = time.monotonic()
    ended = run(tmp_path / "whole")
    assert ended.status == 0, ended.error
    seconds = time.monotonic() - began
    expected = what_stays(tmp_path / "whole")

    for moment in moments:
        ended = run(tmp_path / "aimed", moment)
        assert ended.status == -signal.SIGKILL, (moment, ended)
    dice = random.Random(name)
    hits = 0
    for _ in range(3):
        hits += run(tmp_path / "random", ("seconds", seconds * dice.random() / 3)).status != 0
        if (tmp_path / "random" / "summary.json").exists():
            break
    for way in ("aimed", "random"):
        if not (tmp_path / way / "summary.json").exists():
            ended = run(tmp_path / way)
            assert ended.status == 0, ended.error
        for part, got in what_stays(tmp_path / way).items():
            assert got == expected[part], (way, part)
        assert not list((tmp_path / way).rglob(".*.part"))
    print(f"{name}: {len(moments)} aimed and {hits} random kills")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_ten_thousand_epochs_and_500_figures_stay_flat(made_up_root, tmp_path):
    """Memory, open files and checkpoints of a long run, each 500 epochs; TensorBoard loads it."""
    more = [
        *("train.epochs=10000", "train.figure_every=20", "model.latent_dim=100"),
        *("data.limit_train=100", "data.limit_test=50"),
    ]
    run_dir = tmp_path / "run"
    looks = []
    with start(command(made_up_root, run_dir, *more)) as process:
        here = Path(f"/proc/{process.pid}")
        for line in process.stdout:
            epoch = re.match(r"epoch +(\d+)/", line)
            if epoch and int(epoch[1]) % 500 == 0 and int(epoch[1]) < 10000:
                resident = int(re.search(r"VmRSS:\s+(\d+)", (here / "status").read_text())[1])
                size = (run_dir / "checkpoints" / "last.pt").stat().st_size
                looks.append((int(epoch[1]), resident / 1024, len(list((here / "fd").iterdir()))))
                print(*looks[-1], size, flush=True)
        assert process.wait() == 0, process.stderr.read()
    _, memory, files = zip(*looks, strict=True)
    assert memory[-1] - memory[0] < 25  # MiB; the history's own share is 14
    assert len(set(files)) == 1

    size = (run_dir / "checkpoints" / "last.pt").stat().st_size
    assert size < 1.2e6
    state = Checkpoints(run_dir / "checkpoints", load_run(run_dir)[1]).load("cpu")
    assert len(state["history"]["test/kl_per_dim"]) == 10000
    began = time.monotonic()
    events = EventAccumulator(str(run_dir / "tensorboard"), {"tensors": 0, "scalars": 0}).Reload()
    print(f"TensorBoard loads in {time.monotonic() - began:.0f} s")
    assert len(events.Scalars("z_test_kl/z100")) == 10000
    assert len(events.Tensors("figures/2_samples")) == 500
