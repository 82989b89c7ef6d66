"""Contracts of the estimators, each against a value that is known another way."""

import copy
import importlib
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal
from torch.utils.data import DataLoader, TensorDataset

from tests.command_lines import run_script
from tests.rough import hardly_fitted
from vae_torch import (
    VAE,
    ObjectiveConfig,
    evaluate_model,
    mnist_loaders,
    quadrature,
    train,
)
from vae_torch.config import ConfigError, EvalConfig, EvaluateConfig
from vae_torch.evaluate import (
    aggregate_kl,
    bound_metrics,
    evaluate_images,
    fit_posterior,
    importance_log_px,
    posterior_elbo,
    verdict,
)
from vae_torch.evaluation import proposals
from vae_torch.evaluation.figures import Figures
from vae_torch.evaluation.latents import put_latents
from vae_torch.images import Batch
from vae_torch.parts.likelihoods import likelihoods
from vae_torch.parts.priors import Mixture
from vae_torch.quadrature import QuadratureError, exact_log_px

PIXELS = 6


def linear_gaussian(
    latent_dim: int, *, orthogonal: bool = True, variance: float = 0.3, images: int = 40
) -> tuple[VAE, torch.Tensor]:
    """p(z) = N(0, I), p(x|z) = N(W z + b, s² I), with the true posterior as encoder.

    With orthogonal columns of W the posterior is diagonal: mean Wᵀ(x - b) / (|w|² + s²) and
    variance s² / (|w|² + s²) in each dimension.
    """
    torch.manual_seed(0)
    vae = VAE((PIXELS,), latent_dim, 4, likelihood="gaussian").double()
    vae.likelihood.logvar.data.fill_(math.log(variance))
    weight, bias = torch.randn(PIXELS, latent_dim).double(), torch.randn(PIXELS).double()
    if orthogonal:
        weight = 1.2 * torch.linalg.qr(weight)[0]
    out = nn.Linear(latent_dim, PIXELS).double()
    out.weight.data, out.bias.data = weight, bias
    vae.decoder.trunk, vae.decoder.out = nn.Identity(), out

    precision = 1.2**2 + variance
    vae.encoder.trunk = nn.Identity()
    vae.posterior.mean = nn.Linear(PIXELS, latent_dim).double()
    vae.posterior.mean.weight.data = weight.T / precision
    vae.posterior.mean.bias.data = -(weight.T @ bias) / precision
    vae.posterior.logvar = nn.Linear(PIXELS, latent_dim).double()
    vae.posterior.logvar.weight.data.zero_()
    vae.posterior.logvar.bias.data.fill_(math.log(variance / precision))
    covariance = weight @ weight.T + variance * torch.eye(PIXELS).double()
    x = MultivariateNormal(bias, covariance).sample((images,))
    vae.true_log_px = MultivariateNormal(bias, covariance).log_prob(x)
    return vae, x


@pytest.fixture(scope="module")
def trained(made_up_root):
    train_loader, test_loader = mnist_loaders(made_up_root, name="fashion_mnist", batch_size=50)
    torch.manual_seed(0)
    vae = VAE((784,), 2, 32)
    train(vae, train_loader, test_loader, epochs=10)
    return vae, train_loader, test_loader


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_integral_equals_the_closed_form(latent_dim, orthogonal):
    vae, x = linear_gaussian(latent_dim, orthogonal=orthogonal)
    result = exact_log_px(vae, x)
    torch.testing.assert_close(result.log_px, vae.true_log_px, atol=1e-3, rtol=0)
    assert result.residual < 0.01


@pytest.mark.parametrize("variance", [1e-2, 1e-4, 1e-6])
def test_integral_finds_posteriors_however_narrow(variance):
    """A mode 1/1000 wide in a plane 16 wide: an even grid that fine would have 10^8 points."""
    vae, x = linear_gaussian(2, variance=variance, images=10)
    result = exact_log_px(vae, x, tolerance=1e-3)
    torch.testing.assert_close(result.log_px, vae.true_log_px, atol=2e-3, rtol=0)
    assert result.residual < 1e-3


def test_integral_finds_what_the_encoder_does_not_know_of():
    """The encoder claims the prior for every image: only the decoder shows where the mass is."""
    vae, x = linear_gaussian(2, variance=1e-2)
    vae.posterior.mean.weight.data.zero_()
    vae.posterior.mean.bias.data.zero_()
    vae.posterior.logvar.bias.data.zero_()
    result = exact_log_px(vae, x, tolerance=1e-3)
    torch.testing.assert_close(result.log_px, vae.true_log_px, atol=2e-3, rtol=0)


@pytest.mark.parametrize(("place", "deviation"), [(12.0, 0.3), (8.0, 0.15), (40.0, 2.0)])
def test_integral_finds_a_far_mode_of_the_prior(place, deviation):
    """p(z) = ½ N(0, 0.3²) + ½ N(place, deviation²) in the first of two dimensions."""
    vae, _ = linear_gaussian(2)
    prior = Mixture(2, components=2).double()
    prior.means.data = torch.tensor([[0.0, 0.0], [place, 0.0]]).double()
    prior.logvars.data = torch.tensor([[0.3, 0.3], [deviation, deviation]]).double().log() * 2
    vae.prior = prior
    weight, bias = vae.decoder.out.weight.data, vae.decoder.out.bias.data
    noise = vae.likelihood.logvar.exp().item() * torch.eye(PIXELS).double()
    parts = [
        MultivariateNormal(weight @ mean + bias, s**2 * weight @ weight.T + noise)
        for mean, s in zip(prior.means.data, (0.3, deviation), strict=True)
    ]
    x = torch.cat([part.sample((10,)) for part in parts])
    densities = torch.stack([part.log_prob(x) for part in parts])
    expected = densities.logsumexp(0) - math.log(2)
    torch.testing.assert_close(exact_log_px(vae, x).log_px, expected, atol=0.01, rtol=0)


def test_integral_reports_how_far_it_moved():
    vae, x = linear_gaussian(2, variance=1e-2)
    rough, fine = (exact_log_px(vae, x, tolerance=tolerance) for tolerance in (1.0, 1e-3))
    assert 0 < fine.residual < 1e-3 < rough.residual < 1
    for result in (rough, fine):  # the residual bounds the error
        assert (result.log_px.mean() - vae.true_log_px.mean()).abs() < result.residual


