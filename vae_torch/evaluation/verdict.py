"""What the card's figures mean, in sentences."""

import math
from typing import Any

# Fewer importance samples cannot show whether they cover the posterior.
_FEW_SAMPLES = 100


def verdict(card: dict[str, Any], num_samples: int) -> list[str]:
    """What the card's figures mean, in sentences, each with something to try.

    Figures that a sentence compares are of the same images, or it names their counts.
    """
    value = {name: entry["value"] for name, entry in card.items()}
    said = []
    active = value.get("active_units")  # None on the card of one image
    dims = len(card["active_units"]["variance_per_dim"]) if active is not None else 0
    if "kl_per_dim" not in value:  # a learned prior: see the definition of active_units
        active = 0 if active is not None and value["mutual_information"] < 0.1 else None
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
    if "train_elbo" in value:
        lead = value["train_elbo"] - value["elbo"]
        error = _joint_error(card, "train_elbo", "elbo")
        if lead > max(3, 2 * error):
            said.append(
                f"The bound of the {card['train_elbo']['num_images']:,} training images is "
                f"{lead:.1f} ± {error:.1f} nats better than that of the "
                f"{card['elbo']['num_images']:,} evaluated ones: the model or its encoder overfits."
                " Try data.binarize=dynamic, fewer epochs, train.ema or a smaller model."
            )
    poor = card["effective_samples"]["share_below_10"]
    if num_samples < _FEW_SAMPLES:
        said.append(
            f"log_px comes from {num_samples} samples per image, too few to tell how far it is "
            "below the truth. Try eval.num_samples=1000 or more."
        )
    elif poor > 0.01:
        said.append(
            f"log_px is not to be trusted for {100 * poor:.0f}% of the images, which have fewer "
            f"than 10 effective samples of {num_samples:,}. Try a larger eval.num_samples."
        )
    if "log_px_exact" in value:
        off = value["log_px"] - value["log_px_exact"]
        said.append(
            f"Importance sampling is {abs(off):.3f} nats {'above' if off > 0 else 'below'} the "
            "integral, which is the truth here."
        )
    if value["fitted_gap"] > 1:
        parts = ("approximation_gap", "amortisation_gap")
        larger, smaller = sorted(parts, key=lambda name: value[name], reverse=True)
        remedies = {
            "approximation_gap": "a Gaussian fits the true posterior badly. Try more latent "
            "dimensions or objective=iwae",
            "amortisation_gap": "the encoder does not find the best Gaussian. Try a larger or "
            "longer trained encoder",
        }
        images = card["fitted_gap"]["num_images"]
        whose = f"the bound's gap of {value['fitted_gap']:.1f} nats ({images:,} images)"
        if value[larger] - value[smaller] > 2 * _joint_error(card, larger, smaller):
            said.append(f"Most of {whose} is the {larger}: {remedies[larger]}.")
        else:
            said.append(
                f"Neither part of {whose} is clearly the larger: approximation_gap "
                f"{value['approximation_gap']:.1f}, amortisation_gap "
                f"{value['amortisation_gap']:.1f}. A larger eval.fit_images tells them apart."
            )
    return said


def _joint_error(card: dict[str, Any], *names: str) -> float:
    """Standard error of a sum or difference of independent figures; infinite where one has none."""
    errors = [card[name]["standard_error"] for name in names]
    return math.inf if None in errors else math.hypot(*errors)
