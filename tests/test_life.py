"""A run from its start from another run's weights to its end."""

import copy
import json
import math
import shutil
import signal

import pytest
import torch

from tests.command_lines import run_script
from tests.rough import UNDRAWN
from vae_torch import VAE, ObjectiveConfig, OptimizerConfig, load_run, train
from vae_torch.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from vae_torch.cli.compose import compose
from vae_torch.config import ConfigError
from vae_torch.images import Batch
from vae_torch.parts.objectives import Noise, as_objective, loss_and_metrics
from vae_torch.runs.folders import read_runs
from vae_torch.runs.run import run
from vae_torch.training.errors import StoppedError
from vae_torch.training.patience import epochs_without_gain, has_stalled
from vae_torch.training.schedules import falls_of, learning_rate
from vae_torch.training.step import eager_step, make_optimizer

pytestmark = pytest.mark.usefixtures("undrawn")


def train_script(*arguments, killed=None):
    return run_script("train.py", *arguments, killed=killed, before=UNDRAWN)


@pytest.fixture(scope="module")
def settings(made_up_root):
    def make(*more):
        return compose(
            [
                *("data=fashion_mnist", f"data.root={made_up_root}", "model.intermediate_dim=16"),
                *("train.epochs=2", "train.figure_every=0", "data.limit_train=100", "threads=1"),
                *("data.limit_test=50", *more),
            ]
        )

    return make


@pytest.fixture(scope="module")
def source(undrawn, settings, tmp_path_factory):
    del undrawn
    folder = tmp_path_factory.mktemp("source") / "run"
    run(settings(), folder)
    return folder


def state_of(run_dir, which="last"):
    return load_checkpoint(run_dir / "checkpoints" / f"{which}.pt")


class StartedError(Exception):
    pass


def weights_at_the_start(config, run_dir, monkeypatch):
    """The arguments of the training loop."""
    found = {}

    def start(vae, *_, **__):
        found.update({name: weight.clone() for name, weight in vae.state_dict().items()})
        raise StartedError

    monkeypatch.setattr("vae_torch.runs.run.train", start)
    with pytest.raises(StartedError):
        run(config, run_dir)
    monkeypatch.undo()
    return found


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_starts_from_the_weights_of_another(settings, source, tmp_path, monkeypatch):
    for which in ("last", "best"):
        config = settings(
            f"train.init_from={source}",
            f"train.init_checkpoint={which}",
            "objective=iwae",
            "seed=3",
        )
        started = weights_at_the_start(config, tmp_path / which, monkeypatch)
        assert equal(started, state_of(source, which)["model"])


def test_its_record_names_the_source_and_its_seal(settings, source, tmp_path):
    summary = run(settings(f"train.init_from={source}", "objective=iwae"), tmp_path / "run")
    origin = summary["started_from"]
    seal = (source / "checkpoints" / "last.pt").read_bytes()[-32:].hex()
    assert origin == {
        "path": str(source), "checkpoint": "last", "epoch": 2, "sha256": seal, "fresh": [],
    }  # fmt: skip
    assert state_of(tmp_path / "run")["started_from"] == origin
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["started_from"] == origin
    optimizer = state_of(tmp_path / "run")["optimizer"]["state"]
    assert {float(values["step"]) for values in optimizer.values()} == {2.0}  # not 4: it is new


@pytest.mark.parametrize(
    ("asked", "fresh"),
    [
        (["prior=mixture", "prior_components=5"], ["prior"]),
        (["prior=vamp", "prior_components=5"], ["prior"]),
        (["likelihood=continuous_bernoulli"], []),
        (["likelihood=gaussian"], ["likelihood"]),
    ],
)
def test_parts_that_differ_start_fresh(
    settings, source, tmp_path, monkeypatch, asked, fresh, caplog
):
    caplog.set_level("INFO")
    started = weights_at_the_start(
        settings(f"train.init_from={source}", *asked), tmp_path / "from", monkeypatch
    )
    alone = weights_at_the_start(settings(*asked), tmp_path / "alone", monkeypatch)
    theirs = state_of(source)["model"]
    assert started.keys() == alone.keys()
    for name, weight in started.items():
        expected = alone if name.partition(".")[0] in fresh else theirs
        assert torch.equal(weight, expected[name]), name
    (line,) = [m for m in caplog.messages if m.startswith("starting from")]
    assert line.endswith("fresh: " + ", ".join(["optimiser", *fresh]))


