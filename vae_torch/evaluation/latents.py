"""How a model uses its latents: mutual information, distance to the prior, probes of labels."""

import logging
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vae_torch.evaluation.figures import Figures, whole_set
from vae_torch.model import VAE, reparameterize
from vae_torch.prior import log_mixture, log_normal
from vae_torch.seeds import Stream, seeded_generator

_log = logging.getLogger("vae_torch")


@torch.no_grad()
def aggregate_kl(vae: VAE, x: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The mean KL(q(z|x) || p(z)) as mutual information plus KL(q(z) || p(z)).

    Hoffman and Johnson, *ELBO surgery* (2016), with q(z) the mean of the N posteriors and one draw
    of z from each.

    Returns:
        log q(z_n|x_n) - log q(z_n) and log q(z_n) - log p(z_n), (N,) each; their means are the two
        parts. The first mean cannot exceed log N.

    Raises:
        ValueError: `VAE.check` refuses x.
    """
    x = vae.check(x)
    mean, logvar = vae.encode(x)
    noise = seeded_generator(x.device, seed, Stream.AGGREGATE)
    eps = torch.randn(mean.shape, generator=noise, device=x.device, dtype=x.dtype)
    z = reparameterize(mean, logvar, eps=eps)
    uniform = mean.new_full((len(mean),), -math.log(len(mean)))
    # in double, since posteriors can be narrow where log_mixture subtracts squares
    parts = (mean.double(), logvar.double(), uniform.double())
    log_qz = torch.cat([log_mixture(some.double(), *parts) for some in z.split(1000)])
    own = log_normal(z, mean, logvar)
    # the own posterior's share: where all are so narrow that the squares lose it even in double
    log_qz = torch.maximum(log_qz, own + uniform)
    return own - log_qz, log_qz - vae.log_prior(z)


def put_latents(
    card: Figures, vae: VAE, x: Tensor, labels: Tensor | None, train_loader: Iterable[Any] | None
) -> None:
    """Put the parts of the mean KL on the card and, with labels, the probes' accuracies."""
    information, marginal = aggregate_kl(vae, x, seed=card.seed)
    card.put(
        "mutual_information",
        information,
        f"I(x; z) in the mean KL (Hoffman, Johnson, 2016); at most log N = {math.log(len(x)):.2f}",
        1,
    )
    full = information.mean() > math.log(len(x)) - 0.5
    note = "; only an upper bound, as I(x; z) stands at its ceiling of log N" if full else ""
    card.put("marginal_kl", marginal, f"KL(q(z) || p(z)), the rest of the mean KL{note}", 1)
    if train_loader is None or labels is None:
        return
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.neighbors import KNeighborsClassifier
    except ImportError:
        _log.warning("no probes of the latents: pip install scikit-learn")
        return

    train_x, train_labels = whole_set(vae, train_loader)
    if train_labels is None:
        return
    with torch.no_grad():
        train_means, means = (vae.encode(part)[0].cpu().numpy() for part in (train_x, x))
    classes, train_classes = labels.cpu().numpy(), train_labels.cpu().numpy()
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
