"""Ends this process at a named moment, for tests/test_reliability.py.

Nothing in the product knows of it: it takes the place of what the product calls.
"""

import importlib
import io
import itertools
import os
import re
import signal
import time
import types
from pathlib import Path

# Of a file's n-th write in this process, to a scratch file beside it or at its end: after half of
# the bytes; with all of them there, but not renamed; right after the rename, or the close where
# there is no rename.
STAGES = ("half", "before", "after")


ending = (signal.SIGKILL,)


def kill_at(what, where, name="", *numbers):
    """Arrange the end.

    Args:
        what: `read` (of the data), `step`, `evaluation` (inside it), `record` (half of one is in
            TensorBoard's file), one of STAGES, or `seconds` after the first step.
        where: The how manieth; for `seconds`, how many.
        name: Of the file, for STAGES.
        numbers: The signals that the process gets; SIGKILL where none is named.
    """
    global ending
    ending = numbers or ending
    count = itertools.count(1)

    def reached():
        return next(count) == where

    if what == "step":
        at_steps(lambda: reached() and die())
    elif what == "seconds":
        at_steps(lambda: next(count) == 1 and die_in(where))
    elif what == "evaluation":
        in_an_evaluation(reached)
    elif what == "read":
        while_data_is_read(reached)
    elif what == "record":
        in_a_record(reached)
    else:
        in_a_write(what, name, reached)


def die():
    for number in ending:
        os.kill(os.getpid(), number)


def die_in(seconds):
    """End this process from another one, wherever it is then."""
    run = os.getpid()
    if not os.fork():
        time.sleep(seconds)
        if os.getppid() == run:
            os.kill(run, signal.SIGKILL)
        os._exit(0)


def at_steps(call):
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda *_: call())


def while_data_is_read(reached):
    sources = importlib.import_module("vae_torch.data.sources")
    read = sources.read_idx

    def read_idx(*order, **settings):
        if reached():
            die()
        return read(*order, **settings)

    sources.read_idx = read_idx


def in_an_evaluation(reached):
    loop = importlib.import_module("vae_torch.training.loop")
    evaluate = loop.bound_metrics

    def end():
        die()
        yield from ()

    def bound_metrics(vae, loader, *more, **settings):
        if reached():
            loader = itertools.chain(itertools.islice(loader, 3), end(), loader)
        return evaluate(vae, loader, *more, **settings)

    loop.bound_metrics = bound_metrics


def in_a_record(reached):
    from tensorboard.summary.writer.record_writer import RecordWriter

    write = RecordWriter.write

    def torn(self, data):
        if reached():
            whole = io.BytesIO()
            write(RecordWriter(whole), data)
            self._writer.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            self._writer.flush()
            die()
        write(self, data)

    RecordWriter.write = torn


def in_a_write(stage, name, reached):
    assert stage in STAGES
    opened, replaced = Path.open, Path.replace
    doomed = []  # scratch files at whose rename the process ends

    def open_(path, mode="r", *more, **settings):
        file = opened(path, mode, *more, **settings)
        scratch = re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{8}}\.part", path.name)
        written = not mode.startswith("r") or "+" in mode
        if not written or not (scratch or path.name == name) or not reached():
            return file
        if stage == "after" and scratch:
            doomed.append(path)
            return file
        return DoomedFile(file, stage)

    def replace(path, target):
        done = replaced(path, target)
        if path in doomed:
            die()
        return done

    Path.open, Path.replace = open_, replace


class DoomedFile:
    """Ends the process in the middle of a write, or at the close."""

    def __init__(self, file, stage):
        self.file, self.stage = file, stage

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        die()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        if self.stage == "half":
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            die()
            content = content[len(content) // 2 :]
        return self.file.write(content)


def tensorboard_begins(seconds):
    """Name TensorBoard's file that many seconds later: files are read in this order."""
    from tensorboard.summary.writer import event_file_writer

    clock = event_file_writer.time
    later = types.SimpleNamespace(time=lambda: clock.time() + seconds)
    event_file_writer.time = later
