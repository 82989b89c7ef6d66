"""The explorer page: its contents, and its behaviour in a real browser."""

import base64
import io
import json
import re
import shutil
import subprocess
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.command_lines import run_script
from tests.conftest import made_up_digits
from tests.rough import UNDRAWN
from tests.test_figures import BoxOf
from vae_torch import VAE
from vae_torch import explorer as module
from vae_torch.explorer import MAX_BYTES, ExplorerError, explorer_page, run_notes
from vae_torch.parts.likelihoods import Bernoulli, likelihoods
from vae_torch.parts.networks import ConvBlock, Output


@pytest.fixture(scope="module")
def images():
    pixels, labels = made_up_digits(120, 3)
    return torch.tensor(pixels).flatten(1) / 255, torch.tensor(labels).long()


def model(architecture="mlp", latent_dim=2, **options):
    """A model of 16 units whose weights are large enough for pictures to differ."""
    torch.manual_seed(0)
    width = 512 if architecture == "resnet" else 16
    if architecture == "resnet":
        options = {"model_options": {"channels": 4}, **options}
    vae = VAE((784,), latent_dim, width, architecture=architecture, **options)
    with torch.no_grad():
        for name, weight in vae.named_parameters():
            if weight.ndim > 1:
                weight.mul_(2.5)
            elif "bias" in name:
                weight.normal_(0, 0.3)
    return trained_blocks(vae)


def trained_blocks(vae):
    """Residual blocks that add something, as they do after training."""
    for block in vae.modules():
        if isinstance(block, ConvBlock):
            nn.init.normal_(block.scale)
    return vae


def data_of(page):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found[1])


# What the page contains.


def test_the_page_asks_for_nothing_from_outside_and_is_small(images):
    page = explorer_page(model(), *images)
    assert re.search(r"https?://", page) is None
    assert re.search(r"<(script|img|link)[^>]+(src|href)=.(?!data:)", page) is None
    assert len(page) < 300_000
    assert MAX_BYTES <= 8_000_000


def test_a_large_decoder_gets_the_room_that_it_needs():
    torch.manual_seed(0)
    page = explorer_page(VAE((3, 64, 64), 8, 200, architecture="conv", likelihood="gaussian"))
    weights = len(data_of(page)["weights"])
    assert MAX_BYTES < weights < len(page) < weights + MAX_BYTES // 2
    monstrous = VAE((3, 64, 64), 8, 900, architecture="conv")
    with pytest.raises(ExplorerError, match=r"weights, .* larger than 32 MB; .*intermediate_dim"):
        explorer_page(monstrous)


def test_text_of_a_run_cannot_leave_its_place(images):
    evil = "</script><script>alert(1)</script>{{DATA}}"
    page = explorer_page(model(), *images, title=evil, facts=evil, notes=[evil])
    assert "alert(1)</script>" not in page.replace("&lt;", "")
    assert page.count("<script") == 2
    data = data_of(page)
    assert (data["title"], data["facts"], data["notes"]) == (evil, evil, [evil])


def test_terms_of_an_image_make_its_elbo(images):
    vae = model(prior="mixture", prior_components=3)
    terms = data_of(explorer_page(vae, *images))["terms"]
    parts = zip(terms["elbo"], terms["reconstruction"], terms["kl"], strict=True)
    for elbo, reconstruction, kl in parts:
        assert elbo == pytest.approx(reconstruction - kl, abs=0.02)


def test_a_page_that_would_be_too_large_has_fewer_points(images, monkeypatch):
    x, labels = images[0].repeat(4, 1), images[1].repeat(4)
    whole = len(explorer_page(model(), x, labels))
    monkeypatch.setattr(module, "MAX_BYTES", whole - 1)
    page = explorer_page(model(), x, labels)
    assert len(page) < whole
    data = data_of(page)
    assert (data["points"], data["available"]) == (240, 480)
    monkeypatch.setattr(module, "MAX_BYTES", len(explorer_page(model())) + 10)
    with pytest.raises(ExplorerError, match="smaller model"):
        explorer_page(model(), x, labels)


def test_a_model_that_diverged_is_refused(images):
    vae = model()
    with torch.no_grad():
        vae.posterior.mean.weight[0, 0] = torch.nan
    with pytest.raises(ExplorerError, match="not finite"):
        explorer_page(vae, *images)


def test_notes_say_what_a_run_lacks(config, tmp_path):
    config.train.epochs = 30
    config.data.limit_train = 3000
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    notes, epochs = run_notes(tmp_path, config)
    assert epochs == 1
    assert "has not finished: it completed 1 of 30 epochs" in notes[0]
    assert "was trained for 1 epoch." in notes[1]
    assert "3,000 images" in notes[2]
    (tmp_path / "summary.json").write_text("{}")
    config.data.limit_train = None
    assert run_notes(tmp_path, config) == ([], 30)


