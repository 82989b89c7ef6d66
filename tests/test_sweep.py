"""Reading many runs, against tables worked out by hand; and sweeps in which jobs fail."""

import importlib
import importlib.util
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
from filelock import FileLock
from scipy.stats import ttest_ind

from tests.command_lines import run_script, start_script
from tests.rough import UNDRAWN
from vae_torch.runs.folders import Run, SweepError, read_runs
from vae_torch.runs.metrics import direction_of, higher_is_better
from vae_torch.runs.prune import behind_median
from vae_torch.runs.summary import Row, summarize, summarize_each, welch, why_apart
from vae_torch.runs.summary_plots import plots
from vae_torch.runs.summary_tables import to_csv, to_markdown


def made_up_run(path, seed, elbo, *, epochs=2, test_set=None, final=None, seconds=60.0, **settings):
    """A finished run's folder, with the files that a summary reads."""
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
        **(final or {}),
    }
    summary = {"config": config, "final": final, "seconds": seconds}
    if test_set:
        summary["data_sha256"] = {"train": "f" * 64, "test": test_set * 64}
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
    assert "unlikely to be seed noise" in summary.verdict()
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
    assert not higher_is_better("train/loss")
    assert direction_of("train/loss") is False
    assert summarize(read_runs(three_by_two), metric="seconds").rows[0].mean == 60


def test_runs_without_a_result_are_listed_with_their_reason(three_by_two):
    unfinished_run(three_by_two / "stopped", '{"epoch": 1, "test/elbo": -1}\n{"epoch": 2, "te')
    unfinished_run(three_by_two / "torn", '{"epo\n{"epoch": 2}\n')
    failed = unfinished_run(three_by_two / "failed", "")
    (failed / "failed.json").write_text('{"reason": "loss nan"}')
    (three_by_two / "empty").mkdir()
    (three_by_two / "half").mkdir()
    (three_by_two / "half" / "summary.json").write_text('{"config": ')
    made_up_run(three_by_two / "again", 0, -90.0, latent_dim=8)
    pruned = unfinished_run(three_by_two / "pruned", '{"epoch": 1, "test/elbo": -190}\n')
    (pruned / "pruned.json").write_text('{"reason": "far behind", "elbo": -190}')
    nan = made_up_run(three_by_two / "nan", 5, math.nan, latent_dim=8)
    running = unfinished_run(three_by_two / "running", "")
    with FileLock(running / ".lock"):
        summary = summarize(read_runs(three_by_two))
    assert [row.mean for row in summary.rows] == [-90.5, -102.0]
    told = {run.path.name: f"{run.state}, {run.reason}" for run in summary.left_out}
    assert told["stopped"] == "unfinished, stopped after 1 of 9 epochs"
    assert "line 1 is not the JSON of an epoch" in told["torn"]
    assert told["failed"] == "failed, loss nan"
    assert told["pruned"] == "pruned, far behind"
    assert told["empty"] == "broken, the folder is empty"
    assert told["half"].startswith("broken, JSONDecodeError")
    assert told["running"] == "running, 0 of 9 epochs"
    assert told[nan.name] == "failed, test/elbo is NaN"
    assert "duplicate, same settings and seed as" in told["0"]  # `again` was read before it
    for name in told:
        assert name in to_markdown(summary, three_by_two)


