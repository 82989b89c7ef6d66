"""Models whose encoder and decoder see the label: `VAE(classes=N)`, `model.conditional=true`."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn.functional import one_hot

from tests.command_lines import run_script
from tests.conftest import made_up_digits
from vae_torch import VAE, OptimizerConfig, array_loaders, compose, load_run, save_run, train
from vae_torch.checkpoint import Checkpoints, load_checkpoint
from vae_torch.config import ConfigError, ObjectiveConfig
from vae_torch.data import DataError
from vae_torch.encode import encode_images
from vae_torch.evaluate import evaluate_images
from vae_torch.evaluation.figures import by_class
from vae_torch.evaluation.importance import importance_log_px
from vae_torch.evaluation.proposals import fitted_log_px
from vae_torch.explorer import ExplorerError, explorer_page
from vae_torch.figures import sample_grid, traversal_figure
from vae_torch.images import Batch
from vae_torch.parts.objectives import Noise, as_objective, bound, loss_and_metrics
from vae_torch.parts.registry import load_plugins
from vae_torch.quadrature import exact_log_px
from vae_torch.runs.run import run
from vae_torch.samples import draw_samples
from vae_torch.training.errors import StoppedError

PIXELS, CLASSES = 12, 3


@pytest.fixture
def vae():
    torch.manual_seed(0)
    vae = VAE((PIXELS,), 2, 16, classes=CLASSES).double()
    for weight in vae.decoder.parameters():
        weight.data *= 2
    return vae


@pytest.fixture
def batch():
    x = torch.rand(7, PIXELS, generator=torch.Generator().manual_seed(1)).round().double()
    return Batch(x, torch.tensor([2, 0, 1, 0, 2, 2, 0]))


def seen(values, y):
    """Append the label to the values, as a network gets it."""
    return torch.cat([values, one_hot(y, CLASSES).expand(*values.shape[:-1], -1).double()], -1)


@torch.no_grad()
def on_a_fine_grid(vae, batch, side=0.04):
    """Log p(x|y) of each image with torch's Bernoulli and the decoder alone."""
    ticks = torch.arange(-6, 6, side).double() + side / 2
    z = torch.cartesian_prod(ticks, ticks)
    prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
    found = []
    for x, y in zip(*batch, strict=True):
        pixels = Bernoulli(logits=vae.decoder(seen(z, y))).log_prob(x).sum(-1)
        found.append((pixels + prior).logsumexp(0) + 2 * math.log(side))
    return torch.stack(found)


@pytest.mark.usefixtures("few_points")
def test_every_estimate_of_log_px_is_that_of_a_fine_grid(vae, batch):
    batch = batch.rows(slice(4))
    truth = on_a_fine_grid(vae, batch)
    alone = exact_log_px(vae.given(1), batch.x[2:3]).log_px
    torch.testing.assert_close(alone, truth[2:3], atol=2e-3, rtol=0)
    for estimate, tolerance in (
        (exact_log_px, 2e-3),
        (lambda model, x: fitted_log_px(model, x, num_samples=1000), 0.05),
        (lambda model, x: importance_log_px(model, x, num_samples=1000), 0.2),
    ):
        found = by_class(vae, batch, estimate).log_px
        torch.testing.assert_close(found, truth, atol=tolerance, rtol=0)
    encoded = encode_images(vae, [tuple(batch)], num_samples=1000)
    torch.testing.assert_close(encoded.log_px, truth, atol=0.2, rtol=0)
    other = on_a_fine_grid(vae, Batch(batch.x, (batch.y + 1) % CLASSES))
    assert ((truth - other).abs() > 0.1).all()  # the label matters


