import json
import math
import shutil
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.utils import parameters_to_vector
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests.conftest import REPOSITORY
from vae_torch import VAE, ObjectiveConfig, compose, mnist_loaders, train
from vae_torch.checkpoint import CheckpointError, Checkpoints, load_checkpoint, save_checkpoint
from vae_torch.config import ConfigError, OptimizerConfig
from vae_torch.data import ImageDataset, Images, image_loader
from vae_torch.evaluate import importance_log_px
from vae_torch.images import Batch
from vae_torch.parts.objectives import as_objective, draw_noise
from vae_torch.training import loop
from vae_torch.training.averaging import AveragedWeights
from vae_torch.training.errors import DivergedError, StoppedError
from vae_torch.training.loop import _DEFAULT_ADAM
from vae_torch.training.schedules import beta_at, lr_factor, samples_at
from vae_torch.training.step import (
    check_can_compile,
    check_precision,
    eager_step,
    make_optimizer,
)

EPOCHS = 4


def loaders(root, **options):
    return mnist_loaders(root, name="fashion_mnist", batch_size=100, **options)


def new_vae(**options) -> VAE:
    torch.manual_seed(0)
    return VAE((784,), 2, 32, **options)


def without_speed(history):
    return {k: v for k, v in history.items() if k not in ("train/images_per_second", "seconds")}


def test_loop_overfits_one_batch(made_up_root):
    """64 images and more units than that: the bound must approach that of noise-free copies."""
    train_loader, test_loader = loaders(made_up_root, limit_train=64, limit_test=10)
    torch.manual_seed(0)
    vae = VAE((784,), 8, 256)
    history = train(
        vae,
        train_loader,
        test_loader,
        epochs=200,
        optimizer=OptimizerConfig(name="adam", lr=3e-3, eps=1e-8, schedule="cosine"),
    )
    p = train_loader.dataset.images.float() / 255
    entropy = torch.distributions.Bernoulli(p).entropy().sum(1).mean().item()  # no model beats it
    reconstruction = -history["train/reconstruction"][-1]
    assert entropy < reconstruction < entropy + 20
    assert -history["train/elbo"][0] > entropy + 200


def test_loss_falls_and_history_is_whole(made_up_root):
    history = train(new_vae(), *loaders(made_up_root), epochs=EPOCHS)
    assert history["epoch"] == [1, 2, 3, 4]
    assert {len(values) for values in history.values()} == {EPOCHS}
    assert history["train/loss"] == sorted(history["train/loss"], reverse=True)
    for split in ("train", "test"):
        for elbo, reconstruction, kl in zip(
            *(history[f"{split}/{part}"] for part in ("elbo", "reconstruction", "kl")), strict=True
        ):
            assert elbo == pytest.approx(reconstruction - kl, abs=1e-3)
    assert sum(history["test/kl_per_dim"][-1]) == pytest.approx(history["test/kl"][-1], rel=1e-5)


def test_stored_trace_is_reproduced(made_up_root):
    """Any change of results fails here; the tolerance covers other processors."""
    got = train(new_vae(), *loaders(made_up_root), epochs=3)
    stored = json.loads((REPOSITORY / "tests" / "loss_trace.json").read_text())
    for name, values in stored.items():
        assert got[name] == pytest.approx(values, rel=2e-4, abs=1e-3), name


@pytest.mark.parametrize("binarize", ["none", "dynamic"])
def test_same_seed_same_bits_other_seed_other_bits(made_up_root, binarize):
    def run(seed):
        vae = new_vae()
        history = train(
            vae, *loaders(made_up_root, seed=seed, binarize=binarize), epochs=2, seed=seed
        )
        return without_speed(history), torch.cat([p.flatten() for p in vae.parameters()])

    (history, weights), (same_history, same_weights), (_, other_weights) = run(0), run(0), run(1)
    assert history == same_history
    assert torch.equal(weights, same_weights)
    assert not torch.equal(weights, other_weights)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(made_up_root, tmp_path, config, ema):
    def run(folder, epochs, stop_after=None):
        class Stop(Exception):  # noqa: N818
            pass

        def log(metrics, _):
            if metrics["epoch"] == stop_after:
                raise Stop

        vae = new_vae()
        try:
            history = train(
                vae,
                *loaders(made_up_root, binarize="dynamic"),
                epochs=epochs,
                ema=ema,
                optimizer=OptimizerConfig(name="adamw", lr=1e-3, eps=1e-8, schedule="cosine"),
                objective=ObjectiveConfig(beta_warmup_epochs=3),
                log=log,
                checkpoints=Checkpoints(tmp_path / folder, config),
            )
        except Stop:
            return None
        return without_speed(history), vae.state_dict()

    whole = run("whole", 5)
    assert run("cut", 5, stop_after=3) is None
    resumed = run("cut", 5)
    assert resumed[0] == whole[0]
    for name, tensor in whole[1].items():
        assert torch.equal(tensor, resumed[1][name]), name


