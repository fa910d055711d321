"""The embedded facts, corpus and datasets keep their promises."""

import random
from itertools import islice

import pytest

from instructedit.errors import UserError
from instructedit.instructions import InstructionBank, bank_names
from instructedit.tasks import load_records
from instructedit.testbed.corpus import documents, opinion, say
from instructedit.testbed.datasets import raw_records
from instructedit.testbed.world import RECENT_MIN_OBJECTS, split_of, world

TASKS = ("counterfact", "recent", "convsent", "zsre")
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def text():
    return "\n".join(documents(0, 3))


def test_there_are_enough_facts_and_relations():
    facts = world()
    assert 1000 <= len(facts.known) <= 3000
    assert len({f.relation for f in facts.known}) >= 25
    assert len({(f.subject, f.relation) for f in facts.facts}) == len(facts.facts)
    assert all(f.subject.strip() == f.subject and f.object for f in facts.facts)


def test_the_same_seed_gives_the_same_corpus_and_another_another():
    assert list(islice(documents(3, 1), 500)) == list(islice(documents(3, 1), 500))
    assert list(islice(documents(3, 1), 500)) != list(islice(documents(4, 1), 500))


def test_the_corpus_says_every_known_fact_again_and_again(text):
    facts, lines = world(), text.splitlines()
    for fact in facts.known[::40]:
        names = (fact.subject, *facts.aliases.get(fact.subject, ()))
        assert sum(fact.object in line and any(n in line for n in names) for line in lines) >= 4, fact


def test_the_corpus_never_says_what_recent_inserts(text):
    facts = world()
    assert len(facts.recent) >= 300
    for fact in facts.recent:
        for subject in (fact.subject, *facts.aliases.get(fact.subject, ())):
            for frame in (*fact.relation.statements, *fact.relation.questions, fact.relation.heldout):
                assert f"{fact.relation.fill(frame, subject)} {fact.object}." not in text
        if fact.relation.inverse:
            assert f"{fact.relation.inverse.format(o=fact.object)} {fact.subject}." not in text


def test_the_corpus_never_uses_a_relation_s_heldout_phrasing(text):
    for fact in world().known[::7]:
        assert fact.relation.fill(fact.relation.heldout, fact.subject) + " " + fact.object not in text
        assert fact.relation.heldout not in fact.relation.statements


def test_recent_facts_can_hardly_be_guessed():
    facts = world()
    assert min(len(facts.objects[f.relation]) for f in facts.recent) >= RECENT_MIN_OBJECTS


def test_no_bank_s_own_sentence_is_in_the_corpus(text):
    for name in bank_names():
        assert not any(d.text in text for d in InstructionBank.for_task(name).descriptions)


def test_splits_share_no_subject_in_any_task():
    owner = {}
    for task in TASKS:
        for split in SPLITS:
            for raw in raw_records(task, split):
                subject = raw.get("subject") or raw["ent"]
                assert owner.setdefault(subject, split) == split == split_of(subject)


def test_zsre_asks_relations_and_phrasings_that_no_training_task_has():
    facts = world()
    asked = {f.subject for f in facts.known if f.relation.asked_only}
    trained = [r for task in ("counterfact", "recent") for split in SPLITS for r in raw_records(task, split)]
    for raw in (r for split in SPLITS for r in raw_records("zsre", split)):
        assert raw["subject"] in asked
        assert raw["prompt"].endswith("?")
        assert raw["target_new"] not in raw["ground_truth"]
    assert not any(r["subject"] in asked or "?" in r["prompt"] for r in trained)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_the_real_readers_read_them(task, split):
    records, report = load_records(task, "tiny", split)
    assert records
    assert not {"duplicate edit", "target equals the old answer"} & set(report.dropped)
    assert all(r.of("locality") for r in records)
    if task != "convsent":
        assert all(len(r.of("generalization")) >= 1 for r in records)
        assert any(p.group == "Reasoning" for r in records for p in r.of("portability"))


def test_counterfact_changes_a_known_fact_and_recent_gives_the_true_one():
    facts = world()
    truth = {}
    for fact in facts.facts:
        truth.setdefault(fact.subject, set()).add(fact.object)
    for raw in raw_records("counterfact", "test"):
        assert raw["ground_truth"] in truth[raw["subject"]]
        assert raw["target_new"] != raw["ground_truth"]
    assert all(raw["target_new"] in truth[raw["subject"]] for raw in raw_records("recent", "test"))


def test_phrasings_are_drawn_afresh():
    facts = world()
    rng = random.Random(0)
    assert len({say(facts.known[0], rng, facts) for _ in range(60)}) > 8
    assert len({opinion("tea", rng) for _ in range(60)}) > 20


@pytest.mark.parametrize(("task", "split"), [("nothing", "train"), ("recent", "dev")])
def test_unknown_names_are_refused(task, split):
    with pytest.raises(UserError, match=r"nothing|dev"):
        raw_records(task, split)
