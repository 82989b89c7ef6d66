"""What users type wrongly, over all scripts: one line that names key, value and remedy."""

import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.command_lines import command_lines
from vae_torch import (
    VAE,
    elbo,
    iwae_bound,
    kl_standard_normal,
    mnist_loaders,
    reparameterize,
    train,
)
from vae_torch.checkpoint import load_checkpoint, save_checkpoint
from vae_torch.cli.compose import compose
from vae_torch.cli.messages import EndedError, told
from vae_torch.cli.settings_line import asked
from vae_torch.config import ConfigError, EvaluateConfig
from vae_torch.data import DataError, idx_bytes, loaders_of

RAW = "FashionMNIST/raw"
SMALL = (
    *("model.intermediate_dim=8", "train.epochs=1", "train.figure_every=0"),
    *("data.limit_train=20", "data.limit_test=20"),
)


@pytest.fixture(scope="module")
def place(made_up_root, tmp_path_factory):
    """A folder with a finished run, `good`, and damaged runs and data sets."""
    place = tmp_path_factory.mktemp("place")
    order = ("data=fashion_mnist", f"data.root={made_up_root}", *SMALL)
    ended = command_lines().run("train.py", *order, f"hydra.run.dir={place / 'good'}")
    assert ended.status == 0, ended.error

    def spoilt_run(name):
        shutil.copytree(place / "good", place / name)
        (place / name / "summary.json").unlink()
        return place / name / "checkpoints" / "last.pt"

    spoilt_run("cut").write_bytes(b"VAETORCH")
    other = spoilt_run("other")
    state = load_checkpoint(other)
    state["config"]["model"]["name"] = "residual"
    save_checkpoint(state, other)
    spoilt_run("interrupted")
    others = spoilt_run("others")
    state = load_checkpoint(others)
    save_checkpoint({**state, "data_sha256": {"train": "0", "test": "0"}}, others)
    (spoilt_run("no-history").parent / "history.jsonl").write_text("{}\n")

    for name, file, array in (
        ("large", "train-images-idx3-ubyte", np.zeros((600, 32, 32), np.uint8)),
        ("fewer", "train-labels-idx1-ubyte", np.zeros(599, np.uint8)),
        ("flat", "train-images-idx3-ubyte", np.zeros((600, 784), np.uint8)),
        ("no-labels", "train-labels-idx1-ubyte", None),
        ("no-images", "t10k-images-idx3-ubyte", None),
    ):
        shutil.copytree(made_up_root, place / name)
        path = place / name / RAW / file
        path.unlink() if array is None else path.write_bytes(idx_bytes(array))
    shutil.copytree(made_up_root, place / "terabytes")
    shutil.copytree(made_up_root, place / "wide")
    wide = b"\0\0\x0c\x03" + np.array([600, 28, 28], ">u4").tobytes() + bytes(4 * 600 * 784)
    (place / "wide" / RAW / "train-images-idx3-ubyte").write_bytes(wide)
    header = b"\0\0\x08\x03" + (2**31).to_bytes(4, "big") + (28).to_bytes(4, "big") * 2
    (place / "terabytes" / RAW / "t10k-images-idx3-ubyte").write_bytes(header)
    (place / "config").mkdir()
    (place / "config" / "mine.yaml").write_text(
        "defaults: [train, _self_]\nmodel: {latnt_dim: 3}\n"
    )
    broken = place / "broken"
    (broken / "experiment").mkdir(parents=True)
    (broken / "experiment" / "open.yaml").write_text("# @package _global_\nmodel:\n  [1, 2\n")
    (broken / "experiment" / "twice.yaml").write_text("# @package _global_\nseed: 1\nseed: 2\n")
    (broken / "indented.yaml").write_text("run: good\n  eval: 3\n")
    return place


