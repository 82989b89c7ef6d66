"""What the card's figures mean, in sentences."""

import math
from typing import Any

# With fewer importance samples it cannot be seen whether they cover the posterior.
_FEW_SAMPLES = 100
# A sigma within this factor of the residual is close enough.
_NEAR = 1.1
# Nats: a smaller difference is not worth a sentence, however sure.
_NOTEWORTHY = 0.5


def verdict(card: dict[str, Any], num_samples: int) -> list[str]:
    """What the card's figures mean, in sentences, with advice.

    A sentence compares figures of the same images, or it names their numbers.
    """
    value = {name: entry["value"] for name, entry in card.items()}
    said = []
    active = value.get("active_units")  # None on the card of one image
    dims = len(card["active_units"]["variance_per_dim"]) if active is not None else 0
    if "kl_per_dim" not in value:  # a learned prior: see the definition of active_units
        known = active is not None and "mutual_information" in value  # only of a Gaussian q(z|x)
        active = 0 if known and value["mutual_information"] < 0.1 else None
    if active == 0:
        said.append(
            "The posterior has collapsed: no latent dimension says anything about the image. Try "
            "objective=elbo, objective.beta_warmup_epochs or objective.free_bits."
        )
    elif active is not None and active < dims:
        said.append(
            f"{dims - active} of {dims} latent dimensions are collapsed. That costs little; "
            "objective.free_bits or objective.beta_warmup_epochs may bring them to use."
        )
    if "residual" in value:
        said += _misfit(card["residual"])
    if "train_log_px" in value:
        said += _overfitting(card)
    elif "train_elbo" in value:
        lead = value["train_elbo"] - value["elbo"]
        error = _joint_error(card, "train_elbo", "elbo")
        if lead > max(_NOTEWORTHY, 2 * error):
            said.append(
                f"The bound of the {card['train_elbo']['num_images']:,} training images is "
                f"{lead:.1f} ± {error:.1f} nats better than that of the "
                f"{card['elbo']['num_images']:,} evaluated ones: the model or its encoder overfits."
                " Try data.binarize=dynamic, fewer epochs, train.ema or a smaller model."
            )
    both = ("log_px", "log_px_encoder")
    rises = [card.get(name, {}).get("rise_from_half") for name in both]
    if None not in rises:
        said.append(
            f"From half of the samples to all, log_px rises by {rises[0]:.3f} nats and "
            f"log_px_encoder by {rises[1]:.3f}. At least as much bias is left in each, and far "
            "more where few samples carry the weight."
        )
    if doubtful := card["log_px"].get("share_doubtful"):
        said.append(
            f"log_px may be far too low for {100 * doubtful:.2g}% of the images, by the tails of "
            "their weights. Try a larger eval.fit_samples; eval.ais=100 checks it. No warning is "
            "no guarantee: a mode that was missed shows in no weight."
        )
    if "ais_difference" in value:
        off, error = value["ais_difference"], card["ais_difference"]["standard_error"]
        images = card["ais_difference"]["num_images"]
        spread = "" if error is None else f" ± {error:.2f}"
        said.append(
            f"log_px is {abs(off):.2f}{spread} nats {'below' if off > 0 else 'above'} annealed "
            f"importance sampling, which is a lower bound too, on {images:,} images."
        )
    if "ais_width" in value:
        width, error = value["ais_width"], card["ais_width"]["standard_error"]
        images = card["ais_width"]["num_images"]
        spread = "" if error is None else f" ± {error:.2f}"
        said.append(
            f"On {images:,} images sampled from the model, annealing is at most "
            f"{width:.2f}{spread} nats from the truth, in the mean: its bounds from both ends are "
            "that far apart."
        )
    elif "ais_difference" in value:
        said.append(
            "These images cannot be sampled from the model, so annealing gives no upper bound."
        )
    if "log_px_encoder" in value:
        short, error = _above(card, "log_px", "log_px_encoder")
        if num_samples < _FEW_SAMPLES:
            said.append(
                f"log_px_encoder comes from {num_samples} samples per image, too few to compare "
                "with published figures. Try eval.num_samples=5000."
            )
        elif short > max(0.1, 2 * error):
            said.append(
                f"log_px_encoder, the estimate that papers report, is {short:.2f} nats below "
                "log_px. Compare models by log_px."
            )
    if "log_px_exact" in value:
        off, error = _above(card, "log_px", "log_px_exact")
        residual = card["log_px_exact"]["residual"]
        how = f"{abs(off):.3f} nats {'above' if off > 0 else 'below'} the integral"
        if off > max(0.01, 4 * error) + residual:  # no estimate from below should be
            said.append(
                f"log_px is {how}, which has missed a part of p(x): do not trust log_px_exact."
            )
        else:
            said.append(
                f"log_px is {how}, which is the truth here within {residual:.2g} in the mean."
            )
    if "interval_coverage" in value:
        held, error = value["interval_coverage"], card["interval_coverage"]["standard_error"]
        if abs(held - 0.95) > max(0.02, 2 * error):
            said.append(
                f"The encoder's 95% intervals hold {100 * held:.1f} ± {100 * error:.1f}% of the z "
                f"that images were drawn from: q(z|x) is too {'narrow' if held < 0.95 else 'wide'}."
            )
    if "nearest_train_image" in value:
        near, error = (card["nearest_train_image"][key] for key in ("value", "standard_error"))
        of_test = card["nearest_train_image"]["of_test_images"]
        if near + 2 * (error or 0) < 0.5 * of_test:
            said.append(
                f"Samples are {near:.2f} from the nearest training image, test images {of_test:.2f}"
                ": the model copies training images."
            )
    if value["fitted_gap"] > 1:
        parts = ("approximation_gap", "amortisation_gap")
        larger = max(parts, key=lambda name: float(value[name]))
        remedies = {
            "approximation_gap": "no q(z|x) of its kind fits the true posterior well. Try more "
            "latent dimensions, posterior=flow or objective=iwae",
            "amortisation_gap": "the encoder does not find the best q(z|x). Try a larger or "
            "longer trained encoder",
        }
        images = card["fitted_gap"]["num_images"]
        whose = f"the bound's gap of {value['fitted_gap']:.1f} nats ({images:,} images)"
        lead, error = _above(card, *parts)
        if abs(lead) > 2 * error:
            said.append(f"Most of {whose} is the {larger}: {remedies[larger]}.")
        else:
            said.append(
                f"Neither part of {whose} is clearly the larger: approximation_gap "
                f"{value['approximation_gap']:.1f}, amortisation_gap "
                f"{value['amortisation_gap']:.1f}. A larger eval.fit_images tells them apart."
            )
    return said


