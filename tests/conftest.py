import os
from collections import Counter
from pathlib import Path

# One thread a test: the models are tiny, and threads that wait for each other on a busy machine
# are many times slower. Set before torch reads it, and inherited by the scripts under test.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import numpy as np
import pytest
import torch

from tests import rough as cheap
from vae_torch import VAE, machine
from vae_torch.data import idx_bytes, sources

REPOSITORY = Path(__file__).parent.parent

# Hypothesis has no time limit and the same examples every day.
hypothesis.settings.register_profile(
    "steady",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("steady")


# What a skipped test lacks, by words of its reason, and what brings it.
BROUGHT_BY = {
    "CUDA": "pytest tests/test_cuda.py on a machine with a CUDA device",
    "chromium": "apt-get install chromium chromium-driver",
    "mounting": "sudo make test",
    "C++ compiler": "apt-get install g++",
    "torch 2.14": "pip install 'torch>=2.14'",
    "extra": "pip install -e '.[sweep,cluster,ray,search]'",
    "not installed": "pip install -e '.[sweep,cluster,ray,search]'",
}


def pytest_terminal_summary(terminalreporter):
    """One line on what was skipped, with the command that brings it."""
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])]
    if said := skipped_line(reasons):
        terminalreporter.write_line(said)


def skipped_line(reasons: list[str]) -> str:
    """`12 skipped: 10 (what brings them), ...`."""
    ways = Counter(
        next(
            (way for words, way in BROUGHT_BY.items() if words in reason),
            reason.removeprefix("Skipped: "),
        )
        for reason in reasons
    )
    parts = ", ".join(f"{count} ({way})" for way, count in ways.most_common())
    return f"{len(reasons)} skipped, and what brings them: {parts}" if parts else ""


def made_up_digits(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey 28x28 images of one bright bar each, whose place is the label."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, n).astype(np.uint8)
    images = random.integers(0, 30, (n, 28, 28)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[4:24, 2 + 2 * label : 5 + 2 * label] = random.integers(180, 256, (20, 3))
    return images, labels


@pytest.fixture(scope="session")
def made_up_root(tmp_path_factory) -> Path:
    """A data folder with 600 + 200 made-up images where Fashion-MNIST's files would be."""
    root = tmp_path_factory.mktemp("data")
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, n, seed in (("train", 600, 0), ("t10k", 200, 1)):
        images, labels = made_up_digits(n, seed)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return root


@pytest.fixture(scope="session", autouse=True)
def no_installed_images(tmp_path_factory):
    """Tests mean the same where Debian's dataset-fashion-mnist is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_SYSTEM", tmp_path_factory.mktemp("system"))
        yield


@pytest.fixture(autouse=True)
def small_floats_stay():
    """The command lines flush denormal floats to zero, a setting of the whole process."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def small_vae() -> VAE:
    torch.manual_seed(0)
    return VAE((784,), latent_dim=2, intermediate_dim=16)


@pytest.fixture
def rough(monkeypatch):
    """Evaluation cards with few fitting steps, for tests that ignore their estimates."""
    cheap.hardly_fitted(monkeypatch.setattr)


@pytest.fixture
def few_points(monkeypatch):
    """Few samples of the prior to start fits from, for posteriors with one mode."""
    cheap.few_points(monkeypatch.setattr)


@pytest.fixture
def processor_stays(monkeypatch):
    """Commands that run in this process do not change its CPU settings."""
    for name in ("tune_cpu", "set_products"):
        monkeypatch.setattr(machine, name, lambda *_: None)


@pytest.fixture(scope="module")
def undrawn():
    """Runs of this process draw no pictures of their model."""
    with pytest.MonkeyPatch.context() as patch:
        cheap.undrawn(patch.setattr)
        yield


@pytest.fixture
def composed():
    """Compose `conf/` as the command line does: composed("model.latent_dim=3") -> Config."""
    from vae_torch.cli.compose import compose

    return lambda *overrides: compose(overrides)


@pytest.fixture(scope="session")
def defaults():
    """The default run's settings as Hydra composes them, before they are checked."""
    from vae_torch.cli.compose import compose_run, fresh_hydra

    with fresh_hydra():
        return compose_run([])


@pytest.fixture
def changed(defaults):
    """The default run's config with other values, without composing it again.

    changed("model.latent_dim=3") is composed("model.latent_dim=3"), for keys that choose no file.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    from vae_torch.cli.compose import run_settings

    def config(*overrides):
        settings = defaults.copy()
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            OmegaConf.update(settings, override.key_or_group, override.value())
        return run_settings(settings)

    return config


@pytest.fixture
def config(changed):
    """The default run's config."""
    return changed()
