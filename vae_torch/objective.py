"""KL, ELBO, the importance-weighted bound and the Keras loss: functions of tensors, in nats.

Every function returns one value per image, (B,): pixels and latent dimensions are summed, and the
training loop takes the mean over images, once.
"""

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_torch.config import ObjectiveConfig
from vae_torch.likelihood import as_images, check_pixels, is_transformed, pair_images
from vae_torch.model import VAE, reparameterize
from vae_torch.prior import StandardNormal, log_normal

# A latent dimension is active where the posterior means vary by more over images: Burda et al.
# (2016), section 5.2.
ACTIVE_UNIT_VARIANCE = 0.01


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
    # expm1 keeps the digits where the posterior is the prior and both parts vanish
    return 0.5 * (mean**2 + torch.expm1(logvar) - logvar)


def kl_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(q(z|x) || N(0, I)) summed over latent dimensions: (..., latent_dim) -> (...), nats."""
    return kl_per_dim(mean, logvar).sum(-1)


def elbo(x: Tensor, logits: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    r"""The evidence lower bound E_q log p(x|z) - KL(q(z|x) || N(0, I)) ≤ log p(x).

    One-sample estimate with Bernoulli pixels and the KL in closed form: Kingma and Welling (2013),
    equation 10. `elbo(x, *vae(x)[:3])` is the usual call.

    Args:
        x: (B, *shape) in [0, 1].
        logits: (B, *shape) decoder outputs, before the sigmoid.
        mean: (B, latent_dim).
        logvar: (B, latent_dim).

    Returns:
        (B,), nats per image.

    Raises:
        ValueError: x is outside [0, 1], or one of them has other images than another.
    """
    return -_cross_entropy(x, logits, mean).sum(-1) - kl_standard_normal(mean, logvar)


def keras_loss(x: Tensor, logits: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """The notebook's loss: cross-entropy *averaged* over pixels plus KL *summed* over latents.

    That weights the KL as many times too much as an image has pixels, and the posterior collapses.
    It is here to reproduce the notebook; train with `elbo`. Arguments and errors as in `elbo`.

    Returns:
        (B,); lower is better, and no bound on anything.
    """
    return _cross_entropy(x, logits, mean).mean(-1) + kl_standard_normal(mean, logvar)


def iwae_bound(log_w: Tensor) -> Tensor:
    r"""The importance-weighted bound log 1/K Σ_k w_k, tighter than the ELBO for K > 1.

    Burda, Grosse and Salakhutdinov, *Importance Weighted Autoencoders* (ICLR 2016), equation 8.

    Args:
        log_w: (K, B): log p(x, z_k) - log q(z_k|x) of K draws, nats. `objective.log_weights`
            computes them.

    Returns:
        (B,), nats per image.

    Raises:
        ValueError: Another shape, or no draw.
    """
    if log_w.ndim != 2 or len(log_w) == 0:
        raise ValueError(f"log_w has shape {tuple(log_w.shape)}; it must be (K, B) with K >= 1")
    return torch.logsumexp(log_w, 0) - math.log(len(log_w))


def log_weights(vae: VAE, x: Tensor, q: tuple[Tensor, Tensor], eps: Tensor) -> Tensor:
    """Log-weights log p(x|z_k) + log p(z_k) - log q(z_k) at z_k = mean + exp(logvar / 2) eps_k.

    Args:
        vae: The model.
        x: (B, *shape) in [0, 1].
        q: Mean and log-variance, (B, latent_dim) each: `vae.encode(x)`, or any other Gaussians.
        eps: (K, B, latent_dim) standard normal noise.

    Returns:
        (K, B), nats.

    Raises:
        ValueError: x holds no images of the model's shape.
    """
    x = as_images(x, vae.input_shape)
    z = reparameterize(*q, eps=eps)
    logits = vae.decode(z)
    if len(x) == 1:  # one product instead of passes over the pixels of every draw
        log_px_given_z = vae.likelihood.affine(x.flatten(1), logits.flatten(0, 1).flatten(1)).T
    else:
        log_px_given_z = vae.likelihood.log_prob(x, logits)
    return log_px_given_z + vae.log_prior(z) - log_normal(z, *q)


class Terms(NamedTuple):
    """One batch's worth of what is minimised and what is logged."""

    loss: Tensor  # (), what is minimised
    elbo: Tensor  # (B,) the plain bound: no beta, no warm-up, no free bits
    reconstruction: Tensor  # (B,) log p(x|z), higher is better
    kl: Tensor  # (B,) KL(q(z|x) || p(z)); unless the prior is standard, estimated from the draws
    kl_per_dim: Tensor  # (latent_dim,) batch mean against the standard normal


