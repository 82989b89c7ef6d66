"""The messages of the commands: one line for a mistake, paths as a user would type them."""

import argparse
import io
import os
import shlex
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from vae_torch.config import UserError


class EndedError(SystemExit):
    """Ends a command with a line that says why; in a sweep the other jobs continue."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status)
        self.reason = reason


def program() -> str:
    """The name of the called program: `train.py`, or `vae-torch`."""
    return Path(sys.argv[0]).name


def command(name: str) -> str:
    """The command line of another command of this project."""
    python = Path(sys.executable)
    if Path(sys.argv[0]).suffix == ".py":
        script = Path(sys.argv[0]).with_name(f"{name}.py")
        return f"{shown(python)} {shown(script)}"
    return f"vae-torch {name}"


def tensorboard(folder: Path) -> str:
    """The command that shows a folder of runs in TensorBoard, and its address."""
    here = Path(sys.executable).parent / "tensorboard"
    port = _free_port()
    ask = "" if port == _PORT else f" --port {port}"
    logs = shlex.quote(str(shown(folder)))
    return f"{shown(here)} --logdir {logs}{ask}   then open http://localhost:{port}"


_PORT = 6006  # TensorBoard's default


def _free_port() -> int:
    """TensorBoard's port, or the next free one."""
    for port in range(_PORT, _PORT + 20):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("localhost", port))
            return port
    return _PORT


def refuse(message: str) -> NoReturn:
    """Report a user's mistake: one line, exit status 2."""
    reason = " ".join(message.split())
    print(f"{program()}: {reason}", file=sys.stderr)
    raise EndedError(2, reason)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found too little memory, on a processor or a GPU."""
    return "allocate memory" in str(error) or "out of memory" in str(error)


@contextmanager
def told(
    place: str,
    remedy: str = "choose another file",
    smaller: str = "ask for fewer images, or use device=cpu",
) -> Iterator[None]:
    """Inside the block, a user's mistake or a failed write ends the command with one line.

    So does too little memory. `place` is the setting that says where the command writes:
    `out=x.npz`.
    """
    try:
        yield
    except UserError as error:
        refuse(str(error))
    except OSError as error:
        refuse(f"{place}: cannot be written ({error.strerror}); {remedy}")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        refuse(f"out of memory: {smaller}")


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, like the commands whose settings Hydra reads."""

    def error(self, message: str) -> NoReturn:
        """Exit status 2."""
        refuse(f"{message}; --help lists the options")


def tell_interrupts() -> None:
    """End on Ctrl-C with one line, and never because of a terminal's encoding."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # for a locale that lacks `±`
        sys.stdout.reconfigure(errors="backslashreplace")

    def end(kind: Any, error: Any, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print(f"{program()}: interrupted", file=sys.stderr, flush=True)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)  # a shell sees it and stops its own loop
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = end


def leave_disk_errors_to_main(args: threading.ExceptHookArgs) -> None:
    """Ignore disk errors of TensorBoard's thread, which it raises again in ours."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def make_folder(key: str, folder: Path) -> None:
    """Make a writable folder, or refuse in one line and leave nothing behind."""
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


def shown(path: Path) -> Path:
    """A path as a user would type it here."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def typed_as(key: str, path: Path) -> str:
    """`key=path` for a shell."""
    return shlex.quote(f"{key}={shown(path)}")
