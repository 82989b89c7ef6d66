"""Progress bars: shown on a terminal and in a notebook, silent elsewhere."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")


def bar(items: Iterable[Item], words: str, *, show: bool) -> Iterable[Item]:
    """The items, with a progress bar if `show`."""
    shown: Iterable[Item] = tqdm(items, words, disable=hidden() if show else True, leave=False)
    return shown


def hidden() -> bool | None:
    """The argument `disable` of tqdm: None shows bars on terminals only, False everywhere."""
    return False if "ipykernel" in sys.modules else None


class StepBar:
    """A progress bar over the steps of an epoch.

    Args:
        epochs: Epochs of the run.
        steps: Steps of an epoch; None if unknown.
    """

    def __init__(self, epochs: int, steps: int | None) -> None:
        self.epochs = epochs
        self._bar = tqdm(total=steps, disable=hidden(), unit="step", leave=False)

    def begin_epoch(self, epoch: int, step: int) -> None:
        """Start the bar of `epoch` (from 0), after `step` of its steps."""
        self._bar.reset(self._bar.total)
        self._bar.initial = self._bar.n = step  # of a resumed run
        self._bar.set_description(f"epoch {epoch + 1}/{self.epochs}", refresh=False)

    def show(self, step: int, loss: float) -> None:
        """Show the progress after `step` steps of the epoch."""
        self._bar.set_postfix_str(f"train loss {loss:.2f}", refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()
