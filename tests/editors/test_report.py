"""Whether edits reach their targets: said by the methods that optimise, against the plain model with the edit in it."""

import warnings

import pytest
import torch
from tests.reference import edit_loss, tokens

from instructedit.editors import Editor, build_editor, editor_names
from instructedit.records import EditRequest
from instructedit.registry import plugin

PAIRS = [("The capital of France is", "Lyon"), ("Who", "a man of the sea"), ("A long prompt of a city", "or two of it")]
REQUESTS = [EditRequest(*pair, subject=pair[0][:3]) for pair in PAIRS]
OPTIMISING = {
    "ft_l": {"lr": 0.02, "bound": None, "steps": 40}, "calinet": {"lr": 0.05}, "grace": {"steps": 60},
    "t_patcher": {"text": "tiny", "memory": 100, "m": 0.1}, "rome": {"text": "tiny", "tokens": 2000, "contexts": 0},
    "memit": {"text": "tiny", "tokens": 2000, "contexts": 0},
    "alpha_edit": {"text": "tiny", "tokens": 2000, "contexts": 0}, "loc_ft": {"lr": 0.02, "steps": 40},
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INSTRUCTEDIT_CACHE", str(tmp_path / "cache"))


def edited(editor, requests, **options):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        edit = editor.edit(requests, **options)
    return edit, [str(w.message) for w in said if "target" in str(w.message)]


def predicts(model, tokenizer, prompt, target):
    front, back = tokens(tokenizer, prompt, target)
    with torch.no_grad():
        logits = model(torch.tensor([front + back])).logits[0]
    return logits[len(front) - 1 : -1].argmax(-1).tolist() == back


def test_exactly_the_methods_that_optimise_report():
    classes = {name: plugin(Editor, "instructedit.editors", name) for name in editor_names()}
    assert {name for name, cls in classes.items() if cls.REMEDY} == set(OPTIMISING)


@pytest.mark.parametrize("steps", [0, 3, 60])
def test_the_report_is_what_the_plain_model_says(lm, steps):
    editor = build_editor("ft_l", lm, lr=0.01, bound=None, steps=steps, blocks=[1], stop_below=1e-3)
    edit, said = edited(editor, REQUESTS)
    reached = []
    for i, pair in enumerate(PAIRS):
        model = lm.merge(edit[i])
        reached.append(predicts(model, lm.tokenizer, *pair))
        assert editor.report.losses[i] == pytest.approx(edit_loss(model, lm.tokenizer, *pair).item(), rel=1e-3)
    assert list(editor.report.reached) == reached
    assert len(said) == (not all(reached))
    if steps == 0:
        assert not any(reached)
        assert "editor 'ft_l': 3 of 3 requests did not reach their target" in said[0]
        assert f"'Who' → 'a man of the sea': loss {editor.report.losses[1]:.2g}" in said[0]
        assert "try a larger lr or bound, or more steps" in said[0]
    elif steps == 60:
        assert all(reached)


@pytest.mark.parametrize("name", OPTIMISING)
def test_a_method_that_does_not_move_says_so(lm, name):
    editor = build_editor(name, lm, **{**OPTIMISING[name], "steps": 0})
    _, said = edited(editor, REQUESTS)
    assert len(said) == 1
    assert f"editor '{name}': 3 of 3 requests did not reach their target" in said[0]
    assert editor.REMEDY in said[0]
    assert editor.report.reached == (False, False, False)


def test_one_edit_for_all_is_asked_every_request(lm):
    editor = build_editor("ft_l", lm, lr=0.01, bound=None, steps=100, blocks=[1])
    _, said = edited(editor, REQUESTS, together=True)
    assert not said
    assert len(editor.report.losses) == 3
    assert all(editor.report.reached)


def test_many_failures_are_one_line(lm):
    requests = [EditRequest(f"City number {i}", "Lyon") for i in range(9)]
    _, (line,) = edited(build_editor("ft_l", lm, steps=0), requests)
    assert "9 of 9 requests" in line
    assert line.count("→") == 3
    assert ", …)" in line
    assert "\n" not in line
