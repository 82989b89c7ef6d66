"""Checks with images sampled from the model: of the encoder, and of the model itself."""

import numpy as np
import torch
from torch import Tensor

from vae_torch.config import ConfigError
from vae_torch.data import Data, images_of
from vae_torch.evaluation.figures import Figures, is_score
from vae_torch.images import Batch
from vae_torch.machine import wide
from vae_torch.parts.likelihoods import Gaussian
from vae_torch.parts.posteriors import DiagonalGaussian, Posterior
from vae_torch.samples import draw_pixels
from vae_torch.seeds import Stream, seeded_generator
from vae_torch.vae import VAE

_IMAGES, _NEAREST = 2000, 500  # images of each kind, for the test and for distances
_NORMAL_95 = 1.959964  # standard deviations


@torch.no_grad()
def put_simulated(card: Figures, vae: VAE, batch: Batch, train_loader: Data | None) -> None:
    """Put a calibration of q(z|x) and a two-sample test on the card, if the model can be sampled.

    Sampled Bernoulli pixels are 0 or 1. That alone tells them from grey test images, so the figures
    are left out for those.

    Args:
        card: Gets the figures.
        vae: The model.
        batch: All evaluated images, with labels for a conditional model.
        train_loader: Adds the distance of samples to the nearest training image.
    """
    x, seed = batch.x, card.seed
    if is_score(vae, x) or len(x) < 10:
        return
    noise = seeded_generator(x.device, seed, Stream.SIMULATED)
    order = torch.randperm(len(x), generator=seeded_generator("cpu", seed, Stream.SIMULATED))
    chosen, samples, held = order[:_IMAGES].to(x.device), [], []
    for at in chosen.split(1000):
        model = vae.of(Batch(x[at], None if batch.y is None else batch.y[at]))
        z = model.prior.sample(len(at), noise).to(x)
        try:
            drawn = simulated_pixels(model, model.decode(z), noise)
        except ConfigError:  # a likelihood that cannot be sampled
            return
        samples.append(drawn)
        held.append(_inside(model.encode(drawn), z, seed))
    _put_coverage(card, wide(torch.cat(held)))
    _put_auc(card, x[chosen], torch.cat(samples))
    if train_loader is not None:
        _put_nearest(card, x[chosen], torch.cat(samples), train_loader)


def simulated_pixels(vae: VAE, params: Tensor, noise: torch.Generator) -> Tensor:
    """A sample of p(x|z) for each decoder output, exactly as the likelihood has it.

    Raises:
        ConfigError: This likelihood cannot sample.
    """
    if isinstance(vae.likelihood, Gaussian):  # not clamped to [0, 1], unlike images to look at
        normal = torch.randn(params.shape, generator=noise, device=params.device).to(params)
        return params + torch.exp(0.5 * vae.likelihood.logvar) * normal
    return draw_pixels(vae, params, noise)


def _inside(q: Posterior, z: Tensor, seed: int) -> Tensor:
    """Whether each coordinate of z lies in the central 95% of q's samples: (N, latent_dim)."""
    if isinstance(q, DiagonalGaussian):
        return (z - q.mean).abs() < _NORMAL_95 * torch.exp(0.5 * q.logvar)
    # the rank of one sample among 399 others is uniform on 0 to 399; 380 of these ranks count
    noise = seeded_generator(z.device, seed, Stream.SIMULATED, 1)
    rank = torch.zeros_like(z, dtype=torch.long)
    for _ in range(19):  # 21 at a time limit the memory
        eps = torch.randn((21, *z.shape), generator=noise, device=z.device).to(z)
        rank += (q.rsample(eps) < z).sum(0)
    return (rank >= 10) & (rank < 390)


def _put_coverage(card: Figures, held: Tensor) -> None:
    """How often the encoder's intervals hold the z that an image was made from: (N, latent_dim).

    Talts et al., *Validating Bayesian Inference Algorithms with Simulation-Based Calibration*
    (2018): for exact posteriors it is the nominal share, whatever the model.
    """
    card.put(
        "interval_coverage",
        held.mean(1),
        "share of the z that images were drawn from inside the encoder's 95% intervals",
        1,
        unit="share of latents",
        stored=False,
        more={"per_dim": held.mean(0).tolist()},
    )


def _put_auc(card: Figures, x: Tensor, drawn: Tensor) -> None:
    """Train a classifier on half of both to tell samples from test images."""
    try:
        from sklearn.ensemble import RandomForestClassifier
    except ImportError:
        return
    half = len(x) // 2
    parts = [part.flatten(1).float().cpu().numpy() for part in (drawn, x)]
    labels = np.repeat([0, 1], half)
    forest = RandomForestClassifier(200, random_state=card.seed)
    forest.fit(np.concatenate([part[:half] for part in parts]), labels)
    low, high = (forest.predict_proba(part[half:])[:, 1] for part in parts)
    value, error = auc(high, low)
    card.put(
        "sample_auc",
        value,
        "area under the ROC curve of a random forest that tells test images from samples; 0.5: it "
        "cannot",
        1,
        unit="share of pairs",
        standard_error=error,
        num_images=len(x),
    )


def auc(high: np.ndarray, low: np.ndarray) -> tuple[float, float]:
    """How often a score of `high` is above one of `low`, with its standard error.

    DeLong, DeLong and Clarke-Pearson, *Comparing the Areas under Two or More Correlated Receiver
    Operating Characteristic Curves* (1988).
    """
    above = (high[:, None] > low) + 0.5 * (high[:, None] == low)
    variance = above.mean(1).var(ddof=1) / len(high) + above.mean(0).var(ddof=1) / len(low)
    return float(above.mean()), float(np.sqrt(variance))


def _put_nearest(card: Figures, x: Tensor, drawn: Tensor, train_loader: Data) -> None:
    """How near samples are to training images, compared with the test images."""
    drawn = drawn[:_NEAREST]
    both = torch.cat([drawn, x[:_NEAREST]]).flatten(1)
    nearest = both.new_full((len(both),), torch.inf)
    for batch in train_loader:
        found = torch.cdist(both, images_of(batch).to(both).flatten(1)).amin(1)
        nearest = torch.minimum(nearest, found)
    of_samples, of_images = wide(nearest).split(len(drawn))
    card.put(
        "nearest_train_image",
        of_samples,
        "Euclidean distance of samples to the nearest training image; if it is much less than that "
        "of test images, the model copies",
        1,
        unit="pixels",
        stored=False,
        more={"of_test_images": of_images.mean().item()},
    )
