"""Parts of one's own, as a user writes them: a plug-in for the tests."""

import torch
from torch import nn

from vae_torch.data import Images, Splits, data_sources
from vae_torch.parts.likelihoods import likelihoods
from vae_torch.parts.metrics import Metric, metrics
from vae_torch.parts.networks import networks
from vae_torch.parts.objectives import bound, objectives
from vae_torch.parts.posteriors import DiagonalGaussian, posteriors
from vae_torch.parts.priors import priors

metrics["mse"] = Metric("lower", digits=4)


@networks.register("mine")
class Mine:
    def __init__(self, *, width: int = 32, dropout: float = 0.1) -> None:
        self.width, self.dropout = width, dropout

    def encoder(self, shape):  # noqa: ARG002 - the first layer finds out
        layers = nn.LazyLinear(self.width), nn.ReLU(), nn.Dropout(self.dropout)
        return nn.Sequential(nn.Flatten(), *layers)

    def decoder(self, latent_dim, shape):
        pixels = torch.Size(shape).numel()
        layers = nn.Linear(latent_dim, self.width), nn.ReLU(), nn.Linear(self.width, pixels)
        return nn.Sequential(*layers, nn.Unflatten(1, shape))


@posteriors.register("round")
class Round(nn.Module):
    """A Gaussian with one variance for all dimensions."""

    def __init__(self, features: int, latent_dim: int) -> None:
        super().__init__()
        self.mean, self.logvar = nn.Linear(features, latent_dim), nn.Linear(features, 1)

    def forward(self, h):
        mean = self.mean(h)
        return DiagonalGaussian(mean, self.logvar(h).expand_as(mean))


@priors.register("wide")
class Wide(nn.Module):
    def __init__(self, latent_dim: int, *, scale: float = 2.0) -> None:
        super().__init__()
        self.latent_dim, self.scale = latent_dim, scale

    def log_prob(self, z):
        return torch.distributions.Normal(0.0, self.scale).log_prob(z).sum(-1)

    def sample(self, n, generator=None):
        device = generator.device if generator else None
        return self.scale * torch.randn(n, self.latent_dim, generator=generator, device=device)


@likelihoods.register("laplace")
class Laplace(nn.Module):
    """Two outputs for a pixel: centre and log-scale."""

    outputs = 2

    def log_prob(self, x, params):
        centre, log_scale = params.unbind(-1)
        terms = -(x - centre).abs() * torch.exp(-log_scale) - log_scale - 0.6931471805599453
        return terms.flatten(1 - x.ndim).sum(-1)

    def mean(self, params):
        return params[..., 0].clamp(0, 1)


@objectives.register("weighted")
class Weighted:
    def __init__(self, *, strength: float = 2.0) -> None:
        self.strength = strength

    def __call__(self, vae, batch, noise, beta):  # noqa: ARG002
        parts = bound(vae, batch, noise.eps)
        drawn = vae.likelihood.mean(vae.decode(parts.q.mean)).flatten(1)
        mse = ((drawn - batch.x.flatten(1)) ** 2).mean(1)
        return self.strength * parts.kl - parts.reconstruction, {"mse": mse.detach()}


@data_sources.register("stripes")
def stripes(_, *, count: int = 200):
    """Images of 6 x 6, with lines that lie or stand, and their two classes."""
    labels = torch.arange(count) % 2
    lines = torch.rand(count, 6, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 6)
    x = torch.where(labels[:, None, None] == 0, lines, lines.mT)
    return Splits(Images(x, labels), Images(x[:50], labels[:50]), classes=("lying", "standing"))
