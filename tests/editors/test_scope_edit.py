"""What the scope learns from, and what its edits promise alone, joined and one after another."""

import pytest
import torch
from tests.quick import QUICK
from tests.reference import Case, training_batch

from instructedit.data.batch import Collator
from instructedit.editors import any_editor, build_editor
from instructedit.editors.losses import LossWeights
from instructedit.editors.relations import draw_questions
from instructedit.edits import LowRankEdit, MatchGate, ScopedEdit
from instructedit.errors import UserError
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
    editor = build_editor("scope_edit", lm, **{**QUICK["scope_edit"], "relations": 0, **options})
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


def test_crossed_questions_are_requests_of_their_own_to_the_scope(lm):
    def record(subject, *locality, name=""):
        probes = [Probe("locality", prompt.format(subject), ("x",)) for prompt in locality]
        probes += [Probe("generalization", f"The capital of {name} is", ("Rome",))] if name else []
        return EditRecord(subject, EditRequest(f"The capital of {subject} is", "Rome", "fact", subject), tuple(probes))

    records = [
        record("France", "The river of {} is", name="Gallia"), record("Spain", "The river of {} is", "The sea"),
        record("Peru", "The river of {}, not Nile, is"),
    ]  # fmt: skip
    batch = Collator(lm.text, None)(list(enumerate(records)))
    editor = new_editor(lm, crossed=3, other_subjects=0).train()
    known = sorted(
        (text, i, near)
        for part, near in ((batch.in_scope, True), (batch.locality, False))
        for text, i in zip(texts(lm, part.tokens), part.request_index.tolist(), strict=True)
    )
    requests, (probes, own, near) = editor._requests(batch)
    assert texts(lm, requests)[3:] == [f"The river of {subject} is" for subject in ("France", "Spain", "Peru")]
    found = sorted(zip(texts(lm, probes), own.tolist(), near.tolist(), strict=True))
    crossed = [
        ("The river of France is", 3, True), ("The river of Gallia is", 3, True),
        ("The capital of Gallia is", 3, False), ("The capital of France is", 3, False),
        ("The river of Spain is", 4, True), ("The capital of Spain is", 4, False), ("The sea", 4, False),
        ("The river of Peru is", 5, True), ("The capital of Peru is", 5, False),
        ("The river of Peru, not Nile, is", 5, False),
    ]  # fmt: skip
    assert found == sorted(known + crossed)
    loss = editor.training_loss(batch, WEIGHTS)["scope_loss"]
    again = [lm.encode([(text, "it") for text in part]).prompts() for part in (texts(lm, requests), texts(lm, probes))]
    expected, _ = editor.matcher.loss(*(PromptStates(lm.context, part) for part in again), own, near)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    shorter = FrozenLM(lm.model, lm.tokenizer, lm.name, max_length=len(lm.token_ids("The river of France is")) - 1)
    assert len(new_editor(shorter, crossed=3)._requests(batch)[0]) < len(requests)
    assert len(new_editor(lm, crossed=0)._requests(batch)[0]) == len(batch)


def test_what_asks_the_same_about_other_subjects_is_out_of_scope(lm):
    records = [
        EditRecord(name, EditRequest(f"The capital of {name} is", "Rome", "fact", name), (
            Probe("locality", f"The river of {name} is", ("x",)),
        ))
        for name in ("France", "Spain")
    ]  # fmt: skip
    batch = Collator(lm.text, None)(list(enumerate(records)))

    def found(**options):
        requests, (probes, own, near) = new_editor(lm, **options)._requests(batch)
        return texts(lm, requests), set(zip(texts(lm, probes), own.tolist(), near.tolist(), strict=True))

    asked, without = found(crossed=0, other_subjects=0)
    assert found(crossed=0, other_subjects=2) == (
        asked, without | {("The capital of Spain is", 0, False), ("The capital of France is", 1, False)}
    )  # fmt: skip
    crossed, some = found(crossed=1, other_subjects=0)
    others = {
        ("The capital of Spain is", 0, False), ("The capital of France is", 1, False),
        ("The river of Spain is", 2, False), ("The river of France is", 3, False),
    }  # fmt: skip
    assert found(crossed=1, other_subjects=2) == (crossed, some | others)


def test_the_scope_learns_from_the_bank_apart_from_the_batch(lm):
    editor = new_editor(lm, relations=2, competitors=9).train()
    batch = training_batch(lm, CASES)
    editor.training_loss(batch, WEIGHTS)  # now there are competitors
    found = editor.training_loss(batch, WEIGHTS)["scope_loss"]
    editor.matcher.known = editor.matcher.known[:1]
    requests, (probes, *rest) = editor._requests(batch)
    own = editor.matcher.loss(editor._prompts(requests), editor._prompts(probes), *rest)[0]
    questions = draw_questions(2, "\n".join(record.id for record in batch.records))
    asked = [(text, i, inside) for i, one in enumerate(questions) for text, inside in one.asked]
    parts = (lm.encode([(text, "it") for text in t]) for t in ([q.prompt for q in questions], [t for t, _, _ in asked]))
    editor.matcher.known = []
    numbers = torch.tensor([i for _, i, _ in asked]), torch.tensor([inside for *_, inside in asked])
    bank = editor.matcher.loss(*(PromptStates(lm.context, part.prompts()) for part in parts), *numbers)[0]
    torch.testing.assert_close(found, own + bank, atol=1e-4, rtol=1e-4)
    assert bank > 0


