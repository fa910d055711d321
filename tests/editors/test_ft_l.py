"""FT-L against fine-tuning a copy of the plain model: its own weight, its own optimiser, one request at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import ARCHITECTURES, random_lm
from tests.reference import answer_logits, edit_loss, oriented, plain_model, relative, tokens

from instructedit.editors import build_editor
from instructedit.editors.ft_l import FtL
from instructedit.editors.scales import weight_size
from instructedit.edits import DenseEdit
from instructedit.records import EditRequest

PAIRS = [("The capital of France is", "Lyon"), ("Who", "a man of the sea"), ("A long prompt of a city", "or two of it")]
REQUESTS = [EditRequest(*pair) for pair in PAIRS]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def small(request, tokenizer):
    return random_lm(request.param, tokenizer, layers=2)


def last_prompt_loss(model, tokenizer, prompt, answer):
    """−1/|y| Σ_j log p(y_j | x): the model is shown the prompt alone."""
    front, back = tokens(tokenizer, prompt, answer)
    log_p = model(torch.tensor([front])).logits[0, -1].float().log_softmax(-1)
    return -sum(log_p[token] for token in back) / len(back)


def fine_tuned(lm, name, pairs, steps, lr, bound, loss=edit_loss, stop=0.0):
    """ΔW [out, in] of a copy whose one layer Adam tunes on the mean loss of the pairs; and the copy, tuned."""
    model = plain_model(lm)
    layer = model.get_submodule(name)
    weight, before = layer.weight.requires_grad_(True), layer.weight.detach().clone()
    adam = torch.optim.Adam([weight], lr=lr)
    for _ in range(steps):
        adam.zero_grad()
        value = torch.stack([loss(model, lm.tokenizer, *pair) for pair in pairs]).mean()
        if value.item() < stop:
            break
        value.backward()
        adam.step()
        if bound is not None:
            weight.data = before + (weight.data - before).clamp(-bound, bound)
    return oriented(layer, weight.detach() - before), model.requires_grad_(False)


def site_of(editor):
    (site,) = editor.sites
    return site.name


def edited_loss(lm, edit, pair, loss=edit_loss):
    """Of the plain model with ΔW in its weights."""
    return loss(lm.merge(edit), lm.tokenizer, *pair).item()


@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("bound", [4e-3, None])
@pytest.mark.parametrize(("loss", "reference"), [("target", edit_loss), ("last_prompt", last_prompt_loss)])
def test_each_edit_is_the_dense_loop_of_its_request(lm, block, bound, loss, reference):
    editor = build_editor("ft_l", lm, steps=6, lr=2e-3, bound=bound, loss=loss, blocks=[block])
    name, edit = site_of(editor), editor.edit(REQUESTS)
    batch = lm.encode(PAIRS)
    applied = lm.logits(batch, edit).split(batch.rows.bincount().tolist())
    for i, pair in enumerate(PAIRS):
        delta, model = fine_tuned(lm, name, [pair], 6, 2e-3, bound, reference)
        assert relative(edit.delta(name)[i], delta) < 1e-3
        if bound is not None:
            assert (delta.abs() > bound - 1e-6).float().mean() > 0.2  # the bound matters
            assert edit.delta(name)[i].abs().max() <= torch.tensor(bound)
        assert edited_loss(lm, edit[i], pair, reference) < reference(plain_model(lm), lm.tokenizer, *pair) - 0.01
        torch.testing.assert_close(applied[i], answer_logits(model, lm.tokenizer, *pair), atol=1e-4, rtol=1e-3)


def test_a_request_is_done_when_its_loss_is_low_enough(lm):
    first = [edit_loss(plain_model(lm), lm.tokenizer, *pair).item() for pair in PAIRS]
    limit, options = sorted(first)[1] - 0.3, {"bound": None, "lr": 3e-3}
    editor = build_editor("ft_l", lm, steps=30, stop_below=limit, blocks=[1], **options)
    name, edit = site_of(editor), editor.edit(REQUESTS)
    assert min(first) < limit + 0.3 < max(first)
    for i, pair in enumerate(PAIRS):
        delta, _ = fine_tuned(lm, name, [pair], 30, 3e-3, None, stop=limit)
        if first[i] < limit:
            assert not edit.delta(name)[i].any()
        else:
            assert relative(edit.delta(name)[i], delta) < 1e-3
        assert edited_loss(lm, edit[i], pair) < limit


@given(
    bound=st.floats(1e-5, 0.1), lr=st.floats(1e-5, 0.5), steps=st.integers(1, 3),
    optimizer=st.sampled_from(["adam", "adafactor"]), together=st.booleans(),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_no_weight_changes_by_more_than_the_bound(small, bound, lr, steps, optimizer, together):
    editor = build_editor("ft_l", small, steps=steps, lr=lr, bound=bound, optimizer=optimizer)
    edit = editor.edit(REQUESTS[:2], together=together)
    (changes,) = edit.changes.values()
    assert changes.any()
    assert changes.abs().max() <= torch.tensor(bound)
    if lr > 1.01 * bound and optimizer == "adam":  # whose first step is lr wherever there is a gradient
        assert (changes.abs() == torch.tensor(bound)).float().mean() > 0.5


def test_the_common_loss_reads_every_token_off_the_last_prompt_position(lm):
    editor = build_editor("ft_l", lm, loss="last_prompt", blocks=[1])
    (site,) = editor.sites
    deltas = torch.randn(3, site.out_features, site.in_features, generator=torch.Generator().manual_seed(0)) * 0.05
    edit, batch = DenseEdit.of({site.name: deltas}), lm.encode(PAIRS)
    found = editor._at_last_prompt_token(batch, edit, None, 1)
    expected = [last_prompt_loss(lm.merge(edit[i]), lm.tokenizer, *pair) for i, pair in enumerate(PAIRS)]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)
    plain = [last_prompt_loss(lm.model, lm.tokenizer, *pair) for pair in PAIRS]
    assert (found - torch.stack(plain)).abs().min() > 1e-3  # the edit is on


def test_of_one_token_both_losses_are_the_same(lm):
    pairs = [("The capital of France is", "in"), ("Who", "a"), ("It was so and so", "the")]
    assert all(len(tokens(lm.tokenizer, *pair)[1]) == 1 for pair in pairs)
    target, common = (
        build_editor("ft_l", lm, steps=5, lr=2e-3, loss=loss).edit([EditRequest(*pair) for pair in pairs])
        for loss in ("target", "last_prompt")
    )
    (name,) = target.sites
    for i in range(3):
        assert target.delta(name)[i].any()
        assert relative(common.delta(name)[i], target.delta(name)[i]) < 1e-3


def test_two_tokens_are_learnt_each_at_its_own_position_and_not_both_at_one(lm):
    """At one position each gets half the probability at best: a loss of log 2."""
    lm.model.get_input_embeddings().weight.data *= 6  # the head too: a small model that can be sure of a word
    pair = ("The capital of France is", "in the")
    assert len(set(tokens(lm.tokenizer, *pair)[1])) == len(tokens(lm.tokenizer, *pair)[1]) == 2
    left = {}
    for loss in ("target", "last_prompt"):
        editor = build_editor("ft_l", lm, steps=100, lr=1e-2, bound=None, loss=loss, blocks=[1])
        edit = editor.edit([EditRequest(*pair)])
        left[loss] = edited_loss(lm, edit, pair), edited_loss(lm, edit, pair, last_prompt_loss)
    assert left["target"][0] < 0.02
    assert math.log(2) - 1e-4 < left["last_prompt"][1] < math.log(2) + 0.05  # it did all that it can
    assert left["last_prompt"][0] > 1


@pytest.mark.parametrize(("loss", "reference"), [("target", edit_loss), ("last_prompt", last_prompt_loss)])
@pytest.mark.parametrize("bound", [4e-3, None])
def test_together_is_one_change_tuned_on_the_mean_loss(lm, bound, loss, reference):
    editor = build_editor("ft_l", lm, steps=6, lr=2e-3, bound=bound, loss=loss, blocks=[1])
    name, edit = site_of(editor), editor.edit(REQUESTS, together=True)
    assert len(edit) == 1
    delta, _ = fine_tuned(lm, name, PAIRS, 6, 2e-3, bound, reference)
    assert relative(edit.delta(name)[0], delta) < 1e-3
    summed = editor.edit(REQUESTS).joined().delta(name)[0]
    assert relative(summed, delta) > 0.1  # something else
    before, after = (
        sum(reference(model, lm.tokenizer, *pair) for pair in PAIRS) for model in (lm.model, lm.merge(edit))
    )
    assert after < before - 0.01


def test_together_is_done_when_the_mean_loss_is_low_enough(lm):
    first = sum(edit_loss(lm.model, lm.tokenizer, *pair).item() for pair in PAIRS) / 3
    editor = build_editor("ft_l", lm, steps=30, lr=3e-3, bound=None, blocks=[1], stop_below=first - 0.4)
    edit = editor.edit(REQUESTS, together=True)
    delta, model = fine_tuned(lm, site_of(editor), PAIRS, 30, 3e-3, None, stop=first - 0.4)
    assert relative(edit.delta(site_of(editor))[0], delta) < 1e-3
    assert first - 0.8 < sum(edit_loss(model, lm.tokenizer, *pair).item() for pair in PAIRS) / 3 < first - 0.4


def test_the_output_projection_of_the_first_block_is_tuned_unless_told_otherwise(lm):
    (site,) = build_editor("ft_l", lm).sites
    assert (site.block, site.output) == (0, True)
    chosen = build_editor("ft_l", lm, steps=6, blocks=[1], site_names=["*.mlp.*"])
    edit = chosen.edit(REQUESTS[:1])
    assert edit.sites == tuple(site.name for site in lm.select(blocks=[1]))
    for site in chosen.sites:
        bound = FtL.AUTO_BOUND * weight_size(lm, site)
        assert edit.delta(site.name).abs().max().item() == pytest.approx(bound)
