"""Priors p(z): the standard normal, a learned mixture of Gaussians, and the VampPrior.

A prior is a module:

    @priors.register("mine")
    class Mine(nn.Module):
        def __init__(self, latent_dim: int, *, width: int = 32) -> None: ...
        def log_prob(self, z) -> Tensor: ...  # (..., latent_dim) -> (...), nats
        def sample(self, n, generator=None) -> Tensor: ...  # (n, latent_dim)

A prior with a `kl_per_dim(q)` has a closed-form KL: (B, latent_dim) nats, or None for a q that the
formula does not cover. A prior of several stochastic layers may have a `kl_per_layer(q, z)`, which
estimates the KL of each from samples. If it has a `see(model)`, the model passes itself to it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from vae_torch.config import Count
from vae_torch.machine import wide
from vae_torch.parts.posteriors import DiagonalGaussian, Posterior, gaussian_of
from vae_torch.parts.registry import Table

priors: "Table[type[nn.Module]]" = Table("prior", "prior_options")


class Encodes(Protocol):
    """What a VampPrior needs of its model."""

    input_shape: tuple[int, ...]

    @property
    def encode(self) -> Callable[[Tensor], Posterior]:
        """Images (B, *input_shape) -> q(z|x)."""


@priors.register("standard")
class StandardNormal(nn.Module):
    """p(z) = N(0, I): no parameters, and a closed-form KL."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    def log_prob(self, z: Tensor) -> Tensor:
        """(..., latent_dim) -> (...), nats."""
        return -0.5 * (z**2 + math.log(2 * math.pi)).sum(-1)

    def sample(
        self, n: int, generator: torch.Generator | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        """(n, latent_dim) samples, on the generator's device."""
        device = generator.device if generator is not None else None
        return temperature * torch.randn(n, self.latent_dim, generator=generator, device=device)

    def kl_per_dim(self, q: Posterior) -> Tensor | None:
        """KL(q(z|x) || N(0, 1)) of each dimension, (B, latent_dim) nats, for a Gaussian."""
        return q.kl_per_dim() if isinstance(q, DiagonalGaussian) else None


@priors.register("mixture")
class Mixture(nn.Module):
    """p(z) = Σ_k w_k N(z; m_k, exp(v_k)) with learned weights, means and log-variances."""

    def __init__(self, latent_dim: int, *, components: Count = 500) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.randn(components, latent_dim))
        self.logvars = nn.Parameter(torch.zeros(components, latent_dim))
        self.log_weights = nn.Parameter(torch.zeros(components))

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """Means (K, latent_dim), log-variances (K, latent_dim), normalised log-weights (K,)."""
        return self.means, self.logvars, self.log_weights.log_softmax(0)

    def log_prob(self, z: Tensor) -> Tensor:
        """(..., latent_dim) -> (...), nats."""
        return log_mixture(z, *self.components())

    def sample(
        self, n: int, generator: torch.Generator | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        """(n, latent_dim) samples."""
        return _sample_mixture(n, *self.components(), generator, temperature)


@priors.register("vamp")
class VampPrior(nn.Module):
    """p(z) = 1/K Σ_k q(z | u_k) with learned pseudo-inputs u_k.

    Tomczak and Welling, *VAE with a VampPrior* (AISTATS 2018), equation 9. The pseudo-inputs pass
    through a sigmoid, so they are images.
    """

    def __init__(
        self, latent_dim: int, input_shape: Sequence[int], *, components: Count = 500
    ) -> None:
        del latent_dim  # the encoder knows it
        super().__init__()
        # starts dim and noisy, like the mean of many digits
        self.pseudo_inputs = nn.Parameter(torch.randn(components, *input_shape) - 2)
        self._model: list[Encodes] = []  # in a list, so that it is not registered as a submodule

    def see(self, model: Encodes) -> None:
        """Remember the model whose posteriors are the components."""
        self._model = [model]

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """Means (K, latent_dim), log-variances (K, latent_dim), uniform log-weights (K,).

        Raises:
            ConfigError: The posterior is not Gaussian.
        """
        (model,) = self._model
        q = gaussian_of(model.encode(torch.sigmoid(self.pseudo_inputs)), "prior=vamp")
        return *q, q.mean.new_full((len(q.mean),), -math.log(len(q.mean)))

    def log_prob(self, z: Tensor) -> Tensor:
        """(..., latent_dim) -> (...), nats."""
        return log_mixture(z, *self.components())

    def sample(
        self, n: int, generator: torch.Generator | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        """(n, latent_dim) samples."""
        return _sample_mixture(n, *self.components(), generator, temperature)


def log_mixture(z: Tensor, means: Tensor, logvars: Tensor, log_weights: Tensor) -> Tensor:
    """Log-density of a diagonal Gaussian mixture, without a (..., K, latent_dim) array.

    Σ_d (z_d - m_kd)² / s_kd² is expanded into two matrix multiplications. Its three terms cancel,
    most of all for narrow components, so they are computed in double precision.
    """
    precision = wide(torch.exp(-logvars))  # (K, latent_dim)
    places, centers = wide(z), wide(means)
    square = (
        (places**2) @ precision.T
        - 2 * places @ (centers * precision).T
        + (centers**2 * precision).sum(-1)
    ).to(z)  # (..., K)
    constant = logvars.sum(-1) + math.log(2 * math.pi) * means.shape[-1]
    return torch.logsumexp(log_weights - 0.5 * (square + constant), -1)


def _sample_mixture(
    n: int,
    means: Tensor,
    logvars: Tensor,
    log_weights: Tensor,
    generator: torch.Generator | None,
    temperature: float,
) -> Tensor:
    chosen = torch.multinomial(log_weights.exp(), n, replacement=True, generator=generator)
    noise = torch.randn(n, means.shape[-1], generator=generator, device=means.device)
    return means[chosen] + temperature * torch.exp(0.5 * logvars[chosen]) * noise