def test_notes_of_a_run_that_stopped_in_its_first_epoch(config, tmp_path):
    config.train.epochs = 30
    notes, epochs = run_notes(tmp_path, config)
    assert epochs is None
    assert notes == [
        "This run has not finished: how many of its 30 epochs it completed is not known. You see "
        "the model of its last checkpoint."
    ]
    (tmp_path / "metrics.jsonl").write_text("")
    notes, epochs = run_notes(tmp_path, config)
    assert epochs == 0
    assert "it completed none of 30 epochs" in notes[0]
    assert "was trained for less than one epoch" in notes[1]


def test_one_image_is_not_called_a_collapse(images):
    x, labels = images
    assert data_of(explorer_page(model(), x[:1], labels[:1]))["collapsed"] is False


class Halves(nn.Module):
    """A decoder of layers that the page does not know."""

    def forward(self, z):
        return z[..., :1].expand(*z.shape[:-1], 784)


class Doubled(Output):
    """A subclass of a known decoder that computes something else."""

    def forward(self, z):
        return 2 * super().forward(z)


class Unskipped(nn.Module):
    """Has the layers of a residual block, but does not add its input."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU())

    def forward(self, x):
        return self.body(x)


class Inverted(Bernoulli):
    def mean(self, logits):
        return torch.sigmoid(-logits)


class Logistic(nn.Module):
    def mean(self, logits):
        return logits.clamp(0, 1)


def with_decoder(decoder, latent_dim=3):
    vae = model(latent_dim=latent_dim)
    vae.decoder = decoder
    return vae


def with_likelihood(likelihood, latent_dim=3):
    vae = model(latent_dim=latent_dim)
    vae.likelihood = likelihood
    return vae


def with_layer(*layers, latent_dim=3):
    vae = model(latent_dim=latent_dim)
    vae.decoder.trunk = nn.Sequential(nn.Linear(latent_dim, 16), *layers)
    return vae


@pytest.mark.parametrize(
    ("vae", "words"),
    [
        (with_decoder(Halves()), ["decoder Halves", "no trunk and out", "Linear"]),
        (
            with_decoder(Doubled(nn.Identity(), nn.Linear(3, 784))),
            ["Doubled", "would not draw what the model does"],
        ),
        (with_layer(nn.BatchNorm1d(16).eval()), ["BatchNorm1d", "it runs Linear"]),
        (with_layer(nn.Dropout(0.1)), ["Dropout"]),
        (with_layer(nn.GELU(approximate="tanh")), ["GELU with approximate=tanh"]),
        (with_layer(Unskipped()), ["would not draw what the model does"]),
        (with_layer(nn.Unflatten(1, (4, 4)), nn.LayerNorm(4), nn.Flatten()), ["LayerNorm over"]),
        (
            with_layer(
                nn.Unflatten(1, (4, 2, 2)), nn.ConvTranspose2d(4, 4, 1, groups=2), nn.Flatten()
            ),
            ["ConvTranspose2d with groups"],
        ),
        (
            with_layer(
                nn.Unflatten(1, (4, 2, 2)), nn.ConvTranspose2d(4, 4, (1, 3), padding=(0, 1)),
                nn.Identity(), nn.Flatten(),
            ),
            ["ConvTranspose2d that is not square"],
        ),
        (
            with_layer(nn.Unflatten(1, (4, 2, 2)), nn.Conv2d(4, 4, 1, groups=2), nn.Flatten()),
            ["Conv2d with a stride, groups"],
        ),
        (with_likelihood(Logistic()), ["likelihood Logistic:", "sigmoid, continuous"]),
        (with_likelihood(Inverted()), ["Inverted", "would not draw what the model does"]),
        (VAE((600,), 2, 4), ["images of shape (600,)"]),
        (VAE((2, 8, 8), 2, 4), ["images of shape (2, 8, 8)", "(3, height, width)"]),
    ],
)  # fmt: skip
def test_what_the_page_cannot_draw_is_refused_in_one_line(vae, words):
    with pytest.raises(ExplorerError) as refused:
        explorer_page(vae)
    message = str(refused.value)
    assert message.startswith("the page ")
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "vae",
    [
        with_decoder(nn.Sequential(nn.Linear(3, 16, bias=False), nn.Sigmoid(), nn.Linear(16, 784))),
        with_layer(nn.LayerNorm(16, elementwise_affine=False), nn.Tanh(), nn.Identity()),
        VAE((20, 30), 2, 4),
        VAE((1, 28, 28), 1, 4, architecture="conv"),
        VAE((3, 21, 14), 2, 4, architecture="conv"),  # which halves to odd sides
        VAE((3, 9, 10), 2, 4, architecture="residual", likelihood="gaussian"),
        trained_blocks(VAE((3, 21, 14), 2, architecture="resnet", model_options={"channels": 4})),
    ],
)
def test_layers_of_ones_own_that_the_page_knows_are_drawn(vae):
    page = data_of(explorer_page(vae))
    pixels = vae.decode(torch.zeros(1, vae.latent_dim)).numel()
    assert page["channels"] * page["height"] * page["width"] == pixels
    assert "grid" not in page


def test_images_that_are_not_square_keep_their_shape():
    vae, x = VAE((20, 30), 2, 4), torch.rand(7, 600)
    for given in (x, x.reshape(7, 20, 30), x.reshape(7, 1, 20, 30)):
        page = data_of(explorer_page(vae, given, torch.arange(7)))
        assert (page["height"], page["width"]) == (20, 30)
        with Image.open(io.BytesIO(base64.b64decode(page["sprite"]))) as sprite:
            second = torch.tensor(np.asarray(sprite))[:20, 30:60] / 255
        assert (second - x[1].reshape(20, 30)).abs().max() < 0.005


# the package's own likelihoods that the page can draw, none of another test
OWN_LIKELIHOODS = [name for name in likelihoods if hasattr(likelihoods[name], "drawn_as")]


@pytest.mark.parametrize(
    ("architecture", "scale"),
    [(name, 1.0) for name in ("mlp", "residual", "conv", "resnet")]
    # and far from the first weights: logits of thousands, in nine layers 1e15
    + [(name, 30.0) for name in ("mlp", "residual", "conv")],
)
def test_every_model_of_the_command_line_is_drawn(architecture, scale):
    for activation in ("relu", "tanh", "silu", "gelu"):
        for likelihood in OWN_LIKELIHOODS:
            vae = model(architecture, activation=activation, likelihood=likelihood)
            with torch.no_grad():
                for weight in vae.decoder.parameters():
                    weight.mul_(scale)
            assert data_of(explorer_page(vae))["ops"]


def test_colour_images_keep_their_colours_and_shape():
    vae, x = VAE((3, 20, 30), 2, 4, likelihood="gaussian"), torch.rand(60, 3, 20, 30)
    page = data_of(explorer_page(vae, x.flatten(1)))
    assert (page["channels"], page["height"], page["width"]) == (3, 20, 30)
    with Image.open(io.BytesIO(base64.b64decode(page["sprite"]))) as sprite:
        assert sprite.mode == "RGB"
        assert sprite.size == (50 * 30, 2 * 20)
        pixels = torch.tensor(np.asarray(sprite)).movedim(-1, 0) / 255
    assert (pixels[:, 20:40, 60:90] - x[52]).abs().max() < 0.005


def test_images_without_labels_have_no_classes():
    page = data_of(explorer_page(model(), torch.rand(60, 784)))
    assert page["points"] == 60
    assert page["classes"] is None


def test_classes_have_the_names_of_the_data(images):
    names = [f"kind {i}" for i in range(10)]
    page = data_of(explorer_page(model(), *images, class_names=names, available=900))
    assert page["class_names"] == [names[k] for k in images[1].unique()]
    assert page["available"] == 900


class Waves(nn.Module):
    """A decoder of sines, which the page does not know: smooth pictures."""

    def __init__(self, latent_dim, pixels, pace=0.5):
        super().__init__()
        self.pace = nn.Parameter(pace * torch.randn(latent_dim, pixels))

    def forward(self, z):
        return 2 * torch.sin(z @ self.pace)


def grid_image(page, z):
    """The page's interpolation, by scipy."""
    from scipy.interpolate import RegularGridInterpolator

    grid = page["grid"]
    dims, side = len(grid["low"]), grid["side"]
    nodes = np.frombuffer(base64.b64decode(grid["pixels"]), np.uint8)
    nodes = nodes.reshape(*[side] * dims, -1) / 255
    axes = [np.linspace(*ends, side) for ends in zip(grid["low"], grid["high"], strict=True)]
    return RegularGridInterpolator(axes[::-1], nodes)(z[::-1])[0]


