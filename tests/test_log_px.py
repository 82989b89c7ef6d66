"""log p(x) from fitted proposals and by annealing, against closed forms and integrals."""

import functools
import math

import numpy as np
import pytest
import torch
from scipy.stats import genpareto
from torch import nn

from tests.conftest import REPOSITORY
from tests.test_evaluate import PIXELS, linear_gaussian
from vae_torch import VAE, evaluate_model
from vae_torch.config import ConfigError
from vae_torch.evaluate import importance_log_px
from vae_torch.evaluation import ais, partial, proposals
from vae_torch.evaluation import card as card_module
from vae_torch.evaluation.ais import annealed_log_px, sandwich_log_px
from vae_torch.evaluation.pareto import pareto_k, rise_from_half
from vae_torch.evaluation.partial import Partial
from vae_torch.evaluation.proposals import fitted_log_px
from vae_torch.quadrature import exact_log_px
from vae_torch.stored import load_run


class Bumps(nn.Module):
    """A decoder of one pixel: log p(x=1|z) is the log of two narrow bumps, far from each other."""

    def __init__(self, latent_dim, deviation=0.3):
        super().__init__()
        self.deviation = deviation
        self.register_buffer("center", torch.zeros(latent_dim).double())
        self.register_buffer("copy", torch.zeros(latent_dim).double())
        self.copy[0] = 4.0

    def forward(self, z):
        squares = [((z - c) ** 2).sum(-1) for c in (self.center, self.copy)]
        log_p = torch.logaddexp(*(-s / (2 * self.deviation**2) for s in squares)) - math.log(2)
        log_p = log_p.clamp(max=-1e-9)
        return (log_p - torch.log(-torch.expm1(log_p))).unsqueeze(-1)


def two_modes(latent_dim):
    """The encoder knows only the copy, where the prior is 8 nats lower; and the closed form."""
    torch.manual_seed(0)
    vae = VAE((1,), latent_dim, 4).double()
    vae.decoder = Bumps(latent_dim)
    for layer, value in ((vae.posterior.mean, 0.0), (vae.posterior.logvar, 2 * math.log(0.3))):
        layer.weight.data.zero_()
        layer.bias.data.fill_(value)
    variance = 0.3**2
    mode = -0.5 * latent_dim * math.log(1 + 1 / variance)  # of N(0, I) times a peak at 0
    copy = mode - 16 / (2 * (1 + variance))
    vae.posterior.mean.bias.data[0] = 4 / (1 + variance)
    return vae, torch.ones(3, 1).double(), math.log(math.exp(mode) + math.exp(copy)) - math.log(2)


def assert_within_noise(result, truth, num_samples=1000):
    """Every image within 4 standard errors of its weights' mean, and so the mean of all."""
    effective = result.effective_samples
    again = (effective < 0.8 * num_samples) | (effective > num_samples)  # four times as many
    drawn = torch.where(again, 4 * num_samples, num_samples)
    error = (1 / effective - 1 / drawn).clamp(min=0).sqrt()
    off = result.log_px - truth
    assert (off.abs() < 4 * error + 1e-3).all()
    assert off.mean().abs() < 3 * error.square().mean().sqrt() / math.sqrt(len(off)) + 0.005
    assert error.mean() < 0.1


@pytest.mark.parametrize(("latent_dim", "orthogonal"), [(1, True), (2, False), (5, False)])
def test_fitted_proposals_equal_the_closed_form_whatever_the_encoder_says(latent_dim, orthogonal):
    vae, x = linear_gaussian(latent_dim, orthogonal=orthogonal, variance=0.1)
    vae.posterior.mean.bias.data += 0.2
    vae.posterior.logvar.bias.data -= 1
    result = fitted_log_px(vae, x, num_samples=1000)
    assert_within_noise(result, vae.true_log_px)
    assert not result.doubtful.any()
    poor = importance_log_px(vae, x, num_samples=1000)
    off = (poor.log_px - vae.true_log_px).abs()
    assert (result.log_px - vae.true_log_px).abs().mean() < 0.2 * off.mean()


@pytest.mark.usefixtures("few_points")
def test_fitted_proposals_are_unbiased_in_the_mean_of_the_weights():
    vae, x = linear_gaussian(2, orthogonal=False)
    ratios = torch.stack([fitted_log_px(vae, x, num_samples=40, seed=s).log_px for s in range(3)])
    ratios = (ratios - vae.true_log_px).exp()
    error = ratios.std() / math.sqrt(ratios.numel())
    assert abs(ratios.mean() - 1) < 4 * error
    assert error < 0.02


