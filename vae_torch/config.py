"""The settings of a run, and what each may be.

`conf/` holds the values of a run; a default written here means that a feature is off. Ranges and
choices stand beside their field, for pydantic to check; combinations are written out below.
Nothing here imports Hydra or torch: a script's `--help` must stay quick.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)
from pydantic.fields import FieldInfo

Settings = TypeVar("Settings")


class ConfigError(ValueError):
    """A user's mistake in a run's settings: one line that names key, value and remedy."""


def check_device(device: str) -> str:
    """Refuse what is no device, on any machine.

    Raises:
        ConfigError: One line with the key, its value and what is allowed.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise ConfigError(f"device={device}: must be auto, cpu, cuda or cuda:N")
    return device


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


def _interval(every: int | str) -> int | str:
    checkpoint_interval(every)
    return every


def _folder(value: Any) -> Any:
    """A folder's name as text, with the home folder in place of `~`; Hydra makes 2026 a number."""
    if value is None or isinstance(value, bool):
        return value
    text = str(value)
    return str(Path(text).expanduser()) if text.startswith("~") else text


def _source(value: Any) -> Any:
    """A folder that means the same from wherever the run is resumed."""
    folder = _folder(value)
    return str(Path(folder).absolute()) if folder and isinstance(folder, str) else folder


def _held_out(value: Any) -> Any:
    """A number of images, a share of them, or `test`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value == "test" or (number and (0 < value < 1 or (value >= 0 and value == int(value)))):
        return int(value) if number and value >= 1 else value
    raise ConfigError(
        f"data.hold_out={value}: must be a number of images, 0 or more, a share below 1, or test"
    )


def _image_size(value: Any) -> Any:
    """One side of a square, or [height, width]."""
    sides = value if isinstance(value, list | tuple) else [value, value]
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if value is None or (len(sides) == 2 and whole and all(1 <= n <= 4096 for n in sides)):
        return list(value) if isinstance(value, tuple) else value
    raise ConfigError(f"data.size={value}: must be N or [HEIGHT,WIDTH], each 1 to 4096")


def _channels(value: Any) -> Any:
    if value is None or (value in (1, 3) and not isinstance(value, bool)):
        return value
    raise ConfigError(f"data.channels={value}: must be 1 (grey) or 3 (colour)")


_MANY = 2**31 - 1
Size = Annotated[int, Field(strict=True, ge=1, le=100_000)]
Count = Annotated[int, Field(strict=True, ge=1, le=_MANY)]
CountOrZero = Annotated[int, Field(strict=True, ge=0, le=_MANY)]
Number = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(strict=True, ge=0, lt=1)]
Seed = Annotated[int, Field(strict=True, ge=0, le=2**32 - 1)]
Switch = Annotated[bool, Field(strict=True)]
Folder = Annotated[str, BeforeValidator(_folder), Field(min_length=1)]
Device = Annotated[str, AfterValidator(check_device)]
Interval = Annotated[int | str, AfterValidator(_interval)]
Which = Literal["last", "best"]
Name = Annotated[str, Field(strict=True, min_length=1)]  # of a part: its table knows which


def _options(value: Any) -> Any:
    """Options of a part, checked by the part; a None is an empty group in YAML."""
    return {} if value is None else value


def _listed(value: Any) -> Any:
    """One name, or several."""
    return [value] if isinstance(value, str) else value


def _betas(value: Any) -> Any:
    """Adam's two decays; a tuple in Python, a list in YAML."""
    pair = list(value) if isinstance(value, list | tuple) else None
    numbers = pair is not None and all(
        isinstance(beta, int | float) and not isinstance(beta, bool) for beta in pair
    )
    if pair is None or len(pair) != 2 or not numbers or not all(0 <= beta < 1 for beta in pair):
        raise ConfigError(
            f"optimizer.betas={value}: must be two numbers from 0 to below 1, [0.9,0.999]"
        )
    return pair


Options = Annotated[dict[str, Any], BeforeValidator(_options)]


def about(text: str) -> Any:
    """What a setting means, for `--help` and the reference."""
    return Field(description=text)


Plugins = Annotated[
    list[Name], BeforeValidator(_listed), about("modules with parts of your own: [my_parts]")
]


