"""The card's figures, each with its error, its unit and its definition."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vae_torch.data import Data, as_loader, images_of, labels_of
from vae_torch.images import Batch
from vae_torch.machine import wide
from vae_torch.parts.likelihoods import Bernoulli
from vae_torch.parts.pixelcnn import PixelCNN
from vae_torch.parts.posteriors import DiagonalGaussian
from vae_torch.vae import VAE

_LOG_PX = "log p(x)"


def is_score(vae: VAE, x: Tensor) -> bool:
    """Whether grey pixels meet a likelihood of black and white ones: a score and no density."""
    return isinstance(vae.likelihood, Bernoulli | PixelCNN) and not ((x == 0) | (x == 1)).all()


@torch.no_grad()
def is_gaussian(vae: VAE, batch: Batch) -> bool:
    """Whether q(z|x) is a diagonal Gaussian."""
    first = batch.rows(slice(1))
    return isinstance(vae.of(first).encode(first.x), DiagonalGaussian)


def name_of_log_px(*, conditional: bool, grey: bool) -> str:
    """What a card calls log p(x): grey pixels under Bernoulli likelihoods have only a score."""
    return "the score" if grey else "log p(x|y)" if conditional else _LOG_PX


class Figures:
    """The figures of a card, collected one by one.

    Args:
        images: Number of evaluated images.
        seed: Random seed of all noise.
        log_px: What log p(x) is called in the definitions: see `name_of_log_px`.
    """

    def __init__(self, images: int, seed: int, *, log_px: str = _LOG_PX) -> None:
        self.images = images
        self.seed = seed
        self.log_px = log_px
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
        from_all: Tensor | None = None,
        standard_error: Any = None,
        num_images: int | None = None,
        stored: bool = True,
        more: dict[str, Any] | None = None,
    ) -> None:
        """Add a figure: a tensor becomes its mean with a standard error; other values stay.

        A tensor has one value per image, or per image whose index is in `of`. If it is not
        `stored`, it has one per image of another kind.

        If `of` has only some of the images, `from_all` is a bound of every image, (N,): the mean of
        all is that of the bound, plus the mean difference on some.
        """
        images = self.images if num_images is None else num_images
        over = "images"
        if isinstance(value, Tensor):
            value = wide(value)
            images, standard_error = len(value), standard_error_of(value)
            if stored:
                self.keep(name, value, of)
            if of is not None and from_all is not None:
                over = f"images, and the choice of {len(of):,} of them"
                value, standard_error, more = self._from_some(value, of, from_all, more or {})
                images = len(from_all)
            else:
                value = value.mean().item()
        self.figures[name] = {
            "value": value,
            "standard_error": standard_error,
            # random seeds, the draw of binarised pixels and the bias of an estimate are not in it
            "error_over": None if standard_error is None else over,
            "unit": unit,
            "definition": definition.replace(_LOG_PX, self.log_px),
            "num_samples": samples,
            "num_images": images,
            "seed": self.seed,
            **(more or {}),
        }

    def keep(self, name: str, values: Tensor, of: Tensor | None = None) -> None:
        """Store a value per image, NaN for those that `of` does not number."""
        values = wide(values)
        if of is not None:
            each = values.new_full((self.images,), math.nan)
            each[of] = values
            values = each
        self.per_image[name] = values

    def _from_some(
        self, values: Tensor, of: Tensor, from_all: Tensor, more: dict[str, Any]
    ) -> tuple[float, float | None, dict[str, Any]]:
        """The difference estimator of the mean of all images, its error, and what to note of it.

        Cochran, *Sampling Techniques* (1977), section 7.3. The error is that of the images, as if
        all had been estimated, joined with that of the choice of some.
        """
        differences = values - from_all[of]
        mean = from_all.mean().item() + differences.mean().item()
        more = {**more, "estimated_images": len(of)}
        if len(of) == 1:
            return mean, None, more
        choice = differences.var().item() * (1 / len(of) - 1 / len(from_all))
        error = math.sqrt(values.var().item() / len(from_all) + choice)
        return mean, error, {**more, "error_of_the_choice": math.sqrt(choice)}

    def compare(self, name: str, other: str) -> None:
        """Note how far a figure is above another, image by image, with the paired error."""
        both = self.per_image[name] - self.per_image[other]
        both = both[both.isfinite()]
        above = self.figures[name].setdefault("above", {})
        above[other] = [both.mean().item(), standard_error_of(both)]

    def bound(self, *names: str) -> None:
        """Note the 95% interval of figures' means over images."""
        for name in names:
            values = self.per_image[name]
            finite = values[values.isfinite()].cpu().numpy()
            self.figures[name]["interval_95"] = bootstrap_interval(finite, self.seed)


def bootstrap_interval(values: np.ndarray, seed: int) -> list[float] | None:
    """95% bootstrap-t interval of a mean, for skewed values; None for fewer than ten values.

    Efron and Tibshirani, *An Introduction to the Bootstrap* (1993), section 12.5.
    """
    n, random = len(values), np.random.default_rng(seed)
    if n < 10 or values.std() == 0:
        return None
    found = []
    for _ in range(1000):
        some = values[random.integers(n, size=n)]
        found.append((some.mean() - values.mean()) / max(some.std(ddof=1), 1e-300))
    high, low = np.quantile(found, [0.025, 0.975]) * values.std(ddof=1)
    return [float(values.mean() - low), float(values.mean() - high)]


def whole_set(vae: VAE, loader: Data) -> Batch:
    """All images (N, *shape), checked, and their labels (N,), if all have some."""
    weight = next(vae.parameters())
    batches = list(as_loader(loader, vae.input_shape, batch_size=1000))
    if not batches:
        raise ValueError("there is no image to evaluate; the loader gave no batch")
    x, y = joined(checked(vae, batches))
    return Batch(x.to(weight), None if y is None else y.to(weight.device))


def checked(vae: VAE, batches: Iterable[Any]) -> list[Batch]:
    """The batches of a loader, checked against the model."""
    return [Batch(vae.check(images_of(batch)), labels_of(batch)) for batch in batches]


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch of all; it has labels if all have some."""
    labels = [batch.y for batch in batches if batch.y is not None]
    x = torch.cat([batch.x for batch in batches])
    return Batch(x, torch.cat(labels) if len(labels) == len(batches) else None)


Found = TypeVar("Found", bound=tuple[Any, ...])


def by_class(vae: VAE, batch: Batch, estimate: Callable[[VAE, Tensor], Found]) -> Found:
    """Run an estimator on images; for a conditional model, class by class.

    With its class given, a conditional model is like any other, so estimators need not know labels.

    Args:
        vae: The model.
        batch: Images, with labels for a conditional model.
        estimate: Returns a named tuple of tensors (..., N). Of its other values, which describe
            all images, the largest over classes is returned.
    """
    model = vae.of(batch)
    if model.y is None or model.y.ndim == 0:
        return estimate(model, batch.x)
    rows = [(model.y == label).nonzero()[:, 0] for label in model.y.unique()]
    found = [estimate(vae.given(model.y[some[0]]), batch.x[some]) for some in rows]
    order = torch.cat(rows).argsort().cpu()
    return type(found[0])(
        *(
            torch.cat(values, -1)[..., order] if isinstance(values[0], Tensor) else max(values)
            for values in zip(*found, strict=True)
        )
    )


def standard_error_of(values: Tensor) -> float | None:
    """The standard error of a mean; None for a single value."""
    return wide(values).std().item() / math.sqrt(len(values)) if len(values) > 1 else None
