"""The evaluation card: every figure of a trained model, and what they mean."""

import math
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vae_torch.config import ConfigError
from vae_torch.data import Data, as_loader
from vae_torch.evaluation.ais import annealed_log_px, check_gradient, sandwich_log_px
from vae_torch.evaluation.bounds import bounds_of, elbo_of
from vae_torch.evaluation.figures import (
    Figures,
    by_class,
    checked,
    is_gaussian,
    is_score,
    joined,
    name_of_log_px,
    standard_error_of,
    whole_set,
)
from vae_torch.evaluation.importance import fit_posterior, importance_log_px
from vae_torch.evaluation.latents import put_latents
from vae_torch.evaluation.partial import Partial, in_parts
from vae_torch.evaluation.proposals import fitted_log_px
from vae_torch.evaluation.simulated import put_simulated
from vae_torch.evaluation.verdict import verdict
from vae_torch.images import Batch
from vae_torch.machine import wide
from vae_torch.parts.likelihoods import Gaussian, bits_per_dim
from vae_torch.parts.objectives import ACTIVE_UNIT_VARIANCE
from vae_torch.quadrature import QuadratureError, check_few_latents, exact_log_px
from vae_torch.seeds import Stream, seeded_generator
from vae_torch.vae import VAE, in_eval_mode

# Importance samples from q(z|x) of every image, where only some get log_px. The difference of the
# two hardly varies between images, so a few hundred give the mean of all.
_FEW_SAMPLES = 20

_SANDWICHED = 100  # sampled images between two bounds, at most

_FITTED_AT_ONCE = 250  # images: limits the memory of their gradients

# Images whose log p(x) shows overfitting: all of them would take longer than the test set.
_TRAIN_IMAGES = 1000


class Evaluation(NamedTuple):
    """The evaluation card, and the values per image behind its means."""

    card: dict[str, Any]
    per_image: dict[str, Tensor]  # by name, (N,) float64; NaN for images that were not fitted


