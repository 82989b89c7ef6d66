"""Exponential moving averages of weights."""

import copy

import torch
from torch import Tensor

from vae_torch.vae import VAE


class AveragedWeights:
    """A copy of a model whose weights follow the model's: an exponential moving average.

    The same numbers as `torch.optim.swa_utils.AveragedModel`, which lists all modules at every
    step: 0.4 ms, a twentieth of the step of a small model. Buffers are copied, not averaged.
    """

    def __init__(self, vae: VAE, decay: float) -> None:
        self.module = copy.deepcopy(vae)
        self.decay = decay
        self.steps = 0  # the first step copies the weights
        # of tensors that stay: `vae.to` another device or type would replace them
        self._averages: list[Tensor] = list(self.module.parameters())
        self._weights: list[Tensor] = list(vae.parameters())
        self._own_buffers, self._buffers = list(self.module.buffers()), list(vae.buffers())

    @torch.no_grad()
    def update(self) -> None:
        """Move each weight by 1 - decay of its distance to the model's."""
        if self.steps:
            torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay)
        else:
            torch._foreach_copy_(self._averages, self._weights)
        if self._buffers:
            torch._foreach_copy_(self._own_buffers, self._buffers)
        self.steps += 1