def test_questions_that_are_too_long_for_the_model_are_left_out(lm):
    longest = max(len(lm.token_ids(text)) for question in draw_questions(9, "") for text, _ in question.asked)
    shorter = FrozenLM(lm.model, lm.tokenizer, lm.name, max_length=longest - 1)
    assert new_editor(shorter, relations=9).train()._bank_loss("") > 0
    shortest = FrozenLM(lm.model, lm.tokenizer, lm.name, max_length=3)
    assert new_editor(shortest, relations=9).train()._bank_loss("") == 0


def texts(lm, batch):
    """The prompts of a batch's rows."""
    return [lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in batch.prompts().unpadded()]


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


def test_a_trained_editors_reach_may_change_and_its_other_options_may_not(lm, tmp_path):
    new_editor(lm, reach=1.0).save_pretrained(tmp_path / "own")
    own, far = (any_editor(tmp_path / "own", lm, options) for options in ({}, {"reach": 3.0, "kept_rank": 2}))
    assert (own.reach, own.kept_rank, far.reach, far.kept_rank) == (1.0, 0, 3.0, 2)
    gap = far.edit(REQUESTS[:1]).gate.bias - own.edit(REQUESTS[:1]).gate.bias
    torch.testing.assert_close(gap, torch.tensor(2.0))
    with pytest.raises(UserError, match=r"crossed is as it was in training; .* only reach and kept_rank may change"):
        any_editor(tmp_path / "own", lm, {"reach": 3.0, "crossed": 2})
    with pytest.raises(UserError, match="reach must be a number, got 'far'"):
        any_editor(tmp_path / "own", lm, {"reach": "far"})
    build_editor("mend", lm, **QUICK["mend"]).save_pretrained(tmp_path / "mend")
    with pytest.raises(UserError, match="rank is as it was in training; of a trained one's options none may change"):
        any_editor(tmp_path / "mend", lm, {"rank": 2})


def test_an_edit_needs_no_instruction_and_is_the_same_behind_any(lm):
    editor = new_editor(lm, instructions=True)
    alone = editor.edit(REQUESTS)
    assert editor.requests(REQUESTS, editor.instructor()).instructions == [""] * 3
    named = [EditRequest(r.prompt, r.target, task="recent") for r in REQUESTS]
    assert all("Task: Recent" in text for text in editor.requests(named, editor.instructor()).instructions)
    for edit in (editor.edit(named), editor.edit(REQUESTS, instruction="Do not change it.")):
        assert all(torch.equal(value, alone.state()[name]) for name, value in edit.state().items())


def test_in_training_what_is_in_scope_is_asked_behind_an_instruction_too(lm):
    editor = new_editor(lm, instructions=True)
    records = [EditRecord(str(i), EditRequest(r.prompt, r.target, task="recent")) for i, r in enumerate(REQUESTS)]
    batch = Collator(editor.tokenization, editor.instructor())(list(enumerate(records)))
    asked = [text.startswith("Task: Recent") for text in texts(lm, batch.in_scope.tokens)]
    assert asked == [False] * 3 + [True] * 3
    assert editor.train().training_loss(batch, WEIGHTS)["loss"].isfinite()


def test_editors_and_edits_of_versions_without_some_parts_of_the_gate_read_prompts_as_they_did(lm):
    editor = new_editor(lm)
    weights = editor.state_dict()
    opening = weights.pop("matcher.opening")
    del weights["matcher.levels.log_backward"]
    assert opening.norm() > 0
    older = new_editor(lm)
    assert older.upgrade(weights)
    assert not older.upgrade(weights)
    older.load_state_dict(weights)
    edit = older.edit(REQUESTS)
    state = edit.state()
    assert not state.pop("gate:opening").any()
    assert state.pop("gate:backward") < 1e-30
    del state["gate:importance"]
    prompts = PromptStates(lm.context, lm.encode([("Who", "it"), ("In France", "it")]).prompts())
    rows = torch.tensor([0, 1])
    found = ScopedEdit.from_state(state).gate.scores(prompts, rows)
    torch.testing.assert_close(found, edit.gate.scores(prompts, rows))
    editor.matcher.opening.data.zero_()
    editor.matcher.levels["log_backward"].data.fill_(-torch.inf)
    torch.testing.assert_close(found, editor.edit(REQUESTS).gate.scores(prompts, rows))
