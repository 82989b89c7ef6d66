"""Objectives: what training minimises; and the bounds as functions of tensors, in nats.

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

# A latent dimension is active where the posterior means vary by more over images: Burda et al.
# (2016), section 5.2.
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
        ValueError: x holds no images of the model's shape.
    """
    x = as_images(x, vae.input_shape)
    z, log_q = q.sample(eps)
    params = vae.decode(z)
    if len(x) == 1:  # one product instead of passes over the pixels of every draw
        log_px_given_z = pairwise(vae.likelihood, x, params.squeeze(1)).T
    else:
        log_px_given_z = vae.likelihood.log_prob(x, params)
    return log_px_given_z + vae.log_prior(z) - log_q


class Noise(NamedTuple):
    """The random numbers of one batch, drawn outside so that a step can be repeated."""

    eps: Tensor  # (K, B, latent_dim), standard normal: K draws of z for each image
    choice: Tensor | None = None  # (B,) uniform in [0, 1), where the objective's `resample` is true


# What an objective minimises, (B,), or () where it is of the batch as a whole; and what is logged
# of each image beside it: (B,) each, or (B, n) for a list of n numbers.
Loss = tuple[Tensor, Mapping[str, Tensor]]


class Bound(NamedTuple):
    """The ELBO's parts on one batch, and what they were computed from."""

    reconstruction: Tensor  # (B,) log p(x|z), a mean over the draws; higher is better
    kl: Tensor  # (B,) KL(q(z|x) || p(z)); where it has no closed form, estimated from the draws
    kl_per_dim: Tensor | None  # (B, latent_dim), where it has one
    kl_per_layer: Tensor | None  # (B, layers), for several stochastic layers; estimated
    q: Posterior
    z: Tensor  # (K, B, latent_dim)
    log_q: Tensor | None  # (K, B) log q(z|x), where it came with z
    log_px_given_z: Tensor  # (K, B)

    def metrics(self) -> dict[str, Tensor]:
        """What is logged: the plain bound is reconstruction - kl."""
        found = {"reconstruction": self.reconstruction.detach(), "kl": self.kl.detach()}
        if self.kl_per_dim is not None:
            found["kl_per_dim"] = self.kl_per_dim.detach()
        if self.kl_per_layer is not None:
            found["kl_per_layer"] = self.kl_per_layer.detach()
        return found


def bound(vae: VAE, batch: Batch, eps: Tensor, *, gradients: bool = True) -> Bound:
    """The plain bound on one batch: no beta, no warm-up, no free bits.

    Args:
        vae: The model.
        batch: x (B, *shape) in [0, 1].
        eps: (K, B, latent_dim) standard normal noise; the K draws are averaged.
        gradients: Whether they flow through the draws; through a KL in closed form they do.

    Raises:
        ValueError: x holds no images of the model's shape. Their values are not looked at: a check
            would cost every training step.
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
    # no closed form: the draws that the decoder saw estimate it
    kl_per_layer = getattr(vae.prior, "kl_per_layer", None)
    per_layer: Tensor | None = kl_per_layer(q, draws.z) if kl_per_layer else None
    if per_layer is not None:
        return Bound(reconstruction, per_layer.sum(-1), None, per_layer, q, *draws)
    log_q = q.log_prob(draws.z) if draws.log_q is None else draws.log_q
    kl = (log_q - vae.log_prior(draws.z)).mean(0)
    return Bound(reconstruction, kl, None, None, q, *draws)


class _Draws(NamedTuple):
    """What an image's posterior gives, and what the decoder makes of it."""

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
    """What the table holds, and what `train(objective=...)` takes.

    Two attributes may stand beside it: `num_samples`, draws of z for each image (else 1), and
    `resample`, whether `noise.choice` is needed.
    """

    def __call__(self, vae: VAE, batch: Batch, noise: Noise, beta: Tensor | float) -> Tensor | Loss:
        """What is minimised, and what is logged.

        Args:
            vae: The model, in train mode for a training step.
            batch: Images and labels.
            noise: Of this batch.
            beta: The KL's weight at this epoch, warm-up included.
        """


def as_objective(objective: "ObjectiveConfig | Objective") -> Objective:
    """The objective that settings name, or the one that is given.

    Raises:
        ConfigError: There is none of this name, or it has no such option.
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
    """The metric that chooses the best epoch where none is named: the bound that is trained."""
    return f"test/{getattr(objective, 'bound_name', 'elbo')}"


def draw_noise(
    objective: Objective, samples: int, images: int, latent_dim: int, generator: torch.Generator
) -> Noise:
    """The noise of one batch, on the generator's device.

    Args:
        objective: Decides whether one of the draws is to be chosen.
        samples: Draws of z for each image.
        images: In the batch.
        latent_dim: Dimensions of z.
        generator: Where it comes from.
    """
    device = generator.device
    eps = torch.randn(samples, images, latent_dim, generator=generator, device=device)
    if not getattr(objective, "resample", False):
        return Noise(eps)
    return Noise(eps, torch.rand(images, generator=generator, device=device))


def loss_and_metrics(
    objective: Objective, vae: VAE, batch: Batch, noise: Noise, beta: Tensor | float
) -> Loss:
    """An objective's loss, (B,) or (), and its metrics, where it gives some.

    Raises:
        ValueError: They are of other shapes.
    """
    found = objective(vae.of(batch), batch, noise, beta)  # which need not know of labels
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
        num_samples: Draws of z for each image, averaged.
        free_bits: Nats that each dimension's KL may cost for nothing: its mean over the batch is
            held above this. Kingma et al. (2016), appendix C.8.
    """

    def __init__(self, *, num_samples: int = 1, free_bits: float = 0.0) -> None:
        self.num_samples, self.free_bits = num_samples, free_bits

    def __call__(self, vae: VAE, batch: Batch, noise: Noise, beta: Tensor | float) -> Loss:
        """(B,), or () with free bits."""
        parts = bound(vae, batch, noise.eps)
        if self.free_bits > 0:
            if parts.kl_per_dim is None:
                raise ConfigError(
                    f"objective.free_bits={self.free_bits}: a KL per latent dimension needs "
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
    """The negative importance-weighted bound, with the gradient that the settings ask for.

    It is Σ_k w_k ∇ log w_k with the normalised weights w, or, with `resample`, ∇ log w_k of one k
    that is drawn by w: of the same expectation, at K passes forward and one back. Burda et al.
    (2016), section 3. beta is the weight of log p(z) - log q(z|x) inside the bound.

    DReG, Tucker et al., *Doubly Reparameterized Gradient Estimators* (ICLR 2019), equation 8: with
    q's own parameters stopped in log q, what flows back through z_k counts w_k once more. Where
    beta weighs log q, the same derivation leads to (1 - beta) + beta w_k.

    Args:
        num_samples: Draws of z for each image.
        estimator: `standard` or `dreg`; the second needs a Gaussian posterior.
        resample: Whether the gradient goes through one draw.
    """

    bound_name = "iw_elbo"  # what -loss is called at beta 1

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
            # torch.func differentiates this as it is; the other gradient differs in rounding only
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