# Refused by this project: status 2 and one line, with these words.
REFUSED = [
    ("train.py model.latent_dim=0", "model.latent_dim=0: must be a whole number, 1 or more"),
    ("train.py model=", "model=: name one of"),
    ("train.py =3", "=3: names no key; write key=value"),
    ("train.py train.epoch=2", "train.epoch: no such key; did you mean train.epochs"),
    ("train.py outputs/2026-01-01", "outputs/2026-01-01: write key=value"),
    ("train.py sweep.dir=new", "sweep.dir=new: this is not a sweep; add -m"),
    ("train.py -m seed=0,1 hydra/launcher=joblib", "hydra/launcher=joblib: type where=cores"),
    ("train.py -m device=cpu,auto", "device: 2 jobs would share the folder"),
    ("train.py --config-dir config --config-name mine", "model.latnt_dim: no such key; did you"),
    ("train.py data.name=cifar10", "data.name=cifar10: must be one of mnist"),
    ("train.py data.root=/dev/null", "data.root=/dev/null: .* choose another folder"),
    ("train.py device=cuda:99", "device=cuda:99: .* use device=cpu"),
    ("train.py precision=fp16 device=cpu", "precision=fp16 with device=cpu: .* use precision=fp32"),
    ("train.py train.resume=nowhere", "train.resume=nowhere: .* name the folder of a run"),
    ("train.py train.resume=good", "train.resume=good: .* is finished; choose another"),
    ("train.py train.resume=cut", "cut/checkpoints/last.pt: damaged"),
    ("train.py train.resume=other", "other/checkpoints/last.pt: does not fit its own config"),
    ("train.py train.resume=interrupted seed=3", "had seed=0, this one has 3"),
    (
        "train.py train.resume=others",
        "others/checkpoints/last.pt: .* other images .* data root .* name the folder",
    ),
    ("train.py train.resume=no-history", "no-history/checkpoints/history.jsonl: damaged"),
    ("train.py experiment=open --config-dir broken", "experiment/open.yaml: line 4: no YAML"),
    ("train.py experiment=twice --config-dir broken", "twice.yaml: .*no YAML .*duplicate key"),
    ("evaluate.py --config-dir broken --config-name indented", "indented.yaml: line 2: no YAML"),
    ("explore.py --config-dir broken --config-name indented", "indented.yaml: line 2: no YAML"),
    ("reproduce.py --config-dir broken --config-name indented", "indented.yaml: line 2: no YAML"),
    ("train.py hydra.run.dir=good", "hydra.run.dir=good: holds a finished run; choose another"),
    ("train.py hydra.run.dir=interrupted", "unfinished run; add train.resume=auto"),
    ("train.py hydra.run.dir=config", "hydra.run.dir=config: is not empty; choose another"),
    ("train.py hydra.run.dir=/dev/null/run", "hydra.run.dir=/dev/null/run: .* choose another"),
    (f"train.py hydra.run.dir={'x' * 5000}", "hydra.run.dir.* choose another folder"),
    ("train.py data.root=large", r"large/.*train-images.*\(600, 32, 32\).* 28x28"),
    ("train.py data.root=no-images", "put t10k-images-idx3-ubyte"),
    ("train.py -m seed=0,1 'hydra.sweep.subdir=../${hydra.job.num}'", "hydra.sweep.subdir=../"),
    ("evaluate.py", "run is missing: name a run folder"),
    ("evaluate.py run=", "run=: must be a run folder"),
    ("evaluate.py run=nowhere", "run=nowhere: no such folder"),
    ("evaluate.py run=config", "run=config: has no checkpoints/last.pt"),
    ("evaluate.py run=cut", "cut/checkpoints/last.pt: damaged"),
    ("evaluate.py run=other", "other/checkpoints/last.pt: does not fit its own config"),
    ("evaluate.py run=good eval.num_samples=0", "eval.num_samples=0"),
    ("evaluate.py run=good data_root=no-images", "put t10k-images-idx3-ubyte"),
    ("evaluate.py run=others", "others/checkpoints/last.pt: .* other images .* name the folder"),
    ("evaluate.py run=others eval.limit=9", "others/checkpoints/last.pt: .* other images .* name"),
    ("evaluate.py run=good +foo=1", "foo: no such key"),
    ("evaluate.py runn=good", "runn: no such key; did you mean run"),
    ("evaluate.py good nowhere", "nowhere: one run at a time"),
    ("evaluate.py -m run=good", "-m; --help"),
    ("evaluate.py nowhere", "run=nowhere: no such folder"),
    ("export.py run=good", "out is missing: write out=VALUE; --help"),
    ("export.py run=good data_root=data", "data_root: no such key"),
    ("explore.py", "run is missing: name a run folder"),
    ("explore.py run=", "run=: must be a run folder"),
    ("explore.py run=nowhere", "run=nowhere: no such folder"),
    ("explore.py run=config", "run=config: has no checkpoints/last.pt"),
    ("explore.py run=cut --open", "cut/checkpoints/last.pt: damaged"),
    ("explore.py run=good points=0", "points=0: must be a whole number, 1 or more"),
    ("explore.py run=good checkpoint=first", "checkpoint=first: must be one of last, best"),
    ("reproduce.py only=[nothing]", "only=nothing: must be some of keras_notebook"),
    ("reproduce.py seeds=[]", r"seeds=\[\]: must be one or more numbers"),
    ("reproduce.py seeds=[-1]", r"seeds=\[-1\]"),
    ("reproduce.py num_samples=0", "num_samples=0"),
    ("reproduce.py limit_test=0", "limit_test=0"),
    ("reproduce.py num_samples=10 +seed=1", "seed: no such key"),
    ("benchmark.py --repetitions 0", "--repetitions 0: must be 1 or more"),
    ("benchmark.py --repetitions two", "--repetitions: invalid int value: 'two'; --help"),
    ("benchmark.py --json /dev/null/x.json", "--json=/dev/null: .* choose another folder"),
    ("benchmark.py --fast", "unrecognized arguments: --fast; --help"),
    ("summarize.py", "arguments are required: DIR; --help"),
    ("summarize.py nowhere", "nowhere: "),
    ("summarize.py config", "config: holds no run; name"),
    ("summarize.py good --metric test/elbow", "test/elbow"),
    ("summarize.py good --group-by model.latnt_dim", "model.latnt_dim"),
    ("summarize.py good --where seed", "seed"),
    ("summarize.py good --where seed=7", "seed=7"),
    ("summarize.py good --out /dev/null/x", "--out=/dev/null/x: .* choose another folder"),
    ("summarize.py good --metrics loss", "--metrics"),
]

