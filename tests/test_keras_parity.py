"""The notebook's model and loss against values that Keras 2.15 computed (keras_reference.npz)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vae_torch import VAE, keras_loss, kl_standard_normal, reparameterize

REFERENCE = np.load(Path(__file__).parent / "keras_reference.npz")
NAMES = [
    f"{layer}_{part}"
    for layer in ("enc_hidden", "z_mean", "z_log_var", "dec_hidden", "dec_out")
    for part in ("kernel", "bias")
]


def weights(prefix: str) -> list[np.ndarray]:
    return [REFERENCE[f"{prefix}_{name}"] for name in NAMES]


def batch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    eps = torch.from_numpy(REFERENCE["eps"])
    size = eps.shape[1]
    images = torch.from_numpy(REFERENCE["images"][i * size : (i + 1) * size])
    return images.float() / 255, eps[i]


def losses(vae: VAE, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, eps = batch(i)
    out = vae(x, eps=eps)
    kl = kl_standard_normal(out.mean, out.logvar)
    total = keras_loss(x, out.logits, out.mean, out.logvar)
    return (total - kl).mean(), kl.mean()


def in_keras_layout(vae: VAE, *, gradients: bool = False) -> dict[str, np.ndarray]:
    tensors = [p.grad if gradients else p.detach() for p in vae.parameters()]
    return {n: t.numpy().T for n, t in zip(NAMES, tensors, strict=True)}


@pytest.fixture
def vae() -> VAE:
    return VAE.from_keras_weights(weights("weight"))


def test_forward_pass_equals_keras(vae):
    x, eps = batch(0)
    out = vae(x, eps=eps)
    probabilities = torch.sigmoid(out.logits)
    for ours, theirs in (
        (out.mean, "z_mean"),
        (out.logvar, "z_log_var"),
        (reparameterize(out.mean, out.logvar, eps=eps), "z"),
        (probabilities, "reconstruction"),
    ):
        np.testing.assert_allclose(ours.detach().numpy(), REFERENCE[theirs], atol=1e-5, rtol=0)


def test_losses_equal_keras(vae):
    reconstruction, kl = losses(vae, 0)
    assert abs(reconstruction.item() - REFERENCE["reconstruction_loss"]) < 1e-5
    assert abs(kl.item() - REFERENCE["kl_loss"]) < 1e-5


def test_every_gradient_equals_keras(vae):
    sum(losses(vae, 0)).backward()
    for name, gradient in in_keras_layout(vae, gradients=True).items():
        theirs = REFERENCE[f"grad_{name}"]
        assert np.linalg.norm(gradient - theirs) < 1e-4 * np.linalg.norm(theirs), name


def test_ten_sgd_steps_follow_keras(vae):
    optimizer = torch.optim.SGD(vae.parameters(), lr=float(REFERENCE["sgd_lr"]))
    for i, expected in enumerate(REFERENCE["sgd_losses"]):
        reconstruction, kl = losses(vae, i)
        ours = [reconstruction.item(), kl.item()]
        np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)
        optimizer.zero_grad()
        (reconstruction + kl).backward()
        optimizer.step()
    for name, ours in in_keras_layout(vae).items():
        np.testing.assert_allclose(ours, REFERENCE[f"sgd_final_{name}"], atol=1e-4, rtol=0)


def test_adam_losses_stay_near_keras(vae):
    # Keras adds epsilon to another quantity than torch does, so this is loose
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3, eps=1e-7)
    for i, expected in enumerate(REFERENCE["adam_losses"]):
        reconstruction, kl = losses(vae, i)
        np.testing.assert_allclose([reconstruction.item(), kl.item()], expected, rtol=0.02)
        optimizer.zero_grad()
        (reconstruction + kl).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w[:9], "9 arrays"),
        (lambda w: [*w[:2], w[2].T, *w[3:]], "kernel of shape"),
        (lambda w: [*w[:1], w[1][:3], *w[2:]], "bias"),
        (lambda w: [w[0].ravel(), *w[1:]], "must be \\(in, out\\)"),
    ],
)
def test_weights_of_another_model_are_refused(damage, message):
    with pytest.raises(ValueError, match=message):
        VAE.from_keras_weights(damage(weights("weight")))
