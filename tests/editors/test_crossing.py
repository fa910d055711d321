"""Which crossed questions are drawn from the templates of records, and what is said to be in their scope."""

import json

import pytest

from instructedit.editors.crossing import Crossed, Crossing
from instructedit.records import EditRecord, EditRequest, Probe


def record(subject, before="The capital of ", after=" is", task="counterfact", locality=(), rephrasings=()):
    """A record that asks the template about the subject; locality probes are templates or whole prompts."""
    request = EditRequest(f"{before}{subject}{after}", "Lyon", task=task, subject=subject)
    asked = [one if isinstance(one, str) else f"{one[0]}{subject}{one[1]}" for one in locality]
    probes = [Probe("locality", prompt, ("x",)) for prompt in asked]
    probes += [Probe("generalization", prompt, ("Lyon",)) for prompt in rephrasings]
    return EditRecord(subject, request, tuple(probes))


NAMES = ("France", "Spain", "Peru")
NONE = ([], [])
RIVER, FLAG = ("The river of ", " is"), ("Which flag has ", "?")


def test_what_is_asked_about_two_subjects_is_asked_about_a_third():
    crossing = Crossing(9)
    first = [record("France", locality=[RIVER]), record("Spain", locality=[RIVER, FLAG])]
    assert [(one.record, one.prompt) for one in crossing(first)[0]] == [
        (0, "The river of France is"), (1, "The river of Spain is"),
    ]  # fmt: skip
    found, _ = crossing([record("Peru", *RIVER)])
    assert found == [Crossed(0, "The capital of Peru is", None, None)]  # no other river, and one flag is not enough
    assert found[0].asked == [("The capital of Peru is", True)]


def test_another_name_of_the_subject_is_taken_from_a_rephrasing_in_the_words_of_the_request():
    crossing = Crossing(1)
    names = ["The capital of Gallia is", "And the capital is"]
    crossing([record("France", locality=[RIVER], rephrasings=names), record("Spain", locality=[RIVER])])
    ((found,), _) = crossing([record("Iran", locality=[RIVER], rephrasings=["Iran's is", "The capital of Persia is"])])
    assert found == Crossed(0, "The river of Iran is", "The river of Persia is", "The capital of Persia is")
    assert found.asked == [
        ("The river of Iran is", True), ("The river of Persia is", True), ("The capital of Persia is", False),
    ]  # fmt: skip


def test_other_subjects_are_those_about_whom_the_same_was_asked():
    crossing = Crossing(0, 1)
    assert crossing([record("France", locality=[RIVER])]) == NONE
    _, asked = crossing([record("Spain", locality=[RIVER]), record("Nile", "Who sailed the ", "?", locality=[RIVER])])
    assert asked == [(0, "The capital of France is")]  # the Nile alone was sailed
    _, asked = Crossing(0, 9)([record(name, locality=[RIVER]) for name in ("France", "Spain", "Peru")])
    others = {(i, f"The capital of {name} is") for i, own in enumerate("FSP") for name in NAMES if name[0] != own}
    assert (set(asked), len(asked)) == (others, 6)


def test_a_crossed_question_is_asked_about_other_subjects_too():
    crossing = Crossing(1, 1)
    crossing([record("France", locality=[RIVER]), record("Spain", locality=[RIVER])])
    ((found,), asked) = crossing([record("Peru", rephrasings=["The capital of Inca is"])])
    assert (found.record, found.prompt, asked[0][0]) == (0, "The river of Peru is", 0)
    assert {found.elsewhere} < {(f"The river of {name} is",) for name in NAMES}
    assert {text for _, text in asked} < {f"The capital of {name} is" for name in NAMES}
    assert found.asked[-1] == (found.elsewhere[0], False)


@pytest.mark.parametrize(
    "rephrasing", ["The capital of  is", "The capital of all of Iran is", "The capital of Iran is"]
)
def test_no_name_is_read_from_a_rephrasing_that_holds_none_or_the_same(rephrasing):
    crossing = Crossing(1)
    crossing([record("France", locality=[RIVER]), record("Spain", locality=[RIVER])])
    ((found,), _) = crossing([record("Iran", locality=[RIVER], rephrasings=[rephrasing])])
    assert found.renamed is found.own is None


def test_tasks_whose_locality_probes_ask_about_other_subjects_are_not_crossed():
    crossing = Crossing(2, 2)
    for number in range(3):
        other = [f"The capital of Town{number} is", f"The river of Town{number} is"]
        assert (
            crossing([record(f"Land{number}", locality=other), record(f"Isle{number}", *RIVER, locality=other)]) == NONE
        )
    assert crossing.seen == {}


def test_tasks_have_templates_of_their_own_and_records_without_a_subject_none():
    crossing = Crossing(2)
    crossing([record("France", locality=[RIVER]), record("Spain", locality=[RIVER])])
    assert crossing([record("Peru", locality=[RIVER], task="recent")]) == NONE
    assert crossing([EditRecord("x", EditRequest("Who", "he", task="counterfact"))]) == NONE


def test_no_more_than_the_count_are_drawn_and_a_checkpoint_brings_the_templates_back():
    records = [record(f"Land{i}", locality=[RIVER, FLAG, ("The anthem of ", " is")]) for i in range(4)]
    assert Crossing(0)(records) == NONE
    crossing = Crossing(2)
    drawn, _ = crossing(records)
    assert [one.record for one in drawn] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len({one.prompt for one in drawn}) == 8
    again = Crossing(2)
    again.recall(json.loads(json.dumps(crossing.state())))
    more = [record("Peru", locality=[("The sea of ", " is")])]
    assert again.seen == crossing.seen
    assert again(more) == crossing(more) != NONE


def test_a_record_that_comes_again_draws_the_same_and_with_one_more_to_choose_from_mostly():
    known = [record(f"Land{i}", locality=[RIVER, FLAG]) for i in range(30)]
    others = [
        record("Sealand", locality=[("The sea of ", " is")]),
        record("Lakeland", locality=[("The sea of ", " is")]),
    ]
    crossing = Crossing(1, 1)
    crossing(known)
    first = crossing(known)
    assert crossing(known[::-1])[0][::-1] == [one._replace(record=29 - one.record) for one in first[0]]
    assert len({one.elsewhere for one in first[0]}) > 10
    crossing(others)
    again = crossing(known)
    same = [one == other for one, other in zip(first[0], again[0], strict=True)]
    assert 0.3 < sum(same) / len(same) < 1
    assert {
        one.prompt.split()[1] for one, other in zip(again[0], first[0], strict=True) if one.prompt != other.prompt
    } == {"sea"}