@pytest.mark.parametrize("latent_dim", [2, 3])
def test_fitted_proposals_find_the_mode_that_the_encoder_misses(latent_dim):
    vae, x, truth = two_modes(latent_dim)
    result = fitted_log_px(vae, x, num_samples=1000)
    torch.testing.assert_close(result.log_px, torch.full((3,), truth).double(), atol=0.05, rtol=0)
    missed = importance_log_px(vae, x, num_samples=1000)
    assert (missed.log_px < truth - 5).all()  # 8 nats short
    assert (missed.effective_samples > 300).all()  # and the weights do not show it


@pytest.mark.parametrize("latent_dim", [2, 3])
def test_proposals_adapt_to_a_mode_that_no_fit_found(latent_dim, monkeypatch):
    vae, x, truth = two_modes(latent_dim)
    monkeypatch.setattr(proposals, "_STARTS", 1)  # fits of the encoder's mode alone
    result = fitted_log_px(vae, x, num_samples=1000)
    assert_within_noise(result, truth)
    assert (result.effective_samples > 150).all()  # without adapting: 3 to 13
    assert result.doubtful.all()  # the first weights had shown that something was missed


@pytest.mark.parametrize("logvar", [-40.0, 12.0])
def test_fitted_proposals_do_not_depend_on_what_the_encoder_says(logvar):
    vae, x = linear_gaussian(2, orthogonal=False)
    vae.posterior.logvar.bias.data.fill_(logvar)
    result = fitted_log_px(vae, x)
    assert_within_noise(result, vae.true_log_px)


@pytest.mark.parametrize(
    ("likelihood", "prior"),
    [
        *(("bernoulli", prior) for prior in ("standard", "mixture", "vamp")),
        *(
            (likelihood, "standard")
            for likelihood in ("continuous_bernoulli", "gaussian", "discretized_logistic")
        ),
        *(
            pytest.param(likelihood, prior, marks=pytest.mark.slow)
            for likelihood in ("continuous_bernoulli", "gaussian")
            for prior in ("mixture", "vamp")
        ),
    ],
)
def test_fitted_proposals_equal_the_integral_under_every_prior_and_likelihood(prior, likelihood):
    torch.manual_seed(3)
    vae = VAE((PIXELS,), 2, 8, prior=prior, prior_components=4, likelihood=likelihood).double()
    vae.decoder.out.weight.data *= 4
    x = (torch.rand(6, PIXELS).double() * 255).round() / 255
    expected = exact_log_px(vae, x).log_px
    result = fitted_log_px(vae, x, num_samples=4000)
    assert_within_noise(result, expected, 4000)
    assert (result.effective_samples > 400).all()


@pytest.mark.slow
@pytest.mark.parametrize("release", ["default", "latent2"])
def test_fitted_proposals_equal_the_integral_of_a_trained_model_or_warn(release):
    vae, _ = load_run(REPOSITORY / "pretrained" / release)
    torch.manual_seed(0)
    with torch.no_grad():
        x = torch.bernoulli(vae.likelihood.mean(vae.decode(torch.randn(200, 2))))
    result = fitted_log_px(vae, x)
    far = (result.log_px - exact_log_px(vae, x).log_px).abs() > 0.05
    assert far.sum() <= 2
    assert result.doubtful[far].all()


@pytest.mark.usefixtures("few_points")
def test_an_image_counts_the_same_among_others_and_in_any_chunk(small_vae):
    x = torch.rand(5, 784)
    expected = fitted_log_px(small_vae, x, num_samples=50)
    for other in (
        fitted_log_px(small_vae, x, num_samples=50, chunk=16),
        fitted_log_px(small_vae, x[:5], num_samples=50, chunk=100_000),
    ):
        torch.testing.assert_close(other.log_px, expected.log_px, atol=2e-3, rtol=0)
    torch.testing.assert_close(
        fitted_log_px(small_vae, x[:2], num_samples=50).log_px, expected.log_px[:2],
        atol=2e-3, rtol=0,
    )  # fmt: skip


@pytest.mark.usefixtures("few_points")
def test_the_rise_from_half_of_the_samples_shows_the_remaining_bias():
    vae, x = linear_gaussian(5, orthogonal=False)
    few = [fitted_log_px(vae, x, num_samples=8, seed=s) for s in range(5)]
    bias = torch.stack([r.log_px - vae.true_log_px for r in few]).mean(0)
    rise = torch.stack([r.rise for r in few]).mean(0)
    error = (bias + rise).std() / math.sqrt(len(x))
    assert abs((bias + rise).mean()) < 4 * error + 0.3 * rise.mean()
    assert rise.mean() > 3 * rise.std() / math.sqrt(len(x))


