"""A matcher's loss pair by pair, the competitors that it remembers, and what it learns."""

import math

import pytest
import torch
from tests.editors.test_scope_edit import CASES, REQUESTS, new_editor
from tests.reference import training_batch

from instructedit.editors.losses import LossWeights
from instructedit.editors.matching import ALONE, AMONG_MANY
from instructedit.lm import TokenBatch
from instructedit.lm.context import PromptStates


def logit(lm, matcher, request, probe):
    """Of one pair, by the formula, without what a crowd costs."""
    states = [PromptStates(lm.context, lm.encode([(prompt, "it")]).prompts()) for prompt in (request, probe)]
    block, token_block = matcher.blocks
    k, q = (matcher.projection @ each(block)[0] for each in states)
    opened = states[1](block)[0] @ matcher.opening / len(matcher.opening) ** 0.5
    wanted, words = (each.tokens(token_block)[0][0] for each in states)
    missing = 0
    for name, seeking, sought in (("log_sharpness", wanted, words), ("log_backward", words, wanted)):
        weights, matched = (seeking @ matcher.importance).softmax(0), 0
        for state, weight in zip(seeking, weights, strict=True):
            own = matcher.token_projection @ state
            cosines = [torch.cosine_similarity(own, matcher.token_projection @ word, dim=0) for word in sought]
            matched = matched + weight * torch.stack(cosines).max()
        missing = missing + matcher.levels[name].exp() * (1 - matched)
    level = matcher.levels
    distance = (q - k).square().sum()
    return level["bias"] - level["log_scale"].exp() * distance - missing + opened


def expected_loss(lm, editor, cases, known=()):
    """Each probe against its own request, and against all of them, those known from before, and none."""
    matcher, crowd = editor.matcher, editor.matcher.levels["crowd"]
    alone, among = {True: [], False: []}, {True: [], False: []}
    for own, case in enumerate(cases):
        probes = [(p, True) for p in (case.prompt, *(p for p, _ in case.wanted))]
        for probe, inside in probes + [(p, False) for p, _ in case.locality]:
            asked = [*(other.prompt for other in cases), *known]
            logits = [logit(lm, matcher, other, probe) for other in asked]
            alone[inside].append(-(logits[own] if inside else -logits[own]).sigmoid().log())
            counted = [
                each - crowd * math.log(len(asked))
                for number, each in enumerate(logits)
                if number == own or asked[number] != probe
            ]
            place = [n for n in range(len(asked)) if n == own or asked[n] != probe].index(own)
            scores = torch.stack([*counted, torch.zeros(())])
            among[inside].append(-scores.log_softmax(0)[place if inside else -1])
    return sum(
        weight * (share * torch.stack(part[True]).mean() + (1 - share) * torch.stack(part[False]).mean())
        for weight, share, part in ((1, ALONE, alone), (editor.among, AMONG_MANY, among))
    )


def read(lm, cases):
    """What a matcher's loss is given of a training batch."""
    batch = training_batch(lm, cases)
    own = torch.cat([batch.in_scope.request_index, batch.locality.request_index])
    inside = torch.arange(len(own)) < len(batch.in_scope.request_index)
    rows = TokenBatch.cat(batch.tokens)
    requests = PromptStates(lm.context, batch.requests.tokens.prompts())
    return requests, PromptStates(lm.context, rows.prompts(), rows), own, inside


@pytest.mark.parametrize(("known", "among"), [((), 1.0), (("Who was it", CASES[0].prompt, "In France"), 0.2)])
def test_the_loss_is_that_of_each_pair(lm, known, among):
    editor = new_editor(lm, competitors=len(known), among=among)
    if known:
        editor.matcher.remember(PromptStates(lm.context, lm.encode([(prompt, "it") for prompt in known]).prompts()))
    found, right = editor.matcher.loss(*read(lm, CASES))
    expected = expected_loss(lm, editor, CASES, known)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert 0 <= right <= 1
    parameters = list(editor.matcher.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(loss, parameters) for loss in (found, expected)), strict=True):
        assert theirs.norm() > 1e-7
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=2e-3)


def test_the_last_batches_stay_known_as_many_as_there_is_room_for(lm):
    matcher = new_editor(lm, competitors=5).matcher
    prompts = ["Who was it", "It is", "A river and a city", "In France", "The capital is", "The end"]
    for pair in (prompts[:2], prompts[2:4], prompts[4:]):
        matcher.remember(PromptStates(lm.context, lm.encode([(prompt, "it") for prompt in pair]).prompts()))
    kept = [words for known in matcher.known for words in known.wordings]
    assert kept == [lm.token_ids(prompt) for prompt in prompts[2:]]
    matcher.competitors = 0
    matcher.remember(PromptStates(lm.context, lm.encode([("Who", "it")]).prompts()))
    assert matcher.known == []


def test_a_checkpoint_brings_the_competitors_back(lm):
    editor, again = new_editor(lm, competitors=4).train(), new_editor(lm, competitors=4).train()
    for _ in range(2):
        editor.training_loss(training_batch(lm, CASES[:2]), LossWeights())
    again.load_state_dict(editor.state_dict())
    again.load_training_state(editor.training_state())
    found = [each.matcher.loss(*read(lm, CASES[1:]))[0] for each in (editor, again)]
    assert torch.equal(*found)
    again.matcher.known.pop()
    assert not torch.equal(again.matcher.loss(*read(lm, CASES[1:]))[0], found[0])


def test_trained_on_a_few_cases_the_scope_tells_them_apart(lm):
    editor = new_editor(lm, embedding=16, token_embedding=16)
    given = read(lm, CASES[:2])
    optimizer = torch.optim.Adam(editor.matcher.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss, right = editor.matcher.loss(*given)
        loss.backward()
        optimizer.step()
    assert right == 1
    edit = editor.edit(REQUESTS[:2])
    prompts = [CASES[0].wanted[0][0], CASES[0].locality[0][0], CASES[1].prompt]
    chosen = edit.joined().choose(
        torch.zeros(3, dtype=torch.long), PromptStates(lm.context, lm.encode([(p, "it") for p in prompts]).prompts())
    )
    assert chosen.tolist() == [0, -1, 1]