def test_a_run_behind_the_median_gets_a_reason(tmp_path):
    def run(name, *elbos):
        lines = [json.dumps({"epoch": i + 1, "test/elbo": e}) for i, e in enumerate(elbos)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return tmp_path / name

    # best of two epochs, a to d: -100, -110, -120, -130; later f: -140; e has only one epoch
    for name, elbos in {
        "a": (-100, -105, -90), "b": (-150, -110), "c": (-121, -120), "d": (-130, -131),
        "e": (-80,),
    }.items():  # fmt: skip
        run(name, *elbos)
    behind = run("behind", -170, -126)
    assert behind_median(behind) is None  # four runs are too few for a median
    run("f", -140, -140)
    assert behind_median(behind) == (
        "after 2 epochs its best test/elbo is -126.00, the median of 5 others -120.00"
    )
    assert behind_median(run("level", -120, -125)) is None  # not below the median of six: -123
    (tmp_path / "f" / "metrics.jsonl").write_text("{\n{}\n")
    assert behind_median(behind, least=5) is not None  # a damaged run does not count, five are left


def test_runs_with_different_keys_stand_in_one_table(tmp_path):
    made_up_run(tmp_path / "a", 0, -100.0)
    made_up_run(tmp_path / "b", 0, -99.0, prior="mixture", data={"batch_size": 100})
    summary = summarize(read_runs(tmp_path))
    assert summary.keys == ["data.batch_size", "prior"]
    assert summary.rows[1].values == (None, None)
    assert "| null | null | -100.00 |" in to_markdown(summary, tmp_path)


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


def test_runs_with_other_test_images_are_not_ranked_against_each_other(tmp_path):
    """Three sets: the whole, its first 500 images, held-out ones; and runs that recorded none."""
    for seed in (0, 1):
        for dim in (2, 8):
            whole = {"latent_dim": dim, "data": {"limit_test": None, "hold_out": 0}}
            made_up_run(tmp_path / f"a{dim}{seed}", seed, -100.0 + dim, test_set="a", **whole)
    for name, elbo, data in (
        ("b", -80.0, {"limit_test": 500, "hold_out": 0}),
        ("c", -70.0, {"limit_test": None, "hold_out": 500}),
    ):
        made_up_run(tmp_path / name, 0, elbo, test_set=name, data=data)
    made_up_run(tmp_path / "old", 0, -60.0, data={"limit_test": None})
    made_up_run(tmp_path / "older", 1, -61.0)
    made_up_run(tmp_path / "old few", 0, -50.0, data={"limit_test": 50})
    runs = read_runs(tmp_path)
    with pytest.raises(SweepError, match=r"5 groups .* different test images, .* --where"):
        summarize(runs)
    groups = summarize_each(runs)
    paths = [{run.path.name for row in each.rows for run in row.runs} for each in groups]
    assert paths[0] == {"a20", "a21", "a80", "a81"}
    assert {frozenset(names) for names in paths[1:]} == {
        frozenset({"b"}), frozenset({"c"}), frozenset({"old", "older"}), frozenset({"old few"}),
    }  # fmt: skip
    assert groups[0].keys == ["model.latent_dim"]
    assert "model.latent_dim=8 leads by 6" in groups[0].verdict()
    for each, names in zip(groups, paths, strict=True):  # its `where` selects its runs
        one = summarize(runs, where=each.where)
        assert {run.path.name for row in one.rows for run in row.runs} == names
    assert "null: not recorded" in why_apart(groups)
    (held_out,) = (each for each in groups if each.held_out)
    assert "data.hold_out=500" in held_out.where
    assert "test/elbo of held-out images, nats" in to_markdown(held_out, tmp_path)
    assert "not the test set" in to_markdown(held_out, tmp_path)
    lines = to_csv(*groups).splitlines()
    assert lines[0] == "runs,model.latent_dim,test/elbo,sd,n,seeds,seconds"
    assert len(lines) == 1 + 6
    assert len(summarize_each(runs, metric="seconds")) == 1


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("summary.json", '{"config": {"seed": 0}, "final": {}, "seconds": 1, "data_sha256": [1]}'),
        ("evaluation.json", '{"log_px": {"value": 1.0}, "data": 3}'),
        ("evaluation.json", "[1]"),
    ],
)
def test_a_damaged_record_is_reported_beside_the_table(three_by_two, file, text):
    (three_by_two / "two" / "0" / file).write_text(text)
    summary = summarize(read_runs(three_by_two))
    assert [(run.path.name, run.state) for run in summary.left_out] == [("0", "broken")]


def test_a_card_of_odd_counts_is_a_protocol_like_any_other(three_by_two):
    card = {"log_px": {"value": 1.0, "num_samples": [5], "num_images": {}}}
    (three_by_two / "two" / "0" / "evaluation.json").write_text(json.dumps(card))
    assert summarize(read_runs(three_by_two), metric="log_px").rows[0].mean == 1.0


