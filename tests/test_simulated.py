"""Figures from images sampled from the model, and intervals of means, against known values."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.test_evaluate import PIXELS, linear_gaussian
from vae_torch import VAE
from vae_torch.evaluation.figures import Figures, bootstrap_interval
from vae_torch.evaluation.simulated import auc, put_simulated
from vae_torch.images import Batch
from vae_torch.parts.posteriors import WithOtherNoise


def figures_of(vae, x, train=None, seed=0):
    card = Figures(len(x), seed)
    put_simulated(card, vae, Batch(x), train)
    return card.figures


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 0.95), (0.5, 0.6729), (2.0, 0.99991)])
def test_coverage_of_a_known_posterior(factor, expected):
    """Of N(0, 1), 67.29% lie within 0.98."""
    vae, _ = linear_gaussian(2)
    vae.posterior.logvar.bias.data += 2 * math.log(factor)
    found = figures_of(vae, torch.rand(1000, PIXELS).double())["interval_coverage"]
    assert abs(found["value"] - expected) < 4 * max(found["standard_error"], 1e-4)


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 0.95), (0.5, 0.6729), (2.0, 0.99991)])
def test_coverage_of_a_posterior_that_is_only_sampled(monkeypatch, factor, expected):
    vae, _ = linear_gaussian(2)
    encode = VAE.encode

    def with_noise(vae, x):  # the same posteriors, of another class
        q = encode(vae, x)
        zeros = torch.zeros_like(q.mean)
        return WithOtherNoise(q, zeros, zeros + 2 * math.log(factor))

    monkeypatch.setattr(VAE, "encode", with_noise)
    found = figures_of(vae, torch.rand(1000, PIXELS).double())["interval_coverage"]
    # 399 samples stand for the 95% interval; that of half the width is as uncertain as its ends
    error = 4 * max(found["standard_error"], 1e-4) + (0.005 if factor != 1 else 0)
    assert abs(found["value"] - expected) < error


def constant_model(*probabilities):
    torch.manual_seed(0)
    vae = VAE((len(probabilities),), 1, 4)
    vae.decoder.out.weight.data.zero_()
    vae.decoder.out.bias.data = torch.tensor(probabilities).logit()
    return vae


@pytest.mark.parametrize(("p", "expected"), [(0.3, 0.5), (0.8, 0.75)])
def test_samples_are_distinguished_from_images_as_often_as_possible(p, expected):
    """One pixel is 1 in 30% of the samples, in p of the images: the area is (1 + |p - 0.3|) / 2."""
    random = torch.Generator().manual_seed(1)
    x = torch.bernoulli(torch.tensor([p, 0.5]).expand(2000, 2), generator=random)
    found = figures_of(constant_model(0.3, 0.5), x)["sample_auc"]
    assert abs(found["value"] - expected) < 4 * found["standard_error"]
    assert found["standard_error"] < 0.015


def test_the_area_under_a_curve_has_the_error_of_its_repetitions():
    random = np.random.default_rng(0)
    found = np.array([auc(random.normal(1, 1, 60), random.normal(0, 1, 40)) for _ in range(400)])
    assert abs(found[:, 0].mean() - 0.7602) < 0.01  # Φ(1/√2)
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.1)
    assert auc(np.ones(3), np.ones(4))[0] == 0.5


def test_copies_lie_on_training_images():
    x = torch.eye(4)[torch.arange(40) % 4]
    model = constant_model(1 - 1e-6, 1e-6, 1e-6, 1e-6)  # always samples the first image
    found = figures_of(model, torch.ones(40, 4), [x, x])["nearest_train_image"]
    assert found["value"] == pytest.approx(0, abs=1e-3)
    assert found["of_test_images"] == pytest.approx(math.sqrt(3), rel=1e-5)


class Laplace(nn.Module):
    """A likelihood of the user's own that cannot sample."""

    def log_prob(self, x, params):
        return -(x - params).abs().flatten(1).sum(-1)

    def mean(self, params):
        return params.clamp(0, 1)


def test_what_cannot_be_sampled_has_no_such_figures():
    assert figures_of(constant_model(0.3, 0.5), torch.rand(50, 2)) == {}  # grey under Bernoulli
    assert figures_of(VAE((4,), 1, 4, likelihood=Laplace()), torch.rand(50, 4)) == {}


def test_intervals_of_a_skewed_mean_hold_it():
    """Log-normal values, as gaps are: mean ± 2 errors holds the mean in 87%."""
    random, held, usual = np.random.default_rng(0), [], []
    for seed in range(60):
        values = random.lognormal(0, 1, 50)
        low, high = bootstrap_interval(values, seed)
        held.append(low < math.exp(0.5) < high)
        usual.append(abs(values.mean() - math.exp(0.5)) < 2 * values.std(ddof=1) / math.sqrt(50))
    assert np.mean(held) > 0.9
    assert np.mean(held) > np.mean(usual)
    assert bootstrap_interval(np.ones(20), 0) is None
