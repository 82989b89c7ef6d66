"""What a run's TensorBoard files show."""

import json
import shlex
import textwrap
from contextlib import suppress

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.command_lines import run_script
from vae_torch import VAE
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
    """By the alphabet, in which TensorBoard's first page shows its groups."""
    records = Records(tmp_path, config, config_text="")
    records.log({"epoch": 1, "train/elbo": 1.0, "test/elbo": 1.0, "test/kl_per_dim": [0.5, 0.5]})
    records.figures(1, small_vae, torch.rand(20, 784), torch.arange(20) % 10)
    records.close()
    entry = {"value": 1.0, "standard_error": 0.1, "unit": "nats", "definition": "a bound"}
    add_evaluation(tmp_path, {"elbo": entry, "verdict": []}, 1)
    tags = events_of(tmp_path).Tags()
    # of pictures and scalars, which the page shows; not of texts
    groups = {tag.split("/")[0] for kind in ("scalars", "tensors") for tag in tags[kind]}
    order = sorted(groups - {"command", "config", "evaluation", "custom_scalars__config__"})
    assert order == ["test", "train", "trained", "visuals", "z_test_kl"]
    pictures = sorted(tag for tag in tags["tensors"] if tag.startswith("visuals/"))
    assert [tag.split("_", 1)[1] for tag in pictures][:3] == [
        "reconstructions",
        "samples",
        "latent",
    ]


def test_the_command_of_a_sweeps_job_runs_that_job_alone(made_up_root, tmp_path):
    settings = [
        "data=fashion_mnist", f"data.root={made_up_root}", "model.intermediate_dim=8",
        "train.epochs=1", "train.figure_every=0",
    ]  # fmt: skip
    sweep = run_script("train.py", "-m", *settings, "seed=3", f"sweep.dir={tmp_path / 'sweep'}")
    assert sweep.returncode == 0, sweep.stderr
    (job,) = (path.parent for path in (tmp_path / "sweep").glob("*/summary.json"))
    python, script, *overrides = shlex.split(text_of(job, "command"))
    assert (python, script) == ("python", "scripts/train.py")
    assert not any(override.startswith("train.resume") for override in overrides)
    alone = tmp_path / "alone"
    done = run_script("train.py", *overrides, f"hydra.run.dir={alone}")
    assert done.returncode == 0, done.stderr
    assert metrics_of(alone) == metrics_of(job)
    typed = shlex.split(text_of(alone, "command"))
    assert typed[-len(overrides) - 1 :] == [*overrides, f"hydra.run.dir={alone}"]


def test_the_command_of_a_run_without_hydras_notes_is_what_was_typed(config, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.orig_argv", ["/usr/bin/python3", "mine.py", "a b"])
    notes = tmp_path / ".hydra"
    notes.mkdir()
    for hydra in (None, "", "{", "hydra: {mode: null}", "- 1", "\xff"):
        if hydra is not None:
            (notes / "overrides.yaml").write_text("[seed=1]")
            (notes / "hydra.yaml").write_bytes(hydra.encode("latin-1"))
        Records(tmp_path, config, config_text="").close()
        assert text_of(tmp_path, "command").strip() == "python mine.py 'a b'"


@pytest.mark.parametrize("latent_dim", [1, 2, 40])
@pytest.mark.parametrize(("count", "classes"), [(1, 1), (3, 1), (100, 47)])
@pytest.mark.parametrize("gain", [0.0, 1.0])
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
            assert len(image.convert("L").getcolors()) > 1  # no NaN and no blank sheet


# TensorBoard's thread opens its file anew at every write
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_records_that_were_moved_away_are_not_made_again(config, small_vae, tmp_path):
    run_dir = tmp_path / "run"
    records = Records(run_dir, config, config_text="")
    x, labels = torch.rand(12, 784), torch.arange(12) % 10
    records.log({"epoch": 1, "test/elbo": 1.0})  # waits for the thread that writes TensorBoard's
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
