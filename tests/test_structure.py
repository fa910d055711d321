"""The house: which floor may use which, what an import costs, how names are found, what is documented."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import instructedit
from instructedit.editors import Editor
from instructedit.edits import Edit
from instructedit.registry import plugins
from instructedit.tasks import Task

SOURCE = Path(instructedit.__file__).parent
TREES = {file.relative_to(SOURCE).as_posix(): ast.parse(file.read_text()) for file in sorted(SOURCE.rglob("*.py"))}

#: The floors of the package, from the top down; a floor imports from itself and from those after it.
FLOORS = (
    "cli", "audit", "training", "callbacks", "writing", "reports", "evaluation", "editors", "data", "lm", "analysis",
    "tasks", "testbed", "instructions", "edits", "metrics", "tracking", "records",
)  # fmt: skip
#: What is not in that list: the command line's own rooms on top (`__init__` is the face of all), the ground below.
TOP = ("__init__", "benchmark", "cli", "commands", "experiments", "lightning_cli", "mlflow_model")
GROUND = (
    "artifacts", "registry", "registered", "run_names", "provenance", "stores", "locks", "redaction", "drawing",
    "pages", "console", "configs", "paths", "rows", "processes", "renamed", "errors",
)  # fmt: skip
LEVEL = {name: level for level, name in enumerate(reversed([*FLOORS[1:], *GROUND]))}
LEVEL |= dict.fromkeys(TOP, len(LEVEL))


def floor(path: str) -> str:
    return path.removesuffix(".py").split("/")[0]


def imported(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    """Every import of the package's own modules with its line, inside functions and TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "instructedit":
                yield from ((node.lineno, instructedit._HOME.get(alias.name, alias.name)) for alias in node.names)
            elif node.module and node.module.startswith("instructedit."):
                yield node.lineno, node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "instructedit":
                    yield node.lineno, [*alias.name.split("."), "__init__"][1]