def test_other_likelihoods_and_objectives_are_other_scales(tmp_path):
    made_up_run(tmp_path / "a", 0, -100.0, likelihood="bernoulli", final={"test/loss": 100.0})
    made_up_run(tmp_path / "b", 0, 900.0, likelihood="gaussian", final={"test/loss": -900.0})
    keras = {"objective": {"name": "keras"}, "likelihood": "bernoulli"}
    made_up_run(tmp_path / "c", 0, -200.0, final={"test/loss": 0.2628}, **keras)
    runs = read_runs(tmp_path)
    assert sorted(len(each.rows) for each in summarize_each(runs)) == [1, 2]
    losses = summarize_each(runs, metric="test/loss")
    assert [len(each.rows) for each in losses] == [1, 1, 1]
    (pixels,) = (each for each in losses if each.rows[0].mean == 0.2628)
    assert "| test/loss (lower is better): mean ± sd |" in to_markdown(pixels, tmp_path)
    assert "| 0.2628 |" in to_markdown(pixels, tmp_path)
    assert len(summarize(runs, metric="test/kl").rows) == 3


@pytest.mark.parametrize(
    "change", [{"num_samples": 50}, {"num_images": 500}, {"seed": 1}, {"checkpoint": "best"}]
)
def test_cards_of_other_protocols_are_not_averaged(three_by_two, change):
    for i, run in enumerate(sorted((three_by_two / "two").iterdir())):
        about = {"num_samples": 5000, "num_images": 10_000, "seed": 0, "checkpoint": "last"}
        about |= change if i == 2 else {}
        name = about.pop("checkpoint")
        card = {
            "log_px": {"value": -90.0 - i, **about},
            "checkpoint": {"name": name},
            "data": {"sha256": "a" * 64},
        }
        (run / "evaluation.json").write_text(json.dumps(card))
    runs = read_runs(three_by_two)
    with pytest.raises(SweepError, match="2 groups of runs cannot be compared"):
        summarize(runs, metric="log_px")
    groups = summarize_each(runs, metric="log_px")
    assert [each.rows[0].mean for each in groups] == [-90.5, -92.0]
    for each in groups:
        one = summarize(runs, metric="log_px", where=each.where)
        assert one.rows[0].mean == each.rows[0].mean
    key, value = next(iter(change.items()))
    assert groups[1].where == [f"eval.{key}={value}"]


def test_a_metric_without_a_better_direction_has_no_winner(tmp_path):
    for dim, kl in ((8, 12.0), (2, 0.00001), (32, 20.0)):
        final = {"test/kl": kl, "test/novel_loss": kl}
        made_up_run(tmp_path / str(dim), 0, -100.0, latent_dim=dim, final=final)
    runs = read_runs(tmp_path)
    for metric in ("test/kl", "test/novel_loss"):
        summary = summarize(runs, metric=metric)
        assert [row.values for row in summary.rows] == [(2,), (8,), (32,)]  # sorted by setting
        assert "no setting leads" in summary.verdict()
        assert "is better)" not in to_markdown(summary, tmp_path)
        assert plots(summary)
        for higher, first in ((True, 32), (False, 2)):
            ranked = summarize(runs, metric=metric, higher_is_better=higher)
            assert ranked.rows[0].values == (first,)
            assert f"model.latent_dim={first} leads" in ranked.verdict()
    assert direction_of("test/novel_loss") is None
    for path in tmp_path.glob("*/summary.json"):  # as a run with the plug-in writes it
        record = json.loads(path.read_text()) | {"better": {"test/novel_loss": "lower"}}
        path.write_text(json.dumps(record))
    assert summarize(read_runs(tmp_path), metric="test/novel_loss").rows[0].values == (2,)


def test_figures_have_the_digits_that_their_errors_leave(tmp_path):
    for seed, elbo in enumerate((-100.123, -104.567, -103.2)):  # ± 1.3
        made_up_run(tmp_path / str(seed), seed, elbo)
    assert "| -102.6 ± 2.3 | 3 |" in to_markdown(summarize(read_runs(tmp_path)), tmp_path)


def test_small_figures_keep_their_digits(tmp_path):
    for dim, value in ((2, 0.0583), (8, 0.0612)):
        made_up_run(tmp_path / str(dim), 0, -100.0, latent_dim=dim, final={"knn_accuracy": value})
    text = to_markdown(summarize(read_runs(tmp_path), metric="knn_accuracy"), tmp_path)
    assert "| 8 | 0.06120 | 1 |" in text
    assert "| 2 | 0.05830 | 1 |" in text
    assert "knn_accuracy, share of images (higher is better)" in text


