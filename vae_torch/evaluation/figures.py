"""The card's figures, each with its error, its unit and its definition."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vae_torch.data import Data, as_loader, images_of, labels_of
from vae_torch.vae import VAE


class Figures:
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
        stored: bool = True,
        more: dict[str, Any] | None = None,
    ) -> None:
        """Add a figure: a tensor is averaged, with its standard error; other values stand.

        A tensor has one value per image, or per image that `of` numbers; or, where it is not
        `stored`, per image of another kind.
        """
        images = self.images if num_images is None else num_images
        if isinstance(value, Tensor):
            value = value.double()
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
            "definition": definition,
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


def bootstrap_interval(values: np.ndarray, seed: int, *, level: float = 0.95) -> list[float] | None:
    """Bootstrap-t interval of a mean, which allows for a skewed tail; None below ten values.

    Efron and Tibshirani, *An Introduction to the Bootstrap* (1993), section 12.5.
    """
    n, random = len(values), np.random.default_rng(seed)
    if n < 10 or values.std() == 0:
        return None
    found = []
    for _ in range(1000):
        some = values[random.integers(n, size=n)]
        found.append((some.mean() - values.mean()) / max(some.std(ddof=1), 1e-300))
    high, low = np.quantile(found, [(1 - level) / 2, (1 + level) / 2]) * values.std(ddof=1)
    return [float(values.mean() - low), float(values.mean() - high)]


def whole_set(vae: VAE, loader: Data) -> tuple[Tensor, Tensor | None]:
    """All images (N, *shape), checked, and their labels (N,), where all have some."""
    weight = next(vae.parameters())
    batches = list(as_loader(loader, vae.input_shape, batch_size=1000))
    if not batches:
        raise ValueError("there is no image to evaluate; the loader gave no batch")
    x = torch.cat([vae.check(images_of(batch)) for batch in batches])
    labels = [some for some in map(labels_of, batches) if some is not None]
    whole = torch.cat(labels).to(weight.device) if len(labels) == len(batches) else None
    return x.to(weight), whole


def standard_error_of(values: Tensor) -> float | None:
    """The standard error of a mean; None of a single value."""
    return values.double().std().item() / math.sqrt(len(values)) if len(values) > 1 else None