def test_a_proposal_replaces_the_encoder():
    vae, x = linear_gaussian(2)
    mean, logvar = (part.detach() for part in vae.encode(x))
    vae.posterior.mean.bias.data += 5
    result = importance_log_px(vae, x, num_samples=3, proposal=(mean, logvar))
    torch.testing.assert_close(result.log_px, vae.true_log_px, atol=1e-9, rtol=0)


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_importance_sampling_from_the_true_posterior_is_exact(latent_dim):
    """All weights are equal then, so a single sample has no error."""
    vae, x = linear_gaussian(latent_dim)
    result = importance_log_px(vae, x, num_samples=7)
    torch.testing.assert_close(result.log_px, vae.true_log_px, atol=1e-9, rtol=0)
    torch.testing.assert_close(result.effective_samples, torch.full((40,), 7.0).double())


def test_importance_sampling_from_a_wrong_posterior_converges():
    vae, x = linear_gaussian(2)
    vae.posterior.mean.bias.data += 0.3
    vae.posterior.logvar.bias.data += 0.8
    result = importance_log_px(vae, x, num_samples=20_000)
    torch.testing.assert_close(result.log_px, vae.true_log_px, atol=0.03, rtol=0)
    assert (result.effective_samples < 15_000).all()
    assert (result.effective_samples > 1_000).all()


def test_importance_sampling_agrees_with_the_integral_on_a_trained_model(trained):
    vae, _, test_loader = trained
    x = torch.cat([x for x, _ in test_loader])[:30]
    exact = exact_log_px(vae, x)
    seeds = torch.stack([importance_log_px(vae, x, num_samples=500, seed=s)[0] for s in range(8)])
    error = seeds.mean(1).std() / math.sqrt(8)
    # in expectation it is below the truth, by half its variance: a hundredth of a nat here
    off = seeds.mean() - exact.log_px.mean()
    assert -3 * error - 0.02 - exact.residual < off < 3 * error + exact.residual


def test_bounds_are_ordered(trained):
    vae, _, test_loader = trained
    x = torch.cat([x for x, _ in test_loader])
    means = [
        torch.stack(
            [importance_log_px(vae, x, num_samples=k, seed=s).log_px.mean() for s in range(4)]
        )
        for k in (1, 5, 50)
    ]
    exact = exact_log_px(vae, x).log_px.mean()
    for low, high in zip(means, [*means[1:], exact.expand(4)], strict=True):
        error = (low.var() / 4 + high.var() / 4).sqrt()
        assert low.mean() < high.mean() + 3 * error
    assert means[0].mean() < exact - 0.1


@pytest.mark.parametrize("prior", ["mixture", "vamp"])
def test_integral_and_sampling_agree_under_learned_priors(prior):
    torch.manual_seed(3)
    vae = VAE((PIXELS,), 2, 8, prior=prior, prior_components=4).double()
    vae.posterior.logvar.bias.data += 2  # an untrained posterior must cover the mixture's modes
    x = torch.rand(10, PIXELS).double()
    exact = exact_log_px(vae, x).log_px
    sampled = importance_log_px(vae, x, num_samples=20_000).log_px
    torch.testing.assert_close(sampled, exact, atol=0.05, rtol=0)


@pytest.mark.parametrize("chunk", [1, 13, 64, 100_000])
def test_chunks_change_nothing(small_vae, chunk):
    x = torch.rand(5, 784)
    expected = importance_log_px(small_vae, x, num_samples=64, chunk=5000)
    got = importance_log_px(small_vae, x, num_samples=64, chunk=chunk)
    torch.testing.assert_close(got.log_px, expected.log_px, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.effective_samples, expected.effective_samples, rtol=1e-3, atol=0)
    other = importance_log_px(small_vae, x, num_samples=64, seed=1)
    assert not torch.equal(other.log_px, expected.log_px)


def test_an_image_counts_the_same_among_others(small_vae):
    x = torch.rand(6, 784)
    alone = importance_log_px(small_vae, x[:2], num_samples=50).log_px
    among = importance_log_px(small_vae, x, num_samples=50).log_px[:2]
    torch.testing.assert_close(alone, among, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "likelihood",
    [
        "bernoulli",
        pytest.param("gaussian", marks=pytest.mark.slow),
        pytest.param("continuous_bernoulli", marks=pytest.mark.slow),
    ],
)
def test_a_posterior_is_fitted_to_one_image_too(likelihood):
    torch.manual_seed(0)
    vae = VAE((PIXELS,), 2, 8, likelihood=likelihood).double()
    vae.posterior.mean.bias.data += 1.0
    x = torch.rand(3, PIXELS).double()
    together = posterior_elbo(vae, x, *fit_posterior(vae, x))
    for i in range(2):
        alone = posterior_elbo(vae, x[i : i + 1], *fit_posterior(vae, x[i : i + 1]))
        assert alone.item() == pytest.approx(together[i].item(), abs=0.05)


@pytest.mark.usefixtures("rough")
def test_the_card_of_one_image_claims_nothing_about_many(trained):
    vae, _, test_loader = trained
    x, labels = next(iter(test_loader))
    loader = DataLoader(TensorDataset(x[:1], labels[:1]))
    card = evaluate_model(vae, loader, num_samples=20, fit_images=1)
    assert card["log_px"]["standard_error"] is None
    assert "active_units" not in card
    assert not any("collapsed" in sentence for sentence in card["verdict"])
    json.dumps(card, allow_nan=False)


def test_fitted_posterior_closes_the_gap_of_a_bad_encoder():
    vae, x = linear_gaussian(2)
    vae.posterior.mean.bias.data += 1.0
    vae.posterior.logvar.bias.data += 1.0
    best = posterior_elbo(vae, x, *fit_posterior(vae, x, steps=400))
    assert ((vae.true_log_px - best).abs() < 0.02).all()  # the family holds the true posterior
    assert not any(p.grad is not None and p.grad.any() for p in vae.parameters())


