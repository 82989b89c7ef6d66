"""The typed configuration of a run, and the checks that Hydra's type system cannot express.

`conf/` holds the values of a run; a default written here means that a feature is off.
Nothing here imports Hydra or torch: a script's `--help` must stay quick.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

# The allowed words of every key that takes one of a few.
CHOICES: dict[str, tuple[str, ...]] = {
    "precision": ("fp32", "medium", "bf16"),
    "likelihood": ("bernoulli", "continuous_bernoulli", "gaussian"),
    "prior": ("standard", "mixture", "vamp"),
    "model.name": ("mlp", "residual", "conv"),
    "model.activation": ("relu", "tanh", "silu", "gelu"),
    "data.name": ("mnist", "fashion_mnist", "kmnist", "emnist", "qmnist"),
    "data.binarize": ("none", "dynamic", "static"),
    "objective.name": ("elbo", "iwae", "keras"),
    "objective.estimator": ("standard", "dreg"),
    "optimizer.name": ("adam", "adamw", "sgd"),
    "optimizer.schedule": ("constant", "cosine"),
}

# Keys that say where and how a run is made, not what it is: it may go on with others, and they are
# no part of its name. (`conf/train.yaml` has to list them again.)
INCIDENTAL = (
    "data.root",
    "device",
    "threads",
    "train.resume",
    "train.figure_every",
    "train.checkpoint_every",
    "train.prune_after",
)


class ConfigError(ValueError):
    """A user's mistake in a run's settings: one line that names key, value and remedy."""


@dataclass
class ModelConfig:
    """The encoder and decoder, which mirror each other."""

    name: str
    latent_dim: int
    intermediate_dim: int
    depth: int = 1  # hidden layers of the mlp, blocks of the residual network
    activation: str = "relu"
    mean_bias: bool = False  # the output bias starts at the mean training image


@dataclass
class DataConfig:
    """Which images, how many, in what form."""

    name: str
    root: str
    batch_size: int
    binarize: str
    limit_train: int | None = None  # the first N images; None is all of them
    limit_test: int | None = None
    hold_out: int = 0  # validate on the last N training images and leave the test set alone


@dataclass
class ObjectiveConfig:
    """What is minimised. The logged `elbo` stays the plain bound, whatever stands here."""

    name: str = "elbo"
    beta: float = 1.0  # weight of the KL
    beta_warmup_epochs: float = (
        0.0  # the weight grows linearly from 0 to beta over this many epochs
    )
    free_bits: float = 0.0  # nats per latent dimension that the KL may cost for nothing
    num_samples: int = 1  # draws of z per image
    early_samples: int | None = None  # iwae: draws in the first epochs, where fewer do
    early_epochs: int = 0  # how many these are
    estimator: str = "standard"
    resample: bool = False  # the gradient goes through one of the draws, chosen by its weight


@dataclass
class OptimizerConfig:
    """The optimiser and its learning-rate schedule."""

    name: str
    lr: float
    eps: float
    schedule: str
    weight_decay: float = 0.0


@dataclass
class TrainConfig:
    """The loop."""

    epochs: int
    figure_every: int  # epochs; 0 draws figures only at the end
    checkpoint_every: Any  # epochs, or minutes: 10min
    resume: str | None = None
    ema: float = 0.0  # decay of the averaged weights per step; 0 keeps none
    prune_after: int = 0  # epochs until a sweep's run that is behind stops; 0: none does


@dataclass
class Config:
    """A whole run: what `scripts/train.py` composes from `conf/` and a checkpoint remembers."""

    seed: int
    device: str
    precision: str
    compile: bool
    likelihood: str
    prior: str
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    prior_components: int = 500  # of the mixture and VampPrior; the standard normal has none
    threads: int | None = None  # CPU threads of this run; None leaves torch's choice

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, as it is stored in checkpoints and summaries."""
        return asdict(self)


@dataclass
class EvalConfig:
    """How `scripts/evaluate.py` estimates."""

    num_samples: int
    fit_images: int
    chunk: int
    seed: int
    checkpoint: str
    limit: int | None = None
    exact: bool | None = None  # integrate over the latents; None does so for one or two of them
    overwrite: bool = False  # replace a card of more images or samples


@dataclass
class EvaluateConfig:
    """What `scripts/evaluate.py` composes from `conf/evaluate.yaml`."""

    run: str
    device: str
    data_root: str | None
    eval: EvalConfig


def check_evaluate(config: EvaluateConfig) -> None:
    """Refuse what cannot be evaluated.

    Raises:
        ConfigError: One line with the key, its value and what is allowed.
    """
    for key in ("num_samples", "fit_images", "chunk", "limit"):
        value = getattr(config.eval, key)
        if value is not None and value < 1:
            raise ConfigError(f"eval.{key}={value}: must be a whole number, 1 or more")
    if not 0 <= config.eval.seed < 2**32:
        raise ConfigError(f"eval.seed={config.eval.seed}: must be between 0 and 4294967295")
    if not config.run:
        raise ConfigError("run=: must be a run folder, run=outputs/<date>/<time>")
    if config.eval.checkpoint not in ("last", "best"):
        raise ConfigError(f"eval.checkpoint={config.eval.checkpoint}: must be one of last, best")


