"""Apple GPUs, simulated: how one is chosen, and that no unsupported operation reaches it.

The device is simulated: its tensors hold a tensor of the CPU each, so that every value is real. It
refuses float64, and to compute with tensors of the CPU.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from vae_torch import VAE, ObjectiveConfig, encode_images, machine, mnist_loaders, train
from vae_torch.config import ConfigError
from vae_torch.evaluate import evaluate_model
from vae_torch.evaluation import card, proposals
from vae_torch.figures import spherical_interpolation
from vae_torch.machine import resolve_device, wide

APPLE = torch.device("meta")  # torch's only other device that needs no hardware
aten = torch.ops.aten
TAKES_BOTH = (
    aten.copy_.default, aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default,
)  # fmt: skip


class There(torch.Tensor):
    """A tensor on the simulated device."""

    @staticmethod
    def __new__(cls, held):
        assert held.dtype != torch.float64, "a float64 tensor on the device"
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), dtype=held.dtype, device=APPLE
        )

    def __init__(self, held):
        self.held = held

    def tolist(self):
        return self.held.tolist()

    def new_tensor(self, data):
        return torch.tensor(data, dtype=self.dtype).to(self.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


class Apple(TorchDispatchMode):
    """A context in which tensors can be made on the simulated device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


class AppleGenerator(torch.Generator):
    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.on = torch.device(device)
        return made

    @property
    def device(self):
        return self.on


def on_the_cpu_first(make):
    def made(data, *, dtype=None, device=None):
        if not isinstance(data, torch.Tensor):
            data = make(data, dtype=dtype)
        return data if device is None else data.to(device)

    return made


def computed(func, args, kwargs):
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in given if isinstance(tensor, There)]
    strangers = [tensor for tensor in given if not isinstance(tensor, There) and tensor.ndim]
    assert not (there and strangers) or func in TAKES_BOTH, f"{func}: tensors of two devices"
    device = kwargs.get("device") or (APPLE if there else "cpu")
    args, kwargs = tree_map(lambda a: a.held if isinstance(a, There) else a, (args, kwargs))
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}

    def placed(result):
        if not isinstance(result, torch.Tensor) or torch.device(device).type != APPLE.type:
            return result
        changed = [tensor for tensor in there if tensor.held is result]
        return changed[0] if changed else There(result)

    return tree_map(placed, func(*args, **kwargs))


@pytest.fixture
def apple(monkeypatch):
    monkeypatch.setattr(machine, "_WITHOUT_FLOAT64", (APPLE.type,))
    monkeypatch.setattr(torch, "Generator", AppleGenerator)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    for name in ("tensor", "as_tensor"):  # torch creates it outside of any dispatch mode
        monkeypatch.setattr(torch, name, on_the_cpu_first(getattr(torch, name)))
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with Apple():
        yield APPLE
    torch.__future__.set_overwrite_module_params_on_conversion(False)


KINDS = {
    "dynamic": {"prior": "mixture", "prior_components": 3},
    "conditional": {"classes": 10},
    "flow": {"posterior": "flow", "prior": "flow"},
}


def trained(root, device, kind, latent_dim=2):
    torch.manual_seed(0)
    vae = VAE((784,), latent_dim, 8, **KINDS[kind]).to(device)
    small = {"limit_train": 60, "limit_test": 12, "batch_size": 20, "name": "fashion_mnist"}
    data = mnist_loaders(root, device=device, binarize="dynamic", **small)
    history = train(
        vae, *data, epochs=2, objective=ObjectiveConfig(), ema=0.9,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-2),
    )  # fmt: skip
    return vae, data, history


def test_the_simulation_refuses_what_an_apple_gpu_refuses(apple):
    x = torch.ones(3, device=apple)
    with pytest.raises(AssertionError, match="float64"):
        x.double()
    with pytest.raises(AssertionError, match="two devices"):
        x + torch.ones(3)
    assert wide(x).dtype == torch.float64
    assert (wide(x).device.type, (2 * x).device.type) == ("cpu", APPLE.type)


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_its_figures_send_no_float64_to_the_device(made_up_root, apple, kind):
    _, _, there = trained(made_up_root, apple, kind)
    _, _, here = trained(made_up_root, torch.device("cpu"), kind)
    for name in ("train/loss", "test/elbo", "test/kl"):  # the same operations on the same noise
        assert there[name] == pytest.approx(here[name], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "exact"), [("dynamic", True), ("conditional", False)])
def test_the_evaluation_card_sends_no_float64_to_the_device(
    made_up_root, apple, kind, exact, monkeypatch
):
    monkeypatch.setattr(proposals, "_STEPS", 10)  # every operation, not many times
    monkeypatch.setattr(card, "fit_posterior", partial(card.fit_posterior, steps=2))
    few = {"temperatures": 3, "chains": 2, "leapfrogs": 2}
    for name in ("annealed_log_px", "sandwich_log_px"):
        monkeypatch.setattr(card, name, partial(getattr(card, name), **few))
    cards = []
    for device in (apple, torch.device("cpu")):
        vae, (train_loader, test_loader), _ = trained(made_up_root, device, kind, latent_dim=1)
        few = {"num_samples": 30, "fit_samples": 30, "fit_images": 3, "ais": 2, "exact": exact}
        cards.append(evaluate_model(vae, test_loader, train_loader=train_loader, **few))
        encoded = encode_images(vae, test_loader, num_samples=30)
        assert encoded.log_px.dtype == torch.float64
        ends = torch.ones(2, 3, device=device)
        assert spherical_interpolation(*ends, steps=5).device == ends.device
    there, here = cards
    assert there.keys() == here.keys()
    for name in {"elbo", "log_px", "log_px_encoder", "log_px_ais", "log_px_exact"} & here.keys():
        assert there[name]["value"] == pytest.approx(here[name]["value"], rel=1e-4)


def test_auto_takes_an_apple_gpu_where_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match=r"device=mps: torch finds no Apple GPU .* device=cpu"):
        resolve_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto").type == resolve_device("mps").type == "mps"
    assert resolve_device("cpu").type == "cpu"
    assert machine.device_name(torch.device("mps")) == "mps (Apple GPU)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto").type == "cuda"