def modules(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """The package's modules that a module imports anywhere: ``from a import b`` means ``a.b`` if that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{each.name}" for each in node.names]
            yield from (found for each in full if (found := each if each in known else str(node.module)) in known)


def circles(trees: dict[str, ast.Module]) -> list[list[str]]:
    """Groups of modules in which each one reaches each other one by its imports: strongly connected components."""
    named = {f"instructedit.{path.removesuffix('.py')}".replace("/", "."): tree for path, tree in trees.items()}
    named = {name.removesuffix(".__init__"): tree for name, tree in named.items()}
    graph = {name: set(modules(tree, set(named))) for name, tree in named.items()}

    def reached(name: str) -> set[str]:
        found: set[str] = set()
        todo = [*graph[name]]
        while todo:
            if (each := todo.pop()) not in found:
                found.add(each)
                todo += graph[each]
        return found

    reach = {name: reached(name) for name in graph}
    groups = {tuple(sorted(other for other in reach[n] if n in reach[other])) for n in graph if n in reach[n]}
    return [[name.removeprefix("instructedit.") for name in group] for group in sorted(groups)]


def upward(trees: dict[str, ast.Module]) -> list[str]:
    return [
        f"{path}:{line} imports {name}"
        for path, tree in trees.items()
        for line, name in imported(tree, path)
        if LEVEL[name] > LEVEL[floor(path)]
    ]


def test_imports_never_run_upwards():
    assert {floor(path) for path in TREES} <= set(LEVEL)  # every module has its floor
    assert upward(TREES) == []


@pytest.mark.parametrize(
    "code",
    [
        "from instructedit.training.module import EditingModule",
        "import instructedit.evaluation",
        "from instructedit import evaluate",
        "import instructedit as ie",
        "def f():\n    from instructedit.editors import Editor",
        "if TYPE_CHECKING:\n    from instructedit.evaluation import Outcome",
    ],
)
def test_an_upward_import_is_noticed(code):
    assert len(upward({"lm/bad.py": ast.parse(code)})) == 1


def test_no_modules_import_each_other():
    """Neither inside functions nor under TYPE_CHECKING."""
    assert circles(TREES) == []


def test_a_circle_is_noticed():
    code = {
        "a/__init__.py": "from instructedit.a.one import One",
        "a/one.py": "def f():\n    from instructedit.a import two",
        "a/two.py": "if TYPE_CHECKING:\n    import instructedit.b",
        "b.py": "from instructedit.a.one import One\nfrom instructedit.c import C",
        "c.py": "import instructedit.c as myself",
        "d.py": "import torch\nfrom instructedit.a.one import One",
        "lm/frozen.py": "from instructedit.lm import used",
        "lm/used.py": "def f():\n    from instructedit.lm.frozen import FrozenLM",
    }
    trees = {path: ast.parse(text) for path, text in code.items()}
    assert circles(trees) == [["a.one", "a.two", "b"], ["c"], ["lm.frozen", "lm.used"]]


def test_importing_the_package_is_cheap():
    code = (
        "import sys, instructedit, instructedit.cli\n"
        "instructedit.cli.main(['--help'])\n"
        "heavy = {'torch', 'transformers', 'lightning', 'mlflow', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    for name in instructedit.__all__:
        assert getattr(instructedit, name) is not None
    assert set(instructedit.__all__) == set(instructedit._HOME)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = instructedit.nonsense


# -- plug-ins and models are found, not listed --------------------------------------------------------------------

KINDS = ((Editor, "instructedit.editors"), (Task, "instructedit.tasks"), (Edit, "instructedit.edits"))
FOUND = [found for base, package in KINDS for found in plugins(base, package).items()]
CLASSES = {cls.__name__: (cls.__module__, name) for name, cls in FOUND}
ARCHITECTURES = ("gpt", "llama", "mistral", "qwen", "gemma", "phi", "opt", "bloom")


def listings(tree: ast.AST) -> Iterator[int]:
    """Dicts that say which name is which plug-in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for value in node.values:
                name = value.attr if isinstance(value, ast.Attribute) else getattr(value, "id", None)
                path = value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""
                if name in CLASSES or path.rpartition(".")[2] in CLASSES:
                    yield node.lineno


def branches(tree: ast.AST, words: set[str], test=lambda word, words: word in words) -> Iterator[int]:
    """Comparisons, matches and dictionary keys that hold one of the words."""
    for node in ast.walk(tree):
        sides: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and "with" in node.func.attr:
            sides = list(node.args)
        own = any(isinstance(side, ast.Attribute) and side.attr == "architecture" for side in sides)
        for side in sides:
            parts = side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side]
            texts = [p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)]
            # `Recipe.architecture` of the embedded LMs is an option of ours, not a model's name
            if not own and any(test(text, words) for text in texts):
                yield node.lineno


def test_no_dictionary_lists_the_plugins():
    found = [f"{path}:{line}" for path, tree in TREES.items() for line in listings(tree)]
    assert found == []


def test_no_branch_asks_for_a_plugin_by_name():
    found = []
    for path, tree in TREES.items():
        if path.startswith("testbed/"):  # makes those very data
            continue
        module = "instructedit." + path.removesuffix(".py").replace("/", ".")
        others = {name for home, name in CLASSES.values() if home != module}
        found += [f"{path}:{line}" for line in branches(tree, others | set(CLASSES))]
    assert found == []


def test_no_branch_asks_what_the_model_is_called():
    def about(text: str, words: set[str]) -> bool:
        return any(text.lower().startswith(word) for word in words)

    found = [f"{path}:{line}" for path, tree in TREES.items() for line in branches(tree, set(ARCHITECTURES), about)]
    asked = [
        f"{path}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("model_type", "architectures")
    ]
    assert found + asked == []


def test_these_checks_can_fail():
    lines = ('EDITORS = {"mend": Mend}', 'a = name == "mend"', 'b = "gpt" in name', 'c = name.startswith("llama")')
    tree = ast.parse("\n".join(lines))
    assert list(listings(tree)) == [1]
    assert list(branches(tree, {"mend"})) == [2]
    assert list(branches(tree, set(ARCHITECTURES))) == [3, 4]


# -- words -------------------------------------------------------------------------------------------------------

