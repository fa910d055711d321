"""Prompts behind a context against plain forward passes over whole rows of ids, gates, words, and disk."""

import dataclasses

import pytest
import torch
from tests.conftest import random_lm
from tests.lm.contexts import (
    CONTEXTS,
    FLOAT32,
    PAIRS,
    a_gate,
    an_adapter,
    context_edit,
    ids_of,
    query_of,
    row_logits,
    with_bos,
)
from tests.reference import assert_untouched, dense_copy, footprint, greedy, plain_model, tokens

from instructedit.edits import ContextEdit, load_edit
from instructedit.errors import UserError
from instructedit.lm import FrozenLM, TokenBatch

# -- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("adapted", [False, True])
def test_logits_are_those_of_the_whole_row_context_first(lm, adapted, start):
    adapter, deltas = an_adapter(lm) if adapted else (None, None)
    edit, batch = context_edit(lm, CONTEXTS, adapter), lm.encode(PAIRS)
    expected = [row_logits(lm, pair, c, deltas) for pair, c in zip(PAIRS, CONTEXTS, strict=True)]
    plain = torch.cat([row_logits(lm, pair) for pair in PAIRS])
    assert all((e - p).abs().max() > 0.01 for e, p in zip(expected, plain.split([*map(len, expected)]), strict=True))
    for _ in range(2):  # the second time from the prefix cache
        with torch.no_grad():
            torch.testing.assert_close(lm.logits(batch, edit, start=start), torch.cat(expected), **FLOAT32)
    with torch.no_grad(), lm.edited(edit):
        torch.testing.assert_close(lm.logits(batch, start=start), torch.cat(expected), **FLOAT32)
        nll = lm.losses(batch)
    for i, (said, (_, answer)) in enumerate(zip(expected, PAIRS, strict=True)):
        ids = torch.tensor(lm.tokenizer(" " + answer)["input_ids"])
        torch.testing.assert_close(nll[i], torch.nn.functional.cross_entropy(said, ids), **FLOAT32)


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 1]])
def test_rows_say_which_context_each_prompt_gets(lm, rows):
    edit, batch = context_edit(lm, CONTEXTS), lm.encode(PAIRS)
    expected = torch.cat([row_logits(lm, pair, CONTEXTS[row]) for pair, row in zip(PAIRS, rows, strict=True)])
    torch.testing.assert_close(lm.logits(batch, edit, torch.tensor(rows)), expected, **FLOAT32)
    with lm.edited(edit, rows):
        torch.testing.assert_close(lm.logits(batch), expected, **FLOAT32)
    if len(set(rows)) == 1:  # a single edit is applied to every row
        torch.testing.assert_close(lm.logits(batch, edit[1]), expected, **FLOAT32)


def test_rows_that_do_not_match_are_refused(lm):
    edit, batch = context_edit(lm, CONTEXTS[:2]), lm.encode(PAIRS)
    for rows, message in ((None, "2 edits and a batch of 3 rows"), ([0, 1], "edits of 2 rows, the batch has 3")):
        with pytest.raises(UserError, match=message), lm.edited(edit, rows):
            lm.logits(batch)
        with pytest.raises(UserError, match=message), lm.edited(edit, rows):
            lm.generate([prompt for prompt, _ in PAIRS])
    with pytest.raises(UserError, match=r"rows must name edits 0 to 1, got \[0, 2, 1\]"), lm.edited(edit, [0, 2, 1]):
        pass


def test_a_context_of_no_tokens_is_no_context(lm):
    edit, batch = context_edit(lm, CONTEXTS), lm.encode(PAIRS)
    nothing = dataclasses.replace(edit, lengths=torch.zeros_like(edit.lengths))
    torch.testing.assert_close(lm.logits(batch, nothing), torch.cat([row_logits(lm, p) for p in PAIRS]), **FLOAT32)