def test_short_runs_are_measured_in_seconds(tmp_path):
    made_up_run(tmp_path / "a", 0, -100.0, seconds=1.4)
    text = to_markdown(summarize(read_runs(tmp_path)), tmp_path)
    assert "| n | seconds |" in text
    assert "| 1 | 1.4 |" in text


def test_settings_are_shown_as_the_command_line_takes_them(tmp_path):
    for name, limit, mean_bias in (("a", None, True), ("b", 500, False)):
        data = {"limit_test": limit, "binarize": "none"}
        settings = {"data": data, "flag": mean_bias, "pair": [1, None]}
        made_up_run(tmp_path / name, 0, -100.0, test_set="a", **settings)
    runs = read_runs(tmp_path)
    text = to_markdown(summarize(runs, group_by=["data.limit_test", "flag", "pair"]), tmp_path)
    assert "| null | true | [1,null] |" in text
    for condition in ("data.limit_test=null", "data.limit_test=none", "flag=true", "flag=True"):
        (row,) = summarize(runs, where=[condition]).rows
        assert row.runs[0].path.name == "a"
    assert len(summarize(runs, where=["data.binarize=none"]).rows) == 2
    with pytest.raises(SweepError, match="no run is left"):
        summarize(runs, where=["data.binarize=null"])


def test_a_figure_of_the_card_is_missed_with_its_remedy(three_by_two):
    with pytest.raises(SweepError, match=r"--metric log_px: no run has it; scripts/evaluate.py"):
        summarize(read_runs(three_by_two), metric="log_px")


@pytest.mark.parametrize("epochs", [1, 2, 3, 30])
def test_learning_curves_are_whole_and_count_whole_epochs(tmp_path, epochs):
    for name, elbo, count in (("a", -100.0, epochs), ("b", -500.0, min(epochs, 2))):
        model = {"latent_dim": 2 if name == "a" else 8}
        made_up_run(tmp_path / name, 0, elbo, epochs=count, **model)
    figure = plots(summarize(read_runs(tmp_path)))["learning_curves"]
    axes = figure.axes[0]
    figure.draw_without_rendering()
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert all(tick == round(tick) for tick in axes.get_xticks() if left <= tick <= right)
    drawn = [point for line in axes.lines for point in zip(*line.get_data(), strict=True)]
    assert all(left <= x <= right and low <= y <= high for x, y in drawn)
    # the last point of each: -1 + (epochs - 1) above what it was made up from
    assert {(epochs, -102.0 + epochs), (min(epochs, 2), -502.0 + min(epochs, 2))} <= set(drawn)
    assert "nats per image" in axes.get_ylabel()
    (legend,) = figure.legends
    labels = [text.get_text().partition(",")[0] for text in legend.get_texts()]
    assert labels == ["latent_dim=2", "latent_dim=8"]


def test_a_summary_states_its_question_and_replaces_the_last_pictures(three_by_two):
    made_up_run(three_by_two / "other", 0, -95.0, latent_dim=2, prior="mixture")
    mine = three_by_two / "summary" / "mine.png"
    done = run_script("summarize.py", three_by_two)
    assert done.returncode == 0, done.stderr
    mine.write_bytes(b"mine")
    first = {path.name for path in mine.parent.glob("*.png")}
    assert {"heat_map.png", "test_elbo_by_prior.png", "learning_curves.png"} <= first
    assert not list(three_by_two.glob("*.png"))
    asks = [three_by_two, "--metric", "test/kl", "--where", "prior=null", "seed=0"]
    done = run_script("summarize.py", *asks)
    assert done.returncode == 0, done.stderr
    question = (three_by_two / "summary.md").read_text().splitlines()[0]
    assert question == f"`summarize.py {' '.join(map(str, asks))}`"
    assert {path.name for path in mine.parent.glob("*.png")} == {
        "mine.png", "test_kl_by_model.latent_dim.png", "rate_distortion.png",
    }  # fmt: skip
    assert read_runs(three_by_two)[-1].path.name != "summary"


