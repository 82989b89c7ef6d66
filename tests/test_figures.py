import os
import subprocess
import sys
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from tests.conftest import REPOSITORY
from vae_torch import VAE
from vae_torch.figures import (
    growth_frame,
    image_grid,
    interpolation_figure,
    kl_figure,
    latent_scatter,
    log_px_map,
    manifold_grid,
    reconstruction_figure,
    reconstruction_grid,
    sample_grid,
    save_gif,
    save_png,
    shrunk,
    spherical_interpolation,
    to_pixels,
    traversal_figure,
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


def pictures_of(figure, row, columns):
    """The pictures of one row, 28 x 28 each, two pixels apart."""
    table = np.asarray(figure.axes[0].get_images()[0].get_array())
    assert table.shape[1] == 2 + 30 * columns
    return np.stack([table[2 + 30 * row :, 2 + 30 * i :][:28, :28] for i in range(columns)])


def names_of(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_reconstructions_carry_their_nats(small_vae):
    x = torch.rand(4, 784)
    figure = reconstruction_figure(small_vae, x)
    probabilities = small_vae.reconstruct(x)
    nats = -torch.distributions.Bernoulli(probabilities, validate_args=False).log_prob(x).sum(1)
    assert names_of(figure.axes[0].xaxis) == [f"{n:.0f}" for n in nats]
    places = figure.axes[0].get_xticks()
    np.testing.assert_allclose(places, [15.5 + 30 * i for i in range(4)])  # under their pictures
    np.testing.assert_allclose(pictures_of(figure, 0, 4), x.reshape(4, 28, 28))
    np.testing.assert_allclose(pictures_of(figure, 1, 4), probabilities.reshape(4, 28, 28))


def active_in(dimensions, latent_dim):
    """A model whose posterior means vary in these dimensions alone, more in the first."""
    torch.manual_seed(0)
    vae = VAE(latent_dim=latent_dim, intermediate_dim=32)
    with torch.no_grad():
        gain = torch.zeros(latent_dim, 1)
        for place, dimension in enumerate(dimensions):
            gain[dimension] = 3.0 / (place + 1)
        vae.posterior.mean.weight.mul_(gain)
    return vae


def test_traversal_moves_the_active_dimensions():
    vae, x = active_in([4, 1], latent_dim=6), torch.rand(300, 784)
    figure = traversal_figure(vae, x, steps=3)
    assert names_of(figure.axes[0].yaxis) == ["z₅", "z₂"]
    assert names_of(figure.axes[0].xaxis) == ["-3.0", "0", "+3.0"]
    means = vae.encode(x)[0].detach()
    z = means[:1].repeat(3, 1)
    z[:, 1] = means[:, 1].mean() + torch.tensor([-3.0, 0.0, 3.0]) * means[:, 1].std()
    expected = torch.sigmoid(vae.decode(z)).detach().reshape(3, 28, 28)
    np.testing.assert_allclose(pictures_of(figure, 1, 3), expected, atol=1e-6)


def test_traversal_of_a_collapsed_model_shows_one_dimension():
    figure = traversal_figure(active_in([], latent_dim=3), torch.rand(50, 784), steps=3)
    assert names_of(figure.axes[0].yaxis) == ["z₁"]
    assert "0 of 3 dimensions active" in figure.get_supxlabel()


def test_spherical_way_keeps_norm_and_pace():
    start, end = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 3.0])
    way = spherical_interpolation(start, end, steps=7)
    torch.testing.assert_close(way.norm(dim=1), torch.full((7,), 3.0))
    torch.testing.assert_close(
        (way[1:] * way[:-1]).sum(1) / 9, torch.full((6,), np.cos(np.pi / 12))
    )
    torch.testing.assert_close(way[[0, -1]], torch.stack([start, end]))


NUMBERS = st.floats(-100, 100, allow_nan=False, width=32)


@st.composite
def pairs_of_latents(draw):
    """Two latents of one to twenty dimensions; often in opposite directions, or zero."""
    latent_dim = draw(st.integers(1, 20))
    vectors = st.lists(NUMBERS, min_size=latent_dim, max_size=latent_dim).map(torch.tensor)
    start = draw(vectors)
    multiple = st.sampled_from([-2.0, -1.0, -1 / 3, 0.0, 0.5]).map(lambda by: by * start)
    nearly = multiple.map(lambda v: v * (1 + 1e-6 * torch.arange(latent_dim)))
    return start, draw(st.one_of(vectors, multiple, nearly))


