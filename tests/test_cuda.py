"""Tests that need CUDA; elsewhere they are skipped."""

import json
import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tests.command_lines import run_script
from tests.terms import objective_terms
from vae_torch import VAE, ObjectiveConfig, mnist_loaders, train
from vae_torch.checkpoint import Checkpoints
from vae_torch.config import ConfigError, OptimizerConfig
from vae_torch.evaluate import importance_log_px
from vae_torch.images import Batch
from vae_torch.machine import set_products
from vae_torch.parts.objectives import as_objective, draw_noise
from vae_torch.training.errors import StoppedError
from vae_torch.training.step import (
    captured_step,
    check_can_compile,
    eager_step,
    make_optimizer,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

KINDS = [
    pytest.param({}, {}, id="elbo"),
    pytest.param({}, {"prior": "mixture", "prior_components": 3}, id="mixture"),
    pytest.param({}, {"prior": "vamp", "prior_components": 3}, id="vamp"),
    pytest.param({}, {"architecture": "conv"}, id="conv"),
    pytest.param({}, {"likelihood": "gaussian"}, id="gaussian"),
    pytest.param({}, {"likelihood": "discretized_logistic"}, id="logistic"),
    pytest.param({}, {"likelihood": "pixelcnn"}, id="pixelcnn"),
    pytest.param({}, {"posterior": "flow", "prior": "flow"}, id="flow"),
    pytest.param({}, {"classes": 10}, id="conditional"),
    pytest.param({"name": "iwae", "num_samples": 5, "estimator": "dreg"}, {}, id="dreg"),
    pytest.param({"name": "iwae", "num_samples": 5, "resample": True}, {}, id="resample"),
]


@pytest.fixture(autouse=True)
def as_the_scripts(monkeypatch):
    for flag in ("allow_tf32", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, flag, getattr(torch.backends.cudnn, flag))
    set_products("fp32", torch.device("cuda"))


def new_vae(**kind) -> VAE:
    torch.manual_seed(0)  # the seed of the weights, which are drawn on the CPU
    return VAE((784,), 2, 32, **kind).to("cuda")


def loaders(root, **options):
    options = {"batch_size": 100, "device": "cuda", **options}
    return mnist_loaders(root, name="fashion_mnist", **options)


def can_compile() -> bool:
    try:
        check_can_compile()
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize(("objective", "kind"), KINDS)
def test_a_gradient_is_that_of_the_cpu(made_up_root, objective, kind):
    x, y = next(iter(loaders(made_up_root)[0]))
    settings = ObjectiveConfig(**objective)
    eps = torch.randn(settings.num_samples, len(x), 2)
    choice = torch.rand(len(x)) if settings.resample else None
    found = []
    for device in ("cpu", "cuda"):
        vae = new_vae(**kind).to(device)
        vae = vae.of(Batch(x, y))
        there = None if choice is None else choice.to(device)
        objective_terms(vae, x.to(device), eps.to(device), settings, 0.5, there).loss.backward()
        found.append([parameter.grad.cpu() for parameter in vae.parameters()])
    for cpu, cuda in zip(*found, strict=True):
        assert torch.allclose(cpu, cuda, rtol=1e-3, atol=1e-3 * float(cpu.abs().max()))


def test_log_px_is_that_of_the_cpu(made_up_root):
    x = next(iter(loaders(made_up_root)[1]))[0][:8]
    on_cuda, on_cpu = (
        importance_log_px(new_vae().to(device), x.to(device), num_samples=20_000)
        for device in ("cuda", "cpu")
    )
    assert torch.allclose(on_cuda.log_px.cpu(), on_cpu.log_px, atol=0.2)  # of different noise


@pytest.mark.parametrize(
    ("kind", "ema"), [({}, 0.0), ({}, 0.9), ({"architecture": "conv"}, 0.0)], ids=str
)
def test_a_stopped_run_resumes_with_the_same_bits(made_up_root, tmp_path, config, kind, ema):
    def run(folder, stop=None):
        vae = new_vae(**kind)
        history = train(
            vae,
            *loaders(made_up_root, binarize="dynamic"),
            epochs=4,
            ema=ema,
            checkpoints=Checkpoints(tmp_path / folder, config),
            stop=stop,
        )
        return history["test/elbo"], vae.state_dict()

    asked = iter(range(1000))
    with pytest.raises(StoppedError):
        run("cut", stop=lambda: next(asked) == 9)
    (elbo, weights), (expected, expected_weights) = run("cut"), run("whole")
    assert elbo == expected
    assert all(torch.equal(weights[name], w) for name, w in expected_weights.items())


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize(("objective", "kind"), KINDS)
def test_no_step_waits_for_the_device(made_up_root, objective, kind):
    """An epoch of 40 steps synchronises as often as one of 20."""

    def waits(batch_size: int) -> int:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                train(
                    new_vae(**kind),
                    *loaders(made_up_root, batch_size=batch_size, binarize="dynamic"),
                    epochs=1,
                    objective=ObjectiveConfig(**objective),
                    precision="bf16",
                )
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    waits(30)  # warmed up: leave out what happens once
    assert waits(30) == waits(15) > 0


@pytest.mark.filterwarnings("ignore:TensorFloat32")  # the test is about fp32
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch's own first capture
@pytest.mark.skipif(not can_compile(), reason="torch is too old to compile a step")
@pytest.mark.parametrize(("objective", "kind"), KINDS)
def test_a_compiled_step_is_the_eager_one(made_up_root, objective, kind):
    models = []
    for compiled in (False, True):
        vae = new_vae(**kind)
        train(
            vae,
            *loaders(made_up_root, limit_train=250, limit_test=10),  # batches of 100, 100 and 50
            epochs=3,
            objective=ObjectiveConfig(**objective),
            optimizer=OptimizerConfig(name="adam", lr=1e-3, eps=1e-8, schedule="cosine"),
            ema=0.5,
            compile=compiled,
        )
        models.append(vae)
    for (name, eager), graph in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        assert torch.allclose(eager, graph, rtol=0, atol=1e-4), name


STEADY = [
    OptimizerConfig("sgd", 1e-4, 1e-8, "cosine", momentum=0.9, clip_norm=20.0),
    OptimizerConfig("adam", 1e-3, 1e-8, "one_cycle", betas=[0.8, 0.95], clip_norm=20.0),
]


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch's own first capture
@pytest.mark.skipif(not can_compile(), reason="torch is too old to compile a step")
@pytest.mark.parametrize("settings", STEADY, ids=str)
def test_a_compiled_step_clips_as_the_eager_one(made_up_root, settings):
    models = []
    for compiled in (False, True):
        vae = new_vae()
        data = loaders(made_up_root, limit_train=250, limit_test=10)
        train(vae, *data, epochs=3, optimizer=settings, compile=compiled)
        models.append(vae)
    for (name, eager), graph in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        assert torch.allclose(eager, graph, rtol=0, atol=1e-4), name


@pytest.mark.parametrize("settings", STEADY, ids=str)
def test_a_captured_step_clips_as_the_eager_one(made_up_root, settings, caplog):
    minimise, found = as_objective(ObjectiveConfig()), []
    for make in (eager_step, captured_step):
        vae = new_vae()
        optimizer = make_optimizer(vae, settings)
        step = make(vae, optimizer, minimise, "fp32", clip_norm=settings.clip_norm)
        noise = torch.Generator("cuda").manual_seed(0)
        for number, (x, _) in enumerate(loaders(made_up_root, limit_train=850)[0]):  # 9 batches
            drawn = draw_noise(minimise, 1, len(x), 2, noise)
            step(Batch(x), drawn, torch.tensor(1.0, device="cuda"), settings.lr / (1 + number))
        found.append(vae.state_dict())
    assert caplog.text == ""  # captured: the step copied no value from the device
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("objective", "kind"), KINDS)
def test_a_captured_step_has_the_bits_of_the_eager_one(made_up_root, objective, kind, precision):
    settings = ObjectiveConfig(**objective)
    found = []
    for make in (eager_step, captured_step):
        vae = new_vae(**kind)
        optimizer = make_optimizer(vae, OptimizerConfig("adamw", 1e-2, 1e-8, "constant", 0.1))
        minimise = as_objective(settings)
        step = make(vae, optimizer, minimise, precision)
        noise = torch.Generator("cuda").manual_seed(0)
        terms = []
        for number, (x, y) in enumerate(loaders(made_up_root, limit_train=850)[0]):  # 9 batches
            drawn = draw_noise(minimise, settings.num_samples, len(x), 2, noise)
            beta = torch.tensor(min(1.0, number / 5), device="cuda")
            terms.append(step(Batch(x, y), drawn, beta, 1e-2 / (1 + number))[1].clone())
        found.append((torch.stack(terms), vae.state_dict()))
    (eager, weights), (captured, others) = found
    assert torch.equal(eager, captured)
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_fp16_follows_fp32_and_resumes_to_the_bit(made_up_root, tmp_path, config, caplog):
    settings = OptimizerConfig("adam", 1e-3, 1e-8, "constant", clip_norm=20.0)

    def run(folder, precision, stop=None):
        vae = new_vae()
        history = train(
            vae,
            *loaders(made_up_root),
            epochs=4,
            optimizer=settings,
            precision=precision,
            checkpoints=Checkpoints(tmp_path / folder, config),
            stop=stop,
        )
        return history["test/elbo"], vae.state_dict()

    asked = iter(range(1000))
    with pytest.raises(StoppedError):
        run("cut", "fp16", stop=lambda: next(asked) == 9)
    (elbo, weights), (cut, others) = run("whole", "fp16"), run("cut", "fp16")
    assert cut == elbo
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert elbo[-1] == pytest.approx(run("fp32", "fp32")[0][-1], abs=2.0)
    assert caplog.text == ""


