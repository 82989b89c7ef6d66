"""Extreme inputs give finite, right values, compared with closed forms in Python floats."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from vae_torch import VAE, elbo, iwae_bound, kl_standard_normal, reparameterize
from vae_torch.parts.likelihoods import likelihoods
from vae_torch.parts.objectives import keras_loss, log_weights
from vae_torch.parts.posteriors import log_normal
from vae_torch.parts.priors import log_mixture


@pytest.mark.parametrize("logvar", [-60.0, -30.0, 0.0, 30.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_variances(logvar, dtype):
    mean = torch.tensor([[0.5, -3.0]], dtype=dtype)
    logvars = torch.full_like(mean, logvar).requires_grad_()
    kl = kl_standard_normal(mean, logvars)
    expected = sum(0.5 * (m * m + math.exp(logvar) - 1 - logvar) for m in (0.5, -3.0))
    # rounding of the type, and of adding 1 and 60
    tolerance = {"rel": 1e-6 if dtype == torch.float32 else 1e-14, "abs": 1e-14}
    assert kl.item() == pytest.approx(expected, **tolerance)
    spread = Normal(mean.double(), torch.full_like(mean, logvar).double().mul(0.5).exp())
    torch.testing.assert_close(
        kl.double(), kl_divergence(spread, Normal(0.0, 1.0)).sum(-1), rtol=1e-6, atol=1e-9
    )
    kl.sum().backward()
    assert logvars.grad[0, 0].item() == pytest.approx(0.5 * math.expm1(logvar), rel=1e-6)

    eps = torch.tensor([[1.5, -2.0]], dtype=dtype)
    z = reparameterize(mean, logvars, eps=eps).detach()
    assert z[0, 0].item() == pytest.approx(0.5 + 1.5 * math.exp(logvar / 2), rel=1e-6)
    density = log_normal(z.double(), mean.double(), logvars.detach().double())
    if dtype == torch.float64 and logvar > -60:  # below that, mean + tiny rounds the tiny part away
        torch.testing.assert_close(density, spread.log_prob(z).sum(-1), rtol=1e-9, atol=1e-9)
    assert density.isfinite().all()


@pytest.mark.parametrize("pixel", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("logit", [-200.0, -40.0, 0.0, 40.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_on_black_white_and_grey_images(pixel, logit, dtype):
    x = torch.full((1, 784), pixel, dtype=dtype)
    logits = torch.full_like(x, logit).requires_grad_()
    # log σ(l) = -log(1 + e^-l), written out where that would overflow or round to 0
    softplus = max(logit, 0.0) + math.log1p(math.exp(-abs(logit)))
    expected = 784 * (pixel * logit - softplus)
    # nats that 784 pixels lose to rounding
    rel, near = (1e-5, 1e-4) if dtype == torch.float32 else (1e-12, 1e-10)
    got = likelihoods["bernoulli"]().to(dtype).log_prob(x, logits)
    assert got.item() == pytest.approx(expected, rel=rel, abs=near)
    torch.testing.assert_close(
        got, Bernoulli(logits=logits, validate_args=False).log_prob(x).sum(-1), rtol=rel, atol=near
    )
    got.sum().backward()
    sigmoid = 1 / (1 + math.exp(-logit))
    assert logits.grad[0, 0].item() == pytest.approx(pixel - sigmoid, rel=1e-5, abs=1e-7)

    at_prior = torch.zeros(1, 2, dtype=dtype)
    assert elbo(x, logits, at_prior, at_prior).item() == pytest.approx(expected, rel=rel, abs=near)
    loss = keras_loss(x, logits, at_prior, at_prior)
    assert loss.item() == pytest.approx(-expected / 784, rel=rel, abs=near)


@pytest.mark.parametrize("pixel", [0.0, 1.0])
@pytest.mark.parametrize("logit", [-200.0, -1e-6, 0.0, 1e-6, 200.0])
def test_the_continuous_bernoulli_at_its_ends(pixel, logit):
    x = torch.full((1, 4), pixel, dtype=torch.float64)
    logits = torch.full_like(x, logit).requires_grad_()
    got = likelihoods["continuous_bernoulli"]().log_prob(x, logits)
    # its density is l e^(l x) / (e^l - 1)
    size = abs(logit)
    normalizer = math.log(size / -math.expm1(-size)) if size > 1e-3 else -size / 2 + size
    density = logit * pixel - max(logit, 0.0) + (normalizer if size > 1e-3 else size / 2)
    assert got.item() == pytest.approx(4 * density, rel=1e-9, abs=1e-9)
    got.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("likelihood", sorted({*likelihoods, "pixelcnn"}))
@pytest.mark.parametrize("prior", ["standard", "mixture", "vamp"])
@pytest.mark.parametrize("images", [1, 3])
def test_black_and_white_images_pass_every_model(likelihood, prior, images):
    torch.manual_seed(0)
    vae = VAE(intermediate_dim=8, likelihood=likelihood, prior=prior, prior_components=3).double()
    for pixel in (0.0, 1.0):
        x = torch.full((images, 784), pixel, dtype=torch.float64)
        log_w = log_weights(vae, x, vae.encode(x), torch.randn(5, images, 2, dtype=torch.float64))
        bound = iwae_bound(log_w)
        assert bound.shape == (images,)
        by_hand = [
            math.log(math.fsum(math.exp(w - max(row)) for w in row) / 5) + max(row)
            for row in log_w.T.tolist()
        ]
        assert bound.tolist() == pytest.approx(by_hand, rel=1e-12)
        bound.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in vae.parameters())


def test_weights_of_a_thousand_nats_do_not_overflow():
    log_w = torch.tensor([[-1000.0, 1000.0], [-1001.0, 900.0]], dtype=torch.float64)
    expected = [-1000 + math.log1p(math.exp(-1)) - math.log(2), 1000 - math.log(2)]
    assert iwae_bound(log_w).tolist() == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("logvar", [-60.0, 60.0])
def test_a_mixture_of_extreme_components(logvar):
    means = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    logvars = torch.full_like(means, logvar)
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    got = log_mixture(means[:1], means, logvars, weights).item()
    peak = -logvar - math.log(2 * math.pi)
    expected = peak if logvar > 0 else peak + math.log(0.5)
    assert got == pytest.approx(expected, rel=1e-9)
