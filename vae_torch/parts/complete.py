"""Fills in every option of a run's parts and checks it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vae_torch.config import Config
from vae_torch.parts import flows, pixelcnn, tcvae, two_layer  # noqa: F401 - they fill the tables
from vae_torch.parts.likelihoods import likelihoods
from vae_torch.parts.metrics import metric_of
from vae_torch.parts.networks import networks
from vae_torch.parts.objectives import monitor_of, objectives
from vae_torch.parts.posteriors import posteriors
from vae_torch.parts.priors import priors
from vae_torch.parts.registry import Table


def complete(config: Config) -> Config:
    """The same settings, with the default of every option that was not given.

    Raises:
        ConfigError: An unknown part, an unknown option, or a value of the wrong type.
    """
    model, objective = config.model, config.objective
    monitor = config.train.monitor
    if monitor == "auto":
        monitor = monitor_of(objectives[objective.name])
    metric_of(monitor)
    return replace(
        config,
        train=replace(config.train, monitor=monitor),
        model=replace(model, options=_options(networks, model.name, model.options)),
        objective=replace(
            objective, options=_options(objectives, objective.name, objective.options)
        ),
        posterior_options=_options(posteriors, config.posterior, config.posterior_options),
        prior_options=_options(priors, config.prior, config.prior_options),
        likelihood_options=_options(likelihoods, config.likelihood, config.likelihood_options),
    )


def _options(table: Table[Any], name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options, except those in SHARED that are not given here."""
    options = table.checked(name, given)
    return {key: value for key, value in options.items() if key in given or key not in SHARED}


# Options that have a setting of their own, such as `model.depth`.
SHARED = (
    "intermediate_dim",
    "depth",
    "activation",
    "components",
    "num_samples",
    "free_bits",
    "estimator",
    "resample",
)