def test_a_run_that_was_cut_off_does_not_read_its_source_again(settings, source, tmp_path):

    copy = shutil.copytree(source, tmp_path / "source")
    config = settings(f"train.init_from={copy}")
    run(config, tmp_path / "whole")

    def stop(metrics, _):
        if metrics["epoch"] == 2:
            raise StoppedError("enough")

    with pytest.raises(StoppedError):
        run(config, tmp_path / "cut", callbacks=[stop])
    shutil.rmtree(copy)
    config.train.resume = "auto"
    resumed = run(config, tmp_path / "cut")
    assert equal(state_of(tmp_path / "cut")["model"], state_of(tmp_path / "whole")["model"])
    assert resumed["started_from"]["path"] == str(copy)


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        (["model.latent_dim=3"], ["model.latent_dim=2 (this run: 3)"]),
        (
            ["model.intermediate_dim=8"],
            [
                "encoder.",
                "(16, 784) (this run: (8, 784))",
                "decoder.",
                "give this run the same sizes",
            ],
        ),
        (["model.depth=2"], ["absent"]),
        (["model=conv"], ["model=mlp, this run model=conv", "no weights fit"]),
    ],
)
def test_weights_that_do_not_fit_are_listed(settings, source, tmp_path, asked, parts):
    with pytest.raises(ConfigError) as error:
        run(settings(f"train.init_from={source}", *asked), tmp_path / "run")
    assert "\n" not in str(error.value)
    for part in ["train.init_from=", *parts]:
        assert part in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_source_of_other_images_is_refused(settings, source, tmp_path):
    state = state_of(source)
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    save_checkpoint(
        {**state, "input_shape": [3, 32, 32]}, tmp_path / "other" / "checkpoints" / "last.pt"
    )
    with pytest.raises(ConfigError, match=r"images of \(3, 32, 32\) \(this run: \(784,\)\)"):
        run(settings(f"train.init_from={tmp_path / 'other'}"), tmp_path / "run")


def test_a_source_that_is_none_is_one_line(settings, source, tmp_path):
    (tmp_path / "bad" / "checkpoints").mkdir(parents=True)
    content = bytearray((source / "checkpoints" / "last.pt").read_bytes())
    content[1000] ^= 1
    (tmp_path / "bad" / "checkpoints" / "last.pt").write_bytes(content)
    for folder, part in (
        (tmp_path / "none", "no such folder"),
        (tmp_path, "has no checkpoints/last.pt"),
        (tmp_path / "bad", "damaged"),
    ):
        with pytest.raises(CheckpointError, match=part) as error:
            run(settings(f"train.init_from={folder}"), tmp_path / "run")
        assert str(error.value).startswith(f"train.init_from={folder}: ")
    with pytest.raises(ConfigError, match=r"without train\.init_from"):
        settings("train.init_checkpoint=best")
    assert load_run(source)


def what_training_made(run_dir):
    """The contents of a run without times and without its history."""
    made = {}
    for name in ("last", "best"):
        state = state_of(run_dir, name)
        made[name] = [state[key] for key in ("epoch", "step", "best")]
        made[name] += [
            (part, key, weight.numpy().tobytes())
            for part in ("model", "training")
            for key, weight in state.get(part, {}).items()
        ]
        made[name] += [
            (key, slot, value.numpy().tobytes())
            for key, values in state["optimizer"]["state"].items()
            for slot, value in values.items()
        ]
    for name in ("metrics.jsonl", "checkpoints/history.jsonl"):
        rows = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
        made[name] = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    folder = run_dir / "figures"
    drawn = [p for p in sorted(folder.rglob("*.png")) if p.name != "log_px.png"]  # by evaluate.py
    made["figures"] = {str(p): p.read_bytes() for p in drawn}
    made["figures"] = {p.removeprefix(str(folder)): b for p, b in made["figures"].items()}
    return made


def order(made_up_root, run_dir, *more):
    return [
        *("data=fashion_mnist", f"data.root={made_up_root}", "model.intermediate_dim=16"),
        *("train.figure_every=0", "data.limit_train=100", "data.limit_test=50", "threads=1"),
        *("data.binarize=dynamic", "data.batch_size=20", f"hydra.run.dir={run_dir}", *more),
    ]


