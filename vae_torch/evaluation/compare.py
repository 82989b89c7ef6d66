"""Two evaluated runs, image by image: the error of a paired difference is small.

Reads `evaluation.json` and `evaluation.npz` of both.
"""

import io
import json
import logging
import math
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vae_torch.parts.metrics import metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = logging.getLogger("vae_torch")

# Both cards must agree in these for a figure to be compared.
_ALIKE = ("num_samples", "seed", "proposal")


class CompareError(ValueError):
    """Two runs that cannot be compared: one line that says why."""


class Comparison(NamedTuple):
    """One figure of two runs, on the same images."""

    metric: str
    a: Any  # (N,) values of the first run
    b: Any  # (N,)
    unit: str  # such as nats; empty for shares

    @property
    def difference(self) -> float:
        """Mean of b - a."""
        return float((self.b - self.a).mean())

    @property
    def error(self) -> float:
        """Standard error of `difference` over images; infinite for one image."""
        n = len(self.a)
        return float((self.b - self.a).std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf

    def sentence(self) -> str:
        """`log_px: the second run is 0.12 ± 0.03 nats higher on 10,000 images`."""
        size, n = abs(self.difference), len(self.a)
        unit = f" {self.unit}" if self.unit else ""
        if size <= 2 * self.error:
            return (
                f"{self.metric}: no difference beyond its error, {self.difference:+.3f} ± "
                f"{self.error:.3f}{unit} on {n:,} images"
            )
        way = "higher" if self.difference > 0 else "lower"
        return (
            f"{self.metric}: the second run is {size:.3f} ± {self.error:.3f}{unit} {way} on "
            f"{n:,} images"
        )


def compare_runs(first: Path, second: Path) -> list[Comparison]:
    """Compare every figure that both runs have per image and measured in the same way.

    Figures of log p(x) are left out, with a warning, where the likelihoods differ or only one model
    sees labels.

    The error is over images alone. Another random seed of either model moves the difference by
    more; only several runs show by how much.

    Raises:
        CompareError: A run has no evaluation, a damaged one or one of an older version, or the two
            evaluations are of different images or have no figure in common.
    """
    (card_a, values_a), (card_b, values_b) = _read(first), _read(second)
    if card_a["data"]["sha256"] != card_b["data"]["sha256"]:
        raise CompareError(
            f"run={first} run={second}: evaluated on other images; evaluate both with the same "
            "data and eval.limit"
        )
    kinds = [card["model"] for card in (card_a, card_b) if "model" in card]
    apart = len(kinds) == 2 and kinds[0] != kinds[1]  # cards of older versions do not say
    if apart:
        differ = [key for key in kinds[0] if kinds[0][key] != kinds[1].get(key)]
        each = ("; ".join(f"{key}={kind.get(key)}" for key in differ) for kind in kinds)
        _log.warning("log p(x) and bounds on it do not compare between %s and %s", *each)
    found = []
    for name, a in values_a.items():
        b, entry_a, entry_b = values_b.get(name), card_a.get(name), card_b.get(name)
        if b is None or entry_a is None or entry_b is None or a.shape != b.shape:
            continue
        if any(entry_a.get(key) != entry_b.get(key) for key in _ALIKE):
            continue
        if apart and name in metrics and metrics[name].density:
            continue
        both = np.isfinite(a) & np.isfinite(b)
        if both.any():
            unit = entry_a["unit"].removesuffix(" per image")  # of the mean over images
            unit = "" if unit.startswith("share") else unit
            found.append(Comparison(name, a[both], b[both], unit))
    if not found:
        raise CompareError(
            f"run={first} run={second}: no figure was measured alike; evaluate both with the same "
            "settings"
        )
    return found


def scatter(comparison: Comparison, names: tuple[str, str]) -> "Figure":
    """Each image's value in both runs, and the distribution of the differences."""
    from vae_torch.figures import DIGIT_COLOURS, new_axes

    figure, (left, right) = new_axes(9, 4.2, columns=2)
    a, b = comparison.a, comparison.b
    unit = f" ({comparison.unit})" if comparison.unit else ""
    left.plot(a, b, ".", markersize=2, alpha=0.4, color=DIGIT_COLOURS[0])
    ends = [min(a.min(), b.min()), max(a.max(), b.max())]
    left.plot(ends, ends, color=DIGIT_COLOURS[9], linewidth=0.8)
    left.set_xlabel(f"{comparison.metric}{unit}, {names[0]}")
    left.set_ylabel(f"{comparison.metric}{unit}, {names[1]}")
    right.hist(b - a, bins=60, color=DIGIT_COLOURS[1])
    right.axvline(comparison.difference, color=DIGIT_COLOURS[6])
    right.set_xlabel(f"{names[1]} - {names[0]}: {comparison.difference:+.3f}")
    right.set_ylabel("images")
    return figure


def _read(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    card_path, values_path = run / "evaluation.json", run / "evaluation.npz"
    if not card_path.exists():
        raise CompareError(f"run={run}: has no evaluation.json; run scripts/evaluate.py first")
    if not values_path.exists():
        raise CompareError(
            f"run={run}: its card comes from an older version, without evaluation.npz; run "
            "scripts/evaluate.py again"
        )
    try:
        card = json.loads(card_path.read_text("utf-8"))
        # read first: np.load leaves a damaged file open
        with np.load(io.BytesIO(values_path.read_bytes())) as file:
            values = {name: file[name] for name in file.files}
        images = card["elbo"]["num_images"]
        str(card["data"]["sha256"])
    except (OSError, ValueError, LookupError, TypeError, zipfile.BadZipFile) as error:
        raise CompareError(
            f"run={run}: its evaluation is damaged ({type(error).__name__}); run "
            "scripts/evaluate.py again"
        ) from None
    if any(each.shape != (images,) for each in values.values()):
        raise CompareError(
            f"run={run}: evaluation.npz belongs to another card; run scripts/evaluate.py again"
        )
    return card, values
