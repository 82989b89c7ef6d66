import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Normal, kl_divergence

from tests.terms import objective_terms
from vae_torch import VAE, ObjectiveConfig, elbo, iwae_bound, keras_loss, kl_standard_normal
from vae_torch.parts.objectives import log_weights
from vae_torch.parts.posteriors import kl_per_dim


def normal(mean, logvar):
    return Normal(mean, torch.exp(0.5 * logvar))


def random_posterior(n=6, latent_dim=3):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(n, latent_dim, generator=generator, dtype=torch.float64)
    return mean, torch.randn(n, latent_dim, generator=generator, dtype=torch.float64)


def test_kl_equals_torch_distributions():
    mean, logvar = random_posterior()
    expected = kl_divergence(normal(mean, logvar), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_per_dim(mean, logvar), expected)
    torch.testing.assert_close(kl_standard_normal(mean, logvar), expected.sum(-1))


def test_kl_equals_monte_carlo():
    mean, logvar = random_posterior()
    q, p = normal(mean, logvar), Normal(0.0, 1.0)
    torch.manual_seed(0)
    z = q.sample((200_000,))
    draws = (q.log_prob(z) - p.log_prob(z)).sum(-1)  # (200000, 6)
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((kl_standard_normal(mean, logvar) - draws.mean(0)).abs() < 4 * error).all()


@given(st.floats(-1e3, 1e3), st.floats(-60, 60))
def test_kl_is_finite_and_never_negative(mean, logvar):
    mean, logvar = (torch.tensor([[v]], dtype=torch.float64) for v in (mean, logvar))
    kl = kl_standard_normal(mean, logvar).item()
    assert math.isfinite(kl)
    assert kl >= 0


def test_kl_near_the_prior_keeps_its_digits():
    tiny = torch.full((1, 1), 1e-4)  # float32: exp(v) - 1 - v is pure rounding here
    exact = 0.5 * (math.expm1(1e-4) - 1e-4)
    assert kl_standard_normal(torch.zeros(1, 1), tiny).item() == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("shape", [(784,), (1, 28, 28)])
def test_elbo_equals_torch_distributions(shape):
    mean, logvar = random_posterior()
    x, logits = torch.rand(6, 784).double(), 3 * torch.randn(6, 784).double()
    # Bernoulli is linear in x, so its log_prob of grey pixels is the cross-entropy
    log_px = Bernoulli(logits=logits, validate_args=False).log_prob(x).sum(-1)
    expected = log_px - kl_divergence(normal(mean, logvar), Normal(0.0, 1.0)).sum(-1)
    got = elbo(x.reshape(6, *shape), logits.reshape(6, *shape), mean, logvar)
    torch.testing.assert_close(got, expected)


def test_keras_loss_averages_pixels_and_sums_latents():
    mean, logvar = random_posterior()
    x, logits = torch.rand(6, 784).double(), torch.randn(6, 784).double()
    kl = kl_standard_normal(mean, logvar)
    reconstruction = elbo(x, logits, mean, logvar) + kl
    torch.testing.assert_close(keras_loss(x, logits, mean, logvar), kl - reconstruction / 784)


@pytest.mark.parametrize("logit", [-200.0, 200.0])
@pytest.mark.parametrize("pixel", [0.0, 1.0])
def test_extreme_logits_give_exact_nats(logit, pixel):
    x = torch.full((1, 784), pixel, dtype=torch.float64)
    logits = torch.full((1, 784), logit, dtype=torch.float64)
    zero = torch.zeros(1, 2, dtype=torch.float64)
    wrong = (logit > 0) != (pixel > 0)
    expected = -200.0 * 784 if wrong else 0.0
    assert elbo(x, logits, zero, zero).item() == pytest.approx(expected, abs=1e-9)


def test_shapes_that_do_not_fit_are_refused():
    zero = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"\(2, 784\).*\(2, 783\)"):
        elbo(torch.zeros(2, 784), torch.zeros(2, 783), zero, zero)


def test_iwae_bound_equals_its_definition():
    log_w = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(iwae_bound(log_w), log_w.exp().mean(0).log())
    shifted = iwae_bound(log_w - 2000)  # where exp() underflows
    torch.testing.assert_close(shifted, iwae_bound(log_w) - 2000)


