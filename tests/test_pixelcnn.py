"""The autoregressive likelihood, against enumeration and a masked convolution."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli

from vae_torch import VAE, ConfigError, compose, evaluate_model, run
from vae_torch.evaluation.proposals import fitted_log_px
from vae_torch.images import Batch
from vae_torch.parts import pixelcnn
from vae_torch.parts.objectives import bound
from vae_torch.parts.pixelcnn import PixelCNN
from vae_torch.quadrature import exact_log_px

SHAPES = [
    ((2, 2), 3), ((9,), 3), ((2, 2, 2), 3), ((1, 3, 3), 5), ((1, 2, 4), 7), ((1, 4, 2), 5),
    ((6, 1), 3), ((1, 9), 5), ((2, 4, 1), 3),
]  # fmt: skip


def made(shape, window, images=5):
    """A likelihood of random weights, and decoder outputs for some images."""
    torch.manual_seed(0)
    likelihood = PixelCNN(shape, window=window, channels=4).double()
    for parameter in likelihood.parameters():
        parameter.data.normal_()
    return likelihood, torch.randn(images, *shape, 4).double()


def every_image(shape):
    """All images of zeros and ones."""
    images = itertools.product([0.0, 1.0], repeat=math.prod(shape))
    return torch.tensor(list(images)).double().reshape(-1, *shape)


@pytest.mark.parametrize(("shape", "window"), SHAPES)
def test_the_masses_of_all_images_sum_to_one(shape, window):
    likelihood, params = made(shape, window)
    x = every_image(shape)
    masses = torch.stack([likelihood.log_prob(x, p.expand(len(x), *p.shape)) for p in params])
    torch.testing.assert_close(masses.exp().sum(-1), torch.ones(5).double())


@pytest.mark.parametrize(("shape", "window"), SHAPES)
def test_expected_and_drawn_pixels_are_those_of_the_masses(shape, window, monkeypatch):
    monkeypatch.setattr(pixelcnn, "_CHAINS", 20_000)
    likelihood, params = made(shape, window)
    x = every_image(shape)
    means = []
    for p in params:
        masses = likelihood.log_prob(x, p.expand(len(x), *p.shape)).exp()
        expected = (masses.reshape(-1, *[1] * len(shape)) * x).sum(0)
        drawn = likelihood.sample(p.expand(20_000, *p.shape), torch.Generator().manual_seed(1))
        assert set(drawn.unique().tolist()) <= {0.0, 1.0}
        assert drawn.shape == (20_000, *shape)
        means.append(expected)
        torch.testing.assert_close(drawn.mean(0), expected, atol=0.018, rtol=0)  # 5 errors
    found = likelihood.mean(params)
    torch.testing.assert_close(found, torch.stack(means), atol=0.018, rtol=0)


@pytest.mark.parametrize(
    ("shape", "window"), [((1, 6, 5), 7), ((3, 6, 5), 3), ((3, 8, 1), 5), ((3, 1, 8), 5)]
)
def test_log_prob_is_that_of_a_convolution_with_mask_a(shape, window):
    likelihood, params = made(shape, window)
    channels = shape[0]
    x = torch.randint(0, 2, (5, *shape)).double()
    # mask A of van den Oord et al. (2016): the rows above, and what is left of the middle
    mask = torch.zeros(window, window).double()
    mask[: window // 2] = 1
    mask[window // 2, : window // 2] = 1
    kernel = torch.zeros(channels * 4, channels, window, window).double()
    kernel[..., mask.bool()] = likelihood.context.weight.reshape(channels * 4, channels, -1)
    context = F.conv2d(x, kernel, likelihood.context.bias, padding=window // 2)
    hidden = context.unflatten(1, (channels, 4)).movedim(2, -1) + params
    one, two = likelihood.head[1], likelihood.head[3]
    logits = two(one(hidden.relu()).relu()).squeeze(-1)
    expected = Bernoulli(logits=logits).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(likelihood.log_prob(x, params), expected)
    # several samples of z, one image for all of them, and flat images
    several = torch.stack([params, params.flip(0)])
    found = likelihood.log_prob(x, several)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1, 2], likelihood.log_prob(x[2:3], params[2:3])[0])
    each = likelihood.log_prob(x[2:3], params.unsqueeze(1))
    torch.testing.assert_close(each[2, 0], expected[2])
    assert likelihood.log_prob(x.flatten(1), params).equal(likelihood.log_prob(x, params))


@pytest.mark.parametrize("shape", [(16,), (4, 4), (1, 8, 6), (3, 5, 4)])
@pytest.mark.parametrize("architecture", ["mlp", "conv"])
def test_a_model_decodes_into_it(shape, architecture):
    vae = VAE(shape, 2, 8, architecture=architecture, likelihood="pixelcnn")
    x = torch.rand(5, *shape).round()
    assert vae(x).logits.shape == (5, *shape, 16)
    assert vae.sample(3).shape == vae.reconstruct(x[:3]).shape == (3, *shape)
    alone = torch.cat([vae.reconstruct(one) for one in x.split(1)])
    torch.testing.assert_close(vae.reconstruct(x), alone)  # whatever else is in the batch
    bound(vae, Batch(x), torch.randn(4, 5, 2)).reconstruction.sum().backward()
    assert all(p.grad is not None for p in vae.likelihood.parameters())


def test_fitted_proposals_equal_the_integral():
    torch.manual_seed(3)
    vae = VAE((9,), 2, 8, likelihood="pixelcnn").double()
    vae.decoder.out.weight.data *= 4
    x = torch.rand(6, 9).double().round()
    expected = exact_log_px(vae, x).log_px
    result = fitted_log_px(vae, x, num_samples=4000)
    torch.testing.assert_close(result.log_px, expected, atol=0.02, rtol=0)
    assert (result.effective_samples > 400).all()


@pytest.mark.parametrize("options", [{"window": 4}, {"window": 1}, {"channels": 1}])
def test_a_window_without_a_middle_is_refused(options):
    with pytest.raises(ValueError, match="window must be odd and 3 or more"):
        PixelCNN((16,), **options)


@pytest.mark.parametrize("part", [{"likelihood": "pixelcnn"}, {"architecture": "conv"}])
def test_images_without_rows_are_refused_in_one_line(part):
    with pytest.raises(
        ConfigError, match=r"an image has shape \(12,\); it must be .*square"
    ) as said:
        VAE((12,), **part)
    assert "\n" not in str(said.value)


def test_videos_are_refused():
    with pytest.raises(ConfigError, match=r"an image has shape \(2, 3, 4, 5\); it must be"):
        PixelCNN((2, 3, 4, 5))


def test_bf16_does_not_round_the_sum_over_pixels():
    torch.manual_seed(0)
    likelihood = PixelCNN((1, 28, 28))
    x, params = torch.rand(8, 1, 28, 28).round(), torch.randn(8, 1, 28, 28, 16)
    exact = likelihood.log_prob(x, params)
    with torch.autocast("cpu", torch.bfloat16):
        found = likelihood.log_prob(x, params)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=0.05, rtol=0)  # of 540 nats; a sum in bf16: 0.1


@pytest.mark.usefixtures("rough")
@pytest.mark.parametrize("grey", [True, False])
def test_grey_pixels_have_only_a_score(grey):
    torch.manual_seed(0)
    x = torch.rand(30, 4, 4)
    vae = VAE((4, 4), 3, 8, likelihood="pixelcnn")
    card = evaluate_model(vae, x if grey else x.round(), num_samples=2, fit_images=1)
    assert ("entropy_floor" in card) == grey
    assert ("sample_auc" in card) == (not grey)  # black and white samples, told by their colour
    name = "the score" if grey else "log p(x)"
    assert card["log_px"]["definition"].startswith(name)
    assert any("are a score" in sentence for sentence in card["verdict"]) == grey
    if grey:
        assert card["reconstruction"]["value"] < card["entropy_floor"]["value"]


@pytest.mark.parametrize(("levels", "warned"), [(2, False), (3, True)])
def test_a_run_on_grey_pixels_is_warned_of(levels, warned, tmp_path, caplog):
    grey = torch.randint(0, levels, (40, 4, 4), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "x.npy", (grey / (levels - 1)).float().numpy())
    config = compose(
        ["data=array", f"data.root={tmp_path / 'x.npy'}", "likelihood=pixelcnn", "train.epochs=1",
         "model.intermediate_dim=8", "train.figure_every=0", "threads=1"]
    )  # fmt: skip
    run(config, tmp_path / "run")
    said = [line for line in caplog.messages if "draws black and white pixels" in line]
    assert len(said) == warned
