"""Checks of README, docs/ and the other pages."""

import ast
import functools
import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path, PurePath

import numpy as np
import pytest
from PIL import Image

from tests.conftest import REPOSITORY
from vae_torch import config as schema
from vae_torch.cli import summarize

DOCS = REPOSITORY / "docs"
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CHANGELOG.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted(DOCS.rglob("*.md")),
]
# What was tried, by date: full of figures with their conditions.
NOTEBOOK = DOCS / "results" / "notebook.md"
GUIDES = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]

PRIVATE_WORDS = (
    r"go(es)? on with", r"step by hand", r"in turns", r"to be had", r"has had", r"of which",
    r"for who\b", r"such as are", r"what is to be said", r"draws of z", r"\bfor to\b",
    r"(matrix|fp32|bf16) products?\b", r"wants? (torch|a C\+\+)", r"\bgoes on\b",
    r"draws? from the prior", r"what an? \w+ is worth",
)  # fmt: skip


def relative(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def prose(text: str) -> str:
    """A page without code, tables, formulas, pictures and HTML."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^\$\$.*?^\$\$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^ *(\||<|:::|!\[|options:|--8<--).*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)


def sentences(text: str) -> list[str]:
    """Paragraphs and list items, cut where a sentence ends."""
    blocks = re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) |^#+ .*$", prose(text), flags=re.MULTILINE)
    return [
        sentence
        for block in blocks
        for sentence in re.split(r"(?<=[.!?:])\s+(?=[A-Z`*\"(\[])", " ".join(block.split()))
    ]


def fenced(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in one of these languages."""
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    return [body for language, body in found if language in languages]


def test_the_readme_is_one_screen():
    text = (REPOSITORY / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 900


@pytest.mark.parametrize("page", [p for p in PAGES if p != NOTEBOOK], ids=relative)
def test_no_sentence_has_more_than_thirty_words(page):
    long = [s for s in sentences(page.read_text("utf-8")) if len(s.split()) > 30]
    assert not long, "\n".join(f"{len(s.split())}: {s}" for s in long)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_pages_use_the_words_of_the_field(page):
    text = prose(page.read_text("utf-8"))
    assert not [word for word in PRIVATE_WORDS if re.search(word, text)]


@pytest.mark.parametrize("folder", ["vae_torch", "scripts", "conf", "docs", "tests"])
def test_code_and_messages_use_the_words_of_the_field(folder):
    files = [p for s in ("py", "yaml", "html") for p in (REPOSITORY / folder).rglob(f"*.{s}")]
    files = [file for file in files if file != Path(__file__)]  # it has the list
    assert files
    texts = {relative(file): " ".join(file.read_text("utf-8").split()) for file in files}
    found = {name: [w for w in PRIVATE_WORDS if re.search(w, t)] for name, t in texts.items()}
    assert not {name: words for name, words in found.items() if words}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_picture_has_an_alternative_text(page):
    text = page.read_text("utf-8")
    for tag in re.findall(r"<img[^>]*>", text):
        assert re.search(r'alt="[^"]{10,}"', tag), tag
    assert not re.findall(r"!\[.{0,9}\]\([^)]*\)", text)


@pytest.mark.parametrize("page", GUIDES, ids=relative)
def test_code_fits_the_width_of_a_page(page):
    wide = [b for b in fenced(page, "bash", "python") if max(map(len, b.splitlines())) > 84]
    assert not wide


SCHEMAS = ("Config", "EvaluateConfig", "ExploreConfig", "EncodeConfig", "SampleConfig",
           "ExportConfig")  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_setting_has_a_sentence_and_a_range(name):
    from vae_torch.cli.help import meaning

    for key, kind in schema.keys_of(getattr(schema, name)).items():
        assert len(meaning(kind).split()) >= 3, f"{key}: {meaning(kind)!r}"
        assert "None (" not in schema.allowed(kind), key


def test_the_reference_asks_for_every_group_of_settings():
    asked = {
        found
        for page in (DOCS / "reference").glob("*.md")
        for found in re.findall(r"^<!-- settings (\w+) ", page.read_text("utf-8"), re.MULTILINE)
    }
    groups = {name for name in vars(schema) if name.endswith("Config") and name != "EvalConfig"}
    assert groups == asked


def anchors(page: Path) -> set[str]:
    """The ids of a page's headings, as MkDocs and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", h.lower()).strip()) for h in headings}


GENERATED = ("tutorials/notebook.md", "changelog.md", "contributing.md")  # docs/hooks.py


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        path, _, anchor = link.partition("#")
        if re.match(r"https?:|mailto:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        if target.is_relative_to(DOCS) and str(target.relative_to(DOCS)) in GENERATED:
            continue
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def commands(page: Path) -> list[str]:
    """The command lines of a page's bash blocks, continued lines joined, comments left out."""
    lines = "\n".join(fenced(page, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


@functools.cache
def composed(overrides: tuple[str, ...]) -> None:
    from vae_torch import compose

    compose(overrides)


PARSED = {"evaluate": "EvaluateConfig", "explore": "ExploreConfig", "encode": "EncodeConfig",
          "sample": "SampleConfig", "export": "ExportConfig"}  # fmt: skip


@pytest.mark.parametrize(
    "page", [p for p in [*GUIDES, REPOSITORY / "CONTRIBUTING.md"] if commands(p)], ids=relative
)
def test_command_lines_are_ones_that_work(page):
    """The commands of a page exist, and the scripts accept their settings."""
    for command in commands(page):
        check_command(shlex.split(command, comments=True))


def check_command(words: list[str]) -> None:
    while "=" in words[0]:  # a variable for this command alone
        words = words[1:]
    first, *rest = words
    if first == "python" and rest[:1] == ["-m"]:
        return
    if first == "python":
        check_script(Path(rest[0]).stem, rest[1:])
    elif first == "make":
        targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text("utf-8"), re.M)
        assert rest[0] in targets
    elif first == "pip":
        extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
        for extra in re.findall(r"\[(\w+)\]", " ".join(rest)):
            assert extra in extras["project"]["optional-dependencies"]
    else:
        assert first in ("source", "tensorboard", ".venv/bin/ray", "rm", "git"), first


def check_script(name: str, arguments: list[str]) -> None:
    assert (REPOSITORY / "scripts" / f"{name}.py").exists(), name
    arguments = [a for a in arguments if a not in ("...", "key=value", "--help", "--open")]
    if name == "train":
        check_settings_of_a_run(arguments)
    elif name in PARSED:
        from vae_torch.cli.settings_line import parser, settings_of

        kind = getattr(schema, PARSED[name])
        settings_of(parser(name, "", kind).parse_args(arguments), kind)
    elif name == "reproduce":
        from scripts.reproduce import ReproduceConfig
        from vae_torch.cli.settings_line import parser, settings_of

        given = [word for word in arguments if "=" in word]  # not `verify` and its names
        settings_of(parser(name, "", ReproduceConfig).parse_args(given), ReproduceConfig)
    elif name == "summarize":
        assert all(a in ("--metric", "--group-by", "--where") or a[0] != "-" for a in arguments)
    elif name == "compare":
        assert all(a.partition("=")[0] in ("run", "metric", "out") for a in arguments)
    else:
        assert name in ("benchmark", "walkthrough")


def check_settings_of_a_run(arguments: list[str]) -> None:
    """The run, or the first run of the sweep, composes."""
    if "--cfg" in arguments or "--config-dir" in arguments:
        return
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.startswith(("hydra.", "sweep.")) or argument == "-m" or "[dark]" in value:
            continue
        if "search" in " ".join(arguments) and "(" in value:  # what the sweeper chooses from
            continue
        if key in ("where", "experiment") and value in ("ray", "slurm", "search"):
            continue  # their launchers are extras
        plain = "," not in value or value.startswith(("[", "'"))
        overrides.append(argument if plain else f"{key}={value.split(',')[0]}")
    own = ("plugins=[my_parts]", "plugins=[tests.my_parts]")
    composed(tuple(override.replace(*own) for override in overrides))


# What makes a page's code short: the page shows the left side, the tests run the right one.
BUDGET = (
    (
        'mnist_loaders("data"',
        'mnist_loaders("data", name="fashion_mnist", limit_train=60, limit_test=10',
    ),
    (
        '"train.epochs=50"',
        '"train.epochs=1", "data=fashion_mnist", "data.limit_train=60", "data.limit_test=10"',
    ),
    ("epochs=50", "epochs=1"),
    ("range(2000)", "range(12)"),
    ('"fit_images": 10', '"fit_images": 2, "exact": False'),
    ('"architecture": "conv", ', ""),
)


@pytest.fixture(scope="module")
def place(undrawn, tmp_path_factory, made_up_root):
    """A folder with what the code on the pages needs: data, pictures, runs, encoded images."""
    del undrawn
    from vae_torch import compose, export_run, run
    from vae_torch.cli.encode import main as encode

    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(made_up_root, folder / "data")
    random = np.random.default_rng(0)
    for name in ("my_pictures/circle", "my_pictures/square", "mixed/good", "mixed/odd"):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    few = ["train.epochs=1", "train.figure_every=0", "model.intermediate_dim=8", "threads=1",
           "data.limit_train=20", "data.limit_test=10"]  # fmt: skip
    outputs = folder / "outputs"
    digits = compose(["data=fashion_mnist", f"data.root={folder / 'data'}", *few])
    run(digits, outputs / "my-run")
    coloured = ["data=folder", f"data.root={folder / 'my_pictures'}", "likelihood=gaussian"]
    run(compose([*coloured, *few]), outputs / "coloured")
    for images, out in (("my_pictures", "latents.npz"), ("mixed", "scores.npz")):
        encode([f"run={outputs / 'coloured'}", f"images={folder / images}", f"out={folder / out}"])
    export_run(outputs / "my-run", folder / "my-release")
    return folder


def runs_by_itself(page: Path) -> bool:
    """The pages on writing parts are run in tests/my_parts.py."""
    callable_alone = page.name in ("add-callback.md", "add-optimizer.md")
    return bool(fenced(page, "python")) and (callable_alone or not page.name.startswith("add-"))


@pytest.mark.usefixtures("rough")
@pytest.mark.parametrize("page", [p for p in GUIDES if runs_by_itself(p)], ids=relative)
def test_python_blocks_run(page, place, monkeypatch):
    monkeypatch.chdir(place)
    code = "\n".join(fenced(page, "python"))
    for shown, tried in BUDGET:
        code = code.replace(shown, tried)
    made = {"__name__": "page"}
    exec(compile(code, page.name, "exec"), made)
    for names, comment in re.findall(r"^([a-z_, ]+) = .*  # (\(\d.*)$", code, re.MULTILINE):
        shapes = [ast.literal_eval(shape) for shape in re.findall(r"\(\d[\d, ]*\)", comment)]
        assert [tuple(made[name.strip()].shape) for name in names.split(",")] == shapes, names


def named_in(page: str, heading: str = "") -> set[str]:
    """The code in the first column of the tables of a page, or of one section."""
    text = (DOCS / "reference" / page).read_text("utf-8")
    part = text.partition(f"## {heading}\n")[2].partition("\n## ")[0] if heading else text
    cells = re.findall(r"^\| (.*?) \|", part, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_the_readme_shows_what_a_run_prints():
    from vae_torch import compose
    from vae_torch.runs.run import epoch_line

    config = compose()
    text = (REPOSITORY / "README.md").read_text("utf-8")
    lines = re.findall(r"^epoch .*", text, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        epoch, _, train, test, reconstruction, kl, seconds = map(
            float, re.findall(r"[-\d.]*\d", line.replace("- kl", "kl"))
        )
        metrics = {
            "epoch": int(epoch), "train/elbo": train, "test/elbo": test, "test/kl": kl,
            "test/reconstruction": reconstruction, "train/images_per_second": 60_000 / seconds,
        }  # fmt: skip
        assert epoch_line(metrics, config, 60_000) == line


def test_every_file_of_a_run_is_in_the_reference(place):
    run = place / "outputs" / "my-run"
    patterns = [pattern.rstrip("/") for pattern in named_in("run-folder.md")]
    for file in run.rglob("*"):
        path = file.relative_to(run)
        hidden = path.name.startswith(".") or path.suffix == ".part"
        names = [str(path), *map(str, path.parents)]
        assert hidden or file.is_dir() or any(
            PurePath(name).match(pattern) for name in names for pattern in patterns
        ), path  # fmt: skip


def test_every_metric_is_in_the_reference(place):
    lines = (place / "outputs" / "my-run" / "metrics.jsonl").read_text("utf-8").splitlines()
    cards = [json.loads(p.read_text("utf-8")) for p in (REPOSITORY / "pretrained").glob("*/*.json")]
    figures = [name for card in cards for name, e in card.items() if "definition" in str(e)]
    page = (DOCS / "reference" / "metrics.md").read_text("utf-8")
    for name in {*json.loads(lines[0]), *figures} - {"epoch"}:
        assert f"`{name}`" in page or f"`{name.partition('/')[2]}`" in page, name


@pytest.mark.parametrize("script", ["summarize", "benchmark"])
def test_the_reference_lists_the_options(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{script}.py", "--help"])
    from scripts import benchmark

    parse = benchmark.parse if script == "benchmark" else lambda: summarize.parse(None)
    with pytest.raises(SystemExit):
        parse()
    options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out)) - {"--help"}
    listed = {name.split()[0] for name in named_in("commands.md", f"{script}.py")}
    assert options == listed - {"DIR"}


def test_the_readmes_table_has_the_figures_of_the_results_page():
    def figures(page, pattern):
        return dict(re.findall(pattern, page.read_text("utf-8"), re.MULTILINE))

    short = figures(REPOSITORY / "README.md", r"^\| `experiment=(\w+)` \|.*?\| \*\*([\d.]+)\*\*")
    full = figures(DOCS / "results" / "index.md", r"^\| `(\w+)` \|.*?\| \*\*([\d.]+)\*\*")
    assert len(short) == 5  # and the default run
    assert short.items() <= full.items()
