"""Runs that are really killed, stopped, without disk space, or started twice."""

import html
import itertools
import json
import os
import random
import re
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.data import DataLoader

from tests.command_lines import command_lines, run_script, start_script
from tests.test_untrusted_files import damaged
from vae_torch import mnist_loaders
from vae_torch.checkpoint import Checkpoints, load_checkpoint
from vae_torch.data import image_dataset
from vae_torch.files import write_atomically
from vae_torch.runs.folders import LOCK, RecordError, read_metrics
from vae_torch.runs.records import Records
from vae_torch.stored import load_run


def settings_of(made_up_root, run_dir, *more):
    return [
        *("data=fashion_mnist", f"data.root={made_up_root}", "model.intermediate_dim=16"),
        *(f"hydra.run.dir={run_dir}", *more),
    ]


def what_stays(run_dir):
    """The contents of a run that must not depend on interruptions."""
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
        stays[name]["optimizer"] = (
            repr(state["optimizer"]["param_groups"]),
            {
                (parameter, key): value.numpy().tobytes()
                for parameter, values in state["optimizer"]["state"].items()
                for key, value in values.items()
            },
        )
    folder = run_dir / "figures"
    stays["figures"] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    # TensorBoard's server reads scalars and pictures as tensors. What has no
    # step, such as the command, is written again by a resumed run
    events = plugin_event_accumulator.EventAccumulator(str(run_dir / "tensorboard"), {"tensors": 0})
    events.Reload()
    stays["tensorboard"] = {
        tag: [(p.step, p.tensor_proto.SerializeToString()) for p in events.Tensors(tag) if p.step]
        for tag in events.Tags()["tensors"]
        if "second" not in tag
    }
    assert {"test/elbo", "visuals/1_reconstructions"} < stays["tensorboard"].keys()
    return stays


def without_times(metrics):
    return {name: value for name, value in metrics.items() if "second" not in name}


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_ends_a_run_that_can_be_resumed(made_up_root, tmp_path, number):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ["train.epochs=4", "data.binarize=dynamic", "data.batch_size=10"]
    more += ["data.limit_train=100", "data.limit_test=50"]
    order = settings_of(made_up_root, cut, *more)
    ended = run_script("train.py", *order, killed=("step", 2 * 10 + 5, "", number))
    assert (ended.returncode, ended.stderr) == (128 + number, "")
    assert f"train.resume={cut}" in ended.stdout
    state = load_checkpoint(cut / "checkpoints" / "last.pt")
    assert (state["epoch"], state["step"]) == (2, 5)  # right after the step

    settings = (cut / ".hydra" / "config.yaml").read_text()
    for mistake, part in (
        (order, "add train.resume=auto"),
        ([*order, "train.resume=auto", "seed=3"], "seed=0, this one has 3"),
    ):
        refused = run_script("train.py", *mistake)
        assert refused.returncode == 2
        assert part in refused.stderr
    assert (cut / ".hydra" / "config.yaml").read_text() == settings

    (cut / "metrics.jsonl").write_bytes(b"{}\xff")  # its checkpoint has the truth
    later = ("tests.moments:tensorboard_begins", 1)
    resume = run_script("train.py", f"train.resume={cut}", before=later)  # finds the overrides
    assert resume.returncode == 0, resume.stderr
    assert run_script("train.py", *settings_of(made_up_root, whole, *more)).returncode == 0
    assert what_stays(cut) == what_stays(whole)


def test_a_signal_from_outside_ends_a_run(made_up_root, tmp_path):
    order = settings_of(made_up_root, tmp_path, "train.epochs=100000", "data.limit_train=100")
    with start_script("train.py", *order) as process:
        process.wait_for("epoch   2/")
        process.send_signal(signal.SIGTERM)
        ended = process.end()
    assert (ended.status, ended.error) == (128 + signal.SIGTERM, "")
    assert f"train.resume={tmp_path}" in ended.out


# While the data is read, after a step, in an evaluation, in a figure, and after the last epoch.
SIGNALS = [
    (("read", 1), signal.SIGINT),
    (("step", 12), signal.SIGTERM),
    (("evaluation", 1), signal.SIGINT),
    (("half", 1, "latent.png"), signal.SIGTERM),
    (("before", 1, "kl.png"), signal.SIGINT),
    (("half", 1, "growth.gif"), signal.SIGTERM),
]


