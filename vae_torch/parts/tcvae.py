"""beta-TC-VAE: an example of an objective in a file of its own."""

import math

import torch
from torch import Tensor

from vae_torch.config import Count
from vae_torch.images import Batch
from vae_torch.parts.objectives import Loss, Noise, bound, objectives
from vae_torch.parts.posteriors import gaussian_of, log_normal
from vae_torch.vae import VAE


@objectives.register("tcvae")
class TCVAE:
    """The ELBO with its KL split into three terms; beta weights the total correlation.

    KL(q(z|x) || p(z)), averaged over images, is mutual information + total correlation + the KL of
    each dimension's marginal: Chen et al., *Isolating Sources of Disentanglement in VAEs* (NeurIPS
    2018), equation 2. log q(z) is estimated from the batch by their equation 5.

    Args:
        dataset_size: Number of training images. It shifts the estimates and changes no gradient.
    """

    def __init__(self, *, dataset_size: Count = 60_000) -> None:
        self.dataset_size = dataset_size

    def __call__(self, vae: VAE, batch: Batch, noise: Noise, beta: Tensor | float) -> Loss:
        """(B,)."""
        parts = bound(vae, batch, noise.eps[:1])
        q, z = gaussian_of(parts.q, "objective=tcvae"), parts.z[0]
        # log q(z_i,d | x_j): (B, B, latent_dim)
        each = torch.distributions.Normal(q.mean, torch.exp(0.5 * q.logvar), validate_args=False)
        pairs = each.log_prob(z.unsqueeze(1))
        log_count = math.log(len(z) * self.dataset_size)
        log_qz = pairs.sum(-1).logsumexp(1) - log_count  # (B,)
        log_marginals = (pairs.logsumexp(1) - log_count).sum(-1)  # (B,) Σ_d log q(z_d)
        mutual_information = log_normal(z, *q) - log_qz
        total_correlation = log_qz - log_marginals
        dimension_kl = log_marginals - vae.log_prior(z)
        loss = mutual_information + beta * total_correlation + dimension_kl - parts.reconstruction
        found = {
            "mutual_information": mutual_information,
            "total_correlation": total_correlation,
            "dimension_kl": dimension_kl,
        }
        return loss, {**parts.metrics(), **{name: v.detach() for name, v in found.items()}}