def test_averaged_weights_have_the_bits_of_torchs_own():
    vae = VAE(latent_dim=2, intermediate_dim=4)
    vae.register_buffer("count", torch.zeros(3))
    ours = AveragedWeights(vae, 0.9)
    torchs = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    random = torch.Generator().manual_seed(0)
    for step in range(5):
        for weight in vae.parameters():
            weight.data += torch.randn(weight.shape, generator=random)
        vae.count += step
        ours.update()
        torchs.update_parameters(vae)
    same = torchs.module.state_dict()
    for name, value in ours.module.state_dict().items():
        assert torch.equal(value, same[name]), name
    assert ours.steps == torchs.n_averaged


def test_averaged_weights_are_the_exponential_average(made_up_root):
    vae, seen = new_vae(), []
    hook = register_optimizer_step_post_hook(
        lambda *_: seen.append(vae.posterior.mean.weight.detach().clone())
    )
    train(vae, *loaders(made_up_root), epochs=1, ema=0.7)
    hook.remove()
    average = seen[0]
    for weight in seen[1:]:
        average = 0.7 * average + 0.3 * weight
    torch.testing.assert_close(vae.posterior.mean.weight.detach(), average)


def test_bf16_follows_fp32(made_up_root):
    elbos = [
        train(new_vae(), *loaders(made_up_root), epochs=3, precision=p)["test/elbo"][-1]
        for p in ("fp32", "bf16")
    ]
    assert elbos[0] != elbos[1]
    assert elbos[0] == pytest.approx(elbos[1], abs=2.0)
    with pytest.raises(ValueError, match=r"precision is 'fp8'; .* one of fp32, medium, bf16, fp16"):
        train(new_vae(), *loaders(made_up_root), epochs=1, precision="fp8")


def test_fp16_follows_fp32_and_resumes_to_the_bit(made_up_root, tmp_path, config, monkeypatch):
    with pytest.raises(ConfigError, match=r"fp16 with device=cpu: .* use precision=fp32, or bf16"):
        train(new_vae(), *loaders(made_up_root), epochs=1, precision="fp16")
    with pytest.raises(ConfigError, match=r"fp16 with compile=true: .* use compile=false, or"):
        check_precision("fp16", torch.device("cuda"), compile=True)
    monkeypatch.setattr(loop, "check_precision", lambda *_, **__: None)  # only slow on this device
    clipped = OptimizerConfig("adam", 1e-3, 1e-8, "constant", clip_norm=20.0)

    def run(folder, precision="fp16", stop=None):
        vae, kept = new_vae(), Checkpoints(tmp_path / folder, config)
        history = train(
            vae, *loaders(made_up_root), epochs=3, optimizer=clipped, precision=precision,
            checkpoints=kept, stop=stop,
        )  # fmt: skip
        return history["test/elbo"], load_checkpoint(tmp_path / folder / "last.pt")

    asked = iter(range(1000))
    with pytest.raises(StoppedError):
        run("cut", stop=lambda: next(asked) == 8)
    (elbo, state), (cut, cut_state), (exact, plain) = run("whole"), run("cut"), run("fp32", "fp32")
    assert cut == elbo != exact
    assert elbo[-1] == pytest.approx(exact[-1], abs=2.0)
    assert state["scaler"] == cut_state["scaler"]
    assert "scaler" not in plain
    for name, tensor in state["model"].items():
        assert torch.equal(tensor, cut_state["model"][name]), name


def test_fp16_scales_back_before_it_clips_and_skips_what_overflows(made_up_root):
    batch = Batch(*next(iter(loaders(made_up_root)[0])))
    minimise = as_objective(ObjectiveConfig())
    noise = draw_noise(minimise, 1, len(batch.x), 2, torch.Generator().manual_seed(0))

    def change(scale, clip_norm):
        vae, scaler = new_vae(), torch.amp.GradScaler("cpu", init_scale=scale)
        before = parameters_to_vector(vae.parameters()).detach().clone()
        optimizer = make_optimizer(vae, OptimizerConfig("sgd", 1.0, 1e-8, "constant"))
        step = eager_step(vae, optimizer, minimise, "fp16", clip_norm=clip_norm, scaler=scaler)
        step(batch, noise, torch.tensor(1.0), 1.0)
        return parameters_to_vector(vae.parameters()).detach() - before, scaler.get_scale()

    moved, scale = change(2.0**10, clip_norm=0.5)
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-3)  # a step of 1 along the gradient
    assert scale == 2.0**10
    moved, scale = change(2.0**60, clip_norm=None)
    assert not moved.any()
    assert scale == 2.0**59