def test_log_weights_average_to_the_elbo(small_vae):
    x = torch.rand(3, 784)
    eps = torch.randn(10_000, 3, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        terms = objective_terms(small_vae, x, eps, ObjectiveConfig())
        log_w = log_weights(small_vae, x, small_vae.encode(x), eps)
    error = log_w.std(0) / math.sqrt(len(eps))
    assert ((terms.elbo - log_w.mean(0)).abs() < 5 * error).all()


def test_logged_elbo_stays_the_plain_bound(small_vae):
    x, eps = torch.rand(8, 784), torch.randn(3, 8, 2)
    plain = objective_terms(small_vae, x, eps, ObjectiveConfig())
    for objective, beta in (
        (ObjectiveConfig(beta=4.0), 4.0),
        (ObjectiveConfig(free_bits=2.0), 1.0),
        (ObjectiveConfig(name="iwae"), 1.0),
        (ObjectiveConfig(name="iwae", estimator="dreg"), 1.0),
        (ObjectiveConfig(name="keras"), 1.0),
    ):
        terms = objective_terms(small_vae, x, eps, objective, beta)
        torch.testing.assert_close(terms.elbo, plain.elbo)
        assert terms.loss.item() != pytest.approx(plain.loss.item())
    torch.testing.assert_close(plain.loss, -plain.elbo.mean())


def test_beta_and_free_bits_weight_the_kl(small_vae):
    x, eps = torch.rand(8, 784), torch.randn(1, 8, 2)
    plain = objective_terms(small_vae, x, eps, ObjectiveConfig())
    weighted = objective_terms(small_vae, x, eps, ObjectiveConfig(beta=3.0), 3.0)
    expected = (3 * plain.kl - plain.reconstruction).mean()
    torch.testing.assert_close(weighted.loss.detach(), expected)
    free = objective_terms(small_vae, x, eps, ObjectiveConfig(free_bits=100.0))
    torch.testing.assert_close(free.loss.detach(), 200 - plain.reconstruction.mean())


def test_the_keras_objective_minimises_the_keras_loss(small_vae):
    x, eps = torch.rand(8, 784), torch.randn(1, 8, 2)
    out = small_vae(x, eps=eps[0])
    loss = objective_terms(small_vae, x, eps, ObjectiveConfig(name="keras")).loss
    torch.testing.assert_close(loss, keras_loss(x, out.logits, out.mean, out.logvar).mean())


def test_free_bits_hold_the_batch_mean_of_each_dimension(small_vae):
    x, eps = torch.rand(8, 784), torch.randn(1, 8, 2)
    plain = objective_terms(small_vae, x, eps, ObjectiveConfig())
    low, high = sorted(plain.kl_per_dim.tolist())
    free = (low + high) / 2  # one dimension below, one above
    got = objective_terms(small_vae, x, eps, ObjectiveConfig(free_bits=free), 3.0).loss
    torch.testing.assert_close(got, 3 * (free + high) - plain.reconstruction.mean())


def gradient_of(vae: VAE, x, eps, objective, beta=1.0, choice=None) -> torch.Tensor:
    vae.zero_grad()
    objective_terms(vae, x, eps, objective, beta, choice).loss.backward()
    return torch.cat([p.grad.flatten() for p in vae.parameters()])


@pytest.mark.parametrize(
    ("prior", "beta"), [("standard", 1.0), ("mixture", 1.0), ("vamp", 1.0), ("vamp", 0.4)]
)
def test_dreg_and_iwae_gradients_agree_in_expectation(prior, beta):
    torch.manual_seed(0)
    vae = VAE((6,), 2, 5, prior=prior, prior_components=3).double()
    x = torch.rand(1, 6).double().expand(4000, 6)
    standard, dreg = [], []
    for seed in range(12):
        eps = torch.randn(4, 4000, 2, generator=torch.Generator().manual_seed(seed)).double()
        for gradients, estimator in ((standard, "standard"), (dreg, "dreg")):
            objective = ObjectiveConfig(name="iwae", num_samples=4, estimator=estimator)
            gradients.append(gradient_of(vae, x, eps, objective, beta))
    standard, dreg = torch.stack(standard), torch.stack(dreg)
    error = (standard.var(0) / 12 + dreg.var(0) / 12).sqrt()
    distance = (standard.mean(0) - dreg.mean(0)).abs()
    assert (distance <= 5 * error + 1e-9).all()
    if prior == "standard":  # the purpose of DReG: less noise in the encoder's gradient
        encoder = sum(p.numel() for p in vae.encoder.parameters())
        assert dreg[:, :encoder].var(0).sum() < standard[:, :encoder].var(0).sum()


@pytest.mark.parametrize("estimator", ["standard", "dreg"])
@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_one_resampled_draw_has_the_gradient_of_all_in_expectation(estimator, beta):
    """The expectation is a sum: each sample's gradient times its probability to be chosen."""
    torch.manual_seed(0)
    vae = VAE((6,), 2, 5, prior="mixture", prior_components=3).double()
    x, eps = torch.rand(1, 6).double(), torch.randn(4, 1, 2).double()
    objective = ObjectiveConfig(name="iwae", num_samples=4, estimator=estimator, resample=True)
    everything = gradient_of(vae, x, eps, objective, beta)

    mean, logvar = vae.encode(x)
    z = mean + torch.exp(logvar / 2) * eps
    q = torch.distributions.Normal(mean, torch.exp(logvar / 2))
    latents = vae.log_prior(z) - q.log_prob(z).sum(-1)
    log_w = vae.likelihood.log_prob(x, vae.decode(z)) + beta * latents
    weights = log_w.softmax(0)[:, 0].tolist()
    assert max(weights) < 0.9  # otherwise the others would be invisible
    expected, below = torch.zeros_like(everything), 0.0
    for weight in weights:
        choice = torch.tensor([below + weight / 2]).double()
        terms = objective_terms(vae, x, eps, objective, beta, choice)
        torch.testing.assert_close(-terms.loss, iwae_bound(log_w).squeeze())
        expected += weight * gradient_of(vae, x, eps, objective, beta, choice)
        below += weight
    torch.testing.assert_close(expected, everything)


def test_an_early_epoch_of_one_sample_has_the_gradient_of_its_log_weight():
    """Nothing is chosen from one sample: objective.early_samples=1 with objective.resample=true."""
    torch.manual_seed(0)
    vae = VAE((6,), 2, 5, prior="mixture", prior_components=3).double()
    x, eps = torch.rand(4, 6).double(), torch.randn(1, 4, 2).double()
    objective = ObjectiveConfig(name="iwae", num_samples=5, resample=True)
    found = gradient_of(vae, x, eps, objective, 0.4, torch.rand(4).double())
    mean, logvar = vae.encode(x)
    scale = torch.exp(logvar / 2)
    z = mean + scale * eps[0]
    log_q = torch.distributions.Normal(mean, scale).log_prob(z).sum(-1)
    log_px = torch.distributions.Bernoulli(logits=vae.decode(z), validate_args=False).log_prob(x)
    log_w = log_px.sum(-1) + 0.4 * (vae.log_prior(z) - log_q)
    expected = torch.autograd.grad(-log_w.mean(), list(vae.parameters()))
    torch.testing.assert_close(found, torch.cat([part.flatten() for part in expected]))


def test_images_are_averaged_once(small_vae):
    """A batch's loss is the mean of its images' losses, whatever the batch size."""
    x, eps = torch.rand(10, 784), torch.randn(1, 10, 2)
    whole = objective_terms(small_vae, x, eps, ObjectiveConfig()).loss
    halves = [
        objective_terms(small_vae, x[part], eps[:, part], ObjectiveConfig()).loss
        for part in (slice(5), slice(5, 10))
    ]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2)


