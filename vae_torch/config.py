"""The settings of a run, and what each may be.

`conf/` holds the values of a run; a default written here means that a feature is off. Ranges and
choices stand beside their field, and pydantic checks them; combinations are checked below. Nothing
here imports Hydra or torch, so that a script's `--help` stays quick.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import reduce
from operator import getitem
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


class UserError(ValueError):
    """A user's mistake: one line that says what is wrong and what to do."""


def in_short(error: Exception, most: int = 120) -> str:
    """An error's message, on one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:most]


class ConfigError(UserError):
    """A mistake in a run's settings: names key, value and remedy."""


class Group:
    """Settings that belong together; an unknown key is refused."""

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Must:
    """What a setting must be, in words, where its type does not say it well."""

    words: str


def check_device(device: str) -> str:
    """Refuse a name that is not a device on any machine."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", device):
        raise ConfigError(f"device={device}: must be auto, cpu, cuda, cuda:N or mps")
    return device


def checkpoint_interval(every: int | str) -> tuple[int, float]:
    """Epochs (0: not by epochs) and seconds (infinite: not by time) between two checkpoints.

    Raises:
        ConfigError: Neither a number of epochs nor of minutes.
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
    """A folder's name as text, with the home folder for `~`; Hydra makes a number of 2026."""
    if value is None or isinstance(value, bool):
        return value
    text = str(value)
    return str(Path(text).expanduser()) if text.startswith("~") else text


def _source(value: Any) -> Any:
    """A folder as an absolute path, so that the run resumes from anywhere."""
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
Side = Annotated[int, Field(strict=True, ge=1, le=4096)]
Which = Literal["last", "best"]
Name = Annotated[str, Field(strict=True, min_length=1)]  # of a part; its table knows the names


# Options of a part, which checks them; None is an empty group in YAML.
Options = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]


def about(text: str) -> Any:
    """What a setting means, for `--help` and the reference."""
    return Field(description=text)


Names = Annotated[
    list[Name], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]
Plugins = Annotated[Names, about("modules with parts of your own: [my_parts]")]
Device = Annotated[
    str,
    AfterValidator(check_device),
    about("where to compute: auto, cpu, cuda, cuda:N, mps (Apple)"),
]
RunFolder = Annotated[Folder, about("the run's folder")]
DataRoot = Annotated[Folder | None, about("the folder of the images; null: that of the run")]
Checkpoint = Annotated[Which, about("last, or best by train.monitor")]
NoiseSeed = Annotated[Seed, about("random seed of all noise")]


@dataclass
class ModelConfig(Group):
    """The encoder and the decoder, which mirrors it."""

    name: Annotated[Name, about("the network: mlp, residual, conv, resnet, or one of your own")]
    latent_dim: Annotated[Size, about("dimensions of z")]
    intermediate_dim: Annotated[Size, about("units of a hidden layer")]
    depth: Annotated[
        int,
        Field(strict=True, ge=1, le=1000),
        about("hidden layers of the mlp, blocks of residual and resnet"),
    ] = 1
    activation: Annotated[
        Literal["relu", "tanh", "silu", "gelu"], about("activation between the layers")
    ] = "relu"
    mean_bias: Annotated[
        Switch, about("start the output bias at the mean training image (mlp, residual; bernoulli)")
    ] = False
    conditional: Annotated[Switch, about("encoder and decoder see the label: p(x|y)")] = False
    options: Annotated[
        Options, about("options of the network: channels of resnet, or those of your own")
    ] = field(default_factory=dict)


