"""Images side by side, as one tensor in [0, 1]."""

import numpy as np
import torch
from torch import Tensor

from vae_torch.figures.pictures import as_pictures, decoded_pictures, pictures, shrunk, to_pixels
from vae_torch.images import Batch
from vae_torch.vae import VAE

_LONGEST = 128  # longest side of an image in pixels; larger images are reduced


def image_grid(images: Tensor, columns: int, *, gap: int = 2) -> Tensor:
    """Tile images into one, row by row, on white.

    Args:
        images: (N, pixels), (N, 1, H, W) or (N, 3, H, W) in [0, 1]; flat ones must be square.
        columns: Images per row.
        gap: White pixels between them.

    Returns:
        (height, width), of colour images (height, width, 3).

    Raises:
        NoPicturesError: Images of another shape.
    """
    images = as_pictures(images)
    if images.ndim == 4:  # the channels come last, as in image files
        images = images.movedim(1, -1)
    n, height, width, *channels = images.shape
    rows = -(-n // columns)
    grid = torch.ones(rows * (height + gap) + gap, columns * (width + gap) + gap, *channels)
    for i, image in enumerate(images):
        top = gap + i // columns * (height + gap)
        left = gap + i % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


def reconstruction_grid(vae: VAE, x: Tensor) -> Tensor:
    """The notebook's `plot_results`: originals over their reconstructions.

    Args:
        vae: The model.
        x: (n, *shape) in [0, 1]; the notebook shows ten.

    Returns:
        (height, width) or (height, width, 3), two rows of n images.
    """
    n = len(x)
    both = torch.cat([pictures(vae, x), pictures(vae, vae.reconstruct(x))])
    return image_grid(shrunk(both, _LONGEST), n)


def sample_grid(vae: VAE, *, rows: int = 8, seed: int = 0) -> Tensor:
    """Expected images of rows x rows samples from the prior, the same for the same seed.

    A conditional model has a row for each class, with the same `rows` samples of z in all of them.
    """
    device = next(vae.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    if vae.classes and vae.y is None:
        z = vae.prior.sample(rows, generator)
        each = [decoded_pictures(vae.given(label), z) for label in range(vae.classes)]
        return image_grid(shrunk(torch.cat(each), _LONGEST), rows)
    samples = vae.sample(rows * rows, generator=generator)
    return image_grid(shrunk(pictures(vae, samples), _LONGEST), rows)


@torch.no_grad()
def manifold_grid(vae: VAE, *, rows: int = 20) -> Tensor:
    """The decoded latent plane, at coordinates that cut the prior into equal masses.

    Kingma and Welling (2013), figure 4: an even grid on the unit square, through the inverse
    Gaussian CDF. The second latent grows upwards.

    Raises:
        ValueError: latent_dim is not 2.
    """
    if vae.latent_dim != 2:
        raise ValueError(f"latent_dim is {vae.latent_dim}; the manifold needs 2")
    weight = next(vae.parameters())
    ticks = torch.special.ndtri((torch.arange(rows) + 0.5) / rows).to(weight)
    up, across = torch.meshgrid(ticks.flip(0), ticks, indexing="ij")
    z = torch.stack([across, up], -1).reshape(-1, 2)  # (rows², 2)
    return image_grid(shrunk(decoded_pictures(vae, z), _LONGEST // 2), rows, gap=0)


def growth_frame(vae: VAE, x: Tensor, epoch: int, *, labels: Tensor | None = None) -> np.ndarray:
    """One frame of a run's animation: reconstructions over the manifold, or over samples.

    Args:
        vae: The model.
        x: (n, *shape): the images to reconstruct.
        epoch: Number written above them.
        labels: (n,) classes, for a conditional model; its samples have a row for each class.

    Returns:
        (H, W) or (H, W, 3) uint8, of one size for a whole run.
    """
    from PIL import Image, ImageDraw, ImageFont

    top = reconstruction_grid(vae.of(Batch(x, labels)), x)
    plane = vae.latent_dim == 2 and not vae.classes
    below = manifold_grid(vae, rows=11) if plane else sample_grid(vae, rows=10)
    width = max(top.shape[1], below.shape[1])
    channels = top.shape[2:]
    parts = [torch.ones(22, width, *channels)]
    for grid in (top, below):
        padded = torch.ones(grid.shape[0] + 4, width, *channels)
        left = (width - grid.shape[1]) // 2
        padded[: grid.shape[0], left : left + grid.shape[1]] = grid
        parts.append(padded)
    image = Image.fromarray(to_pixels(torch.cat(parts)))
    draw = ImageDraw.Draw(image)
    draw.text((4, 3), f"epoch {epoch}", fill="black", font=ImageFont.load_default(14))
    return np.asarray(image)
