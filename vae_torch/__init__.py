"""A Variational Autoencoder whose numbers can be trusted: nats per image, everywhere."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vae_torch.cli.compose import compose
    from vae_torch.config import Config, ConfigError, ObjectiveConfig, OptimizerConfig
    from vae_torch.data import array_loaders, folder_loaders, load_images, mnist_loaders
    from vae_torch.encode import encode_images, encoded_batches
    from vae_torch.evaluate import evaluate_model
    from vae_torch.export import export_run
    from vae_torch.parts.objectives import elbo, iwae_bound, keras_loss, kl_standard_normal
    from vae_torch.parts.posteriors import reparameterize
    from vae_torch.runs.run import run
    from vae_torch.samples import draw_samples
    from vae_torch.stored import load_run, save_run
    from vae_torch.training.loop import train
    from vae_torch.vae import VAE, Decoder, Encoder

__version__ = "0.1.0"

# The module of each public name. A name is imported on first use, so `--help` need not wait for
# torch.
_HOMES = {
    "cli.compose": ("compose",),
    "config": ("Config", "ConfigError", "ObjectiveConfig", "OptimizerConfig"),
    "data": ("array_loaders", "folder_loaders", "load_images", "mnist_loaders"),
    "encode": ("encode_images", "encoded_batches"),
    "evaluate": ("evaluate_model",),
    "export": ("export_run",),
    "parts.objectives": ("elbo", "iwae_bound", "keras_loss", "kl_standard_normal"),
    "parts.posteriors": ("reparameterize",),
    "runs.run": ("run",),
    "samples": ("draw_samples",),
    "stored": ("load_run", "save_run"),
    "training.loop": ("train",),
    "vae": ("VAE", "Decoder", "Encoder"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "VAE", "Config", "ConfigError", "Decoder", "Encoder", "ObjectiveConfig", "OptimizerConfig",
    "array_loaders", "compose", "draw_samples", "elbo", "encode_images", "encoded_batches",
    "evaluate_model", "export_run", "folder_loaders", "iwae_bound", "keras_loss",
    "kl_standard_normal", "load_images", "load_run", "mnist_loaders", "reparameterize", "run",
    "save_run", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vae_torch' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"vae_torch.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