def test_the_rise_from_half_is_the_bias_of_log_normal_weights():
    """The mean of log mean(w) over K draws: by simulation of its own, for K and K / 2."""
    random = np.random.default_rng(0)
    log_w = 0.8 * random.standard_normal((32, 50_000))
    whole, half = (np.log(np.exp(log_w[:k]).mean(0)) for k in (32, 16))
    error = np.hypot(whole.std(), half.std()) / math.sqrt(50_000)
    rise = rise_from_half(torch.tensor(log_w)).mean().item()
    assert rise == pytest.approx(whole.mean() - half.mean(), abs=4 * error)
    assert rise == pytest.approx(0.8**2 / 2 - whole.mean(), abs=4 * error)  # log E w = s² / 2
    assert rise > 8 * error
    assert rise_from_half(torch.zeros(1, 3)).isnan().all()
    odd = torch.tensor([[1.0], [2.0], [9.0]]).log()  # the third has no partner
    assert rise_from_half(odd).item() == pytest.approx(math.log(1.5) - math.log(2) / 2)


@pytest.mark.parametrize("k", [0.1, 0.5, 0.9])
def test_pareto_k_is_that_of_known_tails(k):
    draws = genpareto.rvs(k, size=(4000, 40), random_state=0)
    found = pareto_k(torch.tensor(draws).log())
    # of 190 points in a tail: standard error (1 + k) / sqrt(190), shrunk a little towards 0.5
    error = (1 + k) / math.sqrt(190) / math.sqrt(40)
    shrunk = (k * 190 + 5) / 200
    assert found.mean().item() == pytest.approx(shrunk, abs=4 * error + 0.02)


def test_pareto_k_of_equal_or_of_few_weights():
    assert (pareto_k(torch.zeros(100, 3)) == -math.inf).all()
    assert pareto_k(torch.randn(20, 3)).isnan().all()


def test_a_proposal_that_misses_the_tails_is_doubtful():
    vae, x = linear_gaussian(2)
    vae.posterior.logvar.bias.data -= 3
    narrow = importance_log_px(vae, x, num_samples=1000)
    assert (narrow.pareto_k > 0.7).double().mean() > 0.8
    assert not (importance_log_px(linear_gaussian(2)[0], x).pareto_k > 0.7).any()


@pytest.mark.slow
@pytest.mark.parametrize("latent_dim", [1, 2])
def test_annealing_equals_the_integral(latent_dim):
    torch.manual_seed(3)
    vae = VAE((PIXELS,), latent_dim, 8).double()
    vae.decoder.out.weight.data *= 5
    x = torch.rand(30, PIXELS).round().double()
    off = annealed_log_px(vae, x, temperatures=200, chains=16).log_px - exact_log_px(vae, x).log_px
    assert abs(off.mean()) < 0.02
    assert abs(off.mean()) < 4 * off.std() / math.sqrt(30) + 0.01


def gaussian_of_20_latents(images, scale):
    """p(x|z) = N(W z, 1.5) with an encoder that knows nothing, images, and their log p(x)."""
    torch.manual_seed(0)
    vae, pixels = VAE((30,), 20, 4, likelihood="gaussian").double(), 30
    vae.likelihood.logvar.data.fill_(math.log(1.5))
    out = nn.Linear(20, pixels).double()
    out.weight.data, out.bias.data = (
        scale * torch.randn(pixels, 20).double(),
        torch.zeros(pixels).double(),
    )
    vae.decoder.trunk, vae.decoder.out = nn.Identity(), out
    covariance = out.weight.data @ out.weight.data.T + 1.5 * torch.eye(pixels).double()
    truth = torch.distributions.MultivariateNormal(torch.zeros(pixels).double(), covariance)
    x = truth.sample((images,))
    return vae, x, truth.log_prob(x)


def test_fitted_proposals_equal_the_closed_form_at_20_latents():
    vae, x, truth = gaussian_of_20_latents(20, scale=0.6)
    result = fitted_log_px(vae, x)
    assert abs((result.log_px - truth).mean()) < 0.02
    assert_within_noise(result, truth)
    poor = importance_log_px(vae, x, num_samples=5000)
    assert (poor.log_px - truth).mean() < -1


def test_annealing_equals_the_closed_form_at_20_latents():
    vae, x, truth = gaussian_of_20_latents(64, scale=0.2)
    result = annealed_log_px(vae, x, temperatures=200, chains=16)
    off = result.log_px - truth
    assert off.std() / 8 < 0.03
    assert abs(off.mean()) < 0.02 + 2 * off.std() / 8
    assert ((result.acceptance > 0.4) & (result.acceptance < 0.95)).all()


