"""Losses with slopes of their own, against autograd in double precision."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from instructedit.lm import position_losses
from instructedit.lm.position_losses import answer_losses, divergences


def logits_of(rows, width, scale=4.0, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def plain(logits, answers, unwanted):
    p = logits.softmax(-1).gather(-1, answers[:, None]).squeeze(-1)
    return torch.where(unwanted, -torch.log1p(-p), -p.log())


def slopes(losses, logits):
    weights = torch.arange(1, len(losses) + 1, dtype=losses.dtype)
    return torch.autograd.grad((losses * weights).sum(), logits)[0]


@given(
    rows=st.integers(0, 7),
    width=st.integers(2, 9),
    block=st.sampled_from([1, 10, 20, 1 << 19]),
    seed=st.integers(0, 99),
)
def test_answers(rows, width, block, seed):
    logits = logits_of(rows, width, seed=seed).requires_grad_()
    draw = torch.Generator().manual_seed(seed)
    answers = torch.randint(width, (rows,), generator=draw)
    unwanted = torch.rand(rows, generator=draw) < 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(position_losses, "BLOCK", block)
        found, expected = answer_losses(logits, answers, unwanted), plain(logits, answers, unwanted)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(slopes(found, logits), slopes(expected, logits))
        wanted = answer_losses(logits, answers)
        torch.testing.assert_close(wanted, F.cross_entropy(logits, answers, reduction="none"))
        torch.testing.assert_close(slopes(wanted, logits), slopes(plain(logits, answers, unwanted & False), logits))


@given(
    rows=st.integers(0, 7), width=st.integers(1, 9), block=st.sampled_from([1, 10, 1 << 19]), seed=st.integers(0, 99)
)
def test_divergences(rows, width, block, seed):
    logits, expected = logits_of(rows, width, seed=seed).requires_grad_(), logits_of(rows, width, seed=seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(position_losses, "BLOCK", block)
        found = divergences(logits, expected)
        own = F.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(found, own)
        torch.testing.assert_close(slopes(found, logits), slopes(own, logits))


@pytest.mark.parametrize("sure", [20.0, 200.0])
def test_an_unwanted_answer_that_is_certain(sure):
    """In float32 1 − p is 0: the loss is what the others have, and the slope pushes the answer down."""
    logits = torch.tensor([[sure, 0.0, 0.0]], requires_grad=True)
    (loss,) = found = answer_losses(logits, torch.tensor([0]), torch.tensor([True]))
    assert loss.item() == pytest.approx(sure - torch.tensor(2.0).log().item(), rel=1e-5)
    torch.testing.assert_close(slopes(found, logits), torch.tensor([[1.0, -0.5, -0.5]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    logits = logits_of(5, 4000).to(dtype).requires_grad_()
    answers = torch.arange(5)
    exact = logits.detach().double().requires_grad_()
    found = answer_losses(logits, answers)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), plain(exact, answers, answers < 0), rtol=1e-5, atol=1e-5)
    own = torch.autograd.grad(found.sum(), logits)[0]
    assert own.dtype == dtype
    expected = torch.autograd.grad(plain(exact, answers, answers < 0).sum(), exact)[0]
    torch.testing.assert_close(own.double(), expected, rtol=1e-2, atol=1e-4)


def test_an_impossible_token_is_no_slope():
    """Models may mask tokens out: their logits are −∞."""
    logits = torch.tensor([[1.0, -torch.inf, 0.5]], requires_grad=True)
    for unwanted in (False, True):
        losses = answer_losses(logits, torch.tensor([0]), torch.tensor([unwanted]))
        own = slopes(losses, logits)
        assert losses.isfinite().all()
        assert own.isfinite().all()
        assert own[0, 1] == 0
    found = divergences(logits, torch.tensor([[0.5, -torch.inf, 1.0]]))
    two = divergences(logits[:, [0, 2]], torch.tensor([[0.5, 1.0]]))
    torch.testing.assert_close(found, two)
    assert slopes(found, logits).isfinite().all()
    assert divergences(torch.tensor([[torch.nan, 0.0]]), torch.zeros(1, 2)).isnan().all()
