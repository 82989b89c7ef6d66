"""Two stochastic layers as one posterior and one prior over the latent vector z = (z2, z1).

p(z) = p(z2) p(z1|z2) and q(z|x) = q(z2|x) q(z1|z2, x), the top layer z2 first: Tomczak and Welling,
*VAE with a VampPrior* (AISTATS 2018), section 4. The decoder sees both. Objectives, estimators and
checkpoints see one vector z.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vae_torch.config import ConfigError, Count, CountOrZero
from vae_torch.parts.posteriors import DiagonalGaussian, Gaussian, Posterior, posteriors
from vae_torch.parts.priors import Mixture, priors


class TwoLayerDistribution:
    """q(z2|x) q(z1|z2, x) of a batch: see `posteriors.Posterior`."""

    def __init__(self, top: DiagonalGaussian, bottom: Callable[[Tensor], DiagonalGaussian]) -> None:
        self.top, self.bottom = top, bottom

    @property
    def mean(self) -> Tensor:
        """The mean of z2, and of z1 given that z2: (B, latent_dim)."""
        return torch.cat([self.top.mean, self.bottom(self.top.mean).mean], -1)

    def rsample(self, eps: Tensor) -> Tensor:
        """Latents for this noise, (..., B, latent_dim)."""
        return self.sample(eps)[0]

    def sample(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Latents for this noise, and log q of each, (..., B)."""
        eps2, eps1 = self._split(eps)
        z2, log_q2 = self.top.sample(eps2)
        z1, log_q1 = self.bottom(z2).sample(eps1)
        return torch.cat([z2, z1], -1), log_q2 + log_q1

    def noise_of(self, z: Tensor) -> Tensor:
        """The noise that gives these latents, (..., B, latent_dim)."""
        z2, z1 = self._split(z)
        layers = ((self.top, z2), (self.bottom(z2), z1))
        return torch.cat([(z - q.mean) * torch.exp(-0.5 * q.logvar) for q, z in layers], -1)

    def log_prob(self, z: Tensor) -> Tensor:
        """(..., B, latent_dim) -> (..., B), nats."""
        return self.log_prob_per_layer(z).sum(-1)

    def log_prob_per_layer(self, z: Tensor) -> Tensor:
        """Log q(z2|x) and log q(z1|z2, x): (..., B, latent_dim) -> (..., B, 2), nats."""
        z2, z1 = self._split(z)
        return torch.stack([self.top.log_prob(z2), self.bottom(z2).log_prob(z1)], -1)

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        top = self.top.mean.shape[-1]
        return z[..., :top], z[..., top:]


@posteriors.register("two_layer")
class TwoLayerPosterior(nn.Module):
    """q(z2|x) q(z1|z2, x): a diagonal Gaussian each; the second depends on features and z2.

    Args:
        features: Number of encoder features.
        latent_dim: Dimensions of z2 and z1 together.
        top: Dimensions of z2; 0 is half of latent_dim.
        width: Units of the hidden layer that joins features and z2.
    """

    glorot = True

    def __init__(
        self, features: int, latent_dim: int, *, top: CountOrZero = 0, width: Count = 256
    ) -> None:
        super().__init__()
        top = top_of(latent_dim, top)
        self.top = Gaussian(features, top)
        self.see_features = nn.Linear(features, width)
        self.see_top = nn.Linear(top, width, bias=False)
        self.activation = nn.SiLU()
        self.bottom = Gaussian(width, latent_dim - top)

    def forward(self, h: Tensor) -> TwoLayerDistribution:
        """(B, features) -> q(z|x)."""
        seen = self.see_features(h)

        def bottom(z2: Tensor) -> DiagonalGaussian:
            return self.bottom(self.activation(seen + self.see_top(z2)))  # type: ignore[no-any-return]

        return TwoLayerDistribution(self.top(h), bottom)


@priors.register("two_layer")
class TwoLayerPrior(nn.Module):
    """p(z2) p(z1|z2): a learned mixture, then a diagonal Gaussian that depends on z2.

    Args:
        latent_dim: Dimensions of z2 and z1 together.
        components: Components of the mixture p(z2).
        top: Dimensions of z2, as in the posterior.
        width: Units of each of the two hidden layers.
    """

    def __init__(
        self, latent_dim: int, *, components: Count = 500, top: CountOrZero = 0, width: Count = 256
    ) -> None:
        super().__init__()
        top = top_of(latent_dim, top)
        self.top = Mixture(top, components=components)
        self.see_top = nn.Sequential(
            nn.Linear(top, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.bottom = Gaussian(width, latent_dim - top)
        for head in (self.bottom.mean, self.bottom.logvar):  # starts as N(0, I)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def log_prob(self, z: Tensor) -> Tensor:
        """(..., latent_dim) -> (...), nats."""
        return self.log_prob_per_layer(z).sum(-1)

    def log_prob_per_layer(self, z: Tensor) -> Tensor:
        """Log p(z2) and log p(z1|z2): (..., latent_dim) -> (..., 2), nats."""
        top = self.top.means.shape[-1]
        z2, z1 = z[..., :top], z[..., top:]
        below: DiagonalGaussian = self.bottom(self.see_top(z2))
        return torch.stack([self.top.log_prob(z2), below.log_prob(z1)], -1)

    def sample(
        self, n: int, generator: torch.Generator | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        """(n, latent_dim) samples."""
        z2 = self.top.sample(n, generator, temperature=temperature)
        below: DiagonalGaussian = self.bottom(self.see_top(z2))
        noise = torch.randn(below.mean.shape, generator=generator, device=z2.device)
        return torch.cat([z2, below.rsample(temperature * noise)], -1)

    def kl_per_layer(self, q: Posterior, z: Tensor) -> Tensor | None:
        """Log q - log p of each layer at K samples z (K, B, latent_dim), averaged: (B, 2).

        Raises:
            ConfigError: The posterior's top layer has another number of dimensions.
        """
        if not isinstance(q, TwoLayerDistribution):
            return None
        of_prior, of_posterior = self.top.means.shape[-1], q.top.mean.shape[-1]
        if of_prior != of_posterior:
            raise ConfigError(
                f"prior=two_layer with {of_prior} dimensions in its top layer, and "
                f"posterior=two_layer with {of_posterior}; give prior_options.top and "
                "posterior_options.top one value"
            )
        return (q.log_prob_per_layer(z) - self.log_prob_per_layer(z)).mean(0)


def top_of(latent_dim: int, top: int) -> int:
    """Dimensions of the top layer.

    Raises:
        ConfigError: No dimension is left for one of the layers.
    """
    if latent_dim < 2 or not 0 <= top < latent_dim:
        raise ConfigError(
            f"two_layer, top={top} of latent_dim={latent_dim}; top must be less than latent_dim, "
            "which must be 2 or more"
        )
    return top or latent_dim // 2