@pytest.fixture(scope="module")
def whole(made_up_root, tmp_path_factory):
    """A run of four epochs, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = train_script(*order(made_up_root, folder, "train.epochs=4", "train.ema=0.9"))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def short(made_up_root, tmp_path_factory):
    """A run of two epochs, uninterrupted."""
    folder = tmp_path_factory.mktemp("short") / "run"
    done = train_script(*order(made_up_root, folder, "train.epochs=2", "train.ema=0.9"))
    assert done.returncode == 0, done.stderr
    return folder


LONGER = ("train.epochs=4",)


# In the first stage, between the two stages, and in the second.
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (None, None),
        (("step", 7, "", signal.SIGTERM), ("step", 9)),
        pytest.param(("step", 7), None, marks=pytest.mark.slow),
        *(
            pytest.param(None, moment, marks=pytest.mark.slow)
            for moment in (
                ("read", 1),
                ("half", 1, "last.pt"),
                ("after", 1, "last.pt"),
                ("after", 1, "metrics.jsonl"),
                ("step", 1),
                ("before", 1, "summary.json"),
            )
        ),
    ],
    ids=str,
)
def test_a_longer_run_has_the_bits_of_one_in_one_piece(
    made_up_root, short, whole, tmp_path, first, second
):
    run_dir = tmp_path / "run"
    if first:
        settings = order(made_up_root, run_dir, "train.epochs=2", "train.ema=0.9")
        assert train_script(*settings, killed=first).returncode in (-9, 143)
    else:
        shutil.copytree(short, run_dir)
    if second:
        killed = train_script(f"train.resume={run_dir}", *LONGER, killed=second)
        assert killed.returncode == -9
    ended = train_script(f"train.resume={run_dir}", *LONGER)
    assert ended.returncode == 0, ended.stderr
    assert what_training_made(run_dir) == what_training_made(whole)
    summary = json.loads((run_dir / "summary.json").read_text())
    stages = [(s["after_epoch"], s["step"], s["train.epochs"]) for s in summary["stages"]]
    begun = (2, 0, 4) if not first else (1, 0, 4) if len(first) == 2 else (1, 2, 4)
    assert stages == [(0, 0, 2), begun]
    assert state_of(run_dir)["stages"] == summary["stages"]
    assert summary["epochs"] == 4
    assert load_run(run_dir)[1].train.epochs == 4


def test_a_longer_run_needs_a_new_schedule(settings, tmp_path):
    run(settings("optimizer.schedule=cosine"), tmp_path)
    before = (tmp_path / "checkpoints" / "last.pt").read_bytes()
    for asked, line in (
        (["optimizer.schedule=cosine", "train.epochs=4"], "has optimizer.schedule=cosine, which"),
        (["optimizer.schedule=cosine", "train.epochs=1"], "has already done 2 epochs; it must be"),
        (["optimizer.schedule=constant"], "has already done 2 epochs; it must be 3 or more"),
    ):
        with pytest.raises(ConfigError) as error:
            run(settings(*asked, f"train.resume={tmp_path}"), tmp_path)
        assert line in str(error.value)
        assert "\n" not in str(error.value)
    assert (tmp_path / "checkpoints" / "last.pt").read_bytes() == before
    assert (tmp_path / "summary.json").exists()

    lr, epochs = 1e-4, 6
    again = settings(
        *("optimizer.schedule=cosine", f"optimizer.lr={lr}", f"train.epochs={epochs}"),
        *(f"train.resume={tmp_path}", "data.batch_size=50"),
    )
    with pytest.raises(CheckpointError, match=r"had data\.batch_size=128, this one has 50"):
        run(again, tmp_path)
    again.data.batch_size = 128
    summary = run(again, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # one step an epoch: the new stage's cosine begins with its own learning rate
    expected = [lr * (1 + math.cos(math.pi * done / 4)) / 2 for done in range(4)]
    assert [row["train/lr"] for row in rows[2:]] == pytest.approx(expected)
    assert [stage["optimizer.lr"] for stage in summary["stages"]] == [1e-3, lr]
    again.train.epochs = 2
    with pytest.raises(ConfigError, match="has already done 6 epochs; it must be 7 or more"):
        run(again, tmp_path)


def test_the_command_line_continues_a_finished_run_only_for_more_epochs(short, tmp_path):
    run_dir = shutil.copytree(short, tmp_path / "run")
    again = f"train.resume={run_dir}"
    for asked, line in (
        ([], "is finished; choose another hydra.run.dir for a new one, or continue it"),
        (["train.epochs=1"], "has already done 2 epochs"),
        (["train.epochs=4", "seed=5"], "its run had seed=0, this one has 5"),
    ):
        refused = train_script(again, *asked)
        assert refused.returncode == 2
        assert line in refused.stderr
        assert refused.stderr.count("\n") == 1
    killed = train_script(again, "train.epochs=4", killed=("after", 1, "last.pt"))
    assert killed.returncode == -9
    assert train_script(again).returncode == 0  # by now the schedule knows its length
    assert json.loads((run_dir / "summary.json").read_text())["epochs"] == 4


def place(schedule, steps, epochs, **more):
    """Learning rates of every step of a run."""
    settings = OptimizerConfig("sgd", 0.5, 1e-8, schedule, **more)
    return [
        learning_rate(settings, epoch, step, epochs=epochs, steps=steps)
        for epoch in range(epochs)
        for step in range(steps)
    ]


def torchs(make, count):
    """Learning rates that one of torch's schedulers gives."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.5)
    scheduler = make(optimizer)
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules_are_torchs():
    of_torch = torch.optim.lr_scheduler
    cosine = torchs(lambda o: of_torch.CosineAnnealingLR(o, 60), 60)
    assert place("cosine", 6, 10) == pytest.approx(cosine)
    steps = torchs(lambda o: of_torch.StepLR(o, 3, 0.2), 10)
    assert place("step", 1, 10, step_epochs=3, step_factor=0.2) == pytest.approx(steps)
    assert place("step", 4, 10, step_epochs=3, step_factor=0.2)[::4] == pytest.approx(steps)
    # torch counts a cycle's phases from the first step to the last one: one step less
    cycle = torchs(lambda o: of_torch.OneCycleLR(o, 0.5, 10_000), 10_000)
    most = 0.5 * math.pi / 2 / 3000  # change by one step, in the shorter phase
    assert place("one_cycle", 1000, 10) == pytest.approx(cycle, abs=2 * most)
    warm = torchs(lambda o: of_torch.LinearLR(o, 1 / 7, total_iters=6), 12)
    assert place("constant", 4, 3, warmup_steps=7) == pytest.approx(warm)