@pytest.mark.parametrize(
    "signals", [SIGNALS[::3], pytest.param(SIGNALS, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_a_signal_ends_a_run_wherever_it_is(made_up_root, tmp_path, signals):
    more = [
        *("train.epochs=3", "train.figure_every=2", "data.binarize=dynamic", "train.ema=0.9"),
        *("data.limit_train=100", "data.limit_test=50", "data.batch_size=10"),
    ]

    second = itertools.count()

    def run(run_dir, killed=None):
        order = settings_of(made_up_root, run_dir, *more, "train.resume=auto")
        before = ("tests.moments:tensorboard_begins", next(second))
        return command_lines().run("train.py", *order, killed=killed, before=before)

    for moment, number in signals:
        moment = [*moment, *[""] * (3 - len(moment)), number]
        ended = run(tmp_path / "cut", moment)
        assert ended.status == 128 + number, (moment, ended)
        assert ended.error == ""
        if moment[0] == "read":
            assert "stopped: before the first step; nothing is lost" in ended.out
            assert not (tmp_path / "cut").exists()
        else:
            assert f"train.resume={tmp_path / 'cut'}" in ended.out
    for name in ("cut", "whole"):
        ended = run(tmp_path / name)
        assert ended.status == 0, ended.error
    expected = what_stays(tmp_path / "whole")
    for part, got in what_stays(tmp_path / "cut").items():
        assert got == expected[part], part
    assert not list((tmp_path / "cut").rglob(".*.part"))


def test_a_second_ctrl_c_ends_at_once(made_up_root, tmp_path):
    order = settings_of(made_up_root, tmp_path / "run", "train.epochs=1", "data.limit_train=100")
    twice = ("step", 1, "", signal.SIGINT, signal.SIGINT)
    ended = command_lines().run("train.py", *order, killed=twice)
    assert (ended.status, ended.error) == (130, "")
    assert "stopped" not in ended.out
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_resume_auto_finds_the_newest_interrupted_run_of_these_settings(config, composed, tmp_path):
    from vae_torch.cli.hooks import interrupted_runs

    def interrupted(name, settings, age):
        run_dir = tmp_path / name
        state = {"epoch": 1, "model": {}}
        Checkpoints(run_dir / "checkpoints", settings).save(state)
        when = time.time() - age
        os.utime(run_dir / "checkpoints" / "last.pt", (when, when))
        return run_dir

    interrupted("2026-01-01/oldest", config, 400)
    wanted = interrupted("wanted", config, 300)
    running = interrupted("2026-01-01/running", config, 250)
    (interrupted("2026-01-01/finished", config, 200) / "summary.json").write_text("{}")
    other = interrupted("2026-01-01/other seed", composed("seed=1"), 100)
    with FileLock(running / LOCK):
        found, others = interrupted_runs(tmp_path, config)
    assert (found, others) == (wanted, [(other, "had seed=1, not 0")])
    assert interrupted_runs(tmp_path, composed("seed=2"))[0] is None


def test_two_processes_cannot_write_one_run(made_up_root, tmp_path):
    order = settings_of(made_up_root, tmp_path / "run", "train.epochs=100000")
    with start_script("train.py", *order) as process:
        process.wait_for("epoch   2/")
        second = run_script("train.py", *order, "train.resume=auto")
        assert second.returncode == 2
        assert "another process is writing this run" in second.stderr
        assert not process.has_ended()


def test_a_refused_run_does_not_change_the_files_of_the_active_one(made_up_root, tmp_path):
    notes = tmp_path / "run" / ".hydra" / "config.yaml"
    notes.parent.mkdir(parents=True)
    notes.write_text("the other's")
    with FileLock(tmp_path / "run" / LOCK):
        order = settings_of(made_up_root, tmp_path / "run", "train.resume=auto")
        ended = run_script("train.py", *order)
    assert ended.returncode == 2
    assert "another process is writing this run" in ended.stderr
    assert notes.read_text() == "the other's"


def test_points_are_on_disk_before_the_checkpoint_that_relies_on_them(
    config, tmp_path, monkeypatch
):
    """Even if the thread that writes them is slow: a run may be killed right after."""
    write = RecordWriter.write
    monkeypatch.setattr(RecordWriter, "write", lambda *a: (time.sleep(0.05), write(*a)))
    records = Records(tmp_path, config, config_text="")
    records.log({"epoch": 1, "test/loss": 3.5, "test/kl_per_dim": [0.5] * 9})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len(events.Tags()["scalars"]) == 10
    records.close()


def test_a_continued_runs_metrics_are_those_of_its_checkpoint(config, tmp_path):
    rows = [{"epoch": n, "test/elbo": n / 3, "kl": [n / 7, -n]} for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "test/elbo": 7}\n{"epo')
    history = {name: [row[name] for row in rows] for name in rows[0]}
    Records(tmp_path, config, config_text="", history=history).close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer:DeprecationWarning")
def test_texts_in_tensorboard_show_what_they_are(config, tmp_path, monkeypatch):
    from tensorboard.plugin_util import markdown_to_safe_html  # the plugin that shows texts

    evil = "a: '```'\n\nb: <script>alert(1)</script>\n\n# c\n- '[x](javascript:alert(1)) `'"
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "a=`<b>x</b>`\n\n*y*"])
    Records(tmp_path, config, config_text=evil).close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name, expected in (
        ("config", evil),
        ("command", "python train.py 'a=`<b>x</b>`\n\n*y*'"),
    ):
        (text,) = events.Tensors(name)[0].tensor_proto.string_val
        shown = re.fullmatch(
            r"<pre><code>(.*)</code></pre>", markdown_to_safe_html(text).strip(), re.DOTALL
        )
        assert html.unescape(shown[1]).strip() == expected


def test_damaged_metrics_are_whole_epochs_or_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = "".join(json.dumps({"epoch": n, "loss": n / 3}) + "\n" for n in range(1, 9)).encode()
    dice = random.Random(0)
    refused = []
    for _ in range(200):
        path.write_bytes(damaged(good, dice))
        try:
            assert all(isinstance(metrics["epoch"], int) for metrics in read_metrics(tmp_path))
        except RecordError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert all(str(path) in said for said in refused)
    for end in range(len(good)):  # a torn last line
        path.write_bytes(good[:end])
        assert [m["epoch"] for m in read_metrics(tmp_path)][: good[:end].count(b"\n")] == [
            *range(1, good[:end].count(b"\n") + 1)
        ]


def test_writers_of_one_file_at_the_same_time_leave_it_whole(tmp_path):
    path = tmp_path / "evaluation.json"
    contents = [bytes([65 + n]) * 200_000 for n in range(4)]
    path.write_bytes(contents[0])

    def write(content):
        for _ in range(15):
            write_atomically(path, content)
            assert path.read_bytes() in contents

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, contents))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_data_order_does_not_depend_on_workers_or_threads(made_up_root):
    loader, _ = mnist_loaders(made_up_root, name="fashion_mnist", batch_size=70, seed=3)
    loader.batch_sampler.set_epoch(5)
    expected = [labels.tolist() for _, labels in loader]
    shuffled = [label for batch in expected for label in batch]
    assert shuffled != image_dataset(loader).labels.tolist()
    assert sorted(shuffled) == sorted(image_dataset(loader).labels.tolist())
    for workers, threads in ((0, 2), (1, 1), (2, 1)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        loader.batch_sampler.set_epoch(5)
        again = DataLoader(
            loader.dataset, batch_sampler=loader.batch_sampler, num_workers=workers,
            collate_fn=loader.collate_fn,
        )  # fmt: skip
        assert [labels.tolist() for _, labels in again] == expected
        torch.set_num_threads(before)


def test_a_full_disk_is_reported_in_one_line(made_up_root, tmp_path):
    """A limit on file sizes fails the same calls as a full disk, and needs no mount."""
    run_dir = tmp_path / "run"
    order = settings_of(made_up_root, run_dir, "train.epochs=400", "train.checkpoint_every=100")
    ended = run_script("train.py", *order, largest_file=100_000)
    assert ended.returncode == 1
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    assert "File too large" in ended.stderr
    assert not list(run_dir.glob("checkpoints/.*.part"))


# Settings, and the moments at which their run is killed. Each process resumes where the one
# before it was killed. The first leaves no checkpoint, the last are after the last epoch.
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
            ("half", 3, "metrics.jsonl"),  # its first write removes surplus lines
            ("half", 1, "growth.gif"),
            ("before", 1, "growth.gif"),
        ],
    ),
    "iwae, dreg, one draw chosen, averaged weights, grey": (
        [
            *("objective=iwae", "objective.num_samples=3", "objective.estimator=dreg"),
            *("objective.early_samples=2", "objective.early_epochs=1"),
            *("objective.resample=true", "train.ema=0.9", "optimizer=adamw"),
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
            # few writes: a quick machine takes many steps between two of them
            ("half", 2, "last.pt"),
            ("step", 75),
            ("before", 3, "last.pt"),
            ("step", 20),
            ("evaluation", 1),
            ("after", 3, "last.pt"),
            ("evaluation", 2),
            ("record", 60),
            ("half", 1, "latent.png"),
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
    "conditional, dynamic, averaged weights": (
        ["model.conditional=true", "data.binarize=dynamic", "train.ema=0.9"],
        [
            ("half", 1, "last.pt"),
            ("step", 130),
            ("evaluation", 2),
            ("after", 1, "metrics.jsonl"),
            ("half", 1, "samples.png"),
            ("after", 1, "reconstructions.png"),
            ("before", 1, "summary.json"),
        ],
    ),
    "flow posterior and prior, grey": (
        [
            *("posterior=flow", "posterior_options.transforms=1", "posterior_options.width=8"),
            *("prior=flow", "prior_options.transforms=1", "prior_options.width=8"),
        ],
        [
            ("step", 70),
            ("half", 1, "best.pt"),
            ("evaluation", 3),
            ("before", 2, "last.pt"),
            ("after", 1, "latent.png"),
            ("before", 1, "summary.json"),
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


def test_a_resumed_run_removes_what_a_killed_one_left(made_up_root, tmp_path):
    order = settings_of(made_up_root, tmp_path / "run", "train.epochs=2", "data.limit_train=100")
    order += ["train.figure_every=0", "train.resume=auto"]
    for moment in (("half", 1, "last.pt"), ("before", 1, "last.pt")):
        ended = command_lines().run("train.py", *order, killed=moment)
        assert ended.status == -signal.SIGKILL, (moment, ended)
        assert len(list((tmp_path / "run").rglob(".*.part"))) == 1  # of this process alone
    ended = command_lines().run("train.py", *order)
    assert ended.status == 0, ended.error
    assert not list((tmp_path / "run").rglob(".*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CAMPAIGN)
def test_a_run_that_is_killed_repeatedly_equals_one_that_was_not(made_up_root, tmp_path, name):
    settings, moments = CAMPAIGN[name]
    second = itertools.count()

    def start(run_dir, killed=None):
        order = settings_of(made_up_root, run_dir, *settings, "train.epochs=12")
        more = ("data.batch_size=10", "train.figure_every=3", "train.resume=auto")
        before = ("tests.moments:tensorboard_begins", next(second))
        return start_script("train.py", *order, *more, killed=killed, before=before)

    def run(run_dir, killed=None):
        with start(run_dir, killed) as process:
            return process.end()

    with start(tmp_path / "whole") as process:
        ended = process.end()
    assert ended.status == 0, ended.error
    seconds = process.seconds
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
        *("train.epochs=10000", "train.figure_every=20", "model.latent_dim=100", "threads=1"),
        *("data.limit_train=100", "data.limit_test=50"),
    ]
    run_dir = tmp_path / "run"
    looks = []

    def mebibytes(process, what):
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
        found = re.search(rf"{what}:\s+(\d+)", status)  # not there once it has ended
        return int(found[1]) / 1024 if found else 0

    def look(epoch, process):
        here = Path(f"/proc/{process}")
        resident = mebibytes(process, "VmRSS")
        # a file that is being written is open for a moment
        files = []
        for _ in range(20):
            files.append(len(list((here / "fd").iterdir())))
            time.sleep(0.01)
        checkpoint = (run_dir / "checkpoints" / "last.pt").stat().st_size
        looks.append((resident, min(files), checkpoint))
        print(epoch, *looks[-1], flush=True)

    began, peak = time.monotonic(), 0.0
    with start_script("train.py", *settings_of(made_up_root, run_dir, *more)) as process:
        for line in process.stdout:  # until the last epoch, whose line comes after all of the work
            # not `wait4`: that counts the peak of this process too, from which it was forked
            peak = max(peak, mebibytes(process.pid, "VmHWM"))
            epoch = re.match(r"epoch +(\d+)/", line)
            if epoch and int(epoch[1]) % 500 == 0 and int(epoch[1]) < 10000:
                look(epoch[1], process.pid)
        ended = process.end()
    assert ended.status == 0, ended.error
    print(f"{time.monotonic() - began:.0f} s, peak {peak:.0f} MiB")
    memory, files, checkpoints = zip(*looks, strict=True)
    half = len(memory) // 2  # a sample may be taken while a figure is drawn
    growth = statistics.median(memory[half:]) - statistics.median(memory[:half])
    print(f"{statistics.median(memory):.0f} MiB, {growth:+.0f} from the first half to the second")
    assert growth < 25  # MiB; the history's own share is 7
    # at the end the history is held as lists
    assert 0 < peak - statistics.median(memory) < 250
    assert len(set(files[half:])) == 1  # matplotlib keeps a font open, once one is met
    assert len(set(checkpoints)) == 1

    state = Checkpoints(run_dir / "checkpoints", load_run(run_dir)[1]).load("cpu")
    assert len(state["history"]["test/kl_per_dim"]) == 10000
    began = time.monotonic()
    events = EventAccumulator(str(run_dir / "tensorboard"), {"tensors": 0, "scalars": 0}).Reload()
    print(f"TensorBoard loads in {time.monotonic() - began:.0f} s")
    points = events.Scalars("z_test_kl/z100")
    assert [p.step for p in points] == list(range(1, 10001))
    pictures = events.Tensors("visuals/2_samples")
    assert [p.step for p in pictures] == list(range(20, 10001, 20))
    with Image.open(run_dir / "figures" / "growth.gif") as animation:
        assert animation.n_frames <= 100
        assert animation.n_frames > 50
