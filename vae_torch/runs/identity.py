"""What decides a run's numbers besides its settings: the code and the libraries."""

import ast
import hashlib
import importlib.metadata
import io
import logging
import platform
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import numpy
import torch

from vae_torch.config import ConfigError
from vae_torch.parts.registry import loaded_plugins

log = logging.getLogger("vae_torch")

# The modules that compute a run's numbers, and all that these import.
_ROOTS = ("vae_torch.training.loop", "vae_torch.machine")

_PACKAGE = Path(__file__).parent.parent
_BEGINNING = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)  # tokens before a statement


def versions() -> dict[str, str]:
    """Versions of everything that decides a run's numbers."""
    from vae_torch import __version__

    return {
        "vae_torch": __version__,
        "code": code_hash(),
        "torch": str(torch.__version__),  # a string subclass
        "torchvision": importlib.metadata.version("torchvision"),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{f"plug-in {name}": _hash_of(module) for name, module in loaded_plugins().items()},
    }


def _hash_of(module: str) -> str:
    """SHA-256 of the source of a user's module, or of a package's modules."""
    path = Path(str(sys.modules[module].__file__))
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{bare(file.read_text('utf-8'))}\n".encode())
    return digest.hexdigest()


def refuse_other_code(had: object, *, path: Path, allowed: bool) -> None:
    """Refuse to resume a run, or accept it as finished, with other code than it was started with.

    `had` are its `versions` (None for older runs), read from the file at `path`. If `allowed`,
    other code causes a warning only.
    """
    if not isinstance(had, dict):
        return
    now = versions()
    own = [name for name in now if name.startswith("plug-in ")]
    for name in ("code", "vae_torch", "torch", *own):
        before = str(had.get(name))
        if before == now[name]:
            continue
        words = f"{path}: its run was made with {name} {before[:12]}, this is {now[name][:12]}"
        if not allowed:
            raise ConfigError(
                f"{words}; choose another folder, or add train.allow_other_code=true to "
                "continue anyway"
            )
        log.warning("%s: its bits may differ from here on", words)


@cache
def code_hash(roots: tuple[str, ...] = _ROOTS) -> str:
    """SHA-256 of the modules that compute numbers, without comments and docstrings.

    By default those of a run: the training loop and what it reaches. It is the same for every
    version of Python, and stays as it was at the first call.
    """
    digest = hashlib.sha256()
    for name in modules(roots):
        digest.update(f"{name}\n{bare(source_of(name))}\n".encode())
    return digest.hexdigest()


def modules(roots: tuple[str, ...] = _ROOTS) -> list[str]:
    """The modules of this package that some modules reach, by default the training loop."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        if (package := name.rpartition(".")[0]) != "vae_torch":  # its __init__ runs first
            waiting.append(package)
        for node in ast.walk(ast.parse(source_of(name))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vae_torch"):
                assert node.module is not None
                # both `from vae_torch import data` and `from vae_torch.data import x` name a module
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                waiting += [m for m in (node.module, *inner) if m != "vae_torch" and path_of(m)]
    return sorted(found)


def path_of(module: str) -> Path | None:
    """The file of a module of this package, else None."""
    base = _PACKAGE.joinpath(*module.split(".")[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def source_of(module: str) -> str:
    """Its text."""
    path = path_of(module)
    assert path is not None, module
    return path.read_text("utf-8")


def bare(source: str) -> str:
    """Source without comments, docstrings and empty lines."""
    lines = source.split("\n")
    before = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column]
        elif token.type != tokenize.NL:
            if token.type == tokenize.STRING and before in _BEGINNING:  # a docstring
                lines[row - 1 : token.end[0]] = [""] * (token.end[0] - row + 1)
            before = token.type
    return "\n".join(line.rstrip() for line in lines if line.strip())


def git_commit() -> str | None:
    """The commit of the code, with `-dirty` for uncommitted changes; None outside git."""
    command = ["git", "-C", str(_PACKAGE), "describe", "--always", "--dirty"]
    try:
        got = subprocess.run(
            [*command, "--abbrev=40", "--exclude=*"],
            capture_output=True,
            encoding="utf-8",
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return got.stdout.strip() or None
