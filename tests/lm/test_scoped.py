"""Changes that hold in scope alone: each prompt against the dense model of its own entry, or the model itself."""

import pytest
import torch
from tests.conftest import random_lm
from tests.lm.contexts import FLOAT32, PAIRS, a_gate, row_logits
from tests.reference import dense, dense_copy, greedy, plain_model, random_factors

from instructedit.edits import Factors, LowRankEdit, ScopedEdit, add, load_edit
from instructedit.errors import UserError

PROMPTS = [prompt for prompt, _ in PAIRS]


def scoped(lm, keys, blocks=(1, 3), seed=0):
    """An edit of one entry for each prompt in `keys`, its dense changes, and the gate's block below them."""
    factors = random_factors(lm.select(blocks=blocks), len(keys), 2, scale=0.2, seed=seed)
    changes = LowRankEdit({name: Factors(*pair) for name, pair in factors.items()})
    gate = a_gate(lm, [[key] for key in keys], block=1)
    return ScopedEdit(changes, gate), [dense(factors, i) for i in range(len(keys))]


def expected(lm, deltas):
    """Logits of all pairs, each by the dense model of its own changes, None for none."""
    return torch.cat([row_logits(lm, pair, "", own) for pair, own in zip(PAIRS, deltas, strict=True)])


