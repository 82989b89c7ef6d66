import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.distributions import Bernoulli, ContinuousBernoulli, Normal

from vae_torch import VAE, evaluate_model
from vae_torch.config import ObjectiveConfig
from vae_torch.evaluate import bound_metrics
from vae_torch.images import check_pixels
from vae_torch.parts.likelihoods import (
    DiscretizedLogistic,
    Gaussian,
    bits_per_dim,
    likelihoods,
)

# Likelihoods with one parameter a pixel; the others are in tests/test_parts.py.
ONE_OUTPUT = ("bernoulli", "continuous_bernoulli", "gaussian")


def test_bernoulli_equals_torch_distributions():
    x = torch.randint(0, 2, (4, 9)).double()
    logits = 3 * torch.randn(5, 4, 9).double()
    expected = Bernoulli(logits=logits).log_prob(x).sum(-1)
    torch.testing.assert_close(likelihoods["bernoulli"]().log_prob(x, logits), expected)


def test_bernoulli_gradient_equals_autograd_through_torch_distributions():
    """Our gradient is written by hand; the reference is autograd's, operation by operation."""
    x = torch.rand(4, 9).double().requires_grad_()
    logits = (30 * torch.randn(5, 4, 9).double()).requires_grad_()
    weights = torch.randn(5, 4).double()
    ours = (likelihoods["bernoulli"]().log_prob(x, logits) * weights).sum()
    reference = Bernoulli(logits=logits, validate_args=False).log_prob(x).sum(-1)
    expected = torch.autograd.grad((reference * weights).sum(), [x, logits])
    torch.testing.assert_close(torch.autograd.grad(ours, [x, logits]), expected)


