"""Reports some mistakes before the slow import of Hydra."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vae_torch.config import ConfigError, keys_of, no_such_key


def conf_dir() -> Path:
    """`conf/` of the checkout, or of the installed package."""
    package = Path(__file__).parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def refuse_malformed(arguments: Sequence[str]) -> None:
    """Refuse what Hydra would misread or answer with a traceback, such as `model=[mlp,conv]`.

    Raises:
        ConfigError: One line about the first such argument.
    """
    for argument in arguments:
        key, given, value = argument.partition("=")
        if given and not key:
            raise ConfigError(f"{argument}: names no key; write key=value")
        folder = conf_dir() / key if key else None
        if folder and folder.is_dir() and (value in ("", "null") or value.startswith("[")):
            names = sorted(path.stem for path in folder.glob("*.yaml"))
            raise ConfigError(f"{argument}: name one of {', '.join(names)}")


def refuse_unknown(arguments: Sequence[str], schema: type[Any]) -> None:
    """Refuse a key that is neither a setting, nor a part or group of settings, nor Hydra's own.

    Raises:
        ConfigError: One line about the first such key.
    """
    known = keys_of(schema)
    for argument in arguments:
        key, given, _ = argument.lstrip("+~").partition("=")
        if not given or key.startswith(("-", "hydra.", "sweep.dir")) or "/" in key or "@" in key:
            continue
        inside = (f"{key}.".startswith(f"{each}.") or each.startswith(f"{key}.") for each in known)
        if not any(inside) and not (conf_dir() / key).is_dir():
            raise ConfigError(no_such_key(key, known))