@pytest.mark.parametrize("seed", range(3))
def test_plateaus_are_torchs(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(40, generator=generator, dtype=torch.float64).cumsum(0).tolist()
    for wait, min_delta in ((1, 0.0), (2, 0.5), (5, 2.0)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, "max", 0.5, wait - 1, min_delta, "abs", eps=0.0
        )
        for done, score in enumerate(scores, 1):
            scheduler.step(score)
            falls = falls_of(scores[:done], wait, min_delta)
            assert 0.5**falls == optimizer.param_groups[0]["lr"]
        assert falls > 1


def test_a_new_stages_schedule_begins_where_the_run_is():
    settings = OptimizerConfig("adam", 0.5, 1e-8, "cosine", warmup_steps=2)
    found = [
        learning_rate(settings, epoch, step, epochs=5, steps=4, since=(2, 2))
        for epoch, step in ((2, 2), (2, 3), (3, 0), (4, 3))
    ]
    cosine = [0.25 * (1 + math.cos(math.pi * done / 10)) for done in (0, 1, 2, 9)]
    assert found == pytest.approx([cosine[0] / 2, *cosine[1:]])


CLIP = 1.1


@pytest.mark.parametrize(
    "options",
    [
        {"name": "sgd", "momentum": 0.8, "clip_norm": CLIP},
        {"name": "sgd", "weight_decay": 0.1},
        {"name": "adam", "betas": [0.7, 0.9], "clip_norm": CLIP},
        {"name": "adam", "betas": (0.7, 0.9), "clip_norm": 1e9},
    ],
    ids=str,
)
def test_a_step_clips_and_averages_as_the_papers_say(options):
    torch.manual_seed(0)
    vae = VAE((6,), 2, 4).double()
    theirs = copy.deepcopy(vae)
    settings = OptimizerConfig(lr=0.01, eps=1e-8, schedule="constant", **options)
    objective = as_objective(ObjectiveConfig())
    optimizer = make_optimizer(vae, settings)
    step = eager_step(vae, optimizer, objective, "fp32", clip_norm=settings.clip_norm)
    beta1, beta2 = settings.betas
    first = [torch.zeros_like(p) for p in theirs.parameters()]
    second = [torch.zeros_like(p) for p in theirs.parameters()]
    norms = []
    for t in range(1, 6):
        x = torch.rand(5, 6, dtype=torch.float64)
        noise = Noise(torch.randn(1, 5, 2, dtype=torch.float64), None)
        step(Batch(x, None), noise, torch.tensor(1.0), 0.01)

        loss = loss_and_metrics(objective, theirs, Batch(x, None), noise, torch.tensor(1.0))[0]
        gradients = torch.autograd.grad(loss.mean(), list(theirs.parameters()))
        norms.append(math.sqrt(sum(float((g**2).sum()) for g in gradients)))
        scale = min(1.0, (settings.clip_norm or math.inf) / norms[-1])
        with torch.no_grad():
            for p, g, m, v in zip(theirs.parameters(), gradients, first, second, strict=True):
                g = g * scale + settings.weight_decay * p
                if settings.name == "sgd":
                    m.mul_(settings.momentum).add_(g)
                    p.sub_(0.01 * m)
                    continue
                m.mul_(beta1).add_((1 - beta1) * g)  # Kingma and Ba (2015), algorithm 1
                v.mul_(beta2).add_((1 - beta2) * g**2)
                p.sub_(0.01 * m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + 1e-8))
    assert min(norms) < CLIP < max(norms)  # a limit that clips some steps only
    for ours, expected in zip(vae.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(["optimizer.schedule=one_cycle"], marks=pytest.mark.slow),
        ["optimizer.schedule=plateau", "optimizer.step_epochs=1", "train.min_delta=1000"],
    ],
    ids=["one_cycle", "plateau"],
)
def test_a_clipped_run_with_a_schedule_resumes_with_the_same_bits(made_up_root, tmp_path, schedule):
    more = ["optimizer=sgd", "train.epochs=3", "optimizer.clip_norm=20", *schedule]
    whole = order(made_up_root, tmp_path / "whole", *more)
    assert train_script(*whole).returncode == 0
    cut = order(made_up_root, tmp_path / "cut", *more)
    killed = train_script(*cut, killed=("step", 8, "", signal.SIGTERM))
    assert killed.returncode == 143
    resumed = train_script(f"train.resume={tmp_path / 'cut'}")
    assert resumed.returncode == 0, resumed.stderr
    assert what_training_made(tmp_path / "cut") == what_training_made(tmp_path / "whole")
    rows = [json.loads(r) for r in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    if "optimizer.step_epochs=1" in schedule:  # the first epoch is always an improvement
        lr = rows[0]["train/lr"]
        assert [row["train/lr"] for row in rows] == pytest.approx([lr, lr, lr / 10])


@pytest.mark.slow
def test_a_plateau_continues_in_a_longer_run(settings, tmp_path):
    plateau = ["optimizer.schedule=plateau", "optimizer.step_epochs=1", "train.min_delta=1000"]
    run(settings(*plateau, "train.epochs=4"), tmp_path / "whole")
    run(settings(*plateau), tmp_path / "longer")
    run(
        settings(*plateau, "train.epochs=4", f"train.resume={tmp_path / 'longer'}"),
        tmp_path / "longer",
    )
    assert what_training_made(tmp_path / "longer") == what_training_made(tmp_path / "whole")
    with pytest.raises(ConfigError, match="plateau without a test_loader: it needs images"):
        train(VAE((6,), 2, 4), torch.rand(10, 6), optimizer=settings(*plateau).optimizer)


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ("optimizer.clip_norm=nan", "optimizer.clip_norm=nan: must be a number above 0, or null"),
        ("optimizer.clip_norm=0", "optimizer.clip_norm=0.0: must be a number above 0, or null"),
        ("optimizer.betas=[0.9]", "must be two numbers from 0 to below 1"),
        ("optimizer.betas=[0.9,1.0]", "must be two numbers from 0 to below 1"),
        ("optimizer.momentum=0.9", "the first of optimizer.betas is Adam's"),
        ("optimizer.warmup_steps=-1", "optimizer.warmup_steps=-1: must be a whole number"),
        ("optimizer.schedule=step", "set optimizer.schedule=step (or plateau) and"),
        ("optimizer.step_epochs=3", "set optimizer.schedule=step (or plateau) and"),
        ("optimizer.step_factor=0.5", "it is for optimizer.schedule=step and plateau"),
        (
            "optimizer.schedule=plateau",
            "optimizer.step_epochs=null with optimizer.schedule=plateau",
        ),
    ],
)
def test_optimizer_settings_that_mean_nothing_are_one_line(changed, asked, line):
    with pytest.raises(ConfigError) as error:
        changed(asked)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_patience_counts_the_epochs_since_the_last_gain():
    scores = [-9.0, -5.0, -4.9, -4.85, None, -4.8, -6.0]
    assert epochs_without_gain(scores) == 1
    assert epochs_without_gain(scores, 0.12) == 3  # -4.85 is better than -5.0 by 0.15
    assert epochs_without_gain(scores, 0.3) == 5  # a slow rise does not count
    assert epochs_without_gain([]) == 0
    assert has_stalled(scores, 5, 0.3)
    assert not has_stalled(scores, 6, 0.3)
    assert not has_stalled(scores, None)


