"""Latents of images, and the ELBO and log p(x) of each image under a model, in nats.

`encode_images` returns all at once. `encoded_batches` works batch by batch: images and results may
then be larger than memory.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vae_torch.bars import bar
from vae_torch.data import Data, as_batch, as_loader
from vae_torch.images import Batch
from vae_torch.machine import wide
from vae_torch.parts.objectives import bound
from vae_torch.parts.posteriors import DiagonalGaussian
from vae_torch.seeds import Stream, seeded_generator
from vae_torch.vae import VAE


class Encoded(NamedTuple):
    """The results for N images, in order, on the CPU."""

    mean: Tensor  # (N, latent_dim) of q(z|x)
    logvar: Tensor | None  # (N, latent_dim); None where q(z|x) is not Gaussian
    elbo: Tensor  # (N,) float64, nats
    log_px: Tensor  # (N,) float64, nats: by importance sampling from q(z|x)
    labels: Tensor | None  # (N,); None unless all images have one
    reconstruction: Tensor | None  # (N, *input_shape) in [0, 1]; None unless asked for


def encode_images(
    vae: VAE,
    data: Data,
    *,
    num_samples: int = 100,
    chunk: int = 1024,
    seed: int = 0,
    reconstructions: bool = False,
    progress: bool = False,
) -> Encoded:
    """Encode images, and estimate the ELBO and log p(x) of each from the same samples of z.

    The noise of an image depends on the seed and its index alone, so batches and `chunk` change a
    figure only by the rounding of sums. The estimate of log p(x) rises towards it with
    `num_samples`: Burda et al. (2016), equation 8. An anomaly has a low log p(x).

    Args:
        vae: The model; it is used in eval mode.
        data: Batches x, [x] or (x, label, ...), or all images as one tensor or array.
        num_samples: Samples of z per image.
        chunk: Decoder rows at once; limits the memory.
        seed: Random seed of the samples.
        reconstructions: Also return the expected pixels at the posterior mean.
        progress: Show a bar on a terminal.

    Raises:
        ValueError: num_samples or chunk is below 1; no image, or images that `VAE.check` refuses.

    Examples:
        >>> found = encode_images(VAE(latent_dim=2), torch.rand(5, 784), num_samples=10)
        >>> found.mean.shape, found.log_px.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """
    parts = list(
        encoded_batches(
            vae,
            data,
            num_samples=num_samples,
            chunk=chunk,
            seed=seed,
            reconstructions=reconstructions,
            progress=progress,
        )
    )
    if not parts:
        raise ValueError("there is no image to encode; the loader gave no batch")
    mean, logvar, elbo, log_px, labels, reconstruction = (
        None if any(value is None for value in values) else torch.cat(values)
        for values in zip(*parts, strict=True)
    )
    assert mean is not None
    assert elbo is not None
    assert log_px is not None
    return Encoded(mean, logvar, elbo, log_px, labels, reconstruction)


def encoded_batches(
    vae: VAE,
    data: Data,
    *,
    num_samples: int = 100,
    chunk: int = 1024,
    seed: int = 0,
    reconstructions: bool = False,
    progress: bool = False,
) -> Iterator[Encoded]:
    """`encode_images`, batch by batch: each is encoded when it is asked for.

    Arguments and errors are those of `encode_images`.
    """
    if num_samples < 1 or chunk < 1:
        raise ValueError(f"num_samples={num_samples}, chunk={chunk}: both must be 1 or more")
    batches: Iterable[object] = data  # one pass: an iterator is enough
    weight = next(vae.parameters())
    if not isinstance(data, Iterator):
        batches = as_loader(data, vae.input_shape, device=weight.device)
    return _encoded(vae, batches, num_samples, chunk, seed, reconstructions, progress)


def _encoded(
    vae: VAE,
    batches: Iterable[object],
    num_samples: int,
    chunk: int,
    seed: int,
    reconstructions: bool,
    progress: bool,
) -> Iterator[Encoded]:
    weight = next(vae.parameters())
    first = 0  # index of a batch's first image
    for loaded in bar(batches, "encoding", show=progress):
        batch = as_batch(loaded, weight.device, weight.dtype)
        if not len(batch.x):
            continue
        training = vae.training
        vae.eval()
        try:
            found = _encoded_batch(vae, batch, first, num_samples, chunk, seed, reconstructions)
        finally:
            vae.train(training)
        yield found
        first += len(batch.x)


@torch.no_grad()
def _encoded_batch(
    vae: VAE,
    batch: Batch,
    first: int,
    num_samples: int,
    chunk: int,
    seed: int,
    reconstructions: bool,
) -> Encoded:
    whole = Batch(vae.check(batch.x), batch.y)
    x, y = whole
    together = max(1, chunk // num_samples)  # images
    parts = []
    for start in range(0, len(x), together):
        some = whole.rows(slice(start, start + together))
        parts.append(_estimated(vae, some, first + start, num_samples, chunk, seed))
    mean, elbo, log_px = (
        torch.cat(values).cpu() for values in zip(*(part[:3] for part in parts), strict=True)
    )
    logvars = [part[3] for part in parts if part[3] is not None]
    shown = vae.of(whole).reconstruct(x).cpu() if reconstructions else None
    logvar = torch.cat(logvars).cpu() if logvars else None
    return Encoded(mean, logvar, elbo, log_px, None if y is None else y.cpu(), shown)


def _estimated(
    vae: VAE, batch: Batch, first: int, num_samples: int, chunk: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Mean, elbo, log p(x), and logvar or None, of a few images."""
    device, count = batch.x.device, len(batch.x)
    eps = torch.stack(
        [
            torch.randn(
                num_samples,
                vae.latent_dim,
                generator=seeded_generator(device, seed, place, Stream.IMPORTANCE),
                device=device,
            )
            for place in range(first, first + count)
        ],
        1,
    ).to(batch.x.dtype)  # (K, images, latent_dim)
    elbo = wide(batch.x.new_zeros(count))
    log_w = []
    for some in eps.split(max(1, chunk // count)):
        found = bound(vae, batch, some)
        log_q = found.q.log_prob(found.z) if found.log_q is None else found.log_q
        log_w.append(wide(found.log_px_given_z + vae.log_prior(found.z) - log_q))
        elbo += wide(found.reconstruction - found.kl) * len(some) / num_samples
    logvar = found.q.logvar if isinstance(found.q, DiagonalGaussian) else None
    log_px = torch.cat(log_w).logsumexp(0) - math.log(num_samples)
    return found.q.mean, elbo, log_px, logvar