def test_several_groups_are_answered_one_by_one(tmp_path):
    for seed in (0, 1):
        for dim in (2, 8):
            for test_set in ("a", "b"):
                data = {"limit_test": 500 if test_set == "b" else None}
                made_up_run(
                    tmp_path / f"{dim}{seed}{test_set}", seed, -100.0 - dim, latent_dim=dim,
                    test_set=test_set, data=data,
                )  # fmt: skip
    done = run_script("summarize.py", tmp_path, "--lower-is-better")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 groups of runs cannot be compared")
    assert "## data.limit_test=null (4 runs)" in done.stdout
    assert "## data.limit_test=500 (4 runs)" in done.stdout
    assert done.stdout.count("model.latent_dim=8 leads") == 2
    pictures = {path.name for path in (tmp_path / "summary").glob("*.png")}
    assert {"1_learning_curves.png", "2_learning_curves.png"} <= pictures
    done = run_script("summarize.py", tmp_path, "--where", "data.limit_test=500")
    assert "groups of runs" not in done.stdout
    assert "1_learning_curves.png" not in {path.name for path in (tmp_path / "summary").iterdir()}


def test_a_folder_without_runs_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(SweepError, match=str(folder)):
            read_runs(folder)


def tiny_sweep(root, folder, *overrides):
    """Arguments of a sweep over made-up images."""
    return [
        *("-m", "data=fashion_mnist", f"data.root={root}", "model.intermediate_dim=16"),
        *("train.figure_every=0", f"sweep.dir={folder}", *overrides),
    ]


FEW = ("train.epochs=1", "data.limit_train=100", "data.limit_test=50")


def needs(module):
    return pytest.mark.skipif(
        not importlib.util.find_spec(module), reason=f"{module} is not installed"
    )


def submitit_starts_no_process():
    """Submitit's debug executor: a job's arguments and result, within a second."""
    launcher = importlib.import_module("hydra_plugins.hydra_submitit_launcher.submitit_launcher")
    launcher.LocalLauncher._EXECUTOR = "debug"


@pytest.mark.parametrize(
    ("where", "values"),
    [
        ("here", "-1,2"),
        ("slurm_local in one process", "-1,2"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("here", "2,-1"), ("cores", "-1,2"), ("slurm_local", "-1,2"))
        ),
    ],
)
def test_a_wrong_value_fails_its_own_job_alone(made_up_root, tmp_path, where, values):
    folder = tmp_path / "sweep"
    sweep = tiny_sweep(made_up_root, folder, *FEW, f"where={where.partition(' ')[0]}", "seed=0")
    before = ["tests.test_sweep:submitit_starts_no_process"] if " " in where else UNDRAWN
    done = run_script("train.py", *sweep, f"model.latent_dim={values}", before=before)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "1 of 2 runs finished, 1 failed in" in done.stdout
    reason = "model.latent_dim=-1: must be a whole number, 1 or more and at most 100000"
    assert f"failed, {reason}" in done.stdout
    (failed,) = folder.glob("*/failed.json")
    assert json.loads(failed.read_text())["reason"] == reason
    assert failed.parent.name.startswith("model.latent_dim--1_")
    (summary,) = folder.glob("*/summary.json")
    assert summary.parent.name.startswith("model.latent_dim-2_")


def test_an_interrupted_sweep_counts_the_jobs_that_were_asked_for(made_up_root, tmp_path):
    sweep = tiny_sweep(made_up_root, tmp_path / "s", "train.epochs=100000", "seed=0,1,2")
    with start_script("train.py", *sweep) as process:
        process.wait_for("epoch   2/")
        process.send_signal(signal.SIGINT)
        ended = process.end()
    assert ended.status == 130
    assert "0 of 3 runs finished, 1 interrupted, 2 not started" in ended.out


@pytest.mark.slow
def test_ctrl_c_lets_the_runs_of_all_cores_write_a_checkpoint(made_up_root, tmp_path):
    folder = tmp_path / "s"
    sweep = tiny_sweep(made_up_root, folder, "train.epochs=100000", "seed=0,1", "where=cores")
    with start_script("train.py", *sweep, group=True) as process:
        for seed in (0, 1):
            first(f"seed-{seed}*/checkpoints/last.pt", folder, process)
        os.killpg(process.pid, signal.SIGINT)
        ended = process.end()
    assert ended.status in (-signal.SIGINT, 130)
    assert "0 of 2 runs finished, 2 interrupted in" in ended.out
    for seed in (0, 1):
        (log,) = folder.glob(f"seed-{seed}*/run.log")
        assert f"{log.parent.name}: stopped: " in log.read_text("utf-8")  # in an epoch or a figure


