"""Old names of public things: they work, and warn of the new ones."""

import json
import types
from dataclasses import dataclass

import pytest
import torch
from tests.conftest import random_lm

import instructedit.data.module
import instructedit.edits
import instructedit.lm
from instructedit import commands
from instructedit.data.module import DataLocation
from instructedit.editors import Editor
from instructedit.edits import IdentityEdit, load_edit
from instructedit.lm import LayerGradients, LayerIO, TokenScores


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (instructedit.lm, "Captured", LayerGradients),
        (instructedit.lm, "Seen", LayerIO),
        (instructedit.lm, "Judged", TokenScores),
        (instructedit.data.module, "Place", DataLocation),
        (instructedit.edits, "NoEdit", IdentityEdit),
    ],
)
def test_a_class_has_its_old_name(module, old, new):
    with pytest.warns(DeprecationWarning, match=f"{module.__name__}.{old} is deprecated: use {new.__name__}"):
        assert getattr(module, old) is new


def test_an_edit_of_nothing_that_an_earlier_version_saved_is_read(tmp_path):
    IdentityEdit(3).save_pretrained(tmp_path)
    card = json.loads((tmp_path / "edit.json").read_text())
    assert card["edit"] == "identity"
    (tmp_path / "edit.json").write_text(json.dumps(card | {"edit": "nothing"}))
    edit = load_edit(tmp_path)
    assert (type(edit), len(edit)) == (IdentityEdit, 3)
    with pytest.warns(DeprecationWarning, match=r"Edit\.changes_nothing is deprecated: use \.is_identity"):
        assert edit.changes_nothing


def test_unknown_names_of_modules_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'Caught'"):
        _ = instructedit.lm.Caught


def test_methods_of_the_lm_have_their_old_names(tokenizer):
    lm = random_lm("gpt2", tokenizer)
    batch = lm.encode([("The capital of France is", "Rome")])
    with pytest.warns(DeprecationWarning, match=r"FrozenLM\.words is deprecated: use \.token_ids"):
        assert getattr(lm, "words")(" Rome") == lm.token_ids(" Rome")  # noqa: B009
    with pytest.warns(DeprecationWarning, match=r"use \.scores\.predictions"):
        found = getattr(lm, "predictions")(batch)  # noqa: B009
    with pytest.warns(DeprecationWarning, match=r"TokenScores\.said is deprecated: use \.predicted"):
        assert torch.equal(getattr(found, "said"), found.predicted)  # noqa: B009


def test_an_editor_may_define_its_methods_under_their_old_names():
    with pytest.warns(DeprecationWarning, match=r"Old\.make is deprecated: use compute_edit"):

        class Old(Editor):
            def make(self, batch):
                return f"an edit of {batch}"

    editor = Old()
    assert editor.compute_edit("this") == editor.make("this") == "an edit of this"


@pytest.mark.parametrize(
    "given", [["--fresh", "--seed=1"], ["--fresh=true", "--seed=1"], ["--fresh", "true", "--seed=1"]]
)
def test_a_command_takes_an_option_under_its_old_name(monkeypatch, given):
    seen = {}

    def main(force: bool = False, seed: int = 0) -> None:
        """Does it.

        Args:
            force: Again.
            seed: Of it.
        """
        seen.update(force=force, seed=seed)

    module = types.SimpleNamespace(main=main, RENAMED={"fresh": "force"})
    monkeypatch.setattr(commands, "commands", lambda: {"it": module})
    with pytest.warns(DeprecationWarning, match="--fresh is deprecated: use --force"):
        commands.run_command("it", given)
    assert seen == {"force": True, "seed": 1}


def test_commands_whose_options_are_a_dataclass_run(monkeypatch):
    @dataclass
    class Command:
        """Does it.

        Args:
            word: What to say.
        """

        word: str = "no"

        def __call__(self) -> None:
            seen.append(self.word)

    seen = []
    monkeypatch.setattr(commands, "commands", lambda: {"it": types.SimpleNamespace(main=Command)})
    commands.run_command("it", ["--word=yes"])
    commands.run_command("it", [])
    assert seen == ["yes", "no"]