# Refused when Hydra composes the settings, before any file is read: the same.
COMPOSED = [
    ("model=conv model.depth=2", "model.depth=2 with model=conv: .* leave it at 1"),
    ("+train.epoch=2", "train.epoch: no such key; did you mean train.epochs"),
    ("lr=0.1", "lr: no such key; did you mean optimizer.lr"),
    ("model.latnt_dim=3", "model.latnt_dim: no such key; did you mean model.latent_dim"),
    ("+seed=3", "seed is there already; write seed=VALUE"),
    ("~seed", "seed is missing: give it a value"),
    ("model=null", "model=null: name one of conv, mlp, residual, resnet"),
    ("model=[mlp,conv]", r"model=\[mlp,conv\]: name one of"),
    ("model=vgg", "model=vgg: must be one of conv, mlp, residual, resnet"),
    ("model=residul", "must be one of .*; did you mean residual"),
    ("experiment=../../x", r"experiment=\.\./\.\./x: must be one of best, best30, best60, burda"),
    ("model.latent_dim=2,3", "model.latent_dim=2,3: several values make a sweep; add -m"),
    ("foo", "foo: write key=value"),
    ("where=nowhere", "where=nowhere: must be one of cores, here"),
    ("+model.foo=1", "model.foo: no such key; --help"),
    ("+foo=1", "foo: no such key"),
    ("objective=iwae objective.beta=2", "objective.beta=2.0.* leave them out"),
    ("objective=iwae objective.early_samples=0", "objective.early_samples=0"),
    ("objective=iwae objective.early_epochs=9", "set both or neither"),
    ("objective=iwae objective.early_samples=2", "set both or neither"),
    (
        "objective=iwae objective.early_samples=5 objective.early_epochs=2",
        "num_samples=5: must be 1 or more, and below",
    ),
    ("objective=iwae objective.resample=true objective.num_samples=1", "nothing to choose from"),
    ("objective=keras likelihood=gaussian", "is for likelihood=bernoulli"),
]