def test_more_jobs_in_a_sweeps_folder_are_counted_alone(made_up_root, tmp_path):
    def sweep(values):
        order = tiny_sweep(made_up_root, tmp_path / "s", *FEW, f"model.latent_dim={values}")
        return run_script("train.py", *order, before=UNDRAWN).stdout

    assert "2 of 2 runs" in sweep("2,3")
    (third,) = (tmp_path / "s").glob("model.latent_dim-3*")
    (third / "failed.json").write_text('{"reason": "of an earlier attempt"}')
    said = sweep("3,4")
    assert "2 of 2 runs finished in" in said
    assert said.count("finished already") == 1


@pytest.mark.parametrize("where", ["here", pytest.param("cores", marks=pytest.mark.slow)])
def test_a_sweep_survives_a_failed_job_and_resumes(made_up_root, tmp_path, where):
    folder = tmp_path / "a sweep"

    def sweep(rates):
        order = tiny_sweep(made_up_root, folder, *FEW, f"where={where}", f"optimizer.lr={rates}")
        return run_script("train.py", *order, before=UNDRAWN)

    first = sweep("1e30,2e-3")
    assert first.returncode == 1, first.stderr
    assert "1 of 2 runs finished" in first.stdout
    assert "failed, stopped: epoch 1" in first.stdout
    assert "scripts/summarize.py" in first.stdout
    runs = {run.settings["optimizer.lr"]: run for run in read_runs(folder)}
    assert {lr: run.state for lr, run in runs.items()} == {1e30: "failed", 2e-3: "finished"}
    before = (runs[2e-3].path / "summary.json").stat().st_mtime_ns
    runs[1e30].path.rename(tmp_path / "gone")
    second = sweep("1e-3,2e-3,1e-2")
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("finished already") == 1
    assert "3 of 3 runs finished" in second.stdout
    assert (runs[2e-3].path / "summary.json").stat().st_mtime_ns == before
    runs = {run.settings["optimizer.lr"]: run for run in read_runs(folder)}
    if where == "cores":
        return

    # results that were edited, or are of other code, do not count
    for lr, key in ((1e-3, "final"), (2e-3, "versions")):
        path = runs[lr].path / "summary.json"
        summary = json.loads(path.read_text())
        summary[key] |= {"test/elbo": -1.0} if key == "final" else {"code": "0" * 64}
        path.write_text(json.dumps(summary))
    third = sweep("1e-3,2e-3,1e-2")
    assert third.returncode == 1
    assert "does not fit the checkpoint beside it" in third.stdout
    assert "its run was made with code 000000000000, this is " in third.stdout
    assert "1 of 3 runs finished" in third.stdout

    done = run_script("summarize.py", folder, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "test/elbo, nats per image (higher is better): mean ± sd" in done.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"summary.csv", "summary.md", "summary"}
    assert (tmp_path / "out" / "summary" / "learning_curves.png").exists()


