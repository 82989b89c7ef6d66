"""Samples from a model: at a temperature, with expected or with sampled pixels."""

import inspect
from typing import Literal

import torch
from torch import Tensor

from vae_torch.config import ConfigError
from vae_torch.parts.likelihoods import Bernoulli, ContinuousBernoulli, Gaussian
from vae_torch.vae import VAE


@torch.no_grad()
def draw_samples(
    vae: VAE,
    n: int,
    *,
    y: Tensor | int | None = None,
    temperature: float = 1.0,
    pixels: Literal["mean", "draw"] = "mean",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Sample images from the model.

    Args:
        vae: The model.
        n: How many.
        y: For a conditional model: one class, or (n,): a class for each image.
        temperature: Factor on the prior's standard deviations: of a mixture's components, of a
            flow's noise, of both layers. Below 1 gives fewer odd images and less variety; 0 decodes
            the centres.
        pixels: `mean` for expected pixels given z, `draw` for samples of p(x|z).
        seed: The same seed gives the same images.

    Returns:
        Images (n, *input_shape) in [0, 1], and their latents (n, latent_dim).

    Raises:
        ValueError: n is below 1, or the temperature is negative; labels as in `VAE.encode`.
        ConfigError: The prior has no temperature, or the likelihood cannot sample pixels.
    """
    if n < 1 or not 0 <= temperature < float("inf"):
        raise ValueError(f"n is {n}, temperature {temperature}; they must be 1 or more, 0 or more")
    weight = next(vae.parameters())
    generator = torch.Generator(weight.device).manual_seed(seed)
    z = _latents(vae, n, temperature, generator).to(weight)
    params = vae.decode(z, y)
    images = (
        vae.likelihood.mean(params) if pixels == "mean" else draw_pixels(vae, params, generator)
    )
    return images, z


def _latents(vae: VAE, n: int, temperature: float, generator: torch.Generator) -> Tensor:
    """(n, latent_dim)."""
    draw = vae.prior.sample
    if temperature == 1:
        return draw(n, generator)  # type: ignore[no-any-return]
    if "temperature" not in inspect.signature(draw).parameters:
        raise ConfigError(
            f"temperature={temperature} with a prior of your own whose sample() takes none; give "
            "it one, sample(n, generator, *, temperature=1.0), or use temperature=1.0"
        )
    return draw(n, generator, temperature=temperature)  # type: ignore[no-any-return]


@torch.no_grad()
def draw_pixels(vae: VAE, params: Tensor, generator: torch.Generator) -> Tensor:
    """A sample of p(x|z) for each decoder output: (n, *shape) -> (n, *shape) in [0, 1].

    Raises:
        ConfigError: This likelihood cannot sample. One of your own can with a
            `sample(params, generator)`.
    """
    likelihood = vae.likelihood
    if sample := getattr(likelihood, "sample", None):
        return sample(params, generator)  # type: ignore[no-any-return]
    if isinstance(likelihood, Bernoulli):
        return torch.bernoulli(likelihood.mean(params), generator=generator)
    if isinstance(likelihood, ContinuousBernoulli):
        uniform = torch.rand(params.shape, generator=generator, device=params.device)
        of_torch = torch.distributions.ContinuousBernoulli(logits=params)
        return of_torch.icdf(uniform.to(params))  # type: ignore[no-any-return]
    if isinstance(likelihood, Gaussian):
        normal = torch.randn(params.shape, generator=generator, device=params.device)
        drawn = params + torch.exp(0.5 * likelihood.logvar) * normal.to(params)
        return drawn.clamp(0, 1)
    raise ConfigError(
        "pixels=draw with a likelihood that cannot sample; give it a sample(params, generator), or "
        "use pixels=mean"
    )
