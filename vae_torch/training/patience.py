"""Early stopping: `train.patience`."""

from collections.abc import Sequence


def epochs_without_gain(scores: Sequence[float | None], min_delta: float = 0.0) -> int:
    """Count the epochs at the end of a run that did not beat the best one before them.

    It depends on the history alone, so a resumed run stops where an uninterrupted one does.

    Args:
        scores: One per epoch, higher is better; None where it was not measured.
        min_delta: An improvement must exceed this to count as a gain.
    """
    best, last_gain = None, 0
    for epoch, score in enumerate(scores, 1):
        if score is not None and (best is None or score > best + min_delta):
            best, last_gain = score, epoch
    return len(scores) - last_gain


def has_stalled(
    scores: Sequence[float | None], patience: int | None, min_delta: float = 0.0
) -> bool:
    """Whether `patience` epochs have passed without a gain; never if patience is None."""
    return patience is not None and epochs_without_gain(scores, min_delta) >= patience
