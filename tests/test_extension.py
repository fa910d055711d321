"""A new editing method and a new task are one class each, in a file outside the library, and YAML."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

import instructedit as ie
from instructedit.cli import main
from instructedit.lm.pretrain import Recipe, new_model
from instructedit.tracking import load_table, runs

SOURCE = Path(ie.__file__).parent
EDITOR = '''
"""Pushes the answer's own output direction, by a learned amount."""

from typing import ClassVar

import torch

from instructedit.editors import Editor
from instructedit.edits import Factors, LowRankEdit


class Nudge(Editor):
    """One gradient step of a learned size.

    Args:
        strength: Where the step size starts.
    """

    name: ClassVar[str] = "toy_nudge"
    trainable = True

    def __init__(self, strength: float = 0.1):
        super().__init__(blocks=[-1])
        self.strength = strength

    def build(self):
        self.amount = torch.nn.Parameter(torch.tensor(self.strength))

    def make(self, batch):
        seen = self.lm.capture(batch.tokens, [site.name for site in self.sites])
        return LowRankEdit({name: Factors(seen.u[name], -self.amount * seen.delta[name]) for name in seen.u})

    def watched(self):
        return {"amount": self.amount}
'''
TASK = '''
"""Questions with one-word answers."""

from instructedit.records import EditRecord, EditRequest, Probe
from instructedit.tasks import Task


class Quiz(Task):
    """Reader of ``q, a, unrelated``.

    Args:
        mark: Put at the end of each question.
    """

    name = "toy_quiz"
    title = "Quiz"

    def __init__(self, mark: str = ""):
        self.mark = mark

    def parse(self, raw, report):
        request = EditRequest(raw.text("q") + self.mark, raw.text("a"), task=self.name)
        probe = Probe("locality", raw.text("unrelated"), ("so",))
        yield EditRecord(report.record_id(raw), request, (probe,))
'''


def fingerprints() -> dict[str, str]:
    files = [file for file in SOURCE.rglob("*") if file.suffix in (".py", ".yaml")]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A user's folder: two modules, data, an LM, and one YAML file."""
    root = tmp_path_factory.mktemp("user")
    (root / "toy_editor.py").write_text(EDITOR)
    (root / "toy_task.py").write_text(TASK)
    rows = [{"q": f"What is number {i}?", "a": f"n{i}", "unrelated": f"The colour {i} is"} for i in range(8)]
    for split in ("train", "val", "test"):
        (root / f"{split}.json").write_text(json.dumps(rows))
    torch.manual_seed(0)
    recipe = Recipe(architecture="llama", width=16, layers=3, heads=2, vocab=600, context=128)
    new_model(recipe, tokenizer.eos_token_id).save_pretrained(root / "lm")
    tokenizer.save_pretrained(root / "lm")
    task = {"name": "toy_quiz", "source": str(root), "options": {"mark": "?!"}}
    config = {
        "model": {
            "lm": {"name": str(root / "lm")},
            "editor": {"class_path": "toy_editor.Nudge", "init_args": {"strength": 0.25}},
            "lr": 1e-2,
        },
        "data": {"train": [task], "batch_size": 2},
        "trainer": {
            "max_steps": 3, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False,
            "logger": {
                "class_path": "instructedit.tracking.MLflowTracker", "init_args": {"root": str(root / "store")},
            },
        },
    }  # fmt: skip
    (root / "toy.yaml").write_text(yaml.safe_dump(config))
    return root


@pytest.fixture(scope="module")
def at_work(place):
    """The modules can be imported while the tests of this file run."""
    sys.path.insert(0, str(place))
    classes = importlib.import_module("toy_task").Quiz, importlib.import_module("toy_editor").Nudge
    yield place
    sys.path.remove(str(place))
    for cls in classes:  # other tests list what there is
        del cls.name


@pytest.fixture(scope="module")
def printed(at_work):
    """What fit and then test of its checkpoint print."""
    before = fingerprints()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["fit", f"--config={at_work}/toy.yaml"]) == 0
        checkpoint = next(at_work.rglob("last.ckpt"))
        assert main(["test", f"--config={at_work}/toy.yaml", f"--ckpt_path={checkpoint}"]) == 0
    assert fingerprints() == before
    return out.getvalue()


def test_they_are_fitted_and_tested(at_work, printed):
    assert "toy_nudge" in printed
    assert "Quiz" in printed
    found = runs(root=at_work / "store")
    assert set(found["status"]) == {"FINISHED"}
    tested = found.iloc[0]
    assert 0 <= tested["metrics.test/toy_quiz/reliability"] <= 100
    probes = load_table(tested.run_id, "probes", at_work / "store")
    assert set(probes["task"]) == {"toy_quiz"}
    assert probes["prompt"].str.endswith("?!").any()


def test_the_editor_was_trained_and_is_loaded_by_its_checkpoint(at_work, printed):
    lm = ie.FrozenLM.from_pretrained(str(at_work / "lm"))
    editor = ie.load_editor(next(at_work.rglob("last.ckpt")), lm)
    assert type(editor).__name__ == "Nudge"
    assert editor.amount.item() != pytest.approx(0.25, abs=1e-3)
    editor.save_pretrained(at_work / "saved")
    assert ie.load_editor(at_work / "saved", lm).amount == editor.amount


def test_they_are_found_by_name(at_work):
    assert "toy_nudge" in ie.editor_names()
    assert "toy_quiz" in ie.task_names()
    lm = ie.FrozenLM.from_pretrained(str(at_work / "lm"))
    editor = ie.build_editor("toy_nudge", lm, strength=2.0)
    records, _ = ie.load_records("toy_quiz", str(at_work), "test")
    scores = ie.evaluate(lm, editor, records, ie.Evaluation(generate=False, fluency_tokens=0))
    assert set(scores.summary["metric"]) >= {"reliability", "locality"}
    with contextlib.redirect_stdout(io.StringIO()) as help_text, pytest.raises(SystemExit):
        main(["fit", "--model.editor.help=toy_editor.Nudge"])
    assert "Where the step size starts" in help_text.getvalue()


def test_no_library_file_knows_them():
    for file in SOURCE.rglob("*.py"):
        text = file.read_text().lower()
        assert "nudge" not in text, file
        assert "toy_quiz" not in text, file
