"""Objectives: what training minimises. Also the bounds as functions of tensors, in nats.

Every function returns one value per image, (B,): pixels and latent dimensions are summed, and the
training loop takes the mean over images, once. An objective is a class:

    @objectives.register("mine")
    class Mine:
        def __init__(self, *, strength: float = 1.0) -> None: ...
        def __call__(self, vae, batch, noise, beta): ...  # a loss (B,), or a loss and metrics

See `Objective`.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_torch.config import ConfigError, ObjectiveConfig
from vae_torch.images import Batch, as_images, check_pixels, pair_images
from vae_torch.parts.likelihoods import Bernoulli, is_transformed, pairwise
from vae_torch.parts.posteriors import DiagonalGaussian, Posterior, gaussian_of, kl_per_dim
from vae_torch.parts.registry import Table
from vae_torch.vae import VAE

# A latent dimension is active if its posterior mean varies by more than this over the images:
# Burda et al. (2016), section 5.2.
ACTIVE_UNIT_VARIANCE = 0.01


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
        ValueError: x is outside [0, 1], or the arguments hold different numbers of images.
    """
    return -_cross_entropy(x, logits, mean).sum(-1) - kl_standard_normal(mean, logvar)


def keras_loss(x: Tensor, logits: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """The notebook's loss: cross-entropy *averaged* over pixels plus KL *summed* over latents.

    This weights the KL too much by a factor of the number of pixels, and the posterior collapses.
    It is here to reproduce the notebook; train with `elbo`. Arguments and errors as in `elbo`.

    Returns:
        (B,); lower is better. It is not a bound on anything.
    """
    return _cross_entropy(x, logits, mean).mean(-1) + kl_standard_normal(mean, logvar)


def iwae_bound(log_w: Tensor) -> Tensor:
    r"""The importance-weighted ELBO log 1/K Σ_k w_k, tighter than the ELBO for K > 1.

    Burda, Grosse and Salakhutdinov, *Importance Weighted Autoencoders* (ICLR 2016), equation 8.

    Args:
        log_w: (K, B): log p(x, z_k) - log q(z_k|x) of K samples, nats. `objective.log_weights`
            computes them.

    Returns:
        (B,), nats per image.

    Raises:
        ValueError: Another shape, or K is 0.
    """
    if log_w.ndim != 2 or len(log_w) == 0:
        raise ValueError(f"log_w has shape {tuple(log_w.shape)}; it must be (K, B) with K >= 1")
    return torch.logsumexp(log_w, 0) - math.log(len(log_w))


def log_weights(vae: VAE, x: Tensor, q: Posterior, eps: Tensor) -> Tensor:
    """Log-weights log p(x|z_k) + log p(z_k) - log q(z_k) of the latents z_k that q makes of eps_k.

    Args:
        vae: The model.
        x: (B, *shape) in [0, 1].
        q: `vae.encode(x)`, or any other posterior of these images.
        eps: (K, B, latent_dim) standard normal noise.

    Returns:
        (K, B), nats.

    Raises:
        ValueError: x does not hold images of the model's shape.
    """
    x = as_images(x, vae.input_shape)
    z, log_q = q.sample(eps)
    params = vae.decode(z)
    if len(x) == 1:  # one matrix multiplication instead of a pass over the pixels of every sample
        log_px_given_z = pairwise(vae.likelihood, x, params.squeeze(1)).T
    else:
        log_px_given_z = vae.likelihood.log_prob(x, params)
    return log_px_given_z + vae.log_prior(z) - log_q


class Noise(NamedTuple):
    """The random numbers of one batch, drawn in advance so that a step can be repeated."""

    eps: Tensor  # (K, B, latent_dim), standard normal: K samples of z per image
    choice: Tensor | None = None  # (B,) uniform in [0, 1), where the objective's `resample` is true


# An objective's loss, (B,), or () for a loss of the batch as a whole; and the metrics that are
# logged of each image: (B,) each, or (B, n) for a list of n numbers.
Loss = tuple[Tensor, Mapping[str, Tensor]]


class Bound(NamedTuple):
    """The terms of the ELBO on one batch, and what they were computed from."""

    reconstruction: Tensor  # (B,) log p(x|z), averaged over the samples; higher is better
    kl: Tensor  # (B,) KL(q(z|x) || p(z)); estimated from the samples where it has no closed form
    kl_per_dim: Tensor | None  # (B, latent_dim), where it has a closed form
    kl_per_layer: Tensor | None  # (B, layers), for several stochastic layers; estimated
    q: Posterior
    z: Tensor  # (K, B, latent_dim)
    log_q: Tensor | None  # (K, B) log q(z|x), if it was computed along with z
    log_px_given_z: Tensor  # (K, B)

    def metrics(self) -> dict[str, Tensor]:
        """What to log; the plain ELBO is reconstruction - kl."""
        found = {"reconstruction": self.reconstruction.detach(), "kl": self.kl.detach()}
        if self.kl_per_dim is not None:
            found["kl_per_dim"] = self.kl_per_dim.detach()
        if self.kl_per_layer is not None:
            found["kl_per_layer"] = self.kl_per_layer.detach()
        return found


def bound(vae: VAE, batch: Batch, eps: Tensor, *, gradients: bool = True) -> Bound:
    """The plain ELBO on one batch: no beta, no warm-up, no free bits.

    Args:
        vae: The model.
        batch: x (B, *shape) in [0, 1].
        eps: (K, B, latent_dim) standard normal noise; the result is averaged over the K samples.
        gradients: Whether they flow through the samples. Those of a closed-form KL always do.

    Raises:
        ValueError: x does not hold images of the model's shape. Pixel values are not checked: that
            would slow down every training step.
    """
    x = as_images(batch.x, vae.input_shape)
    vae = vae.of(batch)
    q = vae.encode(x)
    with nullcontext() if gradients else torch.no_grad():
        draws = _draw(vae, x, q, eps)
    reconstruction = draws.log_px_given_z.mean(0)
    per_dim = vae.kl_per_dim(q)  # (B, latent_dim)
    if per_dim is not None:
        return Bound(reconstruction, per_dim.sum(-1), per_dim, None, q, *draws)
    # no closed form: estimate it from the samples that the decoder saw
    kl_per_layer = getattr(vae.prior, "kl_per_layer", None)
    per_layer: Tensor | None = kl_per_layer(q, draws.z) if kl_per_layer else None
    if per_layer is not None:
        return Bound(reconstruction, per_layer.sum(-1), None, per_layer, q, *draws)
    log_q = q.log_prob(draws.z) if draws.log_q is None else draws.log_q
    kl = (log_q - vae.log_prior(draws.z)).mean(0)
    return Bound(reconstruction, kl, None, None, q, *draws)


class _Draws(NamedTuple):
    """Samples of z for each image, and what the decoder makes of them."""

    z: Tensor  # (K, B, latent_dim)
    log_q: Tensor | None  # (K, B)
    log_px_given_z: Tensor  # (K, B)


def _draw(vae: VAE, x: Tensor, q: Posterior, eps: Tensor) -> _Draws:
    if isinstance(q, DiagonalGaussian):  # its density costs little, and is not always needed
        z, log_q = q.rsample(eps), None
    else:
        z, log_q = q.sample(eps)
    return _Draws(z, log_q, vae.likelihood.log_prob(x, vae.decode(z)))


objectives: "Table[type]" = Table("objective", "objective.options")


class Objective(Protocol):
    """The contract of an objective, which `train(objective=...)` takes too.

    It may have two attributes: `num_samples`, the samples of z per image (1 if left out), and
    `resample`, whether it needs `noise.choice`.
    """

    def __call__(self, vae: VAE, batch: Batch, noise: Noise, beta: Tensor | float) -> Tensor | Loss:
        """Compute what is minimised and what is logged.

        Args:
            vae: The model, in train mode for a training step.
            batch: Images and labels.
            noise: The random numbers of this batch.
            beta: The KL's weight at this epoch, warm-up included.
        """


def as_objective(objective: "ObjectiveConfig | Objective") -> Objective:
    """The objective that the settings name, or the given one.

    Raises:
        ConfigError: Unknown name, or an option that it does not have.
    """
    if not isinstance(objective, ObjectiveConfig):
        return objective
    default = ObjectiveConfig()
    shared = {
        name: (getattr(objective, name), getattr(default, name))
        for name in ("num_samples", "free_bits", "estimator", "resample")
    }
    made: Objective = objectives.build(objective.name, objective.options, shared=shared)
    return made


def monitor_of(objective: Any) -> str:
    """The metric that chooses the best epoch by default: the bound that is trained."""
    return f"test/{getattr(objective, 'bound_name', 'elbo')}"


def draw_noise(
    objective: Objective, samples: int, images: int, latent_dim: int, generator: torch.Generator
) -> Noise:
    """Draw the noise of one batch, on the generator's device.

    Args:
        objective: Says whether `choice` is needed.
        samples: Samples of z per image.
        images: Images in the batch.
        latent_dim: Dimensions of z.
        generator: Source of the random numbers.
    """
    device = generator.device
    eps = torch.randn(samples, images, latent_dim, generator=generator, device=device)
    if not getattr(objective, "resample", False):
        return Noise(eps)
    return Noise(eps, torch.rand(images, generator=generator, device=device))


def loss_and_metrics(
    objective: Objective, vae: VAE, batch: Batch, noise: Noise, beta: Tensor | float
) -> Loss:
    """An objective's loss, (B,) or (), and its metrics, if it gives any.

    Raises:
        ValueError: Loss or metrics have another shape.
    """
    found = objective(vae.of(batch), batch, noise, beta)  # the objective need not know about labels
    loss, metrics = (found, {}) if isinstance(found, Tensor) else found
    if loss.shape not in ((), (len(batch.x),)):
        raise ValueError(
            f"the objective gives a loss of shape {tuple(loss.shape)}; it must be "
            f"({len(batch.x)},), one for each image, or ()"
        )
    for name, values in metrics.items():
        if values.ndim not in (1, 2) or len(values) != len(batch.x):
            raise ValueError(
                f"the objective's metric {name} has shape {tuple(values.shape)}; it must be "
                f"({len(batch.x)},), one for each image"
            )
    return loss, metrics


@objectives.register("elbo")
class ELBO:
    """The negative evidence lower bound.

    Args:
        num_samples: Samples of z per image, averaged.
        free_bits: Nats of KL per latent dimension that cost nothing. A dimension whose mean KL over
            the batch is lower counts as this much. Kingma et al. (2016), appendix C.8.
    """

    def __init__(self, *, num_samples: int = 1, free_bits: float = 0.0) -> None:
        self.num_samples, self.free_bits = num_samples, free_bits

    def __call__(self, vae: VAE, batch: Batch, noise: Noise, beta: Tensor | float) -> Loss:
        """(B,), or () with free bits."""
        parts = bound(vae, batch, noise.eps)
        if self.free_bits > 0:
            if parts.kl_per_dim is None:
                raise ConfigError(
                    f"objective.free_bits={self.free_bits} needs a KL per latent dimension: use "
                    "prior=standard and posterior=gaussian"
                )
            kl = parts.kl_per_dim.mean(0).clamp(min=self.free_bits).sum()
            return -parts.reconstruction.mean() + beta * kl, parts.metrics()
        return beta * parts.kl - parts.reconstruction, parts.metrics()


@objectives.register("keras")
class Keras:
    """The notebook's loss: see `keras_loss`."""

    def __init__(self, *, num_samples: int = 1) -> None:
        self.num_samples = num_samples

    def __call__(self, vae: VAE, batch: Batch, noise: Noise, beta: Tensor | float) -> Loss:
        """(B,)."""
        del beta  # the notebook has none
        parts = bound(vae, batch, noise.eps)
        if parts.kl_per_dim is None or not isinstance(vae.likelihood, Bernoulli):
            raise ConfigError(
                "objective=keras: the notebook's loss is for likelihood=bernoulli, prior=standard "
                "and posterior=gaussian"
            )
        pixels = math.prod(vae.input_shape)
        return parts.kl - parts.reconstruction / pixels, parts.metrics()


@objectives.register("iwae")
class IWAE:
    """The negative importance-weighted ELBO, with a choice of gradient estimators.

    Its gradient is Σ_k w_k ∇ log w_k with the normalised weights w. With `resample` it is
    ∇ log w_k of one k, sampled with probability w_k: the same in expectation, for K passes forward
    and one back. Burda et al. (2016), section 3. beta weights log p(z) - log q(z|x) in the bound.

    DReG, Tucker et al., *Doubly Reparameterized Gradient Estimators* (ICLR 2019), equation 8: log q
    passes no gradient to q's own parameters, and the gradient through z_k is multiplied by w_k once
    more. Where beta weights log q, the same derivation gives (1 - beta) + beta w_k.

    Args:
        num_samples: Samples of z per image.
        estimator: `standard` or `dreg`; the second needs a Gaussian posterior.
        resample: Whether the gradient goes through one sample.
    """

    bound_name = "iw_elbo"  # the name of -loss at beta 1

    def __init__(
        self,
        *,
        num_samples: int = 1,
        estimator: Literal["standard", "dreg"] = "standard",
        resample: bool = False,
    ) -> None:
        self.num_samples, self.resample = num_samples, resample
        self.dreg = estimator == "dreg"

    def __call__(self, vae: VAE, batch: Batch, noise: Noise, beta: Tensor | float) -> Loss:
        """(B,)."""
        if len(noise.eps) == 1:  # nothing to choose from, so one pass is enough
            noise = Noise(noise.eps)
        parts = bound(vae, batch, noise.eps, gradients=noise.choice is None)
        return -self._bound(vae, batch.x, parts, noise, beta), parts.metrics()

    def _bound(
        self, vae: VAE, x: Tensor, parts: Bound, noise: Noise, beta: Tensor | float
    ) -> Tensor:
        """(B,)."""
        x = as_images(x, vae.input_shape)
        q, eps, dreg, choice = parts.q, noise.eps, self.dreg, noise.choice
        stopped = gaussian_of(q, "objective.estimator=dreg").detach() if dreg else None

        def weigh(z: Tensor, log_q: Tensor | None, log_px_given_z: Tensor) -> Tensor:
            if stopped is not None:
                log_q = stopped.log_prob(z)
            elif log_q is None:
                log_q = q.log_prob(z)
            return log_px_given_z + beta * (vae.log_prior(z) - log_q)

        z = parts.z
        log_w = weigh(z, parts.log_q, parts.log_px_given_z)  # (K, B)
        if not dreg and choice is None:
            # torch.func needs this form; the other gradient differs in rounding only
            return iwae_bound(log_w) if is_transformed(log_w) else _weighted_by_softmax(log_w)
        value = iwae_bound(log_w)
        weights = log_w.detach().softmax(0)
        shares = weights
        if choice is not None:
            k = (weights.cumsum(0) <= choice).sum(0, keepdim=True).clamp(max=len(eps) - 1)  # (1, B)
            weights = weights.gather(0, k)
            shares = torch.ones_like(weights)
            eps = eps.gather(0, k.unsqueeze(-1).expand(-1, -1, vae.latent_dim))
            z, log_q, log_px_given_z = _draw(vae, x, q, eps)
            log_w = weigh(z, log_q, log_px_given_z)  # (1, B)
        if dreg and z.requires_grad:
            z.register_hook(lambda grad: grad * (1 - beta + beta * weights).unsqueeze(-1))
        surrogate = (shares * _first_derivative_only(log_w)).sum(0)
        return value.detach() + (surrogate - surrogate.detach())


def _weighted_by_softmax(log_w: Tensor) -> Tensor:
    """`iwae_bound`, with its gradient Σ_k w_k ∇ log w_k written out: (K, B) -> (B,)."""
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
    """The same values; differentiating twice through them raises an error.

    DReG and resampling pass back an estimate of the bound's gradient. Its derivative does not
    estimate the bound's second derivative.
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
        if not torch.is_grad_enabled():  # no second derivative can follow
            return grad
        return _Refusal.apply(grad, *ctx.saved_tensors)  # type: ignore[no-any-return]


class _Refusal(torch.autograd.Function):
    """Passes a gradient through, and refuses to be differentiated."""

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
        raise ValueError(f"logits have shape {tuple(logits.shape)}; they must be (B, pixels)")
    if mean.shape[:-1] != x.shape[:1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and mean {tuple(mean.shape)}; mean must be (B, "
            "latent_dim) with as many images"
        )
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none")
