"""What a trained model is worth: bounds, log p(x), and how it uses its latents. Nats per image.

`bound_metrics` is what the training loop logs. `evaluate_model` fills the evaluation card, from
functions that also work alone and return one value per image; `evaluate_images` returns these
values beside the card.
"""

import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vae_torch.bars import bar
from vae_torch.config import ObjectiveConfig
from vae_torch.data import Data, as_batch, as_loader, images_of, labels_of
from vae_torch.images import Batch
from vae_torch.parts.likelihoods import Bernoulli
from vae_torch.parts.objectives import (
    ACTIVE_UNIT_VARIANCE,
    Noise,
    Objective,
    as_objective,
    bound,
    log_weights,
    loss_and_metrics,
)
from vae_torch.parts.posteriors import DiagonalGaussian, log_normal, reparameterize
from vae_torch.parts.priors import log_mixture
from vae_torch.quadrature import QuadratureError, check_few_latents, exact_log_px
from vae_torch.seeds import Stream, seeded_generator
from vae_torch.vae import VAE

_log = logging.getLogger("vae_torch")

# Fewer importance samples cannot show whether they cover the posterior.
_FEW_SAMPLES = 100


@torch.no_grad()
def bound_metrics(
    vae: VAE,
    loader: Data,
    objective: ObjectiveConfig | Objective,
    *,
    num_samples: int | None = None,
    beta: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Means over a data set of what the training loop logs about it.

    The noise depends on `seed` and the number of draws alone, so the curves of a run move where the
    model moved; `loss` also where beta or the number of draws does.

    Args:
        vae: The model.
        loader: Batches x, [x] or (x, label, ...), or all images as one tensor or array.
        objective: Whose loss.
        num_samples: Draws of z for each image; the objective's own where it is None.
        beta: The KL's weight.
        seed: Of the noise.

    Returns:
        `loss`, `elbo`, `reconstruction`, `kl` in nats per image, whatever else the objective gives,
        and `kl_per_dim`, one per latent dimension, where the KL has a closed form.

    Raises:
        ValueError: No image, or images that `VAE.check` refuses.
    """
    weight = next(vae.parameters())
    device = weight.device
    batches: Iterable[Any] = loader  # one pass: an iterator will do
    if not isinstance(loader, Iterator):
        batches = as_loader(loader, vae.input_shape, batch_size=1000, device=device)
    generator = seeded_generator(device, seed, Stream.BOUND)
    minimise = as_objective(objective)
    draws: int = getattr(minimise, "num_samples", 1) if num_samples is None else num_samples
    sums: dict[str, Tensor] = {}  # float64: () each, or (n,)
    images = 0
    at_once = math.ceil(1000 / draws)  # images: more would not stay in a cache
    training = vae.training
    vae.eval()
    for loaded in batches:
        whole = as_batch(loaded, device, weight.dtype)
        for x, y in _parts_of(Batch(vae.check(whole.x), whole.y), at_once):
            eps = torch.randn(draws, len(x), vae.latent_dim, generator=generator, device=device)
            loss, metrics = loss_and_metrics(minimise, vae, Batch(x, y), Noise(eps), beta)
            if not {"reconstruction", "kl"} <= metrics.keys():  # the plain bound is always there
                metrics = {**bound(vae, Batch(x, y), eps).metrics(), **metrics}
            elbo = metrics["reconstruction"] - metrics["kl"]
            for name, values in {"loss": loss, "elbo": elbo, **metrics}.items():
                mean = values.mean(0) if values.ndim else values
                sums[name] = sums.get(name, 0) + (len(x) * mean).double()
            images += len(x)
    vae.train(training)
    if not images:
        raise ValueError("there is no image to evaluate; the loader gave no batch")
    return {name: (total / images).tolist() for name, total in sums.items()}


def _parts_of(batch: Batch, size: int) -> Iterator[Batch]:
    """A batch in smaller ones."""
    for first in range(0, len(batch.x), size):
        y = None if batch.y is None else batch.y[first : first + size]
        yield Batch(batch.x[first : first + size], y)


class ImportanceEstimate(NamedTuple):
    """log p(x) by importance sampling from q(z|x), one entry per image."""

    log_px: Tensor  # (N,) nats
    effective_samples: Tensor  # (N,) (Σ w)² / Σ w², at most num_samples


@torch.no_grad()
def importance_log_px(
    vae: VAE,
    x: Tensor,
    *,
    num_samples: int = 5000,
    seed: int = 0,
    chunk: int = 1024,
    proposal: tuple[Tensor, Tensor] | None = None,
    progress: bool = False,
) -> ImportanceEstimate:
    """Log 1/K Σ_k p(x, z_k) / q(z_k|x): Burda et al. (2016), equation 8 with a large K.

    Each image's noise depends on (seed, its place) alone, so the answer does not depend on `chunk`
    beyond the rounding of sums.

    Args:
        vae: The model.
        x: (N, *shape) in [0, 1].
        num_samples: K.
        seed: Of the noise.
        chunk: Decoder rows at once. A thousand stay in a core's cache; any number gives the same
            answer.
        proposal: Mean and log-variance, (N, latent_dim) each, to draw from instead of q(z|x).
        progress: Show a bar on a terminal.

    Raises:
        ValueError: num_samples or chunk is below 1, or `VAE.check` refuses x.
    """
    if num_samples < 1 or chunk < 1:
        raise ValueError(f"num_samples={num_samples}, chunk={chunk}: both must be 1 or more")
    x = vae.check(x)
    mean, logvar = vae.encode(x) if proposal is None else proposal
    together = max(1, chunk // num_samples)  # images
    log_px, effective = [], []
    steps = range(0, len(x), together)
    for start in bar(steps, "log p(x)", show=progress):
        part = slice(start, start + together)
        eps = torch.stack(
            [
                torch.randn(
                    num_samples,
                    vae.latent_dim,
                    generator=seeded_generator(x.device, seed, i, Stream.IMPORTANCE),
                    device=x.device,
                )
                for i in range(start, min(start + together, len(x)))
            ],
            1,
        ).to(x.dtype)  # (K, images, latent_dim)
        log_w = torch.cat(
            [
                log_weights(vae, x[part], DiagonalGaussian(mean[part], logvar[part]), some)
                for some in eps.split(max(1, chunk // eps.shape[1]))
            ]
        ).double()  # (K, images)
        total = log_w.logsumexp(0)
        log_px.append(total - math.log(num_samples))
        effective.append(torch.exp(2 * total - (2 * log_w).logsumexp(0)))
    return ImportanceEstimate(torch.cat(log_px), torch.cat(effective))


def fit_posterior(
    vae: VAE,
    x: Tensor,
    *,
    steps: int = 500,
    num_samples: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """The best Gaussian posterior of each image, found by ascent on its ELBO from the encoder's.

    Cremer, Li and Duvenaud, *Inference Suboptimality in Variational Autoencoders* (ICML 2018),
    table 1: q*.

    Args:
        vae: The model; its weights stay as they are.
        x: (N, *shape) in [0, 1].
        steps: Of Adam, on each image's own mean and log-variance.
        num_samples: Draws of z per step.
        seed: Of the noise.
        progress: Show a bar on a terminal.

    Returns:
        Mean and log-variance, (N, latent_dim) each.

    Raises:
        ValueError: `VAE.check` refuses x.
    """
    x = vae.check(x)
    noise = seeded_generator(x.device, seed, Stream.FIT)
    with torch.no_grad():
        mean, logvar = (part.clone() for part in vae.encode(x))
    mean.requires_grad_()
    logvar.requires_grad_()
    optimizer = torch.optim.Adam([mean, logvar], lr=0.02)
    shape = (num_samples, *mean.shape)
    counted = bar(range(steps), "fit of q(z|x)", show=progress)
    for step in counted:
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        eps = torch.randn(shape, generator=noise, device=x.device, dtype=x.dtype)
        loss = -log_weights(vae, x, DiagonalGaussian(mean, logvar), eps).mean(0).sum()
        mean.grad, logvar.grad = torch.autograd.grad(loss, [mean, logvar])
        optimizer.step()
    return mean.detach(), logvar.detach()


@torch.no_grad()
def posterior_elbo(
    vae: VAE, x: Tensor, mean: Tensor, logvar: Tensor, *, num_samples: int = 1000, seed: int = 0
) -> Tensor:
    """The ELBO of any Gaussian posteriors N(mean, exp(logvar)): (N,) nats, by Monte Carlo.

    Raises:
        ValueError: `VAE.check` refuses x.
    """
    x = vae.check(x)
    noise = seeded_generator(x.device, seed, Stream.FIT, 1)
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    done = 0
    while done < num_samples:  # twenty at a time bound the memory
        shape = (min(20, num_samples - done), *mean.shape)
        eps = torch.randn(shape, generator=noise, device=x.device, dtype=x.dtype)
        total += log_weights(vae, x, DiagonalGaussian(mean, logvar), eps).double().sum(0)
        done += shape[0]
    return total / num_samples


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


class Evaluation(NamedTuple):
    """The evaluation card, and the values behind its means."""

    card: dict[str, Any]
    per_image: dict[str, Tensor]  # by figure, (N,) float64; NaN for images that were not fitted


def evaluate_model(
    vae: VAE,
    loader: Data,
    *,
    train_loader: Data | None = None,
    num_samples: int = 5000,
    fit_images: int = 100,
    chunk: int = 1024,
    exact: bool | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """The evaluation card.

    Args:
        vae: The model.
        loader: Of the test set: batches x, [x] or (x, label, ...), or all images as one tensor or
            array.
        train_loader: Adds the training bound and, where both sets have labels, probes of the
            latents fitted on it.
        num_samples: Of the importance-sampling estimate of log p(x).
        fit_images: How many images get a posterior of their own, to split the gap. The seed chooses
            them at random.
        chunk: Decoder rows at once.
        exact: Integrate log p(x) over the latents; None does so for one or two of them.
        seed: Of all noise.
        progress: Show bars on a terminal.

    Returns:
        Each figure as `{"value", "standard_error", "unit", "definition", "num_samples",
        "num_images", "seed"}`, by name, and under `verdict` a list of sentences. An integral that
        does not settle is left out, and the verdict says so.

    Raises:
        ValueError: num_samples, fit_images or chunk is below 1; an integral over more than two
            latents is asked for; or no image, or images that `VAE.check` refuses.
    """
    return evaluate_images(
        vae,
        loader,
        train_loader=train_loader,
        num_samples=num_samples,
        fit_images=fit_images,
        chunk=chunk,
        exact=exact,
        seed=seed,
        progress=progress,
    ).card


def evaluate_images(
    vae: VAE,
    loader: Data,
    *,
    train_loader: Data | None = None,
    num_samples: int = 5000,
    fit_images: int = 100,
    chunk: int = 1024,
    exact: bool | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """`evaluate_model`, with the values of each image beside the card.

    Args and errors are those of `evaluate_model`.

    Returns:
        The card, and by name the values of each image of `loader`, in its order.
    """
    for name, given in (("num_samples", num_samples), ("fit_images", fit_images), ("chunk", chunk)):
        if given < 1:  # before any work
            raise ValueError(f"{name}={given}: must be 1 or more")
    if exact:
        check_few_latents(vae)
    if train_loader is not None:
        train_loader = as_loader(train_loader, vae.input_shape)
    x, labels = _whole(vae, loader)
    card = _Card(len(x), seed)

    _put_bound(card, vae, x)
    if train_loader is not None:
        bound, _, _ = _bounds(vae, (vae.check(images_of(b)) for b in train_loader), seed)
        error = _standard_error(bound)
        card.put(
            "train_elbo",
            bound.mean().item(),
            "elbo on the training images",
            1,
            standard_error=error,
            num_images=len(bound),
        )
    if isinstance(vae.likelihood, Bernoulli) and not ((x == 0) | (x == 1)).all():
        floor = -torch.special.xlogy(x, x) - torch.special.xlogy(1 - x, 1 - x)
        card.put(
            "entropy_floor",
            -floor.flatten(1).sum(1),
            "reconstruction that no Bernoulli decoder of these grey pixels can exceed; "
            "grey and binarised figures do not compare",
            0,
        )
    _put_latents(card, vae, x, labels, train_loader)

    said = []
    if exact or (exact is None and vae.latent_dim <= 2):
        try:
            grid = exact_log_px(vae, x, progress=progress)
        except QuadratureError as error:
            said.append(
                f"log_px_exact is left out: {error}. log_px is an estimate by importance sampling."
            )
        else:
            card.put(
                "log_px_exact",
                grid.log_px,
                f"log p(x) by integration over ±{grid.half_width:g}, squares down to "
                f"{grid.side:.2g}",
                0,
                more={"residual": grid.residual},
            )
    estimate = importance_log_px(
        vae, x, num_samples=num_samples, seed=seed, chunk=chunk, progress=progress
    )
    definition = "log p(x) by importance sampling from q(z|x); in expectation a lower bound"
    card.put("log_px", estimate.log_px, definition, num_samples)
    card.put(
        "effective_samples",
        estimate.effective_samples,
        "(Σ w)² / Σ w² of the importance weights",
        num_samples,
        unit="samples",
        more={"share_below_10": (estimate.effective_samples < 10).double().mean().item()},
    )
    _put_gap(card, vae, x, fit_images, num_samples, chunk, progress)
    return Evaluation(
        {**card.figures, "verdict": said + verdict(card.figures, num_samples)}, card.per_image
    )


class _Card:
    """The card's figures as they come in."""

    def __init__(self, images: int, seed: int) -> None:
        self.images = images
        self.seed = seed
        self.figures: dict[str, Any] = {}
        self.per_image: dict[str, Tensor] = {}

    def put(
        self,
        name: str,
        value: Any,
        definition: str,
        samples: int,
        *,
        unit: str = "nats per image",
        of: Tensor | None = None,
        standard_error: Any = None,
        num_images: int | None = None,
        more: dict[str, Any] | None = None,
    ) -> None:
        """Add a figure: a tensor is averaged, with its standard error; other values stand.

        A tensor has one value per image, or per image that `of` numbers.
        """
        images = self.images if num_images is None else num_images
        if isinstance(value, Tensor):
            value = value.double()
            images, standard_error = len(value), _standard_error(value)
            each = value
            if of is not None:
                each = value.new_full((self.images,), math.nan)
                each[of] = value
            self.per_image[name] = each
            value = value.mean().item()
        self.figures[name] = {
            "value": value,
            "standard_error": standard_error,
            "unit": unit,
            "definition": definition,
            "num_samples": samples,
            "num_images": images,
            "seed": self.seed,
            **(more or {}),
        }


def _whole(vae: VAE, loader: Data) -> tuple[Tensor, Tensor | None]:
    """All images (N, *shape), checked, and their labels (N,), where all have some."""
    weight = next(vae.parameters())
    batches = list(as_loader(loader, vae.input_shape, batch_size=1000))
    if not batches:
        raise ValueError("there is no image to evaluate; the loader gave no batch")
    x = torch.cat([vae.check(images_of(batch)) for batch in batches])
    labels = [some for some in map(labels_of, batches) if some is not None]
    whole = torch.cat(labels).to(weight.device) if len(labels) == len(batches) else None
    return x.to(weight), whole


def _standard_error(values: Tensor) -> float | None:
    return values.double().std().item() / math.sqrt(len(values)) if len(values) > 1 else None


@torch.no_grad()
def _bounds(vae: VAE, batches: Iterable[Tensor], seed: int) -> Tensor:
    """The elbo, reconstruction and KL of each image from one draw of z: (3, N) nats, in double."""
    device = next(vae.parameters()).device
    noise = seeded_generator(device, seed, Stream.BOUND)
    rows = []
    for batch in batches:
        for part in batch.to(device).split(1000):  # bounds the decoder's memory
            eps = torch.randn((1, len(part), vae.latent_dim), generator=noise, device=device)
            parts = bound(vae, Batch(part), eps.to(part.dtype))
            elbo = parts.reconstruction - parts.kl
            rows.append(torch.stack([elbo, parts.reconstruction, parts.kl]).double())
    return torch.cat(rows, 1)


@torch.no_grad()
def _put_bound(card: _Card, vae: VAE, x: Tensor) -> None:
    elbo, reconstruction, kl = _bounds(vae, [x], card.seed)
    q = vae.encode(x)
    per_dim = vae.kl_per_dim(q)
    analytic = per_dim is not None
    card.put("elbo", elbo, "reconstruction - kl, a lower bound on log p(x)", 1)
    card.put("reconstruction", reconstruction, "E_q log p(x|z), summed over pixels", 1)
    how = "in closed form" if analytic else "a Monte Carlo estimate from one draw of z"
    card.put("kl", kl, f"KL(q(z|x) || p(z)), {how}", 0 if analytic else 1)
    if per_dim is not None:
        card.put(
            "kl_per_dim",
            per_dim.mean(0).tolist(),
            "the KL of each latent dimension",
            0,
            standard_error=[_standard_error(kl) for kl in per_dim.T],
        )
    if len(x) == 1:  # nothing varies
        return
    variance = q.mean.var(0)
    card.put(
        "active_units",
        int((variance > ACTIVE_UNIT_VARIANCE).sum()),
        f"latent dimensions whose posterior mean varies by more than {ACTIVE_UNIT_VARIANCE} "
        "(variance over images)"
        + ("" if analytic else "; a learned prior leaves the scale of z free, and this count too"),
        0,
        unit=f"of {vae.latent_dim} dimensions",
        more={"variance_per_dim": variance.tolist()},
    )


def _put_gap(
    card: _Card, vae: VAE, x: Tensor, fit_images: int, num_samples: int, chunk: int, progress: bool
) -> None:
    seed, known = card.seed, card.per_image
    exact = known.get("log_px_exact")
    if exact is None:
        card.put(
            "gap",
            known["log_px"] - known["elbo"],
            "log_px - elbo; in expectation log_px is too low, and so is this gap",
            num_samples,
        )
    else:
        card.put("gap", exact - known["elbo"], "log_px_exact - elbo", 1)

    choice = torch.randperm(len(x), generator=seeded_generator("cpu", seed, Stream.CHOICE))
    chosen = choice[:fit_images].sort().values.to(x.device)
    x = x[chosen]
    with torch.no_grad():
        encoder_elbo = posterior_elbo(vae, x, *vae.encode(x), seed=seed)
    mean, logvar = fit_posterior(vae, x, seed=seed, progress=progress)
    best_elbo = posterior_elbo(vae, x, mean, logvar, seed=seed)
    if exact is None:
        # the fitted posterior, widened to cover the tails, proposes better than the encoder
        wider = (mean, logvar + 2 * math.log(1.2))
        log_px = importance_log_px(
            vae,
            x,
            num_samples=num_samples,
            seed=seed,
            chunk=chunk,
            proposal=wider,
            progress=progress,
        ).log_px
        how = (
            f"log p(x) by {num_samples} importance samples from the best Gaussian posteriors, a "
            "fifth wider: in expectation too low, and so is this gap"
        )
    else:
        log_px, how = exact[chosen], "log p(x) by integration"
    card.put(
        "fitted_gap",
        log_px - encoder_elbo,
        f"log p(x) - elbo of {len(x)} images, drawn at random by the seed; the sum of the "
        f"approximation_gap and the amortisation_gap, which are of the same images; {how}",
        1000,
        of=chosen,
    )
    card.put(
        "approximation_gap",
        log_px - best_elbo,
        f"log p(x) - elbo of each image's best Gaussian posterior (Cremer et al., 2018); {how}",
        1000,
        of=chosen,
    )
    card.put(
        "amortisation_gap",
        best_elbo - encoder_elbo,
        "elbo of the best Gaussian posterior - elbo of the encoder's (Cremer et al., 2018)",
        1000,
        of=chosen,
    )


def _put_latents(
    card: _Card, vae: VAE, x: Tensor, labels: Tensor | None, train_loader: Iterable[Any] | None
) -> None:
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

    train_x, train_labels = _whole(vae, train_loader)
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


def verdict(card: dict[str, Any], num_samples: int) -> list[str]:
    """What the card's figures mean, in sentences, each with something to try.

    Figures that a sentence compares are of the same images, or it names their counts.
    """
    value = {name: entry["value"] for name, entry in card.items()}
    said = []
    active = value.get("active_units")  # None on the card of one image
    dims = len(card["active_units"]["variance_per_dim"]) if active is not None else 0
    if "kl_per_dim" not in value:  # a learned prior: see the definition of active_units
        active = 0 if active is not None and value["mutual_information"] < 0.1 else None
    if active == 0:
        said.append(
            "The posterior has collapsed: no latent dimension says anything about the image. Try "
            "objective=elbo, objective.beta_warmup_epochs or objective.free_bits."
        )
    elif active is not None and active < dims:
        said.append(
            f"{dims - active} of {dims} latent dimensions are collapsed. That costs little; "
            "objective.free_bits or objective.beta_warmup_epochs may bring them to use."
        )
    if "train_elbo" in value:
        lead = value["train_elbo"] - value["elbo"]
        error = _joint_error(card, "train_elbo", "elbo")
        if lead > max(3, 2 * error):
            said.append(
                f"The bound of the {card['train_elbo']['num_images']:,} training images is "
                f"{lead:.1f} ± {error:.1f} nats better than that of the "
                f"{card['elbo']['num_images']:,} evaluated ones: the model or its encoder overfits."
                " Try data.binarize=dynamic, fewer epochs, train.ema or a smaller model."
            )
    poor = card["effective_samples"]["share_below_10"]
    if num_samples < _FEW_SAMPLES:
        said.append(
            f"log_px comes from {num_samples} samples per image, too few to tell how far it is "
            "below the truth. Try eval.num_samples=1000 or more."
        )
    elif poor > 0.01:
        said.append(
            f"log_px is not to be trusted for {100 * poor:.0f}% of the images, which have fewer "
            f"than 10 effective samples of {num_samples:,}. Try a larger eval.num_samples."
        )
    if "log_px_exact" in value:
        off = value["log_px"] - value["log_px_exact"]
        said.append(
            f"Importance sampling is {abs(off):.3f} nats {'above' if off > 0 else 'below'} the "
            "integral, which is the truth here."
        )
    if value["fitted_gap"] > 1:
        parts = ("approximation_gap", "amortisation_gap")
        larger, smaller = sorted(parts, key=lambda name: value[name], reverse=True)
        remedies = {
            "approximation_gap": "a Gaussian fits the true posterior badly. Try more latent "
            "dimensions or objective=iwae",
            "amortisation_gap": "the encoder does not find the best Gaussian. Try a larger or "
            "longer trained encoder",
        }
        images = card["fitted_gap"]["num_images"]
        whose = f"the bound's gap of {value['fitted_gap']:.1f} nats ({images:,} images)"
        if value[larger] - value[smaller] > 2 * _joint_error(card, larger, smaller):
            said.append(f"Most of {whose} is the {larger}: {remedies[larger]}.")
        else:
            said.append(
                f"Neither part of {whose} is clearly the larger: approximation_gap "
                f"{value['approximation_gap']:.1f}, amortisation_gap "
                f"{value['amortisation_gap']:.1f}. A larger eval.fit_images tells them apart."
            )
    return said


def _joint_error(card: dict[str, Any], *names: str) -> float:
    """Standard error of a sum or difference of independent figures; infinite where one has none."""
    errors = [card[name]["standard_error"] for name in names]
    return math.inf if None in errors else math.hypot(*errors)