@dataclass
class ModelConfig:
    """The encoder and decoder, which mirror each other."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Annotated[Name, about("the network: mlp, residual, conv, or one of your own")]
    latent_dim: Annotated[Size, about("dimensions of z")]
    intermediate_dim: Annotated[Size, about("units of a hidden layer")]
    depth: Annotated[
        int,
        Field(strict=True, ge=1, le=1000),
        about("hidden layers of the mlp, blocks of the residual network"),
    ] = 1
    activation: Annotated[Literal["relu", "tanh", "silu", "gelu"], about("between the layers")] = (
        "relu"
    )
    mean_bias: Annotated[
        Switch, about("start the output bias at the mean training image (mlp, residual; bernoulli)")
    ] = False
    options: Annotated[Options, about("of a network of your own")] = field(default_factory=dict)


@dataclass
class DataConfig:
    """Which images, how many, in what form. What is null or none is left to the source."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Annotated[
        str,
        Field(min_length=1),
        about(
            "the images: mnist, fashion_mnist, kmnist, emnist, qmnist, folder, array, torchvision, "
            "larochelle, omniglot, caltech101_silhouettes, or a source of your own"
        ),
    ]
    root: Annotated[Folder, about("the folder where their files are, or go; array: the file")]
    batch_size: Annotated[Count, about("images a training step")]
    binarize: Annotated[
        Literal["none", "dynamic", "static"],
        about("none: grey; dynamic: training pixels drawn anew every epoch; static: drawn once"),
    ]
    limit_train: Annotated[Count | None, about("only the first N training images")] = None
    limit_test: Annotated[Count | None, about("only the first N test images")] = None
    hold_out: Annotated[
        int | float | str,
        BeforeValidator(_held_out),
        about(
            "N, or a share such as 0.1: validate on as many training images, leave the test set "
            "alone; test: the source must have a test set of its own"
        ),
    ] = 0
    classes: Annotated[
        list[int | str] | None, about("only images of these classes, by number or name")
    ] = None
    augment: Annotated[
        Literal["none", "shift", "flip"],
        about("training images moved by up to an eighth of a side, or mirrored, anew every epoch"),
    ] = "none"
    size: Annotated[
        int | list[int] | None,
        BeforeValidator(_image_size),
        about("folder, torchvision: N or [height, width]; resize and crop the images to this size"),
    ] = None
    channels: Annotated[
        int | None, BeforeValidator(_channels), about("folder, torchvision: 1 (grey), 3 (colour)")
    ] = None
    background: Annotated[
        str | None,
        about("folder, torchvision: the colour behind transparent pixels"),
    ] = None
    split: Annotated[str | None, about("emnist, torchvision: the part of the images")] = None
    dataset: Annotated[str | None, about("torchvision: the class, CIFAR10")] = None
    options: Annotated[dict[str, Any], about("options of a source of your own")] = field(
        default_factory=dict
    )


@dataclass
class ObjectiveConfig:
    """What is minimised. The logged `elbo` stays the plain bound, whatever stands here."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Annotated[Name, about("what is minimised")] = "elbo"
    beta: Annotated[Number, about("weight of the KL")] = 1.0
    beta_warmup_epochs: Annotated[
        Number, about("the weight grows linearly from 0 to beta over this many epochs")
    ] = 0.0
    free_bits: Annotated[
        Number, about("nats per latent dimension that the KL may cost for nothing")
    ] = 0.0
    num_samples: Annotated[Size, about("samples of z per image")] = 1
    early_samples: Annotated[
        Size | None, about("iwae: samples in the first epochs, where fewer do")
    ] = None
    early_epochs: Annotated[CountOrZero, about("how many epochs these are")] = 0
    estimator: Annotated[
        Literal["standard", "dreg"], about("iwae: gradients, standard or doubly reparameterised")
    ] = "standard"
    resample: Annotated[
        Switch, about("iwae: the gradient goes through one sample, chosen by its weight")
    ] = False
    options: Annotated[Options, about("of an objective of your own")] = field(default_factory=dict)


@dataclass
class OptimizerConfig:
    """The optimiser and its learning-rate schedule."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Annotated[Literal["adam", "adamw", "sgd"], about("the optimiser")]
    lr: Annotated[Positive, about("learning rate")]
    eps: Annotated[Positive, about("added to Adam's denominator")]
    schedule: Annotated[
        Literal["constant", "cosine", "step", "one_cycle"], about("of the learning rate")
    ]
    weight_decay: Annotated[Number, about("decay of the weights a step, times lr")] = 0.0
    betas: Annotated[
        list[float], BeforeValidator(_betas), about("adam, adamw: decays of the two averages")
    ] = field(default_factory=lambda: [0.9, 0.999])
    momentum: Annotated[Decay, about("sgd: of the gradient")] = 0.0
    clip_norm: Annotated[
        Positive | None, about("largest norm of the gradient; a longer one is scaled down to it")
    ] = None
    warmup_steps: Annotated[
        CountOrZero, about("the learning rate grows linearly over the first N steps")
    ] = 0
    step_epochs: Annotated[
        Count | None, about("schedule=step: epochs after which the learning rate falls")
    ] = None
    step_factor: Annotated[
        Annotated[float, Field(strict=True, gt=0, lt=1)], about("schedule=step: what it falls to")
    ] = 0.1


