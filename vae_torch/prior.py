"""log p(z) in nats: the standard normal, a learned mixture of Gaussians, and the VampPrior.

A prior answers `log_prob(z, encode)` and `sample(n, encode)`. `encode` is the model's own encoder;
only the VampPrior, whose components are posteriors, looks at it.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


def log_normal(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """Log-density of N(mean, exp(logvar)): (..., latent_dim) -> (...), nats."""
    square = (z - mean) ** 2 * torch.exp(-logvar)
    return -0.5 * (square + logvar + math.log(2 * math.pi)).sum(-1)


class StandardNormal(nn.Module):
    """p(z) = N(0, I): nothing to learn, and a KL in closed form."""

    name = "standard"

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    def log_prob(self, z: Tensor, encode: Encode) -> Tensor:  # noqa: ARG002 - see the module
        """(..., latent_dim) -> (...), nats."""
        return -0.5 * (z**2 + math.log(2 * math.pi)).sum(-1)

    def sample(self, n: int, encode: Encode, generator: torch.Generator | None = None) -> Tensor:
        """(n, latent_dim) draws, on the generator's device."""
        del encode
        device = generator.device if generator is not None else None
        return torch.randn(n, self.latent_dim, generator=generator, device=device)


class Mixture(nn.Module):
    """p(z) = Σ_k w_k N(z; m_k, exp(v_k)) with learned weights, means and log-variances."""

    name = "mixture"

    def __init__(self, latent_dim: int, components: int) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.randn(components, latent_dim))
        self.logvars = nn.Parameter(torch.zeros(components, latent_dim))
        self.log_weights = nn.Parameter(torch.zeros(components))

    def components(self, encode: Encode) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG002
        """Means (K, latent_dim), log-variances (K, latent_dim), normalised log-weights (K,)."""
        return self.means, self.logvars, self.log_weights.log_softmax(0)

    def log_prob(self, z: Tensor, encode: Encode) -> Tensor:
        """(..., latent_dim) -> (...), nats."""
        return log_mixture(z, *self.components(encode))

    def sample(self, n: int, encode: Encode, generator: torch.Generator | None = None) -> Tensor:
        """(n, latent_dim) draws."""
        return _sample_mixture(n, *self.components(encode), generator)


class VampPrior(nn.Module):
    """p(z) = 1/K Σ_k q(z | u_k) with learned pseudo-inputs u_k.

    Tomczak and Welling, *VAE with a VampPrior* (AISTATS 2018), equation 9. The pseudo-inputs pass
    through a sigmoid, so they are images.
    """

    name = "vamp"

    def __init__(self, input_shape: tuple[int, ...], components: int) -> None:
        super().__init__()
        # starts dim and noisy, like the average of many digits
        self.pseudo_inputs = nn.Parameter(torch.randn(components, *input_shape) - 2)

    def components(self, encode: Encode) -> tuple[Tensor, Tensor, Tensor]:
        """Means (K, latent_dim), log-variances (K, latent_dim), uniform log-weights (K,)."""
        means, logvars = encode(torch.sigmoid(self.pseudo_inputs))
        return means, logvars, means.new_full((len(means),), -math.log(len(means)))

    def log_prob(self, z: Tensor, encode: Encode) -> Tensor:
        """(..., latent_dim) -> (...), nats."""
        return log_mixture(z, *self.components(encode))

    def sample(self, n: int, encode: Encode, generator: torch.Generator | None = None) -> Tensor:
        """(n, latent_dim) draws."""
        return _sample_mixture(n, *self.components(encode), generator)


def log_mixture(z: Tensor, means: Tensor, logvars: Tensor, log_weights: Tensor) -> Tensor:
    """Log-density of a diagonal Gaussian mixture, without a (..., K, latent_dim) array.

    Σ_d (z_d - m_kd)² / s_kd² is expanded into two matrix products. Its three terms cancel, the more
    the narrower a component is, so they are computed in double.
    """
    precision = torch.exp(-logvars).double()  # (K, latent_dim)
    wide, centers = z.double(), means.double()
    square = (
        (wide**2) @ precision.T
        - 2 * wide @ (centers * precision).T
        + (centers**2 * precision).sum(-1)
    ).to(z.dtype)  # (..., K)
    constant = logvars.sum(-1) + math.log(2 * math.pi) * means.shape[-1]
    return torch.logsumexp(log_weights - 0.5 * (square + constant), -1)


def _sample_mixture(
    n: int,
    means: Tensor,
    logvars: Tensor,
    log_weights: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    chosen = torch.multinomial(log_weights.exp(), n, replacement=True, generator=generator)
    noise = torch.randn(n, means.shape[-1], generator=generator, device=means.device)
    return means[chosen] + torch.exp(0.5 * logvars[chosen]) * noise
