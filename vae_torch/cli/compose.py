"""Composes settings with Hydra from `conf/`, validates them, and words its errors."""

import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from vae_torch.cli.early import conf_dir, refuse_malformed
from vae_torch.cli.names import after_time, run_name
from vae_torch.config import (
    OPTIONS,
    Config,
    ConfigError,
    check_combinations,
    keys_of,
    no_such_key,
    skeleton,
    validated,
)

Settings = TypeVar("Settings")

# What Hydra and YAML raise for settings that cannot be composed.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError)

# Keys whose value is a folder, with any name.
PATHS = (
    "hydra.run.dir",
    "hydra.sweep.dir",
    "sweep.dir",
    "train.resume",
    "train.init_from",
    "data.root",
)

# Launchers and sweepers: our choice, the module of its plugin, and the extra in pyproject.toml.
PLUGINS = {
    "joblib": ("where=cores", "hydra_joblib_launcher", "sweep"),
    "ray": ("where=ray", "hydra_ray_launcher", "ray"),
    "submitit_slurm": ("where=slurm", "hydra_submitit_launcher", "cluster"),
    "submitit_local": ("where=slurm_local", "hydra_submitit_launcher", "cluster"),
    "optuna": ("experiment=search", "hydra_optuna_sweeper", "search"),
}


def register() -> None:
    """Register with Hydra what `conf/` refers to."""
    schema = OmegaConf.create(skeleton(Config))
    for key in OPTIONS:  # the part knows its keys
        OmegaConf.set_struct(OmegaConf.select(schema, key), False)
    ConfigStore.instance().store(name="schema", node=schema)

    def python_here() -> str:
        """The shell command of this Python in this folder, for a Ray worker."""
        return shlex.join(["env", f"--chdir={Path.cwd()}", sys.executable])

    for resolver in (run_name, after_time, python_here):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


def load_named_plugins(arguments: Sequence[str]) -> None:
    """Import the modules of `plugins=[...]`; register their networks and objectives with Hydra."""
    values = [a.partition("=")[2] for a in arguments if a.lstrip("+").startswith("plugins=")]
    if not values:
        return
    from vae_torch.data import data_sources
    from vae_torch.parts.complete import SHARED
    from vae_torch.parts.networks import networks
    from vae_torch.parts.objectives import objectives
    from vae_torch.parts.registry import load_plugins

    named = yaml.safe_load(values[-1]) or []
    load_plugins([named] if isinstance(named, str) else named)
    for group, base, table in (
        ("model", "mlp", networks),
        ("objective", "elbo", objectives),
        ("data", "mnist", data_sources),
    ):
        for name in table:
            if (conf_dir() / group / f"{name}.yaml").exists():
                continue
            options = {
                option: "???" if parameter.default is parameter.empty else parameter.default
                for option, parameter in table.accepts(name).items()
                if option not in SHARED
            }
            node = {"defaults": [base, "_self_"], "name": name, "options": options}
            ConfigStore.instance().store(group=group, name=name, node=node)


def compose(overrides: Sequence[str] = ()) -> Config:
    """Compose the settings of a run as the command line does.

    Args:
        overrides: `model.latent_dim=8`, `experiment=strong`, ...

    Returns:
        The typed settings, validated.

    Raises:
        ConfigError: A key or a value is wrong; one line that says what is allowed.
    """
    refuse_malformed(overrides)
    try:
        with fresh_hydra():
            return run_settings(compose_run(overrides))
    except COMPOSITION_ERRORS as error:
        raise ConfigError(in_our_words(error, overrides)) from None


@contextmanager
def fresh_hydra() -> Iterator[None]:
    """Inside the block, Hydra composes from our `conf/`; an earlier Hydra is restored later."""
    held = GlobalHydra.instance()
    outer = held.hydra
    held.clear()
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            yield
    finally:
        held.clear()
        if outer is not None:
            held.initialize(outer)


def compose_run(overrides: Sequence[str]) -> DictConfig:
    """Compose a run's settings, neither typed nor validated; Hydra must be initialised."""
    register()
    load_named_plugins(overrides)
    return hydra.compose("train", [as_hydra_takes_it(override) for override in overrides])