@dataclass
class DataConfig(Group):
    """Which images, how many, in what form. With null or none the source decides."""

    name: Annotated[
        str,
        Field(min_length=1),
        about(
            "the images: mnist, fashion_mnist, kmnist, emnist, qmnist, folder, array, torchvision, "
            "larochelle, omniglot, caltech101_silhouettes, or a source of your own"
        ),
    ]
    root: Annotated[Folder, about("folder of the image files, or for downloads; array: the file")]
    batch_size: Annotated[Count, about("images per training step")]
    binarize: Annotated[
        Literal["none", "dynamic", "static"],
        about("none: grey; dynamic: sample training pixels anew every epoch; static: once"),
    ]
    limit_train: Annotated[Count | None, about("only the first N training images")] = None
    limit_test: Annotated[Count | None, about("only the first N test images")] = None
    hold_out: Annotated[
        int | float | str,
        BeforeValidator(_held_out),
        about(
            "N, or a share such as 0.1: validate on this many training images instead of the test "
            "set; test: the source must have a test set of its own"
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
        Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | None,
        Must("N or [HEIGHT,WIDTH], each 1 to 4096"),
        about("folder, torchvision: N or [height, width]; resize and crop the images to this size"),
    ] = None
    channels: Annotated[
        int | None, BeforeValidator(_channels), about("folder, torchvision: 1 (grey), 3 (colour)")
    ] = None
    background: Annotated[
        str | None, about("folder, torchvision: the colour behind transparent pixels")
    ] = None
    split: Annotated[str | None, about("emnist, torchvision: the part of the images")] = None
    dataset: Annotated[str | None, about("torchvision: the class, CIFAR10")] = None
    options: Annotated[
        dict[str, Any], about("array: layout, NCHW or NHWC; and those of a source of your own")
    ] = field(default_factory=dict)


@dataclass
class ObjectiveConfig(Group):
    """What is minimised. The logged `elbo` is always the plain ELBO."""

    name: Annotated[
        Name, about("what is minimised: elbo, iwae, keras, tcvae, or one of your own")
    ] = "elbo"
    beta: Annotated[Number, about("weight of the KL")] = 1.0
    beta_warmup_epochs: Annotated[
        Number, about("the KL's weight grows linearly from 0 to beta over this many epochs")
    ] = 0.0
    free_bits: Annotated[
        Number, about("free bits: nats of KL per latent dimension that cost nothing; 0: off")
    ] = 0.0
    num_samples: Annotated[Size, about("samples of z per image")] = 1
    early_samples: Annotated[
        Size | None, about("iwae: samples in the first epochs, which need fewer")
    ] = None
    early_epochs: Annotated[CountOrZero, about("iwae: number of epochs with early_samples")] = 0
    estimator: Annotated[
        Literal["standard", "dreg"], about("iwae: gradients, standard or doubly reparameterised")
    ] = "standard"
    resample: Annotated[
        Switch, about("iwae: the gradient goes through one sample, drawn by its weight")
    ] = False
    options: Annotated[Options, about("options of an objective of your own")] = field(
        default_factory=dict
    )


@dataclass
class OptimizerConfig(Group):
    """The optimiser and its learning-rate schedule."""

    name: Annotated[Literal["adam", "adamw", "sgd"], about("the optimiser: adam, adamw, sgd")]
    lr: Annotated[Positive, about("the learning rate, at its peak")]
    eps: Annotated[Positive, about("added to Adam's denominator")]
    schedule: Annotated[
        Literal["constant", "cosine", "step", "one_cycle", "plateau"],
        about("how the learning rate changes"),
    ]
    weight_decay: Annotated[Number, about("weight decay per step, times lr")] = 0.0
    betas: Annotated[
        list[Decay],
        Field(min_length=2, max_length=2),
        Must("two numbers from 0 to below 1, [0.9,0.999]"),
        about("adam, adamw: decay rates of the two moments"),
    ] = field(default_factory=lambda: [0.9, 0.999])
    momentum: Annotated[Decay, about("sgd: momentum of the gradient")] = 0.0
    clip_norm: Annotated[
        Positive | None,
        about("largest norm of the gradient; larger gradients are scaled down to it"),
    ] = None
    warmup_steps: Annotated[
        CountOrZero, about("the learning rate grows linearly over the first N steps")
    ] = 0
    step_epochs: Annotated[
        Count | None,
        about("the learning rate falls after N epochs; schedule=plateau: after N without a gain"),
    ] = None
    step_factor: Annotated[
        Annotated[float, Field(strict=True, gt=0, lt=1)],
        about("schedule=step, plateau: factor on the learning rate at each fall"),
    ] = 0.1


@dataclass
class TrainConfig(Group):
    """The loop."""

    epochs: Annotated[Count, about("passes over the training images")]
    figure_every: Annotated[CountOrZero, about("epochs between figures; 0: only at the end")]
    checkpoint_every: Annotated[
        int | str, AfterValidator(_interval), about("epochs, or minutes: 10min")
    ]
    resume: Annotated[
        str | None,
        BeforeValidator(_folder),
        about("DIR: resume the run in DIR; auto: the newest interrupted run of these settings"),
    ] = None
    allow_other_code: Annotated[
        Switch, about("resume a run, or accept it as finished, although other code made it")
    ] = False
    monitor: Annotated[
        str,
        Field(min_length=1),
        about("the metric that chooses the best epoch and the best run; auto: the trained bound"),
    ] = "auto"
    ema: Annotated[Decay, about("decay per step of averaged weights; 0: no averaging")] = 0.0
    prune_after: Annotated[
        CountOrZero, about("stop a sweep's run that is behind after N epochs; 0: never")
    ] = 0
    patience: Annotated[
        Count | None, about("stop after N epochs without a better train.monitor; null: never")
    ] = None
    min_delta: Annotated[
        Number, about("with patience or plateau: the least improvement that counts, in nats")
    ] = 0.0
    init_from: Annotated[
        Annotated[str, Field(min_length=1)] | None,
        BeforeValidator(_source),
        about("DIR: start from the weights of the run or release in DIR"),
    ] = None
    init_checkpoint: Annotated[Which, about("which checkpoint of init_from: last, or best")] = (
        "last"
    )
    callbacks: Annotated[
        Names, about("what watches the run: wandb, mlflow, or one of your own")
    ] = field(default_factory=list)


@dataclass
class Config(Group):
    """A whole run: what `scripts/train.py` composes from `conf/` and a checkpoint remembers."""

    seed: Annotated[Seed, about("random seed of weights, order and noise")]
    device: Device
    precision: Annotated[
        Literal["fp32", "medium", "bf16", "fp16"],
        about(
            "fp32; medium: fp32 tensors, faster multiplications (TF32 on CUDA); bf16: autocast; "
            "fp16: autocast for CUDA cards without bf16"
        ),
    ]
    compile: Annotated[Switch, about("torch.compile the training step")]
    likelihood: Annotated[
        Name,
        about(
            "p(x|z): bernoulli, continuous_bernoulli, gaussian, discretized_logistic, pixelcnn, "
            "or your own"
        ),
    ]
    prior: Annotated[
        Name, about("the prior p(z): standard, mixture, vamp, flow, two_layer, or one of your own")
    ]
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    prior_components: Annotated[
        Size, about("components of the mixture, vamp and two_layer priors")
    ] = 500
    posterior: Annotated[
        Name, about("the posterior q(z|x): gaussian, flow, two_layer, or one of your own")
    ] = "gaussian"
    likelihood_options: Annotated[Options, about("options of the likelihood")] = field(
        default_factory=dict
    )
    prior_options: Annotated[Options, about("options of the prior")] = field(default_factory=dict)
    posterior_options: Annotated[Options, about("options of the posterior")] = field(
        default_factory=dict
    )
    plugins: Plugins = field(default_factory=list)
    threads: Annotated[
        int | None, Field(strict=True, ge=1, le=1024), about("CPU threads; null: torch's choice")
    ] = None

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, as stored in checkpoints and summaries."""
        return asdict(self)


@dataclass
class EvalConfig(Group):
    """How `scripts/evaluate.py` estimates."""

    num_samples: Annotated[
        Count, about("importance samples per image from q(z|x), for log_px_encoder")
    ]
    fit_images: Annotated[Count, about("images that get a fitted posterior, to split the gap")]
    chunk: Annotated[
        Count | None,
        about("decoder rows at once: limits memory; null: 1024, on CUDA up to 65536"),
    ]
    seed: NoiseSeed
    checkpoint: Checkpoint
    limit: Annotated[Count | None, about("only the first N test images")] = None
    fit_samples: Annotated[
        Count, about("importance samples per image from its fitted proposal, for log_px")
    ] = 1000
    log_px_images: Annotated[
        Count | None,
        about("images, drawn at random, that get log_px; a bound of all adds the rest; null: all"),
    ] = None
    ais: Annotated[
        Count | None, about("images, chosen at random, that also get annealed importance sampling")
    ] = None
    exact: Annotated[
        bool | None,
        Field(strict=True),
        about("log p(x) by integration; null: if there are 1 or 2 latents"),
    ] = None
    overwrite: Annotated[Switch, about("replace an evaluation.json of more images or samples")] = (
        False
    )


@dataclass
class EvaluateConfig(Group):
    """What `scripts/evaluate.py` composes from `conf/evaluate.yaml`."""

    run: RunFolder
    device: Device
    data_root: DataRoot
    eval: EvalConfig
    plugins: Plugins = field(default_factory=list)


@dataclass
class ExploreConfig(Group):
    """What `scripts/explore.py` composes from `conf/explore.yaml`."""

    run: RunFolder
    device: Device
    data_root: DataRoot
    checkpoint: Checkpoint
    points: Annotated[Count, about("images shown as points, at most")]
    plugins: Plugins = field(default_factory=list)


@dataclass
class EncodeConfig(Group):
    """What `scripts/encode.py` composes from `conf/encode.yaml`."""

    run: RunFolder
    out: Annotated[Folder | None, about("the file to write: FILE.npz, .csv or .parquet")]
    device: Device
    data_root: DataRoot
    checkpoint: Checkpoint
    split: Annotated[Literal["train", "test"], about("which images, where there are both")]
    num_samples: Annotated[Count, about("importance samples per image, for log p(x)")]
    chunk: Annotated[Count, about("decoder rows at once: limits memory, changes no figure")]
    seed: NoiseSeed
    images: Annotated[
        Folder | None, about("a folder, .npz or .npy of images; null: the run's own")
    ] = None
    reconstructions: Annotated[Switch, about("write the reconstructed images too (.npz)")] = False
    plugins: Plugins = field(default_factory=list)


@dataclass
class SampleConfig(Group):
    """What `scripts/sample.py` composes from `conf/sample.yaml`."""

    run: Annotated[Folder, about("the run's folder, or a release")]
    device: Device
    checkpoint: Checkpoint
    n: Annotated[Count, about("how many images")]
    out: Annotated[Folder, about("the file: .png for a grid, .npz for arrays")]
    temperature: Annotated[Number, about("factor on the standard deviations of the prior")]
    pixels: Annotated[
        Literal["mean", "draw"], about("mean: expected pixels; draw: samples of p(x|z)")
    ]
    seed: NoiseSeed
    y: Annotated[CountOrZero | None, about("the class, for a conditional model")] = None
    reconstruct: Annotated[
        Switch, about("the first n test images beside their reconstructions, instead of samples")
    ] = False
    data_root: DataRoot = None
    plugins: Plugins = field(default_factory=list)


@dataclass
class ExportConfig(Group):
    """What `scripts/export.py` composes from `conf/export.yaml`."""

    run: RunFolder
    out: Annotated[Folder, about("the new folder of the release")]
    checkpoint: Checkpoint
    half: Annotated[Switch, about("weights as 16-bit floats: half the size")] = False
    formats: Annotated[
        list[Literal["onnx", "torchscript"]],
        about("also export encoder and decoder in these formats"),
    ] = field(default_factory=list)
    explorer: Annotated[Switch, about("include the page that scripts/explore.py wrote")] = False
    plugins: Plugins = field(default_factory=list)


# Keys that say where and how a run is made, not what it is. They may differ when it is resumed, and
# are not part of its name.
INCIDENTAL = (
    "plugins",  # what they provide is named, and their code counts as the run's
    "data.root",
    "device",
    "threads",
    "train.resume",
    "train.allow_other_code",
    "train.figure_every",
    "train.checkpoint_every",
    "train.prune_after",
    "train.callbacks",  # their code is a plug-in's, which counts as the run's
)


# Keys that may change when a run is continued with more epochs: see runs.stages.
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


def keys_of(schema: type[Any], prefix: str = "") -> dict[str, Any]:
    """Every setting of a schema by its dotted key, with its annotated type."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(schema, include_extras=True).items():
        if is_dataclass(kind):
            found |= keys_of(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif not name.startswith("__"):
            found[f"{prefix}{name}"] = kind
    return found


def skeleton(schema: Any) -> dict[str, Any]:
    """Every key of a schema: what is off by default, and `???` for what `conf/` must give."""

    def default(setting: Any) -> Any:
        if is_dataclass(setting.type):
            return skeleton(setting.type)
        if setting.default_factory is not MISSING:
            return setting.default_factory()
        return "???" if setting.default is MISSING else setting.default

    return {setting.name: default(setting) for setting in fields(schema)}


# Keys of options that a part's own signature names.
OPTIONS = tuple(key for key in keys_of(Config) if key.endswith("options"))

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
        adapter = _ADAPTERS.get(schema) or _ADAPTERS.setdefault(schema, TypeAdapter(schema))
        return adapter.validate_python(values)  # type: ignore[no-any-return]
    except ValidationError as error:
        # an unknown key first: it may be the missing one, misspelt
        errors = sorted(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
        raise ConfigError(_line(schema, values, errors[0])) from None


# By schema: making one takes longer than what it checks.
_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}


def _line(schema: type[Any], values: Any, error: Any) -> str:
    """One of pydantic's errors, in this project's words."""
    if isinstance(own := error.get("ctx", {}).get("error"), ConfigError):
        return str(own)
    known = keys_of(schema)
    dotted = ".".join(str(part) for part in error["loc"])
    if error["type"] == "unexpected_keyword_argument":
        return no_such_key(dotted, known)
    if error["type"] == "missing":
        return f"{dotted} is missing: give it a value"
    key = max((k for k in known if dotted == k or dotted.startswith(f"{k}.")), key=len, default="")
    if not key:
        return f"{dotted}={error['input']!r}: must be a group of settings"
    value = reduce(getitem, key.split("."), values)  # an error in a list concerns the whole list
    if float in _kinds(known[key]) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    return f"{key}={_null(value)}: must be {allowed(known[key], value)}"


def no_such_key(key: str, known: Mapping[str, Any]) -> str:
    """The message for an unknown key."""
    ends = {name.rpartition(".")[2]: name for name in known}
    near = get_close_matches(key, known, 1, 0.75) or [
        ends[end] for end in get_close_matches(key.rpartition(".")[2], ends, 1, 0.75)
    ]
    meant = f"did you mean {near[0]}? " if near else ""
    return f"{key}: no such key; {meant}--help lists them"


def _kinds(kind: Any) -> Iterator[Any]:
    """The parts of an annotated type, with unions and literals taken apart."""
    yield kind
    for part in get_args(kind):
        yield from _kinds(part)
        if isinstance(part, FieldInfo):
            yield from part.metadata


def allowed(kind: Any, value: Any = None) -> str:
    """What a setting of this annotated type may be, in words; `value` is the given one."""
    parts = list(_kinds(kind))
    if said := [part.words for part in parts if isinstance(part, Must)]:
        return said[0]
    text = _range(parts, value)
    return f"{text}, or null" if type(None) in parts else text


def _range(parts: list[Any], value: Any) -> str:
    words = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
    low, above, high, below = (
        next((getattr(part, name) for part in parts if hasattr(part, name)), None)
        for name in ("ge", "gt", "le", "lt")
    )
    if words:
        return "one of " + ", ".join(dict.fromkeys(words))
    if int in parts and high is not None:
        if high > _MANY:
            return f"between {low} and {high}"
        if high < _MANY or (isinstance(value, int) and value > high):
            return f"a whole number, {low} or more and at most {high}"
        return f"a whole number, {low} or more"
    if float in parts:
        if below is not None:
            least = f"at least {low} (off)" if above is None else f"above {above}"
            return f"{least} and below {below}"
        return f"a number above {above}" if above is not None else f"a number, {low} or more"
    if bool in parts:
        return "true or false"
    if int in parts:
        return "a whole number"
    return "the name of a folder" if any(hasattr(p, "min_length") for p in parts) else "text"


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
    """Refuse settings that no run can use."""
    config_from_dict(config.to_dict())


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys: `{"model": {"depth": 1}}` -> `{"model.depth": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def check_objective(objective: ObjectiveConfig) -> None:
    """Refuse options that the chosen objective would ignore."""
    _check_part("objective", objective)
    if objective.estimator == "dreg" and objective.name != "iwae":
        raise ConfigError(
            f"objective.estimator=dreg with objective.name={objective.name}: the doubly "
            "reparameterised gradient is for the importance-weighted ELBO; use objective=iwae"
        )
    if bool(objective.early_epochs) != (objective.early_samples is not None):
        raise ConfigError(
            f"objective.early_epochs={objective.early_epochs}, objective.early_samples="
            f"{objective.early_samples}: one needs the other; set both or neither"
        )
    if objective.early_epochs and objective.name != "iwae":
        raise ConfigError(
            f"objective.early_epochs={objective.early_epochs} with objective.name="
            f"{objective.name}: only the importance-weighted ELBO gains from more samples later; "
            "use objective=iwae"
        )
    if objective.early_samples is not None and not (
        1 <= objective.early_samples < objective.num_samples
    ):
        raise ConfigError(
            f"objective.early_samples={objective.early_samples} with objective.num_samples="
            f"{objective.num_samples}: must be 1 or more, and below objective.num_samples"
        )
    if objective.resample and (objective.name != "iwae" or objective.num_samples == 1):
        raise ConfigError(
            f"objective.resample=true with objective.name={objective.name}, objective.num_samples="
            f"{objective.num_samples}: there is nothing to choose from; use objective=iwae with "
            "several samples"
        )
    if objective.name in ("iwae", "keras") and (objective.beta, objective.free_bits) != (1, 0):
        raise ConfigError(
            f"objective.beta={objective.beta}, objective.free_bits={objective.free_bits} with "
            f"objective={objective.name}: both are for objective=elbo; leave them out"
        )
    if objective.name == "keras" and objective.beta_warmup_epochs:
        raise ConfigError(
            f"objective.beta_warmup_epochs={objective.beta_warmup_epochs} with objective=keras: "
            "the notebook has no warm-up; use objective=elbo or objective=iwae"
        )


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """Refuse settings that have no effect."""
    _check_part("optimizer", optimizer)
    name, schedule = optimizer.name, optimizer.schedule
    if name == "sgd" and list(optimizer.betas) != [0.9, 0.999]:
        raise ConfigError(
            f"optimizer.betas={optimizer.betas} with optimizer.name=sgd: they are for adam and "
            "adamw; use optimizer.momentum"
        )
    if name != "sgd" and optimizer.momentum:
        raise ConfigError(
            f"optimizer.momentum={optimizer.momentum} with optimizer.name={name}: it is for sgd; "
            "the first of optimizer.betas is Adam's momentum"
        )
    falls = schedule in ("step", "plateau")
    if falls != (optimizer.step_epochs is not None):
        raise ConfigError(
            f"optimizer.step_epochs={_null(optimizer.step_epochs)} with optimizer.schedule="
            f"{schedule}: one needs the other; set optimizer.schedule=step (or plateau) and "
            "optimizer.step_epochs=N, or neither"
        )
    if not falls and optimizer.step_factor != 0.1:
        raise ConfigError(
            f"optimizer.step_factor={optimizer.step_factor} with optimizer.schedule={schedule}: it "
            "is for optimizer.schedule=step and plateau"
        )
    if schedule == "one_cycle" and optimizer.warmup_steps:
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} with optimizer.schedule=one_cycle: "
            "that schedule has its own warm-up; leave one of them out"
        )


def _null(value: Any) -> Any:
    return "null" if value is None else value


def _check_part(name: str, part: Any) -> None:
    """Check the ranges and choices of one group; keys are named as in a whole run."""
    try:
        validated(type(part), asdict(part))
    except ConfigError as error:
        raise ConfigError(f"{name}.{error}") from None


def check_combinations(config: Config) -> None:
    """Refuse options that contradict each other, before the run starts."""
    objective, binarize = config.objective, config.data.binarize
    if binarize != "none" and config.likelihood in ("continuous_bernoulli", "gaussian"):
        raise ConfigError(
            f"likelihood={config.likelihood} with data.binarize={binarize}: binary pixels have no "
            "density; use likelihood=bernoulli, or data.binarize=none"
        )
    check_objective(objective)
    check_optimizer(config.optimizer)
    waits = config.train.patience is not None or config.optimizer.schedule == "plateau"
    if config.train.min_delta and not waits:
        raise ConfigError(
            f"train.min_delta={config.train.min_delta} without train.patience: set "
            "train.patience=N, the epochs without such a gain after which the run stops"
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
    without = config.model.name in ("conv", "resnet")
    if config.model.mean_bias and (without or config.likelihood != "bernoulli"):
        raise ConfigError(
            f"model.mean_bias=true with model={config.model.name}, likelihood={config.likelihood}: "
            "it needs an output bias per pixel and Bernoulli logits; use model=mlp or "
            "model=residual and likelihood=bernoulli"
        )
