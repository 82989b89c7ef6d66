"""A cheap evaluation card, for tests that do not look at how good its estimates are."""

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