@dataclass
class TrainConfig:
    """The loop."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    epochs: Annotated[Count, about("passes over the training images")]
    figure_every: Annotated[CountOrZero, about("epochs between figures; 0: only at the end")]
    checkpoint_every: Annotated[Interval, about("epochs, or minutes: 10min")]
    resume: Annotated[
        str | None,
        BeforeValidator(_folder),
        about("DIR: resume the run in DIR; auto: the newest interrupted run of these settings"),
    ] = None
    allow_other_code: Annotated[
        Switch, about("resume a run, and count one as finished, that other code has made")
    ] = False
    monitor: Annotated[
        str,
        Field(min_length=1),
        about("the metric that chooses the best epoch and the best run; auto: the bound trained"),
    ] = "auto"
    ema: Annotated[Decay, about("decay of averaged weights a step; 0: keep none")] = 0.0
    prune_after: Annotated[
        CountOrZero, about("epochs until a sweep's run that is behind stops; 0: none does")
    ] = 0
    patience: Annotated[
        Count | None, about("stop after N epochs without a better test elbo; null: never")
    ] = None
    min_delta: Annotated[
        Number, about("with patience: what an epoch must be better by, in nats")
    ] = 0.0
    init_from: Annotated[
        Annotated[str, Field(min_length=1)] | None,
        BeforeValidator(_source),
        about("DIR: start from the weights of the run or release in DIR"),
    ] = None
    init_checkpoint: Annotated[Which, about("of init_from: last, or best")] = "last"


@dataclass
class Config:
    """A whole run: what `scripts/train.py` composes from `conf/` and a checkpoint remembers."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    seed: Annotated[Seed, about("of weights, order and noise")]
    device: Annotated[Device, about("auto, cpu, cuda, cuda:N")]
    precision: Annotated[
        Literal["fp32", "medium", "bf16"],
        about("fp32; medium: fp32 tensors, quicker products; bf16: autocast"),
    ]
    compile: Annotated[Switch, about("torch.compile the training step")]
    likelihood: Annotated[Name, about("p(x|z) of a pixel")]
    prior: Annotated[Name, about("p(z)")]
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    prior_components: Annotated[Size, about("of the mixture and the VampPrior")] = 500
    posterior: Annotated[Name, about("q(z|x)")] = "gaussian"
    likelihood_options: Annotated[Options, about("of the likelihood")] = field(default_factory=dict)
    prior_options: Annotated[Options, about("of the prior")] = field(default_factory=dict)
    posterior_options: Annotated[Options, about("of the posterior")] = field(default_factory=dict)
    plugins: Plugins = field(default_factory=list)
    threads: Annotated[
        int | None, Field(strict=True, ge=1, le=1024), about("CPU threads; null: torch's choice")
    ] = None

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, as it is stored in checkpoints and summaries."""
        return asdict(self)


@dataclass
class EvalConfig:
    """How `scripts/evaluate.py` estimates."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    num_samples: Annotated[Count, about("importance samples per image, of log_px_encoder")]
    fit_images: Annotated[Count, about("images that get a posterior of their own")]
    chunk: Annotated[
        Count | None,
        about("decoder rows at once: bounds memory, changes no figure; null: 1024, on CUDA 65536"),
    ]
    seed: Annotated[Seed, about("of all noise")]
    checkpoint: Annotated[Which, about("last, or best: see train.monitor")]
    limit: Annotated[Count | None, about("only the first N test images")] = None
    fit_samples: Annotated[
        Count, about("importance samples per image from its fitted proposal, of log_px")
    ] = 1000
    ais: Annotated[
        Count | None, about("images, drawn at random, that get annealed importance sampling too")
    ] = None
    exact: Annotated[
        bool | None,
        Field(strict=True),
        about("log p(x) by integration; null: where there are 1 or 2 latents"),
    ] = None
    overwrite: Annotated[Switch, about("replace an evaluation.json of more images or samples")] = (
        False
    )


