import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from vae_torch.cli.names import run_name
from vae_torch.cli.sweeps import jobs_of
from vae_torch.config import (
    INCIDENTAL,
    ConfigError,
    OptimizerConfig,
    check,
    check_optimizer,
    config_from_dict,
)
from vae_torch.data import data_sources
from vae_torch.parts.networks import networks
from vae_torch.parts.objectives import objectives

GROUP_FILES = sorted(p for p in (REPOSITORY / "conf").glob("*/*.yaml"))


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_file_of_conf_composes_to_a_valid_run(composed, path: Path):
    for name, plugin in (("search", "hydra_optuna_sweeper"), ("ray", "hydra_ray_launcher")):
        if path.stem == name:
            pytest.importorskip(f"hydra_plugins.{plugin}", reason=f"needs the extra `{name}`")
    config = composed(f"{path.parent.name}={path.stem}")
    check(config)
    if path.parent.name not in ("experiment", "where"):
        assert getattr(config, path.parent.name).name == path.stem


def test_every_allowed_name_has_its_file():
    for group, names in (
        ("model", networks),
        ("data", data_sources),
        ("objective", objectives),
    ):
        files = {p.stem for p in GROUP_FILES if p.parent.name == group}
        # a plug-in of another test may have added to the table
        own = {name for name, part in names.items() if part.__module__.startswith("vae_torch.")}
        assert files == own


def test_a_runs_name_leaves_out_what_is_incidental():
    incidental = [f"{key}=x" for key in (*INCIDENTAL, "where", "sweep.dir")]
    assert run_name(incidental) == ""
    assert run_name([*incidental, "seed=1"]) == "seed-1"


def test_a_sweeps_names_begin_with_what_it_varies():
    job = ["data.limit_train=1000", "model.latent_dim=8", "train.epochs=2", "seed=1"]
    name = run_name(job, ["seed", "model.latent_dim"])
    assert name == "model.latent_dim-8_seed-1_data.limit_train-1000_train.epochs-2"
    assert run_name(reversed(job), ["model.latent_dim", "seed"]) == name


def test_a_grids_jobs_are_those_that_hydra_makes():
    swept, names = jobs_of(
        ["seed=0,1,2", "train.epochs=2", "model.latent_dim=range(2,4)", "seed=5,6"]
    )
    assert swept == ["seed", "model.latent_dim"]
    assert set(names) == {
        f"model.latent_dim-{dim}_seed-{seed}_train.epochs-2" for dim in (2, 3) for seed in (5, 6)
    }


def test_names_are_short_safe_and_different():
    long = [f"model.some_key_{n}=value" for n in range(40)]
    odd = [
        [*long, "seed=0"], [*long, "seed=1"], ["a=ü"], ["a=ö"], ["a=b c"], ["a=b,c"], ["a=../x"],
        ["optimizer.lr=0.0012345678901"], ["optimizer.lr=0.0012345678902"], ["a='b=c'"],
    ]  # fmt: skip
    names = [run_name(overrides) for overrides in odd]
    assert len(set(names)) == len(odd)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_.+-]{1,130}", name), name
        assert not name.startswith(".")
    assert run_name(["optimizer.lr=0.0012345678901"]).startswith("optimizer.lr-0.001235_")


def test_defaults_are_the_notebooks(config):
    assert (config.model.name, config.model.latent_dim, config.model.intermediate_dim) == (
        "mlp",
        2,
        512,
    )
    assert (config.train.epochs, config.data.batch_size, config.optimizer.lr) == (50, 128, 1e-3)
    assert config.objective.name == "elbo"


def test_keras_experiment_is_the_notebook(composed):
    config = composed("experiment=keras_notebook")
    assert config.objective.name == "keras"
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.eps) == (
        "adam",
        1e-3,
        1e-7,
    )


def test_an_experiment_has_the_last_word(composed):
    strong = composed("experiment=strong")
    assert (strong.prior, strong.data.binarize, strong.model.latent_dim) == (
        "mixture",
        "dynamic",
        40,
    )
    assert strong.train.ema > 0
    assert strong.train.epochs != composed().train.epochs
    assert composed("experiment=strong", "train.epochs=3").train.epochs == 3
    assert composed("experiment=burda_static").optimizer.schedule == "cosine"  # by way of burda_vae


def test_dict_round_trip(config):
    assert config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("model.latent_dim=0", "1 or more"),
        ("model.intermediate_dim=-3", "1 or more"),
        ("model.depth=0", "1 or more"),
        ("data.batch_size=-1", "1 or more"),
        ("data.limit_train=0", "1 or more"),
        ("data.hold_out=-1", "0 or more"),
        ("optimizer.lr=nan", "above 0"),
        ("optimizer.lr=0", "above 0"),
        ("optimizer.lr=inf", "above 0"),
        ("optimizer.weight_decay=-1", "0 or more"),
        ("objective.beta=-1", "0 or more"),
        ("objective.free_bits=nan", "0 or more"),
        ("objective.num_samples=0", "1 or more"),
        ("train.epochs=0", "1 or more"),
        ("train.ema=1", "below 1"),
        ("seed=-1", "between 0 and"),
        ("device=tpu", "cuda:N"),
        ("device=cuda:99999999999999999999", "cuda:N"),
        ("threads=2147483647", "at most 1024"),
        ("model.latent_dim=2147483647", "at most 100000"),
        ("precision=fp8", "fp32, medium, bf16, fp16"),
        ("likelihood=poisson", "gaussian"),
        ("prior=uniform", "vamp"),
        ("model.name=transformer", "residual"),
        ("model.activation=selu", "silu"),
        ("data.binarize=true", "dynamic"),
        ("optimizer.schedule=linear", "cosine"),
    ],
)
def test_values_out_of_range_name_key_value_and_allowed(changed, override, allowed):
    key, value = override.split("=")
    with pytest.raises(ConfigError, match=key.removesuffix(".name")) as caught:
        changed(override)
    line = str(caught.value)
    assert value.lower() in line.lower()
    assert allowed in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "overrides",
    [
        ["likelihood=gaussian", "data.binarize=dynamic"],
        ["objective.estimator=dreg"],
        ["objective=iwae", "objective.beta=2.0"],
        ["objective.resample=true"],
        ["objective=iwae", "objective.num_samples=1", "objective.resample=true"],
        ["objective.early_samples=2", "objective.early_epochs=2"],
        ["objective.free_bits=1", "prior=vamp"],
        ["objective=keras", "likelihood=gaussian"],
        ["objective=keras", "objective.beta=4.0"],
        ["objective=keras", "objective.beta_warmup_epochs=5.0"],
        ["model=conv", "model.depth=7"],
        ["model=conv", "model.mean_bias=true"],
    ],
)
def test_contradictions_name_both_keys(composed, overrides):
    with pytest.raises(ConfigError) as caught:
        composed(*overrides)
    for override in overrides:
        assert override.split("=")[1] in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "Adam"}, "optimizer.name=Adam: must be one of adam, adamw, sgd"),
        ({"schedule": "cos"}, "optimizer.schedule=cos: must be one of constant, cosine"),
        ({"lr": 0.0}, "optimizer.lr=0.0: must be a number above 0"),
        ({"weight_decay": -1.0}, "optimizer.weight_decay=-1.0"),
    ],
)
def test_an_optimizer_that_means_nothing_is_refused(change, words):
    good = OptimizerConfig("adam", 1e-3, 1e-8, "constant")
    check_optimizer(good)
    with pytest.raises(ConfigError, match=words):
        check_optimizer(replace(good, **change))