@pytest.mark.parametrize(("latent_dim", "shape"), [(1, (28, 28)), (2, (28, 28)), (2, (3, 8, 12))])
def test_a_decoder_that_the_page_cannot_run_is_a_grid_of_its_images(latent_dim, shape):
    torch.manual_seed(0)
    pixels = int(np.prod(shape))
    vae = VAE(shape, latent_dim, 16, decoder=Waves(latent_dim, pixels))
    x = torch.rand(50, *shape)
    page = data_of(explorer_page(vae, x))
    assert "ops" not in page
    with torch.no_grad():
        means = vae.encode(x).mean
    assert (torch.tensor(page["grid"]["low"]) < means.amin(0)).all()
    assert (torch.tensor(page["grid"]["high"]) > means.amax(0)).all()
    places = [means[3], means[4].lerp(means[5], 0.4), means.mean(0) + 1.9, means.mean(0) - 2.1]
    for z in (place.tolist() for place in places):
        right = expected(vae, z).flatten()
        assert np.abs(grid_image(page, z) - right.numpy()).mean() < 0.02


def test_a_grid_that_would_show_other_images_than_the_model_is_refused():
    torch.manual_seed(0)
    vae = VAE((28, 28), 2, 16, decoder=Waves(2, 784, pace=40.0))
    with pytest.raises(ExplorerError, match=r"cannot run the decoder Waves.*off by 0\.\d+ a pixel"):
        explorer_page(vae)
    large = VAE((3, 128, 128), 2, 16, decoder=Waves(2, 3 * 128 * 128))
    with pytest.raises(ExplorerError, match=r"Waves.*does not fit"):
        explorer_page(large)