@pytest.mark.usefixtures("few_points")
def test_gaps_of_a_bad_encoder_equal_their_closed_form():
    """The true posteriors are Gaussian: all of the gap is KL(q(z|x) || p(z|x)), amortisation."""
    vae, x = linear_gaussian(2)
    mean, logvar = (part.detach() for part in vae.encode(x))
    true = torch.distributions.Normal(mean, torch.exp(logvar / 2))
    vae.posterior.mean.bias.data += 0.4
    vae.posterior.logvar.bias.data += 0.5
    mean, logvar = (part.detach() for part in vae.encode(x))
    q = torch.distributions.Normal(mean, torch.exp(logvar / 2))
    expected = torch.distributions.kl_divergence(q, true).sum(-1).mean().item()
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=8)
    card = evaluate_model(vae, loader, num_samples=2, fit_images=len(x))
    assert card["approximation_gap"]["value"] == pytest.approx(0, abs=0.01)
    # log-weights have a deviation of 1.9 nats; 40 images, a thousand samples each: 4 errors
    assert card["amortisation_gap"]["value"] == pytest.approx(expected, abs=0.04)
    assert card["fitted_gap"]["value"] == pytest.approx(expected, abs=0.04)
    error = card["gap"]["standard_error"]  # of one sample an image
    assert card["gap"]["value"] == pytest.approx(expected, abs=4 * error)


@pytest.mark.parametrize("latent_dim", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_figures_that_are_subtracted_are_of_the_same_images(latent_dim, monkeypatch, few_points):
    del few_points
    vae, x = linear_gaussian(latent_dim)
    vae.posterior.mean.bias.data += 0.4
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=8)
    card, per_image = evaluate_images(vae, loader, num_samples=50, fit_images=7)
    value = {name: entry["value"] for name, entry in card.items() if name != "verdict"}
    log_px = "log_px_exact" if latent_dim == 2 else "log_px"
    assert value["gap"] == pytest.approx(value[log_px] - value["elbo"], abs=1e-9)
    assert value["fitted_gap"] == pytest.approx(
        value["approximation_gap"] + value["amortisation_gap"], abs=1e-9
    )
    parts = ("fitted_gap", "approximation_gap", "amortisation_gap")
    assert [card[name]["num_images"] for name in parts] == [7, 7, 7]
    assert card["gap"]["num_images"] == card["elbo"]["num_images"] == 40
    fitted = per_image["fitted_gap"].isfinite()
    assert fitted.sum() == 7
    assert torch.equal(fitted, per_image["amortisation_gap"].isfinite())
    assert not fitted[:7].all()  # drawn from all images
    # log p(x) - elbo of these, by the closed form: KL(q(z|x) || p(z|x)) = 0.4² / (2 s²) a dimension
    posterior_variance = 0.3 / (1.2**2 + 0.3)
    expected = latent_dim * 0.4**2 / posterior_variance / 2
    assert value["fitted_gap"] == pytest.approx(expected, abs=0.1)
    for name, values in per_image.items():
        if name not in value:  # the gap's diagnostics
            continue
        assert values.shape == (40,)
        assert values.nanmean().item() == pytest.approx(value[name], rel=1e-9)
    if latent_dim == 2:
        hardly_fitted(monkeypatch.setattr)  # the gap is of the integral; a seed chooses the fits
    again = evaluate_images(vae, loader, num_samples=50, fit_images=7).per_image
    assert torch.equal(again["gap"], per_image["gap"])
    other = evaluate_images(vae, loader, num_samples=50, fit_images=7, seed=1).per_image
    assert not torch.equal(other["fitted_gap"].isfinite(), fitted)


@pytest.mark.usefixtures("rough")
def test_the_training_bound_has_an_error_and_a_count(trained):
    vae, train_loader, test_loader = trained
    few = next(iter(test_loader))[0][:10]
    card = evaluate_model(
        vae, few, train_loader=train_loader, num_samples=2, fit_images=2, exact=False
    )
    entry = card["train_elbo"]
    x = torch.cat([x for x, _ in train_loader])
    with torch.no_grad():
        mean, logvar = vae.encode(x)
        q = torch.distributions.Normal(mean, torch.exp(logvar / 2))
        z = q.sample()
        prior = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
        kl = torch.distributions.kl_divergence(q, prior).sum(-1)
        pixels = torch.distributions.Bernoulli(logits=vae.decode(z), validate_args=False)
        elbos = (pixels.log_prob(x).sum(-1) - kl).double()
    error = elbos.std().item() / math.sqrt(600)
    assert entry["num_images"] == 600
    assert entry["standard_error"] == pytest.approx(error, rel=0.1)
    assert entry["value"] == pytest.approx(elbos.mean().item(), abs=2 * error)
    assert [len(card["kl_per_dim"][key]) for key in ("value", "standard_error")] == [2, 2]


@pytest.mark.usefixtures("rough")
@pytest.mark.parametrize("exact", [None, True])
def test_an_integral_that_fails_loses_nothing_else(trained, monkeypatch, exact):
    vae, _, test_loader = trained
    few = next(iter(test_loader))[0][:10]

    def fails(*_, **__):
        raise QuadratureError("squares of 2e-06 are still too large")

    whole = evaluate_model(vae, few, num_samples=5, fit_images=2, exact=False)
    monkeypatch.setattr("vae_torch.evaluation.card.exact_log_px", fails)
    card = evaluate_model(vae, few, num_samples=5, fit_images=2, exact=exact)
    assert card["verdict"][0].startswith("log_px_exact is left out: squares of 2e-06")
    assert "log_px_exact" not in card
    del card["verdict"], whole["verdict"]
    assert card == whole


@pytest.mark.usefixtures("rough")
def test_an_extreme_encoder_gets_a_card(trained):
    vae, _, test_loader = trained
    vae = copy.deepcopy(vae)
    vae.posterior.logvar.bias.data.fill_(-40)
    x, labels = next(iter(test_loader))
    loader = DataLoader(TensorDataset(x[:10], labels[:10]))
    card = evaluate_model(vae, loader, num_samples=5, fit_images=2)
    json.dumps(card, allow_nan=False)
    assert card["mutual_information"]["value"] == pytest.approx(math.log(10), abs=1e-4)


@pytest.mark.usefixtures("few_points")
def test_the_encoders_estimate_is_called_low_where_it_is(trained):
    vae, _, test_loader = trained
    x, labels = next(iter(test_loader))
    loader = DataLoader(TensorDataset(x[:10], labels[:10]))
    few = evaluate_model(vae, loader, num_samples=10, fit_images=1, exact=False)["verdict"]
    assert any("10 samples per image, too few" in sentence for sentence in few)
    vae = copy.deepcopy(vae)
    vae.posterior.logvar.bias.data -= 3  # the encoder misses most of the posterior
    poor = evaluate_model(vae, loader, num_samples=200, fit_images=1)
    assert any("log_px_encoder, the estimate that papers" in said for said in poor["verdict"])
    off = [
        poor["log_px_exact"]["value"] - poor[name]["value"] for name in ("log_px", "log_px_encoder")
    ]
    assert abs(off[0]) < 0.02
    assert off[1] > 0.1


