"""How training ends before its last epoch."""

ADVICE = (
    "try a smaller optimizer.lr, optimizer.clip_norm=100, optimizer.warmup_steps=1000, "
    "precision=fp32, or objective.beta_warmup_epochs"
)


class DivergedError(ArithmeticError):
    """The loss is no number any more."""


class EndRun(Exception):  # noqa: N818 - no error
    """A callback has seen enough: the run ends after this epoch, and is complete."""


class StoppedError(Exception):
    """A caller asked the loop to end; what was done so far is in the checkpoint."""