@pytest.mark.parametrize("likelihood", ["continuous_bernoulli", "gaussian"])
@pytest.mark.parametrize("prior", ["mixture", "vamp"])
def test_every_likelihood_and_prior_learns(made_up_root, likelihood, prior):
    vae = new_vae(likelihood=likelihood, prior=prior, prior_components=5)
    before = {name: p.clone() for name, p in vae.named_parameters()}
    history = train(vae, *loaders(made_up_root), epochs=3)
    assert history["test/elbo"][-1] > history["test/elbo"][0]
    unmoved = [name for name, p in vae.named_parameters() if torch.equal(p, before[name])]
    assert not unmoved
    assert "test/kl_per_dim" not in history


def test_divergence_stops_with_the_epoch(made_up_root):
    reckless = OptimizerConfig(name="sgd", lr=1e6, eps=1e-8, schedule="constant")
    with pytest.raises(DivergedError, match=r"epoch \d.*optimizer.lr"):
        train(new_vae(), *loaders(made_up_root), epochs=3, optimizer=reckless)


def test_divergence_names_epoch_step_and_term(made_up_root, tmp_path, config):
    vae, steps = new_vae(), []

    def break_after_seven(*_):
        steps.append(1)
        if len(steps) == 7:  # of six an epoch
            vae.decoder.out.bias.data[0] = math.nan

    hook = register_optimizer_step_post_hook(break_after_seven)
    checkpoints = Checkpoints(tmp_path, config)
    try:
        with pytest.raises(DivergedError, match=r"epoch 2, step 2: .*nan, kl \d.*before: loss \d"):
            train(vae, *loaders(made_up_root), epochs=3, checkpoints=checkpoints)
    finally:
        hook.remove()
    good = load_checkpoint(tmp_path / "last.pt")
    assert good["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in good["model"].values())


def test_a_weight_that_is_not_finite_reaches_no_checkpoint_inside_an_epoch(
    made_up_root, tmp_path, config
):
    """The loss of that step is still finite; only its gradient is not."""
    vae = new_vae()

    def break_at_once(*_):
        vae.posterior.mean.weight.data[0, 0] = math.inf

    hook = register_optimizer_step_post_hook(break_at_once)
    try:
        with pytest.raises(DivergedError, match="epoch 1, step 1"):
            train(
                vae,
                *loaders(made_up_root),
                epochs=1,
                checkpoints=Checkpoints(tmp_path, config),
                stop=lambda: True,
            )
    finally:
        hook.remove()
    assert not list(tmp_path.iterdir())


# inside the first epoch; after the last step of the second; inside its evaluation
@pytest.mark.parametrize(("ema", "after"), [(0.0, 3), (0.9, 12), (0.0, 13)])
def test_a_run_stopped_inside_an_epoch_resumes_with_the_same_bits(
    made_up_root, tmp_path, config, ema, after
):
    def run(folder, stop=None):
        vae = new_vae()
        history = train(
            vae,
            *loaders(made_up_root, binarize="dynamic"),
            epochs=4,
            ema=ema,
            optimizer=OptimizerConfig(name="adamw", lr=1e-3, eps=1e-8, schedule="cosine"),
            checkpoints=Checkpoints(tmp_path / folder, config),
            stop=stop,
        )
        return without_speed(history), vae.state_dict()

    asked = iter(range(1000))
    with pytest.raises(StoppedError):
        run("cut", stop=lambda: next(asked) == after)
    assert load_checkpoint(tmp_path / "cut" / "last.pt")["step"] > 0
    (history, weights), (expected, expected_weights) = run("cut"), run("whole")
    assert history == expected
    assert all(torch.equal(weights[name], w) for name, w in expected_weights.items())


def test_a_run_stopped_in_its_log_logs_that_epoch_again(made_up_root, tmp_path, config):
    def run(folder, stop_in=None):
        logged = []

        def log(metrics, _):
            logged.append(without_speed(metrics))
            if metrics["epoch"] == stop_in:
                raise StoppedError

        vae, checkpoints = new_vae(), Checkpoints(tmp_path / folder, config)
        try:
            train(vae, *loaders(made_up_root), epochs=3, log=log, checkpoints=checkpoints, ema=0.9)
        except StoppedError:
            vae = None
        return logged, vae

    whole, vae = run("whole")
    assert run("cut", stop_in=2) == (whole[:2], None)
    again, resumed = run("cut")
    assert again == whole[1:]
    assert all(map(torch.equal, vae.parameters(), resumed.parameters()))


def test_warmup_and_schedule_reach_the_step(made_up_root):
    """Plain SGD: the first step of each epoch moves the weights by lr times the gradient."""
    lrs, betas, vae = [], [], new_vae()

    def look(optimizer, *_):
        lrs.append(optimizer.param_groups[0]["lr"])

    hook = register_optimizer_step_post_hook(look)
    history = train(
        vae,
        *loaders(made_up_root),
        epochs=2,
        optimizer=OptimizerConfig("sgd", 1e-4, 1e-8, "cosine"),
        objective=ObjectiveConfig(beta=2.0, beta_warmup_epochs=2),
        log=lambda metrics, _: betas.append(metrics["train/beta"]),
    )
    hook.remove()
    assert lrs == pytest.approx([1e-4 * lr_factor("cosine", i / 12) for i in range(12)])
    assert betas == [1.0, 2.0]
    for i, beta in enumerate(betas):
        loss = beta * history["train/kl"][i] - history["train/reconstruction"][i]
        assert history["train/loss"][i] == pytest.approx(loss, rel=1e-5)


def test_every_image_counts_once_in_an_epochs_mean(made_up_root):
    """With a learning rate of 0, uneven batches give the mean over all images."""
    still = OptimizerConfig("sgd", 1e-30, 1e-8, "constant")
    elbos = []
    for batch_size in (600, 599):
        both = mnist_loaders(made_up_root, name="fashion_mnist", batch_size=batch_size)
        history = train(new_vae(), *both, epochs=1, optimizer=still)
        elbos.append(history["train/kl"][0])
    assert elbos[0] == pytest.approx(elbos[1], rel=1e-6)


def test_objectives_that_would_be_ignored_are_refused(made_up_root):
    for objective in (
        ObjectiveConfig(name="IWAE"),
        ObjectiveConfig(name="iwae", free_bits=1.0),
        ObjectiveConfig(estimator="dreg"),
        ObjectiveConfig(resample=True),
        ObjectiveConfig(name="iwae", resample=True),
    ):
        with pytest.raises(ConfigError, match="objective"):
            train(new_vae(), *loaders(made_up_root), epochs=1, objective=objective)
    for objective, kind in (
        (ObjectiveConfig(free_bits=0.1), {"prior": "mixture"}),
        (ObjectiveConfig(name="keras"), {"likelihood": "gaussian"}),
    ):
        with pytest.raises(ConfigError, match="prior="):
            train(new_vae(**kind), *loaders(made_up_root), epochs=1, objective=objective)
    unknown = OptimizerConfig("adam", 1e-3, 1e-8, "cos")
    with pytest.raises(ConfigError, match=r"optimizer\.schedule=cos"):
        train(new_vae(), *loaders(made_up_root), epochs=1, optimizer=unknown)


def test_warmup_grows_linearly_to_beta():
    objective = ObjectiveConfig(beta=2.0, beta_warmup_epochs=4)
    assert [beta_at(objective, e) for e in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert beta_at(ObjectiveConfig(), 0) == 1.0


def test_early_epochs_take_fewer_samples(made_up_root):
    def losses(**settings):
        objective = ObjectiveConfig(name="iwae", **settings)
        history = train(new_vae(), *loaders(made_up_root), epochs=3, objective=objective)
        return history["train/loss"], history["test/loss"]

    few, many = losses(num_samples=2), losses(num_samples=5)
    staged = losses(num_samples=5, early_samples=2, early_epochs=2)
    for kind in (0, 1):
        assert staged[kind][:2] == few[kind][:2] != many[kind][:2]
        assert staged[kind][2] != few[kind][2]
    objective = ObjectiveConfig("iwae", num_samples=5, early_samples=2, early_epochs=2)
    assert [samples_at(objective, epoch) for epoch in range(4)] == [2, 2, 5, 5]


def test_schedules():
    assert lr_factor("constant", 0.9) == 1
    assert [lr_factor("cosine", p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])


def test_library_default_is_the_command_lines(composed):
    assert composed().optimizer == _DEFAULT_ADAM


SLOW = pytest.mark.slow
NEEDS_2_14 = pytest.mark.skipif(torch.__version__ < "2.14", reason="compile=true needs torch 2.14")


@NEEDS_2_14
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("objective", "optimizer", "kind"),
    [
        # the inductor miscompiles Adam's weight decay in torch's own function
        pytest.param({}, {"name": "adam", "weight_decay": 0.1}, {}, id="decay"),
        pytest.param(
            {},
            {"name": "sgd", "lr": 1e-4, "momentum": 0.9, "weight_decay": 0.1, "clip_norm": 20.0},
            {},
            id="momentum",
            marks=SLOW,
        ),
        pytest.param(
            {},
            {"name": "adamw", "betas": [0.8, 0.95], "clip_norm": 20.0, "warmup_steps": 4},
            {},
            id="clip",
            marks=SLOW,
        ),
        pytest.param({"beta_warmup_epochs": 2}, {"name": "adam"}, {}, id="warmup", marks=SLOW),
        pytest.param(
            {},
            {"name": "adamw", "weight_decay": 0.1},
            {"prior": "mixture", "prior_components": 3},
            id="mixture",
            marks=SLOW,
        ),
        pytest.param({}, {"name": "adam"}, {"classes": 10}, id="conditional", marks=SLOW),
        pytest.param(
            {"name": "iwae", "num_samples": 3},
            {"name": "sgd", "lr": 1e-5, "weight_decay": 0.1},
            {},
            id="sgd",
            marks=SLOW,
        ),
        pytest.param(
            {"name": "iwae", "num_samples": 3, "estimator": "dreg"},
            {"name": "adam"},
            {},
            id="dreg",
            marks=SLOW,
        ),
        pytest.param(
            {"name": "iwae", "num_samples": 3, "estimator": "dreg", "resample": True},
            {"name": "adam"},
            {},
            id="resample",
            marks=SLOW,
        ),
        pytest.param(
            {"name": "iwae", "num_samples": 3, "early_samples": 2, "early_epochs": 1},
            {"name": "adam"},
            {},
            id="early",
            marks=SLOW,
        ),
    ],
)
def test_a_compiled_step_is_the_eager_one(made_up_root, objective, optimizer, kind):
    settings = OptimizerConfig(**{"lr": 1e-3, "eps": 1e-8, "schedule": "cosine", **optimizer})
    models = []
    for compiled in (False, True):
        vae = new_vae(**kind)
        train(
            vae,
            *loaders(made_up_root, limit_train=250, limit_test=10),  # batches of 100, 100 and 50
            epochs=3,
            objective=ObjectiveConfig(**objective),
            optimizer=settings,
            ema=0.5,
            compile=compiled,
        )
        models.append(vae)
    for (name, eager), graph in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        assert torch.allclose(eager, graph, rtol=0, atol=2e-5), name


def compiler_that_fails(error):
    def graph(*_):
        raise BackendCompilerFailed("inductor", error, None)

    return lambda *_, **__: graph


@NEEDS_2_14
def test_a_step_that_torch_has_a_fault_with_goes_op_by_op(made_up_root, monkeypatch, caplog):
    def trained(compiled):
        vae = new_vae()
        train(vae, *loaders(made_up_root), epochs=1, compile=compiled)
        return vae.state_dict()

    expected = trained(False)
    monkeypatch.setattr(torch, "compile", compiler_that_fails(KeyError("buf64")))
    got = trained(True)
    assert [r.levelname for r in caplog.records] == ["WARNING"]  # once, not at every step
    assert "buf64" in caplog.text
    assert all(torch.equal(got[name], weights) for name, weights in expected.items())


@NEEDS_2_14
def test_a_compiler_that_the_machine_fails_ends_the_run(made_up_root, monkeypatch):
    """A run that fell back to eager steps could not be resumed to the bit once compiling works."""
    monkeypatch.setattr(torch, "compile", compiler_that_fails(OSError("No space left on device")))
    with pytest.raises(BackendCompilerFailed, match="No space left"):
        train(new_vae(), *loaders(made_up_root), epochs=1, compile=True)


def test_an_old_torch_cannot_compile(made_up_root, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.13.0"))
    with pytest.raises(ConfigError, match=r"2\.13\.0"):
        train(new_vae(), *loaders(made_up_root, limit_train=100), epochs=1, compile=True)


@NEEDS_2_14
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
def test_a_compiled_step_takes_any_loader_and_frozen_weights():
    batches = [list(range(n)) for n in (8, 8, *range(1, 12), 8)]
    images = TensorDataset(torch.rand(12, 784), torch.zeros(12))
    models = []
    for compiled in (False, True):
        vae = new_vae()
        vae.encoder.trunk.requires_grad_(False)
        loader = DataLoader(images, batch_sampler=batches)
        train(vae, loader, loader, epochs=2, compile=compiled)
        models.append(vae)
    for eager, graph in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(eager, graph, rtol=0, atol=2e-5)


def test_a_checkpoint_from_before_a_setting_existed_resumes_with_its_default(
    composed, tmp_path, made_up_root
):
    config = composed("train.epochs=1")
    keep = Checkpoints(tmp_path, config, every=1)
    train(new_vae(), *loaders(made_up_root, limit_train=100), epochs=1, checkpoints=keep)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    del state["config"]["model"]["mean_bias"]
    save_checkpoint(state, tmp_path / "last.pt")
    assert Checkpoints(tmp_path, config, every=1).load("cpu")["epoch"] == 1
    config.model.mean_bias = True
    with pytest.raises(CheckpointError, match=r"mean_bias=False, this one has True"):
        Checkpoints(tmp_path, config, every=1).load("cpu")


def images_and_labels(root):
    dataset = loaders(root)[0].dataset
    return dataset.images, dataset.labels


STILL = OptimizerConfig("sgd", 1e-30, 1e-8, "constant")  # so that all have the same weights


class Stream(IterableDataset):
    """Batches from a source without a length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        yield from self.batches


BATCHES = {
    "pairs": lambda x, y: list(zip(x, y, strict=True)),
    "lists of one": lambda x, _: [[some] for some in x],
    "images alone": lambda x, _: list(x),
    "tuples of three": lambda x, y: [(a, b, {"name": "any"}) for a, b in zip(x, y, strict=True)],
    "arrays": lambda x, _: [some.numpy() for some in x],
    "doubles": lambda x, _: [some.double() for some in x],
    "squares": lambda x, _: [some.reshape(-1, 1, 28, 28) for some in x],
    "a loader without a length": lambda x, y: DataLoader(
        Stream(list(zip(x, y, strict=True))), batch_size=None
    ),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_every_form_train_alike(made_up_root, kind):
    images, labels = images_and_labels(made_up_root)
    batches = (images.float().div(255).split(100), labels.split(100))
    whole, expected, got = new_vae(), new_vae(), new_vae()
    loader = BATCHES["pairs"](*batches)
    history = train(expected, loader, loader, epochs=2)
    loader = BATCHES[kind](*batches)
    same = train(got, loader, loader, epochs=2)
    assert without_speed(same) == without_speed(history)
    assert all(map(torch.equal, got.parameters(), expected.parameters()))
    assert not torch.equal(got.decoder.out.weight, whole.decoder.out.weight)


def test_all_images_at_once_train_as_a_loader_of_them_does(made_up_root):
    images, labels = images_and_labels(made_up_root)
    expected = new_vae()
    dataset = ImageDataset(images, labels)
    train(expected, image_loader(dataset, 128, shuffle=True, seed=3), epochs=2, seed=3)
    floats = images.float() / 255
    for data in (images, images.numpy(), floats, floats.numpy(), floats.double().numpy(),
                 images.reshape(-1, 28, 28), Images(images, labels)):  # fmt: skip
        vae = new_vae()
        history = train(vae, data, data[:50] if isinstance(data, torch.Tensor) else None,
                        epochs=2, seed=3)  # fmt: skip
        assert all(map(torch.equal, vae.parameters(), expected.parameters()))
        assert ("test/elbo" in history) == isinstance(data, torch.Tensor)


def test_without_validation_there_is_no_best(made_up_root, tmp_path, config):
    train_loader, test_loader = loaders(made_up_root)
    alone, watched, checkpoints = new_vae(), new_vae(), Checkpoints(tmp_path, config)
    history = train(alone, train_loader, epochs=2, checkpoints=checkpoints)
    both = train(watched, train_loader, test_loader, epochs=2)
    assert history["train/elbo"] == both["train/elbo"]
    assert not any(name.startswith("test/") for name in history)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.jsonl", "last.pt"]
    assert load_checkpoint(tmp_path / "last.pt")["best"] == -math.inf


def test_without_validation_a_broken_last_step_is_found(made_up_root):
    vae, steps = new_vae(), []

    def break_the_last(*_):
        steps.append(1)
        if len(steps) == 6:  # of six an epoch
            vae.posterior.mean.weight.data[0, 0] = math.nan

    hook = register_optimizer_step_post_hook(break_the_last)
    try:
        with pytest.raises(DivergedError, match="epoch 1, step 6"):
            train(vae, loaders(made_up_root)[0], epochs=1)
    finally:
        hook.remove()


def test_a_run_that_gets_a_validation_set_later_resumes(made_up_root, tmp_path, config):
    train_loader, test_loader = loaders(made_up_root)
    expected = train(new_vae(), train_loader, test_loader, epochs=3)

    def run(epochs, test):
        checkpoints = Checkpoints(tmp_path, config)
        return train(new_vae(), train_loader, test, epochs=epochs, checkpoints=checkpoints)

    run(1, None)
    run(2, test_loader)
    history = run(3, None)
    assert history["train/elbo"] == expected["train/elbo"]
    assert history["test/elbo"] == [None, expected["test/elbo"][1], None]
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert ["test/elbo" in json.loads(line) for line in lines] == [False, True, False]


def test_what_cannot_be_read_again_and_again_is_refused():
    x = torch.rand(8, 784)

    class Once:
        def __init__(self):
            self.batches = iter([x])

        def __iter__(self):
            return self.batches

    for data, words in (
        ((part for part in [x]), "generator is exhausted after one epoch"),
        (iter([x]), "list_iterator is exhausted after one epoch"),
        (TensorDataset(x), "TensorDataset gives single images; pass .*DataLoader"),
        (7, "images are a int; pass a DataLoader"),
        ([{"x": x}], "a batch is a dict without images in front"),
        ([], "0 training batches"),
        (DataLoader(Stream([]), batch_size=None), "epoch 1: the training loader gave no batch"),
        (Once(), "epoch 2: the training loader gave no batch"),
    ):
        with pytest.raises(ValueError, match=words):
            train(new_vae(), data, epochs=2)
    with pytest.raises(ValueError, match="exhausted after one epoch"):
        train(new_vae(), [x], iter([x]), epochs=2)


def test_a_schedule_needs_a_loader_with_a_length():
    stream = DataLoader(Stream([torch.rand(8, 784)] * 3), batch_size=None)
    cosine = OptimizerConfig("adam", 1e-3, 1e-8, "cosine")
    with pytest.raises(
        ConfigError, match=r"optimizer\.schedule=cosine with a loader that does not"
    ):
        train(new_vae(), stream, epochs=1, optimizer=cosine)


def test_an_epoch_may_have_more_steps_than_its_loader_said():
    class Short(list):
        def __len__(self):
            return 2

    batches = [torch.rand(4, 784) for _ in range(20)]
    told, untold = (
        train(new_vae(), data, epochs=1, optimizer=STILL)["train/elbo"]
        for data in (batches, Short(batches))
    )
    assert untold == told


@pytest.mark.parametrize("shape", [(3, 28, 28), (4, 783), (784, 2)])
def test_images_of_another_shape_are_refused_with_both_shapes(shape):
    text = ", ".join(map(str, shape))
    for batch in (1, 5):
        x = torch.rand(batch, *shape)
        for data in ([x], x):
            with pytest.raises(ValueError, match=rf"\({batch}, {text}\).*\(B, 784\)"):
                train(new_vae(), data, epochs=1)


def test_channels_in_the_last_place_are_refused():
    vae = VAE((3, 8, 8), 2, 8)
    x = torch.rand(6, 8, 8, 3)
    for data in ([x], x, x.numpy(), (255 * x).byte()):
        with pytest.raises(ValueError, match=r"\(6, 8, 8, 3\).*\(B, 3, 8, 8\) or \(B, 192\)"):
            train(vae, data, epochs=1)
    train(vae, x.movedim(-1, 1), x.movedim(-1, 1), epochs=1)


GPU_STATE = torch.arange(16, dtype=torch.uint8)  # as long as the state of a CUDA generator


# checkpoints record `device`; in older ones the size of the state tells it
@pytest.mark.parametrize("device", ["cuda", None])
def test_a_run_stopped_on_a_gpu_resumes_without_one(made_up_root, tmp_path, config, caplog, device):
    def run(folder, stop=None):
        vae = new_vae()
        history = train(
            vae,
            *loaders(made_up_root, binarize="dynamic"),
            epochs=3,
            checkpoints=Checkpoints(tmp_path / folder, config),
            stop=stop,
        )
        return without_speed(history), vae.state_dict()

    asked = iter(range(1000))
    with pytest.raises(StoppedError):
        run("cut", stop=lambda: next(asked) == 8)
    path = tmp_path / "cut" / "last.pt"
    state = load_checkpoint(path)
    assert state["device"] == "cpu"
    assert (state["epoch"], state["step"]) == (1, 2)
    state |= {"noise": GPU_STATE, "pixels": GPU_STATE, "device": device}
    if device is None:
        del state["device"]
    save_checkpoint(state, path)
    shutil.copytree(tmp_path / "cut", tmp_path / "again")
    (history, weights), (same, same_weights) = run("cut"), run("again")
    assert history == same  # not the bits of the uninterrupted run, but reproducible
    assert all(torch.equal(same_weights[name], w) for name, w in weights.items())
    whole, _ = run("whole")
    assert history["train/elbo"][0] == whole["train/elbo"][0]
    assert history["train/elbo"][1:] != whole["train/elbo"][1:]
    assert history["test/elbo"] == pytest.approx(whole["test/elbo"], abs=3)
    (warning, _) = (r.getMessage() for r in caplog.records)
    assert (device or "another device") in warning
    assert "epoch 2, step 3" in warning
    assert "\n" not in warning


@pytest.mark.parametrize(
    ("version", "able"),
    [
        *(("2.7.0", False), ("2.9.1+cu128", False), ("2.13.0", False), ("1.13.1", False)),
        *(("2.14.0", True), ("2.14.1+cpu", True), ("2.100.0", True), ("3.0.0", True)),
    ],
)
@pytest.mark.parametrize("kind", [str, torch.torch_version.TorchVersion])
def test_versions_of_torch_are_compared_as_versions(monkeypatch, version, able, kind):
    monkeypatch.setattr(torch, "__version__", kind(version))
    with nullcontext() if able else pytest.raises(ConfigError, match=r"needs torch 2\.14"):
        check_can_compile()


def test_importance_weighted_runs_are_selected_by_their_final_bound():
    """Also while they train with fewer samples, or with a smaller weight of the KL."""
    x = torch.rand(300, 36, generator=torch.Generator().manual_seed(0)).round()
    objective = ObjectiveConfig(
        name="iwae", num_samples=20, early_samples=1, early_epochs=1, beta_warmup_epochs=2
    )
    torch.manual_seed(0)
    vae = VAE((36,), 2, 8)
    models = []
    history = train(
        vae,
        x,
        x,
        epochs=3,
        objective=objective,
        callbacks=[lambda _, v: models.append(deepcopy(v))],
    )
    for model, found in zip(models, history["test/iw_elbo"], strict=True):
        bounds = [
            importance_log_px(model, x, num_samples=20, seed=s).log_px.mean() for s in range(4)
        ]
        error = torch.stack(bounds).std()
        assert abs(found - torch.stack(bounds).mean()) < 5 * error
    assert history["test/iw_elbo"][2] == -history["test/loss"][2]
    assert history["test/iw_elbo"][0] > history["test/elbo"][0] + 0.01
    assert compose(["objective=iwae"]).train.monitor == "test/iw_elbo"
    assert compose([]).train.monitor == "test/elbo"
    assert "test/iw_elbo" not in train(VAE((36,), 2, 8), x, x, epochs=1)


def momentum(parameters):
    return torch.optim.RMSprop(parameters, 1e-3, momentum=0.9)


def test_an_optimizer_of_ones_own_takes_the_steps_that_torch_takes(made_up_root):
    (x, _) = next(iter(loaders(made_up_root)[0]))
    ours, theirs = new_vae(), new_vae()
    seen = []

    def objective(vae, batch, noise, beta):
        del beta
        seen.append(noise.eps)
        return -vae.likelihood.log_prob(batch.x, vae.decode(vae.encode(batch.x).rsample(noise.eps)))

    def mean_loss(vae, batch, noise, beta):
        return objective(vae, batch, noise, beta).mean(0)

    history = train(ours, [x], epochs=3, optimizer=momentum, objective=mean_loss)
    assert history["train/lr"] == [1e-3] * 3
    opt = momentum(list(theirs.parameters()))
    for eps in seen:
        z = theirs.encode(x).mean + (theirs.encode(x).logvar / 2).exp() * eps[0]
        loss = F.binary_cross_entropy_with_logits(theirs.decode(z), x, reduction="none").sum(1)
        opt.zero_grad()
        loss.mean().backward()
        opt.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_run_with_an_optimizer_and_a_schedule_of_ones_own_resumes_to_the_bit(
    made_up_root, tmp_path, config
):
    data = loaders(made_up_root)
    own = {"optimizer": momentum, "schedule": lambda epoch: 1e-3 * 0.5**epoch, "epochs": 3}
    whole, cut = new_vae(), new_vae()
    history = train(whole, *data, **own)
    assert history["train/lr"] == pytest.approx([1e-3 * 0.5 ** (e - 1 / 6) for e in (1, 2, 3)])
    steps = iter(range(100))
    with pytest.raises(StoppedError):
        train(
            cut, *data, **own, checkpoints=Checkpoints(tmp_path, config),
            stop=lambda: next(steps) == 8,
        )  # fmt: skip
    cut = new_vae()
    train(cut, *data, **own, checkpoints=Checkpoints(tmp_path, config))
    for a, b in zip(cut.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_settings_that_conflict_with_an_optimizer_of_ones_own_are_refused(made_up_root):
    data = loaders(made_up_root)
    with pytest.raises(ConfigError, match=r"compile=true compiles .* use compile=false"):
        train(new_vae(), *data, optimizer=momentum, compile=True)
    cosine = OptimizerConfig(name="adam", lr=1e-3, eps=1e-8, schedule="cosine")
    with pytest.raises(ConfigError, match=r"beside optimizer.schedule=cosine .* use one of them"):
        train(new_vae(), *data, optimizer=cosine, schedule=lambda _: 1e-3)
