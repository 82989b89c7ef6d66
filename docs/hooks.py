"""What the site's pages get while MkDocs builds them.

- The reference of the settings, from the schema in `vae_torch/config.py` and the values in `conf/`.
- The tutorial of the notebook, from the cells of `scripts/walkthrough.py`.
- The changelog and the guide for contributors, from the files at the top of the checkout.
- The explorer pages of the releases in `pretrained/`.
- Formulas as MathML, which a browser draws without a script.
"""

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from latex2mathml.converter import convert
from mkdocs.structure.files import File

from vae_torch import compose
from vae_torch import config as schema
from vae_torch.cli.help import meaning, range_of

ROOT = Path(__file__).parent.parent
SETTINGS = re.compile(r"^<!-- settings (\w+) (\S+) -->$", re.MULTILINE)
EXPLORER = re.compile(r"^<!-- explorer (\w+) -->$", re.MULTILINE)
MISSING = "???"  # as Hydra writes it
# The first of these that a setting's type holds names it.
TYPES = {
    bool: "true or false", dict: "options", list: "list", float: "number", int: "whole number",
    str: "text",
}  # fmt: skip
# A long name in a table, and where it may break.
LONG_NAME, BREAK = re.compile(r"(?<=<code>)[^<]{25,}(?=</code>)"), re.compile(r"(?<=[_=./])")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
# What the pictures of the notebook show, for readers who cannot see them.
PICTURES = {
    "1_reconstructions": "Ten test digits over their reconstructions, with the nats of each",
    "2_latent": "Test images as points in the latent plane, coloured by digit",
    "3_manifold": "20 by 20 decoded digits over the latent plane, which turn into each other",
    "4_traversal": "One digit while one latent after the other moves",
    "5_interpolation": "A digit that turns into another in small steps",
    "6_samples": "64 decoded samples from the prior",
    "7_collapse_and_cure": "Ten digits, the notebook's ten equal blurs, the ELBO's ten digits",
    "8_latent_collapse_and_cure": "Left all points in one heap, right a map of the digits",
}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that other files of the checkout hold."""
    pages = {
        "tutorials/notebook.md": notebook_page(),
        "changelog.md": from_the_top("CHANGELOG.md"),
        "contributing.md": from_the_top("CONTRIBUTING.md"),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for page in sorted((ROOT / "pretrained").glob("*/explorer.html")):
        name = f"results/{page.parent.name}/explorer.html"
        files.append(File.generated(config, name, abs_src_path=str(page)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put tables of settings and explorer pages where a page asks for them."""
    markdown = EXPLORER.sub(lambda found: explorer_of(found[1]), markdown)
    return SETTINGS.sub(lambda found: settings_table(*found.groups()), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Turn formulas into MathML, and let long names in tables break."""
    content = re.sub(r"<td>.*?</td>", breakable, content, flags=re.DOTALL)
    return FORMULA.sub(
        lambda found: convert(
            html.unescape(found[2]), display="block" if found[1] == "div" else "inline"
        ),
        content,
    )


def explorer_of(name: str) -> str:
    """The explorer page of a release, inside the results page; nothing if there is none."""
    if not (ROOT / "pretrained" / name / "explorer.html").exists():
        return ""
    link = f"{name}/explorer.html"
    return (
        f"Walk through its latent space here, or [on a page of its own]({link}):\n\n"
        f'<iframe class="explorer" src="{link}" loading="lazy" title="Latents of {name}"></iframe>'
    )


def breakable(cell: re.Match[str]) -> str:
    """A table's cell with places where long names may break, so that narrow columns suffice."""
    return LONG_NAME.sub(lambda name: BREAK.sub("<wbr>", name[0]), cell[0])


def settings_table(name: str, defaults: str) -> str:
    """One row for each setting: its default, what is allowed, what it means.

    Args:
        name: A class of `vae_torch/config.py`.
        defaults: The file of `conf/` with its values, or a group of a run's settings: `model`.
            `run` stands for the settings of a run that are in no group.
    """
    values = default_values(defaults)
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for key, kind in schema.keys_of(getattr(schema, name)).items():
        if defaults == "run" and "." in key:
            continue
        dotted = key if defaults == "run" or defaults.endswith(".yaml") else f"{defaults}.{key}"
        value = values.get(dotted, {})  # an empty group has no keys
        default = "must be given" if value == MISSING else f"`{shown(value)}`"
        cells = (f"`{dotted}`", type_of(kind), default, meaning(kind).replace("|", "\\|"))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def type_of(kind: Any) -> str:
    """A setting's type and range, in words."""
    parts = list(parts_of(kind))
    held = [*parts, *map(get_origin, parts)]
    if Literal in held:
        words = schema.allowed(kind).removeprefix("one of ").removesuffix(", or null")
    else:
        base = next(name for cls, name in TYPES.items() if cls in held)
        limits = range_of(kind) if base.endswith("number") else ""
        words = f"{base}, {limits}" if limits else base
    return f"{words}; or null" if type(None) in held else words


def parts_of(kind: Any) -> Iterator[Any]:
    """An annotated type, its unions taken apart."""
    yield kind
    for part in get_args(kind):
        yield from parts_of(part)


def default_values(name: str) -> dict[str, Any]:
    """The values of a script's settings, or of a default run's, by dotted key."""
    if not name.endswith(".yaml"):
        composed, written = schema.flatten(compose().to_dict()), default_values("train.yaml")
        # as it is written: `auto`, not what it stands for
        return {key: written.get(key, value) for key, value in composed.items()}
    return schema.flatten(yaml.safe_load((ROOT / "conf" / name).read_text("utf-8")))


def shown(value: Any) -> str:
    """A value as one types it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "{}" if value == {} else str(value).replace(" ", "")


def notebook_page() -> str:
    """The cells of `scripts/walkthrough.py` with their pictures; the long first one is folded."""
    text = (ROOT / "scripts" / "walkthrough.py").read_text("utf-8")
    printed = (ROOT / "docs" / "pictures" / "walkthrough" / "printed.txt").read_text("utf-8")
    lines: list[str] = []
    for kind, body in re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", text, re.M | re.S):
        if kind:
            lines += [re.sub(r"^# ?", "", body, flags=re.M).strip(), ""]
            continue
        code = f"```python\n{body.strip()}\n```"
        if "import os" in body:
            code = '??? note "Imports and settings"\n\n' + re.sub(
                r"^(?=.)", "    ", code, flags=re.M
            )
        lines += [code, ""]
        lines += [
            f"![{PICTURES[name]}](../pictures/walkthrough/{name}.png)\n"
            for name in re.findall(r'^show\(\s*"(\w+)"', body, re.M)
        ]
    lines += ["## What it prints", "", f"```text\n{printed.strip()}\n```", ""]
    return "\n".join(lines)


def from_the_top(name: str) -> str:
    """A page at the top of the checkout, its links turned to the site's pages."""
    return (ROOT / name).read_text("utf-8").replace("](docs/", "](")
