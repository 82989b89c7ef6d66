"""Tables of parts, and the plug-ins that add to them.

A part is a class, or a function that returns one, under a name:

    @likelihoods.register("poisson")
    class Poisson(nn.Module):
        def __init__(self, *, rate: float = 1.0) -> None: ...

Its keyword-only arguments are its options: their names, types and defaults are read from the
signature, and `likelihood=poisson likelihood_options.rate=2` sets one. Positional arguments are
what the package gives it.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from vae_torch.config import ConfigError

Part = TypeVar("Part", bound=Callable[..., Any])

PLUGINS = "vae_torch.plugins"  # the entry points' group
_loaded: dict[str, str] = {}  # plug-in -> the module that it is

# Parts of this package that are imported when a name is asked for that no other part has.
LATER = tuple(f"vae_torch.parts.{module}" for module in ("flows", "pixelcnn", "tcvae", "two_layer"))


class Table(Mapping[str, Callable[..., Any]], Generic[Part]):
    """One kind of part: `table["name"]` is the class.

    Args:
        key: The setting that names such a part: `prior`, `model`.
        options: The setting that holds its options: `prior_options`, `model.options`.
    """

    def __init__(self, key: str, options: str) -> None:
        self.key, self.options_key = key, options
        self._parts: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[Part], Part]:
        """Add the decorated class under this name.

        Raises:
            ConfigError: The name is taken.
        """

        def add(part: Part) -> Part:
            had = self._parts.get(name)
            if had is not None and _place(had) != _place(part):
                raise ConfigError(
                    f"{self.key}={name}: {_place(part)} takes a name that {_place(had)} has; "
                    "give it another"
                )
            self._parts[name] = part
            return part

        return add

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """The class of this name.

        Raises:
            ConfigError: Unknown name.
        """
        if name not in self._parts:
            for module in LATER:
                importlib.import_module(module)
        if name not in self._parts:
            raise ConfigError(
                f"{self.key}={name}: must be one of {', '.join(self)}, or a part of your own: name "
                "its module, plugins=[my_parts]"
            )
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def accepts(self, name: str) -> dict[str, inspect.Parameter]:
        """The options of a part, from its signature."""
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters = inspect.signature(self[name]).parameters
        return {key: p for key, p in parameters.items() if p.kind is kind}

    def build(
        self,
        name: str,
        options: Mapping[str, Any],
        *,
        shared: Mapping[str, tuple[Any, Any]] | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> Any:
        """Make the part of this name.

        Args:
            name: Name of the part.
            options: The given options; the others have their defaults.
            shared: Settings that several parts understand: option -> (value, default). For a part
                without such an option the value must be the default.
            context: What the package supplies, such as `latent_dim`, by the names of the part's
                positional arguments.

        Raises:
            ConfigError: An unknown part, an unknown option, or a value of the wrong type.
        """
        known = self.accepts(name)
        taken = {}
        for option, (value, default) in (shared or {}).items():
            if option in known:
                taken[option] = value
            elif value != default:
                raise ConfigError(
                    f"{option}={value} with {self.key}={name}: it has no {option}; leave it at "
                    f"{default}"
                )
        given = self.checked(name, {**taken, **options})
        there = context or {}
        positional = [
            parameter.name
            for parameter in inspect.signature(self[name]).parameters.values()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        for argument in positional:
            if argument not in there:
                raise ConfigError(
                    f"{self.key}={name}: takes {argument}, which the package does not supply; "
                    f"it may take {', '.join(there) or 'nothing'}, and options after a *"
                )
        return self[name](*(there[argument] for argument in positional), **given)

    def checked(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options of a part: the given ones, and the defaults of the others.

        Raises:
            ConfigError: An option is unknown, missing, or of the wrong type.
        """
        known = self.accepts(name)
        for option in given:
            if option not in known:
                near = get_close_matches(option, known, 1, 0.6)
                meant = f"did you mean {near[0]}? " if near else ""
                there = f"its options are {', '.join(known)}" if known else "it has none"
                raise ConfigError(
                    f"{self.options_key}.{option}: no option of {self.key}={name}; {meant}{there}"
                )
        part = self[name]
        hints = get_type_hints(
            part.__init__ if inspect.isclass(part) else part, include_extras=True
        )
        values = {}
        for option, parameter in known.items():
            where = f"{self.options_key}.{option}"
            value = given.get(option, parameter.default)
            if value is inspect.Parameter.empty:
                raise ConfigError(f"{where} is missing: {self.key}={name} needs a value for it")
            if option in given and option in hints:
                try:
                    value = TypeAdapter(hints[option]).validate_python(value)
                except ValidationError as error:
                    reason = error.errors()[0]["msg"]
                    raise ConfigError(
                        f"{where}={value}: {reason[:1].lower()}{reason[1:]}"
                    ) from None
            values[option] = value
        return values


def load_plugins(names: Sequence[str]) -> None:
    """Import the user's own parts: modules, or entry points of installed packages.

    A module is searched for on Python's path and in the working directory.

    Args:
        names: Modules, as in an import, or entry points of the group `vae_torch.plugins`.

    Raises:
        ConfigError: One cannot be found, or fails on import.
    """
    for name in names:
        if name in _loaded:
            continue
        found = entry_points(group=PLUGINS)
        module = next((point.module for point in found if point.name == name), name)
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.append(here)
        try:
            importlib.import_module(module)
        except ConfigError as error:
            raise ConfigError(f"plugins=[{name}]: {error}") from None
        except ModuleNotFoundError as error:
            missing = error.name or module
            if module != missing and not module.startswith(f"{missing}."):
                raise ConfigError(
                    f"plugins=[{name}]: it needs {missing}, which is not installed"
                ) from None
            raise ConfigError(
                f"plugins=[{name}]: no such module; it must lie in {here} or be installed"
            ) from None
        except Exception as error:
            raise ConfigError(
                f"plugins=[{name}]: fails on import ({type(error).__name__}: {error})"
            ) from error
        _loaded[name] = module


def loaded_plugins() -> dict[str, str]:
    """The loaded plug-ins: name -> module."""
    return dict(_loaded)


def plugins_with(parts: Iterable[Callable[..., Any]]) -> list[str]:
    """The loaded plug-ins that define one of these parts."""
    modules = [f"{part.__module__}." for part in parts]
    return [
        name
        for name, module in _loaded.items()
        if any(each.startswith(f"{module}.") for each in modules)
    ]


def _place(part: Callable[..., Any]) -> str:
    return f"{part.__module__}.{getattr(part, '__qualname__', part)}"
