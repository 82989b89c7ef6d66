from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY
from vae_torch.config import (
    CHOICES,
    INCIDENTAL,
    ConfigError,
    OptimizerConfig,
    check,
    check_optimizer,
    config_from_dict,
)

GROUP_FILES = sorted(p for p in (REPOSITORY / "conf").glob("*/*.yaml"))


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_file_of_conf_composes_to_a_valid_run(composed, path: Path):
    if path.stem == "search":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra `search`")
    config = composed(f"{path.parent.name}={path.stem}")
    check(config)
    if path.parent.name not in ("experiment",):
        assert getattr(config, path.parent.name).name == path.stem


def test_every_allowed_name_has_its_file():
    for group in ("model", "data", "objective"):
        files = {p.stem for p in GROUP_FILES if p.parent.name == group}
        assert files == set(CHOICES[f"{group}.name"])


def test_a_runs_name_leaves_out_what_is_incidental():
    hydra = yaml.safe_load((REPOSITORY / "conf" / "train.yaml").read_text())["hydra"]
    assert set(hydra["job"]["config"]["override_dirname"]["exclude_keys"]) == set(INCIDENTAL)


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
        ("precision=fp16", "fp32, medium, bf16"),
        ("likelihood=poisson", "gaussian"),
        ("prior=uniform", "vamp"),
        ("model.name=transformer", "residual"),
        ("model.activation=selu", "silu"),
        ("data.binarize=true", "dynamic"),
        ("optimizer.schedule=step", "cosine"),
    ],
)
def test_values_out_of_range_name_key_value_and_allowed(composed, override, allowed):
    key, value = override.split("=")
    with pytest.raises(ConfigError, match=key) as caught:
        check(composed(override))
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
        check(composed(*overrides))
    for override in overrides:
        assert override.split("=")[1] in str(caught.value)


def test_evaluate_settings_compose():
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    from vae_torch.config import EvaluateConfig, check_evaluate

    ConfigStore.instance().store(name="schema_evaluate", node=EvaluateConfig)
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        config = OmegaConf.to_object(compose("evaluate", ["run=somewhere"]))
    check_evaluate(config)
    assert config.eval.num_samples == 5000
    for key, value in (("num_samples", 0), ("chunk", 0), ("limit", 0), ("checkpoint", "first")):
        bad = replace(config, eval=replace(config.eval, **{key: value}))
        with pytest.raises(ConfigError, match=f"eval.{key}={value}"):
            check_evaluate(bad)


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
