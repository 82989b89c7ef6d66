"""The command lines, each in a process of its own."""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from scripts import reproduce
from tests.command_lines import run_script, start_script
from tests.conftest import REPOSITORY
from tests.rough import ROUGH, UNDRAWN
from vae_torch import load_run
from vae_torch.runs.records import trial_name


@pytest.fixture(scope="module")
def small(made_up_root):
    return [
        *("data=fashion_mnist", f"data.root={made_up_root}", "model.intermediate_dim=16"),
        *("train.epochs=2", "train.figure_every=1", "data.limit_train=100", "data.limit_test=50"),
    ]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A run's folder, and how its command line ended."""
    run_dir = tmp_path_factory.mktemp("runs") / "a run"
    return run_dir, run_script("train.py", *small, f"hydra.run.dir={run_dir}")


def test_a_run_leaves_everything_that_is_promised(small, finished):
    run_dir, done = finished
    assert done.returncode == 0, done.stderr
    assert str(run_dir) in done.stdout
    assert "tensorboard" in done.stdout
    assert "\r" not in done.stderr  # no progress bar outside a terminal

    epochs = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [m["epoch"] for m in epochs] == [1, 2]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["final"]["test/elbo"] == epochs[-1]["test/elbo"]
    assert summary["config"]["model"]["intermediate_dim"] == 16
    assert {"versions", "git_commit", "device", "data_sha256", "seconds"} <= summary.keys()
    pictures = {"reconstructions", "samples", "manifold", "latent", "traversal", "interpolation"}
    for name in pictures | {"kl"}:
        with Image.open(run_dir / "figures" / f"{name}.png") as image:
            assert min(image.size) > 100
    with Image.open(run_dir / "figures" / "growth.gif") as image:
        assert image.n_frames == 2
    assert "metadata.tsv" in (run_dir / "tensorboard" / "projector_config.pbtxt").read_text()
    for name in ("run.log", ".hydra/config.yaml", "checkpoints/last.pt", "checkpoints/best.pt"):
        assert (run_dir / name).stat().st_size > 0, name

    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    for split in ("train", "test"):
        for name in ("loss", "elbo", "reconstruction", "kl"):
            points = events.Scalars(f"{split}/{name}")
            assert [p.step for p in points] == [1, 2]
            assert points[-1].value == pytest.approx(epochs[-1][f"{split}/{name}"])
    others = events.Tags()["tensors"]
    shown = {tag.split("_")[1] for tag in others if tag.startswith("visuals/")}
    assert shown == pictures | {"kl"}
    png = events.Tensors("visuals/2_samples")[-1].tensor_proto.string_val[2]
    assert png == (run_dir / "figures" / "samples.png").read_bytes()
    assert {"config", "command"} <= set(others)
    hparams = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = HParamsPluginData.FromString(hparams).session_start_info
    assert started.hparams["model.intermediate_dim"].number_value == 16
    assert started.hparams["compile"].HasField("bool_value")
    assert started.group_name.startswith("a run (")

    vae, config = load_run(run_dir)
    assert (vae.intermediate_dim, config.data.name) == (16, "fashion_mnist")

    again = run_script("train.py", *small, f"hydra.run.dir={run_dir}")
    assert again.returncode == 2
    assert "holds a finished run" in again.stderr


def test_a_trial_is_named_by_its_overrides_first(tmp_path):
    day = tmp_path / "2026-11-24"
    assert trial_name(day / "13-29-11_seed=1") == f"seed=1 ({day}/13-29-11)"
    assert trial_name(day / "13-29-11") == f"defaults ({day}/13-29-11)"
    assert trial_name(tmp_path / "a_run") == f"a_run ({tmp_path})"


