"""A run that starts from another run's weights: `train.init_from`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae_torch.checkpoint import CheckpointError
from vae_torch.config import Config, ConfigError, flatten
from vae_torch.stored import listed, other_shapes, stored_model
from vae_torch.vae import VAE

# The parts of a model, and the settings that make a part a different one.
_MADE_BY = {
    "encoder": ("model.name",),
    "posterior": ("model.name", "posterior"),
    "decoder": ("model.name",),
    "likelihood": ("likelihood",),
    "prior": ("prior",),
}


@torch.no_grad()
def start_from(vae: VAE, config: Config) -> dict[str, Any]:
    """Load the weights of the run that `config.train.init_from` names into a fresh model.

    A part that differs in that run, such as a prior of another name, keeps its fresh weights. Every
    other part must have the same shapes.

    Returns what the record keeps: the source's folder, checkpoint, epoch and seal, and the fresh
    parts.
    """
    folder, which = config.train.init_from, config.train.init_checkpoint
    assert folder is not None
    try:
        source = stored_model(Path(folder), which)
    except CheckpointError as error:
        raise CheckpointError(f"train.init_from={folder}: {error}") from None
    theirs, ours = flatten(source.config.to_dict()), flatten(config.to_dict())
    fresh = [
        part
        for part, settings in _MADE_BY.items()
        if any(theirs[setting] != ours[setting] for setting in settings)
    ]

    def taken(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: w for name, w in weights.items() if name.partition(".")[0] not in fresh}

    named, weights = f"train.init_from={folder}", vae.state_dict()
    misfits = []  # the sizes that every part depends on, else the weights
    if source.input_shape != vae.input_shape:
        misfits.append(f"images of {source.input_shape} (this run: {vae.input_shape})")
    if (size := theirs["model.latent_dim"]) != vae.latent_dim:
        misfits.append(f"model.latent_dim={size} (this run: {vae.latent_dim})")
    misfits = misfits or other_shapes(taken(weights), taken(source.weights), "this run")
    if misfits:
        raise ConfigError(
            f"{named}: its weights do not fit: {listed(misfits)}; give this run the same "
            "sizes, or leave train.init_from out"
        )
    if {"encoder", "decoder"} <= set(fresh):
        raise ConfigError(
            f"{named}: it has model={theirs['model.name']}, this run model={ours['model.name']}: "
            "no weights fit; use the same model, or leave train.init_from out"
        )
    vae.load_state_dict(taken(source.weights), strict=False)
    parts = {name.partition(".")[0] for name in weights}
    return {
        "path": folder,
        "checkpoint": which,
        "epoch": source.epoch,
        "sha256": source.sha256,
        "fresh": [part for part in fresh if part in parts],
    }


def origin_line(origin: dict[str, Any]) -> str:
    """The line about the weights that a run starts from."""
    epoch = "" if origin["epoch"] is None else f" after epoch {origin['epoch']}"
    fresh = ", ".join(["optimiser", *origin["fresh"]])
    return (
        f"starting from the {origin['checkpoint']} weights of {origin['path']}{epoch}; fresh: "
        f"{fresh}"
    )