@given(pairs_of_latents())
@example((torch.tensor([2.18, 0.1]), torch.tensor([-1.1, 0.01])))
def test_a_spherical_path_stays_in_the_ring_between_its_ends(ends):
    way = spherical_interpolation(*ends, steps=11)
    torch.testing.assert_close(way[[0, -1]], torch.stack(ends), rtol=1e-5, atol=1e-4)
    expected = np.linspace(*(np.linalg.norm(end.double()) for end in ends), 11)
    np.testing.assert_allclose(way.double().norm(dim=1), expected, rtol=1e-5, atol=1e-6)


@given(st.complex_numbers(min_magnitude=0.1, max_magnitude=50), st.floats(-3.1, 3.1),
       st.floats(0.1, 50), st.integers(2, 12))  # fmt: skip
def test_a_spherical_path_in_a_plane_equals_that_of_complex_numbers(
    start, angle, length, latent_dim
):
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    turned = (
        (abs(start) + t * (length - abs(start))) * start / abs(start) * torch.exp(1j * angle * t)
    )
    torch.manual_seed(latent_dim)
    plane = torch.linalg.qr(torch.randn(latent_dim, 2, dtype=torch.float64)).Q  # (latent_dim, 2)
    expected = torch.view_as_real(turned) @ plane.T
    way = spherical_interpolation(expected[0], expected[-1], steps=9)
    torch.testing.assert_close(way, expected, rtol=0, atol=1e-9 * 50)


def test_spherical_way_where_no_arc_is_given():
    start = torch.tensor([3.0, 0.0, 4.0])
    opposite = spherical_interpolation(start, -2 * start, steps=3)[1]
    torch.testing.assert_close(opposite, torch.tensor([0.0, 7.5, 0.0]))
    zero = spherical_interpolation(torch.zeros(3), start, steps=3)
    torch.testing.assert_close(zero, torch.tensor([0.0, 0.5, 1.0])[:, None] * start)
    assert not spherical_interpolation(torch.zeros(3), torch.zeros(3), steps=3).any()
    one = spherical_interpolation(torch.tensor([-1.0]), torch.tensor([3.0]), steps=5)
    torch.testing.assert_close(one[:, 0], torch.tensor([-1.0, -1.5, 2.0, 2.5, 3.0]))


def test_interpolation_ends_at_the_reconstructions(small_vae):
    x = torch.rand(2, 784)
    figure = interpolation_figure(small_vae, x, steps=5)
    for row in (0, 1):
        shown = pictures_of(figure, row, 7)
        np.testing.assert_allclose(shown[[0, -1]], x.reshape(2, 28, 28))
        expected = small_vae.reconstruct(x).reshape(2, 28, 28)
        np.testing.assert_allclose(shown[[1, -2]], expected, atol=1e-6)
    with pytest.raises(ValueError, match="two ends"):
        interpolation_figure(small_vae, torch.rand(3, 784))
    one = interpolation_figure(VAE(latent_dim=1, intermediate_dim=4), x)
    assert names_of(one.axes[0].yaxis) == ["straight"]


def test_kl_bars_have_the_heights_of_the_divergence():
    vae, x = active_in([2, 0], latent_dim=4), torch.rand(200, 784)
    axes = kl_figure(vae, x).axes[0]
    mean, logvar = (part.detach() for part in vae.encode(x))
    q = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).mean(0)
    heights = [bar.get_height() for bar in axes.patches]
    np.testing.assert_allclose(heights, kl.sort(descending=True).values, atol=1e-5, rtol=1e-4)
    assert axes.get_title() == "2 of 4 dimensions active"
    for bar, dimension in zip(axes.patches, kl.argsort(descending=True), strict=True):
        active = mean[:, dimension].var() > 0.01
        assert bar in axes.containers[0 if active else 1]
        assert axes.containers[0 if active else 1].get_label() == (
            "active" if active else "inactive"
        )


def test_kl_bars_mark_activity_where_it_differs_from_the_order_of_heights():
    """A constant mean has a KL above 0 but no information."""
    vae = active_in([0], latent_dim=3)
    with torch.no_grad():
        vae.posterior.mean.bias[2] = 4.0  # 8 nats
    axes = kl_figure(vae, torch.rand(200, 784)).axes[0]
    assert names_of(axes.xaxis)[0] == "3"
    active, inactive = ([bar.get_x() for bar in bars] for bars in axes.containers)
    assert active[0] > inactive[0]
    assert not axes.lines