def test_continuous_bernoulli_equals_torch_distributions():
    x, logits = torch.rand(4, 9).double(), 4 * torch.randn(5, 4, 9).double()
    reference = ContinuousBernoulli(logits=logits)
    ours = likelihoods["continuous_bernoulli"]()
    # torch approximates within 1e-3 of probability 0.5; compare with the integral there
    torch.testing.assert_close(
        ours.log_prob(x, logits), reference.log_prob(x).sum(-1), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(ours.mean(logits), reference.mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("logit", [-60.0, -5.0, -0.2001, -0.1999, 1e-6, 0.0, 0.049, 0.051, 3.0, 60])
def test_continuous_bernoulli_integrates_to_one(logit):
    nodes, weights = torch.linspace(0, 1, 200_001).double(), torch.full((200_001,), 1 / 200_000)
    weights[[0, -1]] /= 2  # trapezoid
    logits = torch.full((200_001, 1), logit, dtype=torch.float64)
    likelihood = likelihoods["continuous_bernoulli"]()
    density = likelihood.log_prob(nodes[:, None], logits).exp()
    assert (density * weights).sum().item() == pytest.approx(1, abs=1e-6)
    mean = (nodes * density * weights).sum().item()
    assert likelihood.mean(logits[:1]).item() == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("logit", [-1e-3, 0.0, 1e-3, 0.1999, 0.2001, 40.0, -200.0, 200.0])
def test_continuous_bernoulli_gradient_is_x_minus_mean(logit):
    """It is an exponential family: d log p / d logit = x - E[x]."""
    logits = torch.tensor([[logit]], dtype=torch.float64, requires_grad=True)
    likelihood = likelihoods["continuous_bernoulli"]()
    likelihood.log_prob(torch.tensor([[0.3]]).double(), logits).sum().backward()
    expected = 0.3 - likelihood.mean(logits.detach()).item()
    assert logits.grad.item() == pytest.approx(expected, abs=1e-6)


def test_gaussian_equals_torch_distributions():
    likelihood = likelihoods["gaussian"](sigma="learned").double()
    likelihood.logvar.data.fill_(math.log(0.09))
    x, logits = torch.rand(4, 9).double(), torch.rand(5, 4, 9).double()
    expected = Normal(logits, 0.3).log_prob(x).sum(-1)
    torch.testing.assert_close(likelihood.log_prob(x, logits), expected)


@pytest.mark.parametrize("name", ONE_OUTPUT)
def test_affine_is_log_prob_of_every_pair(name):
    likelihood = likelihoods[name]().double().eval()
    if name == "gaussian":
        likelihood.logvar.data.fill_(-1.3)
    x, logits = torch.rand(4, 9).double(), 2 * torch.randn(6, 9).double()
    pairs = torch.stack([likelihood.log_prob(x, output.expand(4, 9)) for output in logits], 1)
    torch.testing.assert_close(likelihood.affine(x, logits), pairs)


def test_affine_gaussian_keeps_its_digits_where_it_is_narrow():
    likelihood = likelihoods["gaussian"](sigma="learned")
    likelihood.logvar.data.fill_(-12.0)
    x = torch.rand(1, 784)
    logits = x + math.exp(-6) * torch.randn(20, 784)
    expected = Normal(logits.double(), math.exp(-6)).log_prob(x.double()).sum(-1)
    torch.testing.assert_close(
        likelihood.affine(x, logits)[0].double(), expected, rtol=0, atol=0.01
    )


@pytest.mark.parametrize("name", ONE_OUTPUT)
def test_means_are_images_and_shapes_are_checked(name):
    likelihood = likelihoods[name]()
    logits = 100 * torch.randn(3, 784)
    mean = likelihood.mean(logits)
    assert mean.min() >= 0
    assert mean.max() <= 1
    assert torch.isfinite(likelihood.log_prob(torch.rand(3, 784), logits)).all()
    with pytest.raises(ValueError, match=r"\(3, 784\).*\(4, 784\)"):
        likelihood.log_prob(torch.rand(3, 784), torch.randn(4, 784))


def cross_entropy(x, logits):
    return -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(
        -1
    )


def test_bernoulli_second_derivatives_pass_torchs_own_check():
    x = torch.rand(3, 5).double().requires_grad_()
    for shape in ((3, 5), (2, 3, 5)):
        logits = torch.randn(shape).double().requires_grad_()
        torch.autograd.gradgradcheck(likelihoods["bernoulli"]().log_prob, (x, logits))


def test_a_gradient_penalty_equals_that_of_torchs_cross_entropy():
    """After a sum the incoming gradient has no graph; second derivatives must still be right."""
    x, z = torch.rand(6, 16).double(), torch.randn(6, 3).double()
    weights = [torch.randn(s).double().requires_grad_() for s in ((8, 3), (16, 8))]

    def penalty(log_prob):
        loss = -log_prob(x, torch.tanh(z @ weights[0].T) @ weights[1].T).sum()
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in gradients), weights)

    torch.testing.assert_close(penalty(likelihoods["bernoulli"]().log_prob), penalty(cross_entropy))