@dataclass
class EvaluateConfig:
    """What `scripts/evaluate.py` composes from `conf/evaluate.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    run: Annotated[Folder, about("the run's folder")]
    device: Annotated[Device, about("auto, cpu, cuda, cuda:N")]
    data_root: Annotated[Folder | None, about("where the images are; null: where the run had them")]
    eval: EvalConfig
    plugins: Plugins = field(default_factory=list)


@dataclass
class ExploreConfig:
    """What `scripts/explore.py` composes from `conf/explore.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    run: Annotated[Folder, about("the run's folder")]
    device: Annotated[Device, about("auto, cpu, cuda, cuda:N")]
    data_root: Annotated[Folder | None, about("where the images are; null: where the run had them")]
    checkpoint: Annotated[Which, about("last, or best: see train.monitor")]
    points: Annotated[Count, about("images shown as points, at most")]
    plugins: Plugins = field(default_factory=list)


@dataclass
class EncodeConfig:
    """What `scripts/encode.py` composes from `conf/encode.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    run: Annotated[Folder, about("the run's folder")]
    out: Annotated[Folder | None, about("the file to write: FILE.npz, .csv or .parquet")]
    device: Annotated[Device, about("auto, cpu, cuda, cuda:N")]
    data_root: Annotated[Folder | None, about("where the images are; null: where the run had them")]
    checkpoint: Annotated[Which, about("last, or best: see train.monitor")]
    split: Annotated[Literal["train", "test"], about("which images, where there are both")]
    num_samples: Annotated[Count, about("importance samples per image, of log p(x)")]
    chunk: Annotated[Count, about("decoder rows at once: bounds memory, changes no figure")]
    seed: Annotated[Seed, about("of all noise")]
    images: Annotated[
        Folder | None, about("a folder, .npz or .npy of images; null: the run's own")
    ] = None
    reconstructions: Annotated[Switch, about("write the reconstructed images too (.npz)")] = False
    plugins: Annotated[
        list[Name],
        BeforeValidator(_listed),
        about("modules with parts of your own that the run has: [my_parts]"),
    ] = field(default_factory=list)


