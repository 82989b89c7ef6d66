import math

import pytest
import torch
from torch.distributions import Bernoulli, ContinuousBernoulli, Normal

from vae_torch.likelihood import LIKELIHOODS


def test_bernoulli_equals_torch_distributions():
    x = torch.randint(0, 2, (4, 9)).double()
    logits = 3 * torch.randn(5, 4, 9).double()
    expected = Bernoulli(logits=logits).log_prob(x).sum(-1)
    torch.testing.assert_close(LIKELIHOODS["bernoulli"]().log_prob(x, logits), expected)


def test_bernoulli_gradient_equals_autograd_through_torch_distributions():
    """Ours is written by hand; its reference is differentiated operation by operation."""
    x = torch.rand(4, 9).double().requires_grad_()
    logits = (30 * torch.randn(5, 4, 9).double()).requires_grad_()
    weights = torch.randn(5, 4).double()
    ours = (LIKELIHOODS["bernoulli"]().log_prob(x, logits) * weights).sum()
    reference = Bernoulli(logits=logits, validate_args=False).log_prob(x).sum(-1)
    expected = torch.autograd.grad((reference * weights).sum(), [x, logits])
    torch.testing.assert_close(torch.autograd.grad(ours, [x, logits]), expected)


def test_continuous_bernoulli_equals_torch_distributions():
    x, logits = torch.rand(4, 9).double(), 4 * torch.randn(5, 4, 9).double()
    reference = ContinuousBernoulli(logits=logits)
    ours = LIKELIHOODS["continuous_bernoulli"]()
    # torch approximates within 1e-3 of probability 0.5; there the integral below is the judge
    torch.testing.assert_close(
        ours.log_prob(x, logits), reference.log_prob(x).sum(-1), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(ours.mean(logits), reference.mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("logit", [-60.0, -5.0, -0.2001, -0.1999, 1e-6, 0.0, 0.049, 0.051, 3.0, 60])
def test_continuous_bernoulli_integrates_to_one(logit):
    nodes, weights = torch.linspace(0, 1, 200_001).double(), torch.full((200_001,), 1 / 200_000)
    weights[[0, -1]] /= 2  # trapezoid
    logits = torch.full((200_001, 1), logit, dtype=torch.float64)
    likelihood = LIKELIHOODS["continuous_bernoulli"]()
    density = likelihood.log_prob(nodes[:, None], logits).exp()
    assert (density * weights).sum().item() == pytest.approx(1, abs=1e-6)
    mean = (nodes * density * weights).sum().item()
    assert likelihood.mean(logits[:1]).item() == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("logit", [-1e-3, 0.0, 1e-3, 0.1999, 0.2001, 40.0, -200.0, 200.0])
def test_continuous_bernoulli_gradient_is_x_minus_mean(logit):
    """It is an exponential family: d log p / d logit = x - E[x]."""
    logits = torch.tensor([[logit]], dtype=torch.float64, requires_grad=True)
    likelihood = LIKELIHOODS["continuous_bernoulli"]()
    likelihood.log_prob(torch.tensor([[0.3]]).double(), logits).sum().backward()
    expected = 0.3 - likelihood.mean(logits.detach()).item()
    assert logits.grad.item() == pytest.approx(expected, abs=1e-6)


def test_gaussian_equals_torch_distributions():
    likelihood = LIKELIHOODS["gaussian"]().double()
    likelihood.logvar.data.fill_(math.log(0.09))
    x, logits = torch.rand(4, 9).double(), torch.rand(5, 4, 9).double()
    expected = Normal(logits, 0.3).log_prob(x).sum(-1)
    torch.testing.assert_close(likelihood.log_prob(x, logits), expected)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_affine_is_log_prob_of_every_pair(name):
    likelihood = LIKELIHOODS[name]().double()
    if name == "gaussian":
        likelihood.logvar.data.fill_(-1.3)
    x, logits = torch.rand(4, 9).double(), 2 * torch.randn(6, 9).double()
    pairs = torch.stack([likelihood.log_prob(x, output.expand(4, 9)) for output in logits], 1)
    torch.testing.assert_close(likelihood.affine(x, logits), pairs)


def test_affine_gaussian_keeps_its_digits_where_it_is_narrow():
    likelihood = LIKELIHOODS["gaussian"]()
    likelihood.logvar.data.fill_(-12.0)
    x = torch.rand(1, 784)
    logits = x + math.exp(-6) * torch.randn(20, 784)
    expected = Normal(logits.double(), math.exp(-6)).log_prob(x.double()).sum(-1)
    torch.testing.assert_close(
        likelihood.affine(x, logits)[0].double(), expected, rtol=0, atol=0.01
    )


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_means_are_images_and_shapes_are_checked(name):
    likelihood = LIKELIHOODS[name]()
    logits = 100 * torch.randn(3, 784)
    mean = likelihood.mean(logits)
    assert mean.min() >= 0
    assert mean.max() <= 1
    assert torch.isfinite(likelihood.log_prob(torch.rand(3, 784), logits)).all()
    with pytest.raises(ValueError, match=r"\(3, 784\).*\(4, 784\)"):
        likelihood.log_prob(torch.rand(3, 784), torch.randn(4, 784))