def test_settings_lie_between_the_plugin_and_the_command_line():
    arguments = ("--cfg", "all", "where=cores", "hydra.launcher.verbose=7")
    done = run_script("train.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "mmap_mode: r\n" in done.stdout  # the plugin's
    assert "batch_size: 1\n" in done.stdout or "batch_size: '1'\n" in done.stdout  # this project's
    assert "verbose: 7\n" in done.stdout  # given in this test
    assert "\nthreads: 1\n" in done.stdout
    assert "\nthreads: 2\n" in run_script("train.py", *arguments, "threads=2").stdout


def test_work_in_a_child(tmp_path):
    script = """
import math, multiprocessing, os, signal, sys
from vae_torch.cli import children
from vae_torch.cli.children import KilledError, in_a_child

children._PRELOAD.clear()  # no run is made here

if __name__ == "__main__":
    assert in_a_child(math.sqrt, 2.25) == 1.5
    assert math.isnan(in_a_child(float, "nan"))
    assert in_a_child(os.getpid) != os.getpid()
    for work, arguments, words in (
        (signal.raise_signal, [signal.SIGKILL], "killed by SIGKILL"),
        (os._exit, [3], "ended with exit status 3"),
        (os._exit, [0], "ended with exit status 0"),
    ):
        try:
            in_a_child(work, *arguments)
        except KilledError as error:
            assert str(error) == words, error
        else:
            raise AssertionError(words)
    try:
        in_a_child(sys.exit, 130)
    except SystemExit as end:
        assert end.code == 130
    print("all is well")
"""
    (tmp_path / "main.py").write_text(script)
    done = run_script(tmp_path / "main.py")
    assert done.stdout == "all is well\n", done.stderr


def test_ctrl_c_waits_for_the_child_that_it_reaches(tmp_path):
    script = """
import os, signal, sys, time
from vae_torch.cli import children

children._PRELOAD.clear()

def stop(*_):
    print("a checkpoint", flush=True)
    sys.exit(130)

def work():
    signal.signal(signal.SIGINT, stop)
    print("works", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    try:
        children.in_a_child(work)
    except SystemExit as end:
        print("ended", end.code)
"""
    (tmp_path / "main.py").write_text(script)
    with start_script(tmp_path / "main.py", group=True) as process:
        process.wait_for("works")
        os.killpg(process.pid, signal.SIGINT)
        ended = process.end()
    assert (ended.out, ended.error) == ("a checkpoint\nended 130\n", "")


def first(pattern, folder, process):
    """The first file of this pattern, once there is one while the process runs."""
    while not process.has_ended():
        if found := sorted(folder.glob(pattern)):
            return found[0]
        time.sleep(0.05)
    raise AssertionError(f"before there was {pattern}: {process.end()}")


def writer_of(run_dir):
    """The process that holds the run's lock file open."""
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        try:
            open_files = {path.readlink() for path in descriptors.iterdir()}
        except OSError:  # it has ended, or belongs to another user
            continue
        if run_dir / ".lock" in open_files:
            return int(descriptors.parent.name)
    raise AssertionError(f"nobody writes {run_dir}")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["here", "cores"])
def test_a_sweep_that_was_killed_resumes(made_up_root, tmp_path, where):
    sweep = tiny_sweep(made_up_root, tmp_path, "train.epochs=300", "seed=0,1,2")
    sweep += [f"where={where}", "threads=1"]
    with start_script("train.py", *sweep) as process:  # and kills it
        run_dir = first("*seed-0*/checkpoints/last.pt", tmp_path, process).parent.parent
    done = run_script("train.py", *sweep)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 runs finished" in done.stdout
    assert "epoch   1/300" not in (run_dir / "run.log").read_text().partition("stopped")[2]
    runs = summarize(read_runs(tmp_path)).rows[0].runs
    assert [[e["epoch"] for e in run.epochs] for run in runs] == [list(range(1, 301))] * 3


@pytest.mark.slow
def test_a_killed_run_does_not_sink_joblibs_sweep(made_up_root, tmp_path):
    sweep = tiny_sweep(made_up_root, tmp_path, "train.epochs=300", "seed=0,1,2,3")
    sweep.append("where=cores")
    with start_script("train.py", *sweep) as process:
        run_dir = first("*seed-0*/checkpoints/last.pt", tmp_path, process).parent.parent
        os.kill(writer_of(run_dir), signal.SIGKILL)
        ended = process.end()
    assert ended.status == 1
    assert "3 of 4 runs finished" in ended.out
    assert f"{run_dir.name}: failed, killed by SIGKILL" in ended.out
    assert run_script("train.py", *sweep).returncode == 0
    assert {run.state for run in read_runs(tmp_path)} == {"finished"}


