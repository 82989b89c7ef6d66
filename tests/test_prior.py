import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from vae_torch import VAE
from vae_torch.parts.posteriors import log_normal


def test_log_normal_equals_torch_distributions():
    z, mean, logvar = torch.randn(3, 4, 5, 2).double().unbind(0)
    expected = Normal(mean, torch.exp(0.5 * logvar)).log_prob(z).sum(-1)
    torch.testing.assert_close(log_normal(z, mean, logvar), expected)


def test_standard_prior_equals_torch_distributions():
    z = torch.randn(3, 5, 2)
    torch.testing.assert_close(VAE().log_prior(z), Normal(0.0, 1.0).log_prob(z).sum(-1))


@pytest.mark.parametrize("prior", ["mixture", "vamp"])
def test_learned_priors_equal_torch_distributions(prior):
    torch.manual_seed(0)
    vae = VAE((20,), 3, 8, prior=prior, prior_components=7).double()
    if prior == "mixture":
        vae.prior.logvars.data.normal_()
        vae.prior.log_weights.data.normal_()
        means, logvars, log_w = vae.prior.means, vae.prior.logvars, vae.prior.log_weights
    else:
        means, logvars = vae.encode(torch.sigmoid(vae.prior.pseudo_inputs))
        log_w = torch.zeros(7).double()
    parts = Independent(Normal(means, torch.exp(0.5 * logvars)), 1)
    reference = MixtureSameFamily(Categorical(logits=log_w), parts)
    z = 3 * torch.randn(5, 4, 3).double()
    torch.testing.assert_close(vae.log_prior(z), reference.log_prob(z))

    generator = torch.Generator().manual_seed(0)
    draws = vae.prior.sample(100_000, generator)
    torch.testing.assert_close(draws.mean(0), reference.mean, atol=0.03, rtol=0)
    torch.testing.assert_close(draws.var(0), reference.variance, atol=0.06, rtol=0.02)


def test_autocast_leaves_the_mixture_alone():
    vae = VAE((20,), 2, 8, prior="mixture", prior_components=50)
    vae.prior.means.data *= 2
    vae.prior.logvars.data.fill_(-3.0)
    z = 2 * torch.randn(64, 2)
    with torch.autocast("cpu", torch.bfloat16):
        cast = vae.log_prior(z)
    torch.testing.assert_close(cast, vae.log_prior(z))


def test_mixture_keeps_its_digits_where_components_are_narrow():
    vae = VAE((20,), 2, 8, prior="mixture", prior_components=50)
    vae.prior.means.data *= 4
    vae.prior.logvars.data.fill_(2 * math.log(0.003))
    z = (vae.prior.means + 0.003 * torch.randn(50, 2)).detach()
    means, deviations = vae.prior.means.double(), torch.exp(0.5 * vae.prior.logvars.double())
    parts = Independent(Normal(means, deviations), 1)
    reference = MixtureSameFamily(Categorical(logits=torch.zeros(50).double()), parts)
    log_pz = vae.log_prior(z)
    assert log_pz.dtype == torch.float32
    torch.testing.assert_close(log_pz.double(), reference.log_prob(z.double()), rtol=0, atol=1e-4)


def test_mixture_keeps_its_digits_far_from_zero_in_float32():
    vae = VAE((20,), 40, 8, prior="mixture", prior_components=50)
    vae.prior.means.data = 30 + 0.5 * torch.randn(50, 40)
    vae.prior.logvars.data.fill_(-4.0)
    z = 30 + 0.5 * torch.randn(64, 40)
    exact = VAE((20,), 40, 8, prior="mixture", prior_components=50).double()
    exact.load_state_dict(vae.state_dict())
    torch.testing.assert_close(
        vae.log_prior(z).double(), exact.log_prior(z.double()), rtol=1e-4, atol=1e-2
    )
