"""How Ctrl-C and SIGTERM end a run that can be resumed."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NoReturn

from vae_torch.training.errors import StoppedError


class StopSignals:
    """Within, Ctrl-C and SIGTERM end a run with StoppedError; in training, after the step.

    A second Ctrl-C ends the process at once, without a word; in a notebook it ends the cell.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal that came
        self._doing: str | None = "before the first step"  # None: `received` is asked

    def received(self) -> bool:
        """Whether the run is to end."""
        return self.number > 0

    def while_training(self) -> AbstractContextManager[None]:
        """Within, the training loop asks `received`."""
        return self._now(None, "after the last epoch")

    def at_once(self, doing: str) -> AbstractContextManager[None]:
        """Within, no step is under way that could be broken: it ends where it is."""
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
        doing, self._doing = self._doing, None  # what follows is not interrupted
        raise StoppedError(doing)

    def __enter__(self) -> "StopSignals":
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows none
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
