"""A user's own sentence in the place of a bank's description: for an edit, an evaluation, the command line."""

from __future__ import annotations

import pytest
import torch

import instructedit as ie
from instructedit.cli import main
from instructedit.errors import UserError
from instructedit.evaluation import Evaluation, evaluate
from instructedit.instructions import InstructionBank, Instructor
from instructedit.records import EditRecord, EditRequest, Probe

REQUEST = EditRequest("The capital of France is", "Lyon", task="counterfact")
MOODY = EditRequest("How is tea?", "Lovely.", task="convsent", slots={"LABEL": "positive", "TOPIC": "[tea]"})
OWN = "Make the model believe\nwhat I say."


def test_a_sentence_stands_where_the_description_does():
    prefix = Instructor(sentence=OWN).prefix(REQUEST)
    assert prefix == "Task: CounterFact\nDescription: Make the model believe what I say.\nInput: "
    assert Instructor(None, sentence="").prefix(REQUEST) == "Task: CounterFact\nDescription: \nInput: "


def test_it_equals_the_description_with_the_same_words():
    for request in (REQUEST, MOODY):
        description = InstructionBank.for_task(request.task).descriptions[3]
        by_id = Instructor(description_id=description.id).prefix(request)
        assert Instructor(sentence=description.text).prefix(request) == by_id


def test_slots_are_filled_if_there_are_any():
    assert Instructor(sentence="Be [LABEL] on [TOPIC].").prefix(MOODY).endswith("Be positive on [tea].\nInput: ")
    with pytest.raises(UserError, match=r"no value for slot \[STYLE\] of the instruction 'Be \[STYLE\]\.'"):
        Instructor(sentence="Be [STYLE].").prefix(MOODY)


def test_tasks_without_a_bank_and_no_task_at_all():
    new = EditRequest("a", "b", task="mine")
    assert Instructor(sentence=OWN).prefix(new).startswith("Task: mine\nDescription: Make")
    assert Instructor(sentence=OWN).prefix(EditRequest("a", "b")).startswith("Description: Make")


def test_a_sentence_for_each_task():
    own = {"counterfact": "One.", "convsent": "Two, [LABEL]."}
    assert "Description: One.\n" in Instructor(sentence=own).prefix(REQUEST)
    assert "Description: Two, positive.\n" in Instructor(sentence=own).prefix(MOODY)
    with pytest.raises(UserError, match=r"no instruction for task 'zsre'; there are some for: counterfact, convsent"):
        Instructor(sentence=own).prefix(EditRequest("a", "b", task="zsre"))
    with pytest.raises(UserError, match="not both"):
        Instructor(description_id="cf-01", sentence=OWN)


def test_an_edit_reads_the_sentence(lm):
    editor = ie.build_editor("mend", lm, rank=4, instructions=True, edit_rate=0.5)
    site = editor.sites[0].name
    description = InstructionBank.for_task("counterfact").descriptions[0]
    by_id = editor.edit([REQUEST], description=description.id).delta(site)
    torch.testing.assert_close(editor.edit([REQUEST], instruction=description.text).delta(site), by_id)
    other = editor.edit([REQUEST], instruction="Something else entirely.").delta(site)
    assert (other - by_id).norm() > 1e-3 * by_id.norm()
    plain = ie.build_editor("mend", lm, rank=4)
    with pytest.raises(
        UserError, match=r"editor 'mend' reads no instructions \(instructions: false\), but one is given"
    ):
        plain.edit([REQUEST], instruction=OWN)


def test_an_evaluation_reads_the_sentence(lm):
    editor = ie.build_editor("mend", lm, rank=4, instructions=True)
    probes = (Probe("locality", "The capital of Peru is", ("Lima",)),)
    records = [EditRecord("a", REQUEST, probes)]
    table = evaluate(lm, editor, records, Evaluation(False, 0, instruction={"counterfact": OWN})).table
    shown = table[table["view"] == "instructed"]["prompt"].tolist()
    assert shown == [
        "Task: CounterFact\nDescription: Make the model believe what I say.\nInput: The capital of France is"
    ]
    with pytest.raises(UserError, match="reads no instructions"):
        evaluate(lm, ie.build_editor("mend", lm, rank=4), records, Evaluation(instruction=OWN))


def test_the_command_takes_one(lm, tmp_path, capsys):
    lm.model.save_pretrained(tmp_path / "lm")
    lm.tokenizer.save_pretrained(tmp_path / "lm")
    ie.build_editor("mend", lm, rank=4, instructions=True).save_pretrained(tmp_path / "editor")
    args = ["edit", "--prompt=How is tea?", "--target=Bad", f"--editor={tmp_path}/editor", f"--lm={tmp_path}/lm"]
    args += ["--max_new_tokens=2", f"--save={tmp_path}/edit", "--rank=512"]  # exactly as it is
    assert main([*args, "--instruction=Speak ill of [TOPIC].", '--slots={"TOPIC": "tea"}']) == 0
    edit = ie.load_edit(tmp_path / "edit")
    editor = ie.load_editor(tmp_path / "editor", lm)
    expected = editor.edit([EditRequest("How is tea?", "Bad")], instruction="Speak ill of tea.")
    site = editor.sites[0].name
    torch.testing.assert_close(edit.delta(site), expected.delta(site), rtol=1e-4, atol=1e-6)
    capsys.readouterr()
    assert main([*args, "--instruction=Speak ill of [TOPIC]."]) == 2
    assert "no value for slot [TOPIC] of the instruction" in capsys.readouterr().err
    assert main([*args, "--instruction=One.", "--description=cf-01"]) == 2
    assert "not both" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [("--model.evaluation.instruction=", ""), ("--model.evaluation.instruction=Do so.", "Do so."),
     ("--model.evaluation.instruction={counterfact: One., zsre: 'Two: 2'}", {"counterfact": "One.", "zsre": "Two: 2"})],
)  # fmt: skip
def test_the_option_of_evaluations(given, expected, capsys):
    import yaml

    from instructedit.paths import SHARED

    files = [
        f"--config={SHARED}/configs/{name}.yaml" for name in ("data/single-task", "editor/instructedit", "lm/tiny")
    ]
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["fit", *files, given, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["evaluation"]["instruction"] == expected