def test_the_page_needs_no_more_of_a_posterior_than_its_mean(images):
    vae = VAE(latent_dim=2, intermediate_dim=16, posterior=BoxOf(2))
    page = data_of(explorer_page(vae, *images))
    assert page["logvars"] is None
    for name in ("elbo", "reconstruction", "kl"):
        assert np.isfinite(page["terms"][name]).all()


def test_a_decoder_that_is_random_in_training_is_drawn_in_eval_mode():
    vae = with_layer(nn.Dropout(0.5), nn.ReLU(), latent_dim=2)
    page = data_of(explorer_page(vae))
    assert vae.training
    vae.eval()
    right = expected(vae, [0.5, -0.5])
    assert np.abs(grid_image(page, [0.5, -0.5]) - right.numpy()).mean() < 0.02


class Dark(Bernoulli):
    def mean(self, logits):
        return 0 * logits


def in_the_dark():
    likelihoods._parts["bernoulli"] = Dark


def test_explore_refuses_a_model_that_it_cannot_draw(made_up_root, tmp_path):
    run_dir = tmp_path / "run"
    settings = ["data=fashion_mnist", f"data.root={made_up_root}", "model.intermediate_dim=16"]
    settings += ["model.latent_dim=3", "data.limit_train=100", "data.limit_test=50"]
    quiet = ["train.epochs=1", "train.figure_every=0", f"hydra.run.dir={run_dir}"]
    done = run_script("train.py", *settings, *quiet, before=UNDRAWN)
    assert done.returncode == 0, done.stderr
    done = run_script("explore.py", f"run={run_dir}", before=["tests.test_explorer:in_the_dark"])
    assert done.returncode == 2
    assert done.stderr.startswith(f"explore.py: run={run_dir}: the page would not draw")
    assert done.stderr.count("\n") == 1
    assert not (run_dir / "explorer.html").exists()


def test_a_run_becomes_a_page(made_up_root, tmp_path):
    run_dir = tmp_path / "a=run, <b>"
    settings = ["data=fashion_mnist", f"data.root={made_up_root}", "model.intermediate_dim=16"]
    quiet = ["train.epochs=1", "train.figure_every=0", f"hydra.run.dir='{run_dir}'"]
    done = run_script("train.py", *settings, *quiet, before=UNDRAWN)
    assert done.returncode == 0, done.stderr

    browser = {"BROWSER": "echo opens %s"}
    line = ("explore.py", f"run={run_dir}", f"data_root={made_up_root}", "--open")
    done = run_script(*line, env=browser)
    assert done.returncode == 0, done.stderr
    path = run_dir / "explorer.html"
    assert sorted(done.stdout.splitlines()) == sorted([str(path), f"opens {path.as_uri()}"])
    data = data_of((run_dir / "explorer.html").read_text())
    assert data["title"].endswith("a=run, <b>")
    assert data["points"] == 200
    assert "coat" in data["class_names"]
    assert "trained for 1 epoch" in data["notes"][0]

    done = run_script("explore.py", f"run={run_dir}", f"data_root={made_up_root}")
    assert done.stdout.splitlines() == [str(path), f"open it in a browser: {path.as_uri()}"]

    nowhere = tmp_path / "file" / "data"  # impossible folder: nothing is downloaded either
    nowhere.parent.write_text("")
    done = run_script("explore.py", f"run={run_dir}", f"data_root={nowhere}")
    assert done.returncode == 0, done.stderr
    data = data_of((run_dir / "explorer.html").read_text())
    assert data["points"] == 0
    assert "were not available when the page was made" in data["notes"][-1]


# What the page does.


PATIENCE = 300  # seconds until a page counts as stuck, however busy the machine


@pytest.fixture(scope="session")
def browser():
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "disable-quic", "window-size=1280,800",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = selenium.ChromeService(driver, log_output=subprocess.DEVNULL)
    session = selenium.Chrome(options=options, service=service)
    session.set_script_timeout(PATIENCE)
    session.set_page_load_timeout(PATIENCE)
    yield session
    session.quit()


@pytest.fixture
def opened(browser, tmp_path):
    """Open a page, and check at the end that the browser reported no error."""

    def open_page(page):
        path = tmp_path / "page.html"
        path.write_text(page)
        browser.get(path.as_uri())
        browser.execute_async_script("explorer.ready.then(arguments[0])")
        return browser

    yield open_page
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource')") == []


def js(browser, code, *arguments):
    return browser.execute_script(f"return {code}", *arguments)


def grey(browser, canvas):
    """The pixels of a canvas, flat and in [0, 1]."""
    url = js(browser, f"{canvas}.toDataURL()")
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return torch.tensor(np.asarray(image.convert("L"))).flatten() / 255


def wait_until(browser, code):
    deadline = time.monotonic() + PATIENCE
    while not js(browser, code):
        assert time.monotonic() < deadline, f"never: {code}"
        time.sleep(0.02)


def by_id(browser, name):
    return browser.find_element("id", name)


@contextmanager
def mouse(browser):
    from selenium.webdriver import ActionChains

    chain = ActionChains(browser, duration=0)
    yield chain
    chain.perform()
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def offset(browser, left, top):
    """From the plane's top left to its middle, from where the driver counts."""
    width, height = js(browser, "[plane.clientWidth, plane.clientHeight]")
    return round(left - width / 2), round(top - height / 2)