def made_up_card(**figures):
    """name=(value, standard error)"""
    given = {
        "active_units": (2, None), "elbo": (-100.0, 0.5), "train_elbo": (-99.0, 0.5),
        "kl_per_dim": ([1.0, 1.0], None), "effective_samples": (90.0, 1.0), "log_px": (-95.0, 0.5),
        "fitted_gap": (4.0, 0.3), "approximation_gap": (1.0, 0.2), "amortisation_gap": (3.0, 0.2),
    } | figures  # fmt: skip
    card = {
        name: {"value": value, "standard_error": error, "num_images": 100}
        for name, (value, error) in given.items()
    }
    card["active_units"]["variance_per_dim"] = [1.0, 1.0]
    card["effective_samples"]["share_below_10"] = 0.0
    if "train_log_px" in card:
        card["train_log_px"]["exact"] = False
    pair = [card[name] for name in ("approximation_gap", "amortisation_gap")]
    error = math.hypot(*(entry["standard_error"] for entry in pair))
    difference = pair[0]["value"] - pair[1]["value"]
    pair[0]["above"] = {"amortisation_gap": [difference, error]}
    return card


@pytest.mark.parametrize(("model", "encoder"), [(0.0, 4.1), (4.1, 0.0), (2.0, 2.0), (0.2, 0.1)])
def test_a_verdict_separates_overfitting_of_the_model_and_of_the_encoder(model, encoder):
    card = made_up_card(
        train_elbo=(-100 + model + encoder, 0.2), train_log_px=(-95 + model, 0.3),
        gap=(5.0, 0.1), train_gap=(5.0 - encoder, 0.1), fitted_gap=(0.0, 0.1),
    )  # fmt: skip
    said = " ".join(verdict(card, 1000))
    assert ("the model overfits" in said) == (model > 1)
    assert ("the encoder does not generalise" in said) == (encoder > 1)
    assert ("while log p(x) is" in said) == (encoder > 1 > model)


def test_a_verdict_claims_no_more_than_its_errors_allow():
    (said,) = verdict(made_up_card(), 1000)
    assert said.startswith("Most of the bound's gap of 4.0 nats (100 images) is the amortisation")
    level = {"approximation_gap": (2.1, 0.4), "amortisation_gap": (1.9, 0.4)}
    (said,) = verdict(made_up_card(**level), 1000)
    assert "Neither part" in said
    assert "overfits" not in said
    for error, claims in ((0.5, True), (9.0, False), (None, False)):
        card = made_up_card(train_elbo=(-95.0, error), fitted_gap=(0.0, 0.1))
        card["train_elbo"]["num_images"] = 60_000
        said = verdict(card, 1000)
        assert bool(said) == claims, said
        if claims:  # the error: sqrt(0.5² + 0.5²)
            assert "60,000 training images is 5.0 ± 0.7 nats better than that of the 100" in said[0]


@pytest.mark.usefixtures("rough")
@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_a_sigma_that_is_far_from_the_residual_is_reported_with_what_it_costs(ratio):
    vae, x = linear_gaussian(2)
    vae.posterior.logvar.bias.data.fill_(-40)  # each z is the mean
    centre = vae.decode(vae.encode(x).mean).detach()
    residual = (x - centre).square().mean().sqrt()
    vae.likelihood.logvar.data.fill_(2 * math.log(ratio * residual))
    card = evaluate_model(vae, [x], num_samples=2, fit_samples=2, fit_images=1, exact=False)
    assert card["residual"]["value"] == pytest.approx(residual.item(), rel=1e-5)
    assert card["residual"]["sigma"] == pytest.approx(ratio * residual.item(), rel=1e-5)
    best, now = (
        torch.distributions.Normal(centre, sigma).log_prob(x).sum(1).mean()
        for sigma in (residual, ratio * residual)
    )
    said = [sentence for sentence in card["verdict"] if "The Gaussian's sigma" in sentence]
    assert len(said) == (ratio != 1)
    assert all(f"that costs {best - now:.1f} nats" in sentence for sentence in said)


@pytest.mark.usefixtures("rough")
def test_a_floor_for_bernoulli_decoders_is_on_no_other_card():
    vae, x = linear_gaussian(2)
    loader = DataLoader(TensorDataset(x.sigmoid(), torch.zeros(len(x))))
    assert "entropy_floor" not in evaluate_model(vae, loader, num_samples=2, fit_images=1)