def test_a_context_that_is_too_long_loses_its_beginning(lm):
    long = "An old story of the sea and " * 40 + "the end.\n"
    edit, batch = context_edit(lm, [long, CONTEXTS[1], long]), lm.encode(PAIRS)
    expected = [row_logits(lm, p, c, keep=lm.max_length) for p, c in zip(PAIRS, (long, CONTEXTS[1], long), strict=True)]
    torch.testing.assert_close(lm.logits(batch, edit), torch.cat(expected), **FLOAT32)
    with pytest.warns(UserWarning, match="lose their beginning"):
        full = lm.encode([("word " * 200, "end")])  # no room for any context
    torch.testing.assert_close(lm.logits(full, edit[0]), lm.logits(full), **FLOAT32)


def test_gradients_reach_the_adapter(lm):
    adapter, _ = an_adapter(lm)
    leaves = [tensor.requires_grad_() for tensor in adapter.state().values()]
    loss = lm.losses(lm.encode(PAIRS), context_edit(lm, CONTEXTS, adapter), None, 1).sum()
    for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert grad.shape == leaf.shape
        assert grad.norm() > 1e-6


# -- gates ------------------------------------------------------------------------------------------------------------


def test_a_gate_reads_the_prompts_last_token_and_its_mean(lm):
    for block in (0, 2):
        found = lm.context.scope_embedding(lm.encode(PAIRS), block)
        expected = torch.stack([query_of(lm, prompt, block) for prompt, _ in PAIRS])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("inside", [(), (0,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("cache_bytes", [0, 2 << 20])
def test_prompts_in_scope_get_the_context_and_all_others_the_model_itself(lm, inside, cache_bytes):
    lm.cache.max_bytes = cache_bytes
    keys = [[PAIRS[i][0] if i in inside else f"Some other prompt {i}"] for i in range(3)]
    adapter, deltas = an_adapter(lm)
    edit, batch = context_edit(lm, CONTEXTS, adapter, a_gate(lm, keys)), lm.encode(PAIRS)
    found, ungated, bare = (lm.logits(batch, applied) for applied in (edit, edit.ungated(), None))
    sizes = batch.rows.bincount().tolist()
    for i, (own, with_it, without) in enumerate(zip(*(t.split(sizes) for t in (found, ungated, bare)), strict=True)):
        expected = row_logits(lm, PAIRS[i], CONTEXTS[i], deltas) if i in inside else row_logits(lm, PAIRS[i])
        torch.testing.assert_close(own, expected, **FLOAT32)
        torch.testing.assert_close(own, with_it if i in inside else without, **FLOAT32)
        assert (with_it - without).abs().max() > 0.01
    if outside := [i for i in range(3) if i not in inside]:
        states, start = lm.scores.states(batch, edit), lm.first_block(edit.sites)
        alone = lm.scores.states(batch.select(torch.tensor(outside)), start=start)
        assert torch.equal(torch.cat([states.split(sizes)[i] for i in outside]), alone)  # bit by bit


def test_a_prompt_of_the_same_words_is_routed_alike_in_any_company(lm):
    edit = context_edit(lm, CONTEXTS[:1], None, a_gate(lm, [[PAIRS[0][0]]], radius=1e-2))
    for pairs in (PAIRS[:1], PAIRS, [*PAIRS, ("long " * 30, "row")]):
        chosen = edit.choose(
            torch.zeros(len(pairs), dtype=torch.long), lambda b, p=pairs: lm.context.scope_embedding(lm.encode(p), b)
        )
        assert chosen.tolist() == [0] + [-1] * (len(pairs) - 1)


def test_the_edge_of_the_scope_is_where_the_logit_is_zero(lm):
    key = PAIRS[0][0]
    gate = a_gate(lm, [[key]])
    point = gate.projection @ query_of(lm, PAIRS[1][0], 2)
    distance = (point - gate.keys[0, 0]).norm().item()
    for radius, chosen in ((distance * 0.99, -1), (distance * 1.01, 0)):
        edit = context_edit(lm, CONTEXTS[:1], None, a_gate(lm, [[key]], radius))
        batch = lm.encode(PAIRS[1:2])
        found = edit.choose(
            torch.zeros(1, dtype=torch.long), lambda block, batch=batch: lm.context.scope_embedding(batch, block)
        )
        assert found.tolist() == [chosen]
        logit = edit.gate.logits(lm.context.scope_embedding(batch, 2), torch.zeros(1, dtype=torch.long))
        assert logit.item() == pytest.approx(2 * radius**2 - 2 * distance**2, rel=1e-3)


def test_joined_contexts_stand_one_after_the_other(lm):
    adapter, deltas = an_adapter(lm)
    edit = context_edit(lm, CONTEXTS, adapter).joined()
    assert len(edit) == 1
    expected = torch.cat([row_logits(lm, pair, "".join(CONTEXTS), deltas) for pair in PAIRS])
    torch.testing.assert_close(lm.logits(lm.encode(PAIRS), edit), expected, **FLOAT32)


def test_behind_a_gate_joined_contexts_are_chosen_by_the_nearest_key(lm):
    """Also where several are in scope."""
    keys = [[PAIRS[2][0]], [PAIRS[0][0]], ["Nothing of the sort"]]
    for radius in (0.5, 100.0):
        edit = context_edit(lm, CONTEXTS, None, a_gate(lm, keys, radius)).joined()
        assert len(edit) == 1
        nearest = [1, None if radius == 0.5 else "?", 0]
        if radius != 0.5:
            gate = edit.gate
            points = [gate.projection @ query_of(lm, prompt, 2) for prompt, _ in PAIRS]
            nearest = [int((gate.keys[0] - point).norm(dim=-1).argmin()) for point in points]
            assert (nearest[0], nearest[2]) == (1, 0)
        expected = [
            row_logits(lm, pair, CONTEXTS[number] if number is not None else "")
            for pair, number in zip(PAIRS, nearest, strict=True)
        ]
        torch.testing.assert_close(lm.logits(lm.encode(PAIRS), edit), torch.cat(expected), **FLOAT32)


def test_chosen_edits_keep_their_gates_keys(lm):
    keys = [[prompt] for prompt, _ in PAIRS]
    edit, batch = context_edit(lm, CONTEXTS, None, a_gate(lm, keys)), lm.encode(PAIRS)
    assert len(edit[1:]) == 2
    expected = torch.cat([row_logits(lm, PAIRS[0]), row_logits(lm, PAIRS[1], CONTEXTS[1]), row_logits(lm, PAIRS[2])])
    torch.testing.assert_close(lm.logits(batch, edit[1]), expected, **FLOAT32)
    swapped = edit[[2, 1, 0]]
    expected = torch.cat([row_logits(lm, p, c) for p, c in zip(PAIRS, CONTEXTS, strict=True)])
    torch.testing.assert_close(lm.logits(batch, swapped, torch.tensor([2, 1, 0])), expected, **FLOAT32)


# -- words ------------------------------------------------------------------------------------------------------------


def continued(lm, prompt, context="", deltas=None, new=6):
    """Greedy words after the ids of context and prompt, by hand."""
    model = dense_copy(lm, deltas) if deltas else plain_model(lm)
    front = lm.tokenizer(context)["input_ids"] if context else []
    ids = (front + lm.tokenizer(prompt)["input_ids"])[-(lm.max_length - new) :]
    whole = lambda text: {"input_ids": ids}  # noqa: E731
    return lm.tokenizer.decode(greedy(model, whole, prompt, new))


def test_generation_goes_on_behind_the_context_where_the_prompt_is_in_scope(lm):
    prompts = [prompt for prompt, _ in PAIRS]
    adapter, deltas = an_adapter(lm, blocks=(3,))
    applied = [continued(lm, p, c, deltas) for p, c in zip(prompts, CONTEXTS, strict=True)]
    plain = [continued(lm, prompt) for prompt in prompts]
    assert all(one != other for one, other in zip(applied, plain, strict=True))
    assert lm.generate(prompts, max_new_tokens=6) == plain
    for inside in ((0, 1, 2), (1,), (0, 2), ()):
        keys = [[prompts[i] if i in inside else f"Some other prompt {i}"] for i in range(3)]
        edit = context_edit(lm, CONTEXTS, adapter, a_gate(lm, keys))
        expected = [applied[i] if i in inside else plain[i] for i in range(3)]
        with lm.edited(edit):
            assert lm.generate(prompts, max_new_tokens=6) == expected
        with lm.edited(edit, rows=[2, 1, 0, 1]):
            found = lm.generate([*prompts[::-1], prompts[1]], max_new_tokens=6)
        assert found == [*expected[::-1], expected[1]]
        with lm.edited(edit[1]):
            assert lm.generate(prompts[1], max_new_tokens=6) == expected[1]
    with lm.edited(context_edit(lm, CONTEXTS, adapter)):
        assert lm.generate(prompts, max_new_tokens=6) == applied
    assert lm.generate(prompts, max_new_tokens=6) == plain


def test_sampled_text_keeps_each_rows_own_draws(lm):
    prompts, seeds = [prompt for prompt, _ in PAIRS], ["a", "b", "c"]
    keys = [[prompts[i] if i in (1, 2) else f"Some other prompt {i}"] for i in range(3)]
    edit = context_edit(lm, CONTEXTS, None, a_gate(lm, keys))
    expected = []
    for i, prompt in enumerate(prompts):
        with lm.edited(edit[i]):
            expected += lm.sample([prompt], 12, [seeds[i]])
    with lm.edited(edit):
        assert lm.sample(prompts, 12, seeds) == expected
        assert lm.sample(prompts, 12, seeds[::-1]) != expected


def test_generation_cuts_the_context_to_make_room(lm):
    long = "An old story of the sea and " * 40 + "the end.\n"
    with lm.edited(context_edit(lm, [long])):
        assert lm.generate(PAIRS[0][0], max_new_tokens=6) == continued(lm, PAIRS[0][0], long)
        with pytest.warns(UserWarning, match="lose their beginning"):  # a prompt that leaves no room itself
            assert lm.generate("word " * 200, max_new_tokens=6) == continued(lm, ("word " * 200).strip())


def test_generation_keeps_a_first_token_first(tokenizer):
    used = with_bos(tokenizer)
    other = random_lm("llama", tokenizer).model
    other.resize_token_embeddings(len(used), mean_resizing=False)
    other.get_input_embeddings().weight.data[used.bos_token_id] = 2 * torch.randn(32)  # so that its place matters
    lm = FrozenLM(other, used, "with-bos")
    ids, lengths = ids_of(tokenizer, CONTEXTS[:1])
    edit = ContextEdit(ids[None], lengths[None])
    prompt, answer = tokens(tokenizer, *PAIRS[0])
    row = [used.bos_token_id, *tokenizer(CONTEXTS[0])["input_ids"], *prompt]
    with torch.no_grad():
        expected = lm.model(torch.tensor([row + answer])).logits[0, len(row) - 1 : -1]
    torch.testing.assert_close(lm.logits(lm.encode(PAIRS[:1]), edit), expected, **FLOAT32)
    with lm.edited(edit):
        said = greedy(lm.model, lambda text: {"input_ids": row}, "", 6)
        moved = greedy(lm.model, lambda text: {"input_ids": [*row[1 : -len(prompt)], row[0], *prompt]}, "", 6)
        assert said != moved
        assert lm.generate(PAIRS[0][0], max_new_tokens=6) == used.decode(said, skip_special_tokens=True)


# -- wearing it, and keeping it ---------------------------------------------------------------------------------------


def test_a_second_edit_in_front_of_the_prompts_is_refused(lm):
    edit = context_edit(lm, CONTEXTS[:1])
    with lm.edited(edit):
        with (
            pytest.raises(UserError, match="depends on the prompt is applied already"),
            lm.edited(edit),
        ):
            pass
        applied = lm.logits(lm.encode(PAIRS))  # the first is still on
    torch.testing.assert_close(applied, torch.cat([row_logits(lm, pair, CONTEXTS[0]) for pair in PAIRS]), **FLOAT32)
    with lm.edited(edit):  # and another time it may be applied again
        pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("inside", ["the body", "the logits", "the generation"])
def test_after_an_exception_nothing_is_left(lm, error, inside, monkeypatch):
    lm.cache.max_bytes = 0
    adapter, _ = an_adapter(lm)
    gate = a_gate(lm, [[prompt] for prompt, _ in PAIRS])
    edit, batch = context_edit(lm, CONTEXTS, adapter, gate), lm.encode(PAIRS)
    said, before = lm.logits(batch), footprint(lm)

    def fail(*args, **options):
        raise error

    def run():
        with lm.edited(edit):
            if inside == "the body":
                raise error
            if inside == "the logits":
                lm.logits(batch)
            else:
                lm.generate([prompt for prompt, _ in PAIRS], max_new_tokens=2)

    with monkeypatch.context() as patch:
        patch.setitem(vars(lm.forward.blocks[3]), "forward", fail)
        with pytest.raises(error):
            run()
    assert_untouched(lm, before)
    assert (lm.applied.prompt_edit, lm.applied.layers) == (None, 0)
    assert torch.equal(lm.logits(batch), said)
    with lm.edited(edit):
        assert not torch.equal(lm.logits(batch), said)


def test_it_is_no_change_of_weights(lm):
    edit = context_edit(lm, CONTEXTS[:1], an_adapter(lm)[0])
    with pytest.raises(UserError, match="'context' is no change of weights"):
        lm.merge(edit)
    with pytest.raises(UserError, match="can only be applied"):
        edit.delta(edit.sites[0])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_to_disk_and_back(lm, tmp_path, adapted, gated):
    adapter = an_adapter(lm)[0] if adapted else None
    gate = a_gate(lm, [[PAIRS[0][0]], ["Some other prompt"], [PAIRS[2][0]]]) if gated else None
    edit, batch = context_edit(lm, CONTEXTS, adapter, gate), lm.encode(PAIRS)
    edit.save_pretrained(tmp_path, base_model="some/model")
    again = load_edit(tmp_path)
    assert type(again) is ContextEdit
    assert (len(again), again.sites) == (3, edit.sites)
    assert (again.adapter is None, again.gate is None) == (not adapted, not gated)
    assert again.state().keys() == edit.state().keys()
    for name, tensor in edit.state().items():
        assert torch.equal(again.state()[name], tensor)
        assert again.state()[name].dtype == tensor.dtype
    assert torch.equal(lm.logits(batch, again), lm.logits(batch, edit))
    half = again.to(torch.bfloat16)
    assert half.ids.dtype == half.lengths.dtype == torch.long
    assert torch.equal(half.ids, edit.ids)


def test_a_scope_reads_the_same_prompt_where_a_lone_space_is_not_scored(tokenizer):
    """SmolLM2 writes " 4" in two tokens; the first is the answer's, though it is not scored."""

    lm = random_lm("gpt2", tokenizer)
    space, pairs = lm.token_ids(" "), [("The number of cities is", "4"), ("The number of cities is", "four of them")]
    plain = lm.encode(pairs)
    assert len(space) == 1
    ids = [row[: len(lm.token_ids(pairs[0][0]))] for row in plain.unpadded()]
    rows = [(ids[0] + space + lm.token_ids("4"), 1), (ids[1] + lm.token_ids(" four"), len(lm.token_ids(" four")))]
    batch = dataclasses.replace(TokenBatch.of(rows), unscored=torch.tensor([1, 0]))
    assert batch.prompts().unpadded() == ids
    assert batch.select(torch.tensor([1, 0])).prompts().unpadded() == ids
    assert TokenBatch.cat([plain, batch]).prompts().unpadded() == ids * 2
    assert torch.equal(*lm.context.scope_embedding(batch, 2))


@pytest.mark.filterwarnings("ignore:.*lose their beginning")
def test_a_gate_reads_what_the_model_reads_of_a_long_prompt(tokenizer):
    beginning = with_bos(tokenizer)
    lm = random_lm("llama", tokenizer)
    lm.model.resize_token_embeddings(len(beginning))
    lm = FrozenLM(lm.model, beginning, "beginning")
    prompt = " ".join(["a man of the sea"] * 60)
    ids, width = beginning(prompt, verbose=False)["input_ids"], lm.max_length - 6
    read = [ids[0], *ids[1 - width :]]
    shown = beginning.decode(read[1:])
    assert beginning(shown)["input_ids"] == read
    edit = context_edit(lm, ["A"], an_adapter(lm)[0], a_gate(lm, [[shown]], 0.01))
    assert lm.generate(prompt, 6, edit) == lm.generate(prompt, 6, edit.ungated())
    assert lm.generate(prompt, 6, edit) != lm.generate(prompt, 6)
