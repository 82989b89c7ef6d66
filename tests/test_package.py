"""The package as a whole: what it imports, what it installs."""

import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.conftest import REPOSITORY
from vae_torch import save_run
from vae_torch.cli.dispatch import COMMANDS

MODULES = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    for path in (REPOSITORY / "vae_torch").rglob("*.py")
    if path.stem != "__init__" and path.parent.name != "cli"
)
HEAVY = ("hydra", "omegaconf", "tensorboard", "torchvision", "matplotlib")


def test_no_module_brings_hydra_or_heavy_libraries():
    script = (
        "import importlib, sys\n"
        f"for name in {MODULES}:\n"
        "    importlib.import_module(name)\n"
        f"    if loaded := [m for m in {HEAVY} if m in sys.modules]:\n"
        "        sys.exit(f'{name} imports {loaded}')\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)


def test_a_loaded_model_needs_no_compiler(small_vae, tmp_path):
    save_run(small_vae, tmp_path / "run")
    script = (
        "import sys, vae_torch\n"
        "before = 'torch._dynamo' in sys.modules\n"
        f"vae_torch.load_run({str(tmp_path / 'run')!r})\n"
        "sys.exit(not before and 'torch._dynamo' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)


@pytest.mark.parametrize(
    "line",
    [
        *(f"{name} --help" for name in COMMANDS),
        "train train.epoch=2",
        "train -m model.latnt_dim=2,4 where=cores",
        "evaluate outputs/run eval.sampels=3",
    ],
)
def test_help_and_wrong_keys_need_neither_torch_nor_hydra(line):
    name, *arguments = line.split()
    script = (
        "import importlib, sys\n"
        f"sys.argv = {[f'{name}.py', *arguments]}\n"
        "try:\n"
        f"    importlib.import_module('vae_torch.cli.{name}').main()\n"
        "finally:\n"
        "    print('loaded', {'torch', 'hydra', 'matplotlib'} & {*sys.modules})\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ended.stdout.endswith("loaded set()\n"), ended
    assert ended.returncode == (0 if "--help" in line else 2)
    assert "usage" in ended.stdout or "key=value" in ended.stdout or "did you mean" in ended.stderr


def test_public_names_are_there():
    import vae_torch

    for name in vae_torch.__all__:
        assert getattr(vae_torch, name).__doc__, name


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("filelock", "3.13.1"),  # waits for its own lock, so no run starts
        ("tensorboard", "2.20.0"),  # cannot be viewed beside a new setuptools
        ("matplotlib", "3.10.6"),  # warns beside a new pyparsing
        ("tqdm", "4.66.0"),  # warns on Python 3.12
        ("scikit-learn", "1.5.2"),  # warns beside a new SciPy
        ("python", "3.14.0"),  # Hydra 1.3 does not start on it
        ("python", "3.10.14"),
    ],
)
def test_what_was_seen_to_fail_is_not_installed(name, version):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    every = [project["dependencies"], *project["optional-dependencies"].values()]
    asked = [Requirement(line) for group in every for line in group]
    allowed = [each.specifier for each in asked if each.name == name]
    allowed += [SpecifierSet(project["requires-python"])] if name == "python" else []
    assert allowed
    assert not any(version in specifier for specifier in allowed)


def test_every_package_is_installed():
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
    packages = {
        ".".join(path.parent.relative_to(REPOSITORY).parts)
        for path in (REPOSITORY / "vae_torch").rglob("__init__.py")
    }
    assert set(settings["tool"]["setuptools"]["packages"]) == {*packages, "vae_torch.conf"}
