"""Starts many command lines from one interpreter that has imported the slow libraries once.

`python -m tests.command_lines` is that interpreter. It forks a process for each command line, which
is therefore there in milliseconds and sees nothing of what another has done to Hydra, to logging or
to torch. Where a test is about the start itself, it takes a Python of its own.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

from tests.moments import kill_at

REPOSITORY = Path(__file__).parent.parent
SCRIPTS = REPOSITORY / "scripts"

SLOW = (
    "hydra",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "PIL.GifImagePlugin",
    "torch._dynamo",  # by the first optimiser
    "torch.utils.tensorboard",
    "torchvision",
    "vae_torch.cli.job",
    "vae_torch.evaluate",
    "vae_torch.explorer",
    "vae_torch.runs.run",
    "vae_torch.runs.summary",
)
_LONGEST = 1 << 16  # bytes of a request


class Ended(NamedTuple):
    """How a command line ended."""

    status: int
    out: str
    error: str


class Started:
    """A command line that runs, or has ended: the counterpart of `subprocess.Popen`."""

    def __init__(self, server, pid, out, error):
        self.pid, self.stdout, self.stderr = pid, out, error
        self.status, self.seconds = None, None  # known once it has ended: CPU seconds
        self._server = server

    def wait_for(self, beginning):
        """Read its output until a line with this beginning."""
        for line in self.stdout:
            if line.startswith(beginning):
                return line
        raise AssertionError(f"no {beginning!r}: {self.end()}")

    def send_signal(self, number):
        """Send it a signal, unless it has ended."""
        if not self.has_ended():
            os.kill(self.pid, number)

    def has_ended(self):
        """Its exit status if it has ended, without waiting."""
        return self._ask(wait=False)

    def end(self):
        """Wait until it ends; return the output that was not read yet."""
        out = self.stdout.read()
        self._ask(wait=True)
        self.stderr.seek(0)
        return Ended(self.status, out, self.stderr.read())

    def _ask(self, *, wait):
        if self.status is None:
            self.status, self.seconds = self._server.ask({"pid": self.pid, "wait": wait})
        return self.status is not None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Remove everything of it."""
        self.send_signal(signal.SIGKILL)
        self._ask(wait=True)
        self.stdout.close()
        self.stderr.close()


class CommandLines:
    """The client of the server process."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.command_lines", str(theirs.fileno())],
                cwd=REPOSITORY,
                pass_fds=[theirs.fileno()],
            )

    def ask(self, request, files=()):
        """The server's answer."""
        socket.send_fds(self._socket, [json.dumps(request).encode()], files)
        return json.loads(self._socket.recv(_LONGEST))

    def start(
        self, script, *arguments, cwd=REPOSITORY, env=None, killed=None, before=None, group=False,
        largest_file=None,
    ):  # fmt: skip
        """Start a command line.

        Args:
            script: Its name in scripts/, or any file's path.
            arguments: Of the script.
            cwd: Its working folder.
            env: More environment variables; None takes one away.
            killed: The arguments of `kill_at`.
            before: `module:function` and its arguments, called in the process before the script.
            group: It leads a process group of its own, which a test can send a signal.
            largest_file: In bytes; a write beyond it fails.
        """
        reading, writing = os.pipe()
        error = tempfile.TemporaryFile(  # noqa: SIM115 - `Started` closes it
            "w+", encoding="utf-8", errors="backslashreplace"
        )
        request = {
            "script": str(SCRIPTS / script), "arguments": list(map(str, arguments)),
            "cwd": str(cwd), "env": env or {}, "killed": killed, "before": before, "group": group,
            "largest_file": largest_file,
        }  # fmt: skip
        pid = self.ask(request, [writing, error.fileno()])
        os.close(writing)
        out = os.fdopen(reading, encoding="utf-8", errors="backslashreplace")
        return Started(self, pid, out, error)

    def run(self, script, *arguments, **options):
        """A command line from start to end; the options are those of `start`."""
        with self.start(script, *arguments, **options) as started:
            return started.end()

    def close(self) -> None:
        """End the server."""
        self._socket.close()
        self._process.wait()


@functools.cache
def command_lines() -> CommandLines:
    """The client of this process, started on first use."""
    lines = CommandLines()
    atexit.register(lines.close)
    return lines


def start_script(script, *arguments, **options) -> Started:
    """Start a command line; the options are those of `CommandLines.start`."""
    return command_lines().start(script, *arguments, **options)


def run_script(script, *arguments, **options) -> subprocess.CompletedProcess:
    """A command line from start to end, as `subprocess.run` gives it."""
    ended = command_lines().run(script, *arguments, **options)
    return subprocess.CompletedProcess([script, *arguments], *ended)


def _serve(requests):
    while True:
        message, files, *_ = socket.recv_fds(requests, _LONGEST, 2)
        if not message:
            return
        request = json.loads(message)
        if "pid" in request:
            answer = _ended(**request)
        else:
            answer = os.fork()
            if not answer:
                requests.close()
                _become(request, *files)
            for file in files:
                os.close(file)
        requests.send(json.dumps(answer).encode())


def _ended(pid, wait):
    """Exit status and CPU seconds of a child that ended."""
    found, status, used = os.wait4(pid, 0 if wait else os.WNOHANG)
    if not found:
        return None, None
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


def _become(request, out, error):
    """Run a script in the forked child, as in a fresh interpreter."""
    status = 1
    try:
        with Path(os.devnull).open("rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(out, 1)
        os.dup2(error, 2)
        os.close(out)
        os.close(error)
        # the parent's streams remember whether they were a terminal
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(  # noqa: SIM115
            2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False
        )
        if request["group"]:
            os.setsid()
        if request["largest_file"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, [request["largest_file"]] * 2)
        for name, value in request["env"].items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        os.chdir(request["cwd"])
        status = _run(request)
        # as the interpreter does when it exits: wait for threads, or tell them to end
        threading._shutdown()
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def _run(request):
    """What the interpreter does with a script, its exit status included."""
    script = request["script"]
    sys.argv = [script, *request["arguments"]]
    sys.orig_argv = [sys.executable, *sys.argv]
    sys.path.insert(0, str(Path(script).parent))
    try:
        if request["before"]:
            name, *arguments = request["before"]
            module, function = name.split(":")
            getattr(importlib.import_module(module), function)(*arguments)
        if request["killed"]:
            kill_at(*request["killed"])
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.stdout.flush()  # as the interpreter does before it
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _do_what_is_slow_the_first_time():
    for name in SLOW:
        importlib.import_module(name)
    importlib.import_module("hydra.core.plugins").Plugins.instance()  # imports all of its plugins
    importlib.import_module("vae_torch.cli.compose").compose()  # Hydra's parsers learn
    importlib.import_module("vae_torch.runs.identity").code_hash()
    warnings.simplefilter("error", UserWarning)
    gc.collect()
    gc.freeze()  # the garbage collector of each child skips the objects that exist now


if __name__ == "__main__":
    _do_what_is_slow_the_first_time()
    _serve(socket.socket(fileno=int(sys.argv[1])))
