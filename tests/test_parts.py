import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.distributions import Independent, MultivariateNormal, Normal

from vae_torch import VAE, ObjectiveConfig
from vae_torch.config import ConfigError, config_from_dict
from vae_torch.evaluation.proposals import fitted_log_px
from vae_torch.images import Batch
from vae_torch.parts.complete import complete
from vae_torch.parts.likelihoods import DiscretizedLogistic, Gaussian
from vae_torch.parts.metrics import metric_of, score
from vae_torch.parts.objectives import (
    Noise,
    as_objective,
    bound,
    log_weights,
    loss_and_metrics,
)
from vae_torch.quadrature import exact_log_px


def test_a_discretized_logistic_is_the_mass_between_the_edges():
    torch.manual_seed(0)
    params = torch.randn(3, 2, 4, 2).double()  # (K, B, pixels, outputs)
    x = torch.tensor([[0, 1, 128, 255], [254, 3, 77, 0]]).double() / 255
    values = x.numpy()
    theirs = stats.logistic(0.5 + params[..., 0].numpy(), np.exp(params[..., 1].numpy() - 2))
    high = np.where(values == 1, np.inf, values + 0.5 / 255)
    low = np.where(values == 0, -np.inf, values - 0.5 / 255)
    # the difference of the smaller tails
    mass = np.where(
        values > theirs.mean(), theirs.sf(low) - theirs.sf(high), theirs.cdf(high) - theirs.cdf(low)
    )
    ours = DiscretizedLogistic().log_prob(x, params)
    torch.testing.assert_close(ours, torch.from_numpy(np.log(mass).sum(-1)))


@pytest.mark.parametrize("mixtures", [1, 3])
def test_the_masses_of_all_pixel_values_sum_to_one(mixtures):
    torch.manual_seed(1)
    likelihood = DiscretizedLogistic(mixtures=mixtures, levels=16)
    params = 3 * torch.randn(1, 2, likelihood.outputs).double()  # two pixels
    values = torch.arange(16).double() / 15
    x = torch.cartesian_prod(values, values)
    masses = likelihood.log_prob(x, params.expand(len(x), -1, -1)).exp()
    assert masses.sum().item() == pytest.approx(1, abs=1e-12)


def test_a_discretized_logistic_of_no_width_keeps_its_digits():
    likelihood = DiscretizedLogistic()
    params = torch.tensor([[[0.0, -30.0]]])  # the scale is held at e^-7
    far = likelihood.log_prob(torch.ones(1, 1), params)
    edge = 1 - 0.5 / 255
    expected = -((edge - 0.5) / math.exp(-7))  # log σ(-a) is -a there
    assert far.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shape", [(12,), (3, 8, 5), (1, 8, 8)])
@pytest.mark.parametrize("mixtures", [1, 2])
def test_several_outputs_for_a_pixel_reach_it(shape, mixtures):
    architectures = ["mlp"] if len(shape) == 1 else ["mlp", "conv"]
    for architecture in architectures:
        vae = VAE(
            shape,
            2,
            8,
            architecture=architecture,
            likelihood="discretized_logistic",
            likelihood_options={"mixtures": mixtures},
        )
        x = torch.rand(5, *shape)
        assert vae(x).logits.shape == (5, *shape, 2 if mixtures == 1 else 6)
        assert vae.sample(3).shape == (3, *shape)
        assert bound(vae, Batch(x), torch.randn(4, 5, 2)).reconstruction.shape == (5,)


def test_a_calibrated_gaussian_has_the_batchs_residual_for_its_variance():
    torch.manual_seed(0)
    x, centre = torch.rand(6, 9), torch.rand(6, 9, requires_grad=True)
    likelihood = Gaussian()
    loss = likelihood.log_prob(x, centre).sum()
    variance = ((x - centre) ** 2).mean().detach()
    torch.testing.assert_close(loss, Normal(centre, variance.sqrt()).log_prob(x).sum())
    # where σ² is optimal, Σ log p is -N/2 (log(2 π e) + log σ²), and so is its gradient
    pixels = x.numel()
    whole = -0.5 * pixels * (math.log(2 * math.pi * math.e) + ((x - centre) ** 2).mean().log())
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(
        torch.autograd.grad(loss, centre)[0], torch.autograd.grad(whole, centre)[0]
    )
    likelihood.eval()
    still = likelihood.log_prob(torch.zeros(2, 9), torch.ones(2, 9))
    expected = Normal(torch.ones(2, 9), variance.sqrt()).log_prob(torch.zeros(2, 9)).sum(-1)
    torch.testing.assert_close(still, expected)