PATIENT = ("train.patience=2", "train.min_delta=1000", "train.epochs=9", "train.ema=0.9")


@pytest.mark.parametrize(
    "killed",
    [
        ("after", 3, "last.pt"),
        pytest.param(("step", 12), marks=pytest.mark.slow),
        pytest.param(("before", 1, "summary.json"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_that_stops_early_is_finished(made_up_root, tmp_path, killed):
    """No epoch gains 1000 nats: the first is the reference, and two more are waited for."""
    cut = order(made_up_root, tmp_path / "cut", *PATIENT)
    assert train_script(*cut, killed=killed).returncode == -9
    resumed = train_script(f"train.resume={tmp_path / 'cut'}")
    assert resumed.returncode == 0, resumed.stderr
    assert "stopped early after epoch 3: no better test elbo by more than 1000" in resumed.stdout
    summary = json.loads((tmp_path / "cut" / "summary.json").read_text())
    rows = [json.loads(r) for r in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    elbos = [row["test/elbo"] for row in rows]
    assert len(elbos) == summary["epochs"] == 3
    best = elbos.index(max(elbos)) + 1
    assert summary["stopped_early"] == {
        "after_epoch": 3,
        "best_epoch": best,
        "monitor": "test/elbo",
        "patience": 2,
        "min_delta": 1000.0,
    }
    assert state_of(tmp_path / "cut", "best")["epoch"] == best
    assert summary["best_test_elbo"] == max(elbos)
    assert (tmp_path / "cut" / "figures" / "growth" / "000003.png").exists()
    (found,) = read_runs(tmp_path / "cut")
    assert found.state == "finished"

    three = order(made_up_root, tmp_path / "three", "train.epochs=3", "train.ema=0.9")
    assert train_script(*three).returncode == 0
    assert what_training_made(tmp_path / "cut") == what_training_made(tmp_path / "three")


def test_a_run_that_stopped_early_continues_with_more_patience(made_up_root, whole, tmp_path):
    settings = order(made_up_root, tmp_path, *PATIENT)
    assert train_script(*settings).returncode == 0
    again = f"train.resume={tmp_path}"
    for asked, line in (
        ([], "is finished"),
        (
            ["train.epochs=20"],
            "has stopped early after epoch 3; to continue, set a longer train.patience",
        ),
    ):
        refused = train_script(again, *asked)
        assert refused.returncode == 2
        assert line in refused.stderr
    more = ["train.patience=null", "train.min_delta=0.0", "train.epochs=4"]
    longer = train_script(again, *more)
    assert longer.returncode == 0, longer.stderr
    assert what_training_made(tmp_path) == what_training_made(whole)
    assert "stopped_early" not in json.loads((tmp_path / "summary.json").read_text())


@pytest.mark.slow
def test_a_sweep_counts_what_stopped_early_as_done(made_up_root, tmp_path):
    settings = [o for o in order(made_up_root, "", *PATIENT) if not o.startswith("hydra.run.dir")]
    sweep = ["-m", *settings, "seed=0,1", f"sweep.dir={tmp_path}"]
    for _ in range(2):
        done = train_script(*sweep)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished already") == 2
    assert {found.state for found in read_runs(tmp_path)} == {"finished"}


def test_patience_needs_something_to_judge_by(changed):
    for asked, line in (
        ("train.patience=0", "train.patience=0: must be a whole number, 1 or more, or null"),
        ("train.min_delta=0.05", "without train.patience"),
        ("train.min_delta=-1", "train.min_delta=-1.0: must be a number, 0 or more"),
    ):
        with pytest.raises(ConfigError) as error:
            changed(asked)
        assert line in str(error.value)
    vae = VAE((6,), 2, 4)
    with pytest.raises(ValueError, match="needs a test_loader to judge by"):
        train(vae, torch.rand(10, 6), patience=1)