# The same for evaluate.py.
OF_A_CARD = [
    ("eval.chunk=0", "eval.chunk=0"),
    ("eval.ais=0", "eval.ais=0: must be a whole number, 1 or more, or null"),
    ("eval.limit=0", "eval.limit=0"),
    ("eval.seed=-1", "eval.seed=-1: must be between"),
    ("eval.checkpoint=../x", "eval.checkpoint=../x: must be one of last"),
    ("eval.exact=perhaps", "eval.exact=perhaps: must be true or false"),
    ("device=tpu", "device=tpu: must be auto, cpu"),
]

# Refused for a value, or for two settings that contradict each other.
VALUES = [
    ("model.latent_dim=1000000000", "at most 100000"),
    ("model.intermediate_dim=-1", "model.intermediate_dim=-1"),
    ("model.depth=5000", "model.depth=5000: .* at most 1000"),
    ("model.name=../../x", r"model=\.\./\.\./x: must be one of mlp"),
    ("model.activation=swish", "model.activation=swish: must be one of relu"),
    ("model.latent_dim=two", "model.latent_dim=two: must be a whole number"),
    ("data.batch_size=1e3", "data.batch_size=1000.0: must be a whole number"),
    ("compile=maybe", "compile=maybe: must be true or false"),
    ("data.batch_size=0", "data.batch_size=0"),
    ("data.batch_size=99999999999999999999", "at most 2147483647"),
    ("data.binarize=true", "data.binarize=True: must be one of none"),
    ("data.limit_train=0", "data.limit_train=0"),
    ("data.limit_test=-3", "data.limit_test=-3"),
    ("data.hold_out=-1", "data.hold_out=-1"),
    ("data.root=", "data.root=: must be the name of a folder"),
    ("'data.root=${nowhere}'", "data.root: .*nowhere.* not found"),
    ("'data.root=${oc.env:NOT_SET_AT_ALL}'", "data.root: .*NOT_SET_AT_ALL"),
    ("seed=-1", "seed=-1: must be between 0 and 4294967295"),
    ("seed=4294967296", "seed=4294967296"),
    ("device=gpu", "device=gpu: must be auto, cpu, cuda, cuda:N or mps"),
    ("precision=fp8", "precision=fp8: must be one of fp32, medium, bf16"),
    ("threads=0", "threads=0"),
    ("likelihood=poisson", "likelihood=poisson: must be one of bernoulli"),
    ("likelihood=gaussian data.binarize=dynamic", "use likelihood=bernoulli, or"),
    ("prior=flaw", "prior=flaw: must be one of standard"),
    ("prior=vamp prior_components=0", "prior_components=0"),
    ("prior=mixture objective.free_bits=0.5", "needs prior=standard"),
    ("objective.name=vlb", "objective=vlb: must be one of elbo"),
    ("objective.beta=-1", "objective.beta=-1.0: must be a number, 0 or more"),
    ("objective.beta=nan", "objective.beta=nan"),
    ("objective.beta_warmup_epochs=-2", "objective.beta_warmup_epochs=-2.0"),
    ("objective.free_bits=inf", "objective.free_bits=inf"),
    ("objective.num_samples=0", "objective.num_samples=0"),
    ("objective.estimator=dreg", "estimator=dreg .* use objective=iwae"),
    ("objective.resample=true", "nothing to choose from; use objective=iwae"),
    ("optimizer.name=lion", "optimizer.name=lion: must be one of adam"),
    ("optimizer.lr=0", "optimizer.lr=0.0: must be a number above 0"),
    ("optimizer.lr=nan", "optimizer.lr=nan"),
    ("optimizer.eps=0", "optimizer.eps=0.0"),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1.0"),
    ("optimizer.schedule=linear", "optimizer.schedule=linear: must be one of constant"),
    ("train.epochs=0", "train.epochs=0"),
    ("train.figure_every=-1", "train.figure_every=-1"),
    ("train.checkpoint_every=10h", "train.checkpoint_every=10h: .* 10min"),
    ("train.ema=1", "train.ema=1.0: must be at least 0"),
]