def test_images_are_encoded_in_parts_with_their_own_labels(vae, batch):
    whole = vae.encode(batch.x, batch.y)
    for model in (vae.given(batch.y), vae.of(batch)):
        parts = list(model.encode_parts(batch.x, at_once=3))
        torch.testing.assert_close(torch.cat([q.mean for q in parts]), whole.mean)
    seven = torch.cat([q.mean for q in vae.given(1).encode_parts(batch.x, at_once=3)])
    torch.testing.assert_close(seven, vae.encode(batch.x, 1).mean)
    for y in (batch.y[:3], torch.cat([batch.y, batch.y])):
        with pytest.raises(ValueError, match="labels for"):
            list(vae.given(y).encode_parts(batch.x, at_once=3))


@pytest.mark.usefixtures("few_points")
def test_the_card_is_of_each_image_given_its_class(vae, batch):
    batch = batch.rows(slice(1, 4))  # of two classes
    card, per_image = evaluate_images(
        vae, [tuple(batch)], num_samples=200, fit_samples=100, fit_images=1
    )
    truth = on_a_fine_grid(vae, batch)
    torch.testing.assert_close(per_image["log_px_exact"], truth, atol=2e-3, rtol=0)
    torch.testing.assert_close(per_image["log_px"], truth, atol=0.2, rtol=0)
    assert card["log_px"]["definition"].startswith("log p(x|y)")
    assert "sees each image's label" in card["verdict"][-1]


@pytest.mark.parametrize(
    "objective",
    [ObjectiveConfig(), ObjectiveConfig(name="iwae", num_samples=4, resample=True)],
    ids=["elbo", "iwae"],
)
def test_the_bound_is_that_of_its_formula(vae, batch, objective):
    eps = torch.randn(objective.num_samples, 7, 2).double()
    h = vae.encoder(seen(batch.x, batch.y))
    q = Normal(vae.posterior.mean(h), torch.exp(0.5 * vae.posterior.logvar(h)))
    z = q.mean + q.stddev * eps
    logits = vae.decoder(seen(z, batch.y).flatten(0, 1)).unflatten(0, eps.shape[:2])
    log_px = Bernoulli(logits=logits).log_prob(batch.x).sum(-1)
    prior = Normal(0.0, 1.0)
    log_w = log_px + (prior.log_prob(z) - q.log_prob(z)).sum(-1)
    expected = log_px.mean(0) - kl_divergence(q, prior).sum(-1)
    parts = bound(vae, batch, eps)
    torch.testing.assert_close(parts.reconstruction - parts.kl, expected)
    noise = Noise(eps, torch.rand(7).double() if objective.resample else None)
    loss, _ = loss_and_metrics(as_objective(objective), vae, batch, noise, 1.0)
    if objective.name == "iwae":
        expected = log_w.logsumexp(0) - math.log(len(eps))
    torch.testing.assert_close(-loss, expected)


def test_flat_images_get_a_label_vector_and_others_label_planes():
    shapes = []

    class Spy(torch.nn.Module):
        def forward(self, x):
            shapes.append(tuple(x.shape))
            return x.flatten(1)

    x, y = torch.rand(2, 3, 4, 5), torch.tensor([1, 0])
    decoder = torch.nn.Linear(4, 60)
    vae = VAE((3, 4, 5), 2, encoder=Spy(), decoder=decoder, classes=2)
    planes = torch.zeros(2, 2, 4, 5)
    planes[0, 1] = planes[1, 0] = 1
    h = torch.cat([x, planes], 1).flatten(1)
    torch.testing.assert_close(vae.encode(x, y).mean, vae.posterior.mean(h))
    assert shapes[-1] == (2, 5, 4, 5)
    VAE((10,), 2, encoder=Spy(), classes=2).encode(torch.rand(3, 10), 1)
    assert shapes[-1] == (3, 12)


