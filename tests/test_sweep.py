"""Reading many runs, against tables worked out by hand; and sweeps in which jobs fail."""

import json
import math
import subprocess
import sys

import pytest
from filelock import FileLock

from tests.conftest import REPOSITORY
from vae_torch.sweep import (
    SweepError,
    higher_is_better,
    plots,
    read_runs,
    summarize,
    to_csv,
    to_markdown,
)


def made_up_run(path, seed, elbo, *, epochs=2, **settings):
    """A finished run's folder, as far as a summary looks at it."""
    path.mkdir(parents=True)
    model = {"latent_dim": settings.pop("latent_dim", 2), "intermediate_dim": 512}
    config = {
        "seed": seed,
        "threads": seed,
        "model": model,
        "train": {"epochs": epochs},
        **settings,
    }
    final = {
        "test/elbo": elbo,
        "test/kl": 5.0,
        "test/reconstruction": elbo + 5,
        "test/kl_per_dim": [],
    }
    summary = {"config": config, "final": final, "seconds": 60.0}
    (path / "summary.json").write_text(json.dumps(summary))
    lines = [json.dumps({"epoch": e + 1, "test/elbo": elbo - 1 + e}) for e in range(epochs)]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


def unfinished_run(path, metrics):
    (path / ".hydra").mkdir(parents=True)
    (path / ".hydra" / "config.yaml").write_text(
        "seed: 0\nmodel: {latent_dim: 2}\ntrain: {epochs: 9}"
    )
    (path / "metrics.jsonl").write_text(metrics)
    return path


@pytest.fixture
def three_by_two(tmp_path):
    """Two settings: seeds 0, 1, 2 of one and 0, 1 of the other."""
    for seed, elbo in enumerate((-100.0, -102.0, -104.0)):
        made_up_run(tmp_path / f"two/{seed}", seed, elbo, latent_dim=2)
    for seed, elbo in enumerate((-90.0, -91.0)):
        made_up_run(tmp_path / f"eight/{seed}", seed, elbo, latent_dim=8)
    return tmp_path


def test_seeds_are_folded_and_the_best_comes_first(three_by_two):
    summary = summarize(read_runs(three_by_two))
    assert summary.keys == ["model.latent_dim"]
    best, second = summary.rows
    assert (best.values, best.mean, len(best.runs)) == ((8,), -90.5, 2)
    assert (second.values, second.mean, second.sd) == ((2,), -102.0, 2.0)
    assert best.sd == pytest.approx(math.sqrt(0.5))
    # lead 11.5, standard error of the difference sqrt(0.5 / 2 + 4 / 3) = 1.258
    assert "leads by 11.5 ± 1.3" in summary.verdict()
    assert "no seed noise" in summary.verdict()
    head, first, *_ = to_csv(summary).splitlines()
    assert head == "model.latent_dim,test/elbo,sd,n,seeds,seconds"
    assert first.split(",")[0::4] == ["8", "0 1"]
    assert "| 2 | -102.00 ± 2.00 | 3 | 1.0 |" in to_markdown(summary, three_by_two)


def test_a_lead_within_the_noise_is_called_so(tmp_path):
    for dim, elbos in ((2, (-100.0, -104.0)), (8, (-101.0, -102.0))):
        for seed, elbo in enumerate(elbos):
            made_up_run(tmp_path / f"{dim}-{seed}", seed, elbo, latent_dim=dim)
    assert "cannot be told apart" in summarize(read_runs(tmp_path)).verdict()
    one = summarize(read_runs(tmp_path), where=["seed=0"])
    assert "nobody knows" in one.verdict()


def test_lower_is_better_for_losses(three_by_two):
    assert higher_is_better("test/elbo")
    assert higher_is_better("log_px")
    assert not higher_is_better("test/kl")
    assert not higher_is_better("train/loss")
    assert summarize(read_runs(three_by_two), metric="seconds").rows[0].mean == 60


