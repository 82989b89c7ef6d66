"""A simulation of what systems other than Linux lack. Nothing was run on those systems.

`sitecustomize.py` in a folder of its own reaches every Python that a command starts, the workers of
a sweep too.
"""

import codecs
import json
import os
import re
import subprocess
import sys
from pathlib import PurePath

import pytest

from tests.command_lines import SCRIPTS
from tests.conftest import REPOSITORY
from vae_torch.cli import children
from vae_torch.cli.sweeps import jobs_of
from vae_torch.config import ConfigError
from vae_torch.runs.folders import read_runs

# No fcntl for this package (filelock has another way for Windows), no fork, no signal but those of
# Windows, and a text file that this package opens in the locale's encoding is a fault.
ELSEWHERE = """
import builtins, multiprocessing, os, signal, sys, warnings

real_import = builtins.__import__
def without_fcntl(name, globals=None, *more, **named):
    importer = (globals or {}).get("__name__", "").partition(".")[0]
    if name in ("fcntl", "resource", "pwd") and importer in ("vae_torch", "__main__"):
        raise ImportError(f"No module named {name!r}")
    return real_import(name, globals, *more, **named)
builtins.__import__ = without_fcntl

for name in ("fork", "forkpty", "mkfifo", "wait4", "killpg", "setsid"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD"):
    delattr(signal, name)
multiprocessing.set_start_method("spawn")
multiprocessing.get_all_start_methods = lambda: ["spawn"]
warnings.filterwarnings("error", category=EncodingWarning, module=r"vae_torch|__main__")
"""


# A run and its card in one process, because the simulated Python starts slowly.
BOTH = """
import runpy, sys
from pathlib import Path
from tests.rough import hardly_fitted

scripts = Path(sys.argv[1])
for name in ("train.py", "evaluate.py"):
    split = sys.argv.index("--")
    told, sys.argv = sys.argv, [name, *sys.argv[2:split]]
    runpy.run_path(str(scripts / name), run_name="__main__")
    hardly_fitted()
    sys.argv = [told[0], told[1], *told[split + 1 :], "--"]
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Run a file without these functions, in a locale that is not UTF-8."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "both.py").write_text(BOTH)
    (folder / "sitecustomize.py").write_text(ELSEWHERE, encoding="utf-8")
    path = [str(folder), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
        "PYTHONWARNDEFAULTENCODING": "1",
    }

    def run(script, *arguments):
        return subprocess.run(
            [sys.executable, str(script), *map(str, arguments)],
            env=environment, cwd=folder, capture_output=True, encoding="ascii",
            errors="surrogateescape",
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def small(made_up_root):
    return [
        *("data=fashion_mnist", f"data.root={made_up_root}", "model.intermediate_dim=8"),
        *("train.epochs=1", "data.limit_train=50", "data.limit_test=20", "train.figure_every=0"),
    ]


def test_a_run_and_its_card_need_nothing_that_only_linux_has(elsewhere, small, tmp_path):
    run_dir = tmp_path / "run"
    few = ("eval.num_samples=5", "eval.fit_samples=5", "eval.limit=5", "eval.fit_images=1")
    train, evaluate = (*small, f"hydra.run.dir={run_dir}"), (run_dir, *few)
    done = elsewhere("both.py", SCRIPTS, *train, "--", *evaluate)
    assert done.returncode == 0, done.stderr
    (run,) = read_runs(tmp_path)
    assert run.state == "finished"
    card = json.loads((run_dir / "evaluation.json").read_text("utf-8"))
    assert card["elbo"]["value"] == pytest.approx(run.metrics["test/elbo"], abs=60)


@pytest.mark.slow
def test_a_sweep_of_two_needs_no_fork(elsewhere, small, tmp_path):
    done = elsewhere(
        SCRIPTS / "train.py", "-m", *small, "seed=0,1", "where=cores", f"sweep.dir={tmp_path}"
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "2 of 2 runs finished" in done.stdout
    assert {run.state for run in read_runs(tmp_path)} == {"finished"}


@pytest.mark.parametrize(
    ("platform", "fork", "method"),
    [
        ("linux", True, "forkserver"),
        ("darwin", True, "spawn"),
        ("win32", False, "spawn"),
    ],
)
def test_a_child_is_forked_only_where_that_is_safe(monkeypatch, platform, fork, method):
    monkeypatch.setattr(sys, "platform", platform)
    if not fork:
        monkeypatch.delattr(os, "fork")
    assert children.start_method() == method


def test_jobs_whose_folders_differ_only_in_case_are_refused():
    with pytest.raises(ConfigError, match="2 jobs would share the folder"):
        jobs_of(["model.activation=relu,RELU"])
    assert len(jobs_of(["seed=1,2"])[1]) == 2


def tracked():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, encoding="utf-8"
    )
    if listed.returncode:
        pytest.skip("no git checkout")
    return listed.stdout.strip("\0").split("\0")


def test_every_systems_folders_can_hold_the_checkout():
    names = tracked()
    assert len({name.casefold() for name in names}) == len(names)
    for name in names:
        for part in PurePath(name).parts:
            assert not re.search(r'[<>:"\\|?*\x00-\x1f]', part), name
            assert part == part.rstrip(". "), name
            assert not re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", part, re.IGNORECASE), (
                name
            )


def test_every_text_file_of_the_checkout_is_utf8():
    for name in tracked():
        path = REPOSITORY / name
        if path.suffix in (".py", ".md", ".yaml", ".toml", ".html", ".json"):
            codecs.decode(path.read_bytes(), "utf-8")
