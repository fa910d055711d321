"""ScopeEdit's scope loss pair by pair, and what its edits promise alone, joined and one after another."""

import math

import pytest
import torch
from tests.quick import QUICK
from tests.reference import Case, training_batch

from instructedit.data.batch import Collator
from instructedit.editors import build_editor
from instructedit.editors.losses import LossWeights
from instructedit.editors.scope_edit import ALONE, AMONG_MANY
from instructedit.edits import LowRankEdit, MatchGate, ScopedEdit
from instructedit.evaluation.sequence import edit_sequence
from instructedit.lm import TokenBatch
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


def logit(lm, matcher, request, probe):
    """Of one pair, by the formula, without what a crowd costs."""
    states = [PromptStates(lm.context, lm.encode([(prompt, "it")]).prompts()) for prompt in (request, probe)]
    block, token_block = matcher.blocks
    k, q = (matcher.projection @ each(block)[0] for each in states)
    wanted, words = (each.tokens(token_block)[0][0] for each in states)
    weights = (wanted @ matcher.importance).softmax(0)
    matched = 0
    for state, weight in zip(wanted, weights, strict=True):
        own = matcher.token_projection @ state
        cosines = [torch.cosine_similarity(own, matcher.token_projection @ word, dim=0) for word in words]
        matched = matched + weight * torch.stack(cosines).max()
    level = matcher.levels
    distance = (q - k).square().sum()
    return level["bias"] - level["log_scale"].exp() * distance - level["log_sharpness"].exp() * (1 - matched)


def expected_loss(lm, editor, cases):
    """Each probe against its own request, and against all of them and none."""
    matcher, crowd = editor.matcher, editor.matcher.levels["crowd"]
    alone, among = {True: [], False: []}, {True: [], False: []}
    for own, case in enumerate(cases):
        probes = [(p, True) for p in (case.prompt, *(p for p, _ in case.wanted))]
        for probe, inside in probes + [(p, False) for p, _ in case.locality]:
            logits = [logit(lm, matcher, other.prompt, probe) for other in cases]
            alone[inside].append(-(logits[own] if inside else -logits[own]).sigmoid().log())
            counted = [
                each - crowd * math.log(len(cases))
                for number, each in enumerate(logits)
                if number == own or cases[number].prompt != probe
            ]
            place = [n for n in range(len(cases)) if n == own or cases[n].prompt != probe].index(own)
            scores = torch.stack([*counted, torch.zeros(())])
            among[inside].append(-scores.log_softmax(0)[place if inside else -1])
    return sum(
        share * torch.stack(part[True]).mean() + (1 - share) * torch.stack(part[False]).mean()
        for share, part in ((ALONE, alone), (AMONG_MANY, among))
    )


def test_the_scopes_loss_is_that_of_each_pair(lm):
    editor = new_editor(lm)
    batch = training_batch(lm, CASES)
    own = torch.cat([batch.in_scope.request_index, batch.locality.request_index])
    inside = torch.arange(len(own)) < len(batch.in_scope.request_index)
    rows = TokenBatch.cat(batch.tokens)
    asked = PromptStates(lm.context, rows.prompts(), rows)
    found, right = editor.matcher.loss(PromptStates(lm.context, batch.requests.tokens.prompts()), asked, own, inside)
    expected = expected_loss(lm, editor, CASES)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert 0 <= right <= 1
    parameters = list(editor.matcher.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(loss, parameters) for loss in (found, expected)), strict=True):
        assert theirs.norm() > 1e-7
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=2e-3)


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


def test_trained_on_a_few_cases_the_scope_tells_them_apart(lm):
    editor = new_editor(lm, embedding=16, token_embedding=16)
    batch = training_batch(lm, CASES[:2])
    own = torch.cat([batch.in_scope.request_index, batch.locality.request_index])
    inside = torch.arange(len(own)) < len(batch.in_scope.request_index)
    requests, asked = (
        PromptStates(lm.context, rows.prompts()) for rows in (batch.requests.tokens, TokenBatch.cat(batch.tokens))
    )
    optimizer = torch.optim.Adam(editor.matcher.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss, right = editor.matcher.loss(requests, asked, own, inside)
        loss.backward()
        optimizer.step()
    assert right == 1
    edit = editor.edit(REQUESTS[:2])
    prompts = [CASES[0].wanted[0][0], CASES[0].locality[0][0], CASES[1].prompt]
    chosen = edit.joined().choose(
        torch.zeros(3, dtype=torch.long), PromptStates(lm.context, lm.encode([(p, "it") for p in prompts]).prompts())
    )
    assert chosen.tolist() == [0, -1, 1]


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
