"""A Variational Autoencoder whose numbers can be trusted: nats per image, everywhere."""

from vae_torch.checkpoint import load_run
from vae_torch.config import ConfigError, ObjectiveConfig, OptimizerConfig
from vae_torch.data import load_images, mnist_loaders
from vae_torch.evaluate import evaluate_model
from vae_torch.model import VAE, Decoder, Encoder, reparameterize
from vae_torch.objective import elbo, iwae_bound, keras_loss, kl_standard_normal
from vae_torch.train import train

__version__ = "0.1.0"

__all__ = [
    "VAE",
    "ConfigError",
    "Decoder",
    "Encoder",
    "ObjectiveConfig",
    "OptimizerConfig",
    "elbo",
    "evaluate_model",
    "iwae_bound",
    "keras_loss",
    "kl_standard_normal",
    "load_images",
    "load_run",
    "mnist_loaders",
    "reparameterize",
    "train",
]