@pytest.mark.parametrize("latent_dim", [1, 2, 10, 40, 100])
def test_kl_bars_fill_their_picture_and_their_names_can_be_read(latent_dim):
    figure = kl_figure(active_in(range(latent_dim), latent_dim), torch.rand(50, 784))
    image, axes = to_pixels(figure), figure.axes[0]
    bars = axes.patches
    low, high = axes.get_xlim()
    assert len(bars) == latent_dim
    assert sum(bar.get_width() for bar in bars) / (high - low) > (0.3 if latent_dim == 1 else 0.6)
    assert bars[0].get_height() > 0.8 * axes.get_ylim()[1]
    assert 300 < image.shape[1] <= 1100
    names = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(a.x1 < b.x0 for a, b in pairwise(names))
    shown = [axes.title, *names, *axes.texts]
    for box in (text if hasattr(text, "x0") else text.get_window_extent() for text in shown):
        assert box.x0 >= 0
        assert box.x1 <= image.shape[1]


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2])
def test_pictures_of_one_or_two_images(latent_dim, count):
    vae, x, labels = active_in([0], latent_dim), torch.rand(count, 784), torch.zeros(count).long()
    pictures = {
        "reconstructions": reconstruction_figure(vae, x),
        "latent": latent_scatter(vae, x, labels),
        "traversal": traversal_figure(vae, x, steps=3),
        "kl": kl_figure(vae, x),
    }
    if latent_dim == 2:
        pictures["map"] = log_px_map(vae, x, torch.linspace(-200, -100, count))
    for name, figure in pictures.items():
        width = to_pixels(figure).shape[1]
        for text in [*figure.texts, figure.axes[0].title]:
            box = text.get_window_extent()
            assert box.x0 > -1, (name, text)
            assert box.x1 < width + 1, (name, text)
    assert np.isfinite(pictures_of(pictures["traversal"], 0, 3)).all()
    axes = pictures["latent"].axes[0]
    (places,) = [points.get_offsets() for points in axes.collections]
    assert axes.get_ylim()[0] < places[:, 1].min() <= places[:, 1].max() < axes.get_ylim()[1]
    noun = "image" if count == 1 else "images"
    assert axes.get_title().startswith(f"Posterior means of {count} test {noun}")
    if count == 1:  # nothing varies over one image, whatever the model
        assert "no dimension is active" not in axes.get_title()
        assert pictures["kl"].axes[0].get_title() == "one image: activity unknown"
        assert "active" not in pictures["traversal"].get_supxlabel()


def test_scatter_takes_the_two_most_active_dimensions():
    labels = torch.arange(100) % 10
    axes = latent_scatter(active_in([4, 1], 6), torch.rand(100, 784), labels).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("z₅", "z₂")
    assert len({tuple(c.get_facecolor()[0]) for c in axes.collections}) == 10
    one = latent_scatter(active_in([0], 1), torch.rand(100, 784), labels).axes[0]
    assert (one.get_xlabel(), one.get_ylabel()) == ("z₁", "class")
    assert names_of(one.yaxis) == [str(digit) for digit in range(10)]


def test_scatter_of_a_collapsed_model_looks_like_one():
    labels = torch.arange(100) % 10
    axes = latent_scatter(active_in([], 2), torch.rand(100, 784), labels).axes[0]
    assert axes.get_title().endswith("no dimension is active")
    low, high = axes.get_xlim()
    assert low < -2 < 2 < high
    assert not axes.texts


def test_no_class_name_hides_another():
    x, labels = torch.rand(100, 784), torch.arange(100) % 10  # one cluster: about equal medians
    axes = latent_scatter(active_in([1, 0], 2), x, labels).axes[0]
    places = torch.tensor([text.xy for text in axes.texts])
    wide = max(high - low for low, high in (axes.get_xlim(), axes.get_ylim()))
    assert len(places) == 10
    assert torch.pdist(places).min() > wide / 30


def test_numbers_tell_more_classes_than_there_are_colours():
    x, labels = torch.rand(470, 784), torch.arange(470) % 47
    axes = latent_scatter(active_in([0, 1], 2), x, labels).axes[0]
    assert sorted(int(text.get_text()) for text in axes.texts) == list(range(47))
    assert axes.get_legend() is None
    one = latent_scatter(active_in([0], 1), x, labels).axes[0]
    assert one.get_ylabel() == "class"
    assert not one.texts  # the axis covers them