@dataclass
class ExploreConfig:
    """What `scripts/explore.py` composes from `conf/explore.yaml`."""

    run: str
    device: str
    data_root: str | None
    checkpoint: str
    points: int


def check_explore(config: ExploreConfig) -> None:
    """Refuse what cannot be explored.

    Raises:
        ConfigError: One line with the key, its value and what is allowed.
    """
    if not config.run:
        raise ConfigError("run=: must be a run folder, run=outputs/<date>/<time>")
    if config.checkpoint not in ("last", "best"):
        raise ConfigError(f"checkpoint={config.checkpoint}: must be one of last, best")
    if config.points < 1:
        raise ConfigError(f"points={config.points}: must be a whole number, 1 or more")


def config_from_dict(values: dict[str, Any]) -> Config:
    """Rebuild a `Config` from `Config.to_dict()`.

    Raises:
        ConfigError: A key is missing, unknown, or has a value of the wrong type.
    """

    def build(cls: type[Any], values: Any, prefix: str) -> Any:
        if not isinstance(values, dict):
            raise ConfigError(f"{prefix or 'config'} is {values!r}; expected a mapping")
        known = {f.name: f for f in fields(cls)}
        if unknown := sorted(map(str, values.keys() - known.keys())):
            raise ConfigError(f"unknown key {prefix}{unknown[0]}")
        for name, value in values.items():
            kind = known[name].type
            if not (isinstance(kind, type) and is_dataclass(kind)) and not _is_a(value, kind):
                kind = getattr(kind, "__name__", kind)
                raise ConfigError(f"{prefix}{name}={value!r}: must be of type {kind}")
        built = {
            name: build(f.type, values[name], f"{prefix}{name}.")
            if isinstance(f.type, type) and is_dataclass(f.type)
            else values[name]
            for name, f in known.items()
            if name in values
        }
        try:
            return cls(**built)
        except TypeError as error:
            raise ConfigError(f"incomplete config: {error}") from None

    config: Config = build(Config, values, "")
    check(config)
    return config


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys: `{"model": {"depth": 1}}` -> `{"model.depth": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a field of this type may have this value."""
    if kind is Any:
        kind = int | str
    if kind is float:
        kind = int | float
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def check(config: Config) -> None:
    """Refuse what no run can use.

    Raises:
        ConfigError: One line with the key, its value and what is allowed.
    """

    def value_of(key: str) -> Any:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        return value

    def need(key: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ConfigError(f"{key}={value_of(key)}: must be {allowed}")

    for key, words in CHOICES.items():
        need(key, value_of(key) in words, "one of " + ", ".join(words))

    _numbers(value_of, need)
    need("seed", 0 <= config.seed < 2**32, "between 0 and 4294967295")
    check_device(config.device)
    need("train.ema", 0 <= config.train.ema < 1, "at least 0 (off) and below 1")

    checkpoint_interval(config.train.checkpoint_every)
    _combinations(config)


def check_device(device: str) -> None:
    """Refuse what is no device, on any machine.

    Raises:
        ConfigError: One line with the key, its value and what is allowed.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise ConfigError(f"device={device}: must be auto, cpu, cuda or cuda:N")


def checkpoint_interval(every: int | str) -> tuple[int, float]:
    """Epochs (0: not by epochs) and seconds (infinite: not by time) between two checkpoints.

    Raises:
        ConfigError: Neither a number of epochs nor minutes.
    """
    if found := re.fullmatch(r"(\d{1,9})|(\d{1,9}(?:\.\d+)?)min", str(every)):
        epochs, minutes = found.groups()
        if minutes and float(minutes) > 0:
            return 0, 60 * float(minutes)
        if epochs and int(epochs) > 0:
            return int(epochs), math.inf
    raise ConfigError(
        f"train.checkpoint_every={every}: must be epochs, 1 or more, or minutes such as 10min"
    )


def check_objective(objective: ObjectiveConfig, *, likelihood: str, prior: str) -> None:
    """Refuse options that the chosen objective would ignore, or that do not go with the model.

    Raises:
        ConfigError: One line with the key, its value and what is allowed.
    """
    for key in ("name", "estimator"):
        words = CHOICES[f"objective.{key}"]
        if getattr(objective, key) not in words:
            raise ConfigError(
                f"objective.{key}={getattr(objective, key)}: must be one of {', '.join(words)}"
            )
    if objective.estimator == "dreg" and objective.name != "iwae":
        raise ConfigError(
            f"objective.estimator=dreg with objective.name={objective.name}: the doubly "
            "reparameterised gradient is of the importance-weighted bound; use objective=iwae"
        )
    if bool(objective.early_epochs) != (objective.early_samples is not None):
        raise ConfigError(
            f"objective.early_epochs={objective.early_epochs}, objective.early_samples="
            f"{objective.early_samples}: one says nothing without the other; set both or neither"
        )
    if objective.early_epochs and objective.name != "iwae":
        raise ConfigError(
            f"objective.early_epochs={objective.early_epochs} with objective.name="
            f"{objective.name}: more draws later tighten the importance-weighted bound only; use "
            "objective=iwae"
        )
    if objective.early_samples is not None and not (
        1 <= objective.early_samples < objective.num_samples
    ):
        raise ConfigError(
            f"objective.early_samples={objective.early_samples} with objective.num_samples="
            f"{objective.num_samples}: must be 1 or more, and fewer than come later"
        )
    one_draw = 1 in (objective.num_samples, objective.early_samples)
    if objective.resample and (objective.name != "iwae" or one_draw):
        raise ConfigError(
            f"objective.resample=true with objective.name={objective.name}, objective.num_samples="
            f"{objective.num_samples}, objective.early_samples={objective.early_samples}: there is "
            "nothing to choose from; use objective=iwae with several samples"
        )
    if objective.name != "elbo" and (objective.beta, objective.free_bits) != (1, 0):
        raise ConfigError(
            f"objective.beta={objective.beta}, objective.free_bits={objective.free_bits} with "
            f"objective={objective.name}: both are of objective=elbo; leave them out"
        )
    if objective.name == "keras" and objective.beta_warmup_epochs:
        raise ConfigError(
            f"objective.beta_warmup_epochs={objective.beta_warmup_epochs} with objective=keras: "
            "the notebook warms up nothing; use objective=elbo or objective=iwae"
        )
    if objective.free_bits > 0 and prior != "standard":
        raise ConfigError(
            f"objective.free_bits={objective.free_bits} with prior={prior}: a KL per latent "
            "dimension needs prior=standard"
        )
    if objective.name == "keras" and (likelihood, prior) != ("bernoulli", "standard"):
        raise ConfigError(
            f"objective=keras with likelihood={likelihood}, prior={prior}: the "
            "notebook's loss is for likelihood=bernoulli and prior=standard"
        )


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """Refuse settings that mean nothing.

    Raises:
        ConfigError: One line with the key, its value and what is allowed.
    """

    def need(key: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ConfigError(f"optimizer.{key}={getattr(optimizer, key)}: must be {allowed}")

    for key in ("name", "schedule"):
        words = CHOICES[f"optimizer.{key}"]
        need(key, getattr(optimizer, key) in words, "one of " + ", ".join(words))
    for key in ("lr", "eps"):
        value = getattr(optimizer, key)
        need(key, math.isfinite(value) and value > 0, "a number above 0")
    decay = optimizer.weight_decay
    need("weight_decay", math.isfinite(decay) and decay >= 0, "a number, 0 or more")


def _numbers(value_of: Any, need: Any) -> None:
    many = 2**31 - 1
    ranges: Sequence[tuple[str, int, int]] = (
        ("model.latent_dim", 1, 100_000),
        ("model.intermediate_dim", 1, 100_000),
        ("model.depth", 1, 1000),
        ("data.batch_size", 1, many),
        ("data.limit_train", 1, many),
        ("data.limit_test", 1, many),
        ("data.hold_out", 0, many),
        ("objective.num_samples", 1, 100_000),
        ("objective.early_samples", 1, 100_000),
        ("objective.early_epochs", 0, many),
        ("prior_components", 1, 100_000),
        ("threads", 1, 1024),
        ("train.epochs", 1, many),
        ("train.figure_every", 0, many),
        ("train.prune_after", 0, many),
    )
    for key, low, high in ranges:
        value = value_of(key)
        limited = high < many or (value is not None and value > high)
        words = f"a whole number, {low} or more" + (f" and at most {high}" if limited else "")
        need(key, value is None or low <= value <= high, words)
    need("data.root", bool(value_of("data.root")), "the name of a folder")
    for key in ("objective.beta", "objective.beta_warmup_epochs", "objective.free_bits"):
        need(key, math.isfinite(value_of(key)) and value_of(key) >= 0, "a number, 0 or more")


def _combinations(config: Config) -> None:
    """Refuse options that contradict each other, before an hour is spent on them."""
    objective, binarize = config.objective, config.data.binarize
    if binarize != "none" and config.likelihood != "bernoulli":
        raise ConfigError(
            f"likelihood={config.likelihood} with data.binarize={binarize}: binary pixels have no "
            "density; use likelihood=bernoulli, or data.binarize=none"
        )
    check_objective(objective, likelihood=config.likelihood, prior=config.prior)
    check_optimizer(config.optimizer)
    if config.model.name == "conv" and config.model.depth != 1:
        raise ConfigError(
            f"model.depth={config.model.depth} with model=conv: its depth is fixed; leave it at 1"
        )
    if config.model.mean_bias and (config.model.name == "conv" or config.likelihood != "bernoulli"):
        raise ConfigError(
            f"model.mean_bias=true with model={config.model.name}, likelihood={config.likelihood}: "
            "needs an output bias for every pixel and its logit; use model=mlp or model=residual "
            "and likelihood=bernoulli"
        )