@pytest.fixture(scope="module")
def run_of_the_script(made_up_root, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    settings = ("data=fashion_mnist", f"data.root={made_up_root}", "model.intermediate_dim=16")
    more = (
        *("train.epochs=1", "train.figure_every=0", "threads=1", "data.limit_train=30"),
        f"hydra.run.dir={run_dir}",
    )
    assert run_script("train.py", *settings, *more).returncode == 0
    return run_dir


@pytest.fixture
def script(processor_stays, rough):
    """Run the command in this process."""
    del processor_stays, rough
    return importlib.import_module("vae_torch.cli.evaluate")


def asked(run_dir, **settings):
    few = {"num_samples": 20, "fit_samples": 20, "fit_images": 5}
    settings = few | {"chunk": 1024, "seed": 0, "checkpoint": "last"} | settings
    return EvaluateConfig(str(run_dir), "cpu", None, EvalConfig(**settings))


def test_a_larger_card_is_kept(run_of_the_script, script, capsys):
    path = run_of_the_script / "evaluation.json"
    path.unlink(missing_ok=True)
    script.evaluate_run(asked(run_of_the_script, limit=8))
    kept = path.read_bytes()
    smaller = {
        "7 images": {"limit": 7},
        "19 importance samples": {"limit": 8, "num_samples": 19},
        "4 fitted images": {"fit_images": 4},
        "no log_px_exact": {"limit": 8, "exact": False},
    }
    for words, settings in smaller.items():
        with pytest.raises(ConfigError, match=f"this one would have {words}.*eval.overwrite=true"):
            script.evaluate_run(asked(run_of_the_script, **settings))
        assert path.read_bytes() == kept
    capsys.readouterr()
    script.evaluate_run(asked(run_of_the_script, limit=9))
    assert "in place of a card of checkpoint last: 8 images" in capsys.readouterr().out
    script.evaluate_run(asked(run_of_the_script, limit=6, overwrite=True))
    assert json.loads(path.read_text())["elbo"]["num_images"] == 6
    # the checkpoint has changed: no card describes it
    card = json.loads(path.read_text())
    card["checkpoint"]["sha256"] = "0" * 64
    path.write_text(json.dumps(card))
    script.evaluate_run(asked(run_of_the_script, limit=5))
    assert json.loads(path.read_text())["elbo"]["num_images"] == 5
    path.write_text("{")
    script.evaluate_run(asked(run_of_the_script, limit=5))
    assert "in place of a damaged one" in capsys.readouterr().out


def test_the_printed_card_has_counts_and_fits_a_terminal(run_of_the_script, script, capsys):
    config = asked(run_of_the_script, limit=30, num_samples=1000, overwrite=True)
    script.evaluate_run(config)
    said = capsys.readouterr().out
    first, *lines = said.partition("\nwritten to")[0].splitlines()
    assert first.startswith("log p(x) of 30 images, 1,000 samples each: ")
    assert max(map(len, lines)) <= 100
    card = json.loads((run_of_the_script / "evaluation.json").read_text())
    stored = np.load(run_of_the_script / "evaluation.npz")
    assert {"elbo", "log_px", "log_px_exact", "log_px_encoder", "pareto_k"} <= set(stored.files)
    assert all(stored[name].shape == (30,) for name in stored.files)
    printed = {line.split()[0]: line for line in lines if line and line[0] not in "± -"}
    for name, entry in card.items():
        if "value" in entry and name != "kl_per_dim":
            count = f"{entry['num_images']:,}"
            some = entry.get("estimated_images")
            words = f" {some} / {count} " if some else f" {count} images"
            assert words in printed[name]
            if name in stored.files:
                assert np.nanmean(stored[name]) == pytest.approx(entry["value"], rel=1e-9)
            assert script._MEANINGS.keys() >= {name} - {"gap"}
    for name, count in (("train_elbo", 30), ("elbo", 30), ("gap", 30), ("fitted_gap", 5)):
        assert f" {count} images" in printed[name]
    # all values end in one column
    column = printed["elbo"].index(f"{card['elbo']['value']:.3f}") + 8
    kl = max(card["kl_per_dim"]["value"])
    assert printed["kl_per_dim"][:column].endswith(f"{kl:.3f}")


def test_the_integral_is_computed_once(run_of_the_script, script, monkeypatch):
    calls = []

    def counted(vae, x, **options):
        calls.append(len(x))
        return exact_log_px(vae, x, **options)

    for module in ("vae_torch.evaluation.card", "vae_torch.quadrature"):
        monkeypatch.setattr(f"{module}.exact_log_px", counted)
    script.evaluate_run(asked(run_of_the_script, limit=15, overwrite=True))
    assert calls == [15, 10]  # the test images, and some training images
    assert (run_of_the_script / "figures" / "log_px.png").exists()


@pytest.mark.parametrize("information", [6.0, 8.0])
def test_mutual_information_of_a_known_channel_lies_between_its_bounds(information):
    """x ~ N(0, I), q(z|x) = N(a x, s²) with a² + s² = 1, so that q(z) = p(z) and I = -D log s."""
    vae = VAE((8,), 8, 4, likelihood="gaussian").double()
    s = math.exp(-information / 8)
    vae.encoder.trunk = nn.Identity()
    vae.posterior.mean, vae.posterior.logvar = nn.Linear(8, 8).double(), nn.Linear(8, 8).double()
    for layer, bias in ((vae.posterior.mean, 0.0), (vae.posterior.logvar, 2 * math.log(s))):
        layer.weight.data.zero_()
        layer.bias.data.fill_(bias)
    vae.posterior.mean.weight.data = math.sqrt(1 - s**2) * torch.eye(8).double()
    generator = torch.Generator().manual_seed(0)
    card = Figures(2000, 0)
    x = torch.randn(2000, 8, generator=generator).double()
    put_latents(card, vae, Batch(x), None)
    value = {name: entry["value"] for name, entry in card.figures.items()}
    error = {name: entry["standard_error"] for name, entry in card.figures.items()}
    assert value["mutual_information"] < information - 0.1
    slack = 4 * error["mutual_information_upper"]
    assert information - slack < value["mutual_information_upper"] < 1.2 * information
    assert value["marginal_kl"] > 0.1
    assert value["marginal_kl_lower"] < slack
    parts = value["mutual_information"] + value["marginal_kl"]
    assert parts == pytest.approx(
        value["mutual_information_upper"] + value["marginal_kl_lower"], rel=1e-9
    )


def test_aggregate_kl_of_known_posteriors():
    vae, x = linear_gaussian(2)
    # all posteriors the prior: no information, no distance
    for layer in (vae.posterior.mean, vae.posterior.logvar):
        layer.weight.data.zero_()
        layer.bias.data.zero_()
    information, marginal = aggregate_kl(vae, x)
    torch.testing.assert_close(information, torch.zeros(40).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(marginal, torch.zeros(40).double(), atol=1e-9, rtol=0)
    # far apart: z tells which of the 40 images it came from
    vae.posterior.mean.weight.data = 1e3 * torch.randn(2, PIXELS).double()
    information, _ = aggregate_kl(vae, x)
    assert information.mean().item() == pytest.approx(math.log(40), abs=1e-3)


@pytest.mark.usefixtures("rough")
def test_parts_of_the_aggregate_kl_sum_to_the_kl(trained):
    vae, _, test_loader = trained
    card = card_of(vae, test_loader, exact=False)
    x = torch.cat([x for x, _ in test_loader])
    sums = torch.stack([torch.stack(aggregate_kl(vae, x, seed=s)).sum(0).mean() for s in range(8)])
    error = sums.std().item() / math.sqrt(8)
    assert sums.mean().item() == pytest.approx(card["kl"]["value"], abs=4 * error)


@pytest.mark.usefixtures("few_points")
def test_card_adds_up_and_says_what_it_is(trained):
    vae, train_loader, test_loader = trained
    test_loader = list(test_loader)[:1]
    card = evaluate_model(
        vae,
        test_loader,
        train_loader=list(train_loader)[:4],
        num_samples=200,
        fit_samples=200,
        fit_images=5,
    )
    value = {name: entry["value"] for name, entry in card.items() if name != "verdict"}
    assert sum(value["kl_per_dim"]) == pytest.approx(value["kl"], rel=1e-4)
    assert value["elbo"] < value["log_px"] < value["log_px_exact"] + 0.02
    assert value["reconstruction"] < value["entropy_floor"]
    assert "log p(x)" not in card["log_px"]["definition"]
    assert card["log_px"]["definition"].startswith("the score by importance sampling")
    x = torch.cat([x for x, _ in test_loader])
    means = torch.cat([vae.encode(image[None])[0] for image in x]).detach()
    assert value["active_units"] == sum(means.var(0) > 0.01)
    assert value["linear_probe_accuracy"] > 0.4  # ten classes of bars
    assert value["knn_accuracy"] > 0.4
    for name, entry in card.items():
        if name != "verdict":
            keys = {"value", "standard_error", "unit", "definition", "num_samples", "seed"}
            assert keys <= entry.keys(), name
    p = x.double().clamp(1e-12, 1 - 1e-12)
    entropy = torch.distributions.Bernoulli(p).entropy().sum(1)
    assert value["entropy_floor"] == pytest.approx(-entropy.mean().item(), rel=1e-5)
    exact = exact_log_px(vae, x).log_px
    error = exact.std().item() / math.sqrt(len(x))
    assert card["log_px_exact"]["standard_error"] == pytest.approx(error, rel=1e-6)
    assert card["train_elbo"]["num_images"] == 200
    assert any("the integral" in sentence for sentence in card["verdict"])
    assert "a score" in card["verdict"][-1]  # for grey pixels


def test_images_weigh_the_same_in_batches_of_any_size(trained):
    vae, _, test_loader = trained
    x = torch.cat([x for x, _ in test_loader])
    labels = torch.zeros(len(x))
    uneven = DataLoader(TensorDataset(x, labels), batch_size=len(x) - 3)
    whole = DataLoader(TensorDataset(x, labels), batch_size=len(x))
    metrics = [bound_metrics(vae, loader, ObjectiveConfig()) for loader in (uneven, whole)]
    assert metrics[0]["kl"] == pytest.approx(metrics[1]["kl"], rel=1e-6)
    assert sum(metrics[0]["kl_per_dim"]) == pytest.approx(metrics[1]["kl"], rel=1e-6)


@pytest.mark.usefixtures("rough")
@pytest.mark.parametrize("collapsed", [False, True])
def test_a_learned_priors_scale_is_no_collapse(collapsed):
    """Latents in units so small that Burda's 0.01 would call all of them inactive."""
    vae, x = linear_gaussian(2)
    vae.prior = Mixture(2, components=1).double()
    with torch.no_grad():
        vae.prior.means.zero_()
        vae.prior.logvars.fill_(2 * math.log(0.05))
        vae.decoder.out.weight /= 0.05
        vae.posterior.mean.weight *= 0 if collapsed else 0.05
        vae.posterior.mean.bias *= 0 if collapsed else 0.05
        vae.posterior.logvar.bias += 2 * math.log(0.05)
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=len(x))
    card = evaluate_model(vae, loader, num_samples=100, fit_images=2)
    assert card["active_units"]["value"] == 0
    assert any("has collapsed" in sentence for sentence in card["verdict"]) == collapsed


@pytest.mark.usefixtures("rough")
def test_verdict_names_a_collapse():
    torch.manual_seed(0)
    vae = VAE((PIXELS,), 2, 4)
    for layer in (vae.posterior.mean, vae.posterior.logvar):
        layer.weight.data.zero_()
    data = TensorDataset(torch.rand(30, PIXELS), torch.zeros(30, dtype=torch.long))
    card = evaluate_model(vae, DataLoader(data, 10), num_samples=3, fit_images=2)
    assert card["active_units"]["value"] == 0
    assert "collapsed" in card["verdict"][0]
    assert "free_bits" in card["verdict"][0]


def test_what_cannot_be_estimated_is_refused(small_vae):
    x = torch.rand(2, 784)
    with pytest.raises(ValueError, match="latent_dim is 3"):
        exact_log_px(VAE(latent_dim=3, intermediate_dim=4), x)
    with pytest.raises(ValueError, match="num_samples=0"):
        importance_log_px(small_vae, x, num_samples=0)


@pytest.mark.parametrize("logvar", [-80.0, -40.0, -20.0, 8.0, 12.0, 20.0, 200.0])
@pytest.mark.parametrize(("latent_dim", "variance"), [(1, 0.3), (2, 0.3), (2, 1e-2)])
def test_the_integral_does_not_depend_on_what_the_encoder_says(logvar, latent_dim, variance):
    vae, x = linear_gaussian(latent_dim, variance=variance, images=8)
    usual = exact_log_px(vae, x)
    vae.posterior.logvar.bias.data.fill_(logvar)
    result = exact_log_px(vae, x)
    torch.testing.assert_close(result.log_px, vae.true_log_px, atol=2e-3, rtol=0)
    assert result.squares < 10 * usual.squares + 100


@pytest.mark.parametrize("dims", [(-40.0, 12.0), (20.0, -40.0)])
def test_the_integral_bears_posteriors_that_are_needles(dims):
    vae, x = linear_gaussian(2)
    vae.posterior.logvar.bias.data = torch.tensor(dims).double()
    result = exact_log_px(vae, x)
    torch.testing.assert_close(result.log_px, vae.true_log_px, atol=1e-3, rtol=0)
    assert result.squares < 5000


@pytest.mark.parametrize("factor", [1e2, 1e6])
def test_the_integral_bears_posteriors_that_are_far_away(factor):
    vae, x = linear_gaussian(2)
    vae.posterior.mean.weight.data *= factor
    result = exact_log_px(vae, x)
    torch.testing.assert_close(result.log_px, vae.true_log_px, atol=2e-3, rtol=0)
    assert result.squares < 500


class TwoBumps(nn.Module):
    """A decoder of one pixel: p(x=1|z) is the mean of two Gaussian bumps."""

    def __init__(self, centers, deviation):
        super().__init__()
        self.centers, self.deviation = centers, deviation

    def forward(self, z):
        squares = ((z.unsqueeze(-2) - self.centers) ** 2).sum(-1)
        log_p = (-squares / (2 * self.deviation**2) - math.log(2)).logsumexp(-1)
        return (log_p - torch.log(-torch.expm1(log_p))).unsqueeze(-1)


@pytest.mark.parametrize("encoder", [(None, -40.0), (None, 20.0), (100.0, 0.0), (1e6, 0.0)])
@pytest.mark.parametrize(("latent_dim", "deviation"), [(1, 0.05), (1, 0.001), (2, 0.014)])
def test_the_error_of_the_integral_is_bounded_by_its_residual(latent_dim, deviation, encoder):
    """Two narrow modes at random places; the encoder knows one of them or none."""
    place, logvar = encoder
    for seed in range(3):
        centers = torch.rand(2, latent_dim, generator=torch.Generator().manual_seed(seed))
        centers = 4 * centers.double() - 2
        vae = VAE((1,), latent_dim, 4).double()
        vae.decoder = TwoBumps(centers, deviation)
        vae.posterior.mean.weight.data.zero_()
        mean = centers[1] / (1 + deviation**2) if place is None else torch.tensor([place])
        vae.posterior.mean.bias.data[:] = mean
        vae.posterior.logvar.weight.data.zero_()
        vae.posterior.logvar.bias.data.fill_(logvar)
        result = exact_log_px(vae, torch.ones(1, 1).double())
        wide = 1 + deviation**2
        masses = latent_dim * math.log(deviation) - 0.5 * latent_dim * math.log(wide)
        masses = masses - (centers**2).sum(1) / (2 * wide) - math.log(2)
        error = abs(result.log_px.item() - masses.logsumexp(0).item())
        assert error < result.residual + 1e-9
        assert result.residual < 0.02
        assert result.squares < 500


@pytest.mark.parametrize("logvar", [-40.0, 12.0])
@pytest.mark.parametrize("prior", [pytest.param("standard", marks=pytest.mark.slow), "mixture"])
def test_the_integral_in_single_precision_equals_a_fine_grid(logvar, prior):
    torch.manual_seed(0)
    vae = VAE((PIXELS,), 2, 8, prior=prior, prior_components=3, activation="tanh")
    vae.decoder.out.weight.data *= 6
    vae.posterior.logvar.weight.data.zero_()
    vae.posterior.logvar.bias.data.fill_(logvar)
    x = torch.rand(5, PIXELS)
    got = exact_log_px(vae, x)
    ticks = torch.linspace(-9, 9, 361).double()
    z = torch.cartesian_prod(ticks, ticks)
    double = vae.double()
    with torch.no_grad():
        log_pz = double.log_prior(z)
        pixels = torch.distributions.Bernoulli(logits=double.decode(z), validate_args=False)
        expected = [
            (pixels.log_prob(image).sum(-1) + log_pz).logsumexp(0) + 2 * math.log(18 / 360)
            for image in x.double()
        ]
    torch.testing.assert_close(got.log_px, torch.stack(expected), atol=1e-3, rtol=0)
    assert got.squares < 2000


def vamp_with_components_of(logvar):
    torch.manual_seed(0)
    vae = VAE((PIXELS,), 2, 8, prior="vamp", prior_components=4)
    vae.posterior.logvar.weight.data.zero_()
    vae.posterior.logvar.bias.data.fill_(logvar)
    return vae


def test_components_of_the_prior_may_be_wide():
    """p(z) is flat where p(x|z) is large, so log p(x) falls by the logarithm of its area."""
    x = torch.rand(1, PIXELS)
    usual, wide = (vamp_with_components_of(v) for v in (12.0, 20.0))
    for vae in (usual, wide):  # about log p(x|z) = -½ |z|² / 2 + a constant: a peak at 0
        vae.likelihood = likelihoods["gaussian"]()
        vae.decoder.trunk = nn.Identity()
        vae.decoder.out = nn.Linear(2, PIXELS)
        vae.decoder.out.weight.data = 0.5 * torch.linalg.qr(torch.randn(PIXELS, 2))[0]
        vae.decoder.out.bias.data.zero_()
    wide.decoder = usual.decoder
    found = [exact_log_px(vae, x) for vae in (usual, wide)]
    change = found[0].log_px - found[1].log_px
    torch.testing.assert_close(change, torch.full_like(change, 20.0 - 12.0), atol=0.01, rtol=0)
    assert max(r.squares for r in found) < 10_000


def card_of(vae, x, **options):
    return evaluate_model(vae, x, num_samples=5, fit_samples=5, fit_images=2, **options)


@pytest.mark.usefixtures("rough")
@pytest.mark.parametrize("exact", [True, None])
def test_a_card_leaves_out_an_integral_that_cannot_be_computed(exact):
    """Single precision has no numbers between a component's mean and its edge."""
    card = card_of(vamp_with_components_of(-40.0), torch.rand(5, PIXELS), exact=exact)
    assert "log_px_exact" not in card
    (sentence,) = (said for said in card["verdict"] if "log_px_exact is left out" in said)
    assert "too large" in sentence
    assert card["fitted_gap"]["value"] == pytest.approx(
        card["approximation_gap"]["value"] + card["amortisation_gap"]["value"], rel=1e-6
    )


def test_integrals_that_need_too_much_work_are_refused_before_it(monkeypatch):
    monkeypatch.setattr(quadrature, "_PAIRS", 1000)
    vae, x = linear_gaussian(2)
    with pytest.raises(QuadratureError, match=r"squares of .* for 40 images.*importance sampling"):
        exact_log_px(vae, x)


def test_an_integral_over_nan_is_refused():
    for part, words in (("encoder", "posteriors"), ("decoder", "model's weights")):
        vae, x = linear_gaussian(2)
        (vae.posterior.mean if part == "encoder" else vae.decoder.out).bias.data[0] = math.nan
        with pytest.raises(QuadratureError, match=words):
            exact_log_px(vae, x)
    vae, x = linear_gaussian(2)
    vae.posterior.mean.bias.data[0] = 1e200  # is not searched, and hides no other place
    torch.testing.assert_close(exact_log_px(vae, x).log_px, vae.true_log_px, atol=1e-3, rtol=0)


def test_the_integral_takes_a_prior_of_ones_own():
    vae, x = linear_gaussian(2)

    class Narrow(nn.Module):
        name = "narrow"

        def log_prob(self, z):
            return torch.distributions.Normal(0.0, 0.5).log_prob(z).sum(-1)

    vae.prior = Narrow()
    weight, bias = vae.decoder.out.weight.data, vae.decoder.out.bias.data
    covariance = 0.25 * weight @ weight.T + 0.3 * torch.eye(PIXELS).double()
    expected = MultivariateNormal(bias, covariance).log_prob(x)
    torch.testing.assert_close(exact_log_px(vae, x).log_px, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("value", [1.5, -0.5, 255.0, math.nan])
@pytest.mark.parametrize(
    "call",
    [
        lambda vae, x: importance_log_px(vae, x, num_samples=2),
        fit_posterior,
        lambda vae, x: posterior_elbo(vae, x, torch.zeros(len(x), 2), torch.zeros(len(x), 2)),
        aggregate_kl,
        exact_log_px,
        lambda vae, x: bound_metrics(vae, [(x, 0)], ObjectiveConfig()),
        lambda vae, x: bound_metrics(vae, x, ObjectiveConfig()),
        lambda vae, x: card_of(vae, [(x, torch.zeros(len(x)))]),
        lambda vae, x: card_of(vae, x),
        lambda vae, x: card_of(vae, torch.rand(3, 784), train_loader=[x]),
    ],
)
def test_estimators_refuse_pixels_outside_0_and_1(small_vae, call, value):
    with pytest.raises(ValueError, match=rf"\(3, 784\) has values from {value:g} .*\[0, 1\]"):
        call(small_vae, torch.full((3, 784), value))


@pytest.mark.parametrize(
    "call",
    [
        lambda vae, x: importance_log_px(vae, x, num_samples=2),
        fit_posterior,
        exact_log_px,
        lambda vae, x: bound_metrics(vae, [x], ObjectiveConfig()),
        card_of,
    ],
)
def test_estimators_refuse_images_of_another_shape(small_vae, call):
    with pytest.raises(ValueError, match=r"\(3, 3, 28, 28\).*\(B, 784\)"):
        call(small_vae, torch.rand(3, 3, 28, 28))


@pytest.mark.usefixtures("rough")
def test_a_card_of_images_in_every_form_is_the_same(trained):
    vae, train_loader, test_loader = trained
    x, y = (torch.cat(parts)[:10] for parts in zip(*test_loader, strict=True))
    test_loader = [(x[:7], y[:7]), (x[7:], y[7:])]
    train_loader = list(train_loader)[:1]
    expected = card_of(vae, test_loader, exact=False)
    for data in (x, x.numpy(), [x], [[x]], [(x, y, "more")], (255 * x).round().to(torch.uint8)):
        card = card_of(vae, data, exact=False)
        assert card["elbo"]["value"] == pytest.approx(expected["elbo"]["value"], abs=1e-3)
        assert card["log_px"]["value"] == pytest.approx(expected["log_px"]["value"], abs=1e-3)
    bare = [some for some, _ in train_loader]
    labelled = card_of(vae, test_loader, train_loader=train_loader, exact=False)
    assert "knn_accuracy" in labelled
    card = card_of(vae, x, train_loader=train_loader, exact=False)
    assert "knn_accuracy" not in card  # nothing to compare
    unlabelled = card_of(vae, test_loader, train_loader=bare, exact=False)
    assert "knn_accuracy" not in unlabelled
    assert unlabelled["train_elbo"]["num_images"] == labelled["train_elbo"]["num_images"]


def test_estimators_read_pixels_of_every_precision(small_vae):
    x = torch.rand(3, 784)
    zero = torch.zeros(3, 2)
    for call in (
        lambda x: importance_log_px(small_vae, x, num_samples=2).log_px,
        lambda x: posterior_elbo(small_vae, x, zero, zero, num_samples=3),
        lambda x: torch.stack(aggregate_kl(small_vae, x)),
        lambda x: exact_log_px(small_vae, x).log_px,
        lambda x: fit_posterior(small_vae, x, steps=2)[0],
        small_vae.reconstruct,
    ):
        assert torch.equal(call(x.double()), call(x))


def test_nothing_to_evaluate_is_said(small_vae):
    for call in (card_of, lambda vae, x: bound_metrics(vae, x, ObjectiveConfig())):
        with pytest.raises(ValueError, match="no image to evaluate"):
            call(small_vae, [])


def test_a_killed_evaluation_resumes(run_of_the_script, script, monkeypatch, capsys):
    """A kill leaves what was last written; the rest is computed, and the card is the same."""
    from vae_torch.evaluation import partial

    config = asked(run_of_the_script, limit=45, exact=False, chunk=80, overwrite=True)  # 10 at once
    script.evaluate_run(config)
    card = (run_of_the_script / "evaluation.json").read_text()
    values = dict(np.load(run_of_the_script / "evaluation.npz"))
    part, fitted = run_of_the_script / "evaluation.npz.part", []
    assert not part.exists()

    keep, fit = partial.Partial.keep, proposals._fit

    def killed(self, name, rows):
        keep(self, name, rows)
        raise KeyboardInterrupt

    def counted(vae, x, *rest):
        fitted.append(len(x))
        return fit(vae, x, *rest)

    monkeypatch.setattr(partial, "_EVERY", 0.0)
    monkeypatch.setattr(partial.Partial, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        script.evaluate_run(config)
    monkeypatch.setattr(partial.Partial, "keep", keep)
    monkeypatch.setattr(proposals, "_fit", counted)
    capsys.readouterr()
    script.evaluate_run(config)
    assert "resuming an interrupted evaluation" in capsys.readouterr().out
    assert fitted[:4] == [10, 10, 10, 5]  # and those of training images
    assert (run_of_the_script / "evaluation.json").read_text() == card
    for name, each in np.load(run_of_the_script / "evaluation.npz").items():
        np.testing.assert_array_equal(each, values[name])
    assert not part.exists()


def test_finished_images_of_another_protocol_are_not_taken(tmp_path):
    from vae_torch.evaluation.partial import Partial

    path, rows = tmp_path / "part", torch.rand(3, 2).double()
    Partial(path, "a").keep("fitted", rows)
    assert torch.equal(Partial(path, "a").rows("fitted"), rows)
    assert Partial(path, "b").rows("fitted") is None
    path.write_bytes(path.read_bytes()[:50])
    assert not Partial(path, "a").begun


@pytest.mark.parametrize(("off", "missed"), [(0.5, True), (0.03, False), (-0.5, False)])
def test_an_integral_below_an_estimate_from_below_is_not_trusted(off, missed):
    card = made_up_card(log_px_exact=(-95.0, 0.5))
    card["log_px"]["above"] = {"log_px_exact": [off, 0.01]}
    card["log_px_exact"]["residual"] = 0.002
    said = " ".join(verdict(card, 1000))
    assert ("has missed a part of p(x)" in said) == missed
    assert ("which is the truth here within 0.002" in said) != missed