def objective_terms(
    vae: VAE,
    x: Tensor,
    eps: Tensor,
    objective: ObjectiveConfig,
    beta: float | Tensor = 1.0,
    choice: Tensor | None = None,
) -> Terms:
    """What `objective` minimises on one batch, with the plain bound beside it.

    Args:
        vae: The model.
        x: (B, *shape) in [0, 1].
        eps: (K, B, latent_dim) noise; several draws are averaged (elbo) or weighted (iwae).
        objective: Which loss.
        beta: The KL's weight at this epoch, warm-up included. For iwae, the weight of
            log p(z) - log q(z|x) inside the bound.
        choice: (B,) uniform noise in [0, 1), for iwae: with it the gradient goes through one draw
            an image, chosen by its weight. Of the same expectation, at K passes forward and one
            back: Burda et al. (2016), section 3.

    Raises:
        ValueError: x holds no images of the model's shape. Their values are not looked at: a check
            would cost every training step.
    """
    x = as_images(x, vae.input_shape)
    q = mean, logvar = vae.encode(x)
    with nullcontext() if choice is None else torch.no_grad():
        draws = _draw(vae, x, q, eps)
    reconstruction = draws.log_px_given_z.mean(0)
    kl_parts = kl_per_dim(mean, logvar)  # (B, latent_dim)
    kl_dims = kl_parts.mean(0)  # (latent_dim,)
    if isinstance(vae.prior, StandardNormal):
        kl = kl_parts.sum(-1)
    else:  # no closed form: the draws that the decoder saw estimate it
        kl = (log_normal(draws.z, *q) - vae.log_prior(draws.z)).mean(0)

    if objective.name == "keras":
        loss = (kl - reconstruction / x[0].numel()).mean()
    elif objective.name == "iwae":
        loss = -_weighted_bound(vae, x, q, eps, draws, objective, beta, choice).mean()
    elif objective.free_bits > 0:
        # Kingma et al. (2016), appendix C.8: each dimension's batch mean may cost this much free
        loss = -reconstruction.mean() + beta * kl_dims.clamp(min=objective.free_bits).sum()
    else:
        loss = (beta * kl - reconstruction).mean()

    return Terms(
        loss,
        (reconstruction - kl).detach(),
        reconstruction.detach(),
        kl.detach(),
        kl_dims.detach(),
    )


class _Draws(NamedTuple):
    """What an image's posterior gives, and what the decoder makes of it."""

    z: Tensor  # (K, B, latent_dim)
    log_px_given_z: Tensor  # (K, B)


def _draw(vae: VAE, x: Tensor, q: tuple[Tensor, Tensor], eps: Tensor) -> _Draws:
    z = reparameterize(*q, eps=eps)
    return _Draws(z, vae.likelihood.log_prob(x, vae.decode(z)))


