"""Every package that the code imports is declared in pyproject.toml, so that no other one has to bring it along."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
#: Imports to the packages that bring them, where the names differ.
PACKAGES = {"sklearn": "scikit-learn", "yaml": "pyyaml", "markdown_it": "markdown-it-py"}


def names(requirements: Iterable[str]) -> set[str]:
    """Packages by their normalised names; those of the project's own extras too."""
    found = set()
    for requirement in requirements:
        name, extras = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", requirement).groups()
        own = name == PROJECT["name"]
        found |= names(each for extra in extras.split(",") for each in EXTRAS[extra]) if own else {normalised(name)}
    return found


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(tree: ast.AST) -> Iterator[str]:
    """Packages of others that a module imports anywhere."""
    for node in ast.walk(tree):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for top in {module.split(".")[0] for module in modules} - {"instructedit", "tests"} - sys.stdlib_module_names:
            yield normalised(PACKAGES.get(top, top))


LIBRARY = names(PROJECT["dependencies"]) | names(
    r for extra in EXTRAS if extra not in ("dev", "docs") for r in EXTRAS[extra]
)


@pytest.mark.parametrize(("folder", "declared"), [("src", LIBRARY), ("tests", LIBRARY | names(EXTRAS["dev"]))])
def test_what_is_imported_is_declared(folder, declared):
    trees = {file: ast.parse(file.read_text()) for file in sorted((REPOSITORY / folder).rglob("*.py"))}
    missing = {name: str(file) for file, tree in trees.items() for name in imported(tree) if name not in declared}
    assert missing == {}


def test_an_undeclared_import_is_noticed():
    tree = ast.parse("import os, torch.nn\nfrom yaml import safe_load\ndef f():\n    from no_such.part import thing")
    assert sorted(set(imported(tree)) - LIBRARY) == ["no-such"]