def click_image(browser, i, *, shift=False):
    from selenium.webdriver import Keys

    with mouse(browser) as chain:
        if shift:
            chain.key_down(Keys.SHIFT)
        at = offset(browser, *js(browser, "explorer.screen(arguments[0])", i))
        chain.move_to_element_with_offset(by_id(browser, "plane"), *at).click()
        if shift:
            chain.key_up(Keys.SHIFT)


def hold_clock(browser):
    """Frames come at their own pace but are told the time `clock`, so the test controls a path."""
    js(browser, "(window.clock = 0, window.real = requestAnimationFrame)")
    js(browser, "(window.requestAnimationFrame = (f) => real(() => f(clock)))")


@torch.no_grad()
def expected(vae, z):
    return vae.likelihood.mean(vae.decode(torch.tensor([z])))[0]


ACTIVATIONS = {"mlp": "gelu", "residual": "tanh", "conv": "silu", "resnet": "silu"}
LIKELIHOODS = {"residual": "continuous_bernoulli", "conv": "gaussian"}


@pytest.mark.browser
@pytest.mark.parametrize("architecture", ["mlp", "residual", "conv", "resnet"])
def test_the_digit_under_the_pointer_is_torchs(opened, images, architecture):
    options = {
        "activation": ACTIVATIONS[architecture],
        "likelihood": LIKELIHOODS.get(architecture, "bernoulli"),
    }
    vae = model(architecture, latent_dim=3, **options)
    browser = opened(explorer_page(vae, *images))
    seen = []
    for place in ((-120, 80), (60, -90)):
        with mouse(browser) as chain:
            chain.move_to_element_with_offset(by_id(browser, "plane"), *place)
        z, image = js(browser, "[explorer.z, explorer.image]")
        seen.append(torch.tensor(image))
        assert (seen[-1] - expected(vae, z)).abs().mean() < 0.002  # the promise is 0.02
        assert (grey(browser, "decoded") - seen[-1]).abs().max() < 0.01
    assert (seen[0] - seen[1]).abs().mean() > 0.02  # the pointer moves it


class Logistics(nn.Module):
    """Pixels of a mixture of logistics: weights, centres, scales; only its mean matters here."""

    drawn_as = "logistic"

    def __init__(self, mixtures):
        super().__init__()
        self.mixtures, self.outputs = mixtures, 3 * mixtures if mixtures > 1 else 2

    def mean(self, params):
        parts = params.movedim(self.place, 0)
        if self.mixtures == 1:
            return (parts[0] + 0.5).clamp(0, 1)
        weights, centres, _ = parts.chunk(3)
        shares = weights.exp() / weights.exp().sum(0)
        return (shares * (centres + 0.5).clamp(0, 1)).sum(0)


@pytest.mark.browser
@pytest.mark.parametrize("mixtures", [1, 3])
def test_mixtures_of_logistics_are_drawn_by_their_mean(opened, mixtures):
    torch.manual_seed(0)
    likelihood = Logistics(mixtures)
    vae = VAE((3, 8, 12), 3, 16, likelihood=likelihood)
    shape = vae.decode(torch.zeros(1, 3)).shape
    likelihood.place = list(shape).index(likelihood.outputs)
    with torch.no_grad():
        for weight in vae.decoder.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    browser = opened(explorer_page(vae))
    z = [0.4, -1.0, 0.7]
    image = torch.tensor(js(browser, "explorer.decode(arguments[0])", z))
    assert (image - expected(vae, z).flatten()).abs().mean() < 0.002


@pytest.mark.browser
@pytest.mark.parametrize("architecture", ["mlp", "conv"])
def test_a_conditional_model_decodes_as_the_class_that_is_chosen(opened, images, architecture):
    from selenium.webdriver import Keys
    from selenium.webdriver.support.select import Select

    x, labels = images
    vae = model(architecture, classes=10)
    browser = opened(explorer_page(vae, x, labels))
    seen = []
    for label in (0, 7):
        Select(by_id(browser, "given")).select_by_visible_text(str(label))
        assert js(browser, "explorer.given") == str(label)
        seen.append(torch.tensor(js(browser, "explorer.decode([0.5, -1])")))
        assert (seen[-1] - expected(vae.given(label), [0.5, -1])).abs().mean() < 0.002
    assert (seen[0] - seen[1]).abs().mean() > 0.02
    by_id(browser, "plane").send_keys(Keys.ENTER)  # the image nearest to the cursor
    nearest = js(browser, "explorer.selected")
    assert js(browser, "explorer.given") == str(labels[nearest].item())


