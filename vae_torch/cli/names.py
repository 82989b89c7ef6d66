"""Names of run folders: the overrides, in characters that need no quotes in shell or Hydra."""

import hashlib
import re
from collections.abc import Sequence

from vae_torch.config import INCIDENTAL

_LONGEST = 120  # a file name may have 255 bytes, and TensorBoard shows about 40
# where and how a run is made, not what it is
_LEFT_OUT = (*INCIDENTAL, "where", "sweep.dir")


def run_name(overrides: Sequence[str], first: Sequence[str] = ()) -> str:
    """`model.latent_dim-2_seed-0` for these overrides: keys in `first`, then the rest by alphabet.

    A name that was shortened, or in which a character was replaced, ends in a hash of the whole, so
    that no two runs share a folder. `experiment=strong` becomes `strong`. The default run has an
    empty name.
    """
    parts = [str(override).lstrip("+").partition("=")[::2] for override in overrides]
    parts = [(key, value) for key, value in parts if key not in _LEFT_OUT]
    parts.sort(key=lambda part: (part[0] not in first, part))
    whole = "_".join(
        value if key == "experiment" else f"{key}-{_short(value)}" for key, value in parts
    )
    name = re.sub(r"[^\w.+-]+", ".", whole, flags=re.ASCII)[:_LONGEST]
    exact = ",".join(f"{key}={value}" for key, value in sorted(parts))
    if name != whole or any(_short(value) != value for _, value in parts):
        name += f"_{hashlib.sha256(exact.encode()).hexdigest()[:8]}"
    return name


def after_time(overrides: Sequence[str]) -> str:
    """The suffix after the time in the name of a single run's folder."""
    name = run_name(overrides)
    return f"_{name}" if name else ""


def _short(value: str) -> str:
    """Shorten a long number to four digits: a search gives sixteen."""
    if re.fullmatch(r"\d+\.\d{5,}(e-?\d+)?", value):
        return f"{float(value):.4g}"
    return value
