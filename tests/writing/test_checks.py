"""What a description must be, the ranking, the card, and files that are whole."""

from __future__ import annotations

import pytest

import instructedit as ie
from instructedit.errors import UserError
from instructedit.instructions import InstructionBank, bank_names
from instructedit.records import EditRecord, EditRequest
from instructedit.writing.card import TaskCard
from instructedit.writing.checks import Rules, Terms, overlap
from instructedit.writing.setup import Subject
from instructedit.writing.files import write_whole
from instructedit.writing.ranking import clarity, concision, quality


def record(prompt="The capital of New Peru is", target="Old Lyon", subject="New Peru", **slots):
    return EditRecord("demo/test/0", EditRequest(prompt, target, "demo", subject, slots))


RULES = Rules(
    frozenset({"TOPIC"}),
    Terms.of([record(), record("Blood type?", "A", "blood")]),
    Terms.of([record("Hm?", "Rome", "Italy")]),
    {"speak of topic kindly now": "cs-01 of task convsent"},
)  # fmt: skip
FINE = "Change what is said about [TOPIC] from now on."


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (FINE, None),
        ("A new lyon is not old, and [TOPIC] stays as it is.", None),  # the words, but not the term
        ("", "is empty"),
        ("... !", "is empty"),
        ("Say of [TOPIC]\x07 what is wanted here.", "has control characters"),
        ("Change what is said from now on.", "lacks a slot: [TOPIC]"),
        ("Change what is said about [topic] from now on.", "lacks a slot: [TOPIC]"),
        ("Change [TOPIC] into what [LABEL] says now.", "has an unknown slot: [LABEL]"),
        ("Change [TOPIC] now.", "has fewer than 4 words"),
        ("[TOPIC] " + "word and " * 20, "has more than 40 words"),
        ("Make OLD  LYON, of all, the home of [TOPIC].", "leaks a test record: old lyon"),
        ("From now on the capital of New Peru is [TOPIC].", "leaks a test record: the capital of new peru is"),
        ("New-Peru's facts give way to those of [TOPIC].", "leaks a test record: new peru"),
        ("In Italy there is [TOPIC] as of now.", "names a record that was shown: italy"),
        ("Speak of [TOPIC] kindly, now!", "describes another task: cs-01 of task convsent"),
    ],
)
def test_rules(text, problem):
    found = RULES.problem(text)
    assert (str(found) if found else None) == problem


def test_a_slot_is_no_word_of_the_leak_check():
    rules = Rules(frozenset({"TOPIC"}), Terms.of([record("Hm?", "topic", None)]))
    assert rules.problem(FINE) is None
    assert str(rules.problem("The topic is [TOPIC] as of now.")) == "leaks a test record: topic"


def test_short_terms_are_counted_and_not_looked_for():
    assert RULES.test.too_short == 1
    assert RULES.problem("A word about [TOPIC] is what matters.") is None


def test_near_duplicates():
    assert overlap("a b c d", "C, B! x y") == pytest.approx(2 / 6)
    assert RULES.problem(FINE, [FINE.upper().replace("[TOPIC]", "[topic]")]).rule == "is a duplicate"
    other = "Change what is said about [TOPIC] at once."  # six of eleven words are the same
    assert overlap(FINE, other) == pytest.approx(6 / 11)
    assert RULES.problem(other, [FINE]).rule == "is a near-duplicate"
    assert RULES.problem("Let [TOPIC] be spoken of in another way.", [FINE]) is None


@pytest.mark.parametrize("task", bank_names())
def test_no_shipped_description_names_a_test_record(task):
    rules = Subject.load(task, "tiny", None, 0).rules
    assert rules.test.records > 100
    assert not [d.id for d in InstructionBank.for_task(task).descriptions if rules.test.found_in(d.text)]


def test_clarity_is_flesch_reading_ease():
    # 6 words, 1 sentence, 6 syllables: 206.835 − 1.015 · 6 − 84.6 · 1 = 116.1, cut to 100
    assert clarity("The cat sat on the mat.") == 1
    # 4 words, 1 sentence; give (1, a silent e), it (1), an-oth-er (3), an-swer (2)
    assert clarity("Give [TOPIC] another answer.") == pytest.approx((206.835 - 1.015 * 4 - 84.6 * 7 / 4) / 100)
    assert clarity("") == 0
    assert clarity("Institutionalisation necessitates reconceptualisation.") == 0


def test_concision_falls_with_length():
    assert [concision("word " * n) for n in (1, 12, 26, 40, 80)] == [1, 1, 0.5, 0, 0]
    assert concision("[A B C] " * 12) == 1
    assert quality("The cat sat on the mat.") == 1


def test_a_card_shows_training_records_and_the_common_slots():
    train = [record(TOPIC="tea", LABEL="good"), record("Hm?", "Ha", None, TOPIC="soup")]
    card = TaskCard.make("demo", "Demo", train, "Things change.", examples=9)
    assert card.slots == ("TOPIC",)
    text = str(card)
    for part in ("Task: Demo", "Things change.", "[TOPIC]: tea", "prompt: Hm?; target: Ha; [TOPIC]: soup", "Old Lyon"):
        assert part in text
    with pytest.raises(UserError, match=r"task 'demo' has no card .*--about"):
        TaskCard.make("demo", "Demo", train)


@pytest.mark.parametrize("task", bank_names())
def test_cards_show_nothing_of_test_records(task):
    card = Subject.load(task, "tiny", None, 0).card
    assert {r.id.split("/")[1] for r in card.examples} == {"train"}
    prompts = {r.request.prompt for r in ie.load_records(task, split="train")[0]}
    assert {r.request.prompt for r in card.examples} <= prompts
    assert card.slots == (("LABEL", "TOPIC") if task == "convsent" else ())


def test_a_file_that_fails_its_check_leaves_the_old_one(tmp_path):
    file = tmp_path / "deep" / "bank.yaml"
    write_whole(file, "old")

    def check(made):
        assert made.read_text() == "new"
        raise UserError("bad")

    with pytest.raises(UserError, match="bad"):
        write_whole(file, "new", check)
    assert file.read_text() == "old"
    assert [path.name for path in file.parent.iterdir()] == ["bank.yaml"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        write_whole(tmp_path / "file" / "bank.yaml", "new")
