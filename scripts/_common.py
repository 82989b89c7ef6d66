"""What the scripts share: typed settings, the device, and how a mistake is told."""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from vae_torch.config import ConfigError, check_device

Settings = TypeVar("Settings")


def typed(cfg: DictConfig, schema: type[Settings]) -> Settings:
    """Composed settings as an instance of the dataclass that they were composed for.

    Raises:
        ConfigError: A mandatory value is missing, or a key was added that means nothing.
    """
    try:
        settings = OmegaConf.to_object(cfg)
        given = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key}: {reason}; give it a value of its own") from None
    assert isinstance(settings, schema)
    if unknown := _unknown_key(given, asdict(settings)):  # type: ignore[call-overload]
        raise ConfigError(f"{unknown}: no such key; --help lists them")
    return settings


def _unknown_key(given: Any, known: Any) -> str | None:
    """The first key, dotted, that is given and not known: `+key=value` can add any."""
    if not isinstance(given, dict) or not isinstance(known, dict):
        return None
    for key, value in given.items():
        if key not in known:
            return str(key)
        if inner := _unknown_key(value, known[key]):
            return f"{key}.{inner}"
    return None


def quote_paths(*keys: str) -> None:
    """Let folders be named as they are, `model.latent_dim=2,seed=0` among them.

    Hydra's grammar takes `=`, `,` and spaces in a value for its own unless they are quoted.
    """
    for i, argument in enumerate(sys.argv):
        key, given, value = argument.partition("=")
        if given and key in keys and value[:1] not in ("'", '"') and "${" not in value:
            escaped = value.replace("'", "\\'")
            sys.argv[i] = f"{key}='{escaped}'"


def refuse_malformed(*groups: str) -> None:
    """Answers where Hydra would with a traceback (`model=null`), or take one of `model=[a,b]`."""
    for argument in sys.argv[1:]:
        group, _, value = argument.partition("=")
        if argument.startswith("="):
            refuse(f"{argument}: names no key; write key=value")
        if group in groups and (value in ("", "null") or value.startswith("[")):
            refuse(f"{argument}: name one of the files in conf/{group}/")


def refuse_broken_files() -> None:
    """Answers where Hydra would with a traceback: at a settings file that is no YAML.

    Hydra reads them inside `hydra.main`, which lets no exception out; `SystemExit` it does.
    """
    load = OmegaConf.load

    def load_or_refuse(file: Any) -> Any:
        try:
            return load(file)
        except (YAMLError, UnicodeDecodeError) as error:
            where, reason = "", str(error)
            if isinstance(error, MarkedYAMLError) and error.problem_mark:
                where, reason = f"line {error.problem_mark.line + 1}: ", str(error.problem)
            path = file if isinstance(file, str | Path) else file.name
            refuse(f"{path}: {where}no YAML ({reason}); correct the file")

    OmegaConf.load = load_or_refuse  # type: ignore[method-assign,assignment]


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as the scripts do whose settings Hydra reads."""

    def error(self, message: str) -> NoReturn:
        """Exit status 2."""
        refuse(f"{message}; --help lists the options")


def tell_interrupts() -> None:
    """Ctrl-C ends a script with a line, not with a traceback."""

    def end(kind: Any, error: Any, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr, flush=True)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)  # a shell sees why, and stops its own loop too
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = end


def leave_disk_errors_to_main(args: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread of its own, and raises what befell it there in ours too."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def resolve_device(name: str) -> Any:
    """The torch device that `device=` names.

    Raises:
        ConfigError: Another word, or CUDA is asked for and is not there.
    """
    import torch

    check_device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"device={name}: this machine has {count} CUDA devices; use device=cpu")
    return device


def tune_cpu(threads: int | None) -> None:
    """Processor settings that change no figure, only how long it takes. Call before any tensor."""
    import torch

    # Adam's first moments decay into denormal numbers, which make a step twice as slow. Threads
    # inherit the setting where they start, so it stands before the first parallel operation.
    torch.set_flush_denormal(True)
    if threads:
        torch.set_num_threads(threads)


def set_products(precision: str, device: Any) -> None:
    """How exact fp32 products and convolutions are, and who makes the products; process-wide.

    `medium` lets them be quicker: TF32 on CUDA; on a CPU with AVX-512 oneDNN takes products over
    from MKL, with bf16 inside where there are matrix units for it. Where there are none, oneDNN's
    are as exact as MKL's, and far quicker on AMD's processors, whose AVX-512 MKL leaves alone: so
    there fp32 takes oneDNN too. On CUDA convolutions give the same bits every time.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = precision == "medium"  # torch's default is True
    torch.backends.cudnn.deterministic = True
    torch.set_float32_matmul_precision("medium")
    if precision != "medium" and (device.type != "cpu" or not _products_are_fp32()):
        torch.set_float32_matmul_precision("highest")


def _products_are_fp32() -> bool:
    """Whether this one product is off by what fp32 rounds: 2e-6 of its scale. With bf16: 1e-1."""
    import torch

    a = torch.arange(128.0 * 784).sin().view(128, 784)
    b = torch.arange(784.0 * 512).sin().view(784, 512)
    exact = a.double() @ b.double()
    return bool((a @ b - exact).abs().max() < 1e-4 * exact.abs().max())


def cpp_compiler() -> str:
    """What torch.compile will build its CPU code with.

    Raises:
        ConfigError: It is not there, or does not run.
    """
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    command = [*shlex.split(name), "--version"]
    try:
        runs = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        runs = False
    if not runs:
        raise ConfigError(
            f"compile=true: no C++ compiler ({name}) that runs on this machine; install one "
            "(Debian: apt install g++), or use compile=false"
        )
    return name


def bf16_factor() -> float:
    """How long a bf16 product takes on this CPU, measured, in units of an fp32 one."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(128, 784, dtype=dtype), torch.ones(784, 512, dtype=dtype)
        times = []
        for _ in range(12):
            began = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - began)
        return min(times)

    return seconds(torch.bfloat16) / seconds(torch.float32)


def slow_bf16(factor: float) -> str:
    """What to say where `bf16_factor` is above one."""
    return (
        f"precision=bf16: a matrix product takes {factor:.3g} times as long as with fp32 here; "
        "this processor has no bf16 arithmetic, precision=fp32 is quicker"
    )


def device_name(device: Any) -> str:
    """Device, its model where it has a name, and the threads that a CPU run used."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def make_folder(key: str, folder: Path) -> None:
    """Make a folder that can be written, or refuse in one line and leave nothing behind."""
    new = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        for path in new:
            with suppress(OSError):
                path.rmdir()
        name = str(folder) if len(str(folder)) < 200 else f"{str(folder)[:200]}..."
        refuse(f"{key}={name}: cannot be written ({error.strerror}); choose another folder")


class EndedError(SystemExit):
    """A run that ends with a line about why; in a sweep the others go on."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status)
        self.reason = reason


def refuse(message: str) -> NoReturn:
    """A user's mistake: one line, exit status 2."""
    reason = " ".join(message.split())
    print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
    raise EndedError(2, reason)


def shown(path: Path) -> Path:
    """A path as a user would type it here."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
