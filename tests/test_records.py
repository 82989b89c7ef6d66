"""The TensorBoard files of a run."""

import json
import shlex
import textwrap
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.command_lines import run_script
from tests.rough import UNDRAWN
from vae_torch import VAE
from vae_torch.figures.plots import new_axes
from vae_torch.runs.records import Records, add_evaluation


def events_of(run_dir):
    return EventAccumulator(str(run_dir / "tensorboard")).Reload()


def text_of(run_dir, name):
    (text,) = events_of(run_dir).Tensors(name)[-1].tensor_proto.string_val
    return textwrap.dedent(text.decode())


def metrics_of(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if "second" not in name}
        for line in lines
    ]


def test_curves_come_before_pictures_and_these_before_the_curves_of_single_latents(
    config, small_vae, tmp_path
):
    """TensorBoard's first page shows its groups in alphabetical order."""
    records = Records(tmp_path, config, config_text="")
    records.log({"epoch": 1, "train/elbo": 1.0, "test/elbo": 1.0, "test/kl_per_dim": [0.5, 0.5]})
    records.figures(1, small_vae, torch.rand(20, 784), torch.arange(20) % 10)
    records.close()
    entry = {"value": 1.0, "standard_error": 0.1, "unit": "nats", "definition": "a bound"}
    add_evaluation(tmp_path, {"elbo": entry, "verdict": []}, 1)
    tags = events_of(tmp_path).Tags()
    # pictures and scalars, which the page shows; no texts
    groups = {tag.split("/")[0] for kind in ("scalars", "tensors") for tag in tags[kind]}
    order = sorted(groups - {"command", "config", "evaluation", "custom_scalars__config__"})
    assert order == ["test", "train", "trained", "visuals", "z_test_kl"]
    pictures = sorted(tag for tag in tags["tensors"] if tag.startswith("visuals/"))
    assert [tag.split("_", 1)[1] for tag in pictures][:3] == [
        "reconstructions",
        "samples",
        "latent",
    ]


def test_a_map_of_log_px_is_kept_though_somebody_removed_the_figures(tmp_path):
    add_evaluation(tmp_path, {"verdict": []}, 1, new_axes(2, 2)[0])
    assert (tmp_path / "figures" / "log_px.png").exists()


def test_the_command_of_a_sweeps_job_runs_that_job_alone(made_up_root, tmp_path):
    settings = [
        "data=fashion_mnist", f"data.root={made_up_root}", "model.intermediate_dim=8",
        "train.epochs=1", "train.figure_every=0", "data.limit_train=100", "data.limit_test=50",
    ]  # fmt: skip
    order = ("-m", *settings, "seed=3", f"sweep.dir={tmp_path / 'sweep'}")
    sweep = run_script("train.py", *order, before=UNDRAWN)
    assert sweep.returncode == 0, sweep.stderr
    (job,) = (path.parent for path in (tmp_path / "sweep").glob("*/summary.json"))
    python, script, *overrides = shlex.split(text_of(job, "command"))
    assert (python, script) == ("python", "scripts/train.py")
    assert not any(override.startswith("train.resume") for override in overrides)
    alone = tmp_path / "alone"
    done = run_script("train.py", *overrides, f"hydra.run.dir={alone}", before=UNDRAWN)
    assert done.returncode == 0, done.stderr
    assert metrics_of(alone) == metrics_of(job)
    typed = shlex.split(text_of(alone, "command"))
    assert typed[-len(overrides) - 1 :] == [*overrides, f"hydra.run.dir={alone}"]