@pytest.mark.parametrize(
    "parts",
    ["posterior='flow', prior='flow'", "posterior='two_layer'", "likelihood='pixelcnn'"],
)
def test_every_built_in_part_is_found_without_importing_its_module(parts):
    made = f"from vae_torch import VAE; VAE((9,), 4, 8, {parts})"
    done = subprocess.run([sys.executable, "-c", made], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("latent_dim", [1, 2, 5])
def test_a_flow_posteriors_density_is_that_of_its_samples(latent_dim):
    torch.manual_seed(0)
    vae = VAE((20,), latent_dim, 8, posterior="flow", posterior_options={"width": 16}).double()
    q = vae.encode(torch.rand(3, 20).double())
    eps = torch.randn(4, 3, latent_dim).double()
    z, log_q = q.sample(eps)
    torch.testing.assert_close(q.rsample(eps), z)
    torch.testing.assert_close(q.log_prob(z), log_q)
    torch.testing.assert_close(q.rsample(q.noise_of(z)), z)
    # the change of variables, by autograd's own Jacobian
    one = eps[0, 1]
    jacobian = torch.autograd.functional.jacobian(
        lambda e: q.rsample(torch.stack([eps[0, 0], e, eps[0, 2]]))[1], one
    )
    expected = Normal(0.0, 1.0).log_prob(one).sum() - torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(log_q[0, 1], expected)


def test_a_flow_prior_integrates_to_one_and_is_drawn_from():
    torch.manual_seed(0)
    vae = VAE((20,), 1, 8, prior="flow", prior_options={"transforms": 2, "width": 16}).double()

    def density(z):
        return vae.log_prior(torch.tensor([[z]]).double()).exp().item()

    with torch.no_grad():
        assert integrate.quad(density, -30, 30)[0] == pytest.approx(1, abs=1e-6)
        mean = integrate.quad(lambda z: z * density(z), -30, 30)[0]
        draws = vae.prior.sample(20_000, torch.Generator().manual_seed(0))
        assert abs(draws.mean().item() - mean) < 5 * draws.std().item() / math.sqrt(20_000)


def test_the_bound_of_a_flow_is_the_mean_of_its_log_weights():
    torch.manual_seed(0)
    vae = VAE((20,), 2, 8, posterior="flow", prior="flow")
    x, eps = torch.rand(3, 20).round(), torch.randn(50, 3, 2)
    parts = bound(vae, Batch(x), eps)
    expected = log_weights(vae, x, vae.encode(x), eps).mean(0)
    torch.testing.assert_close(parts.reconstruction - parts.kl, expected)
    out = vae(x)
    assert out.logvar is None
    assert out.mean.shape == (3, 2)


@pytest.mark.usefixtures("few_points")
def test_the_integral_of_a_model_of_flows_is_that_of_a_fine_grid():
    torch.manual_seed(0)
    flow = {"transforms": 2, "width": 16}
    vae = VAE(
        (12,), 2, 16, posterior="flow", prior="flow", posterior_options=flow, prior_options=flow
    ).double()
    for weight in vae.decoder.parameters():
        weight.data *= 3
    x = torch.rand(3, 12).round().double()
    side = 0.04
    ticks = torch.arange(-8, 8, side).double() + side / 2
    z = torch.cartesian_prod(ticks, ticks)
    with torch.no_grad():
        pixels = torch.distributions.Bernoulli(logits=vae.decode(z)).log_prob(x[:, None])
        log_joint = pixels.sum(-1) + vae.log_prior(z)
    expected = log_joint.logsumexp(1) + 2 * math.log(side)
    torch.testing.assert_close(exact_log_px(vae, x).log_px, expected, atol=2e-3, rtol=0)
    fitted = fitted_log_px(vae, x, num_samples=2000).log_px
    torch.testing.assert_close(fitted, expected, atol=0.05, rtol=0)


def test_what_needs_a_gaussian_says_so():
    vae = VAE((20,), 2, 8, posterior="flow")
    batch, noise = Batch(torch.rand(3, 20)), Noise(torch.randn(2, 3, 2))
    for settings, words in (
        (ObjectiveConfig(name="iwae", num_samples=2, estimator="dreg"), "dreg needs a Gaussian"),
        (ObjectiveConfig(free_bits=1.0), "free_bits=1.0 needs .*posterior=gaussian"),
        (ObjectiveConfig(name="tcvae"), "tcvae needs a Gaussian"),
        (ObjectiveConfig(name="keras"), "posterior=gaussian"),
    ):
        with pytest.raises(ConfigError, match=words):
            loss_and_metrics(as_objective(settings), vae, batch, noise, 1.0)
    vamp = VAE((20,), 2, 8, posterior="flow", prior="vamp", prior_components=3)
    with pytest.raises(ConfigError, match="prior=vamp needs a Gaussian"):
        vamp.log_prior(torch.zeros(1, 2))


def test_the_total_correlation_is_that_of_gaussian_codes():
    """Means that are themselves Gaussian, and correlated: all three parts have closed forms."""
    torch.manual_seed(0)
    covariance = torch.tensor([[1.5, 0.9], [0.9, 1.0]]).double()
    noise_variance = 0.3
    n = 3000
    means = MultivariateNormal(torch.zeros(2).double(), covariance).sample((n,))
    vae = VAE((2,), 2, 4, likelihood="gaussian").double().eval()

    class Heads(torch.nn.Module):
        def forward(self, h):
            from vae_torch.parts.posteriors import DiagonalGaussian

            return DiagonalGaussian(h, torch.full_like(h, math.log(noise_variance)))

    vae.encoder, vae.posterior = torch.nn.Identity(), Heads()
    noise = Noise(torch.randn(1, n, 2).double())
    objective = as_objective(ObjectiveConfig(name="tcvae", options={"dataset_size": 1}))
    _, metrics = loss_and_metrics(objective, vae, Batch(means), noise, 1.0)
    aggregate = covariance + noise_variance * torch.eye(2).double()
    total_correlation = 0.5 * (aggregate.diag().log().sum() - torch.linalg.slogdet(aggregate)[1])
    information = 0.5 * (torch.linalg.slogdet(aggregate)[1] - 2 * math.log(noise_variance))
    marginal = aggregate.diag()
    dimension_kl = (0.5 * (marginal - 1 - marginal.log())).sum()
    for name, expected in (
        ("total_correlation", total_correlation),
        ("mutual_information", information),
        ("dimension_kl", dimension_kl),
    ):
        values = metrics[name]
        error = values.std() / math.sqrt(n)
        assert abs(values.mean() - expected) < 5 * error + 0.02, name  # and a bias of 1 / n


def test_the_parts_of_the_tcvae_sum_to_the_kl():
    torch.manual_seed(0)
    vae = VAE((20,), 3, 8)
    batch, noise = Batch(torch.rand(6, 20)), Noise(torch.randn(1, 6, 3))
    objective = as_objective(ObjectiveConfig(name="tcvae"))
    loss, metrics = loss_and_metrics(objective, vae, batch, noise, 1.0)
    log_w = log_weights(vae, batch.x, vae.encode(batch.x), noise.eps)[0]
    torch.testing.assert_close(loss, -log_w)
    heavier, _ = loss_and_metrics(objective, vae, batch, noise, 4.0)
    torch.testing.assert_close(heavier - loss, 3 * metrics["total_correlation"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prior": "uniform"}, "prior=uniform: must be one of standard, mixture, vamp, .*flow"),
        ({"prior_options": {"widht": 3}, "prior": "flow"}, "prior_options.widht.*mean width"),
        ({"prior_options": {"width": "wide"}, "prior": "flow"}, "prior_options.width=wide: input"),
        ({"prior_options": {"width": 3}}, "prior_options.width: no option of prior=standard"),
        ({"likelihood_options": {"mixtures": 2.5}, "likelihood": "discretized_logistic"}, "2.5"),
        (
            {"likelihood_options": {"mixtures": 0}, "likelihood": "discretized_logistic"},
            "likelihood_options.mixtures=0: input should be greater than or equal to 1",
        ),
        (
            {"likelihood_options": {"levels": 1}, "likelihood": "discretized_logistic"},
            "likelihood_options.levels=1: input should be greater than or equal to 2",
        ),
        (
            {"likelihood_options": {"window": 4}, "likelihood": "pixelcnn"},
            "likelihood_options.window=4: must be odd",
        ),
        (
            {"likelihood_options": {"window": 1}, "likelihood": "pixelcnn"},
            "likelihood_options.window=1: input should be greater than or equal to 3",
        ),
        (
            {"likelihood_options": {"channels": 1}, "likelihood": "pixelcnn"},
            "likelihood_options.channels=1: input should be greater than or equal to 2",
        ),
        ({"posterior_options": {"width": 0}, "posterior": "flow"}, "posterior_options.width=0: i"),
        ({"prior_options": {"transforms": 0}, "prior": "flow"}, "prior_options.transforms=0: i"),
        ({"prior_options": {"top": -1}, "prior": "two_layer"}, "prior_options.top=-1: input"),
        *(
            ({"prior_options": {"components": 0}, "prior": prior}, "prior_options.components=0: in")
            for prior in ("mixture", "vamp", "two_layer")
        ),
        ({"model.options": {"channels": 0}, "model.name": "resnet"}, "model.options.channels=0: i"),
        ({"train.monitor": "test/psnr"}, "test/psnr: unknown whether higher or lower is better"),
    ],
)
def test_an_unknown_option_of_a_part_is_refused_in_one_line(config, values, words):
    found = config.to_dict()
    for key, value in values.items():
        *groups, last = key.split(".")
        place = found
        for group in groups:
            place = place[group]
        place[last] = value
    with pytest.raises(ConfigError, match=words) as caught:
        complete(config_from_dict(found))
    assert "\n" not in str(caught.value)


def test_defaults_of_options_are_written_down(config):
    config.prior, config.prior_options = "flow", {"width": 32}
    assert complete(config).prior_options == {"transforms": 4, "width": 32}
    assert complete(config).model.options == {}


def test_a_metric_says_which_direction_is_better():
    assert score("test/elbo", -90.0) > score("test/elbo", -91.0)
    assert score("test/loss", 90.0) > score("test/loss", 91.0)
    with pytest.raises(ConfigError, match="neither direction"):
        metric_of("test/kl")


def test_modules_are_taken_as_parts():
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(60, 7))
    decoder = torch.nn.Sequential(torch.nn.Linear(3, 60), torch.nn.Unflatten(1, (3, 4, 5)))
    first = encoder[1].weight.clone()
    vae = VAE((3, 4, 5), 3, encoder=encoder, decoder=decoder, likelihood=Gaussian())
    assert torch.equal(vae.encoder[1].weight, first)  # unchanged
    assert vae(torch.rand(2, 3, 4, 5)).logits.shape == (2, 3, 4, 5)
    prior = Independent(Normal(torch.zeros(3), torch.ones(3)), 1)
    torch.testing.assert_close(vae.log_prior(torch.ones(2, 3)), prior.log_prob(torch.ones(2, 3)))
    for parts, words in (
        ({"encoder": torch.nn.Linear(7, 3)}, "encoder does not take"),
        ({"decoder": torch.nn.Linear(3, 59)}, "must give 60 numbers"),
        ({"decoder": torch.nn.Linear(4, 60)}, "decoder does not take"),
    ):
        with pytest.raises(ValueError, match=words):
            VAE((3, 4, 5), 3, **parts)
