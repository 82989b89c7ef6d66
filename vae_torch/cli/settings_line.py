"""The command lines of all commands but `train`, which uses Hydra's, and the run they name."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vae_torch.cli.early import conf_dir, refuse_malformed, refuse_unknown
from vae_torch.cli.help import lines
from vae_torch.cli.messages import Parser, refuse
from vae_torch.config import Config, ConfigError, keys_of

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

    from vae_torch.vae import VAE

Settings = TypeVar("Settings")

_FOLDERS = ("run", "data_root", "images", "out", "readme", "pretrained")  # taken literally


def parser(name: str, description: str, schema: type[Any]) -> Parser:
    """A parser for `[RUN] [key=value ...]`, with keys and meanings in its help."""
    takes_run = "run" in keys_of(schema)
    made = Parser(
        description=description,
        epilog="settings, with their defaults:\n\n" + lines(name, schema),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "settings",
        nargs="*",
        metavar="RUN | key=value" if takes_run else "key=value",
        help="the run's folder, and settings" if takes_run else "settings",
    )
    made.add_argument("--config-dir", metavar="DIR", help="a folder of settings files of yours")
    made.add_argument("--config-name", metavar="NAME", default=name, help=argparse.SUPPRESS)
    return made


def settings_of(options: argparse.Namespace, schema: type[Settings]) -> Settings:
    """The settings of a parsed command line, from `conf/` and its overrides.

    A mistake ends the program with one line.
    """
    overrides = []
    folders: dict[str, str] = {}
    for argument in options.settings:
        key, given, value = argument.partition("=")
        if not given or "/" in key:
            key, value = "run", argument
        elif key not in _FOLDERS:
            overrides.append(argument)
            continue
        if key == "run" and key in folders:
            refuse(f"{value}: one run at a time; {folders['run']} is already named")
        folders[key] = value
    try:
        refuse_malformed(overrides)
        if not options.config_dir:  # whose files may bring groups
            refuse_unknown([*overrides, *(f"{key}=" for key in folders)], schema)
    except ConfigError as error:
        refuse(str(error))
    from omegaconf import OmegaConf

    from vae_torch.cli.compose import COMPOSITION_ERRORS, in_our_words, typed

    try:
        cfg = _composed(options.config_name, overrides, options.config_dir)
        for key, value in folders.items():
            OmegaConf.update(cfg, key, value)
        if "run" in keys_of(schema):
            if OmegaConf.is_missing(cfg, "run"):
                raise ConfigError("run is missing: name a run folder, outputs/<date>/<time>")
            if not cfg.run:
                raise ConfigError("run=: must be a run folder, outputs/<date>/<time>")
        return typed(cfg, schema)
    except COMPOSITION_ERRORS as error:
        refuse(in_our_words(error, overrides, schema))
    except ConfigError as error:
        refuse(str(error))


def asked(
    name: str, description: str, schema: type[Settings], arguments: Sequence[str] | None
) -> Settings:
    """Parse the settings of a command without other options."""
    return settings_of(parser(name, description, schema).parse_args(arguments), schema)


def open_run(config: Any, checkpoint: str) -> "tuple[VAE, Config, torch.device]":
    """The model of a command's `run` on its `device`, the run's settings, and the device."""
    from vae_torch.machine import resolve_device, set_products, tune_cpu
    from vae_torch.stored import load_run

    tune_cpu(None)
    device = resolve_device(config.device)
    set_products("fp32", device)
    vae, run_config = load_run(
        config.run, checkpoint=checkpoint, device=device, plugins=config.plugins
    )
    return vae, run_config, device


def _composed(name: str, overrides: Sequence[str], config_dir: str | None = None) -> "DictConfig":
    import hydra

    first, others = conf_dir(), []
    if config_dir:
        others = [Path(config_dir).absolute()]
        if (others[0] / f"{name}.yaml").exists():
            first, others = others[0], [first]
    more = [f"hydra.searchpath=['file://{folder}']" for folder in others]
    with hydra.initialize_config_dir(str(first), version_base="1.3"):
        return hydra.compose(name, [*overrides, *more])
