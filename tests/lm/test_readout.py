"""Logits that are read a few positions at a time: the numbers and gradients of all at once, in less memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.reference import Case, plain_model, random_factors, training_batch
from torch.nn import functional as F  # noqa: N812

from instructedit.editors.losses import editing_loss
from instructedit.edits import Factors, LowRankEdit
from instructedit.lm import scores
from instructedit.lm.chunked_logits import positionwise

FLOAT32 = {"atol": 1e-5, "rtol": 1e-4}
PAIRS = [("The capital of France is", "Lyon"), ("Who is", "the man of the sea"), ("A", "b")]
CASES = [
    Case("The capital of France is", "Lyon", locality=(("The people of", "the sea"), ("One", "two"))),
    Case(
        "Who", "the man of the sea", wanted=(("And who", "the man"),), unwanted=(("And who", "no one"),),
        locality=(("The city", "is old"),),
    ),
]  # fmt: skip


@given(count=st.integers(0, 9), size=st.integers(1, 10), seed=st.integers(0, 5))
def test_parts_give_what_the_whole_gives(count, size, seed):
    torch.manual_seed(seed)
    head, states, weights = torch.randn(4, 7), torch.randn(count, 4), torch.randn(count)
    labels, sizes = torch.randint(7, (count,)), []

    def read(part, at):
        sizes.append(len(part))
        logits = part @ head
        return F.cross_entropy(logits, labels[at], reduction="none"), logits.argmax(-1), logits[:, :2].detach()

    states.requires_grad_()
    number, most, two = positionwise(states, read, size)
    assert max(sizes) <= size
    assert sum(sizes) == count
    logits = states @ head
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(number, expected)
    assert torch.equal(most, logits.argmax(-1))
    torch.testing.assert_close(two, logits[:, :2].detach())
    assert not two.requires_grad
    (slope,) = torch.autograd.grad((number * weights).sum(), states)
    torch.testing.assert_close(slope, torch.autograd.grad((expected * weights).sum(), states)[0])
    with torch.no_grad():
        torch.testing.assert_close(positionwise(states, read, size)[0], expected)


@pytest.fixture
def few(lm, monkeypatch):
    """Two positions at once."""
    monkeypatch.setitem(scores.HEAD, "cpu", (2, 0))
    return lm


@pytest.fixture
def widths(few):
    """How many positions the head saw each time."""
    seen = []
    few.model.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(out.shape[:-1].numel()))
    return seen


def test_the_outer_loss_has_the_same_gradients(few, widths, monkeypatch):
    batch, found = training_batch(few, CASES), []
    for room in (2, 1000):
        monkeypatch.setitem(scores.HEAD, "cpu", (room, 0))
        vars(few.scores).pop("_head_positions", None)
        widths.clear()
        edit = LowRankEdit({k: Factors(*v) for k, v in random_factors(few.select(blocks=[2, 3]), 2, 3).items()})
        leaves = [factor.requires_grad_() for pair in edit.factors.values() for factor in pair]
        loss = editing_loss(few, edit, batch)
        assert max(widths) <= room
        found.append([*loss, *torch.autograd.grad(loss.edit + loss.locality, leaves)])
    assert len(widths) == 3  # all in scope, locality with and without the edit
    for few_at_once, all_at_once in zip(*found, strict=True):
        assert all_at_once.abs().max() > 0
        torch.testing.assert_close(few_at_once, all_at_once, **FLOAT32)


def test_a_capture_is_the_same(few, widths):
    batch, sites = few.encode(PAIRS), [few.sites[-1].name]
    found = few.capture(batch, sites)
    assert max(widths) <= 2
    model = plain_model(few)
    for row, (prompt, answer) in enumerate(PAIRS):
        one = few.encode([(prompt, answer)])
        logits = model(one.input_ids).logits[one.answer_at]
        torch.testing.assert_close(found.loss[row], F.cross_entropy(logits, one.answers), **FLOAT32)
        assert torch.equal(found.predicted[batch.rows == row], logits.argmax(-1))
