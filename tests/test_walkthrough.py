import re
import shutil
import warnings

import pytest
from PIL import Image

from tests.command_lines import run_script
from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "walkthrough.py"


def strict():
    """Every warning is an error, but for one of torch 2.6's own, at exit."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "Implicitly cleaning up", ResourceWarning)


def run(script, *arguments, cwd, **settings):
    environment = {f"WALKTHROUGH_{name}": str(value) for name, value in settings.items()}
    before = ["tests.test_walkthrough:strict"]
    return run_script(script, *arguments, cwd=cwd, env=environment, before=before)


def test_walkthrough_draws_its_pictures_and_shows_the_collapse(made_up_root, tmp_path):
    settings = {"EPOCHS": "8", "IMAGES": "600", "DATA": "fashion_mnist", "ROOT": str(made_up_root)}
    done = run(SCRIPT, cwd=tmp_path, OUT=tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    pictures = sorted(path.stem for path in tmp_path.glob("*.png"))
    assert pictures == sorted(re.findall(r'show\("(\w+)"', SCRIPT.read_text()))
    for name in pictures:
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 100
    with Image.open(tmp_path / "7_collapse_and_cure.png") as image:
        assert image.width > 2 * 30 * 10 + 100  # names of the rows beside ten images
    theirs, ours = re.search(r"^kl +([\d.]+) +([\d.]+)$", printed, re.MULTILINE).groups()
    assert float(theirs) < 0.5 < 1 < float(ours)


@pytest.mark.parametrize("started", ["as a script elsewhere", "in the notebook's folder"])
def test_walkthrough_keeps_to_the_folders_of_its_checkout(made_up_root, tmp_path, started):
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    shutil.copytree(made_up_root, checkout / "data")
    for folder in (checkout / "scripts", elsewhere):
        folder.mkdir()
    script = checkout / "scripts" / "walkthrough.py"
    beginning = SCRIPT.read_text().partition("# %% [markdown]\n# ## 2.")[0]
    script.write_text(beginning + 'show("picture", torch.eye(9))\n')
    if started == "as a script elsewhere":
        call, cwd = script, elsewhere
    else:  # a notebook kernel has no __file__, and its own arguments
        call, cwd = tmp_path / "kernel.py", script.parent
        call.write_text("""if True:
            import sys, types
            sys.modules["IPython"] = sys.modules["IPython.display"] = types.ModuleType("IPython")
            sys.modules["IPython"].display = print
            sys.argv = ["kernel", "-f", "connection.json"]
            source = open("walkthrough.py").read()
            exec(source, {"__name__": "__main__", "get_ipython": print})
        """)
    done = run(call, cwd=cwd, DATA="fashion_mnist")
    assert done.returncode == 0, done.stderr
    folder = checkout / "outputs" / "walkthrough"
    assert done.stdout.startswith(f"data in {checkout / 'data'}, pictures in {folder}\n")
    assert [path.name for path in folder.iterdir()] == ["picture.png"]
    assert not list(elsewhere.iterdir())
    assert [path.name for path in script.parent.iterdir()] == ["walkthrough.py"]


def test_walkthrough_explains_its_settings_and_refuses_options(tmp_path):
    shown = run(SCRIPT, "--help", cwd=tmp_path)
    assert shown.returncode == 0
    settings = set(re.findall(r"WALKTHROUGH_\w+", SCRIPT.read_text()))
    assert len(settings) == 5
    assert settings == set(re.findall(r"WALKTHROUGH_\w+", shown.stdout))
    head = SCRIPT.read_text().partition("# %%\n")[0]
    assert settings == set(re.findall(r"WALKTHROUGH_\w+", head))
    for arguments, wrong, words in (
        (["--epochs=2"], {}, "--epochs=2: has no options"),
        ([], {"EPOCHS": "ten"}, "WALKTHROUGH_EPOCHS=ten: must be a whole number"),
        ([], {"IMAGES": "0"}, "WALKTHROUGH_IMAGES=0: must be a whole number"),
        ([], {"DATA": "minst"}, "WALKTHROUGH_DATA=minst: must be one of mnist, "),
    ):
        refused = run(SCRIPT, *arguments, cwd=tmp_path, **wrong)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1
        assert words in refused.stderr
    assert not list(tmp_path.iterdir())


def test_walkthrough_is_a_notebook_of_cells():
    cells = re.split(r"^# %%", SCRIPT.read_text(), flags=re.MULTILINE)[1:]
    assert sum(cell.startswith(" [markdown]") for cell in cells) > 8
    for cell in cells:
        if not cell.startswith(" [markdown]"):
            compile(cell, "cell", "exec")