def evaluate_model(
    vae: VAE,
    loader: Data,
    *,
    train_loader: Data | None = None,
    num_samples: int = 5000,
    fit_samples: int = 1000,
    fit_images: int = 100,
    log_px_images: int | None = None,
    ais: int | None = None,
    chunk: int = 1024,
    exact: bool | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure the evaluation card of a trained model.

    Args:
        vae: The model.
        loader: Test set: batches x, [x] or (x, label, ...), or all images as one tensor or array.
        train_loader: Training set. It adds the training bound, log p(x) of a thousand training
            images and, where both sets have labels, probes of the latents fitted on it.
        num_samples: Importance samples from q(z|x), for log_px_encoder.
        fit_samples: Importance samples from fitted proposals, for log_px.
        fit_images: Number of images that get a fitted posterior, to split the gap; chosen at random
            by the seed.
        log_px_images: Number of images that get log_px and log_px_encoder, chosen at random by the
            seed. The mean of all images is that of a quick bound of all, by 20 importance samples,
            plus the mean difference on these. None computes every image.
        ais: Number of images that also get an annealed estimate, as a check of log_px; chosen at
            random by the seed. None leaves it out.
        chunk: Decoder rows at once.
        exact: Integrate log p(x) over the latents; None does so for one or two latents.
        seed: Random seed of all noise.
        progress: Show bars on a terminal.

    Returns:
        Each figure by name, as `{"value", "standard_error", "error_over", "unit", "definition",
        "num_samples", "num_images", "seed"}`, and under `verdict` a list of sentences. An integral
        that does not settle is left out, and the verdict says so.

    Raises:
        ValueError: num_samples, fit_samples, fit_images, log_px_images, ais or chunk is below 1;
            log_px_images is below ais; an integral over more than two latents is asked for; or no
            image, or images that `VAE.check` refuses.
    """
    return evaluate_images(
        vae,
        loader,
        train_loader=train_loader,
        num_samples=num_samples,
        fit_samples=fit_samples,
        fit_images=fit_images,
        log_px_images=log_px_images,
        ais=ais,
        chunk=chunk,
        exact=exact,
        seed=seed,
        progress=progress,
    ).card


@in_eval_mode
def evaluate_images(
    vae: VAE,
    loader: Data,
    *,
    train_loader: Data | None = None,
    num_samples: int = 5000,
    fit_samples: int = 1000,
    fit_images: int = 100,
    log_px_images: int | None = None,
    ais: int | None = None,
    chunk: int = 1024,
    exact: bool | None = None,
    seed: int = 0,
    progress: bool = False,
    store: Partial | None = None,
) -> Evaluation:
    """`evaluate_model`, with the values of each image beside the card.

    Arguments and errors are those of `evaluate_model`. `store` keeps the finished images of the
    slow estimates, so that an interrupted evaluation resumes.

    Returns:
        The card, and by name the values of each image of `loader`, in order.
    """
    counts = {
        "num_samples": num_samples,
        "fit_samples": fit_samples,
        "fit_images": fit_images,
        "log_px_images": log_px_images,
        "ais": ais,
        "chunk": chunk,
    }
    for name, given in counts.items():
        if given is not None and given < 1:  # before any work
            raise ValueError(f"{name}={given}: must be 1 or more")
    if ais is not None and log_px_images is not None and ais > log_px_images:
        raise ValueError(f"ais={ais}: checks log_px, so at most log_px_images={log_px_images}")
    if exact:
        check_few_latents(vae)
    if ais is not None:
        check_gradient(vae.given(0) if vae.classes else vae)
    if train_loader is not None:
        train_loader = as_loader(train_loader, vae.input_shape)
    batch = whole_set(vae, loader)
    x = batch.x
    grey = is_score(vae, x)
    log_px = name_of_log_px(conditional=vae.classes is not None, grey=grey)
    card = Figures(len(x), seed, log_px=log_px)

    _put_bound(card, vae, batch)
    if isinstance(vae.likelihood, Gaussian):
        _put_residual(card, vae.likelihood, x[0].numel())
    train: _Train | None = None
    if train_loader is not None:
        train = _put_train_elbo(card, vae, train_loader, log_px_images or _TRAIN_IMAGES)
    if grey:
        floor = -torch.special.xlogy(x, x) - torch.special.xlogy(1 - x, 1 - x)
        card.put(
            "entropy_floor",
            -floor.flatten(1).sum(1),
            "reconstruction that no Bernoulli decoder of these grey pixels can exceed; "
            "grey and binarised figures do not compare",
            0,
        )
    put_latents(card, vae, batch, train_loader)
    put_simulated(card, vae, batch, train_loader)

    said = []
    if exact or (exact is None and vae.latent_dim <= 2):
        try:
            grid = by_class(vae, batch, partial(exact_log_px, progress=progress))
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
    how: dict[str, Any] = {"seed": seed, "chunk": chunk, "progress": progress, "store": store}
    some = _chosen(len(x), log_px_images or len(x), seed)
    few = None
    if len(some) < len(x):
        of_all = partial(importance_log_px, num_samples=_FEW_SAMPLES, name="few", **how)
        few = by_class(vae, batch, of_all).log_px.double()
    _put_log_px(card, vae, batch, (some, few), fit_samples, how)
    sampled = partial(importance_log_px, num_samples=num_samples, **how)
    estimate = by_class(vae, batch.rows(some), sampled)
    card.put(
        "log_px_encoder",
        estimate.log_px,
        "log p(x) by importance sampling from q(z|x), as papers report it; in expectation too low, "
        "by an amount that differs between models",
        num_samples,
        of=some,
        from_all=few,
        more={"rise_from_half": estimate.rise.mean().item() if num_samples > 1 else None},
    )
    card.put(
        "effective_samples",
        estimate.effective_samples,
        "(Σ w)² / Σ w² of the importance weights of log_px_encoder",
        num_samples,
        unit="samples",
        of=some,
        more={"share_below_10": (estimate.effective_samples < 10).double().mean().item()},
    )
    card.compare("log_px", "log_px_encoder")
    if "log_px_exact" in card.per_image:
        card.compare("log_px", "log_px_exact")
    if ais is not None:
        _put_annealed(card, vae, batch, ais, how)
    if train is not None:
        _put_train_log_px(card, vae, train, fit_samples, how)
    _put_gap(card, vae, batch, min(fit_images, len(some)), how)
    said += [text.replace("log p(x)", log_px) for text in verdict(card.figures, num_samples)]
    if grey:
        said.append(
            "The pixels are grey and the likelihood is of black and white ones: these nats are a "
            "score, the cross-entropy, and no log p(x) of a density. Compare them with such scores "
            "only, or try likelihood=continuous_bernoulli or data.binarize=dynamic."
        )
    if vae.classes:
        said.append(
            "The model sees each image's label, so its figures are of p(x|y). They do not compare "
            "with those of models without labels."
        )
    return Evaluation({**card.figures, "verdict": said}, card.per_image)


class _Train(NamedTuple):
    """Some training images, chosen at random, and the ELBO of all."""

    batch: Batch  # x (M, *shape)
    some: Tensor  # (M,) indices of these images
    elbo: Tensor  # (N,) of all


def _put_train_elbo(card: Figures, vae: VAE, train_loader: Iterable[Any], count: int) -> _Train:
    """Put the bound of all training images on the card; return at most `count` of them."""
    batches = checked(vae, train_loader)
    bound, _, _ = bounds_of(vae, batches, card.seed)
    card.put(
        "train_elbo",
        bound.mean().item(),
        "elbo on the training images",
        1,
        standard_error=standard_error_of(bound),
        num_images=len(bound),
    )
    some = _chosen(len(bound), min(count, _TRAIN_IMAGES), card.seed)
    x, y = joined(batches).rows(some)
    return _Train(Batch(x.to(next(vae.parameters()).device), y), some, bound)


def _chosen(images: int, count: int, seed: int) -> Tensor:
    """Indices of `count` images, chosen at random, in order."""
    choice = torch.randperm(images, generator=seeded_generator("cpu", seed, Stream.CHOICE))
    return choice[:count].sort().values


def _put_log_px(
    card: Figures,
    vae: VAE,
    batch: Batch,
    which: tuple[Tensor, Tensor | None],
    num_samples: int,
    how: dict[str, Any],
) -> None:
    """Put log_px of the images that `which` numbers, with a bound of all where those are some."""
    some, from_all = which
    estimate = partial(fitted_log_px, num_samples=num_samples, **how)
    found = by_class(vae, batch.rows(some), estimate)
    card.put(
        "log_px",
        found.log_px,
        "log p(x) by importance sampling from Gaussians fitted to each image, with q(z|x) and the "
        "prior; in expectation a lower bound",
        num_samples,
        of=some,
        from_all=from_all,
        more={
            "proposal": "fitted",
            "rise_from_half": found.rise.mean().item(),
            "share_doubtful": found.doubtful.double().mean().item(),
        },
    )
    log_px = card.figures["log_px"]
    if (bits := bits_per_dim(vae.likelihood, -1.0, vae.input_shape)) is not None:
        error = log_px["standard_error"]
        card.put(
            "bits_per_dim",
            -bits * log_px["value"],
            "-log_px / (log 2 and the number of pixels and channels)",
            num_samples,
            unit="bits per dimension",
            standard_error=None if error is None else bits * error,
        )
    card.keep("pareto_k", found.pareto_k, some)
    card.keep("rise_from_half", found.rise, some)


def _put_annealed(card: Figures, vae: VAE, batch: Batch, images: int, how: dict[str, Any]) -> None:
    chosen = _chosen(len(batch.x), images, card.seed)
    few = max(8, how["chunk"] // 4)  # an interruption loses the images that are under way
    annealed = partial(annealed_log_px, **{**how, "chunk": few})
    found = by_class(vae, batch.rows(chosen), annealed)
    words = f"annealed importance sampling from the prior, {len(chosen)} images chosen at random"
    chains = len(found.log_weights)
    card.put(
        "log_px_ais", found.log_px, f"log p(x) by {words}; a lower bound too", chains, of=chosen
    )
    card.put(
        "ais_difference",
        found.log_px - card.per_image["log_px"][chosen],
        f"log_px_ais - log_px of the same images: {words}",
        chains,
        of=chosen,
    )
    grey = "entropy_floor" in card.figures  # Bernoulli samples would be black and white
    if vae.classes or grey:
        return
    with suppress(ConfigError):  # a likelihood that cannot sample
        both = sandwich_log_px(
            vae, min(images, _SANDWICHED), seed=card.seed, progress=how["progress"]
        )
        card.put(
            "ais_width",
            both.upper - both.lower,
            "bounds on log p(x) of images sampled from the model, by annealing from both ends: the "
            "distance of upper and lower (Grosse et al., 2015)",
            chains,
            stored=False,
        )


def _put_train_log_px(
    card: Figures, vae: VAE, train: _Train, num_samples: int, settings: dict[str, Any]
) -> None:
    """Put log p(x) and the gap of training images, measured as for the test images."""
    log_px, how, samples = None, "by integration", 0
    if "log_px_exact" in card.per_image:
        with suppress(QuadratureError):
            found = partial(exact_log_px, progress=settings["progress"])
            log_px = by_class(vae, train.batch, found).log_px
    if log_px is None:
        how, samples = "as log_px", num_samples
        fitted = partial(fitted_log_px, num_samples=samples, name="fitted_train", **settings)
        log_px = by_class(vae, train.batch, fitted).log_px
    log_px, elbo = wide(log_px), train.elbo
    own = elbo[train.some]
    # where the bound of one sample is noisier than the images differ, it is no help
    chosen = len(log_px) < len(elbo)
    helps = chosen and (log_px - own).var() < log_px.var()
    whose = f"{len(log_px):,} training images{', chosen at random' if chosen else ''}"
    extended = "; the bound of all extends the mean" if helps else ""
    card.put(
        "train_log_px",
        log_px,
        f"log p(x) {how}, of {whose}{extended}",
        samples,
        of=train.some,
        from_all=elbo if helps else None,
        stored=False,
        more={"exact": samples == 0},
    )
    card.put(
        "train_gap",
        log_px - own,
        f"log p(x) {how} - elbo, of {whose}",
        samples,
        stored=False,
    )


@torch.no_grad()
def _put_bound(card: Figures, vae: VAE, batch: Batch) -> None:
    elbo, reconstruction, kl = bounds_of(vae, [batch], card.seed)
    means, closed = [], []
    for q in vae.of(batch).encode_parts(batch.x):
        means.append(q.mean)
        if (kl_of_q := vae.kl_per_dim(q)) is not None:
            closed.append(kl_of_q)
    analytic = bool(closed)
    card.put("elbo", elbo, "reconstruction - kl, a lower bound on log p(x)", 1)
    card.put("reconstruction", reconstruction, "E_q log p(x|z), summed over pixels", 1)
    how = "in closed form" if analytic else "a Monte Carlo estimate from one sample of z"
    card.put("kl", kl, f"KL(q(z|x) || p(z)), {how}", 0 if analytic else 1)
    if analytic:
        per_dim = torch.cat(closed)
        card.put(
            "kl_per_dim",
            per_dim.mean(0).tolist(),
            "the KL of each latent dimension",
            0,
            standard_error=[standard_error_of(kl) for kl in per_dim.T],
        )
    if len(batch.x) == 1:  # nothing varies
        return
    variance = torch.cat(means).var(0)
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


def _put_residual(card: Figures, likelihood: Gaussian, pixels: int) -> None:
    """Put the distance of pixels from a Gaussian's centres, from E_q log p(x|z) and sigma."""
    logvar = likelihood.logvar.item()
    nats = -2 * card.per_image["reconstruction"].mean().item() / pixels
    square = math.exp(logvar) * (nats - logvar - math.log(2 * math.pi))
    card.put(
        "residual",
        math.sqrt(max(square, 0.0)),
        "root mean square of x - E[x|z], z from q(z|x), over pixels: the best sigma of p(x|z)",
        1,
        unit="of [0, 1]",
        more={"sigma": math.exp(0.5 * logvar), "pixels": pixels},
    )


def _put_gap(card: Figures, vae: VAE, batch: Batch, fit_images: int, how: dict[str, Any]) -> None:
    seed, known = card.seed, card.per_image
    name = "log_px_exact" if "log_px_exact" in known else "log_px"
    log_px, samples = known[name], card.figures[name]["num_samples"]
    low = "" if samples == 0 else "; in expectation log_px is too low, and so is this gap"
    estimated = log_px.isfinite().nonzero()[:, 0]
    gap = (log_px - known["elbo"])[estimated]
    card.put("gap", gap, f"{name} - elbo{low}", samples or 1, of=estimated)

    chosen = _chosen(len(batch.x), fit_images, seed)
    batch, log_px = batch.rows(chosen), log_px[chosen]

    def fit(start: int, stop: int) -> Tensor:
        some = batch.rows(slice(start, stop))
        own, x = vae.of(some), some.x
        best = fit_posterior(own, x, seed=seed, progress=how["progress"])
        with torch.no_grad():
            both = [elbo_of(own, x, q, seed=seed) for q in (own.encode(x), best)]
        return torch.stack(both, 1)

    rows = in_parts(
        fit,
        len(chosen),
        _FITTED_AT_ONCE,
        vae=vae,
        name="fitted_gap",
        store=how["store"],
        progress=False,
    )
    encoder_elbo, best_elbo = rows.T
    kind = "Gaussian posterior" if is_gaussian(vae, batch) else "posterior of its kind"
    known_by = f"log p(x) is {name}{low}"
    card.put(
        "fitted_gap",
        log_px - encoder_elbo,
        f"log p(x) - elbo of {len(chosen)} images, chosen at random by the seed; the sum of the "
        f"approximation_gap and the amortisation_gap of the same images; {known_by}",
        1000,
        of=chosen,
    )
    card.put(
        "approximation_gap",
        log_px - best_elbo,
        f"log p(x) - elbo of each image's best {kind} (Cremer et al., 2018); {known_by}",
        1000,
        of=chosen,
    )
    card.put(
        "amortisation_gap",
        best_elbo - encoder_elbo,
        f"elbo of the best {kind} - elbo of the encoder's (Cremer et al., 2018)",
        1000,
        of=chosen,
    )
    card.compare("approximation_gap", "amortisation_gap")
    card.bound("gap", "fitted_gap", "approximation_gap", "amortisation_gap")
