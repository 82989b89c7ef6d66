"""The text of `--help` about settings, from their declarations."""

import re
from collections.abc import Mapping
from typing import Any, get_args

from pydantic.fields import FieldInfo

from vae_torch.config import allowed, keys_of

TRAIN = """Train a VAE. Every key below can be set: key=value, group=choice, -m for sweeps.

  train.py                                       the default run
  train.py model.latent_dim=10 train.epochs=20   other settings
  train.py experiment=keras_notebook             a prepared experiment
  train.py -m model.latent_dim=2,8,32 seed=0,1   a sweep
  train.py where=cores seed=0,1                  on all cores of this machine

Groups:

{groups}

Settings, with their defaults:

{settings}
  sweep.dir                         with -m: the sweep's folder; the same again resumes it
  hydra.run.dir                     a single run's folder; outputs/<date>/<time> if left out
"""

_WIDTH = 34  # of a key and its default


def lines(schema: type[Any], defaults: Mapping[str, Any]) -> str:
    """A line for each key: its default, its meaning, its range."""
    listed = []
    for key, kind in keys_of(schema).items():
        value = defaults.get(key, "")
        head = f"  {key}={_yaml(value)}"
        text = f"{meaning(kind)} ({range_of(kind)})" if range_of(kind) else meaning(kind)
        listed.append(f"{head:{_WIDTH}}  {text}")
    return "\n".join(listed)


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def meaning(kind: Any) -> str:
    """The description of a setting."""
    notes = (part.description for part in get_args(kind) if isinstance(part, FieldInfo))
    return next((note for note in notes if note), "")


def range_of(kind: Any) -> str:
    """The range of a setting, if its description does not tell it."""
    words = allowed(kind).removesuffix(", or null")
    if words.startswith("one of "):
        choices = words.removeprefix("one of ").split(", ")
        return "" if all(word in meaning(kind) for word in choices) else ", ".join(choices)
    found = re.search(r"(above|between|at least) .*|\d+ or more( and at most \d+)?$", words)
    return found[0].replace(" or more and at most ", " to ") if found else ""
