"""Work in a process of its own, so that what kills it kills nothing else."""

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable


class KilledError(Exception):
    """The process that did the work was killed: says by which signal."""


def in_a_child(work: Callable[[], float]) -> float:
    """What `work` returns, computed by a fork of this process.

    Raises:
        KilledError: The fork was killed.
        SystemExit: The fork ended so.
    """
    parent = os.getppid()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _answer(work, writing)
    os.close(writing)
    while not select.select([reading], [], [], 0.5)[0]:
        if os.getppid() != parent:  # of a sweep that was killed, no run goes on unseen
            os.kill(child, signal.SIGTERM)
            break
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if os.getppid() != parent:
        os._exit(1)  # nobody is left to give this worker work
    if status < 0:
        raise KilledError(f"killed by {signal.Signals(-status).name}")
    if status:
        sys.exit(status)
    return float(json.loads(answer))


def _answer(work: Callable[[], float], writing: int) -> None:
    """The child's life."""
    status = 1
    try:
        _end_with_parent()
        os.write(writing, json.dumps(work()).encode())
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _end_with_parent() -> None:
    """Send this process SIGTERM when its parent is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
