"""The pages keep what they promise: commands parse, programs run, names and links exist, nothing is left out."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.test_structure import FLOORS, GROUND, TOP, TREES

import instructedit as ie
from instructedit.cli import main

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))]
TARGETS = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages."""
    found = re.findall(r"^```(\w+)[^\n]*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [body for language, body in found if language in languages]


def commands(program: str) -> list[tuple[str, str]]:
    """(page, command line) of every line in a shell block that calls the program."""
    return [
        (page.relative_to(REPOSITORY).as_posix(), line)
        for page in PAGES
        for block in blocks(page, "bash", "sh", "console")
        for line in block.replace("\\\n", " ").splitlines()
        if line.split()[:1] in ([program], [f".venv/bin/{program}"])
    ]


@pytest.mark.parametrize(("page", "line"), commands("instructedit"), ids=lambda text: " ".join(text.split())[:70])
def test_a_command_on_a_page_parses(page, line, monkeypatch):
    """As far as its options and config files go; nothing is run."""
    monkeypatch.chdir(REPOSITORY)
    args = shlex.split(line, comments=True)[1:]
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit, match=r"^0$"):
        main([*args, "--print_config"])


def test_that_check_can_fail(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert len(commands("instructedit")) > 20
    for line in ("edit --prompt x --target y --editor ft_l --no_such 1", "fit --config configs/lm/none.yaml"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert main([*line.split(), "--print_config"]) == 2


def test_make_has_every_target_on_a_page():
    asked = {line.split("#")[0].split()[1] for _, line in commands("make")}
    assert asked <= TARGETS
    assert asked >= {"demo", "test", "check", "docs"}


PROGRAMS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(blocks(page, "python"))
    if DOCS in page.parents and block.startswith("import ")
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_on_a_page_runs(program, tmp_path, monkeypatch):
    """A block that starts with an import is whole; a fit is cut short."""
    monkeypatch.chdir(tmp_path)
    shorter = {"max_steps=100": "max_steps=2", "val_check_interval=50": "val_check_interval=2", "size=40": "size=4"}
    for long, short in shorter.items():
        assert ("L.Trainer" in program) == (long in program)
        program = program.replace(long, short)
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(program, "page", "exec"), names)
    assert printed.getvalue().strip()
    for folder in re.findall(r'save_pretrained\("([\w-]+)"\)', program):
        assert type(ie.load_editor(tmp_path / folder, names["lm"])) is type(names["editor"])


def test_the_paper_index_names_what_there_is():
    names = re.findall(r"`(instructedit(?:\.\w+)+)`", (DOCS / "paper-index.md").read_text())
    assert len(names) > 30
    for name in names:
        assert found(name) is not None, name
    with pytest.raises(AttributeError):
        found("instructedit.editors.mend.Mend.makes")


def found(name: str) -> Any:
    """What a dotted name means: a module's attribute, or an attribute of that."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            value: Any = importlib.import_module(".".join(parts[:end]))
            for part in parts[end:]:
                value = getattr(value, part)
            return value
    raise AttributeError(name)


def test_the_paper_index_has_every_equation_and_experiment():
    text = (DOCS / "paper-index.md").read_text()
    assert all(re.search(rf"^\| {number} \(section", text, re.MULTILINE) for number in range(1, 9))
    named = set(re.findall(r"^\| (?:Table|Figure|Figures|Appendix) [^|]*\| ([^|]*) \|", text, re.MULTILINE))
    grids = {file.parent.name for file in (REPOSITORY / "experiments").glob("*/grid.yaml")}
    ours = {"other_datasets", "robustness", "ridge_edit", "scope_edit"}  # not in the paper
    assert set(re.findall(r"`(\w+)`", " ".join(named))) == grids - ours


def test_the_floors_stand_in_order():
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "floors.md").read_text(), re.MULTILINE)
    names = re.findall(r"`(\w+)`", " ".join(rows))
    assert [name for name in names if name in FLOORS] == list(FLOORS)
    assert {*names, "__init__"} == {*TOP, *FLOORS, *GROUND}
    (short,) = blocks(REPOSITORY / "CONTRIBUTING.md", "text")
    assert re.findall(r"^\w+", short, re.MULTILINE) == list(FLOORS[:-1])  # the last line has all that is left


def test_only_three_files_talk_to_mlflow():
    """Annotations aside, as docs/floors.md says."""

    def imports(node: ast.AST) -> bool:
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            return False
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        return any(name.split(".")[0] == "mlflow" for name in names) or any(map(imports, ast.iter_child_nodes(node)))

    assert [path for path, tree in TREES.items() if imports(tree)] == ["registered.py", "stores.py", "tracking.py"]


def test_every_variable_and_cache_folder_is_on_its_page():
    text = (DOCS / "environment.md").read_text()
    source = "\n".join(ast.unparse(tree) for tree in TREES.values() if "environ" in ast.unparse(tree))
    variables = set(re.findall(r"'([A-Z]+_[A-Z_]+)'", source))
    assert variables >= {"INSTRUCTEDIT_CACHE", "INSTRUCTEDIT_DEBUG", "OPENAI_API_KEY"}
    folders = set(re.findall(r"cache_folder\(\) / '(\w+)'", "\n".join(map(ast.unparse, TREES.values()))))
    assert "models" in folders
    missing = [v for v in variables if f"`{v}`" not in text] + [f for f in folders if f"instructedit/{f}/`" not in text]
    assert missing == []


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere():
    spec = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
    listed = re.findall(r"[\w/-]+\.md", str(spec["nav"]))
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
            assert (page.parent / link).exists(), f"{page}: {link}"


def test_the_version_stands_in_the_citation_and_the_changelog():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == ie.__version__
    assert citation["references"][0]["url"].endswith("2402.16123")
    versions = re.findall(r"^## \[(.+?)\]", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[:2] == ["Unreleased", ie.__version__]


def test_hooks_and_workflow_run_what_is_there():
    (hooks,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    assert hooks["repo"] == "local"  # so that no network is needed
    assert {hook["entry"].split()[0] for hook in hooks["hooks"]} == {".venv/bin/ruff", ".venv/bin/mypy"}
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["check"]["steps"][-1] == {"run": ".ci/run"}
    assert (REPOSITORY / ".ci/run").stat().st_mode & 0o111
