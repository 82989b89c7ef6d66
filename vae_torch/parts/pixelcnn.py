"""An autoregressive likelihood: each pixel given z and the pixels before it, within a window.

log p(x|z) = Σ_i log p(x_i | earlier pixels of the window around i, z), pixels in reading order.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from vae_torch.config import ConfigError
from vae_torch.images import pair_images
from vae_torch.parts.likelihoods import bernoulli_terms, likelihoods
from vae_torch.parts.networks import image_shape

_CHAINS = 16  # sampled images whose probabilities `mean` averages


def _odd(number: int) -> int:
    if number % 2 == 0:
        raise PydanticCustomError("odd", "must be odd")
    return number


Odd = Annotated[int, Field(strict=True, ge=3), AfterValidator(_odd)]
Several = Annotated[int, Field(strict=True, ge=2)]


@likelihoods.register("pixelcnn")
class PixelCNN(nn.Module):
    """Bernoulli pixels from one masked convolution of the image, joined to the decoder's output.

    The decoder's `channels` numbers per pixel are added to the masked convolution: van den Oord et
    al., *Conditional Image Generation with PixelCNN Decoders* (NeurIPS 2016), equation 4 and
    section 2.3; mask A: *Pixel Recurrent Neural Networks* (ICML 2016), section 3.4. Two 1x1
    convolutions follow. In a VAE: Gulrajani et al., *PixelVAE* (ICLR 2017), section 3.1. What lies
    outside the window, only z can tell: Chen et al., *Variational Lossy Autoencoder* (ICLR 2017),
    section 3.1. The channels of a pixel see earlier pixels of all channels, not each other.

    Args:
        input_shape: Shape of one image, (channels, height, width) or (height, width); flat images
            must be square.
        window: Side of the window, odd. A pixel sees window // 2 rows above its own and as many
            columns to the left and, in the rows above, to the right.
        channels: Hidden numbers per pixel, two or more, which are also the decoder's outputs.

    Raises:
        ValueError: A window that is even or below 3, or fewer than two channels.
        ConfigError: Flat images that are not square.
    """

    def __init__(
        self, input_shape: Sequence[int], *, window: Odd = 7, channels: Several = 16
    ) -> None:
        super().__init__()
        if window < 3 or window % 2 == 0 or channels < 2:
            raise ValueError(
                f"window is {window} and channels {channels}; the window must be odd and 3 or "
                "more, the channels 2 or more"
            )
        shape = tuple(input_shape)
        self.shape = (1, *shape) if len(shape) == 2 else shape
        if len(shape) == 1:
            self.shape = image_shape(shape)
        if len(self.shape) != 3:  # (c, height, width)
            raise ConfigError(
                f"likelihood is 'pixelcnn' and an image has shape {shape}; it must be "
                "(channels, height, width), (height, width), or flat and square"
            )
        self.reach, self.outputs = window // 2, channels
        self.earlier = self.reach * (window + 1)  # pixels of the window before its middle
        self.context = nn.Linear(self.shape[0] * self.earlier, self.shape[0] * channels)
        self.head = nn.Sequential(
            nn.ReLU(), nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, 1)
        )

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        """Nats per image: (B, *shape) and (..., B, *shape, channels) -> (..., B).

        Raises:
            ValueError: x and params hold different numbers of images, or images of other shapes.
        """
        x, pixels = pair_images(x, params[..., 0])
        lead = pixels.shape[:-1]  # (..., B)
        windows = self._padded(x).unfold(2, self.reach + 1, 1).unfold(3, 2 * self.reach + 1, 1)
        windows = windows.permute(0, 2, 3, 1, 4, 5)  # (B, height, width, c, reach + 1, window)
        context = self._context(windows.flatten(4).to(params.dtype))
        hidden = params.reshape(*lead, *self.shape, self.outputs) + context.movedim(3, 1)
        logits = self.head(hidden).to(params.dtype)  # under autocast it computes in bf16
        return bernoulli_terms(x, logits.flatten(len(lead)))

    def mean(self, params: Tensor) -> Tensor:
        """Expected pixels: (..., *shape, channels) -> (..., *shape), without a gradient.

        An unbiased estimate: the mean of the probabilities with which 16 images are drawn, pixel by
        pixel, always with the same noise.
        """
        generator = torch.Generator(params.device).manual_seed(0)
        shape = (_CHAINS, 1, *self.shape)
        noise = torch.rand(shape, generator=generator, device=params.device)
        images = params.reshape(-1, *self.shape, self.outputs)
        _, probabilities = self._draw(images.expand(_CHAINS, *images.shape), noise)
        return probabilities.mean(0).reshape(params.shape[:-1])

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images of zeros and ones: (..., *shape, channels) -> (..., *shape)."""
        images = params.reshape(-1, *self.shape, self.outputs)
        noise = torch.rand(images.shape[:-1], generator=generator, device=params.device)
        return self._draw(images, noise)[0].reshape(params.shape[:-1])

    @torch.no_grad()
    def _draw(self, params: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Images, drawn pixel by pixel with this noise, and the probability of 1 of each pixel.

        (..., c, height, width, channels) and (..., c, height, width) -> (..., c, height, width).
        """
        _, height, width = self.shape
        drawn = self._padded(torch.zeros_like(params[..., 0])).unflatten(0, params.shape[:-4])
        probabilities = torch.empty_like(params[..., 0])
        for i in range(height):
            for j in range(width):
                seen = drawn[..., i : i + self.reach + 1, j : j + 2 * self.reach + 1]
                logits = self.head(params[..., i, j, :] + self._context(seen.flatten(-2)))
                probability = logits.squeeze(-1).sigmoid()
                probabilities[..., i, j] = probability
                drawn[..., i + self.reach, j + self.reach] = (noise[..., i, j] < probability).to(
                    drawn
                )
        return drawn[..., self.reach :, self.reach : self.reach + width], probabilities

    def _padded(self, x: Tensor) -> Tensor:
        """(B, *any) -> (B, c, height + reach, width + 2 reach): zeros above, left and right."""
        return F.pad(x.reshape(-1, *self.shape), (self.reach, self.reach, self.reach, 0))

    def _context(self, windows: Tensor) -> Tensor:
        """(..., c, (reach + 1) * window) -> (..., c, channels); later pixels are left out."""
        found = self.context(windows[..., : self.earlier].flatten(-2))
        return found.unflatten(-1, (self.shape[0], self.outputs))  # type: ignore[no-any-return]
