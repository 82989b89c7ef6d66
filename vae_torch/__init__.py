"""A Variational Autoencoder whose numbers can be trusted: nats per image, everywhere."""

from collections.abc import Sequence

from vae_torch.checkpoint import load_run
from vae_torch.config import Config, ConfigError, ObjectiveConfig, OptimizerConfig
from vae_torch.data import load_images, mnist_loaders
from vae_torch.evaluate import evaluate_model
from vae_torch.model import VAE, Decoder, Encoder, reparameterize
from vae_torch.objective import elbo, iwae_bound, keras_loss, kl_standard_normal
from vae_torch.runs.run import run
from vae_torch.training.loop import train

__version__ = "0.1.0"


def compose(overrides: Sequence[str] = ()) -> Config:
    """The settings of a run, as the command line composes them from `conf/`.

    Args:
        overrides: `model.latent_dim=8`, `experiment=strong`, ...

    Raises:
        ConfigError: A key or a value is wrong: one line that says what is allowed.
    """
    from vae_torch.cli.compose import compose as by_hydra  # only those who call it import Hydra

    return by_hydra(overrides)


__all__ = [
    "VAE",
    "Config",
    "ConfigError",
    "Decoder",
    "Encoder",
    "ObjectiveConfig",
    "OptimizerConfig",
    "compose",
    "elbo",
    "evaluate_model",
    "iwae_bound",
    "keras_loss",
    "kl_standard_normal",
    "load_images",
    "load_run",
    "mnist_loaders",
    "reparameterize",
    "run",
    "train",
]
