"""Runs work in a process of its own, so that a kill there stops nothing else.

A sweep with where=cores has four kinds of processes:

    train.py -> joblib's workers -> a server each, which has imported torch -> a child for each run

A worker watches train.py, and a child watches its worker: if that ends, the run stops by SIGTERM
after a checkpoint. On Windows a worker is not told that train.py has ended; there the runs finish.

Without a safe fork (on Windows; on macOS, where a system library runs threads) there is no server:
each child starts its own Python.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

# Imported once, in the server that forks the children.
_PRELOAD = [
    "vae_torch.cli.job",
    "vae_torch.runs.run",
    "matplotlib.backends.backend_agg",
    "torch._dynamo",
    "torch.utils.tensorboard",
]


class KilledError(Exception):
    """The process that did the work was killed; the message names the signal."""


def in_a_child(work: Callable[..., float], *arguments: Any) -> float:
    """Run `work` in a child process and return its result; KilledError if the child was killed.

    Work and arguments must be picklable. The child ends, after a checkpoint, when this process or
    the one that started it ends.
    """
    # a child does not know joblib's own
    multiprocessing.set_start_method(start_method(), force=True)
    context = multiprocessing.get_context()
    context.set_forkserver_preload(_PRELOAD)
    sweep = os.getppid()
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(sender, work, arguments))
    child.start()
    # Ctrl-C reaches the child too, which ends after its step: this process waits for it
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
    sender.close()
    answer = None
    while not wait([receiver, child.sentinel], 0.5):
        if os.getppid() != sweep:  # no run continues unseen after its sweep was killed
            child.terminate()
            break
    if receiver.poll():
        try:
            answer = receiver.recv()
        except EOFError:
            answer = None
    child.join()
    if before is not None:
        signal.signal(signal.SIGINT, before)
    if os.getppid() != sweep:
        os._exit(1)  # nobody is left to give this worker a job
    status = child.exitcode or 0  # known after `join`
    if status < 0:
        raise KilledError(f"killed by {signal.Signals(-status).name}")
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        sys.exit(status)
    if answer is None:
        raise KilledError(f"ended with exit status {status}")
    return float(answer)


def start_method() -> str:
    """How children start on this system: `forkserver` or `spawn`."""
    can_fork = hasattr(os, "fork") and sys.platform != "darwin"
    return "forkserver" if can_fork else "spawn"


def _answer(sender: Connection, work: Callable[..., float], arguments: tuple[Any, ...]) -> None:
    """The body of the child process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sender.send(work(*arguments))
    sender.close()


def _end_with_parent() -> None:
    """Send this process SIGTERM when its parent ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        signal.raise_signal(signal.SIGTERM)  # unlike `os.kill` it calls a handler on Windows too
