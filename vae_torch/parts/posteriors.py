"""Posteriors q(z|x): they turn an encoder's features and noise into latents.

A posterior is a module that takes features and returns a distribution:

    @posteriors.register("mine")
    class Mine(nn.Module):
        def __init__(self, features: int, latent_dim: int, *, width: int = 32) -> None: ...
        def forward(self, h) -> Posterior: ...  # h (B, features)

The distribution turns standard normal noise into latents and knows their log-density. It may also
have `noise_of`, the inverse of `rsample`: proposals of importance sampling then start from it
instead of from a Gaussian. Code that needs a Gaussian calls `gaussian_of`.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vae_torch.config import ConfigError
from vae_torch.parts.registry import Table

posteriors: "Table[type[nn.Module]]" = Table("posterior", "posterior_options")


class Posterior(Protocol):
    """q(z|x) of a batch of B images."""

    @property
    def mean(self) -> Tensor:
        """The centre (B, latent_dim), which figures plot and decode for an image."""

    def rsample(self, eps: Tensor) -> Tensor:
        """Turn standard normal noise (..., B, latent_dim) into latents of the same shape."""

    def sample(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (..., B, latent_dim) of this noise, and log q of each, (..., B) in nats."""

    def log_prob(self, z: Tensor) -> Tensor:
        """Log q(z|x): (..., B, latent_dim) -> (..., B), nats."""


