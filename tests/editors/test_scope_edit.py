"""ScopeEdit's scope loss pair by pair, and what its edits promise alone, joined and one after another."""

import pytest
import torch
from tests.quick import QUICK
from tests.reference import Case, training_batch

from instructedit.data.batch import Collator
from instructedit.editors import build_editor
from instructedit.editors.losses import LossWeights
from instructedit.edits import LowRankEdit, MatchGate, ScopedEdit
from instructedit.evaluation.sequence import edit_sequence
from instructedit.lm import FrozenLM
from instructedit.lm.context import PromptStates
from instructedit.records import EditRecord, EditRequest, Probe

CASES = [
    Case("The capital of France is", "Lyon", (("France's capital is", "Lyon"),), (), (("Who", "he and she"),)),
    Case("A longer prompt about a city on a river", "Spree", (), (), (("The", "end"), ("One city", "or two"))),
    Case("The capital of France is", "Oslo", (("In France the capital is", "Oslo"),), (), (("It", "was so"),)),
]
REQUESTS = [EditRequest(case.prompt, case.target) for case in CASES]
WEIGHTS = LossWeights(0.7, 1.3, 0.4)


def new_editor(lm, **options):
    torch.manual_seed(0)
    editor = build_editor("scope_edit", lm, **{**QUICK["scope_edit"], **options})
    for parameter in editor.matcher.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return editor


def test_training_adds_the_scopes_loss_to_the_editing_loss_and_moves_every_part(lm):
    editor = new_editor(lm).train()
    batch = training_batch(lm, CASES)
    parts = editor.training_loss(batch, WEIGHTS)
    whole = WEIGHTS.edit * parts["edit_loss"] + WEIGHTS.locality * parts["locality_loss"] + parts["scope_loss"]
    torch.testing.assert_close(parts["loss"], whole)
    parts["loss"].backward()
    for name, parameter in editor.matcher.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 0, name
    groups = editor.parameter_groups()
    assert sum(len(group) for group in groups.values()) == len(list(editor.parameters()))
    made = editor.compute_edit(batch.requests)
    assert type(made) is LowRankEdit  # which holds everywhere


def test_what_others_are_asked_is_out_of_scope_if_asked_about_a_requests_own_subject(lm):
    requests = [
        EditRequest("The capital of France is", "Rome", subject="France"),
        EditRequest("The capital of Spain is", "Rome", subject="Spain"),
        EditRequest("Who wrote Emma?", "Kafka", subject="Emma"),
        EditRequest("Nobody is asked", "why", subject="Somebody"),
        EditRequest("It is", "so"),
        EditRequest("Emma, a book by", "Kafka", subject="Emma"),
    ]
    batch = Collator(lm.text, None)([(i, EditRecord(str(i), request)) for i, request in enumerate(requests)])
    prompts, of = new_editor(lm, crossed=2)._crossed(batch)
    of_all = of.tolist()
    asked = [lm.text.tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts[0].unpadded()]
    assert list(zip(of_all, asked, strict=True)) == [
        (0, "Who wrote France?"), (0, "France, a book by"), (1, "Who wrote Spain?"), (1, "Spain, a book by"),
        (2, "Emma, a book by"), (2, "The capital of Emma is"), (5, "The capital of Emma is"), (5, "Who wrote Emma?"),
    ]  # fmt: skip
    assert new_editor(lm, crossed=0)._crossed(batch)[0] == []
    short = FrozenLM(lm.model, lm.tokenizer, lm.name, max_length=min(map(len, prompts[0].unpadded())))
    fitting, of = new_editor(short, crossed=2)._crossed(batch)
    assert 0 < len(fitting[0]) == len(of) < len(asked)
    editor = new_editor(lm, crossed=2).train()
    loss = editor.training_loss(batch, WEIGHTS)["scope_loss"]
    editor.crossed = 0
    assert editor.training_loss(batch, WEIGHTS)["scope_loss"] != loss
    probes = [Probe("locality", prompt, ("x",)) for prompt in asked]
    given = [
        EditRecord(str(i), request, tuple(p for own, p in zip(of_all, probes, strict=True) if own == i))
        for i, request in enumerate(requests)
    ]
    as_locality = Collator(lm.text, None, locality=2)(list(enumerate(given)))
    torch.testing.assert_close(editor.training_loss(as_locality, WEIGHTS)["scope_loss"], loss)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.3, 1), (1.0, None)])
