"""Exceptions that end training early."""

ADVICE = (
    "try a smaller optimizer.lr, optimizer.clip_norm=100, optimizer.warmup_steps=1000, "
    "precision=fp32, or objective.beta_warmup_epochs"
)


class DivergedError(ArithmeticError):
    """The loss is NaN or infinite."""


class EndRun(Exception):  # noqa: N818 - no error
    """Raised by a callback to end the run after this epoch; the run counts as complete."""


class StoppedError(Exception):
    """A caller asked training to stop; the checkpoint keeps what was done."""
