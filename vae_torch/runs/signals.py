"""Ctrl-C and SIGTERM end a run so that it can be resumed."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NoReturn

from vae_torch.training.errors import StoppedError


class StopSignals:
    """Inside the block, Ctrl-C and SIGTERM raise StoppedError; in training, after the step.

    A second Ctrl-C ends the process at once, without a message; in a notebook it ends the cell.
    """

    def __init__(self) -> None:
        self.number = 0  # the signal that came
        self._doing: str | None = "before the first step"  # None: the loop checks `received`

    def received(self) -> bool:
        """Whether the run should end."""
        return self.number > 0

    def while_training(self) -> AbstractContextManager[None]:
        """Inside the block, the training loop checks `received`."""
        return self._now(None, "after the last epoch")

    def at_once(self, doing: str) -> AbstractContextManager[None]:
        """Inside the block, no step can be broken off, so a signal ends it at once."""
        return self._now(doing, None)

    @contextmanager
    def _now(self, doing: str | None, then: str | None) -> Iterator[None]:
        self._set(doing)
        yield
        self._set(then)

    def _set(self, doing: str | None) -> None:
        self._doing = doing
        if self.number and doing:
            self._stop()

    def _stop(self) -> NoReturn:
        doing, self._doing = self._doing, None  # what follows must not be interrupted
        raise StoppedError(doing)

    def __enter__(self) -> "StopSignals":
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # only here are handlers allowed
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.number and number == signal.SIGINT:
            if "ipykernel" in sys.modules:
                raise KeyboardInterrupt
            os._exit(128 + number)
        self.number = number
        if self._doing:
            self._stop()