class ReadsItsValues(nn.Module):
    """A layer that cannot be captured: it copies a number from the device."""

    def forward(self, x):
        return x * (1.0 if float(x.detach().sum()) < math.inf else 0.0)


def test_a_step_that_cannot_be_captured_goes_op_by_op(made_up_root, caplog):
    found = []
    for stubborn in (False, True):
        vae = new_vae()
        if stubborn:
            vae.encoder.trunk.append(ReadsItsValues())
        train(vae, *loaders(made_up_root, limit_train=850, limit_test=10), epochs=2)
        found.append(list(vae.parameters()))
    assert [r.message.partition(",")[0] for r in caplog.records] == [
        "the step cannot be captured as a CUDA graph"
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("there", ["cpu", "cuda"])
def test_a_run_resumes_on_the_other_kind_of_device(made_up_root, tmp_path, config, there):
    here = "cuda" if there == "cpu" else "cpu"
    asked = iter(range(1000))
    elbos = {}
    for folder, device in (("cut", here), ("cut", there), ("whole", there)):
        torch.manual_seed(0)
        vae = VAE((784,), 2, 32).to(device)
        stop = (lambda: next(asked) == 9) if (folder, device) == ("cut", here) else None
        with nullcontext() if stop is None else pytest.raises(StoppedError):
            history = train(
                vae,
                *loaders(made_up_root, device=device),
                epochs=4,
                checkpoints=Checkpoints(tmp_path / folder, config),
                stop=stop,
            )
            elbos[folder] = history["test/elbo"][-1]
    # CPU and GPU draw different noise, and four small epochs are far from convergence
    assert elbos["cut"] == pytest.approx(elbos["whole"], rel=0.05)


def test_the_scripts_run_on_it(made_up_root, tmp_path):
    run = tmp_path / "run"
    small = ("data=fashion_mnist", f"data.root={made_up_root}", "train.epochs=2")
    trained = run_script("train.py", *small, "device=cuda", f"hydra.run.dir={run}")
    assert trained.returncode == 0, trained.stderr
    assert "on cuda" in trained.stdout
    cards = []
    for device in ("cuda", "cpu"):
        done = run_script(
            "evaluate.py",
            f"run={run}",
            f"device={device}",
            "eval.num_samples=2000",
            "eval.limit=50",
        )
        assert done.returncode == 0, done.stderr
        cards.append(json.loads((run / "evaluation.json").read_text()))
    page = run_script("explore.py", f"run={run}", "device=cuda")
    assert page.returncode == 0, page.stderr
    for name, tolerance in (("log_px_exact", 1e-3), ("log_px", 0.2), ("elbo", 1.0)):
        values = [card[name]["value"] for card in cards]  # the last two with different noise
        assert values[0] == pytest.approx(values[1], abs=tolerance), name