@pytest.mark.browser
def test_arrow_keys_move_and_enter_shows_an_image(opened, images):
    from selenium.webdriver import Keys

    browser = opened(explorer_page(model(), *images))
    plane = by_id(browser, "plane")
    before = js(browser, "explorer.z")
    js(browser, "plane.focus()")
    with mouse(browser) as chain:
        chain.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_UP)
    after = js(browser, "explorer.z")
    steps = [8 / s for s in js(browser, "explorer.scale")]
    assert after[0] - before[0] == pytest.approx(2 * steps[0])
    assert after[1] - before[1] == pytest.approx(steps[1])
    wait_until(browser, "live.textContent.startsWith('Decoded image at')")
    plane.send_keys(Keys.ENTER)
    assert by_id(browser, "image").is_displayed()
    wait_until(browser, "live.textContent.includes('elbo')")
    plane.send_keys(Keys.ESCAPE)
    assert not by_id(browser, "image").is_displayed()


@pytest.mark.browser
def test_a_click_shows_image_reconstruction_nats_and_posterior(opened, images):
    vae, (x, labels) = model(), images
    browser = opened(explorer_page(vae, x, labels))
    click_image(browser, 7)
    i = js(browser, "explorer.selected")  # another image may lie on top of it
    apart = js(browser, "explorer.screen(7).map((v, d) => v - explorer.screen(arguments[0])[d])", i)
    assert max(abs(v) for v in apart) < 2
    with torch.no_grad():
        mean, logvar = vae.encode(x[i : i + 1])
    assert f"Test image {i}: a {labels[i]}" in by_id(browser, "image-title").text
    assert (grey(browser, "original") - x[i]).abs().max() < 0.005
    decoded = expected(vae, mean[0].tolist())
    assert (grey(browser, "reconstruction") - decoded).abs().mean() < 0.005
    elbo = data_of(explorer_page(vae, x, labels))["terms"]["elbo"][i]
    assert f"{-elbo:.2f}" in by_id(browser, "terms").text
    # two standard deviations to each side, in pixels of the plane
    ring, (scale, _) = js(browser, "[explorer.ellipse, explorer.scale]")
    radii = sorted((2 * torch.exp(0.5 * logvar[0]) * scale).tolist(), reverse=True)
    assert [ring["first"], ring["second"]] == pytest.approx(radii, rel=0.01)


@pytest.mark.browser
def test_buttons_filter_by_class(opened, images):
    browser, labels = opened(explorer_page(model(), *images)), images[1]
    buttons = browser.find_elements("css selector", "#classes button")
    assert len(buttons) == len(labels.unique())
    assert [int(b.text.split()[-1]) for b in buttons] == labels.bincount().tolist()
    before = grey(browser, "points")
    buttons[3].click()
    assert buttons[3].get_attribute("aria-pressed") == "false"
    assert js(browser, "explorer.shown") == (labels != 3).sum()
    assert not torch.equal(grey(browser, "points"), before)
    buttons[3].send_keys(" ")  # by keyboard too
    assert js(browser, "explorer.shown") == len(labels)
    assert torch.equal(grey(browser, "points"), before)
    by_id(browser, "none").click()
    assert js(browser, "explorer.shown") == 0
    by_id(browser, "all").click()
    assert js(browser, "explorer.shown") == len(labels)


@pytest.mark.browser
def test_axes_and_sliders_reach_every_active_dimension(opened, images):
    vae = model(latent_dim=5)
    with torch.no_grad():
        vae.posterior.mean.weight[4] = 0  # an inactive one
    browser = opened(explorer_page(vae, *images))
    sliders = "Array.from(document.querySelectorAll('#sliders input'), (s) => s.dataset.axis)"
    assert js(browser, "explorer.axes") == ["PC₁", "PC₂"]
    js(browser, "(basis.value = 'dimensions', basis.dispatchEvent(new Event('change')))")
    js(browser, "(across.value = 0, across.dispatchEvent(new Event('change')))")
    js(browser, "(up.value = 2, up.dispatchEvent(new Event('change')))")
    assert js(browser, "explorer.axes") == ["z₁", "z₃"]
    assert js(browser, sliders) == ["1", "3"]
    with mouse(browser) as chain:
        chain.move_to_element_with_offset(by_id(browser, "plane"), 50, 50)
    before = js(browser, "explorer.z")
    with mouse(browser):
        move = "(() => { const s = document.querySelector('#sliders input'); s.value = s.max;"
        js(browser, f"{move} s.dispatchEvent(new Event('input')); return Number(s.max); }})()")
    z, image = js(browser, "[explorer.z, explorer.image]")
    assert z[1] > before[1] + 0.1
    assert z[:1] + z[2:] == pytest.approx(before[:1] + before[2:])
    assert (torch.tensor(image) - expected(vae, z)).abs().mean() < 0.002

    by_id(browser, "follow").click()  # the others as in the image that is nearest on the plane
    with mouse(browser) as chain:
        at = offset(browser, *js(browser, "explorer.screen(8)"))
        chain.move_to_element_with_offset(by_id(browser, "plane"), *at)
    z = js(browser, "explorer.z")
    with torch.no_grad():
        means = vae.encode(images[0])[0]
    assert (means - torch.tensor(z)).abs().amax(1).min() < 0.05