def test_what_is_no_result_is_listed_with_its_reason(three_by_two):
    unfinished_run(three_by_two / "stopped", '{"epoch": 1, "test/elbo": -1}\n{"epoch": 2, "te')
    unfinished_run(three_by_two / "torn", '{"epo\n{"epoch": 2}\n')
    failed = unfinished_run(three_by_two / "failed", "")
    (failed / "failed.json").write_text('{"reason": "loss nan"}')
    (three_by_two / "empty").mkdir()
    (three_by_two / "half").mkdir()
    (three_by_two / "half" / "summary.json").write_text('{"config": ')
    made_up_run(three_by_two / "again", 0, -90.0, latent_dim=8)
    nan = made_up_run(three_by_two / "nan", 5, math.nan, latent_dim=8)
    running = unfinished_run(three_by_two / "running", "")
    with FileLock(running / ".lock"):
        summary = summarize(read_runs(three_by_two))
    assert [row.mean for row in summary.rows] == [-90.5, -102.0]
    told = {run.path.name: f"{run.state}, {run.reason}" for run in summary.left_out}
    assert told["stopped"] == "unfinished, stopped after 1 of 9 epochs"
    assert "line 1 is not JSON" in told["torn"]
    assert told["failed"] == "failed, loss nan"
    assert told["empty"] == "broken, the folder is empty"
    assert told["half"].startswith("broken, JSONDecodeError")
    assert told["running"] == "running, 0 of 9 epochs"
    assert told[nan.name] == "failed, test/elbo is NaN"
    assert "duplicate, same settings and seed as" in told["0"]  # `again` was read before it
    for name in told:
        assert name in to_markdown(summary, three_by_two)


def test_runs_with_different_keys_stand_in_one_table(tmp_path):
    made_up_run(tmp_path / "a", 0, -100.0)
    made_up_run(tmp_path / "b", 0, -99.0, prior="mixture", data={"binarize": "dynamic"})
    summary = summarize(read_runs(tmp_path))
    assert summary.keys == ["data.binarize", "prior"]
    assert summary.rows[1].values == (None, None)
    assert "| none | none | -100.00 |" in to_markdown(summary, tmp_path)


def test_unfinished_runs_alone_make_no_table(tmp_path):
    unfinished_run(tmp_path / "a", "")
    summary = summarize(read_runs(tmp_path))
    assert (summary.rows, plots(summary)) == ([], {})
    assert summary.verdict() == "No run is finished."


def test_where_and_group_by(three_by_two):
    runs = read_runs(three_by_two)
    few = summarize(runs, where=["model.latent_dim=2", "seed=1"])
    assert [row.mean for row in few.rows] == [-102.0]
    folded = summarize(runs, group_by=["model.intermediate_dim"])
    assert [(row.values, len(row.runs)) for row in folded.rows] == [((512,), 5)]
    for wrong in ({"where": ["x"]}, {"where": ["no=1"]}, {"group_by": ["no"]}, {"metric": "no"}):
        with pytest.raises(SweepError, match=r"no|x"):
            summarize(runs, **wrong)
    with pytest.raises(SweepError, match="no run is left of 5"):
        summarize(runs, where=["seed=9"])


def test_figures_of_the_card_are_metrics(three_by_two):
    card = {"log_px": {"value": -88.0}, "verdict": ["fine"]}
    (three_by_two / "eight" / "0" / "evaluation.json").write_text(json.dumps(card))
    summary = summarize(read_runs(three_by_two), metric="log_px")
    assert [row.mean for row in summary.rows] == [-88.0]
    assert {run.reason for run in summary.left_out} == {"has no log_px"}


def test_plots_show_the_figures(tmp_path):
    for dim in (2, 4, 32):
        for prior in ("standard", "mixture"):
            elbo = -100.0 - dim - (prior == "mixture")
            made_up_run(tmp_path / f"{dim}{prior}", 0, elbo, latent_dim=dim, prior=prior)
    pictures = plots(summarize(read_runs(tmp_path)))
    assert set(pictures) == {
        "test_elbo_by_model.latent_dim", "test_elbo_by_prior", "heat_map", "rate_distortion",
        "learning_curves",
    }  # fmt: skip
    axes = pictures["test_elbo_by_model.latent_dim"].axes[0]
    assert axes.get_xscale() == "log"
    lines = sorted(tuple(c.lines[0].get_ydata()) for c in axes.containers)
    assert lines == [(-103, -105, -133), (-102, -104, -132)]
    (heat,) = pictures["heat_map"].axes[0].images
    assert heat.get_array().tolist() == [[-103, -102], [-105, -104], [-133, -132]]


