import numpy as np
import pytest
import torch
from PIL import Image

from vae_torch import VAE
from vae_torch.figures import (
    image_grid,
    latent_scatter,
    manifold_grid,
    reconstruction_grid,
    sample_grid,
    save_png,
    to_pixels,
)


def test_grid_puts_every_image_in_its_place():
    images = torch.rand(5, 1, 4, 3)
    grid = image_grid(images, 2, gap=1)
    assert grid.shape == (3 * 5 + 1, 2 * 4 + 1)
    for i, image in enumerate(images):
        top, left = 1 + i // 2 * 5, 1 + i % 2 * 4
        assert torch.equal(grid[top : top + 4, left : left + 3], image[0])
    assert (grid[-5:, -4:] == 1).all()  # the empty sixth place


def test_reconstruction_grid_has_originals_over_reconstructions(small_vae):
    x = torch.rand(10, 784)
    grid = reconstruction_grid(small_vae, x)
    assert torch.equal(grid[2:30, 32:60], x[1].reshape(28, 28))
    assert torch.equal(grid[32:60, 32:60], small_vae.reconstruct(x)[1].reshape(28, 28))


def test_manifold_covers_the_prior_in_equal_masses(small_vae):
    rows = 4
    grid = manifold_grid(small_vae, rows=rows)
    ticks = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor([1, 3, 5, 7]) / 8)
    z = torch.stack([ticks[2], ticks[3]])  # third column, top row: the second latent grows upwards
    expected = torch.sigmoid(small_vae.decode(z)).reshape(28, 28).detach()
    torch.testing.assert_close(grid[:28, 56:84], expected)


def test_samples_are_the_same_for_one_seed(small_vae):
    assert torch.equal(sample_grid(small_vae, seed=1), sample_grid(small_vae, seed=1))
    assert not torch.equal(sample_grid(small_vae, seed=1), sample_grid(small_vae, seed=2))


def test_png_holds_the_picture(tmp_path, small_vae):
    grid = sample_grid(small_vae, rows=3)
    save_png(grid, tmp_path / "grid.png", scale=2)
    with Image.open(tmp_path / "grid.png") as image:
        pixels = np.asarray(image)
    np.testing.assert_array_equal(pixels[::2, ::2], to_pixels(grid))
    scatter = latent_scatter(small_vae, torch.rand(50, 784), torch.arange(50) % 10)
    save_png(scatter, tmp_path / "scatter.png")
    with Image.open(tmp_path / "scatter.png") as image:
        assert image.size == (770, 660)


def test_two_dimensional_pictures_refuse_other_models():
    vae = VAE(latent_dim=3, intermediate_dim=4)
    for draw in (manifold_grid, lambda v: latent_scatter(v, torch.rand(2, 784), torch.zeros(2))):
        with pytest.raises(ValueError, match="latent_dim is 3"):
            draw(vae)