@pytest.mark.parametrize(
    "parts",
    [
        *({"architecture": name} for name in ("mlp", "residual", "conv", "mine")),
        {"posterior": "flow", "prior": "flow"},
        {"likelihood": "discretized_logistic"},
        {"likelihood": "pixelcnn"},
        {"prior": "mixture", "prior_components": 3},
    ],
    ids=str,
)
def test_every_part_sees_labels_unedited(parts, tmp_path):
    load_plugins(["tests.my_parts"])
    torch.manual_seed(0)
    vae = VAE((1, 8, 8), 2, classes=4, **parts)
    x, y = torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 3, 3])
    train(vae, [(x, y)], [(x, y)], epochs=1)
    eps = torch.randn(5, 2)
    out = vae(x, y=y, eps=eps)
    each = [vae.given(int(k))(x[i : i + 1], eps=eps[i : i + 1]) for i, k in enumerate(y)]
    torch.testing.assert_close(out.logits, torch.cat([one.logits for one in each]))
    torch.testing.assert_close(out.logits, vae.decode(out.z, y))
    assert not torch.allclose(vae.decode(out.z, 0), vae.decode(out.z, 1))
    assert not torch.allclose(vae.encode(x, 0).mean, vae.encode(x, 1).mean)
    torch.testing.assert_close(vae.reconstruct(x, y), vae.of(Batch(x, y)).reconstruct(x))
    again, config = load_run(save_run(vae, tmp_path / "kept"), plugins=["tests.my_parts"])
    assert (again.classes, config.model.conditional) == (4, True)
    torch.testing.assert_close(again(x, y=y, eps=eps).logits, out.logits)


@pytest.fixture(scope="module")
def trained():
    """A model of bars whose place is the label, after ten epochs."""
    torch.manual_seed(0)
    images, labels = made_up_digits(500, 0)
    x, y = torch.tensor(images).flatten(1) / 255, torch.tensor(labels).long()
    vae = VAE((784,), 2, 32, classes=10)
    adam = OptimizerConfig("adam", 1e-2, 1e-8, "constant")
    train(vae, list(zip(x.split(25), y.split(25), strict=True)), epochs=10, optimizer=adam)
    return vae


def places(images):
    """Which of the ten bars is the brightest: (n, 784) -> (n,)."""
    rows = images.reshape(-1, 28, 28)[:, 4:24]
    return torch.stack([rows[..., 2 + 2 * k : 5 + 2 * k].mean((1, 2)) for k in range(10)]).argmax(0)


def test_samples_are_of_the_class_that_is_asked_for(trained):
    y = torch.arange(10).repeat(5)
    for drawn in (
        trained.sample(50, y=y, generator=torch.Generator().manual_seed(0)),
        draw_samples(trained, 50, y=y)[0],
        draw_samples(trained, 50, y=y, temperature=0.5, pixels="draw")[0],
    ):
        assert torch.equal(places(drawn), y)
    assert (places(trained.sample(20, y=7)) == 7).all()


def test_a_grid_of_samples_has_a_row_for_each_class(trained):
    grid = sample_grid(trained, rows=4)
    rows = grid[2:, 2:].unfold(0, 28, 30).unfold(1, 28, 30)  # without the gaps
    assert torch.equal(places(rows.flatten(0, 1)), torch.arange(10).repeat_interleave(4))


def test_an_image_moves_within_its_class(trained, monkeypatch):
    drawn = []
    real = VAE.decode

    def decode(vae, z, y=None):
        drawn.append(vae.y)
        return real(vae, z, y)

    monkeypatch.setattr(VAE, "decode", decode)
    traversal_figure(trained, torch.rand(5, 784), torch.tensor([6, 1, 2, 3, 4]), steps=3)
    assert drawn == [torch.tensor([6])]


def test_the_page_decodes_as_the_class_that_is_chosen(trained):
    page = explorer_page(trained, torch.rand(9, 784), torch.tensor([3, 1, 3, 9, 9, 1, 3, 3, 3]))
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert data["given"] == [str(k) for k in range(10)]
    assert data["labels"] == [1, 3, 9]
    assert data["ops"][0]["inputs"] == 12
    strange = VAE((9,), 2, decoder=torch.nn.Linear(5, 9), classes=3)
    with pytest.raises(ExplorerError, match="the page cannot run the decoder Linear"):
        explorer_page(strange)


X = torch.zeros(2, PIXELS)


