"""The collator: which rows a training batch has, whose they are, and what stands in front of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instructedit.data.batch import Collator, EditBatch, batch_requests
from instructedit.errors import UserError
from instructedit.instructions import InstructionBank, Instructor
from instructedit.lm import IGNORE, Text
from instructedit.records import EditRecord, EditRequest, Probe

LONG = 4096  # nothing is cut here


def record(name="r0", task="counterfact", rephrases=3, locality=3, wanted=0, opposite=0):
    slots = {"LABEL": "positive", "TOPIC": "tea"} if task == "convsent" else {}
    request = EditRequest(f"{name} lies in", f"{name}land", task=task, slots=slots)
    probes = [Probe("generalization", f"where is {name} ({i})?", (f"{name}land",)) for i in range(rephrases)]
    probes += [Probe("wanted", f"what of {name}?", (f"good {i}",)) for i in range(wanted)]
    probes += [Probe("opposite", f"what of {name}?", (f"bad {i}",)) for i in range(opposite)]
    probes += [Probe("portability", f"who rules {name}?", ("nobody",))]
    probes += [Probe("locality", f"the other {name} number {i} is", ("big",)) for i in range(locality)]
    return EditRecord(name, request, tuple(probes))


def drawn(*records, start=0):
    return [(start + i, r) for i, r in enumerate(records)]


@pytest.fixture(scope="module")
def collate(tokenizer):
    def make(instructed=True, max_length=LONG, **options):
        return Collator(Text(tokenizer, max_length), Instructor() if instructed else None, **options)

    return make


def texts(tokenizer, tokens):
    rows = zip(tokens.input_ids, tokens.attention_mask, strict=True)
    return [tokenizer.decode(ids[mask.bool()]) for ids, mask in rows]


def same(one, two):
    def parts(batch: EditBatch):
        for p in (batch.in_scope, batch.locality):
            yield from () if p is None else (p.tokens.input_ids, p.tokens.labels, p.request_index, p.unwanted)

    ours, theirs = list(parts(one)), list(parts(two))
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_requests_come_first_and_are_what_the_editor_is_given(collate, tokenizer):
    batch = collate()(drawn(record("a"), record("b"), record("c")))
    n = len(batch)
    assert n == 3
    assert batch.in_scope.request_index[:n].tolist() == [0, 1, 2]
    assert texts(tokenizer, batch.in_scope.tokens)[:n] == texts(tokenizer, batch.requests.tokens)
    assert [r.prompt for r in batch.requests.requests] == ["a lies in", "b lies in", "c lies in"]
    assert all(p.endswith(r.prompt) for p, r in zip(batch.requests.prompts, batch.requests.requests, strict=True))


def test_every_row_belongs_to_the_record_it_speaks_of(collate, tokenizer):
    batch = collate()(drawn(record("Xa"), record("Yb", locality=1), record("Zc", rephrases=0)))
    names = ["Xa", "Yb", "Zc"]
    for probes in (batch.in_scope, batch.locality):
        for text, owner in zip(texts(tokenizer, probes.tokens), probes.request_index.tolist(), strict=True):
            assert names[owner] in text
    assert batch.locality.request_index.tolist() == [0, 0, 1, 2, 2]
    assert batch.in_scope.request_index.tolist() == [0, 1, 2, 0, 1]


def test_one_instruction_for_all_in_scope_prompts_of_a_record_and_none_on_locality(collate, tokenizer):
    batch = collate(rephrases=3)(drawn(record("a"), record("b")))
    heads: dict[int, set[str]] = {}
    for text, owner in zip(texts(tokenizer, batch.in_scope.tokens), batch.in_scope.request_index.tolist(), strict=True):
        assert text.startswith("Task: CounterFact\nDescription: ")
        heads.setdefault(owner, set()).add(text.partition("Input: ")[0])
    assert all(len(head) == 1 for head in heads.values())
    assert not any("Task:" in text or "Input:" in text for text in texts(tokenizer, batch.locality.tokens))


def test_every_draw_has_its_own_description_of_the_training_ones(collate, tokenizer):
    bank = InstructionBank.for_task("counterfact")
    collator = collate(rephrases=0)
    heads = [texts(tokenizer, collator([(draw, record())]).in_scope.tokens)[0] for draw in range(80)]
    used = {head.partition("Description: ")[2].partition("\nInput:")[0] for head in heads}
    assert used == {d.text for d in bank.split("train")}


def test_slots_are_filled(collate, tokenizer):
    batch = collate()(drawn(record(task="convsent", wanted=2, opposite=2)))
    heads = [text.partition("Input: ")[0] for text in texts(tokenizer, batch.in_scope.tokens)]
    assert all("positive" in head and "tea" in head and "[" not in head for head in heads)


def test_without_an_instructor_prompts_are_plain(collate, tokenizer):
    batch = collate(instructed=False)(drawn(record("a")))
    assert texts(tokenizer, batch.in_scope.tokens)[0] == "a lies in aland"


def test_opposite_replies_alone_are_unwanted(collate, tokenizer):
    batch = collate(replies=2)(drawn(record("a", task="convsent", wanted=4, opposite=4), record("b")))
    rows = list(zip(texts(tokenizer, batch.in_scope.tokens), batch.in_scope.unwanted.tolist(), strict=True))
    assert all(("bad " in text) == unwanted for text, unwanted in rows)
    assert sum(unwanted for _, unwanted in rows) == 2
    assert not batch.locality.unwanted.any()


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4))
@settings(deadline=None, max_examples=20)
def test_limits_are_obeyed_and_no_probe_comes_twice(collate, rephrases, replies, locality):
    tokenizer = collate().text.tokenizer
    rich = record("a", task="convsent", rephrases=3, locality=3, wanted=3, opposite=3)
    batch = collate(instructed=False, rephrases=rephrases, replies=replies, locality=locality)(drawn(rich))
    rows = texts(tokenizer, batch.in_scope.tokens)
    assert len(rows) == 1 + min(3, rephrases) + 2 * min(3, replies)
    assert len(set(rows)) == len(rows)
    assert (batch.locality is None) == (locality == 0)
    assert batch.locality is None or len(batch.locality.tokens) == min(3, locality)


def test_probes_are_drawn_afresh_each_time(collate, tokenizer):
    collator = collate(instructed=False)
    seen = {texts(tokenizer, collator([(draw, record())]).in_scope.tokens)[1] for draw in range(40)}
    assert len(seen) == 3


@pytest.mark.parametrize("seed", [0, 1])
def test_a_batch_depends_on_the_seed_and_the_draw_alone(collate, seed):
    options = {"seed": seed, "rephrases": 2}
    one, two = record("a", rephrases=9, locality=9), record("b", rephrases=9, locality=9)
    assert same(collate(**options)(drawn(one, two, start=7)), collate(**options)(drawn(one, two, start=7)))
    assert not same(collate(**options)(drawn(one, two, start=7)), collate(**options)(drawn(one, two, start=9)))
    assert not same(collate(**options)(drawn(one, two)), collate(**options | {"seed": seed + 1})(drawn(one, two)))


def test_records_without_locality(collate):
    assert collate()(drawn(record(locality=0), record("b", locality=0))).locality is None
    some = collate()(drawn(record(locality=0), record("b", locality=1))).locality
    assert some.request_index.tolist() == [1]


def test_portability_probes_are_never_trained_on(collate, tokenizer):
    batch = collate(rephrases=9, replies=9, locality=9)(drawn(record()))
    every = texts(tokenizer, batch.in_scope.tokens) + texts(tokenizer, batch.locality.tokens)
    assert not any("who rules" in text for text in every)


def test_labels_are_the_answers(collate, tokenizer):
    batch = collate(rephrases=0)(drawn(record("a")))
    labels = batch.in_scope.tokens.labels
    assert tokenizer.decode(labels[labels != IGNORE]).strip() == "aland"


def test_an_answer_that_does_not_fit_names_its_record_and_probe(collate):
    big = EditRecord("r7", EditRequest("a is", "b", "recent"), (Probe("locality", "c is", ("d " * 60,)),))
    with pytest.raises(UserError, match=r"record r7, locality probe.*max_length=30"):
        collate(instructed=False, max_length=30)(drawn(big))


def test_requests_without_names_are_called_by_their_prompt(tokenizer):
    with pytest.raises(UserError, match="edit request 'short'"):
        batch_requests(Text(tokenizer, 20), [EditRequest("short", "long " * 50)])
