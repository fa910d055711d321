"""What CONTRIBUTING.md shows how to add works as it stands there: files outside the library, and no edit within."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

import instructedit as ie
from instructedit import paths
from instructedit.cli import main
from instructedit.testbed.pretrain import Recipe, new_model
from instructedit.tracking import load_table, runs

SOURCE = Path(ie.__file__).parent
REPOSITORY = Path(__file__).parents[1]
GUIDE = (REPOSITORY / "CONTRIBUTING.md").read_text()
#: The files that the guide shows, by the titles of its code blocks.
EXAMPLES = dict(re.findall(r'^```\w+ title="([\w.]+)"\n(.*?)^```$', GUIDE, re.MULTILINE | re.DOTALL))
MODULES = sorted(name for name in EXAMPLES if name.endswith(".py"))


def fingerprints() -> dict[str, str]:
    files = [file for file in SOURCE.rglob("*") if file.suffix in (".py", ".yaml")]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A user's folder: the guide's files, data, an LM, and what this machine needs in one YAML file more."""
    root = tmp_path_factory.mktemp("user")
    for name, body in EXAMPLES.items():
        (root / name).write_text(body.replace("source: quiz", f"source: {root}/quiz").replace("./lm}", f"{root}/lm}}"))
    rows = [{"q": f"What is number {i}?", "a": f"n{i}", "unrelated": f"The colour {i} is"} for i in range(8)]
    (root / "quiz").mkdir()
    for split in ("train", "val", "test"):
        (root / "quiz" / f"{split}.json").write_text(json.dumps(rows))
    torch.manual_seed(0)
    recipe = Recipe(architecture="llama", width=16, layers=3, heads=2, vocab=600, context=128)
    new_model(recipe, tokenizer.eos_token_id).save_pretrained(root / "lm")
    tokenizer.save_pretrained(root / "lm")
    logger = {"class_path": "instructedit.tracking.MLflowTracker", "init_args": {"root": str(root / "store")}}
    here = {"trainer": {"logger": logger, **dict.fromkeys(("enable_progress_bar", "enable_model_summary"), False)}}
    (root / "here.yaml").write_text(yaml.safe_dump(here))
    return root


@pytest.fixture(scope="module")
def at_work(place):
    """The modules can be imported while the tests of this file run."""
    sys.path.insert(0, str(place))
    names = ("toy_editor", "toy_metric", "toy_section", "toy_task")
    toy_editor, toy_metric, toy_section, toy_task = map(importlib.import_module, names)
    yield place
    sys.path.remove(str(place))
    for cls in (
        toy_editor.Nudge,
        toy_metric.InScope,
        toy_task.Quiz,
        toy_section.ProbesSection,
    ):  # other tests list what there is
        del cls.name


@pytest.fixture(scope="module")
def printed(at_work):
    """What fit and then test of its checkpoint print."""
    before = fingerprints()
    configs = [f"--config={at_work}/{name}.yaml" for name in ("here", "toy_editor", "toy_callback")]
    configs = [f"--scale={at_work}/toy_scale.yaml", *configs]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["fit", *configs]) == 0
        checkpoint = next(at_work.rglob("last.ckpt"))
        assert main(["test", *configs, f"--ckpt_path={checkpoint}"]) == 0
    assert fingerprints() == before
    return out.getvalue()


def test_the_guide_shows_a_file_of_each_kind():
    assert MODULES == ["toy_callback.py", "toy_editor.py", "toy_metric.py", "toy_section.py", "toy_task.py"]


def test_a_method_and_a_dataset_are_fitted_and_tested(at_work, printed):
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


def test_the_callback_logged_what_the_editor_learned(at_work, printed):
    fitted = runs(root=at_work / "store").iloc[-1]
    lm = ie.FrozenLM.from_pretrained(str(at_work / "lm"))
    editor = ie.load_editor(next(at_work.rglob("last.ckpt")), lm)
    assert fitted["metrics.watched/amount"] == pytest.approx(editor.amount.item())


def test_the_metric_is_printed_and_logged(at_work, printed):
    assert "In scope" in printed
    tested = runs(root=at_work / "store").iloc[0]
    assert tested["metrics.test/toy_quiz/toy_in_scope"] == tested["metrics.test/toy_quiz/reliability"]


def test_they_are_found_by_name(at_work):
    assert "toy_nudge" in ie.editor_names()
    assert "toy_quiz" in ie.task_names()
    lm = ie.FrozenLM.from_pretrained(str(at_work / "lm"))
    editor = ie.build_editor("toy_nudge", lm, strength=2.0)
    records, _ = ie.load_records("toy_quiz", str(at_work / "quiz"), "test")
    scores = ie.evaluate(lm, editor, records, ie.Evaluation(generate=False, fluency_tokens=0))
    assert set(scores.summary["metric"]) >= {"reliability", "locality"}
    with contextlib.redirect_stdout(io.StringIO()) as help_text, pytest.raises(SystemExit):
        main(["fit", "--model.editor.help=toy_editor.Nudge"])
    assert "Where the step size starts" in help_text.getvalue()


def test_a_section_stands_on_the_page_of_an_experiment(at_work, tmp_path, monkeypatch):
    (tmp_path / "configs/editor").mkdir(parents=True)
    shutil.copy(REPOSITORY / "configs/editor/unedited.yaml", tmp_path / "configs/editor")
    (tmp_path / "experiments/quiz").mkdir(parents=True)
    shutil.copy(at_work / "grid.yaml", tmp_path / "experiments/quiz")
    monkeypatch.setattr(paths, "SHARED", tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        places = (f"--scale={at_work}/toy_scale.yaml", f"--root={tmp_path}/store", f"--out={tmp_path}/out")
        assert main(["experiment", "quiz", *places]) == 0
    assert "Probes asked" in (tmp_path / "out/index.html").read_text()
    counted = (tmp_path / "out/probes.csv").read_text().splitlines()
    assert "unedited,toy_quiz,locality,8" in counted
    run = runs(root=tmp_path / "store").set_index("name").loc["quiz"]
    assert set(load_table(run.run_id, "probes", tmp_path / "store")["kind"]) == {"reliability", "locality"}


@pytest.mark.parametrize("name", MODULES)
def test_no_library_file_knows_them(name):
    (cls,) = re.findall(r"^class (\w+)", EXAMPLES[name], re.MULTILINE)
    for file in SOURCE.rglob("*.py"):
        assert not {cls, name.removesuffix(".py"), "toy_quiz"} & set(re.findall(r"\w+", file.read_text())), file
