"""The card's figures, each with its error, its unit and its definition."""

import math
from typing import Any

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
        more: dict[str, Any] | None = None,
    ) -> None:
        """Add a figure: a tensor is averaged, with its standard error; other values stand.

        A tensor has one value per image, or per image that `of` numbers.
        """
        images = self.images if num_images is None else num_images
        if isinstance(value, Tensor):
            value = value.double()
            images, standard_error = len(value), standard_error_of(value)
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