@pytest.mark.browser
def test_principal_components_are_those_of_the_means(opened, images):
    vae = model(latent_dim=5)
    browser = opened(explorer_page(vae, *images))
    with torch.no_grad():
        means = vae.encode(images[0])[0]
    with mouse(browser) as chain:
        chain.move_to_element_with_offset(by_id(browser, "plane"), -100, 0)
    first = torch.tensor(js(browser, "explorer.z"))
    with mouse(browser) as chain:
        chain.move_to_element_with_offset(by_id(browser, "plane"), 100, 0)
    along = torch.tensor(js(browser, "explorer.z")) - first
    _, _, directions = torch.pca_lowrank(means, 5)
    assert torch.cosine_similarity(along, directions[:, 0], dim=0).abs() > 0.999


@pytest.mark.browser
def test_two_clicks_with_shift_play_a_path(opened, images):
    vae = model()
    browser = opened(explorer_page(vae, *images))
    hold_clock(browser)
    click_image(browser, 2, shift=True)
    click_image(browser, 9, shift=True)
    start, end = (torch.tensor(z) for z in js(browser, "explorer.path"))
    assert js(browser, "explorer.playing")
    assert len(browser.find_elements("css selector", "#strip canvas")) == 9
    js(browser, "(clock = 600)")  # of three seconds
    wait_until(browser, "explorer.place > 0")
    assert js(browser, "explorer.playing")
    by_id(browser, "play").click()  # it says Pause now
    assert not js(browser, "explorer.playing")
    place, z, image = js(browser, "[explorer.place, explorer.z, explorer.image]")
    assert place == pytest.approx(0.2)
    assert torch.tensor(z) == pytest.approx(torch.lerp(start, end, place), abs=1e-5)
    assert (torch.tensor(image) - expected(vae, z)).abs().mean() < 0.002
    js(browser, "(place.value = 0.98, place.dispatchEvent(new Event('input')))")
    by_id(browser, "play").click()
    js(browser, "new Promise((done) => real(() => real(done)))")  # the first frame shows the start
    js(browser, "(clock += 100)")
    wait_until(browser, "!explorer.playing && explorer.place === 1")


@pytest.mark.browser
def test_a_finger_decodes_and_draws_a_path(opened, images):
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    vae = model()
    browser = opened(explorer_page(vae, *images))
    plane = by_id(browser, "plane")

    def touch(*places):
        chain = ActionBuilder(browser, mouse=PointerInput("touch", "finger"), duration=0)
        finger = chain.pointer_action
        finger.move_to(plane, *places[0]).pointer_down()
        for place in places[1:]:
            finger.move_to(plane, *place)
        finger.pointer_up()
        chain.perform()

    def decoded_after(*places):
        touch(*places)
        two = "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
        browser.execute_async_script(two)
        return js(browser, "explorer.z")

    # a drag ends at its last place and selects no image
    first = decoded_after((-60, 0), (40, 0), (80, 50))
    second = decoded_after((60, 0), (-60, 0))
    assert first[0] - second[0] == pytest.approx(140 / js(browser, "explorer.scale[0]"), rel=0.02)
    assert js(browser, "explorer.selected") is None
    hold_clock(browser)
    by_id(browser, "draw-path").click()
    assert by_id(browser, "draw-path").get_attribute("aria-pressed") == "true"
    touch((-60, 0))
    touch((80, 50))
    assert len(js(browser, "explorer.path")) == 2
    assert js(browser, "explorer.playing")
    assert by_id(browser, "draw-path").get_attribute("aria-pressed") == "false"


@pytest.mark.browser
@pytest.mark.parametrize(
    ("touch", "said", "unsaid"), [(False, "click", "tap"), (True, "tap", "click")]
)
def test_the_words_fit_the_pointer(browser, opened, images, touch, said, unsaid):
    emulate = "Emulation.setTouchEmulationEnabled"
    browser.execute_cdp_cmd(emulate, {"enabled": touch, "maxTouchPoints": 5})
    try:
        opened(explorer_page(model(), *images))
        assert js(browser, "matchMedia('(pointer: coarse)').matches") == touch
        words = by_id(browser, "help").text + by_id(browser, "image-empty").text
        words = (words + by_id(browser, "path-text").text).lower()
        assert words.count(said) >= 3
        assert unsaid not in words
    finally:
        browser.execute_cdp_cmd(emulate, {"enabled": False})


@pytest.mark.browser
def test_pages_that_lack_something_say_so(opened, images):
    collapsed = model()
    with torch.no_grad():
        collapsed.posterior.mean.weight.zero_()
    browser = opened(explorer_page(collapsed, *images))
    assert "has collapsed" in by_id(browser, "notes").text

    browser = opened(explorer_page(model(latent_dim=1), *images))
    assert "one latent" in by_id(browser, "help").text
    click_image(browser, 4)
    assert js(browser, "explorer.selected") is not None
    assert not by_id(browser, "axes-card").is_displayed()

    vae = model(latent_dim=3)
    browser = opened(explorer_page(vae, notes=["no images here"]))
    assert by_id(browser, "notes").text == "no images here"
    assert not by_id(browser, "classes-card").is_displayed()
    with mouse(browser) as chain:
        chain.move_to_element_with_offset(by_id(browser, "plane"), 30, 40)
    z, image = js(browser, "[explorer.z, explorer.image]")
    assert (torch.tensor(image) - expected(vae, z)).abs().mean() < 0.002