def small():
    return VAE((PIXELS,), 2, 8, classes=CLASSES)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: small().encode(X),
            "is conditional and needs labels: give y, a class from 0 to",
        ),
        (lambda: small()(X), "is conditional and needs labels"),
        (lambda: small().reconstruct(X), "is conditional and needs labels"),
        (lambda: small().sample(3), "is conditional and needs labels"),
        (lambda: train(small(), X, epochs=1), "is conditional and needs labels.*a loader gives"),
        (lambda: small().sample(3, y=3), "y has values from 3 to 3; labels are whole numbers"),
        (lambda: small().encode(X, torch.tensor([0, -1])), "y has values from -1 to 0"),
        (lambda: small().encode(X, torch.tensor([0.0, 1.0])), "y is torch.float32; labels are"),
        (lambda: small().encode(X, torch.zeros(3, dtype=int)), r"3 labels for \(2,\) images"),
        (lambda: small().sample(3, y=torch.zeros(2, dtype=int)), r"2 labels for \(3,\) images"),
        (lambda: small().given(torch.zeros(2, 2, dtype=int)), r"y has shape \(2, 2\)"),
        (lambda: train(small(), [(X, torch.tensor([0, 5]))], epochs=1), "from 0 to 5; labels"),
        (lambda: VAE((PIXELS,))(X, y=1), "y is given, but the model has no labels"),
        (lambda: VAE((PIXELS,), classes=0), "classes is 0; it must be a whole number"),
        (lambda: VAE((PIXELS,), classes=3, prior="vamp"), "prior=vamp.*prior=mixture"),
        (
            lambda: VAE((PIXELS,), classes=3, encoder=torch.nn.Linear(PIXELS, 4)),
            r"encoder does not take \(15,\)",
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_an_unconditional_model_ignores_the_labels_of_a_batch():
    torch.manual_seed(0)
    vae = VAE((PIXELS,), 2, 8)
    batch = Batch(torch.rand(2, PIXELS), torch.tensor([7, -1]))
    assert vae.of(batch) is vae
    eps = torch.randn(1, 2, 2)
    assert torch.equal(bound(vae, batch, eps).kl, bound(vae, Batch(batch.x), eps).kl)


def test_a_model_given_a_class_does_not_change_train_or_eval_mode(vae):
    vae.train()
    seven = vae.given(1)
    vae.eval()
    seven.sample(2)
    assert not any(part.training for part in vae.modules())


SMALL = ("data=fashion_mnist", "model.intermediate_dim=16", "model.conditional=true", "threads=1",
         "data.batch_size=50", "data.limit_train=200", "data.limit_test=40")  # fmt: skip


@pytest.fixture(scope="module")
def finished(made_up_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional") / "run"
    config = compose([*SMALL, f"data.root={made_up_root}", "train.epochs=2"])
    run(config, folder)
    return folder


def test_a_run_knows_its_classes(finished):
    vae, config = load_run(finished)
    assert (vae.classes, config.model.conditional) == (10, True)
    drawn = {path.stem for path in (finished / "figures").glob("*.png")}
    assert drawn >= {"reconstructions", "samples", "manifold", "traversal", "interpolation", "kl"}
    assert load_checkpoint(finished / "checkpoints" / "last.pt")["classes"] == 10


@pytest.mark.slow
def test_every_command_takes_a_conditional_run(finished, tmp_path):
    few = ("eval.num_samples=20", "eval.fit_samples=20", "eval.fit_images=3", "eval.limit=5")
    for script, *arguments in (
        ("evaluate.py", *few, "eval.exact=false"),
        ("explore.py", "points=40"),
        ("encode.py", f"out={tmp_path / 'latents.csv'}", "num_samples=5"),
        ("sample.py", "y=7", "n=4", f"out={tmp_path / 'seven.png'}"),
        ("export.py", f"out={tmp_path / 'release'}"),
    ):
        done = run_script(script, f"run={finished}", *arguments)
        assert done.returncode == 0, done.stderr
    assert load_run(tmp_path / "release")[0].sample(3, y=7).shape == (3, 784)
    more = (f"out={tmp_path / 'portable'}", "formats=[torchscript]")
    done = run_script("export.py", f"run={finished}", *more)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "these files take no labels" in done.stderr
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    Image.new("L", (28, 28)).save(nameless / "a.png")
    done = run_script(
        "encode.py", f"run={finished}", f"images={nameless}", f"out={tmp_path / 'x.csv'}"
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "have no labels" in done.stderr


def test_a_folder_with_some_of_the_classes_keeps_their_numbers(finished, tmp_path):
    for name in ("7", "3"):
        (tmp_path / "some" / name).mkdir(parents=True)
        Image.new("L", (28, 28), 25 * int(name)).save(tmp_path / "some" / name / "a.png")
    out = tmp_path / "latents.npz"
    asked = ("encode.py", f"run={finished}", f"images={tmp_path / 'some'}", f"out={out}")
    done = run_script(*asked, "num_samples=5")
    assert done.returncode == 0, done.stderr
    with np.load(out) as found:
        assert found["labels"].tolist() == [3, 7]
        mean = found["mean"]
    x = torch.tensor([[75 / 255] * 784, [175 / 255] * 784])
    expected = load_run(finished)[0].encode(x, torch.tensor([3, 7])).mean.detach()
    np.testing.assert_allclose(mean, expected, atol=1e-5)
    (tmp_path / "some" / "7").rename(tmp_path / "some" / "shoe")
    done = run_script(*asked)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "class shoe is not in the run, whose classes are 0, 1, 2" in done.stderr


def test_a_picture_of_samples_is_asked_for_by_class(finished, tmp_path):
    drawn = run_script("sample.py", f"run={finished}", "y=7", "n=4", f"out={tmp_path / 'x.npz'}")
    assert drawn.returncode == 0, drawn.stderr
    with np.load(tmp_path / "x.npz") as arrays:
        images, z = torch.tensor(arrays["x"]), torch.tensor(arrays["z"])
    vae = load_run(finished)[0]
    torch.testing.assert_close(images, vae.likelihood.mean(vae.decode(z, 7)).detach())
    for arguments, words in (
        ([], "y=null: must be a class from 0 to 9 with the model of this run"),
        (["y=10"], "y=10: must be a class from 0 to 9"),
    ):
        done = run_script("sample.py", f"run={finished}", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert words in done.stderr


def test_images_without_labels_are_refused_before_training(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((40, 8, 8), dtype=np.float32))
    config = compose(["data=array", f"data.root={tmp_path / 'x.npy'}", "model.conditional=true"])
    with pytest.raises(DataError, match=r"model\.conditional=true: the images have no labels"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    vamp = compose([*SMALL, "prior=vamp"])
    with pytest.raises(ConfigError, match=r"model\.conditional=true does not go with a prior"):
        VAE.from_config(vamp, (784,), 10)


@pytest.mark.parametrize("step", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 6))])
@pytest.mark.parametrize(
    "parts", [("model.conditional=true",), ("posterior=flow", "prior=flow")], ids=str
)
def test_a_run_that_was_stopped_resumes_with_the_same_bits(tmp_path, parts, step):
    config = compose([*parts, "model.intermediate_dim=8"])
    x, y = torch.rand(40, 36, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3

    def made(folder, stop=None):
        torch.manual_seed(0)
        vae = VAE.from_config(config, (36,), 3)
        kept = Checkpoints(tmp_path / folder, config, input_shape=(36,), classes=vae.classes)
        loaders = array_loaders(x, x[:9], y_train=y, y_test=y[:9], batch_size=10)
        history = train(vae, *loaders, epochs=3, checkpoints=kept, stop=stop)
        return history["test/loss"], vae.state_dict()

    asked = iter(range(1, 1000))
    with pytest.raises(StoppedError):
        made("cut", stop=lambda: next(asked) == step)
    (losses, weights), (expected, others) = made("cut"), made("whole")
    assert losses == expected
    assert all(torch.equal(weights[name], others[name]) for name in others)