@dataclass
class SampleConfig:
    """What `scripts/sample.py` composes from `conf/sample.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    run: Annotated[Folder, about("the run's folder, or a release")]
    device: Annotated[Device, about("auto, cpu, cuda, cuda:N")]
    checkpoint: Annotated[Which, about("last, or best: see train.monitor")]
    n: Annotated[Count, about("how many images")]
    out: Annotated[Folder, about("the file: .png for a grid, .npz for arrays")]
    temperature: Annotated[Number, about("standard deviations of the prior times this")]
    pixels: Annotated[
        Literal["mean", "draw"], about("mean: expected pixels; draw: samples of p(x|z)")
    ]
    seed: Annotated[Seed, about("of all noise")]
    plugins: Annotated[
        list[Name], BeforeValidator(_listed), about("modules with parts of your own: [my_parts]")
    ] = field(default_factory=list)


@dataclass
class ExportConfig:
    """What `scripts/export.py` composes from `conf/export.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    run: Annotated[Folder, about("the run's folder")]
    out: Annotated[Folder, about("the release's folder, which is made")]
    checkpoint: Annotated[Which, about("last, or best: see train.monitor")]


# Keys that say where and how a run is made, not what it is: it may be resumed with others, and they
# are no part of its name.
INCIDENTAL = (
    "plugins",  # what they bring is named, and their code is part of the run's
    "data.root",
    "device",
    "threads",
    "train.resume",
    "train.allow_other_code",
    "train.figure_every",
    "train.checkpoint_every",
    "train.prune_after",
)


# Keys that a run may be continued with that others have begun: see runs.stages.
STAGE_KEYS = (
    "train.epochs",
    "optimizer.lr",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.step_epochs",
    "optimizer.step_factor",
    "optimizer.clip_norm",
    "train.patience",
    "train.min_delta",
)


# Keys of options that a part's own signature names.
OPTIONS = (
    "data.options",
    "model.options",
    "objective.options",
    "posterior_options",
    "likelihood_options",
    "prior_options",
)


def keys_of(schema: type[Any], prefix: str = "") -> dict[str, Any]:
    """Every setting of a schema by its dotted key, with its annotated type."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(schema, include_extras=True).items():
        if is_dataclass(kind):
            found |= keys_of(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif not name.startswith("__"):
            found[f"{prefix}{name}"] = kind
    return found


# The allowed words of every key of a run that takes one of a few.
CHOICES: dict[str, tuple[str, ...]] = {
    key: get_args(get_args(kind)[0])
    for key, kind in keys_of(Config).items()
    if get_origin(get_args(kind)[0]) is Literal
}


def validated(schema: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Nested values as an instance of `schema`.

    Raises:
        ConfigError: A key is unknown or missing, or a value is not allowed: one line that names
            key, value and what is allowed, or the nearest known key.
    """
    try:
        return TypeAdapter(schema).validate_python(values)
    except ValidationError as error:
        # an unknown key first: what seems to be missing may be it, misspelt
        errors = sorted(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
        raise ConfigError(_line(schema, errors[0])) from None


def _line(schema: type[Any], error: Any) -> str:
    """One of pydantic's errors in this project's words."""
    if isinstance(own := error.get("ctx", {}).get("error"), ConfigError):
        return str(own)
    known = keys_of(schema)
    dotted = ".".join(str(part) for part in error["loc"])
    if error["type"] == "unexpected_keyword_argument":
        return no_such_key(dotted, known)
    key = max((k for k in known if dotted == k or dotted.startswith(f"{k}.")), key=len, default="")
    if error["type"] == "missing":
        return f"{dotted} is missing: give it a value"
    if not key:
        return f"{dotted}={error['input']!r}: must be a group of settings"
    value = error["input"]
    if float in _kinds(known[key]) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    return f"{key}={'null' if value is None else value}: must be {allowed(known[key], value)}"


def no_such_key(key: str, known: Mapping[str, Any]) -> str:
    """What to say about a key that does not exist."""
    ends = {name.rpartition(".")[2]: name for name in known}
    near = get_close_matches(key, known, 1, 0.75) or [
        ends[end] for end in get_close_matches(key.rpartition(".")[2], ends, 1, 0.75)
    ]
    meant = f"did you mean {near[0]}? " if near else ""
    return f"{key}: no such key; {meant}--help lists them"


def _kinds(kind: Any) -> Iterator[Any]:
    """The parts of an annotated type, unions and literals taken apart."""
    yield kind
    for part in get_args(kind):
        yield from _kinds(part)
        if isinstance(part, FieldInfo):
            yield from part.metadata


def allowed(kind: Any, value: Any = None) -> str:
    """What a setting of this annotated type may be, in words; `value` is what it was given."""
    parts = list(_kinds(kind))
    literals = [part for part in parts if get_origin(part) is Literal]
    words = [word for literal in literals for word in get_args(literal)]
    low, above, high, below = (
        next((getattr(part, name) for part in parts if hasattr(part, name)), None)
        for name in ("ge", "gt", "le", "lt")
    )
    if words:
        text = "one of " + ", ".join(dict.fromkeys(words))
    elif int in parts and high is not None:
        exceeded = isinstance(value, int) and value > high
        if high > _MANY:
            text = f"between {low} and {high}"
        elif high < _MANY or exceeded:
            text = f"a whole number, {low} or more and at most {high}"
        else:
            text = f"a whole number, {low} or more"
    elif float in parts:
        text = f"a number above {above}" if above is not None else f"a number, {low} or more"
        if below is not None:
            text = f"at least {low} (off) and below {below}"
    elif bool in parts:
        text = "true or false"
    elif int in parts:
        text = "a whole number"
    else:
        text = "the name of a folder" if any(hasattr(p, "min_length") for p in parts) else "text"
    return f"{text}, or null" if type(None) in parts else text


def config_from_dict(values: Any) -> Config:
    """Rebuild a `Config` from `Config.to_dict()`.

    Raises:
        ConfigError: A key is missing, unknown, or has a value that is not allowed.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"config is {values!r}; expected a mapping"[:200])
    config = validated(Config, values)
    check_combinations(config)
    return config


def check(config: Config) -> None:
    """Refuse what no run can use.

    Raises:
        ConfigError: One line with the key, its value and what is allowed.
    """
    config_from_dict(config.to_dict())


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys: `{"model": {"depth": 1}}` -> `{"model.depth": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def check_objective(objective: ObjectiveConfig) -> None:
    """Refuse options that the chosen objective would ignore.

    Raises:
        ConfigError: One line with the key, its value and what is allowed.
    """
    _check_part("objective", objective)
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
    if objective.name in ("iwae", "keras") and (objective.beta, objective.free_bits) != (1, 0):
        raise ConfigError(
            f"objective.beta={objective.beta}, objective.free_bits={objective.free_bits} with "
            f"objective={objective.name}: both are of objective=elbo; leave them out"
        )
    if objective.name == "keras" and objective.beta_warmup_epochs:
        raise ConfigError(
            f"objective.beta_warmup_epochs={objective.beta_warmup_epochs} with objective=keras: "
            "the notebook warms up nothing; use objective=elbo or objective=iwae"
        )


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """Refuse settings that mean nothing.

    Raises:
        ConfigError: One line with the key, its value and what is allowed.
    """
    _check_part("optimizer", optimizer)
    name, schedule = optimizer.name, optimizer.schedule
    if name == "sgd" and list(optimizer.betas) != [0.9, 0.999]:
        raise ConfigError(
            f"optimizer.betas={optimizer.betas} with optimizer.name=sgd: they are of adam and "
            "adamw; use optimizer.momentum"
        )
    if name != "sgd" and optimizer.momentum:
        raise ConfigError(
            f"optimizer.momentum={optimizer.momentum} with optimizer.name={name}: it is of sgd; "
            "the first of optimizer.betas is Adam's"
        )
    if (schedule == "step") != (optimizer.step_epochs is not None):
        raise ConfigError(
            f"optimizer.step_epochs={_null(optimizer.step_epochs)} with optimizer.schedule="
            f"{schedule}: one says nothing without the other; set optimizer.schedule=step and "
            "optimizer.step_epochs=N, or neither"
        )
    if schedule != "step" and optimizer.step_factor != 0.1:
        raise ConfigError(
            f"optimizer.step_factor={optimizer.step_factor} with optimizer.schedule={schedule}: it "
            "is of optimizer.schedule=step"
        )
    if schedule == "one_cycle" and optimizer.warmup_steps:
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} with optimizer.schedule=one_cycle: "
            "it warms up by itself; leave one of them out"
        )