def colours(browser, canvas):
    """The pixels of a canvas, (4, H, W) with its opacity."""
    url = js(browser, f"{canvas}.toDataURL()")
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return torch.tensor(np.asarray(image.convert("RGBA"))).movedim(-1, 0) / 255


@pytest.mark.browser
@pytest.mark.parametrize("side", ["wide", "tall"])
@pytest.mark.parametrize("kind", ["mlp", "conv", "grid"])
def test_colour_rectangles_without_labels_are_drawn_as_torch_decodes_them(opened, side, kind):
    torch.manual_seed(0)
    shape = (3, 14, 21) if side == "wide" else (3, 27, 13)  # sides that do not halve
    x = torch.rand(30, *shape)
    own = {"decoder": Waves(2, 3 * shape[1] * shape[2])} if kind == "grid" else {}
    vae = VAE(shape, 2, 16, architecture="conv" if kind == "conv" else "mlp", **own)
    with torch.no_grad():
        for weight in vae.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    browser = opened(explorer_page(vae, x))
    assert not by_id(browser, "classes-card").is_displayed()
    with mouse(browser) as chain:
        chain.move_to_element_with_offset(by_id(browser, "plane"), 30, -40)
    z, image = js(browser, "[explorer.z, explorer.image]")
    right = expected(vae, z).reshape(shape)
    within = 0.02 if kind == "grid" else 0.002
    assert (torch.tensor(image).reshape(shape) - right).abs().mean() < within
    shown = colours(browser, "decoded")
    assert (shown[:3] - right).abs().mean() < within + 0.005
    size = js(browser, "[decoded.clientWidth, decoded.clientHeight]")
    assert size[0] / size[1] == pytest.approx(shape[2] / shape[1], rel=0.02)
    assert max(size) <= 170
    click_image(browser, 7)
    i = js(browser, "explorer.selected")
    assert by_id(browser, "image-title").text == f"Test image {i}"
    assert (colours(browser, "original")[:3] - x[i]).abs().max() < 0.005
    reconstruction = vae.reconstruct(x[i : i + 1])[0]
    assert (colours(browser, "reconstruction")[:3] - reconstruction).abs().mean() < within + 0.005


@pytest.mark.browser
@pytest.mark.parametrize("latent_dim", [1, 2])
def test_nothing_is_shown_outside_a_grid(opened, latent_dim):
    torch.manual_seed(0)
    vae = VAE((8, 8), latent_dim, 16, decoder=Waves(latent_dim, 64))
    browser = opened(explorer_page(vae, torch.rand(30, 8, 8)))
    assert "interpolates between" in by_id(browser, "help").text
    low, high = data_of(browser.page_source)["grid"]["low"], js(browser, "explorer.z")
    assert js(browser, "explorer.decode(arguments[0])", [v - 0.1 for v in low]) is None
    z = [0.1] * latent_dim
    assert len(high) == latent_dim
    shown = torch.tensor(js(browser, "explorer.decode(arguments[0])", z))
    assert (shown - expected(vae, z).flatten()).abs().mean() < 0.02
    width = js(browser, "plane.clientWidth")
    with mouse(browser) as chain:  # far to the left
        chain.move_to_element_with_offset(by_id(browser, "plane"), 2 - width // 2, 0)
    if js(browser, "explorer.image") is None:
        assert "outside the grid" in by_id(browser, "readout").text
        assert colours(browser, "decoded")[3].max() == 0


@pytest.mark.browser
def test_a_posterior_without_a_variance_has_no_ring(opened, images):
    vae = VAE(latent_dim=2, intermediate_dim=16, posterior=BoxOf(2))
    browser = opened(explorer_page(vae, *images))
    click_image(browser, 3)
    assert js(browser, "explorer.selected") is not None
    assert js(browser, "explorer.ellipse") is None
    assert "ring" not in by_id(browser, "image-more").text


@pytest.mark.browser
def test_a_runs_text_is_shown_as_text(opened, images):
    evil = "<script>document.title = 'run'</script><b>x</b>"
    browser = opened(explorer_page(model(), *images, title=evil, facts=evil, notes=[evil]))
    assert browser.title.startswith("<script>")
    for name in ("title", "facts", "notes"):
        assert by_id(browser, name).text == evil


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_nothing_is_cut_off_or_too_small(opened, images, width, height):
    browser = opened(explorer_page(model(latent_dim=5), *images, notes=["A note. " * 20]))
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        click_image(browser, 3)
        assert js(browser, "document.documentElement.scrollWidth") <= width
        sizes = js(
            browser,
            "Array.from(document.body.querySelectorAll('*')).filter((e) => e.childNodes.length && "
            "e.innerText).map((e) => parseFloat(getComputedStyle(e).fontSize))",
        )
        assert min(sizes) >= 12
        unnamed = "Array.from(document.querySelectorAll('button, select, input, [tabindex]'))"
        unnamed += ".filter((e) => !e.hidden && !e.getAttribute('aria-label') && !e.innerText"
        unnamed += " && !(e.labels && e.labels.length)).length"
        assert js(browser, unnamed) == 0
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
