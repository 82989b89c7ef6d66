"""Models at rest: reads the model of a run's folder or release, and writes one without a run."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae_torch.checkpoint import (
    CheckpointError,
    StoredModel,
    classes_in,
    load_checkpoint,
    save_checkpoint,
)
from vae_torch.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
    config_from_dict,
    in_short,
)
from vae_torch.parts.likelihoods import likelihoods
from vae_torch.parts.networks import networks
from vae_torch.parts.posteriors import posteriors
from vae_torch.parts.priors import priors
from vae_torch.parts.registry import Table, load_plugins, loaded_plugins, plugins_with
from vae_torch.release import is_release, stored_release
from vae_torch.vae import VAE


def load_run(
    run_dir: str | Path,
    *,
    checkpoint: str = "last",
    device: torch.device | str = "cpu",
    plugins: Sequence[str] = (),
    into: VAE | None = None,
) -> tuple[VAE, Config]:
    """The model of a run's folder or release, ready to use, and the config of its training.

    Args:
        run_dir: What `scripts/train.py` printed at its end, or `scripts/export.py`.
        checkpoint: `last`, or `best` (the highest test elbo; a choice made on the test set). A
            release holds one of them.
        device: Device of the model.
        plugins: Modules with the run's own parts. You name them here, because a file alone must not
            cause an import.
        into: A model of the same parts, which gets the weights: needed if modules of your own were
            passed in, since a file cannot rebuild them.

    Raises:
        CheckpointError: Not a run folder, no checkpoint in it, or a damaged one.
        ConfigError: The checkpoint's config is not valid in this version.
    """
    load_plugins(plugins)
    run_dir = Path(run_dir)
    try:
        stored = stored_model(run_dir, checkpoint, device)
    except CheckpointError as error:
        of_folder = str(error).startswith(f"{run_dir}: ")  # of the folder, not of a file in it
        raise CheckpointError(f"run={error}" if of_folder else str(error)) from None
    config = stored.config
    if into is not None:
        if misfits := other_shapes(into.state_dict(), stored.weights, "into"):
            raise CheckpointError(
                f"{stored.path}: its weights do not fit into the model: {listed(misfits)}"
            )
        into.load_state_dict(stored.weights)
        return into.to(device), config
    if own := stored.own_parts:
        raise CheckpointError(
            f"{run_dir}: its {' and '.join(own)} {'were' if len(own) > 1 else 'was'} passed in as "
            "modules, which no file can make again; make the model as you did then, and use "
            "load_run(..., into=vae)"
        )
    try:
        if absent := [name for name in config.plugins if name not in loaded_plugins()]:
            names = ", ".join(f'"{name}"' for name in absent)
            raise CheckpointError(
                f"{run_dir}: its run has parts of your own; add plugins=[{','.join(absent)}], in "
                f"Python load_run(..., plugins=[{names}])"
            )
        vae = _made_again(stored)
    except (ConfigError, RuntimeError, TypeError) as error:
        raise _unfit(stored.path, error) from None
    return vae.to(device, torch.float32).eval(), config


def _made_again(stored: StoredModel) -> VAE:
    """Rebuild the model that a config describes, with the stored weights."""
    with suppress(NotImplementedError), torch.device("meta"):
        # on the meta device, without memory: a config can claim any size
        vae = VAE.from_config(stored.config, stored.input_shape, stored.classes)
        vae.load_state_dict(stored.weights, assign=True)
        if not any(tensor.is_meta for tensor in (*vae.parameters(), *vae.buffers())):
            return vae
    # a part such as a flow computes constants when it is made, and they are not stored
    with torch.random.fork_rng(devices=[]):  # keep the caller's random state
        vae = VAE.from_config(stored.config, stored.input_shape, stored.classes)
    vae.load_state_dict(stored.weights)
    return vae


def stored_model(
    run_dir: Path, checkpoint: str = "last", device: torch.device | str = "cpu"
) -> StoredModel:
    """A run's or release's weights, without building the model."""
    if not run_dir.is_dir():
        raise CheckpointError(f"{run_dir}: no such folder")
    if is_release(run_dir):
        return stored_release(run_dir, device)
    path = run_dir / "checkpoints" / f"{checkpoint}.pt"
    if not path.exists():
        raise CheckpointError(f"{run_dir}: has no checkpoints/{checkpoint}.pt; did it train?")
    state = load_checkpoint(path, device)
    try:
        config, shape = config_from_dict(state["config"]), tuple(_shape_in(state))
        classes = classes_in(state)
    except (ConfigError, TypeError) as error:
        raise _unfit(path, error) from None
    odd = [name for name, value in state["model"].items() if not isinstance(value, Tensor)]
    if odd:
        raise _unfit(path, TypeError(f"{odd[0]} is not a tensor"))
    epoch = state.get("epoch")
    own = state.get("own_parts", [])
    return StoredModel(
        path,
        state["model"],
        config,
        shape,
        epoch if type(epoch) is int else None,
        path.read_bytes()[-32:].hex(),
        tuple(map(str, own)) if isinstance(own, list) else (),
        classes,
    )


def save_run(vae: VAE, run_dir: str | Path) -> Path:
    """Save a model that `train` has trained without a config; `load_run` reads it.

    The names and options of registered parts are stored, so that the model can be rebuilt. A model
    with modules that were passed in needs `load_run(run_dir, into=vae)`.

    Args:
        vae: The model.
        run_dir: The folder; made if absent.

    Returns:
        The folder.

    Raises:
        ConfigError: The folder holds a run already.
        OSError: The folder cannot be written.
    """
    run_dir = Path(run_dir).expanduser()
    path = run_dir / "checkpoints" / "last.pt"
    if path.exists() or (run_dir / "config.yaml").exists():
        raise ConfigError(f"{run_dir}: holds a run already; choose another folder")
    made = vae.made_of
    own = [
        part
        for part in ("encoder", "posterior", "decoder", "likelihood", "prior")
        if made[part] is None
    ]
    tables: dict[str, Table[Any]] = {
        "encoder": networks, "decoder": networks, "posterior": posteriors,
        "likelihood": likelihoods, "prior": priors,
    }  # fmt: skip
    parts = [table[made[part]] for part, table in tables.items() if part not in own]
    config = Config(
        seed=0,
        device="auto",
        precision="fp32",
        compile=False,
        likelihood=made["likelihood"] or "bernoulli",
        prior=made["prior"] or "standard",
        model=ModelConfig(
            name=made["architecture"],
            latent_dim=vae.latent_dim,
            intermediate_dim=vae.intermediate_dim,
            depth=made["depth"],
            activation=made["activation"],
            conditional=vae.classes is not None,
            options=made["model_options"],
        ),
        # unknown: the data, and how it was trained
        data=DataConfig(name="unknown", root="data", batch_size=128, binarize="none"),
        objective=ObjectiveConfig(),
        optimizer=OptimizerConfig(name="adam", lr=1e-3, eps=1e-8, schedule="constant"),
        train=TrainConfig(epochs=1, figure_every=0, checkpoint_every=1),
        prior_components=made["prior_components"],
        posterior=made["posterior"] or "gaussian",
        likelihood_options=made["likelihood_options"],
        prior_options=made["prior_options"],
        posterior_options=made["posterior_options"],
        plugins=plugins_with(parts),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "config": config.to_dict(),
        "input_shape": list(vae.input_shape),
        "classes": vae.classes,
        "model": vae.state_dict(),
        "own_parts": own,
    }
    save_checkpoint(state, path)
    return run_dir


def other_shapes(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], here: str) -> list[str]:
    """Weights that one of two models lacks or has in another shape."""

    def shape(weights: Mapping[str, Tensor], name: str) -> str:
        return str(tuple(weights[name].shape)) if name in weights else "absent"

    shapes = {name: (shape(theirs, name), shape(ours, name)) for name in {**theirs, **ours}}
    return [f"{name} {a} ({here}: {b})" for name, (a, b) in shapes.items() if a != b]


def listed(misfits: Sequence[str]) -> str:
    """The first six in words, and how many more there are."""
    more = f" and {len(misfits) - 6} more" if len(misfits) > 6 else ""
    return f"{', '.join(misfits[:6])}{more}"


def _unfit(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: does not fit its own config ({in_short(error, 200)}); name another run"
    )


def _shape_in(state: dict[str, Any]) -> list[int]:
    """Shape of the model's images; older checkpoints are all of 784 grey pixels."""
    shape = state.get("input_shape", [784])
    if not isinstance(shape, list) or not all(type(n) is int and 0 < n < 2**20 for n in shape):
        raise TypeError(f"its images have shape {shape}")
    return shape