@pytest.mark.parametrize("inside", [(), (0,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("cache_bytes", [0, 2 << 20])
def test_prompts_in_scope_are_read_with_the_change_and_all_others_by_the_model_itself(lm, inside, cache_bytes):
    lm.cache.max_bytes = cache_bytes
    edit, deltas = scoped(lm, [PROMPTS[i] if i in inside else f"Some other prompt {i}" for i in range(3)])
    batch = lm.encode(PAIRS)
    wanted = expected(lm, [deltas[i] if i in inside else None for i in range(3)])
    assert not inside or (wanted - expected(lm, [None] * 3)).abs().max() > 0.01
    for _ in range(2):  # the second time from the cache
        torch.testing.assert_close(lm.logits(batch, edit), wanted, **FLOAT32)
    with lm.edited(edit):
        torch.testing.assert_close(lm.logits(batch), wanted, **FLOAT32)
    predicted = lm.scores.predictions(batch, edit).predicted
    assert torch.equal(predicted, wanted.argmax(-1))
    if outside := [i for i in range(3) if i not in inside]:
        part = lm.encode([PAIRS[i] for i in outside])
        assert torch.equal(lm.logits(part, edit, torch.tensor(outside)), lm.logits(part, None, None, 1))  # to the bit


def test_of_many_that_are_joined_each_prompt_has_its_own(lm):
    order = [2, 0, 1]
    edit, deltas = scoped(lm, [PROMPTS[i] for i in order])
    for joined in (edit.joined(), add(add(edit[0], edit[1]), edit[2])):
        assert (len(joined), joined.entries) == (1, 3)
        wanted = expected(lm, [deltas[order.index(i)] for i in range(3)])
        torch.testing.assert_close(lm.logits(lm.encode(PAIRS), joined), wanted, **FLOAT32)


@pytest.mark.parametrize(("behind", "chosen"), [(1e-6, 1), (1e-3, 0)])
def test_of_entries_that_differ_by_rounding_alone_the_later_holds(lm, behind, chosen):
    class Gate:
        keys = torch.zeros(1, 3, 1)

        def scores(self, prompts, rows):
            return torch.tensor([[1.0, 1.0 - behind, 0.5]])

    edit, _ = scoped(lm, PROMPTS)
    assert ScopedEdit(edit.changes, Gate()).choose(torch.tensor([0]), None).tolist() == [chosen]


def test_several_edits_of_several_entries_keep_their_own_when_they_are_put_together(lm):
    (one, first), (two, second) = (scoped(lm, [PROMPTS[0], PROMPTS[1]], seed=seed) for seed in (0, 1))
    both = one.plus(two)
    assert (len(both), both.entries) == (2, 2)
    batch = lm.encode([PAIRS[0], PAIRS[1]])
    found = lm.logits(batch, both).split(batch.answer_sizes())
    for i in range(2):  # of two of one scope the later
        assert (row_logits(lm, PAIRS[i], "", first[i]) - row_logits(lm, PAIRS[i], "", second[i])).abs().max() > 0.01
        torch.testing.assert_close(found[i], row_logits(lm, PAIRS[i], "", second[i]), **FLOAT32)
    again = both[[1, 0]]
    torch.testing.assert_close(lm.logits(batch, again, torch.tensor([1, 0])), torch.cat(found), **FLOAT32)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_words_are_those_of_the_dense_models(tokenizer, kind):
    lm = random_lm(kind, tokenizer)
    edit, deltas = scoped(lm, [PROMPTS[0], "Some other prompt", PROMPTS[2]])
    models = [dense_copy(lm, deltas[0]), plain_model(lm), dense_copy(lm, deltas[2])]
    wanted = [lm.tokenizer.decode(greedy(model, lm.tokenizer, p, 6)) for model, p in zip(models, PROMPTS, strict=True)]
    assert wanted[0] != lm.generate(PROMPTS[0], 6)
    assert lm.generate(PROMPTS, 6, edit) == wanted
    assert lm.generate(PROMPTS[::-1], 6, edit, [2, 1, 0]) == wanted[::-1]
    assert lm.generate(PROMPTS, 6, edit.joined()) == wanted
    with lm.edited(edit.joined()):
        assert lm.generate(PROMPTS, 6) == wanted
        drawn = lm.sample(PROMPTS[:1], 12, ["a"])
    assert drawn != lm.sample(PROMPTS[:1], 12, ["a"])
    assert lm.generate(PROMPTS[1], 6) == wanted[1]


def test_gradients_reach_the_changes_through_the_scope(lm):
    edit, _ = scoped(lm, PROMPTS)
    leaves = [tensor.requires_grad_() for tensor in edit.changes.state().values()]
    found = torch.autograd.grad(lm.losses(lm.encode(PAIRS), edit).sum(), leaves)
    straight = torch.autograd.grad(lm.losses(lm.encode(PAIRS), edit.ungated()).sum(), leaves)
    for own, other in zip(found, straight, strict=True):
        assert other.norm() > 1e-6
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-3)


def test_many_keys_are_compared_a_part_at_a_time(lm, monkeypatch):
    edit, _ = scoped(lm, PROMPTS)
    batch, rows = lm.encode(PAIRS * 3), torch.arange(3).repeat(3)
    whole = edit.choose(rows, lambda block: lm.context.scope_embedding(batch, block))
    monkeypatch.setattr("instructedit.edits.gates._ROOM", 10)
    assert torch.equal(edit.choose(rows, lambda block: lm.context.scope_embedding(batch, block)), whole)
    assert whole.tolist() == [0, 1, 2] * 3


def test_it_is_no_change_of_weights_and_several_entries_are_none_at_all(lm):
    edit, _ = scoped(lm, PROMPTS)
    with pytest.raises(UserError, match="'scoped' is no change of weights"):
        lm.merge(edit[0])
    with pytest.raises(UserError, match="which of 3 entries holds depends on the prompt"):
        edit.joined().change(edit.sites[0], torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), None)
    with pytest.raises(UserError, match="do not go together"):
        edit.plus(edit[:2])


def test_to_disk_and_back(lm, tmp_path):
    edit, _ = scoped(lm, PROMPTS)
    for number, each in enumerate((edit, edit.joined())):
        each.save_pretrained(tmp_path / str(number), base_model="some/model")
        again = load_edit(tmp_path / str(number))
        assert (type(again), len(again), again.entries) == (ScopedEdit, len(each), each.entries)
        batch = lm.encode(PAIRS)
        assert torch.equal(lm.logits(batch, again), lm.logits(batch, each))


def test_a_folder_whose_keys_do_not_fit_its_changes_is_refused(lm, tmp_path):
    edit, _ = scoped(lm, PROMPTS)
    bad = ScopedEdit(edit.changes, edit.gate._replace(keys=edit.gate.keys[:2]))
    bad.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"3 changes do not fit keys \[2, 1, "):
        load_edit(tmp_path)
