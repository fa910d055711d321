"""Other packages bring editors and readers by entry points, which are imported when they are asked for by name."""

from __future__ import annotations

import sys

import pytest

import instructedit as ie
from instructedit import registry
from instructedit.editors import Editor
from instructedit.errors import UserError
from instructedit.tasks import find_task, load_records

POINTS = """\
[instructedit.tasks]
brought_quiz = brought_package:Quiz
brought_other = brought_package:Quiz
brought_broken = brought_broken_package:Quiz
brought_missing = brought_package:Nothing
[instructedit.editors]
brought_still = brought_package:Still
"""
CODE = """\
from instructedit.editors.unedited import Unedited
from instructedit.records import EditRecord, EditRequest
from instructedit.tasks import Task


class Quiz(Task):
    name = "brought_quiz"
    title = "Quiz"

    def parse(self, raw, report):
        yield EditRecord(report.record_id(raw), EditRequest(raw.text("q"), raw.text("a"), task=self.name))


class Still(Unedited):
    name = "brought_still"
"""


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory):
    """An installed package, as far as Python can tell."""
    root = tmp_path_factory.mktemp("site")
    (root / "brought_package.py").write_text(CODE)
    (root / "brought_broken_package.py").write_text("import no_such_thing\n")
    info = root / "brought-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    (root / "facts.jsonl").write_text('{"q": "p", "a": "t"}\n')
    sys.path.insert(0, str(root))
    registry._brought.cache_clear()
    yield root
    sys.path.remove(str(root))
    registry._brought.cache_clear()
    if module := sys.modules.pop("brought_package", None):  # other tests list what there is
        del module.Quiz.name, module.Still.name


def test_names_are_listed_without_an_import_and_imported_when_asked_for(package):
    assert "brought_quiz" in ie.task_names()
    assert "brought_still" in ie.editor_names()
    assert "brought_package" not in sys.modules
    assert load_records("brought_quiz", str(package / "facts.jsonl"))[0][0].id == "brought_quiz/train/0"
    assert registry.plugin(Editor, "instructedit.editors", "brought_still").__name__ == "Still"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("brought_broken", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("brought_missing", "cannot be loaded: AttributeError"),
        ("brought_other", "is no subclass of Task with the name 'brought_other'"),
        ("brought", "unknown task 'brought' (did you mean"),
    ],
)
def test_a_broken_one_is_one_line(name, said):
    with pytest.raises(UserError) as error:
        find_task(name)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
