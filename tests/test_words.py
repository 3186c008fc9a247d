"""The words of the code: names and docstrings say what a thing is, in the terms of the field."""

import ast
from collections import Counter
from pathlib import Path

import pytest

import cache
import pipeline

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for package in ("pipeline", "cache") for path in (ROOT / package).rglob("*.py"))
# pronouns and bare participles: a reader cannot tell from them what the value is
VAGUE = set((ROOT / "tests" / "vague_words.txt").read_text(encoding="utf-8").split())
MOST_VAGUE_NAMES = 60


def assigned_names(tree: ast.AST):
    """Yield every name that is bound by an assignment, a loop, a with statement or a parameter."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


def docstrings(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", "module"), text


def test_few_names_are_pronouns_or_bare_participles():
    vague = Counter()
    for path in FILES:
        for name, _ in assigned_names(ast.parse(path.read_text(encoding="utf-8"))):
            if name.strip("_") in VAGUE:
                vague[str(path.relative_to(ROOT))] += 1
    assert sum(vague.values()) < MOST_VAGUE_NAMES, vague.most_common()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_say_what_is_returned_or_done(path):
    riddles = [
        f"{name}: {text.splitlines()[0]}"
        for name, text in docstrings(ast.parse(path.read_text(encoding="utf-8")))
        if text.split()[0] in ("What", "Whether", "How", "That", "Of", "Who")
    ]
    assert not riddles


def test_no_two_classes_share_a_name():
    places = {}
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: files for name, files in places.items() if len(files) > 1}


def test_what_is_public_names_its_arguments():
    public = {name for names in pipeline._PUBLIC.values() for name in names} | set(cache.__all__)
    silent = []
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                number = len(node.args.args) + len(node.args.kwonlyargs)
            elif isinstance(node, ast.ClassDef) and "dataclass" in "".join(map(ast.dump, node.decorator_list)):
                number = sum(isinstance(line, ast.AnnAssign) for line in node.body)
            else:
                continue
            if node.name in public and number > 1 and "Arguments" not in (ast.get_docstring(node) or ""):
                silent.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not silent
