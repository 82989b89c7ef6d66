"""A cheap evaluation card, for tests that ignore the quality of its estimates."""

import functools
import importlib


def hardly_fitted(put=setattr):
    """Proposals and posteriors of a few steps; `put` is setattr or a monkeypatch's."""
    proposals, card, importance = (
        importlib.import_module(f"vae_torch.evaluation.{name}")
        for name in ("proposals", "card", "importance")
    )
    put(proposals, "_POINTS", 64)
    put(proposals, "_STEPS", 10)
    put(card, "_TRAIN_IMAGES", 10)
    put(card, "fit_posterior", functools.partial(importance.fit_posterior, steps=10))


def few_points(put=setattr):
    """Few samples of the prior to find modes among: for posteriors with one mode."""
    put(importlib.import_module("vae_torch.evaluation.proposals"), "_POINTS", 256)


def undrawn(put=setattr):
    """Draw no pictures of the model at the end of a run."""
    put(importlib.import_module("vae_torch.runs.records").Records, "figures", lambda *_: None)


# Passed as `before` to a command line.
ROUGH, FEW_POINTS, UNDRAWN = (
    [f"{__name__}:{function.__name__}"] for function in (hardly_fitted, few_points, undrawn)
)