@pytest.mark.parametrize("estimator", ["standard", "dreg"])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_importance_weighted_loss_equals_torch_distributions(small_vae, estimator, beta):
    """A warm-up weighs the latents inside the bound."""
    x, eps = torch.rand(6, *small_vae.input_shape), torch.randn(4, 6, small_vae.latent_dim)
    objective = ObjectiveConfig(name="iwae", estimator=estimator)
    loss = objective_terms(small_vae, x, eps, objective, beta).loss
    mean, logvar = small_vae.encode(x)
    q = torch.distributions.Normal(mean, torch.exp(logvar / 2))
    z = q.mean + q.stddev * eps
    prior = torch.distributions.Normal(0.0, 1.0)
    pixels = torch.distributions.Bernoulli(logits=small_vae.decode(z), validate_args=False)
    latents = (prior.log_prob(z) - q.log_prob(z)).sum(-1)
    log_w = pixels.log_prob(x).flatten(2).sum(-1) + beta * latents
    bound = log_w.double().exp().mean(0).log()
    assert loss.item() == pytest.approx(-bound.mean().item(), rel=1e-4)


def second_derivative_of(loss, parameters):
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    squares = sum((g**2).sum() for g in gradients if g is not None)
    return torch.autograd.grad(squares, parameters, allow_unused=True)