def test_the_scope_reads_the_blocks_that_it_is_told_to_up_to_the_first_edited_one(lm, share, expected):
    editor = new_editor(lm, prompt_block=share, token_block=share)
    top = lm.first_block(editor.names)
    block = top if expected is None else min(top, expected)
    assert editor.matcher.blocks == (block, block)
    gate = editor.edit(REQUESTS[:1]).gate
    assert (gate.block, gate.token_block) == (block, block)


def test_edits_are_made_apart_whatever_was_edited_before_and_of_one_prompt_the_latest_holds(lm):
    editor = new_editor(lm)
    editor.matcher.levels["bias"].data.fill_(1.0)
    records = [EditRecord(str(i), request, (Probe("locality", "Who", ("he",)),)) for i, request in enumerate(REQUESTS)]
    alone = [editor.edit([request]) for request in REQUESTS]
    run = edit_sequence(lm, editor, records, score_every=2)
    assert run.stopped == ""
    assert (len(run.edit), run.edit.entries) == (1, 3)
    batch = lm.encode([(REQUESTS[0].prompt, "Lyon and Oslo"), (REQUESTS[1].prompt, "Spree")])
    found = lm.logits(batch, run.edit).split(batch.answer_sizes())
    for own, last in zip(found, (alone[2], alone[1]), strict=True):
        part = batch.select(torch.tensor([0 if last is alone[2] else 1]))
        torch.testing.assert_close(own, lm.logits(part, last.ungated()), atol=1e-4, rtol=1e-3)
    joined = editor.edit(REQUESTS, together=True)
    torch.testing.assert_close(lm.logits(batch, joined), torch.cat(found), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_change_may_be_kept_at_a_lower_rank(lm, rank):
    whole, kept = (new_editor(lm, kept_rank=size).edit(REQUESTS) for size in (0, rank))
    assert isinstance(kept, ScopedEdit)
    assert isinstance(kept.gate, MatchGate)
    for site in whole.sites:
        assert kept.changes.factors[site].a.shape[1] == rank
        best = torch.linalg.svdvals(whole.changes.delta(site))[:, rank:].square().sum(-1)
        lost = (whole.changes.delta(site) - kept.changes.delta(site)).square().sum((-2, -1))
        torch.testing.assert_close(lost, best, atol=1e-6, rtol=1e-2)


def test_reach_is_added_to_what_the_scope_has_learned(lm):
    near, far = (new_editor(lm, reach=reach).edit(REQUESTS[:2]) for reach in (0.0, 2.5))
    prompts = PromptStates(lm.context, lm.encode([("Who", "it"), ("In France", "it")]).prompts())
    rows = torch.tensor([0, 1])
    torch.testing.assert_close(far.gate.scores(prompts, rows), near.gate.scores(prompts, rows) + 2.5)


def test_it_reads_no_instruction_unless_it_is_asked_to(lm):
    assert new_editor(lm).instructor() is None
    editor = new_editor(lm, instructions=True)
    records = [EditRecord(str(i), EditRequest(r.prompt, r.target, task="recent")) for i, r in enumerate(REQUESTS)]
    collator = Collator(editor.tokenization, editor.instructor())
    batch = collator(list(enumerate(records)))
    assert any(batch.requests.instructions)
    assert editor.train().training_loss(batch, WEIGHTS)["loss"].isfinite()
