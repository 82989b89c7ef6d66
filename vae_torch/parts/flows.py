"""Normalizing flows as prior and as posterior, by zuko (the extra `flow`).

Coupling transformations (Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, ICLR
2017) cost the same in both directions. A posterior needs both: samples and densities.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vae_torch.config import ConfigError, Count
from vae_torch.parts.posteriors import posteriors
from vae_torch.parts.priors import priors


@priors.register("flow")
class FlowPrior(nn.Module):
    """p(z): a standard normal, transformed.

    Args:
        latent_dim: Dimensions of z.
        transforms: Coupling layers, one after the other.
        width: Units of each of the two hidden layers of a coupling.
    """

    def __init__(self, latent_dim: int, *, transforms: Count = 4, width: Count = 128) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.flow = _flow(latent_dim, 0, transforms, width)

    def log_prob(self, z: Tensor) -> Tensor:
        """(..., latent_dim) -> (...), nats."""
        return self.flow().log_prob(z)  # type: ignore[no-any-return]

    def sample(
        self, n: int, generator: torch.Generator | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        """(n, latent_dim) samples; the temperature scales the noise (Kingma and Dhariwal, 2018)."""
        weight = next(self.parameters())
        noise = torch.randn(n, self.latent_dim, generator=generator, device=weight.device)
        return self.flow().transform.inv(temperature * noise.to(weight))  # type: ignore[no-any-return]


@posteriors.register("flow")
class FlowPosterior(nn.Module):
    """q(z|x): a standard normal, transformed by couplings that see the features.

    Rezende and Mohamed, *Variational Inference with Normalizing Flows* (ICML 2015).

    Args:
        features: Number of encoder features.
        latent_dim: Dimensions of z.
        transforms: Coupling layers, one after the other.
        width: Units of each of the two hidden layers of a coupling.
    """

    def __init__(
        self, features: int, latent_dim: int, *, transforms: Count = 4, width: Count = 128
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.flow = _flow(latent_dim, features, transforms, width)

    def forward(self, h: Tensor) -> "FlowDistribution":
        """(B, features) -> q(z|x)."""
        return FlowDistribution(self.flow(h.to(next(self.parameters()).dtype)), h, self.latent_dim)


class FlowDistribution:
    """q(z|x) of a batch: see `posteriors.Posterior`."""

    def __init__(self, distribution: Any, h: Tensor, latent_dim: int) -> None:
        self._distribution = distribution
        self._zeros = h.new_zeros(len(h), latent_dim)

    @property
    def mean(self) -> Tensor:
        """Where zero noise goes, (B, latent_dim): the centre of the samples, not their mean."""
        return self.rsample(self._zeros)

    def rsample(self, eps: Tensor) -> Tensor:
        """Latents for this noise, (..., B, latent_dim)."""
        return self._distribution.transform.inv(eps)  # type: ignore[no-any-return]

    def sample(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Latents for this noise, and log q of each, (..., B)."""
        z, log_volume = self._distribution.transform.inv.call_and_ladj(eps)
        return z, self._distribution.base.log_prob(eps) - log_volume

    def noise_of(self, z: Tensor) -> Tensor:
        """The noise that gives these latents, (..., B, latent_dim)."""
        return self._distribution.transform(z)  # type: ignore[no-any-return]

    def log_prob(self, z: Tensor) -> Tensor:
        """(..., B, latent_dim) -> (..., B), nats."""
        return self._distribution.log_prob(z)  # type: ignore[no-any-return]


def _flow(latent_dim: int, context: int, transforms: int, width: int) -> nn.Module:
    try:
        import zuko
    except ModuleNotFoundError:
        raise ConfigError(
            "a flow needs zuko, which is not installed; pip install -e '.[flow]'"
        ) from None
    flow: nn.Module = zuko.flows.MAF(
        latent_dim, context, transforms=transforms, passes=2, hidden_features=(width, width)
    )
    return flow