def test_a_folder_without_runs_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(SweepError, match=str(folder)):
            read_runs(folder)


def run_script(script, *arguments):
    return subprocess.run(
        [sys.executable, f"scripts/{script}", *map(str, arguments)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_survives_a_failed_job_and_goes_on(made_up_root, tmp_path, launcher):
    folder = tmp_path / "a sweep"
    sweep = [
        *("-m", "data=fashion_mnist", f"data.root={made_up_root}", "model.intermediate_dim=16"),
        *("train.epochs=1", "train.figure_every=0", f"sweep.dir={folder}"),
        *([] if launcher == "basic" else [f"hydra/launcher={launcher}"]),
    ]
    first = run_script("train.py", *sweep, "optimizer.lr=1e-3,1e30")
    assert first.returncode == 1, first.stderr
    assert "1 of 2 runs finished" in first.stdout
    assert "failed, stopped: epoch 1" in first.stdout
    assert "scripts/summarize.py" in first.stdout

    runs = {run.state: run.path for run in read_runs(folder)}
    before = (runs["finished"] / "summary.json").stat().st_mtime_ns
    (failed := runs["failed"]).rename(tmp_path / "gone")
    second = run_script("train.py", *sweep, "optimizer.lr=1e-3,1e-2")
    assert second.returncode == 0, second.stderr
    assert "finished already" in second.stdout
    assert "2 of 2 runs finished" in second.stdout
    assert (runs["finished"] / "summary.json").stat().st_mtime_ns == before
    assert not failed.exists()

    if launcher == "basic":  # an edited result is no result
        summary = runs["finished"] / "summary.json"
        text = summary.read_text()
        elbo = json.loads(text)["final"]["test/elbo"]
        summary.write_text(text.replace(f'"test/elbo": {elbo}', '"test/elbo": -1.0'))
        third = run_script("train.py", *sweep, "optimizer.lr=1e-3,1e-2")
        assert third.returncode == 1
        assert "does not fit the checkpoint beside it" in third.stdout

        done = run_script("summarize.py", folder, "--out", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        assert "test/elbo: mean ± sd" in done.stdout
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert {"summary.csv", "summary.md", "learning_curves.png"} <= names


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on(made_up_root, tmp_path):
    sweep = [
        *("-m", "data=fashion_mnist", f"data.root={made_up_root}", "model.intermediate_dim=16"),
        *("train.epochs=60", "train.figure_every=0", "seed=0,1", f"sweep.dir={tmp_path}"),
    ]
    process = subprocess.Popen(
        [sys.executable, "scripts/train.py", *sweep], cwd=REPOSITORY, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("epoch  20/60"):
            break
    process.kill()
    process.wait()
    process.stdout.close()
    assert [run.state for run in read_runs(tmp_path)] == ["unfinished"]
    done = run_script("train.py", *sweep)
    assert done.returncode == 0, done.stderr
    first = done.stdout.partition("seed=1")[0]
    assert "epoch  10/60" not in first
    assert "epoch  60/60" in first
    summary = summarize(read_runs(tmp_path))
    assert [len(row.runs) for row in summary.rows] == [2]
    assert all(
        [e["epoch"] for e in run.epochs] == list(range(1, 61)) for run in summary.rows[0].runs
    )


@pytest.mark.parametrize("choice", ["experiment=search", "hydra/launcher=joblib"])
def test_a_missing_plugin_is_told_with_its_remedy(choice):
    # a blocked namespace package: as if no plugin were installed
    blind = (
        "import sys, runpy; sys.modules['hydra_plugins'] = None; "
        "sys.path.insert(0, 'scripts'); sys.argv = sys.argv[1:]; "
        "runpy.run_path('scripts/train.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", blind, "scripts/train.py", "-m", choice],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"train.py: {choice}: not installed; pip install")


def test_summarize_refuses_in_one_line(tmp_path):
    done = run_script("summarize.py", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"summarize.py: {tmp_path}: holds no run; name outputs/, a sweep's folder or a run's\n"
    )