def ends(place, made_up_root, line):
    script, *arguments = shlex.split(line)
    multirun = [arguments.pop(0)] if arguments[:1] == ["-m"] else []  # stands before all others
    defaults = []
    if script == "train.py":
        defaults = ["data=fashion_mnist", f"data.root={made_up_root}", *SMALL]
        if "resume=" not in line and "hydra.run.dir" not in line:
            defaults += ["hydra.run.dir=new/run", "hydra.sweep.dir=new/sweep"]

    def there():  # the lock file of a data folder stays: deleting it would let two processes lock
        return {path for path in place.rglob("*") if path.suffix != ".lock"}

    before = there()
    ended = command_lines().run(script, *multirun, *defaults, *arguments, cwd=place)
    assert "Traceback" not in ended.error
    assert there() == before  # no leftovers
    return ended


@pytest.mark.parametrize(("line", "words"), REFUSED, ids=lambda value: value[:60])
def test_a_mistake_is_reported_in_one_line(place, made_up_root, line, words):
    ended = ends(place, made_up_root, line)
    assert ended.status == 2, ended
    (said,) = ended.error.splitlines()
    assert said.startswith(line.split()[0] + ": ")
    assert re.search(words, said), said
    assert len(said) < 600


@pytest.mark.parametrize(("line", "words"), COMPOSED, ids=lambda value: value[:60])
def test_settings_that_cannot_be_composed_are_reported_in_one_line(line, words):
    with pytest.raises(ConfigError, match=words) as error:
        compose(["data=fashion_mnist", *SMALL, *shlex.split(line)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("line", "words"), OF_A_CARD, ids=lambda value: value[:60])
def test_a_wrong_value_of_a_card_is_reported_in_one_line(line, words):
    with pytest.raises(EndedError) as ended:
        asked("evaluate", "", EvaluateConfig, ["run=good", line])
    assert ended.value.code == 2
    assert re.search(words, ended.value.reason)


# Refused for image files. The message begins with the name of their folder.
IMAGES = [
    ({"root": "flat"}, r"flat/.*\(600, 784\)"),
    ({"root": "wide"}, r"wide/.*train-images.* of int64; images must be 28x28 bytes"),
    ({"root": "fewer"}, "599 labels for 600 images; delete both"),
    ({"root": "no-labels"}, "data.root=no-labels, .* put train-labels-idx1-ubyte"),
    ({"root": "terabytes"}, "terabytes/.*claims 1,683,627,180,048 bytes; delete"),
    ({"hold_out": 600}, "data.hold_out=600: .* leave some of 600 images"),
]


@pytest.mark.parametrize(("settings", "words"), IMAGES)
def test_images_that_cannot_be_used_are_reported_in_one_line(
    place, made_up_root, config, monkeypatch, settings, words
):
    monkeypatch.chdir(place)
    config.data.name, config.data.root = "fashion_mnist", str(made_up_root)
    for key, value in settings.items():
        setattr(config.data, key, value)
    with pytest.raises((ConfigError, DataError), match=words) as error:
        loaders_of(config, "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("line", "words"), VALUES, ids=lambda value: value[:60])
def test_a_wrong_value_is_reported_in_one_line(changed, line, words):
    with pytest.raises(ConfigError, match=words) as error:
        changed(*shlex.split(line))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["Läufe/数字", pytest.param("x" * 200, marks=pytest.mark.slow), "it's a=b,c=d"]
)
def test_folders_may_have_any_name(made_up_root, tmp_path, name):
    root = tmp_path / f"data {name}"[:200]
    shutil.copytree(made_up_root, root)
    order = ["data=fashion_mnist", f"data.root={root}", *SMALL, f"hydra.run.dir={name}"]
    ended = command_lines().run("train.py", *order, cwd=tmp_path)
    assert ended.status == 0, ended.error
    assert (tmp_path / name / "summary.json").exists()
    ended = command_lines().run("evaluate.py", f"run={name}", "eval.exact=maybe", cwd=tmp_path)
    assert "eval.exact" in ended.error  # the folder's name was understood


@pytest.mark.parametrize("value", [1.5, -0.5, 255.0, float("nan")])
def test_pixels_outside_0_and_1_are_refused(small_vae, value):
    good, bad = (
        DataLoader(TensorDataset(torch.full((2, 784), pixel), torch.zeros(2)), batch_size=2)
        for pixel in (0.5, value)
    )
    for loaders in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match=rf"\(2, 784\) has values from {value:g} .*\[0, 1\]"):
            train(small_vae, *loaders, epochs=1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda vae: vae.encode(torch.rand(3, 783)), r"\(3, 783\)"),
        (lambda vae: vae.encode(torch.rand(784)), r"\(784,\)"),
        (lambda vae: vae.encode(torch.zeros(3, 784, dtype=torch.uint8)), "torch.uint8"),
        (lambda vae: vae.decode(torch.rand(3, 5)), r"\(3, 5\)"),
        (lambda vae: vae.decode(torch.zeros(3, 2, dtype=torch.int64)), "torch.int64"),
        (lambda vae: vae.sample(0), "n is 0"),
        (lambda _: VAE(latent_dim=0), "latent_dim is 0"),
        (lambda _: VAE(latent_dim=2.5), "latent_dim is 2.5"),
        (lambda _: reparameterize(torch.rand(3, 2), torch.rand(3, 4)), r"\(3, 2\).*\(3, 4\)"),
        (lambda _: reparameterize(*torch.rand(2, 3, 2), eps=torch.rand(3, 3)), r"\(3, 3\)"),
        (lambda _: kl_standard_normal(torch.rand(3, 2), torch.rand(2, 2)), r"\(3, 2\).*\(2, 2\)"),
        (lambda _: elbo(*torch.rand(2, 3, 784), *torch.rand(2, 4, 2)), r"\(3, 784\).*\(4, 2\)"),
        (lambda _: elbo(torch.rand(3, 7), torch.rand(3, 8), *torch.rand(2, 3, 2)), r"\(3, 8\)"),
        (lambda _: iwae_bound(torch.rand(3)), r"\(3,\)"),
        (lambda _: iwae_bound(torch.rand(0, 3)), r"\(0, 3\)"),
        (lambda _: mnist_loaders("nowhere", batch_size=0), "batch_size=0: must be"),
        (lambda _: mnist_loaders("nowhere", batch_size=2.5), "batch_size=2.5: must be"),
    ],
)
def test_a_caller_learns_value_and_shape(small_vae, call, words):
    with pytest.raises(ValueError, match=words):
        call(small_vae)


def test_one_image_a_last_batch_of_one_and_a_batch_larger_than_the_set(made_up_root):
    for images, batch in ((1, 1), (1, 128), (5, 4), (5, 1000)):
        torch.manual_seed(0)
        loaders = mnist_loaders(
            made_up_root, name="fashion_mnist", batch_size=batch,
            limit_train=images, limit_test=images,
        )  # fmt: skip
        history = train(VAE(intermediate_dim=8), *loaders, epochs=1)
        assert np.isfinite(history["train/elbo"]).all()
        assert np.isfinite(history["test/elbo"]).all()


def test_too_little_memory_is_one_line(capsys):
    with pytest.raises(EndedError), told("out=x.npz", smaller="use a chunk below 1024"):
        torch.empty(1 << 60)
    said = capsys.readouterr().err
    assert said.endswith(": out of memory: use a chunk below 1024\n")
    assert said.count("\n") == 1
    with pytest.raises(RuntimeError, match="size of tensor"), told("out=x.npz"):
        torch.ones(2) + torch.ones(3)