def run_settings(cfg: DictConfig) -> Config:
    """Composed settings as a run's `Config`, which knows nothing of Hydra or sweeps."""
    config = typed(cfg, Config, leave_out=("hydra", "sweep"))
    check_combinations(config)
    # imports torch, so only after misspelt keys have been reported
    from vae_torch.parts.complete import complete
    from vae_torch.parts.registry import load_plugins

    load_plugins(config.plugins)
    return complete(config)


def typed(cfg: DictConfig, schema: type[Settings], *, leave_out: Sequence[str] = ()) -> Settings:
    """Composed settings as an instance of `schema`."""
    kept = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in leave_out])
    try:
        values = OmegaConf.to_container(kept, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = error.full_key
        raise ConfigError(f"{key} is missing: write {key}=VALUE; --help says what it is") from None
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key}: {reason}; give it a value of its own") from None
    assert isinstance(values, dict)
    return validated(schema, {str(key): value for key, value in values.items()})


def as_hydra_takes_it(argument: str) -> str:
    """An argument that names a folder, quoted for Hydra's grammar.

    Unquoted, `=`, `,`, spaces and non-ASCII letters would end or split the value. The shell does
    not expand the `~` of `data.root=~/images`, so it is expanded here.
    """
    key, given, value = argument.partition("=")
    if not given or key not in PATHS or value[:1] in ("'", '"') or "${" in value:
        return argument
    if value.startswith("~"):
        value = str(Path(value).expanduser())
    escaped = value.replace("'", "\\'")
    return f"{key}='{escaped}'"


def in_our_words(error: Exception, arguments: Sequence[str], schema: type[Any] = Config) -> str:
    """One line about settings that Hydra cannot compose."""
    if isinstance(error, UnicodeDecodeError):
        return f"a settings file is not UTF-8 text ({error.reason}); correct the file"
    if isinstance(error, YAMLError):
        where, reason, path = "", str(error), "a settings file"
        if isinstance(error, MarkedYAMLError) and error.problem_mark:
            path = error.problem_mark.name
            where, reason = f"line {error.problem_mark.line + 1}: ", str(error.problem)
        return f"{path}: {where}no YAML ({reason}); correct the file"
    text = str(error)
    known = keys_of(schema)
    for argument in arguments:
        key = argument.lstrip("+~").partition("=")[0]
        if "=" not in argument and not argument.startswith(("-", "~")) and argument in text:
            return f"{argument}: write key=value; --help lists the keys"
        if f"'{key}'" in text and "Could not override" in text:
            return no_such_key(key, known)
    if found := re.search(r"Ambiguous value for argument '(.*?)'", text):
        for plugin, (choice, module, _) in PLUGINS.items():
            if choice in arguments and not _is_installed(module):
                return _not_installed(plugin)
        return f"{found[1]}: several values make a sweep; add -m"
    if found := re.search(r"Could not find '([^']*)'", text):
        given = [a for a in arguments if a.replace("=", "/", 1) == found[1]]
        group, _, choice = given[0].partition("=") if given else found[1].rpartition("/")
        return _no_such_choice(group, choice, text)
    if found := re.search(r"An item is already at '(.*?)'", text):
        return f"{found[1]} is there already; write {found[1]}=VALUE without the +"
    first = " ".join(text.split("\n\n")[0].split())
    return f"{first[:300]}; --help lists the keys"


def _no_such_choice(group: str, choice: str, text: str) -> str:
    """The message for a missing file in a group of `conf/`, such as `model=vgg`."""
    if group in ("hydra/launcher", "hydra/sweeper") and choice in PLUGINS:
        return _not_installed(choice)
    options = sorted(re.findall(r"^\t(\S+)$", text, re.MULTILINE))
    near = get_close_matches(choice, options, 1)
    meant = f"; did you mean {near[0]}?" if near else ""
    tables = ("model", "objective", "data")
    own = "; one of your own needs plugins=[my_parts]" if group in tables else ""
    return f"{group}={choice}: must be one of {', '.join(options)}{meant or own}"


def _is_installed(plugin: str) -> bool:
    try:
        return importlib.util.find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:  # without any plug-in their package is missing too
        return False


def _not_installed(plugin: str) -> str:
    choice, _, extra = PLUGINS[plugin]
    return f"{choice}: not installed; pip install -e '.[{extra}]'"


def full_errors() -> bool:
    """Whether the user wants Hydra's own tracebacks; from here on Hydra raises its errors.

    If this variable is not set, Hydra prints an error and exits; if it is set, Hydra raises.
    """
    asked = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    return asked
