"""log p(x) of some images, drawn at random, as an estimate of the mean of all."""

import copy
import functools
import math

import pytest
import torch

from vae_torch import VAE, evaluate_model
from vae_torch.cli.evaluate import _line
from vae_torch.evaluate import evaluate_images
from vae_torch.evaluation import card as card_module
from vae_torch.evaluation import importance, proposals
from vae_torch.evaluation.figures import Figures
from vae_torch.quadrature import exact_log_px


@pytest.fixture(autouse=True)
def _cheap(monkeypatch):
    """Fewer points and steps: what is estimated of each image is compared with itself."""
    monkeypatch.setattr(proposals, "_POINTS", 512)
    short = functools.partial(importance.fit_posterior, steps=5)
    monkeypatch.setattr(card_module, "fit_posterior", short)


FEW = {"num_samples": 200, "fit_samples": 100, "fit_images": 5}


def test_the_mean_of_all_is_estimated_without_bias_and_with_its_error():
    random = torch.Generator().manual_seed(0)
    values = 20 * torch.randn(400, generator=random, dtype=torch.float64) - 90
    bound = values - 3 * torch.rand(400, generator=random, dtype=torch.float64)
    found, errors = [], []
    for _ in range(1000):
        some = torch.randperm(400, generator=random)[:40]
        card = Figures(400, 0)
        card.put("log_px", values[some], "", 1, of=some, from_all=bound)
        entry = card.figures["log_px"]
        found.append(entry["value"])
        errors.append(entry["error_of_the_choice"])
        images = entry["standard_error"] ** 2 - errors[-1] ** 2
        assert images == pytest.approx(values[some].var().item() / 400)
    found, spread = torch.tensor(found), torch.tensor(errors).square().mean().sqrt().item()
    assert abs(found.mean().item() - values.mean().item()) < 4 * spread / math.sqrt(1000)
    assert found.std().item() == pytest.approx(spread, rel=0.1)  # four standard errors
    assert spread < 0.05 * values.std() / math.sqrt(40)  # a plain mean's error is far larger


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VAE((12,), latent_dim=2, intermediate_dim=8, prior="vamp", prior_components=3)


def test_some_images_tell_the_exact_mean_of_all(model):
    x = torch.bernoulli(torch.rand(80, 12, generator=torch.Generator().manual_seed(1)))
    card, per_image = evaluate_images(model, x, log_px_images=20, exact=False, **FEW)
    truth = exact_log_px(model, x).log_px.double()
    for name in ("log_px", "log_px_encoder"):
        entry = card[name]
        chosen = per_image[name].isfinite()
        assert chosen.sum() == entry["estimated_images"] == 20
        assert entry["num_images"] == 80
        assert entry["error_over"] == "images, and the choice of 20 of them"
        off = (per_image[name] - truth)[chosen].abs().max().item()  # of the estimates themselves
        assert abs(entry["value"] - truth.mean().item()) < 4 * entry["error_of_the_choice"] + off
    assert torch.equal(per_image["gap"].isfinite(), per_image["log_px"].isfinite())
    assert card["gap"]["num_images"] == 20
    assert card["fitted_gap"]["num_images"] == 5


def test_all_images_need_no_estimate_of_the_rest(model):
    x = torch.bernoulli(torch.rand(10, 12, generator=torch.Generator().manual_seed(1)))
    card = evaluate_model(model, x, log_px_images=50, exact=False, **FEW)
    assert card["log_px"] == evaluate_model(model, x, exact=False, **FEW)["log_px"]
    assert "estimated_images" not in card["log_px"]
    assert card["log_px"]["error_over"] == "images"


def test_log_px_of_some_training_images_tells_that_of_all():
    torch.manual_seed(0)
    model = VAE((12,), latent_dim=2, intermediate_dim=8)
    model.decoder.out.bias.data = torch.linspace(-5, 5, 12)  # log p(x) varies more than the gap
    random = torch.Generator().manual_seed(2)
    x = torch.bernoulli(torch.rand(60, 12, generator=random))
    test = torch.bernoulli(torch.rand(60, 12, generator=random))
    card, _ = evaluate_images(
        model, test, train_loader=[x[:40], x[40:]], log_px_images=25, exact=True, **FEW
    )
    truth = exact_log_px(model, x).log_px.double()
    entry = card["train_log_px"]
    assert entry["estimated_images"] == 25
    assert entry["num_images"] == 60
    assert "the bound of all extends the mean" in entry["definition"]
    assert abs(entry["value"] - truth.mean().item()) < 3 * entry["error_of_the_choice"]
    assert entry["error_of_the_choice"] < 0.8 * truth.std() * math.sqrt(1 / 25 - 1 / 60)
    whole = evaluate_model(model, test, train_loader=x, exact=True, **FEW)["train_log_px"]
    assert whole["value"] == pytest.approx(truth.mean().item(), abs=1e-4)
    assert "extends" not in whole["definition"]
    assert "estimated_images" not in whole