def _misfit(residual: dict[str, Any]) -> list[str]:
    """What it costs that a Gaussian's sigma is far from the residual."""
    best, sigma = residual["value"], residual["sigma"]
    if best <= 0 or max(best / sigma, sigma / best) < _NEAR:
        return []
    # KL between Gaussians of one mean and these deviations
    cost = residual["pixels"] * ((best / sigma) ** 2 / 2 - 0.5 - math.log(best / sigma))
    return [
        f"The Gaussian's sigma is {sigma:.3g} and the residual {best:.3g}: that costs {cost:.1f} "
        "nats of reconstruction. Use likelihood_options.sigma=optimal, or train longer."
    ]


def _overfitting(card: dict[str, Any]) -> list[str]:
    """What overfits: the model, as log p(x) shows, or the encoder, as the gap shows."""
    said = []
    name = "log_px_exact" if card["train_log_px"]["exact"] else "log_px"
    trained = f"{card['train_log_px']['num_images']:,} training images"
    others = f"{card[name]['num_images']:,} evaluated ones"
    some = [card[entry].get("estimated_images") for entry in ("train_log_px", name)]
    estimated = " and ".join(f"{count:,}" for count in some if count)
    whence = f" (estimated from {estimated})" if estimated else ""
    lead = card["train_log_px"]["value"] - card[name]["value"]
    lead_error = _joint_error(card, "train_log_px", name)
    overfits = lead > max(_NOTEWORTHY, 2 * lead_error)
    if overfits:
        said.append(
            f"For {trained}, log p(x) is {lead:.1f} ± {lead_error:.1f} nats better than for the "
            f"{others}{whence}: the model overfits. Try data.binarize=dynamic, fewer epochs, "
            "train.ema or a smaller model."
        )
    direction = "better" if lead > 0 else "worse"
    wider = card["gap"]["value"] - card["train_gap"]["value"]
    error = _joint_error(card, "gap", "train_gap")
    if wider > max(_NOTEWORTHY, 2 * error):
        said.append(
            f"The gap between log p(x) and elbo is {wider:.1f} ± {error:.1f} nats wider on "
            f"{card['gap']['num_images']:,} evaluated images than on "
            f"{card['train_gap']['num_images']:,} training images: the encoder does not generalise"
            + (
                ""
                if overfits
                else f", while log p(x) is {abs(lead):.1f} ± {lead_error:.1f} nats {direction} on "
                "training images"
            )
            + ". Try data.binarize=dynamic or a smaller encoder; log_px is not affected."
        )
    return said


def _above(card: dict[str, Any], name: str, other: str) -> tuple[float, float]:
    """How far a figure is above another on the same images, with the paired error."""
    difference, error = card[name]["above"][other]
    return difference, math.inf if error is None else error


def _joint_error(card: dict[str, Any], *names: str) -> float:
    """Standard error of a sum or difference of independent figures; infinite if one has none."""
    errors = [card[name]["standard_error"] for name in names]
    return math.inf if None in errors else math.hypot(*errors)