def _null(value: Any) -> Any:
    return "null" if value is None else value


def _check_part(name: str, part: Any) -> None:
    """The ranges and choices of one group of settings, named as in a whole run."""
    try:
        validated(type(part), asdict(part))
    except ConfigError as error:
        raise ConfigError(f"{name}.{error}") from None


def check_combinations(config: Config) -> None:
    """Refuse options that contradict each other, before an hour is spent on them."""
    objective, binarize = config.objective, config.data.binarize
    if binarize != "none" and config.likelihood in ("continuous_bernoulli", "gaussian"):
        raise ConfigError(
            f"likelihood={config.likelihood} with data.binarize={binarize}: binary pixels have no "
            "density; use likelihood=bernoulli, or data.binarize=none"
        )
    check_objective(objective)
    check_optimizer(config.optimizer)
    if config.train.min_delta and config.train.patience is None:
        raise ConfigError(
            f"train.min_delta={config.train.min_delta} without train.patience: say after how many "
            "epochs without such a gain the run stops, train.patience=N"
        )
    if config.train.init_checkpoint != "last" and config.train.init_from is None:
        raise ConfigError(
            f"train.init_checkpoint={config.train.init_checkpoint} without train.init_from: name "
            "the run whose weights this one starts from, train.init_from=DIR"
        )
    if objective.free_bits > 0 and config.prior != "standard":
        raise ConfigError(
            f"objective.free_bits={objective.free_bits} with prior={config.prior}: a KL per latent "
            "dimension needs prior=standard"
        )
    if objective.name == "keras" and (config.likelihood, config.prior) != ("bernoulli", "standard"):
        raise ConfigError(
            f"objective=keras with likelihood={config.likelihood}, prior={config.prior}: the "
            "notebook's loss is for likelihood=bernoulli and prior=standard"
        )
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
