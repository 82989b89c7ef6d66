"""The hash of the code depends on everything that decides a run's numbers, and on nothing else."""

import ast
import re

import pytest

from vae_torch.parts import registry
from vae_torch.runs import identity
from vae_torch.runs.identity import bare, modules

SOURCE = '''"""What it is."""

import math  # for pi


def area(r):
    """Of a circle.

    Args:
        r: radius # not a comment
    """
    # the formula
    text = "#é"  # no colour
    return math.pi * r**2, text
'''


def test_comments_docstrings_and_empty_lines_are_left_out():
    assert bare(SOURCE).splitlines() == [
        "import math",
        "def area(r):",
        '    text = "#é"',
        "    return math.pi * r**2, text",
    ]


@pytest.mark.parametrize("module", modules())
def test_what_is_left_is_the_same_program(module):
    source = identity.source_of(module)

    def without_docstrings(tree):
        for node in ast.walk(tree):
            kinds = ast.Module | ast.ClassDef | ast.FunctionDef
            if isinstance(node, kinds) and ast.get_docstring(node) is not None:
                del node.body[0]
            if isinstance(node, kinds):
                node.body = [part for part in node.body if not isinstance(part, ast.Pass)]
        return ast.dump(tree)

    lines = bare(source).splitlines()
    indents = [len(line) - len(line.lstrip()) for line in [*lines, ""]]
    for n, line in enumerate(lines):  # a body that is only a docstring needs it to be valid code
        if line.endswith(":") and indents[n + 1] <= indents[n]:
            lines[n] += " pass"
    again = without_docstrings(ast.parse("\n".join(lines)))
    expected = without_docstrings(ast.parse(source))
    assert again == expected


def test_the_hash_follows_imports():
    found = set(modules())
    assert {"vae_torch.training.loop", "vae_torch.machine", "vae_torch.parts.priors"} <= found
    for name in found:
        for imported in re.findall(r"from (vae_torch\.[\w.]+) import", identity.source_of(name)):
            assert imported in found, (name, imported)
        package = name.rpartition(".")[0]
        assert package in {"vae_torch", *found}, name
    assert {"vae_torch.data", "vae_torch.data.idx", "vae_torch.seeds"} <= found
    assert set(registry.LATER) <= found  # parts that are imported by name
    assert not {name for name in found if "cli" in name or "figures" in name}


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [("r**2", "r**3", False), ("the formula", "a formula", True), ("Of a circle", "Area", True)],
)
def test_the_hash_changes_with_the_code_alone(monkeypatch, old, new, same):
    monkeypatch.setattr(identity, "modules", lambda _: ["one"])
    hashes = []
    for text in (SOURCE, SOURCE.replace(old, new)):
        monkeypatch.setattr(identity, "source_of", lambda _, text=text: text)
        hashes.append(identity.code_hash.__wrapped__())
    assert (hashes[0] == hashes[1]) is same