def test_a_run_without_hydras_files_records_the_command_as_typed(config, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.orig_argv", ["/usr/bin/python3", "mine.py", "a b"])
    notes = tmp_path / ".hydra"
    notes.mkdir()
    for hydra in (None, "", "{", "hydra: {mode: null}", "- 1", "\xff"):
        if hydra is not None:
            (notes / "overrides.yaml").write_text("[seed=1]")
            (notes / "hydra.yaml").write_bytes(hydra.encode("latin-1"))
        Records(tmp_path, config, config_text="").close()
        assert text_of(tmp_path, "command").strip() == "python mine.py 'a b'"


@pytest.mark.parametrize(
    ("latent_dim", "count", "classes", "gain"),
    [
        (1, 1, 1, 1.0),
        pytest.param(1, 100, 47, 0.0, marks=pytest.mark.slow),
        pytest.param(2, 3, 1, 1.0, marks=pytest.mark.slow),
        (2, 100, 47, 0.0),
        (40, 100, 47, 1.0),
    ],
)
def test_pictures_of_few_images_one_class_many_classes_and_a_collapsed_model(
    config, tmp_path, latent_dim, count, classes, gain
):
    torch.manual_seed(0)
    vae, x = VAE(latent_dim=latent_dim, intermediate_dim=8), torch.rand(count, 784)
    with torch.no_grad():
        vae.posterior.mean.weight.mul_(gain)
    records = Records(tmp_path, config, config_text="")
    labels = torch.arange(count) % classes
    records.figures(1, vae, x, labels)
    records.growth(1, vae, x[:10])
    records.projector(vae, x, labels)
    records.close()
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    expected = {"reconstructions", "samples", "latent", "traversal", "kl"}
    expected |= {"interpolation"} if classes > 1 else set()
    assert drawn == expected | ({"manifold"} if latent_dim == 2 else set())
    for name in drawn:
        with Image.open(tmp_path / "figures" / f"{name}.png") as image:
            assert len(image.convert("L").getcolors()) > 1  # neither NaN nor a blank picture


def pictures_in(run_dir):
    return {path.stem for path in (run_dir / "figures").glob("*.png")}


def written(config, run_dir, vae, x, labels):
    records = Records(run_dir, config, config_text="")
    records.figures(1, vae, x, labels)
    for epoch in (1, 2):
        records.growth(epoch, vae, x[:10])
    records.projector(vae, x, labels)
    history = {"epoch": [1], "test/elbo": [1.0], "seconds": [1.0]}
    records.finish(history, {})
    return run_dir


@pytest.mark.parametrize(
    ("shape", "labelled"),
    [
        ((3, 12, 20), True),
        pytest.param((3, 20, 12), False, marks=pytest.mark.slow),
        pytest.param((1, 12, 20), True, marks=pytest.mark.slow),
        ((20, 12), False),
    ],
)
def test_records_of_colour_rectangles_and_unlabelled_images(
    config, tmp_path, caplog, shape, labelled
):
    x = torch.rand(12, *shape)
    vae = VAE(shape, 2, 8, likelihood="gaussian")
    labels = torch.arange(12) % 3 if labelled else None
    run_dir = written(config, tmp_path, vae, x, labels)
    everything = {"reconstructions", "samples", "latent", "traversal", "interpolation", "manifold"}
    assert pictures_in(run_dir) == everything | {"kl"}
    assert not caplog.records
    with Image.open(run_dir / "figures" / "growth.gif") as image:
        assert image.n_frames == 2
    with Image.open(run_dir / "figures" / "samples.png") as image:
        assert image.mode == ("RGB" if shape[0] == 3 else "L")
    (folder,) = (run_dir / "tensorboard").glob("*/latents")
    assert (folder / "metadata.tsv").exists() == labelled
    with Image.open(folder / "sprite.png") as sprite:
        side = 20  # a square that holds the image, 4 in a row
        assert sprite.size == (4 * side, 4 * side)
        pixels = torch.tensor(np.asarray(sprite.convert("RGB"))) / 255
    tall = shape[-2:] == (20, 12)
    first = pixels[:20, 4:16] if tall else pixels[4:16, :20]
    assert (pixels[:20, :4] if tall else pixels[:4, :20]).min() == 1  # the border is white
    if shape[0] == 3:
        assert (first - x[0].movedim(0, -1)).abs().max() < 0.01
    elif not labelled:  # black ink on white
        assert (first - (1 - x[0].reshape(*shape[-2:], 1))).abs().max() < 0.01


def test_vectors_have_the_figures_that_need_no_images_and_one_line_says_so(
    config, tmp_path, caplog
):
    vae, x = VAE((21,), 2, 8, likelihood="gaussian"), torch.rand(12, 21)
    run_dir = written(config, tmp_path, vae, x, None)
    assert pictures_in(run_dir) == {"latent", "kl"}
    (warning,) = caplog.messages
    assert warning.startswith("figures: only those without images (images have shape (1, 21)")
    assert "\n" not in warning
    assert not (run_dir / "figures" / "growth.gif").exists()
    (folder,) = (run_dir / "tensorboard").glob("*/latents")
    assert not (folder / "sprite.png").exists()


# TensorBoard's thread reopens its file for every write
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_records_that_were_moved_away_are_not_made_again(config, small_vae, tmp_path):
    run_dir = tmp_path / "run"
    records = Records(run_dir, config, config_text="")
    x, labels = torch.rand(12, 784), torch.arange(12) % 10
    records.log({"epoch": 1, "test/elbo": 1.0})  # waits for TensorBoard's writer thread
    run_dir.rename(tmp_path / "elsewhere")
    for write in (
        lambda: records.log({"epoch": 2, "test/elbo": 1.0}),
        lambda: records.figures(1, small_vae, x, labels),
        lambda: records.growth(1, small_vae, x[:10]),
        lambda: records.projector(small_vae, x, labels),
    ):
        with pytest.raises(FileNotFoundError):
            write()
        assert not run_dir.exists()
    with suppress(OSError):
        records.close()
