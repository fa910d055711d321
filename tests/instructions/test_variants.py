"""What becomes of an instruction when it is asked whether an editor reads it."""

from __future__ import annotations

import pytest

from instructedit.errors import UserError
from instructedit.evaluation import Evaluation
from instructedit.instructions import Instructor
from instructedit.records import EditRequest

FACT = EditRequest("The capital of France is", "Lyon", task="counterfact")
OPINION = EditRequest("What of Java?", "Lovely.", task="convsent", slots={"LABEL": "positive", "TOPIC": "Java"})


def prefix(variant: str, request: EditRequest = FACT, key: str = "7") -> str:
    return Instructor(variant=variant).prefix(request, key=key)  # type: ignore[arg-type]


@pytest.mark.parametrize("request_", [FACT, OPINION])
def test_shuffled_words_are_the_instructions_own(request_: EditRequest) -> None:
    own, shuffled = prefix("own", request_), prefix("shuffled", request_)
    assert shuffled != own
    assert sorted(shuffled.split()) == sorted(own.split())
    assert shuffled.endswith("\nInput: ")
    assert shuffled == prefix("shuffled", request_)
    if request_ is OPINION:
        assert "Java" in shuffled


@pytest.mark.parametrize(("request_", "title"), [(FACT, "Task: Recent\n"), (OPINION, "Task: CounterFact\n")])
def test_another_tasks_instruction_names_the_other_task(request_: EditRequest, title: str) -> None:
    assert prefix("other_task", request_).startswith(title)


def test_recent_requests_do_not_get_convsents_slots() -> None:
    request = EditRequest("Who leads X?", "Y", task="zsre")  # the last by name: ConvSent would be next
    assert prefix("other_task", request).startswith("Task: CounterFact\n")


def test_the_tasks_name_alone_and_nothing() -> None:
    assert prefix("task_name") == "Task: CounterFact\nInput: "
    assert prefix("left_out") == ""


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(UserError, match="unknown variant 'upside_down'"):
        prefix("upside_down")


@pytest.mark.parametrize("variant", ["other_task", "task_name", "left_out"])
def test_a_sentence_beside_a_variant_that_has_nothing_of_it_is_refused(variant: str) -> None:
    with pytest.raises(UserError, match=f"the variant {variant}, which has none of it"):
        Instructor(sentence="Change the fact.", variant=variant)  # type: ignore[arg-type]
    assert "Change" in Instructor(sentence="Change the fact.", variant="shuffled").prefix(FACT)


def test_evaluation_hands_the_variant_on(lm) -> None:  # type: ignore[no-untyped-def]
    import instructedit as ie

    editor = ie.build_editor("ft_l", lm, steps=1)
    assert Evaluation(variant="shuffled").instructor(editor) is None
    editor.instructions = True
    instructor = Evaluation(variant="shuffled").instructor(editor)
    assert instructor is not None
    assert instructor.prefix(FACT, key="7") == prefix("shuffled")


@pytest.mark.parametrize("task", [None, "", "flat", "my own"])
def test_where_instructions_are_optional_a_request_does_without_if_there_is_none(task: str | None) -> None:
    request = EditRequest("The capital of France is", "Lyon", task=task)
    assert Instructor(optional=True).prefix(request) == ""
    with pytest.raises(UserError, match=r"no task to instruct|flat|my own"):
        Instructor().prefix(request)
    assert Instructor(optional=True).prefix(FACT) == Instructor().prefix(FACT) != ""
    assert Instructor(optional=True, sentence="Change it.").prefix(request).endswith("Change it.\nInput: ")
