"""Two stochastic layers against closed forms, integrals, and the model of one layer."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from tests.terms import objective_terms
from vae_torch import VAE
from vae_torch.config import ConfigError, ObjectiveConfig
from vae_torch.evaluate import evaluate_model
from vae_torch.evaluation.bounds import elbo_of
from vae_torch.evaluation.importance import fit_posterior
from vae_torch.evaluation.proposals import fitted_log_px
from vae_torch.parts.posteriors import Gaussian
from vae_torch.parts.priors import Mixture
from vae_torch.parts.two_layer import TwoLayerPosterior, TwoLayerPrior
from vae_torch.quadrature import exact_log_px


def randomise(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)


def test_a_linear_prior_is_the_joint_gaussian_of_the_chain():
    torch.manual_seed(0)
    prior = TwoLayerPrior(5, components=1, top=2, width=2).double()
    randomise(prior)
    prior.see_top = nn.Identity()
    prior.bottom.logvar.weight.data.zero_()
    slope, offset = prior.bottom.mean.weight, prior.bottom.mean.bias
    top = prior.top.logvars[0].exp().diag()
    below = slope @ top @ slope.T + prior.bottom.logvar.bias.exp().diag()
    covariance = torch.cat([torch.cat([top, top @ slope.T], 1), torch.cat([slope @ top, below], 1)])
    mean = torch.cat([prior.top.means[0], slope @ prior.top.means[0] + offset])
    joint = MultivariateNormal(mean, covariance)
    z = torch.randn(4, 7, 5).double()
    torch.testing.assert_close(prior.log_prob(z), joint.log_prob(z))
    drawn = prior.sample(100_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), covariance, atol=0.04, rtol=0)


def test_a_linear_posterior_is_the_joint_gaussian_of_the_chain():
    torch.manual_seed(1)
    posterior = TwoLayerPosterior(3, 4, top=2, width=6).double()
    posterior.activation = nn.Identity()
    posterior.bottom.logvar.weight.data.zero_()
    h = torch.randn(1, 3).double()
    q = posterior(h)
    slope = posterior.bottom.mean.weight @ posterior.see_top.weight
    top = q.top.logvar[0].exp().diag()
    below = slope @ top @ slope.T + posterior.bottom.logvar.bias.exp().diag()
    covariance = torch.cat([torch.cat([top, top @ slope.T], 1), torch.cat([slope @ top, below], 1)])
    joint = MultivariateNormal(q.mean[0], covariance)
    z, log_q = q.sample(torch.randn(50_000, 1, 4).double())
    torch.testing.assert_close(log_q, joint.log_prob(z))
    torch.testing.assert_close(q.log_prob(z), log_q)
    torch.testing.assert_close(z[:, 0].T.cov(), covariance, atol=0.02, rtol=0)


def test_a_bottom_layer_that_does_not_see_the_top_is_one_gaussian_layer():
    torch.manual_seed(0)
    posterior, one = TwoLayerPosterior(6, 4, top=1, width=6), Gaussian(6, 4)
    posterior.see_top.weight.data.zero_()
    posterior.see_features = posterior.activation = nn.Identity()
    for head in ("mean", "logvar"):
        layers = [getattr(layer, head) for layer in (posterior.top, posterior.bottom)]
        getattr(one, head).weight.data = torch.cat([layer.weight for layer in layers])
        getattr(one, head).bias.data = torch.cat([layer.bias for layer in layers])
    h, eps = torch.randn(5, 6), torch.randn(2, 5, 4)
    for two, of_one in zip(posterior(h).sample(eps), one(h).sample(eps), strict=True):
        torch.testing.assert_close(two, of_one)
    torch.testing.assert_close(posterior(h).mean, one(h).mean)


def test_an_untrained_second_layer_of_the_prior_is_a_standard_normal():
    prior, z = TwoLayerPrior(5, components=3, top=2), torch.randn(9, 5)
    standard = torch.distributions.Normal(0, 1).log_prob(z[:, 2:]).sum(-1)
    torch.testing.assert_close(prior.log_prob_per_layer(z)[:, 1], standard)


def two_layers(latent_dim=2):
    torch.manual_seed(0)
    vae = VAE(
        (12,),
        latent_dim,
        16,
        posterior="two_layer",
        prior="two_layer",
        prior_components=5,
        posterior_options={"width": 8},
        prior_options={"width": 8},
    ).double()
    randomise(vae.prior)
    vae.decoder.out.weight.data *= 2
    return vae, (torch.rand(3, 12) > 0.5).double()


def test_log_px_is_the_integral_over_both_layers():
    vae, x = two_layers()
    side = torch.linspace(-9, 9, 401).double()
    grid = torch.cartesian_prod(side, side)
    logits = vae.decode(grid).detach()
    log_px_given_z = x @ logits.T - nn.functional.softplus(logits).sum(-1)
    truth = torch.logsumexp(log_px_given_z + vae.log_prior(grid).detach(), 1)
    truth += 2 * math.log(side[1] - side[0])
    torch.testing.assert_close(exact_log_px(vae, x).log_px, truth, atol=1e-4, rtol=0)
    fitted = fitted_log_px(vae, x, num_samples=500)
    torch.testing.assert_close(fitted.log_px, truth, atol=0.1, rtol=0)


@pytest.mark.parametrize("name", ["elbo", "iwae"])
def test_the_bound_is_the_mean_of_the_log_weights_and_its_kl_is_given_per_layer(name):
    vae, x = two_layers(4)
    eps = torch.randn(3, 3, 4).double()
    q = vae.encode(x)
    z, log_q = q.sample(eps)
    log_w = vae.likelihood.log_prob(x, vae.decode(z)) + vae.log_prior(z) - log_q
    terms = objective_terms(vae, x, eps, ObjectiveConfig(name=name, num_samples=3))
    torch.testing.assert_close(terms.elbo, log_w.mean(0))
    per_layer = vae.prior.kl_per_layer(q, z)
    torch.testing.assert_close(per_layer.sum(-1), terms.kl)
    if name == "iwae":
        torch.testing.assert_close(terms.loss, -(torch.logsumexp(log_w, 0) - math.log(3)).mean())


def test_layers_of_different_sizes_are_refused():
    vae = VAE(
        (12,), 4, 8, prior="two_layer", posterior="two_layer",
        prior_options={"top": 3}, posterior_options={"top": 1},
    )  # fmt: skip
    x = torch.rand(2, 12)
    with pytest.raises(ConfigError, match=r"with 3 dimensions in its top layer, and .* with 1; "):
        objective_terms(vae, x, torch.randn(1, 2, 4), ObjectiveConfig())


def test_a_top_layer_that_leaves_no_second_one_is_refused():
    with pytest.raises(ConfigError, match=r"top=4 of latent_dim=4; top must be less"):
        VAE((12,), 4, 8, prior="two_layer", prior_options={"top": 4})


def banana():
    """A decoder that ignores z, and q(z|x) = the curved prior: log p(x) is -12 log 2."""
    vae, x = two_layers(4)
    vae.decoder.out.weight.data.zero_()
    vae.decoder.out.bias.data.zero_()
    q, p = vae.posterior, vae.prior
    q.see_features.weight.data.zero_()
    q.see_features.bias.data.zero_()
    nn.init.normal_(q.see_top.weight, std=2.0)
    p.see_top, p.bottom = nn.Sequential(q.see_top, q.activation), q.bottom
    p.top = Mixture(2, components=1).double()
    for head, value in ((q.top.mean, p.top.means), (q.top.logvar, p.top.logvars)):
        head.weight.data.zero_()
        head.bias.data = value.data[0].clone()
    return vae, x


def test_proposals_of_noise_fit_a_curved_posterior():
    vae, x = banana()
    found = fitted_log_px(vae, x, num_samples=1000)
    truth = torch.full((3,), -12 * math.log(2)).double()
    torch.testing.assert_close(found.log_px, truth, atol=0.06, rtol=0)  # 4 errors
    assert found.effective_samples.min() > 700  # with Gaussians of z alone: 10 to 40


def test_the_best_posterior_of_two_layers_is_no_worse_than_the_encoders():
    vae, x = two_layers()
    log_px = exact_log_px(vae, x).log_px
    best = fit_posterior(vae, x, steps=200)
    found, encoders = (elbo_of(vae, x, q, num_samples=4000) for q in (best, vae.encode(x)))
    assert (found > encoders + 0.02).all()
    assert (found < log_px).all()
    z, log_q = best.sample(torch.randn(5, 3, 2).double())
    torch.testing.assert_close(best.log_prob(z), log_q)


def test_the_card_of_two_layers_splits_the_gap_among_posteriors_of_its_kind():
    vae, x = two_layers(4)
    card = evaluate_model(vae, [(x.repeat(4, 1),)], num_samples=20, fit_images=12, exact=False)
    assert card["amortisation_gap"]["value"] > -0.02
    assert "posterior of its kind" in card["amortisation_gap"]["definition"]
    assert "mutual_information" not in card
    assert card["verdict"]
