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
from vae_torch.vae import VAE


class Figures:
    """The card's figures as they come in.

    Args:
        images: How many are evaluated.
        seed: Of all noise.
        px: What the definitions call p(x): p(x|y) of a conditional model.
    """

    def __init__(self, images: int, seed: int, *, px: str = "p(x)") -> None:
        self.images = images
        self.seed = seed
        self.px = px
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
        stored: bool = True,
        more: dict[str, Any] | None = None,
    ) -> None:
        """Add a figure: a tensor is averaged, with its standard error; other values stand.

        A tensor has one value per image, or per image that `of` numbers; or, where it is not
        `stored`, per image of another kind.
        """
        images = self.images if num_images is None else num_images
        if isinstance(value, Tensor):
            value = wide(value)
            images, standard_error = len(value), standard_error_of(value)
            each = value
            if of is not None:
                each = value.new_full((self.images,), math.nan)
                each[of] = value
            if stored:
                self.per_image[name] = each
            value = value.mean().item()
        self.figures[name] = {
            "value": value,
            "standard_error": standard_error,
            "unit": unit,
            "definition": definition.replace("p(x)", self.px),
            "num_samples": samples,
            "num_images": images,
            "seed": self.seed,
            **(more or {}),
        }

    def compare(self, name: str, other: str) -> None:
        """Note on a figure how far it is above another, image by image, with the paired error."""
        both = self.per_image[name] - self.per_image[other]
        both = both[both.isfinite()]
        above = self.figures[name].setdefault("above", {})
        above[other] = [both.mean().item(), standard_error_of(both)]

    def bound(self, *names: str) -> None:
        """Note on figures the 95% interval of their mean over images."""
        for name in names:
            values = self.per_image[name]
            finite = values[values.isfinite()].cpu().numpy()
            self.figures[name]["interval_95"] = bootstrap_interval(finite, self.seed)


def bootstrap_interval(values: np.ndarray, seed: int) -> list[float] | None:
    """95% bootstrap-t interval of a mean, which allows for a skewed tail; None below ten values.

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
    """All images (N, *shape), checked, and their labels (N,), where all have some."""
    weight = next(vae.parameters())
    batches = list(as_loader(loader, vae.input_shape, batch_size=1000))
    if not batches:
        raise ValueError("there is no image to evaluate; the loader gave no batch")
    x, y = joined(checked(vae, batches))
    return Batch(x.to(weight), None if y is None else y.to(weight.device))


def checked(vae: VAE, batches: Iterable[Any]) -> list[Batch]:
    """What a loader gives, with images that the model takes."""
    return [Batch(vae.check(images_of(batch)), labels_of(batch)) for batch in batches]


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch of all; it has labels where all have some."""
    labels = [batch.y for batch in batches if batch.y is not None]
    x = torch.cat([batch.x for batch in batches])
    return Batch(x, torch.cat(labels) if len(labels) == len(batches) else None)


Found = TypeVar("Found", bound=tuple[Any, ...])


def by_class(vae: VAE, batch: Batch, estimate: Callable[[VAE, Tensor], Found]) -> Found:
    """What an estimator finds out about images: a conditional model is asked class by class.

    Given a class, it is a model like any other, so that no estimator need know of labels.

    Args:
        vae: The model.
        batch: Images, with labels where the model sees some.
        estimate: Returns a named tuple of tensors (..., N); of its other values, which are of the
            whole, the largest of all classes is returned.
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
    """The standard error of a mean; None of a single value."""
    return wide(values).std().item() / math.sqrt(len(values)) if len(values) > 1 else None