def _weighted_bound(
    vae: VAE,
    x: Tensor,
    q: tuple[Tensor, Tensor],
    eps: Tensor,
    draws: _Draws,
    objective: ObjectiveConfig,
    beta: float | Tensor,
    choice: Tensor | None,
) -> Tensor:
    """The importance-weighted bound (B,), with the gradient that the settings ask for.

    It is Σ_k w_k ∇ log w_k with the normalised weights w, or, where `choice` draws one k by w,
    ∇ log w_k of that one: Burda et al. (2016), section 3.

    DReG, Tucker et al., *Doubly Reparameterized Gradient Estimators* (ICLR 2019), equation 8: with
    q's own parameters stopped in log q, what flows back through z_k counts w_k once more. Where
    beta weighs log q, the same derivation leads to (1 - beta) + beta w_k.

    `q` is a mean and a log-variance, (B, latent_dim) each, and `draws` come of them and of eps; the
    other arguments are those of `objective_terms`.
    """
    dreg = objective.estimator == "dreg"
    seen = (q[0].detach(), q[1].detach()) if dreg else q

    def weigh(draws: _Draws) -> Tensor:
        return draws.log_px_given_z + beta * (vae.log_prior(draws.z) - log_normal(draws.z, *seen))

    log_w = weigh(draws)  # (K, B)
    if not dreg and choice is None:
        # torch.func differentiates this as it is; the other gradient differs in rounding only
        return iwae_bound(log_w) if is_transformed(log_w) else _weighted_by_softmax(log_w)
    bound = iwae_bound(log_w)
    weights = log_w.detach().softmax(0)
    shares = weights
    if choice is not None:
        k = (weights.cumsum(0) <= choice).sum(0, keepdim=True).clamp(max=len(eps) - 1)  # (1, B)
        weights = weights.gather(0, k)
        shares = torch.ones_like(weights)
        eps = eps.gather(0, k.unsqueeze(-1).expand(-1, -1, vae.latent_dim))
        draws = _draw(vae, x, q, eps)
        log_w = weigh(draws)  # (1, B)
    if dreg and draws.z.requires_grad:
        draws.z.register_hook(lambda grad: grad * (1 - beta + beta * weights).unsqueeze(-1))
    surrogate = (shares * _first_derivative_only(log_w)).sum(0)
    return bound.detach() + (surrogate - surrogate.detach())


def _weighted_by_softmax(log_w: Tensor) -> Tensor:
    """`iwae_bound`, whose gradient Σ_k w_k ∇ log w_k is written out: (K, B) -> (B,)."""
    bound: Tensor = _WeightedBySoftmax.apply(log_w)
    return bound


class _WeightedBySoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_w: Tensor) -> Tensor:
        ctx.save_for_backward(log_w)
        return iwae_bound(log_w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (log_w,) = ctx.saved_tensors
        return grad * log_w.softmax(0)  # type: ignore[no-any-return]


def _first_derivative_only(log_w: Tensor) -> Tensor:
    """The same values; whoever differentiates twice through them gets an error.

    What DReG and the choice of one draw pass back is an estimate of the bound's gradient, and the
    derivative of an estimate is none of the bound.
    """
    same: Tensor = _FirstDerivativeOnly.apply(log_w)
    return same


class _FirstDerivativeOnly(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(log_w: Tensor) -> Tensor:
        return log_w.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # nobody will ask for a second derivative
            return grad
        return _Refusal.apply(grad, *ctx.saved_tensors)  # type: ignore[no-any-return]


class _Refusal(torch.autograd.Function):
    """Passes a gradient on and stands in the way of its derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, log_w: Tensor) -> Tensor:  # noqa: ARG004
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        raise RuntimeError(
            "objective.estimator=dreg and objective.resample=true have a first derivative only; "
            "for a second one use objective.estimator=standard and objective.resample=false"
        )


def _cross_entropy(x: Tensor, logits: Tensor, mean: Tensor) -> Tensor:
    """(B, pixels), nats."""
    check_pixels(x)
    x, logits = pair_images(x, logits)
    if logits.ndim != 2:
        raise ValueError(f"logits of shape {tuple(logits.shape)}, pixels flat; must be (B, pixels)")
    if mean.shape[:-1] != x.shape[:1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and mean {tuple(mean.shape)}; mean must be (B, "
            "latent_dim) with as many images"
        )
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none")