_DEFINED = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(tree: ast.Module) -> Iterator[tuple[str, ast.AST, bool]]:
    """Public functions and classes of a module, and public methods; the last tells methods of subclasses."""
    for node in tree.body:
        if isinstance(node, _DEFINED) and not node.name.startswith("_"):
            yield node.name, node, False
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, _DEFINED) and not inner.name.startswith("_"):
                        yield f"{node.name}.{inner.name}", inner, bool(node.bases)


def test_everything_public_says_what_it_is():
    """Methods of subclasses may leave it to where they are first declared."""
    silent = [f"{path}: module" for path, tree in TREES.items() if not ast.get_docstring(tree)]
    for path, tree in TREES.items():
        silent += [f"{path}: {name}" for name, node, of in public(tree) if not of and not ast.get_docstring(node)]
    assert silent == []


# -- the rooms of lm/ ---------------------------------------------------------------------------------------------

#: From the ground up: a room imports from those of earlier lines alone.
ROOMS = (
    ("sharding",),
    ("tokens", "joining", "gguf", "hooks", "feed_forward", "chunked_logits", "fingerprint"),
    ("architectures", "prefix_trees", "position_losses"),
    ("text", "sites", "tryout", "reading", "half_precision", "small_batch", "cache"),
    ("forward", "pretrained", "decoding", "adapters"),
    ("edit_sites", "loading"),
    ("applied",),
    ("prefix_states", "tree_decoding", "merging"),
    ("row_states",),
    ("context",),
    ("scores", "generation"),
    ("capture",),
    ("frozen",),
    ("own_text", "gguf_export"),
    ("covariance",),
)  # fmt: skip


def rooms_upwards(trees: dict[str, ast.Module]) -> list[str]:
    """Imports of a room of lm/ from its own line or a later one."""
    known = {f"instructedit.lm.{name}": line for line, names in enumerate(ROOMS) for name in names}
    found = []
    for path, tree in trees.items():
        if path.startswith("lm/") and path != "lm/__init__.py":
            own = path.removeprefix("lm/").removesuffix(".py").split("/")[0]
            used = {
                other.split(".")[2]
                for other in modules(tree, {*known, *DEEPER})
                if other.startswith("instructedit.lm.")
            }
            level = known[f"instructedit.lm.{own}"]
            found += [f"{own} imports {other}" for other in used - {own} if known[f"instructedit.lm.{other}"] >= level]
    return sorted(found)


DEEPER = {f"instructedit.lm.cache.{Path(path).stem}" for path in TREES if path.startswith("lm/cache/")}


def test_rooms_of_the_lm_use_only_what_lies_below_them():
    assert rooms_upwards(TREES) == []


def test_a_room_that_reaches_up_is_noticed():
    code = {
        "lm/forward.py": "from instructedit.lm.scores import Scores",
        "lm/cache/disk.py": "from instructedit.lm.cache.shard import Shard\nfrom instructedit.lm import hooks, text",
    }
    trees = {path: ast.parse(lines) for path, lines in code.items()}
    assert rooms_upwards(trees) == ["cache imports text", "forward imports scores"]


# -- sizes ---------------------------------------------------------------------------------------------------------

FILE, CLASS, FUNCTION, MOST_FUNCTIONS = 400, 250, 80, 25


def sizes(kinds: type | tuple[type, ...]) -> dict[str, int]:
    """Lines of each function or class, from its ``def`` to its end."""
    return {
        f"{path}:{node.name}:{node.lineno}": node.end_lineno - node.lineno + 1
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, kinds)
    }


def test_files_classes_and_functions_are_small():
    files = {path: (SOURCE / path).read_text().count("\n") for path in TREES}
    functions = sizes((ast.FunctionDef, ast.AsyncFunctionDef))
    for lines, limit in ((files, FILE), (sizes(ast.ClassDef), CLASS), (functions, FUNCTION)):
        assert {name: count for name, count in lines.items() if count > limit} == {}
    assert sorted(functions.values())[int(0.9 * len(functions))] <= MOST_FUNCTIONS


def test_files_of_tests_are_small():
    tests = Path(__file__).parent
    files = {file.relative_to(tests).as_posix(): file.read_text().count("\n") for file in tests.rglob("*.py")}
    assert {name: count for name, count in files.items() if count > FILE} == {}