@pytest.mark.slow
@needs("hydra_plugins.hydra_optuna_sweeper")
def test_a_search_resumes_and_stops_what_is_behind(made_up_root, tmp_path):
    search = [
        *tiny_sweep(made_up_root, tmp_path, "experiment=search", "data.hold_out=100"),
        *("train.epochs=3", "train.prune_after=1", "threads=1"),
    ]
    search.remove("model.intermediate_dim=16")
    for trials in (10, 4):
        done = run_script("train.py", *search, f"hydra.sweeper.n_trials={trials}")
        assert done.returncode == 0, done.stderr
    with sqlite3.connect(tmp_path / "study.db") as study:
        values = [value for (value,) in study.execute("select value from trial_values")]
        names = {name for (name,) in study.execute("select param_name from trial_params")}
    assert len(values) == 14
    assert names == {
        "model.latent_dim", "model.intermediate_dim", "optimizer.lr", "objective.beta",
    }  # fmt: skip
    runs = read_runs(tmp_path)
    states = [run.state for run in runs]
    # the worst of the first six is below the median of the other five
    assert set(states) == {"finished", "pruned"}
    for run in runs:
        if run.state == "pruned":
            assert len(run.epochs) < 3
            assert run.epochs[-1]["test/elbo"] in values
            assert "the median of" in run.reason


@pytest.mark.slow
@needs("hydra_plugins.hydra_ray_launcher")
def test_ray_spreads_a_sweep_and_outlives_a_worker(made_up_root, tmp_path):
    ray = Path(sys.executable).with_name("ray")
    short = tempfile.mkdtemp(prefix="ray")  # sockets have short names
    nodes = []
    try:
        for role in (
            ["--head", "--port=6397", f"--temp-dir={short}", "--include-dashboard=false"],
            ["--address=127.0.0.1:6397"],
        ):
            command = [ray, "start", *role, "--num-cpus=1", "--disable-usage-stats", "--block"]
            nodes.append(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True))
            for line in nodes[-1].stdout:
                if "Ray runtime started" in line:
                    break
        sweep = tiny_sweep(made_up_root, tmp_path / "sweep", "train.epochs=200")
        sweep += ["where=ray", "seed=0,1,2,3,4,5", "model.latent_dim=2,8"]
        address = {"RAY_ADDRESS": "127.0.0.1:6397"}
        with start_script("train.py", *sweep, env=address) as process:
            run_dir = first("*/checkpoints/last.pt", tmp_path / "sweep", process).parent.parent
            os.kill(writer_of(run_dir), signal.SIGKILL)
            ended = process.end()
        assert ended.status == 0, ended
        assert "12 of 12 runs finished" in ended.out
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.communicate()
    runs = summarize(read_runs(tmp_path / "sweep"))
    assert [len(row.runs) for row in runs.rows] == [6, 6]


@pytest.mark.parametrize("choice", ["experiment=search", "where=ray"])
def test_a_missing_plugin_is_reported_with_its_remedy(choice):
    done = run_script("train.py", "-m", choice, before=["tests.test_sweep:without_plugins"])
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"train.py: {choice}: not installed; pip install")


def without_plugins():
    """Block a namespace package, as if it were not installed."""
    for name in [name for name in sys.modules if name.startswith("hydra_plugins")]:
        del sys.modules[name]
    sys.modules["hydra_plugins"] = None


def test_summarize_refuses_in_one_line(tmp_path):
    done = run_script("summarize.py", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"summarize.py: {tmp_path}: holds no run; name outputs/, a sweep's folder or a run's\n"
    )


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1.0, 1.1, 0.9], [0.8, 0.7, 0.75]),
        ([1.0, 1.1], [0.8, 0.1]),
        ([1.0, 1.01, 0.99], [1.0, 1.2, 0.8]),
    ],
)
def test_a_lead_is_judged_by_welchs_test(a, b):
    rows = [
        Row((), [Run(Path(str(i)), "finished") for i in range(len(v))], mean(v), stdev(v))
        for v in (a, b)
    ]
    error, p = welch(*rows)
    expected = ttest_ind(a, b, equal_var=False)
    assert p == pytest.approx(expected.pvalue, rel=1e-9)
    if expected.statistic:
        assert error == pytest.approx((mean(a) - mean(b)) / expected.statistic, rel=1e-9)


@pytest.mark.parametrize("seeds", [2, 3])
def test_equal_settings_are_called_different_in_one_of_twenty_at_most(seeds):
    random, found = np.random.default_rng(0), []
    for _ in range(2000):
        rows = [
            Row((), [Run(Path(str(i)), "finished") for i in range(seeds)], mean(v), stdev(v))
            for v in random.normal(size=(2, seeds)).tolist()
        ]
        found.append(welch(*rows)[1] < 0.05)
    assert 0.01 < mean(found) < 0.06  # by two standard errors: 0.18 of 2 seeds, 0.114 of 3