class DiagonalGaussian(NamedTuple):
    """N(mean, exp(logvar)) with independent dimensions."""

    mean: Tensor  # (..., latent_dim)
    logvar: Tensor  # (..., latent_dim), natural log of the variance

    def rsample(self, eps: Tensor) -> Tensor:
        """Mean + exp(logvar / 2) * eps, in the shape of eps."""
        return reparameterize(*self, eps=eps)

    def sample(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Latents for this noise, and log q of each."""
        z = self.rsample(eps)
        return z, self.log_prob(z)

    def log_prob(self, z: Tensor) -> Tensor:
        """(..., latent_dim) -> (...), nats."""
        return log_normal(z, *self)

    def kl_per_dim(self) -> Tensor:
        """KL to N(0, 1) of each dimension, nats; see `kl_per_dim`."""
        return kl_per_dim(*self)

    def detach(self) -> "DiagonalGaussian":
        """The same distribution, without gradients."""
        return DiagonalGaussian(self.mean.detach(), self.logvar.detach())


class WithOtherNoise:
    """A posterior whose noise comes from N(mean, exp(logvar)) instead of N(0, I).

    Args:
        q: The posterior.
        mean: (B, latent_dim); zero, with logvar zero, gives q itself.
        logvar: (B, latent_dim).
    """

    def __init__(self, q: Posterior, mean: Tensor, logvar: Tensor) -> None:
        self.q, self.of_noise = q, DiagonalGaussian(mean, logvar)

    @property
    def mean(self) -> Tensor:
        """Where the mean of the noise goes, (B, latent_dim)."""
        return self.q.rsample(self.of_noise.mean)

    def rsample(self, eps: Tensor) -> Tensor:
        """Latents for this standard normal noise, (..., B, latent_dim)."""
        return self.q.rsample(self.of_noise.rsample(eps))

    def sample(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Latents for this noise, and the log-density of each, (..., B)."""
        noise, log_density = self.of_noise.sample(eps)
        z, log_q = self.q.sample(noise)
        return z, log_density + log_q - log_standard_normal(noise)

    def log_prob(self, z: Tensor) -> Tensor:
        """(..., B, latent_dim) -> (..., B), nats; q must have `noise_of`."""
        noise = self.q.noise_of(z)  # type: ignore[attr-defined]
        change = self.of_noise.log_prob(noise) - log_standard_normal(noise)
        return self.q.log_prob(z) + change


@posteriors.register("gaussian")
class Gaussian(nn.Module):
    """A diagonal Gaussian: two linear heads on the features. Kingma and Welling (2013), section 3.

    Args:
        features: Number of encoder features.
        latent_dim: Dimensions of z.
    """

    glorot = True

    def __init__(self, features: int, latent_dim: int) -> None:
        super().__init__()
        self.mean = nn.Linear(features, latent_dim)
        self.logvar = nn.Linear(features, latent_dim)

    def forward(self, h: Tensor) -> DiagonalGaussian:
        """(B, features) -> mean and logvar, (B, latent_dim) each."""
        # bf16 autocast ends with the matrix multiplications; what is summed later is fp32
        kind = self.mean.weight.dtype
        return DiagonalGaussian(self.mean(h).to(kind), self.logvar(h).to(kind))


def gaussian_of(q: Posterior, what: str) -> DiagonalGaussian:
    """The posterior as a diagonal Gaussian.

    Args:
        q: Any posterior.
        what: What needs a Gaussian; the subject of the message.

    Raises:
        ConfigError: It is not one.
    """
    if isinstance(q, DiagonalGaussian):
        return q
    raise ConfigError(f"{what} needs a Gaussian q(z|x), posterior=gaussian; this model has another")


def gaussian_near(q: Posterior, generator: torch.Generator) -> DiagonalGaussian:
    """A posterior if it is Gaussian, else a diagonal Gaussian with the moments of 64 samples."""
    if isinstance(q, DiagonalGaussian):
        return q
    like = q.mean
    noise = torch.randn((64, *like.shape), generator=generator, device=like.device).to(like)
    z = q.rsample(noise)
    return DiagonalGaussian(z.mean(0), z.var(0).clamp(min=1e-6).log())


def reparameterize(
    mean: Tensor,
    logvar: Tensor,
    *,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A sample of q(z|x) that gradients pass through: z = mean + exp(logvar / 2) * eps.

    Kingma and Welling, *Auto-Encoding Variational Bayes* (2013), section 2.4. It always samples; a
    module's `.eval()` does not turn it into the mean.

    Args:
        mean: (..., latent_dim).
        logvar: (..., latent_dim), natural log of the variance.
        eps: Standard normal noise that broadcasts against `mean`; sampled if absent.
        generator: Source of `eps`.

    Returns:
        The shape of `mean`, or of `eps` where that has leading dimensions.

    Raises:
        ValueError: mean and logvar have different shapes, or eps does not broadcast.
    """
    if mean.shape != logvar.shape:
        raise ValueError(
            f"mean has shape {tuple(mean.shape)} and logvar {tuple(logvar.shape)}; they must agree"
        )
    if eps is None:
        eps = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    elif any(m != n and 1 not in (m, n) for m, n in zip(eps.shape[::-1], mean.shape[::-1])):  # noqa: B905
        raise ValueError(
            f"eps has shape {tuple(eps.shape)} and mean {tuple(mean.shape)}; eps must end in the "
            "shape of mean"
        )
    return mean + torch.exp(0.5 * logvar) * eps


def log_normal(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """Log-density of N(mean, exp(logvar)): (..., latent_dim) -> (...), nats."""
    square = (z - mean) ** 2 * torch.exp(-logvar)
    return -0.5 * (square + logvar + math.log(2 * math.pi)).sum(-1)


def log_standard_normal(z: Tensor) -> Tensor:
    """Log-density of N(0, I): (..., latent_dim) -> (...), nats."""
    return -0.5 * (z**2 + math.log(2 * math.pi)).sum(-1)


def kl_per_dim(mean: Tensor, logvar: Tensor) -> Tensor:
    r"""KL(N(mean, exp(logvar)) || N(0, 1)) of each latent dimension.

    ½ (mean² + exp(logvar) - 1 - logvar): Kingma and Welling (2013), appendix B.

    Args:
        mean: (..., latent_dim).
        logvar: (..., latent_dim).

    Returns:
        (..., latent_dim), nats.

    Raises:
        ValueError: The shapes differ.
    """
    if mean.shape != logvar.shape:
        raise ValueError(
            f"mean has shape {tuple(mean.shape)} and logvar {tuple(logvar.shape)}; they must agree"
        )
    # expm1 keeps the digits where the posterior equals the prior and both parts vanish
    return 0.5 * (mean**2 + torch.expm1(logvar) - logvar)
