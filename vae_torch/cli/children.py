"""Work in a process of its own, so that what kills it kills nothing else.

A sweep with where=cores has four kinds of processes:

    train.py -> joblib's workers -> a server each, which has imported torch -> a child for each run

A worker watches train.py, a child its worker: where the one is gone, the run ends by SIGTERM, after
a checkpoint. Windows does not tell a worker that train.py is gone: there the runs are finished.

Where fork is absent, or unsafe once a system library runs threads (macOS), there is no server: each
child starts a Python of its own.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

# Imported once in the server that forks the children, not in each of them.
_PRELOAD = [
    "vae_torch.cli.job",
    "vae_torch.runs.run",
    "matplotlib.backends.backend_agg",
    "torch._dynamo",
    "torch.utils.tensorboard",
]


class KilledError(Exception):
    """The process that did the work was killed: says by which signal."""


def in_a_child(work: Callable[..., float], *arguments: Any) -> float:
    """What `work` returns in a child process; KilledError where that was killed.

    Work and arguments can be pickled. The child ends, after a checkpoint, when this process or the
    one that started it is gone.
    """
    # joblib's own is unknown to a child
    multiprocessing.set_start_method(start_method(), force=True)
    context = multiprocessing.get_context()
    context.set_forkserver_preload(_PRELOAD)
    sweep = os.getppid()
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(sender, work, arguments))
    child.start()
    # Ctrl-C reaches the child too, which ends after a step: this process waits for it
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
    sender.close()
    answer = None
    while not wait([receiver, child.sentinel], 0.5):
        if os.getppid() != sweep:  # of a sweep that was killed, no run goes on unseen
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
        os._exit(1)  # nobody is left to give this worker work
    status = child.exitcode or 0  # known, after `join`
    if status < 0:
        raise KilledError(f"killed by {signal.Signals(-status).name}")
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        sys.exit(status)
    if answer is None:
        raise KilledError(f"ended with exit status {status}")
    return float(answer)


def start_method() -> str:
    """How a child is started here: `forkserver`, or `spawn`."""
    can_fork = hasattr(os, "fork") and sys.platform != "darwin"
    return "forkserver" if can_fork else "spawn"


def _answer(sender: Connection, work: Callable[..., float], arguments: tuple[Any, ...]) -> None:
    """The child's life."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sender.send(work(*arguments))
    sender.close()


def _end_with_parent() -> None:
    """Send this process SIGTERM when its parent is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        signal.raise_signal(signal.SIGTERM)  # unlike `os.kill` it calls a handler on Windows too
