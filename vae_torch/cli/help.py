"""The text of `--help` about settings, from their declarations."""

import re
from collections.abc import Mapping
from typing import Any, get_args

from omegaconf import OmegaConf
from pydantic.fields import FieldInfo

from vae_torch.cli.early import conf_dir
from vae_torch.config import Config, allowed, flatten, keys_of, skeleton

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


def train_help(stored: Mapping[str, Any]) -> str:
    """What `train.py --help` says. `stored` are the files that plug-ins brought, by group."""
    groups = []
    for folder in sorted(path for path in conf_dir().iterdir() if path.is_dir()):
        files = {*stored.get(folder.name, ()), *(path.name for path in folder.glob("*.yaml"))}
        names = sorted(file.removesuffix(".yaml") for file in files)
        groups.append(f"{folder.name}: {', '.join(names)}")
    return TRAIN.format(groups="\n".join(groups), settings=lines("train", Config))


def defaults(name: str, schema: type[Any]) -> dict[str, Any]:
    """By dotted key: what is off, `conf/NAME.yaml`, and the files that this names."""
    given: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / f"{name}.yaml"))
    for entry in given.pop("defaults", []):
        for group, choice in entry.items() if isinstance(entry, dict) else ():
            if choice:
                given[group] = OmegaConf.load(conf_dir() / group / f"{choice}.yaml")
    return flatten(skeleton(schema)) | flatten(given)


def lines(name: str, schema: type[Any]) -> str:
    """A line for each key: its default, its meaning, its range."""
    listed, stated = [], defaults(name, schema)
    for key, kind in keys_of(schema).items():
        value = stated.get(key, "")
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