@pytest.mark.parametrize("beta", [1.0, 0.4])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_second_derivatives_of_the_importance_weighted_bound(likelihood, beta):
    torch.manual_seed(0)
    vae = VAE((6,), 2, 5, likelihood=likelihood, activation="tanh").double().eval()
    x, eps = torch.rand(4, 6).double(), torch.randn(3, 4, 2).double()
    parameters = list(vae.parameters())
    mean, logvar = vae.encode(x)
    q = Normal(mean, torch.exp(logvar / 2))
    z = mean + torch.exp(logvar / 2) * eps
    if likelihood == "bernoulli":
        pixels = Bernoulli(logits=vae.decode(z), validate_args=False)
    else:
        pixels = Normal(vae.decode(z), torch.exp(vae.likelihood.logvar / 2))
    latents = (Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)).sum(-1)
    log_w = pixels.log_prob(x).sum(-1) + beta * latents
    expected = second_derivative_of(-(log_w.exp().mean(0).log()).mean(), parameters)
    ours = objective_terms(vae, x, eps, ObjectiveConfig(name="iwae", num_samples=3), beta).loss
    torch.testing.assert_close(second_derivative_of(ours, parameters), expected)


@pytest.mark.parametrize(
    ("settings", "chosen"), [({"estimator": "dreg"}, False), ({"resample": True}, True)]
)
def test_a_gradient_that_is_an_estimate_has_no_second_derivative(settings, chosen):
    torch.manual_seed(0)
    vae = VAE((6,), 2, 5).double()
    x, eps = torch.rand(4, 6).double(), torch.randn(3, 4, 2).double()
    objective = ObjectiveConfig(name="iwae", num_samples=3, **settings)
    choice = torch.rand(4).double() if chosen else None
    loss = objective_terms(vae, x, eps, objective, 1.0, choice).loss
    with pytest.raises(RuntimeError, match=r"first derivative only.*estimator=standard"):
        second_derivative_of(loss, list(vae.parameters()))


@pytest.mark.parametrize(
    ("name", "estimator"), [("elbo", "standard"), ("iwae", "standard"), ("iwae", "dreg")]
)
def test_gradients_of_each_image_come_from_torch_func(name, estimator):
    torch.manual_seed(0)
    vae = VAE((6,), 2, 5).double()
    x, eps = torch.rand(4, 6).double(), torch.randn(3, 4, 2).double()
    objective = ObjectiveConfig(name=name, num_samples=3, estimator=estimator)

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = vae

        def forward(self, x, eps):
            return objective_terms(self.vae, x[None], eps[:, None], objective).loss

    loss = Loss()
    parameters = dict(loss.named_parameters())
    one = torch.func.grad(lambda p, x, eps: torch.func.functional_call(loss, p, (x, eps)))
    each = torch.func.vmap(one, in_dims=(None, 0, 1))(parameters, x, eps)
    got = torch.cat([gradient.mean(0).flatten() for gradient in each.values()])
    torch.testing.assert_close(got, gradient_of(vae, x, eps, objective))


@pytest.mark.parametrize("loss", [elbo, keras_loss])
@pytest.mark.parametrize("value", [1.5, -0.5, 255.0, math.nan])
def test_bounds_refuse_pixels_outside_0_and_1(loss, value):
    x, zero = torch.full((2, 9), value), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=rf"\(2, 9\) has values from {value:g} .*\[0, 1\]"):
        loss(x, torch.zeros(2, 9), zero, zero)


@pytest.mark.parametrize("loss", [elbo, keras_loss])
def test_bounds_refuse_images_whose_axes_are_in_another_order(loss):
    zero = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"\(2, 8, 8, 3\).*\(2, 3, 8, 8\)"):
        loss(torch.rand(2, 8, 8, 3), torch.zeros(2, 3, 8, 8), zero, zero)
    with pytest.raises(ValueError, match=r"\(6, 64\).*\(2, 3, 8, 8\)"):
        loss(torch.rand(6, 64), torch.zeros(2, 3, 8, 8), torch.zeros(6, 3), torch.zeros(6, 3))
    x = torch.rand(2, 3, 8, 8)
    expected = loss(x, torch.ones(2, 3, 8, 8), zero, zero)
    torch.testing.assert_close(loss(x.flatten(1), torch.ones(2, 3, 8, 8), zero, zero), expected)


def test_channels_do_not_become_images():
    vae = VAE((784,), 2, 4)
    for images in (1, 5):
        x = torch.rand(images, 3, 28, 28)
        with pytest.raises(ValueError, match=rf"\({images}, 3, 28, 28\).*\(B, 784\)"):
            objective_terms(vae, x, torch.randn(1, images, 2), ObjectiveConfig())
        with pytest.raises(ValueError, match=rf"\({images}, 3, 28, 28\).*\(B, 784\)"):
            log_weights(vae, x, (torch.zeros(images, 2),) * 2, torch.randn(1, images, 2))