def test_a_bound_that_is_noisier_than_log_px_is_no_help(model):
    noisy = copy.deepcopy(model)
    noisy.posterior.logvar.bias.data += 6
    x = torch.bernoulli(torch.rand(60, 12, generator=torch.Generator().manual_seed(2)))
    card = evaluate_model(noisy, x, train_loader=x, log_px_images=25, exact=True, **FEW)
    entry = card["train_log_px"]
    assert entry["num_images"] == 25
    assert "extends" not in entry["definition"]


@pytest.mark.parametrize("classes", [None, 3])
def test_posteriors_are_fitted_part_by_part_in_order(classes, monkeypatch):
    torch.manual_seed(0)
    vae = VAE((12,), latent_dim=2, intermediate_dim=8, classes=classes)
    x = torch.bernoulli(torch.rand(13, 12, generator=torch.Generator().manual_seed(1)))
    y = torch.arange(13) % 3

    def known(vae, x, *_, **__):  # a number that tells the image and its label
        return (x @ torch.arange(12.0)).double() + (0 if vae.y is None else 100 * vae.y)

    monkeypatch.setattr(card_module, "elbo_of", known)
    monkeypatch.setattr(card_module, "_FITTED_AT_ONCE", 5)
    few = {**FEW, "fit_images": 12, "exact": False}
    found = evaluate_images(vae, [(x, y)], **few).per_image
    fitted = found["fitted_gap"].isfinite()
    assert fitted.sum() == 12
    expected = found["log_px"] - (x @ torch.arange(12.0) + (100 * y if classes else 0))
    torch.testing.assert_close(found["fitted_gap"][fitted], expected[fitted])


def test_the_rise_of_both_estimates_is_on_the_card(model):
    x = torch.bernoulli(torch.rand(10, 12, generator=torch.Generator().manual_seed(1)))
    card = evaluate_model(model, x, exact=False, **FEW)
    rise = importance.importance_log_px(model, x, num_samples=200).rise
    assert card["log_px_encoder"]["rise_from_half"] == pytest.approx(rise.mean().item())
    words = f"log_px_encoder by {rise.mean():.3f}. At least as much bias is left"
    assert any(words in said for said in card["verdict"])
    one = evaluate_model(model, x, exact=False, **{**FEW, "num_samples": 1})
    assert one["log_px_encoder"]["rise_from_half"] is None
    assert not any("rises" in said for said in one["verdict"])


def test_memory_is_bounded_for_any_number_of_images(model, monkeypatch):
    x = torch.bernoulli(torch.rand(1300, 12, generator=torch.Generator().manual_seed(1)))
    seen = {"encode": 0, "decode": 0}
    for name in seen:
        original = getattr(VAE, name)

        def counted(vae, tensor, *rest, name=name, original=original):
            seen[name] = max(seen[name], tensor[..., 0].numel())
            return original(vae, tensor, *rest)

        monkeypatch.setattr(VAE, name, counted)
    monkeypatch.setattr(card_module, "_FITTED_AT_ONCE", 20)
    few = {"num_samples": 2, "fit_samples": 2, "fit_images": 60, "log_px_images": 60}
    evaluate_model(model, x, train_loader=x, exact=False, chunk=64, **few)
    assert seen["encode"] <= 1000
    assert seen["decode"] <= 1000


def test_one_image_has_no_error(model):
    x = torch.bernoulli(torch.rand(10, 12, generator=torch.Generator().manual_seed(1)))
    card = evaluate_model(model, x, log_px_images=1, exact=False, **FEW)
    assert card["log_px"]["standard_error"] is None


@pytest.mark.parametrize("wrong", [{"log_px_images": 0}, {"log_px_images": 3, "ais": 4}])
def test_counts_that_do_not_fit_are_refused(model, wrong):
    (*_, (name, value)) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}: "):
        evaluate_model(model, torch.zeros(9, 12), **FEW, **wrong)


def test_the_printed_card_has_columns():
    entry = {"value": -1.5, "standard_error": 0.25, "num_samples": 1, "definition": "what it is"}
    units = ("nats per image", "bits per dimension", "share of latents", "pixels", "samples")
    cards = [{**entry, "unit": unit, "num_images": 10_000} for unit in (*units, "of 40 dimensions")]
    cards.append({**cards[0], "estimated_images": 500})
    lines = [_line("a_figure", card, {}) for card in cards]
    assert len({line.index("what it is") for line in lines}) == 1
    assert "  500 / 10,000" in lines[-1]