def test_the_hessian_at_a_logit_of_zero_is_minus_a_quarter():
    """Also for many images, where a faster sum of |l| is used when no gradient is needed."""
    likelihood = likelihoods["bernoulli"]()
    for call in (likelihood.log_prob, likelihood.affine):
        logits = torch.zeros(1, 4).double().requires_grad_()
        (first,) = torch.autograd.grad(
            call(torch.rand(1, 4).double(), logits).sum(), logits, create_graph=True
        )
        (second,) = torch.autograd.grad(first.sum(), logits)
        torch.testing.assert_close(second, torch.full_like(second, -0.25))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_bernoulli_works_under_torch_func():
    x, logits = torch.rand(3, 5).double(), 20 * torch.randn(3, 5).double()
    ours = likelihoods["bernoulli"]().log_prob
    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd, torch.func.jacrev):
        got, expected = (
            transform(lambda logits, call=call: call(x, logits).sum())(logits)
            for call in (ours, cross_entropy)
        )
        torch.testing.assert_close(got, expected)
    one = torch.func.grad(lambda logits, x: ours(x[None], logits[None]).sum())
    torch.testing.assert_close(torch.func.vmap(one)(logits, x), x - torch.sigmoid(logits))
    tangent = torch.randn_like(logits)
    value, along = torch.func.jvp(lambda logits: ours(x, logits), (logits,), (tangent,))
    torch.testing.assert_close(value, cross_entropy(x, logits))
    torch.testing.assert_close(along, (tangent * (x - torch.sigmoid(logits))).sum(-1))
    with forward_ad.dual_level():
        dual = ours(x, forward_ad.make_dual(logits, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, along)


@pytest.mark.parametrize("name", ONE_OUTPUT)
def test_images_that_differ_in_dimensions_of_one_are_the_same_images(name):
    likelihood = likelihoods[name]()
    x, logits = torch.rand(5, 12), torch.randn(7, 5, 12)
    expected = likelihood.log_prob(x, logits)
    for here, there in (((12,), (1, 3, 4)), ((3, 4), (1, 3, 4)), ((1, 3, 4), (12,))):
        got = likelihood.log_prob(x.reshape(5, *here), logits.reshape(7, 5, *there))
        torch.testing.assert_close(got, expected)
    for here, there in (((3, 4), (4, 3)), ((3, 2, 2), (2, 2, 3))):
        with pytest.raises(ValueError, match=rf"{here}.*{there}".replace("(", "").replace(")", "")):
            likelihood.log_prob(x.reshape(5, *here), logits.reshape(7, 5, *there))


@pytest.mark.parametrize("name", ["discretized_logistic", "pixelcnn"])
def test_shapes_are_checked_where_a_pixel_has_several_outputs_too(name):
    shape = (2, 3, 4)
    likelihood = likelihoods.build(name, {}, context={"input_shape": shape})
    x, params = torch.rand(5, *shape).round(), torch.randn(7, 5, *shape, likelihood.outputs)
    expected = likelihood.log_prob(x, params)
    assert expected.shape == (7, 5)
    torch.testing.assert_close(likelihood.log_prob(x.flatten(1), params), expected)
    for wrong in (x[:3], x[:1], x.reshape(5, 2, 4, 3)):
        with pytest.raises(ValueError, match=r"x has shape .* the same number of images"):
            likelihood.log_prob(wrong, params)


def test_pixels_are_looked_at_where_they_can_be():
    for bad in (torch.tensor([[2.0]]), torch.tensor([[math.nan]]), torch.tensor([[-1e-6]])):
        with pytest.raises(ValueError, match=r"\(1, 1\) has values from .*\[0, 1\]"):
            check_pixels(bad)
    check_pixels(torch.tensor([[-9.0, 9.0]]), likelihoods["gaussian"].pixels)
    with pytest.raises(ValueError, match="inf; pixels are floats and finite"):
        check_pixels(torch.tensor([[math.inf]]), likelihoods["gaussian"].pixels)
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        check_pixels(torch.zeros(1, 1, dtype=torch.uint8))
    check_pixels(torch.empty(0, 4))
    check_pixels(torch.empty(2, 4, device="meta"))
    checked = torch.func.vmap(lambda x: (check_pixels(x), x.sum())[1])
    assert checked(torch.full((2, 3), 5.0)).tolist() == [15.0, 15.0]


def test_bits_per_dimension_are_eight_where_all_of_256_levels_are_as_likely():
    nats = -3 * 4 * 5 * math.log(256)
    assert bits_per_dim(DiscretizedLogistic(), nats, (3, 4, 5)) == pytest.approx(8)
    assert bits_per_dim(Gaussian(), nats, (3, 4, 5)) is None  # a density has no bits


def test_bits_per_dimension_are_those_of_the_elbo():
    torch.manual_seed(0)
    vae = VAE((1, 4, 4), latent_dim=2, intermediate_dim=8, likelihood="discretized_logistic")
    found = bound_metrics(vae, torch.rand(9, 1, 4, 4), ObjectiveConfig())
    assert found["bits_per_dim"] == pytest.approx(-found["elbo"] / 16 / math.log(2))
    card = evaluate_model(vae, torch.rand(9, 1, 4, 4), num_samples=2, fit_samples=2, fit_images=1)
    bits, log_px = card["bits_per_dim"], card["log_px"]
    for key in ("value", "standard_error"):
        assert abs(bits[key]) == pytest.approx(abs(log_px[key]) / 16 / math.log(2))