def test_multirun_names_its_runs_by_their_overrides(small, tmp_path):
    done = run_script(
        "train.py", "-m", *small[:3], "train.epochs=1", "model.latent_dim=2,3", "seed=7",
        f"hydra.sweep.dir={tmp_path}", before=UNDRAWN,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = sorted(p.parent for p in tmp_path.glob("*/summary.json"))
    names = [run.name for run in runs]
    assert len(names) == 2
    assert names[0].startswith("model.latent_dim-2_")  # what is swept comes first
    assert "seed-7" in names[0]


def test_help_shows_keys_and_groups():
    shown = run_script("train.py", "--help")
    assert shown.returncode == 0
    for word in ("latent_dim", "intermediate_dim", "keras_notebook", "binarize", "schedule"):
        assert word in shown.stdout


def test_evaluation_card_of_a_run(finished, tmp_path):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    before = set(REPOSITORY.iterdir())
    few = ("eval.num_samples=20", "eval.fit_samples=20", "eval.limit=10", "eval.fit_images=2")
    card = run_script("evaluate.py", f"run={run_dir}", *few, before=ROUGH)
    assert card.returncode == 0, card.stderr
    assert set(REPOSITORY.iterdir()) == before
    stored = json.loads((run_dir / "evaluation.json").read_text())
    for name in ("elbo", "log_px", "log_px_exact", "mutual_information", "linear_probe_accuracy"):
        assert f"{stored[name]['value']:.3f}" in card.stdout
    assert stored["log_px_encoder"]["num_samples"] == 20
    assert stored["log_px"]["num_images"] == 10
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    points = events.Scalars("trained/log_px")
    assert points[-1].value == pytest.approx(stored["log_px"]["value"])
    assert (run_dir / "figures" / "log_px.png").stat().st_size > 0
    assert {"evaluation", "visuals/8_log_px"} <= set(events.Tags()["tensors"])


@pytest.mark.slow
def test_a_trial_leaves_the_results_table_alone(made_up_root, tmp_path):
    table = (REPOSITORY / "docs" / "results" / "index.md").read_text("utf-8")
    trial = [
        "only=[keras_notebook]",
        "seeds=[0,1]",
        f"out={tmp_path / 'results'}",
        f"data_root={made_up_root}",
        "num_samples=5",
        "limit_test=20",
        'overrides=["data=fashion_mnist","train.epochs=1","model.intermediate_dim=8"]',
    ]
    done = run_script("reproduce.py", *trial)
    assert done.returncode == 0, done.stderr
    losses = [
        json.loads(path.read_text())["final"]["test/loss"]
        for path in (tmp_path / "results-trial").glob("*/*/summary.json")
    ]
    assert len(losses) == 2
    row = next(line for line in done.stdout.splitlines() if line.startswith("| `keras_notebook`"))
    assert f"**{sum(losses) / 2:.4f}**" in row
    assert (REPOSITORY / "docs" / "results" / "index.md").read_text("utf-8") == table
    others = run_script("reproduce.py", *trial[:-1], trial[-1].replace("dim=8", "dim=9"))
    assert others.returncode == 2
    assert "model.intermediate_dim=8, this one has 9" in others.stderr
    assert others.stderr.count("\n") == 1
    again = run_script("reproduce.py", *trial)  # finished runs are not repeated
    assert row in again.stdout
    assert "Done:" not in again.stdout
    card_file = tmp_path / "results-trial" / "keras_notebook" / "seed=0" / "evaluation.json"
    card = json.loads(card_file.read_text())
    card_file.write_text(json.dumps({**card, "checkpoint": {"sha256": "of another"}}))
    assert "elbo" in run_script("reproduce.py", *trial).stdout  # is evaluated again
    assert json.loads(card_file.read_text()) == card
    refused = run_script("reproduce.py", "only=[nothing]")
    assert refused.returncode == 2
    assert "only=nothing" in refused.stderr


@pytest.mark.parametrize(
    ("ours", "error", "word"),
    [([86.0, 86.2], 0.18, "beats"), ([86.5], 0.18, "reaches"), ([87.2], 0.18, "misses"),
     ([80.0], None, "")],
)  # fmt: skip
def test_a_row_is_compared_by_twice_the_error_of_the_comparison(ours, error, word):
    row = reproduce.Row("burda_vae", "log_px_encoder", "86.76", "a paper", error=error)
    assert reproduce.compared(ours, row) == word


def reproduce_config(out, rows, **settings):
    numbers = {"num_samples": 1, "log_px_images": None, "threads": None, "limit_test": None}
    places = {"out": str(out), "readme": "", "data_root": "", "overrides": []}
    others = {"seeds": [0], "only": None, **numbers, **settings}
    return reproduce.ReproduceConfig(**others, **places, rows=rows)


def test_a_row_of_some_images_says_so_and_is_coarser_than_one_of_more(tmp_path):
    run = tmp_path / "strong" / "seed=0"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.pt").write_bytes(b"weights")
    (run / "summary.json").write_text('{"seconds": 120, "device": "cpu (1 thread)"}')
    estimate = {"value": -81.0, "num_samples": 5000, "estimated_images": 300}
    sha = hashlib.sha256(b"weights").hexdigest()
    card = {"log_px_encoder": estimate, "log_px": {"value": -80.5}, "data": {"limit": None}}
    (run / "evaluation.json").write_text(json.dumps({**card, "checkpoint": {"sha256": sha}}))
    row = reproduce.Row("strong", "log_px_encoder", "", "")
    config = reproduce_config(tmp_path, {"strong": row})
    (line,) = reproduce.table_of(config).splitlines()[2:]
    assert "| -log p(x), 5,000 samples from the encoder, on 300 images | **81.00** | 1 |" in line
    assert line.endswith("| 2, cpu (1 thread) |")
    assert reproduce.is_coarser(config, run)  # than one of all images
    for images, coarser in ((300, False), (301, True)):
        config.log_px_images = images
        assert reproduce.is_coarser(config, run) == coarser


def test_minutes_are_those_of_each_device(tmp_path):
    ran = (
        ("a", 2820, "cpu (1 thread)"),
        ("b", 1860, "cpu (2 threads)"),
        ("c", 2940, "cpu (1 thread)"),
    )
    for name, seconds, device in ran:
        (tmp_path / name).mkdir()
        summary = json.dumps({"seconds": seconds, "device": device})
        (tmp_path / name / "summary.json").write_text(summary)
    minutes = reproduce.minutes_of([tmp_path / name for name, *_ in ran])
    assert minutes == "48, cpu (1 thread); 31, cpu (2 threads)"


def test_rows_share_runs_if_their_commands_are_the_same(tmp_path):
    fashion = ["data=fashion_mnist"]
    rows = {
        "digits": reproduce.Row("best60", "elbo", "", ""),
        "digits_exact": reproduce.Row("best60", "log_px_exact", "", ""),
        "clothes": reproduce.Row("best60", "elbo", "", "", overrides=fashion),
    }
    config = reproduce_config(tmp_path, rows)
    folders = [reproduce.folder_of(config, row, 3) for row in rows.values()]
    assert folders == [tmp_path / name / "seed=3" for name in ("digits", "digits", "clothes")]


def test_a_row_without_runs_stays_as_it_is_in_the_table(tmp_path):
    rows = {name: reproduce.Row(None, "elbo", "1", "a paper") for name in ("a", "b")}
    config = reproduce_config(tmp_path, rows)
    old = "| row |\n|---|\n| `a` | -ELBO | **1.0** |\n| `c` | not a row any more |\n"
    assert reproduce.table_of(config, old).splitlines()[2:] == ["| `a` | -ELBO | **1.0** |"]


def test_the_picture_of_nats_against_minutes_needs_evaluated_runs(tmp_path):
    run, picture = tmp_path / "results" / "strong" / "seed=0", tmp_path / "nats.svg"
    run.mkdir(parents=True)
    asked = ("picture", f"out={tmp_path / 'results'}", f"picture={picture}", "pictured=[strong]")
    for words, line in (
        (asked, "holds no evaluated run of row strong"),
        ((*asked[:-1], "pictured=[nothing]"), "pictured=nothing: must be some of keras_notebook"),
        (("drawing",), "drawing: must be verify or picture"),
    ):
        refused = run_script("reproduce.py", *words)
        assert refused.returncode == 2
        assert line in refused.stderr
        assert refused.stderr.count("\n") == 1
    epochs = [{"epoch": n, "seconds": 60.0, "test/elbo": n - 90.0} for n in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
    (run / "summary.json").write_text(json.dumps({"device": "cuda (A Card)"}))
    (run / "evaluation.json").write_text(json.dumps({"log_px": {"value": -85.0}}))
    drawn = run_script("reproduce.py", *asked)
    assert drawn.returncode == 0, drawn.stderr
    words = picture.read_text("utf-8")
    assert "strong, 1 seed: bound" in words
    assert "minutes of training: A Card" in words
    nowhere = run_script("reproduce.py", *asked[:2], "picture=no/such.svg", asked[3])
    assert nowhere.returncode == 2
    assert "picture=no/such.svg: " in nowhere.stderr


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_without_the_environment_a_script_says_how_to_enter_it(name):
    bare = [sys.executable, "-S", f"scripts/{name}.py"]  # Python without site packages
    done = subprocess.run(bare, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()
    assert said.startswith(f"{name}.py: No module named ")
    assert "source .venv/bin/activate, or make install" in said


def test_make_hands_settings_over():
    # so that the tested make does not inherit the settings of `make test`
    environment = {key: value for key, value in os.environ.items() if "MAKE" not in key}
    for key in ("MFLAGS", "ARGS", "RUN"):
        environment.pop(key, None)

    def would_run(*order):
        done = subprocess.run(
            ["make", "-n", *order], cwd=REPOSITORY, capture_output=True, text=True, env=environment
        )
        return done.stdout.splitlines()[-1].split()[1:]

    assert set(would_run("train", "train.epochs=2", "experiment=latent2")) == {
        "scripts/train.py", "train.epochs=2", "experiment=latent2",
    }  # fmt: skip
    assert would_run("train", "ARGS=seed=1", "PYTHON=python3") == ["scripts/train.py", "seed=1"]
    assert would_run("evaluate", "RUN=some/run", "eval.limit=9") == [
        "scripts/evaluate.py", "some/run", "eval.limit=9",
    ]  # fmt: skip


def test_an_experiment_of_ones_own_chooses_where_and_can_be_resumed(made_up_root, tmp_path):
    experiments = tmp_path / "mine" / "experiment"
    experiments.mkdir(parents=True)
    (experiments / "tiny.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /data: fashion_mnist\n  - _self_\n"
        f"data: {{root: {made_up_root}}}\nmodel: {{intermediate_dim: 16}}\n"
        "train: {epochs: 100000, figure_every: 0}\n"
    )
    (experiments / "grid.yaml").write_text(
        "# @package _global_\ndefaults: [tiny, override /where: cores, _self_]\n"
        "train: {epochs: 1}\n"
    )
    done = run_script(
        "train.py", "--config-dir", "mine", "experiment=grid", "model.latent_dim=-1,2",
        "sweep.dir=s", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "1 of 2 runs finished, 1 failed in s" in done.stdout
    assert "failed, model.latent_dim=-1: must be a whole number" in done.stdout
    assert "is launching 2 jobs" in done.stdout + done.stderr  # joblib's
    summary = json.loads(
        (tmp_path / "s" / "model.latent_dim-2_grid" / "summary.json").read_text("utf-8")
    )
    assert summary["config"]["threads"] == 1

    tiny = ("--config-dir", "mine", "experiment=tiny", "hydra.run.dir=r")
    with start_script("train.py", *tiny, cwd=tmp_path) as process:
        process.wait_for("epoch   2/")
        process.send_signal(signal.SIGINT)
        said = process.end().out
    (command,) = re.findall(r"resume with +(.*)", said)
    python, script, *arguments = shlex.split(command)
    assert (python, script) == (sys.executable, str(REPOSITORY / "scripts" / "train.py"))
    with start_script(script, *arguments, cwd=tmp_path) as process:
        began = [next(process.stdout) for _ in range(3)]
    assert began[1].startswith("resuming after epoch ")
    # an epoch that was interrupted while it was logged is logged again
    assert int(re.match(r"epoch +(\d+)/100000", began[2])[1]) >= 2
