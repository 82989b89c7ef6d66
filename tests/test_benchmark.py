"""What the benchmark compares with does what it says."""

import sys

import pytest
import torch

from tests.conftest import REPOSITORY
from vae_torch import VAE
from vae_torch.parts.objectives import elbo

sys.path.insert(0, str(REPOSITORY / "scripts"))
from benchmark import BATCH, LATENT, PIXELS, StepByHand


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_step_by_hand_has_the_gradient_of_the_elbo(seed):
    torch.manual_seed(seed)
    vae, other = VAE((PIXELS,), LATENT), VAE((PIXELS,), LATENT)
    other.load_state_dict(vae.state_dict())
    x, eps = torch.rand(BATCH, PIXELS), torch.randn(BATCH, LATENT)
    mean, logvar = vae.encode(x)
    logits = vae.decode(mean + torch.exp(0.5 * logvar) * eps)
    (-elbo(x, logits, mean, logvar).mean()).backward()
    StepByHand(other)(x, eps)
    for (name, mine), theirs in zip(vae.named_parameters(), other.parameters(), strict=True):
        near = 1e-5 * mine.grad.abs().max()
        assert torch.allclose(theirs.grad, mine.grad, rtol=0, atol=near), name
        assert not torch.equal(theirs, mine), name  # the optimiser has moved it
