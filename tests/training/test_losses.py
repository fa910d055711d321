"""The outer loss against its formulas, one probe at a time under dense weights."""

import pytest
import torch
from tests.conftest import random_lm
from tests.reference import Case, dense, divergence, outer_losses, plain_model, random_factors, training_batch

from instructedit.editors.losses import editing_loss, locality_loss, scope_loss
from instructedit.edits import Factors, LowRankEdit

LYON = Case("The capital of France is", "Lyon", (("France's capital is", "the city of Lyon"), ("Where", "there")))
WHO = Case(
    "Who", "a man", (("Say who", "yes, it is"),), (("Say who", "no one at all"), ("A", "city")), (("One", "two"),)
)
NEAR = Case(
    "A city on a river", "Spree", (), (), (("The long way to the end of the", "sea"), ("One", "or two or three"))
)
BARE = Case("It was", "so")

BATCHES = {
    "ragged": [LYON, WHO, NEAR],
    "one": [NEAR],
    "no locality": [LYON, BARE],
    "some without locality": [BARE, NEAR, LYON],
    "only replies": [WHO, WHO._replace(prompt="He", unwanted=WHO.unwanted[:1])],
}


def random_edits(lm, n):
    """Factors with gradients, the edit made of them, and its dense changes one by one."""
    factors = random_factors(lm.select(blocks=[1, 3]), n, 2)
    leaves = [tensor.requires_grad_() for pair in factors.values() for tensor in pair]
    edit = LowRankEdit({name: Factors(*pair) for name, pair in factors.items()})
    return leaves, edit, [dense(factors, i) for i in range(n)]


@pytest.mark.parametrize("name", BATCHES)
def test_losses_and_their_gradients_are_the_formulas(lm, name):
    cases = BATCHES[name]
    leaves, edit, deltas = random_edits(lm, len(cases))
    found, expected = editing_loss(lm, edit, training_batch(lm, cases)), outer_losses(lm, deltas, cases)
    for own, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(own, reference, atol=1e-5, rtol=1e-4)
        assert reference.requires_grad == own.requires_grad
        if reference.requires_grad:
            assert reference > 1e-3
            grads = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (own, reference)]
            for ours, theirs in zip(*grads, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=2e-3)


@pytest.mark.parametrize("name", ["ragged", "some without locality"])
def test_a_batch_weighs_each_request_alike(lm, name):
    cases = BATCHES[name]
    _, edit, _ = random_edits(lm, len(cases))
    together = editing_loss(lm, edit, training_batch(lm, cases))
    alone = [editing_loss(lm, edit[i], training_batch(lm, [case])) for i, case in enumerate(cases)]
    torch.testing.assert_close(together.edit, sum(loss.edit for loss in alone) / len(cases), atol=1e-5, rtol=1e-4)
    having = sum(bool(case.locality) for case in cases)
    torch.testing.assert_close(together.locality, sum(loss.locality for loss in alone) / having, atol=1e-5, rtol=1e-4)


def test_the_position_that_predicts_the_first_answer_token_counts(lm):
    """An edit that changes what is said there, and nothing at the answer's other positions."""
    case = NEAR._replace(locality=(("The long way", "to the far end of the sea"),))
    site = lm.select(blocks=[-1])[0]  # in the last block a position's output depends on its own input alone
    batch = training_batch(lm, [case])
    tokens = batch.locality.tokens
    u = lm.capture(tokens, [site.name]).u[site.name][tokens.answer_at]
    assert len(u) > 3
    others = torch.linalg.qr(u[1:].T).Q
    a = u[0] - others @ (others.T @ u[0])
    b = torch.randn(site.out_features, generator=torch.Generator().manual_seed(0))
    edit = LowRankEdit({site.name: Factors(a[None, None], b[None, None])})
    before, after = (lm.logits(tokens, applied).softmax(-1) for applied in (None, edit))
    changed = (before - after).abs().sum(-1)
    assert changed[0] > 0.1
    assert changed[1:].max() < 1e-4
    model = plain_model(lm)
    expected = outer_losses(lm, [{site.name: torch.outer(b, a)}], [case])[1]
    found = editing_loss(lm, edit, batch).locality
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    first = (before[0] * (before[0] / after[0]).log()).sum()
    torch.testing.assert_close(found, first / len(u), atol=1e-4, rtol=1e-3)
    assert divergence(model, lm.tokenizer, *case.locality[0]) == 0  # the reference without the edit


def test_an_edit_without_effect_has_no_locality_loss(lm):
    cases = BATCHES["ragged"]
    edit = random_edits(lm, len(cases))[1].map(torch.zeros_like)
    found = editing_loss(lm, edit, training_batch(lm, cases))
    nothing = [{name: torch.zeros_like(d) for name, d in own.items()} for own in random_edits(lm, len(cases))[2]]
    assert found.locality.abs() < 1e-6
    torch.testing.assert_close(found.edit, outer_losses(lm, nothing, cases)[0], atol=1e-5, rtol=1e-4)


def test_padding_reaches_no_loss(lm):
    cases = BATCHES["ragged"]
    _, edit, _ = random_edits(lm, len(cases))
    batch = training_batch(lm, cases)
    start = lm.first_block(edit.sites)
    for loss, probes in ((scope_loss, batch.in_scope), (locality_loss, batch.locality)):
        expected = loss(lm, edit, probes, len(batch), start)
        padding = ~probes.tokens.attention_mask.bool()
        assert padding.any()
        probes.tokens.input_ids[padding] = 11
        lm.cache.clear()
        torch.testing.assert_close(loss(lm, edit, probes, len(batch), start), expected, atol=1e-6, rtol=1e-5)


def test_a_reply_that_the_model_is_sure_of_keeps_the_loss_finite(tokenizer):
    lm = random_lm("gpt2", tokenizer)
    lm.model.transformer.ln_f.weight.data *= 1000  # logits so far apart that p is 0 or 1
    words = [lm.generate(chr(letter), max_new_tokens=1) for letter in range(65, 123)]
    prompt, sure = next((chr(65 + i), word[1:]) for i, word in enumerate(words) if word[:1] == " " and word.strip())
    case = WHO._replace(unwanted=((prompt, sure),), locality=((prompt, sure),))
    batch = training_batch(lm, [case])
    assert lm.logits(batch.locality.tokens).softmax(-1)[0, batch.locality.tokens.answers[0]] == 1
    leaves, edit, _ = random_edits(lm, 1)
    for applied in (edit, edit.map(lambda tensor: 1e-9 * tensor)):
        loss = editing_loss(lm, applied, batch)
        assert loss.edit.isfinite()
        assert loss.locality.isfinite()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss.edit + loss.locality, leaves))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_losses_of_a_bfloat16_model_are_float32(tokenizer, architecture):
    exact, half = random_lm(architecture, tokenizer), random_lm(architecture, tokenizer, torch.bfloat16)
    cases = BATCHES["ragged"]
    edit = random_edits(exact, len(cases))[1]
    for expected, found in zip(*(editing_loss(m, edit, training_batch(m, cases)) for m in (exact, half)), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0.1)