def test_the_first_picture_on_a_machine_logs_nothing_about_fonts(tmp_path):
    """Loggers at INFO, such as a run's log, hear nothing; the level is restored."""
    script = """if True:
        import logging, torch
        logging.basicConfig(level=logging.INFO)
        from vae_torch import VAE
        from vae_torch.figures import kl_figure, to_png
        logger = logging.getLogger("matplotlib.font_manager")
        to_png(kl_figure(VAE(intermediate_dim=4), torch.rand(9, 784)))
        assert logger.level == logging.NOTSET
        logger.info("of later")
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=REPOSITORY, check=True,
        env=os.environ | {"MPLCONFIGDIR": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert list(tmp_path.glob("fontlist*"))  # the picture was drawn
    assert done.stderr == "INFO:matplotlib.font_manager:of later\n"


def test_map_draws_the_posteriors_to_scale(small_vae):
    x = torch.rand(30, 784)
    figure = log_px_map(small_vae, x, torch.linspace(-200, -100, 30), ellipses=3)
    mean, logvar = small_vae.encode(x)
    for patch, centre, spread in zip(figure.axes[0].patches, mean, logvar, strict=False):
        assert patch.get_center() == pytest.approx(tuple(centre.tolist()))
        sizes = [4 * np.exp(0.5 * v) for v in spread.tolist()]
        assert (patch.width, patch.height) == pytest.approx(tuple(sizes))
    assert len(figure.axes[0].patches) == 3


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_growth_is_an_animation_of_equal_frames(tmp_path, latent_dim):
    vae = VAE(latent_dim=latent_dim, intermediate_dim=8)
    frames = [growth_frame(vae, torch.rand(10, 784), epoch) for epoch in (1, 2, 100)]
    save_gif(frames, tmp_path / "growth.gif")
    with Image.open(tmp_path / "growth.gif") as image:
        assert image.n_frames == 3
        assert image.size == frames[0].shape[::-1]
    with pytest.raises(ValueError, match="no frames"):
        save_gif([], tmp_path / "none.gif")


@pytest.mark.parametrize("shape", [(600,), (20, 30), (1, 20, 30)])  # in the order of the images
def test_pictures_have_the_shape_that_the_model_knows(shape):
    vae, x = VAE((20, 30), 2, 4), torch.rand(12, *shape)
    labels = torch.arange(12)
    first = x[0].reshape(20, 30)
    assert torch.equal(reconstruction_grid(vae, x)[2:22, 2:32], first)
    for figure in (reconstruction_figure(vae, x), interpolation_figure(vae, x[:2])):
        table = torch.tensor(np.asarray(figure.axes[0].get_images()[0].get_array()))
        assert torch.equal(table[2:22, 2:32], first)
    for figure in (latent_scatter(vae, x, labels), traversal_figure(vae, x), kl_figure(vae, x)):
        assert to_pixels(figure).size
    assert manifold_grid(vae, rows=3).shape == (60, 90)
    assert growth_frame(vae, x, 1).dtype == np.uint8


def test_images_of_other_kinds_are_refused_by_their_shape():
    for images in (
        torch.rand(4, 2, 8, 8),
        torch.rand(4, 8, 8, 3),
        torch.rand(4, 600),
        torch.rand(4),
    ):
        with pytest.raises(ValueError, match=r"images have shape \(4.*(grey|square)"):
            image_grid(images, 2)


def test_colour_grids_have_every_channel_of_every_pixel_in_its_place(tmp_path):
    images = torch.rand(5, 3, 4, 6)
    grid = image_grid(images, 2, gap=1)
    assert grid.shape == (3 * 5 + 1, 2 * 7 + 1, 3)
    for i, image in enumerate(images):
        top, left = 1 + i // 2 * 5, 1 + i % 2 * 7
        for channel in range(3):
            assert torch.equal(grid[top : top + 4, left : left + 6, channel], image[channel])
    save_png(grid, tmp_path / "grid.png", scale=3)
    with Image.open(tmp_path / "grid.png") as image:
        assert image.mode == "RGB"
        assert image.getpixel((3 * 2, 3 * 3)) == tuple((images[0, :, 2, 1] * 255).round().int())


@pytest.mark.parametrize("flat", [False, True])  # in the order of the images
def test_pictures_of_a_colour_model_are_in_colour(tmp_path, flat):
    vae, x = (
        VAE((3, 16, 24), 2, 4, likelihood="gaussian", architecture="conv"),
        torch.rand(12, 3, 16, 24),
    )
    given = x.flatten(1) if flat else x
    first = x[0].movedim(0, -1)
    assert torch.equal(reconstruction_grid(vae, given)[2:18, 2:26], first)
    for figure in (reconstruction_figure(vae, given), interpolation_figure(vae, given[:2])):
        table = torch.tensor(np.asarray(figure.axes[0].get_images()[0].get_array()))
        assert torch.equal(table[2:18, 2:26], first)
        assert to_pixels(figure).size
    decoded = vae.decode(vae.encode(x[:1]).mean)[0].clamp(0, 1).movedim(0, -1)
    table = reconstruction_figure(vae, given).axes[0].get_images()[0].get_array()
    np.testing.assert_allclose(table[20:36, 2:26], decoded.detach(), atol=1e-6)
    assert to_pixels(traversal_figure(vae, given)).size
    assert manifold_grid(vae, rows=3).shape == (48, 72, 3)
    assert sample_grid(vae, rows=3).shape == (3 * 18 + 2, 3 * 26 + 2, 3)
    frames = [growth_frame(vae, given[:10], epoch) for epoch in (1, 2)]
    save_gif(frames, tmp_path / "growth.gif")
    with Image.open(tmp_path / "growth.gif") as image:
        assert image.size == frames[0].shape[1::-1]
        shown = np.asarray(image.convert("RGB"))[24:40, 2:26].astype(int)
    assert abs(shown - frames[0][24:40, 2:26]).mean() < 20  # a palette of 256 colours


def test_large_images_are_reduced_by_averaging():
    images = torch.rand(2, 3, 256, 64)
    small = shrunk(images, 128)
    torch.testing.assert_close(small, torch.nn.functional.avg_pool2d(images, 2))
    assert shrunk(images, 256) is images


def test_scatter_calls_classes_by_their_names():
    x, labels = torch.rand(90, 784), torch.arange(90) % 3
    names = ["cat", "a dog with a very long name", "owl"]
    axes = latent_scatter(active_in([0, 1], 2), x, labels, class_names=names).axes[0]
    called = ["cat", "a dog with a ve…", "owl"]
    assert [text.get_text() for text in axes.texts] == called
    assert [text.get_text() for text in axes.get_legend().get_texts()] == called
    one = latent_scatter(active_in([0], 1), x, labels, class_names=names).axes[0]
    assert names_of(one.yaxis) == called


def test_scatter_without_labels_is_not_about_classes():
    for latent_dim in (1, 2, 6):
        axes = latent_scatter(active_in([0], latent_dim), torch.rand(50, 784), None).axes[0]
        (points,) = axes.collections
        assert len(points.get_offsets()) == 50
        assert axes.get_legend() is None
        assert not axes.texts
        assert "class" not in axes.get_ylabel()
        if latent_dim == 1:
            assert len(axes.get_yticks()) == 0


class Box(NamedTuple):
    """A posterior that is no Gaussian: uniform around its mean."""

    mean: torch.Tensor

    def rsample(self, eps):
        return self.mean + 0.1 * torch.erf(eps / 2**0.5)

    def log_prob(self, z):
        return torch.full(z.shape[:-1], -z.shape[-1] * np.log(0.2))

    def sample(self, eps):
        z = self.rsample(eps)
        return z, self.log_prob(z)


class BoxOf(nn.Module):
    def __init__(self, latent_dim):
        super().__init__()
        self.head = nn.Linear(16, latent_dim)

    def forward(self, h):
        return Box(self.head(h))


def test_pictures_need_no_more_of_a_posterior_than_its_mean():
    vae, x = VAE(latent_dim=2, intermediate_dim=16, posterior=BoxOf(2)), torch.rand(12, 784)
    for figure in (
        reconstruction_figure(vae, x),
        interpolation_figure(vae, x[:2]),
        traversal_figure(vae, x),
        latent_scatter(vae, x, None),
    ):
        assert to_pixels(figure).size
    figure = log_px_map(vae, x, torch.linspace(-200, -100, 12))
    assert not figure.axes[0].patches
    assert "ellipses" not in figure.axes[0].get_title()
    assert growth_frame(vae, x, 1).size


def test_two_dimensional_pictures_refuse_other_models():
    vae = VAE(latent_dim=3, intermediate_dim=4)
    for draw in (manifold_grid, lambda v: log_px_map(v, torch.rand(2, 784), torch.zeros(2))):
        with pytest.raises(ValueError, match="latent_dim is 3"):
            draw(vae)
