import os
import re
import subprocess
import sys

from PIL import Image

from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "walkthrough.py"


def test_walkthrough_draws_its_pictures_and_shows_the_collapse(made_up_root, tmp_path):
    settings = {"EPOCHS": "8", "IMAGES": "600", "DATA": "fashion_mnist", "ROOT": str(made_up_root)}
    environment = {f"WALKTHROUGH_{key}": value for key, value in settings.items()}
    environment["WALKTHROUGH_OUT"] = str(tmp_path)
    printed = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT],
        env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    pictures = sorted(path.stem for path in tmp_path.glob("*.png"))
    assert pictures == sorted(re.findall(r'show\("(\w+)"', SCRIPT.read_text()))
    for name in pictures:
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 100
    theirs, ours = re.search(r"^kl +([\d.]+) +([\d.]+)$", printed, re.MULTILINE).groups()
    assert float(theirs) < 0.5 < 1 < float(ours)


def test_walkthrough_is_a_notebook_of_cells():
    cells = re.split(r"^# %%", SCRIPT.read_text(), flags=re.MULTILINE)[1:]
    assert sum(cell.startswith(" [markdown]") for cell in cells) > 8
    for cell in cells:
        if not cell.startswith(" [markdown]"):
            compile(cell, "cell", "exec")