def test_killed_annealing_resumes(tmp_path, monkeypatch):
    torch.manual_seed(3)
    vae, x = VAE((PIXELS,), 2, 8), torch.rand(5, PIXELS).round()
    settings = {"temperatures": 3, "chains": 2, "chunk": 4}  # two images at once
    whole = annealed_log_px(vae, x, **settings)
    annealed, keep = [], Partial.keep

    def killed(self, name, rows):
        keep(self, name, rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(partial, "_EVERY", 0.0)
    monkeypatch.setattr(Partial, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        annealed_log_px(vae, x, store=Partial(tmp_path / "part", "a"), **settings)
    monkeypatch.setattr(Partial, "keep", keep)
    tuned = ais._tuned
    monkeypatch.setattr(ais, "_tuned", lambda *a: annealed.append(len(a[1])) or tuned(*a))
    again = annealed_log_px(vae, x, store=Partial(tmp_path / "part", "a"), **settings)
    assert annealed == [2, 1]  # without the two of the first part
    for first, second in zip(whole, again, strict=True):
        assert torch.equal(first, second)
    fewer = annealed_log_px(vae, x[1:], store=Partial(tmp_path / "part", "a"), **settings)
    assert torch.equal(fewer.log_px, annealed_log_px(vae, x[1:], **settings).log_px)


def test_annealing_finds_the_mode_that_the_encoder_misses():
    vae, x, truth = two_modes(3)
    found = annealed_log_px(vae, x, temperatures=200, chains=16).log_px
    torch.testing.assert_close(found, torch.full((3,), truth).double(), atol=0.3, rtol=0)


def test_bounds_from_both_sides_hold_the_integral():
    torch.manual_seed(0)
    vae = VAE((PIXELS,), 2, 8).double()
    vae.decoder.out.weight.data *= 4
    both = sandwich_log_px(vae, 60, temperatures=200)
    truth = exact_log_px(vae, both.x).log_px
    for bound, sign in ((both.lower, 1), (both.upper, -1)):
        off = sign * (bound - truth)
        assert off.mean() < 3 * off.std() / math.sqrt(60)  # on its own side
        assert abs(off.mean()) < 0.03


def test_bounds_from_both_sides_hold_the_closed_form_of_a_gaussian_model():
    vae, _ = linear_gaussian(3, orthogonal=False)
    both = sandwich_log_px(vae, 40, temperatures=200)
    weight, bias = vae.decoder.out.weight.detach(), vae.decoder.out.bias.detach()
    pixels = torch.eye(len(bias)) * vae.likelihood.logvar.detach().exp()
    truth = torch.distributions.MultivariateNormal(bias, weight @ weight.T + pixels)
    for bound, sign in ((both.lower, 1), (both.upper, -1)):
        off = sign * (bound - truth.log_prob(both.x))
        assert off.mean() < 3 * off.std() / math.sqrt(40)
    assert (both.upper - both.lower).mean() < 0.1


def test_the_card_tells_how_far_annealing_can_be_from_the_truth(monkeypatch):
    for name in ("annealed_log_px", "sandwich_log_px"):
        short = functools.partial(getattr(ais, name), temperatures=30)
        monkeypatch.setattr(card_module, name, short)
    monkeypatch.setattr(proposals, "_POINTS", 64)
    torch.manual_seed(0)
    vae, x = VAE((PIXELS,), 2, 8), torch.rand(12, PIXELS).round()
    few = {"num_samples": 20, "fit_samples": 20, "fit_images": 1, "exact": False}
    card = evaluate_model(vae, x, ais=5, **few)
    both = sandwich_log_px(vae, 5, temperatures=30)
    assert card["ais_width"]["value"] == pytest.approx((both.upper - both.lower).mean().item())
    assert card["ais_width"]["num_images"] == card["log_px_ais"]["num_images"] == 5
    width, error = (card["ais_width"][key] for key in ("value", "standard_error"))
    width = f"annealing is at most {width:.2f} ± {error:.2f} nats"
    assert any(width in sentence for sentence in card["verdict"])


def test_what_annealing_cannot_do_is_refused(small_vae):
    x = torch.rand(2, 784)
    with pytest.raises(ValueError, match="temperatures=0"):
        annealed_log_px(small_vae, x, temperatures=0)

    class Rounded(nn.Module):
        def log_prob(self, x, logits):
            return -(x - logits.detach().round()).abs().sum(-1)

    small_vae.likelihood = Rounded()
    with pytest.raises(ValueError, match=r"eval\.ais: likelihood Rounded has no gradient"):
        evaluate_model(small_vae, x, ais=1)  # before any work
    with pytest.raises(ConfigError, match="a likelihood that cannot sample"):
        sandwich_log_px(small_vae, 2)
