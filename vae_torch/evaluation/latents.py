"""The use of latents: mutual information, distance to the prior, probes of labels."""

import logging
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vae_torch.evaluation.figures import Figures, is_gaussian, whole_set
from vae_torch.images import Batch
from vae_torch.machine import wide
from vae_torch.parts.posteriors import (
    gaussian_of,
    log_normal,
    reparameterize,
)
from vae_torch.seeds import Stream, seeded_generator
from vae_torch.vae import VAE, in_eval_mode

_log = logging.getLogger("vae_torch")


@in_eval_mode
def aggregate_kl(vae: VAE, x: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split the mean KL(q(z|x) || p(z)) into mutual information and KL(q(z) || p(z)).

    Hoffman and Johnson, *ELBO surgery* (2016), with q(z) the mean of the N posteriors and one
    sample of z from each.

    Returns:
        log q(z_n|x_n) - log q(z_n) and log q(z_n) - log p(z_n), (N,) each; their means are the two
        parts. In expectation the first mean is a lower bound on I(x; z), at most log N,
        and the second an upper bound.

    Raises:
        ValueError: `VAE.check` refuses x.
    """
    found = _aggregate(vae, x, seed)
    return found.own - found.log_qz, found.log_qz - found.log_pz


class _Aggregate(NamedTuple):
    """Log-densities at one sample z_n of each posterior: (N,) each, nats."""

    own: Tensor  # q(z_n|x_n)
    log_qz: Tensor  # the mean of all N posteriors
    log_qz_of_others: Tensor  # the mean of the N - 1 others
    log_pz: Tensor


@torch.no_grad()
def _aggregate(vae: VAE, x: Tensor, seed: int) -> _Aggregate:
    x = vae.check(x)
    parts = [gaussian_of(q, "the aggregate posterior") for q in vae.encode_parts(x)]
    mean, logvar = (torch.cat(each) for each in zip(*parts, strict=True))
    noise = seeded_generator(x.device, seed, Stream.AGGREGATE)
    eps = torch.randn(mean.shape, generator=noise, device=x.device, dtype=x.dtype)
    z = reparameterize(mean, logvar, eps=eps)
    own = log_normal(z, mean, logvar)
    uniform = -math.log(len(mean))
    # in double: log_mixture subtracts squares, and posteriors can be narrow
    mixture = tuple(map(wide, (mean, logvar, mean.new_full((len(mean),), uniform))))
    all_of_them, others = [], []
    for at in torch.arange(len(z), device=z.device).split(1000):
        log_q = log_components(wide(z[at]), *mixture)  # (1000, N)
        all_of_them.append(log_q.logsumexp(1))
        log_q[torch.arange(len(at)), at.cpu()] = -math.inf
        others.append(log_q.logsumexp(1))
    # restore the own posterior's share where it is so narrow that even double loses it
    log_qz = torch.maximum(torch.cat(all_of_them), wide(own + uniform))
    log_others = torch.cat(others) - math.log1p(-1 / len(z)) if len(z) > 1 else log_qz
    return _Aggregate(wide(own), log_qz, log_others, wide(vae.log_prior(z)))


def log_components(z: Tensor, means: Tensor, logvars: Tensor, log_weights: Tensor) -> Tensor:
    """Log-density of each weighted component of a Gaussian mixture: (M, D) -> (M, K)."""
    precision = torch.exp(-logvars)
    square = (z**2) @ precision.T - 2 * z @ (means * precision).T + (means**2 * precision).sum(-1)
    constant = logvars.sum(-1) + math.log(2 * math.pi) * means.shape[-1]
    return log_weights - 0.5 * (square + constant)


def put_latents(card: Figures, vae: VAE, batch: Batch, train_loader: Iterable[Any] | None) -> None:
    """Put the parts of the mean KL on the card and, with labels, the accuracy of the probes."""
    if is_gaussian(vae, batch):  # log q(z_n|x_m) of all pairs
        _put_information(card, vae.of(batch), batch.x)
    if train_loader is None or batch.y is None:
        return
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.neighbors import KNeighborsClassifier
    except ImportError:
        _log.warning("no probes of the latents: pip install scikit-learn")
        return

    train = whole_set(vae, train_loader)
    if train.y is None:
        return
    with torch.no_grad():
        train_means, means = (
            torch.cat([q.mean for q in vae.of(part).encode_parts(part.x)]).cpu().numpy()
            for part in (train, batch)
        )
    classes, train_classes = batch.y.cpu().numpy(), train.y.cpu().numpy()
    if len(np.unique(train_classes)) < 2 or len(train_means) < 10:
        return  # nothing to tell apart
    if not (np.isfinite(train_means).all() and np.isfinite(means).all()):
        return  # the classifiers would raise
    probes = {
        "linear_probe_accuracy": (
            "logistic regression",
            LogisticRegression(max_iter=2000, tol=1e-3),
        ),
        "knn_accuracy": ("10 nearest neighbours", KNeighborsClassifier(10)),
    }
    for name, (words, probe) in probes.items():
        right = probe.fit(train_means, train_classes).predict(means) == classes
        card.put(
            name,
            torch.from_numpy(right).double(),
            f"labels that {words} on the training images' posterior means finds",
            0,
            unit="share of images",
        )


def _put_information(card: Figures, vae: VAE, x: Tensor) -> None:
    """Put the parts of the mean KL on the card, each between two bounds."""
    found = _aggregate(vae, x, card.seed)
    size = f"N = {len(x):,}, log N = {math.log(len(x)):.2f}"
    card.put(
        "mutual_information",
        found.own - found.log_qz,
        f"I(x; z) in the mean KL (Hoffman, Johnson, 2016): in expectation a lower bound, and at "
        f"most log N; {size}",
        1,
    )
    card.put(
        "marginal_kl",
        found.log_qz - found.log_pz,
        "KL(q(z) || p(z)), the rest of the mean KL: in expectation an upper bound",
        1,
    )
    if len(x) > 1:
        upper, lower = found.own - found.log_qz_of_others, found.log_qz_of_others - found.log_pz
        kl = card.per_image.get("kl")
        if kl is not None and kl.mean() < upper.mean():  # which bounds I(x; z) from above as well
            upper, lower = kl, torch.zeros_like(kl)
        card.put(
            "mutual_information_upper",
            upper,
            "an upper bound on I(x; z), in expectation: q(z) without the own posterior (Poole et "
            f"al., 2019), or the mean KL where that is less; {size}",
            1,
        )
        card.put(
            "marginal_kl_lower",
            lower,
            "the mean KL minus mutual_information_upper: a lower bound on KL(q(z) || p(z))",
            1,
        )
