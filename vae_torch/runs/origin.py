"""A run that starts from another run's weights: `train.init_from`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae_torch.checkpoint import CheckpointError, shape_of, stored_model
from vae_torch.config import Config, ConfigError
from vae_torch.vae import VAE

# A model's parts, and the settings whose change makes a part another one.
_MADE_BY = {
    "encoder": ("model.name",),
    "posterior": ("model.name", "posterior"),
    "decoder": ("model.name",),
    "likelihood": ("likelihood",),
    "prior": ("prior",),
}


@torch.no_grad()
def start_from(vae: VAE, config: Config) -> dict[str, Any]:
    """Give a fresh model the weights of the run that `config.train.init_from` names.

    A part that is another one in that run, such as a prior of another name, keeps its fresh
    weights. Every other part must fit in all its shapes.

    Returns what the record keeps: the source's folder, checkpoint, epoch and seal, the fresh parts.
    """
    folder, which = config.train.init_from, config.train.init_checkpoint
    assert folder is not None
    try:
        source = stored_model(Path(folder), which)
    except CheckpointError as error:
        raise CheckpointError(f"train.init_from={folder}: {error}") from None
    theirs, ours = _names(source.config), _names(config)
    fresh = [
        part
        for part, settings in _MADE_BY.items()
        if any(theirs[setting] != ours[setting] for setting in settings)
    ]
    named = f"train.init_from={folder}"
    misfits = _misfits(vae, config, source.config, source.input_shape)
    if not misfits:
        misfits = _other_shapes(vae.state_dict(), source.weights, fresh)
    if misfits:
        more = f" and {len(misfits) - 6} more" if len(misfits) > 6 else ""
        raise ConfigError(
            f"{named}: its weights do not fit: {', '.join(misfits[:6])}{more}; give this run the "
            "sizes of that one, or leave train.init_from out"
        )
    if {"encoder", "decoder"} <= set(fresh):
        raise ConfigError(
            f"{named}: it has model={theirs['model.name']}, this run model={ours['model.name']}: "
            "no weight would be taken over; use the same model, or leave train.init_from out"
        )
    kept = {n: w for n, w in source.weights.items() if n.partition(".")[0] not in fresh}
    vae.load_state_dict(kept, strict=False)
    return {
        "path": folder,
        "checkpoint": which,
        "epoch": source.epoch,
        "sha256": source.sha256,
        "fresh": [part for part in fresh if any(_of_part(vae.state_dict(), part))],
    }


def origin_line(origin: dict[str, Any]) -> str:
    """What a run says about the weights that it starts from."""
    epoch = "" if origin["epoch"] is None else f" after epoch {origin['epoch']}"
    fresh = ", ".join(["optimiser", *origin["fresh"]])
    return (
        f"starting from the {origin['checkpoint']} weights of {origin['path']}{epoch}; fresh: "
        f"{fresh}"
    )


def _names(config: Config) -> dict[str, str]:
    return {
        "model.name": config.model.name,
        "posterior": config.posterior,
        "likelihood": config.likelihood,
        "prior": config.prior,
    }


def _misfits(vae: VAE, config: Config, theirs: Config, shape: tuple[int, ...]) -> list[str]:
    """The sizes that every part depends on, where they differ."""
    found = []
    if shape != vae.input_shape:
        found.append(f"images of {shape} (this run: {vae.input_shape})")
    if theirs.model.latent_dim != config.model.latent_dim:
        found.append(
            f"model.latent_dim={theirs.model.latent_dim} (this run: {config.model.latent_dim})"
        )
    return found


def _other_shapes(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], fresh: list[str]
) -> list[str]:
    """Weights of the parts that are taken over, where one run lacks them or has another shape."""
    found = []
    for name in dict.fromkeys([*theirs, *ours]):
        if name.partition(".")[0] in fresh:
            continue
        there, here = theirs.get(name), ours.get(name)
        if there is None or here is None or there.shape != here.shape:
            found.append(f"{name} {shape_of(there)} (this run: {shape_of(here)})")
    return found


def _of_part(weights: dict[str, Tensor], part: str) -> list[str]:
    return [name for name in weights if name.startswith(f"{part}.")]
