"""The fast paths of the frozen LM against whole forward passes of plain models, and that it stays frozen."""

import pytest
import torch
from tests.conftest import ARCHITECTURES, random_lm
from tests.reference import (
    answer_logits,
    assert_untouched,
    dense,
    dense_copy,
    footprint,
    gradients,
    greedy,
    plain_model,
    random_factors,
)

from instructedit.edits import ContextEdit, Factors, LowRankEdit
from instructedit.errors import UserError
from instructedit.lm import TokenBatch

PAIRS = [
    ("The capital of France is", "Lyon"),
    ("Who", "the man who came from the sea"),
    ("A much longer prompt about a river and about a city", "Spree"),
]
FLOAT32 = {"atol": 2e-5, "rtol": 1e-4}


def edit_of(factors):
    return LowRankEdit({name: Factors(*pair) for name, pair in factors.items()})


def one_by_one(lm, pairs, deltas=None):
    """Logits at the answer positions, row by row, each row under its own dense change."""
    models = [dense_copy(lm, d) for d in deltas] if deltas else [plain_model(lm)] * len(pairs)
    with torch.no_grad():
        return torch.cat([answer_logits(m, lm.tokenizer, *pair) for m, pair in zip(models, pairs, strict=True)])


def test_logits_are_the_whole_models(lm):
    torch.testing.assert_close(lm.logits(lm.encode(PAIRS)), one_by_one(lm, PAIRS), **FLOAT32)


@pytest.mark.parametrize("cache_bytes", [0, 2 << 20])
@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_a_prefix_from_any_block_changes_nothing(lm, start, cache_bytes):
    lm.cache.max_bytes = cache_bytes
    factors = random_factors(lm.select(blocks=[start]), 3, 2)
    plain, applied = one_by_one(lm, PAIRS), one_by_one(lm, PAIRS, [dense(factors, i) for i in range(3)])
    assert (plain - applied).abs().max() > 0.1  # so that the edit matters
    batch = lm.encode(PAIRS)
    for _ in range(2):  # the second time from the cache, where there is one
        torch.testing.assert_close(lm.logits(batch, start=start), plain, **FLOAT32)
        torch.testing.assert_close(lm.logits(batch, edit_of(factors), start=start), applied, **FLOAT32)
    assert (lm.cache.hits > 0) == bool(start and cache_bytes)


@pytest.mark.parametrize("cache_bytes", [0, 2 << 20])
@pytest.mark.parametrize("start", [0, 2])
def test_unedited_logits_run_each_block_once_for_each_row(lm, start, cache_bytes):
    lm.cache.max_bytes = cache_bytes
    lm.logits(lm.encode(PAIRS), start=2)  # the prefix is known
    ran = []
    for number, block in enumerate(lm.forward.blocks):
        own = block.forward
        block.forward = lambda x, *a, own=own, number=number, **k: (ran.extend([number] * len(x)), own(x, *a, **k))[1]
    expected = one_by_one(lm, PAIRS)
    ran.clear()
    for _ in range(2):
        torch.testing.assert_close(
            lm.forward.head(lm.scores.unedited_states(lm.encode(PAIRS), start)), expected, **FLOAT32
        )
    first = [n for n in range(len(lm.forward.blocks)) if not (cache_bytes and start) or n >= start]
    assert sorted(ran) == sorted(first * len(PAIRS) * (1 if cache_bytes else 2))
    edit = edit_of(random_factors(lm.select(blocks=[0]), 1, 2))
    with lm.edited(edit), pytest.raises(UserError, match="an edit is applied"):
        lm.scores.unedited_states(lm.encode(PAIRS))


def test_what_an_applied_edit_predicts_is_not_kept_as_the_unedited_model_s(lm):
    batch = lm.encode(PAIRS)
    for edit in (
        edit_of(random_factors(lm.select(blocks=[0]), 1, 2)),
        ContextEdit(torch.tensor([[[5, 6, 7]]]), torch.tensor([[3]])),
    ):
        with lm.edited(edit), pytest.raises(UserError, match="an edit is applied"):
            lm.scores.unedited_predictions(batch)
        with lm.edited(edit), pytest.raises(UserError, match="an edit is applied"):
            lm.scores.unedited_states(batch)
    expected = -one_by_one(lm, PAIRS).log_softmax(-1)[range(len(batch.answers)), batch.answers]
    torch.testing.assert_close(lm.scores.unedited_predictions(batch).nll, expected, **FLOAT32)


@pytest.mark.parametrize("cache_bytes", [0, 2 << 20])
@torch.no_grad()
def test_unedited_answers_are_judged_once(lm, cache_bytes, monkeypatch):
    lm.cache.max_bytes = cache_bytes
    heads, own = [], lm.forward.head
    monkeypatch.setattr(lm.forward, "head", lambda states: (heads.append(len(states)), own(states))[1])
    front, last = PAIRS[0][0].rsplit(" ", 1)
    pairs = [*PAIRS, (front, f"{last} {PAIRS[0][1]}")]  # the last one is the first's text, asked for earlier
    for chosen in ([0, 1, 2, 3], [3, 0], [2, 2, 1]):
        batch = lm.encode([pairs[i] for i in chosen])
        alone = [lm.logits(lm.encode([pairs[i]])) for i in chosen]
        expected = -torch.cat(alone).log_softmax(-1)[range(len(batch.answers)), batch.answers]
        heads.clear()
        found = lm.scores.unedited_predictions(batch, 1)
        torch.testing.assert_close(found.nll, expected, **FLOAT32)
        assert torch.equal(found.predicted, torch.cat(alone).argmax(-1))
        assert bool(heads) == (not cache_bytes or len(chosen) == 4)
    assert lm.cache.bytes <= cache_bytes


def test_rows_hit_the_cache_in_any_company(lm):
    lm.logits(lm.encode(PAIRS), start=2)
    assert (lm.cache.hits, lm.cache.misses, len(lm.cache)) == (0, 3, 3)
    assert sum(row.untyped_storage().nbytes() for row in lm.cache._rows.values()) == lm.cache.bytes  # no hidden views
    other = [PAIRS[1], PAIRS[0], ("New", "row"), ("New", "row")]
    found = lm.logits(lm.encode(other), start=2)
    assert (lm.cache.hits, lm.cache.misses, len(lm.cache)) == (3, 4, 4)  # the new row is computed once
    torch.testing.assert_close(found, one_by_one(lm, other), **FLOAT32)
    lm.logits(lm.encode(PAIRS), start=1)  # another block, other states
    assert (lm.cache.misses, len(lm.cache)) == (7, 7)
    lm.cache.clear()
    assert (lm.cache.bytes, len(lm.cache)) == (0, 0)


def test_rows_of_several_batches_are_made_known_together(lm, monkeypatch):
    batches = [lm.encode(PAIRS[:2]), lm.encode(PAIRS[1:])]
    expected = lm.prefixes.of(lm.encode(PAIRS), 2).clone()
    lm.forget()
    runs, run = [], lm.forward.run
    monkeypatch.setattr(lm.forward, "run", lambda inputs: runs.append(inputs) or run(inputs))
    lm.prefixes.warm(batches, 2)
    assert len(runs) == 2  # of two widths
    assert torch.equal(lm.prefixes.of(lm.encode(PAIRS), 2), expected)
    assert len(runs) == 2
    lm.forget()
    lm.cache.max_bytes = 1
    lm.prefixes.warm(batches, 2)
    assert len(runs) == 2  # what cannot be kept is not made


@pytest.mark.parametrize("kept", [True, False])
def test_rows_share_what_they_begin_with_where_bits_do_not_matter(lm, kept, monkeypatch):
    asked = lm.encode([(PAIRS[2][0], answer) for answer in ("Spree", "Seine", "the Rhine")])
    alone, read = lm.prefixes.of(asked, 2).clone(), asked.attention_mask.bool()
    lm.forget()
    lm.cache.max_bytes = (1 << 20) * kept
    seen, run = [], lm.forward.run
    monkeypatch.setattr(lm.forward, "run", lambda inputs: seen.append(inputs["input_ids"].numel()) or run(inputs))
    together = [lm.prefixes.of(asked, 2, together=True).clone() for _ in range(2)]
    assert seen == [seen[0]] * (1 if kept else 2)
    assert seen[0] < sum(asked.lengths)
    torch.testing.assert_close(together[0][read], alone[read], **FLOAT32)
    assert torch.equal(*together)
    assert torch.equal(together[0][0, : asked.lengths[0] - 3], together[0][1, : asked.lengths[0] - 3])
    assert torch.equal(lm.prefixes.of(asked, 2)[read], alone[read])  # training computes its own, the same as ever
    assert len(seen) > (1 if kept else 2)
    seen.clear()
    assert torch.equal(lm.prefixes.of(asked, 2, together=True), together[0])
    assert len(seen) == (0 if kept else 1)


def test_the_cache_keeps_to_its_bytes_and_throws_out_the_oldest(lm):
    sizes = [int(lm.encode([pair]).attention_mask.sum()) * 32 * 4 for pair in PAIRS]  # width 32, float32
    lm.cache.max_bytes = sizes[0] + sizes[1]
    for pair in (PAIRS[0], PAIRS[1], PAIRS[0]):
        lm.logits(lm.encode([pair]), start=2)
    assert (lm.cache.bytes, lm.cache.hits) == (sizes[0] + sizes[1], 1)
    lm.cache.max_bytes = sizes[0] + sizes[2]
    torch.testing.assert_close(lm.logits(lm.encode(PAIRS[2:]), start=2), one_by_one(lm, PAIRS[2:]), **FLOAT32)
    assert lm.cache.bytes == sizes[0] + sizes[2]
    misses = lm.cache.misses
    lm.logits(lm.encode(PAIRS[:1]), start=2)
    assert lm.cache.misses == misses  # row 1 was the least recently used
    lm.cache.max_bytes = 1  # smaller than any row
    torch.testing.assert_close(lm.logits(lm.encode(PAIRS), start=2), one_by_one(lm, PAIRS), **FLOAT32)
    assert lm.cache.bytes == 0


@pytest.mark.parametrize("start", [0, 2])
def test_padding_does_not_matter(lm, start):
    batch, names = lm.encode(PAIRS[:2]), [s.name for s in lm.select(blocks=[3])]
    ids = torch.where(batch.attention_mask.bool(), batch.input_ids, 7)
    other = TokenBatch(ids, batch.attention_mask, batch.labels)
    longer = lm.encode([*PAIRS[:2], ("long " * 30, "row")])
    expected, seen = lm.logits(batch, start=start), lm.capture(batch, names)
    for changed in (other, longer):
        lm.cache.clear()
        torch.testing.assert_close(lm.logits(changed, start=start)[: len(expected)], expected, **FLOAT32)
        again, width = lm.capture(changed, names), batch.input_ids.shape[1]
        torch.testing.assert_close(again.loss[:2], seen.loss, **FLOAT32)
        for name in names:
            torch.testing.assert_close(again.delta[name][:2, :width], seen.delta[name], atol=1e-6, rtol=1e-4)
            assert not again.delta[name][:2, width:].any()


@pytest.mark.parametrize("blocks", [[0, 2], [-1]])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_capture_gives_each_rows_weight_gradient(lm, mode, blocks):
    names = [s.name for s in lm.select(blocks=blocks)]
    with mode():
        seen = lm.capture(lm.encode(PAIRS), names)
    for row, pair in enumerate(PAIRS):
        expected = gradients(lm, names, *pair)
        torch.testing.assert_close(seen.loss[row], expected.loss, **FLOAT32)
        for name in names:
            length = len(expected.u[name])
            torch.testing.assert_close(seen.u[name][row, :length], expected.u[name], **FLOAT32)
            torch.testing.assert_close(seen.delta[name][row, :length], expected.delta[name], atol=1e-6, rtol=1e-3)
            # The last answer token predicts nothing, and padding belongs to no loss.
            assert not seen.delta[name][row, length - 1 :].any()
            total = seen.delta[name][row].T @ seen.u[name][row]
            torch.testing.assert_close(total, expected.weight[name], atol=2e-6, rtol=1e-3)
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())
    assert not any(t.requires_grad for t in (*seen.u.values(), *seen.delta.values(), seen.loss))


def test_different_edits_in_one_batch_are_merged_models_one_by_one(lm):
    factors = random_factors(lm.select(blocks=[1, 3]), 3, 2)
    edit, batch = edit_of(factors), lm.encode(PAIRS)
    expected = one_by_one(lm, PAIRS, [dense(factors, i) for i in range(3)])
    torch.testing.assert_close(lm.logits(batch, edit), expected, **FLOAT32)
    rows = [2, 0, 0]
    expected = one_by_one(lm, PAIRS, [dense(factors, i) for i in rows])
    torch.testing.assert_close(lm.logits(batch, edit, torch.tensor(rows), start=1), expected, **FLOAT32)
    expected = one_by_one(lm, PAIRS, [dense(factors, 1)] * 3)  # a single edit is applied to every row
    torch.testing.assert_close(lm.logits(batch, edit[1]), expected, **FLOAT32)
    both = {name: sum(dense(factors, i)[name] for i in range(3)) for name in factors}
    torch.testing.assert_close(lm.logits(batch, edit.joined()), one_by_one(lm, PAIRS, [both] * 3), **FLOAT32)


def test_edited_is_worn_by_the_plain_model(lm):
    factors = random_factors(lm.select(blocks=[1, 3]), 2, 2)
    ids = torch.tensor([lm.tokenizer(PAIRS[0][0])["input_ids"]] * 3)
    models = [dense_copy(lm, dense(factors, i)) for i in (1, 0, 1)]
    with torch.no_grad():
        expected = torch.cat([model(ids[:1]).logits for model in models])
        with lm.edited(edit_of(factors), rows=[1, 0, 1]) as applied:
            assert applied is lm
            torch.testing.assert_close(lm.model(ids).logits, expected, **FLOAT32)


def test_rows_that_do_not_match_are_refused(lm):
    edit = edit_of(random_factors(lm.select(blocks=[3]), 2, 1))
    ids = torch.ones(3, 4, dtype=torch.long)
    for rows, message in ((None, "2 edits and a batch of 3 rows"), ([0, 1], "edits of 2 rows, the batch has 3")):
        with pytest.raises(UserError, match=message), lm.edited(edit, rows):
            lm.model(ids)


def test_an_edit_of_another_model_is_refused(lm):
    edit = LowRankEdit({"model.h.0.mlp.c": Factors(torch.ones(1, 1, 32), torch.ones(1, 1, 32))})
    for wear in (lambda: lm.logits(lm.encode(PAIRS), edit), lambda: lm.merge(edit)):
        with pytest.raises(UserError, match=r"no edit site 'model\.h\.0\.mlp\.c'"):
            wear()


@pytest.mark.parametrize("leave", ["normally", "in the body", "in the forward pass"])
def test_edits_leave_no_trace(lm, leave):
    lm.cache.max_bytes = 0
    batch, edit = lm.encode(PAIRS), edit_of(random_factors(lm.select(blocks=[1, 3]), 3, 2))
    before, said = footprint(lm), lm.logits(batch)
    if leave == "normally":
        with lm.edited(edit):
            assert not torch.equal(lm.logits(batch), said)
            lm.capture(batch, list(edit.sites))
        lm.logits(batch, edit, start=1)
    elif leave == "in the body":
        with pytest.raises(KeyboardInterrupt), lm.edited(edit):
            raise KeyboardInterrupt
    else:
        for start in (0, 1):
            with pytest.raises(UserError):
                lm.logits(batch, edit[:2], start=start)
        with pytest.raises(UserError), lm.edited(edit[:2]):
            lm.capture(batch, list(edit.sites))
    assert_untouched(lm, before)
    assert torch.equal(lm.logits(batch), said)


def test_merge_leaves_the_model_alone_and_equals_wearing(lm):
    batch, edit = lm.encode(PAIRS), edit_of(random_factors(lm.select(blocks=[1, 3]), 3, 2))
    before, said = footprint(lm), lm.logits(batch)
    merged = lm.merge(edit[1])
    assert_untouched(lm, before)
    assert torch.equal(lm.logits(batch), said)
    with torch.no_grad(), lm.edited(edit[1]):
        applied = lm.model(batch.input_ids, attention_mask=batch.attention_mask).logits
    with torch.no_grad():
        found = merged(batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(found, applied, **FLOAT32)
    with pytest.raises(UserError, match=r"one edit, got 3"):
        lm.merge(edit)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16(tokenizer, architecture):
    lm, exact = random_lm(architecture, tokenizer, torch.bfloat16), random_lm(architecture, tokenizer)
    edit = edit_of(random_factors(lm.select(blocks=[1, 3]), 3, 2))
    batch = lm.encode(PAIRS)
    for applied in (None, edit):
        found, expected = lm.logits(batch, applied, start=1), exact.logits(batch, applied)
        assert found.dtype == torch.bfloat16
        assert torch.nn.functional.cosine_similarity(found.float(), expected).min() > 0.99
    seen = lm.capture(batch, list(edit.sites))
    assert all(d.dtype == torch.bfloat16 and d.isfinite().all() and d.any() for d in seen.delta.values())
    assert all(p.dtype == torch.bfloat16 for p in lm.merge(edit[0]).parameters())
    assert len(lm.generate(["A", "The capital of"], max_new_tokens=3)) == 2


def test_generating_together_is_generating_alone(lm):
    prompts = [prompt for prompt, _ in PAIRS]
    plain = [greedy(plain_model(lm), lm.tokenizer, prompt, 6) for prompt in prompts]
    assert lm.generate(prompts, max_new_tokens=6) == [lm.tokenizer.decode(ids) for ids in plain]
    assert lm.generate(prompts[1], max_new_tokens=6) == lm.tokenizer.decode(plain[1])
    factors = random_factors(lm.select(blocks=[1, 3]), 3, 2)
    for rows, applied in ((None, (0, 1, 2)), ([2, 0, 0], (2, 0, 0))):
        models = [dense_copy(lm, dense(factors, i)) for i in applied]
        expected = [greedy(m, lm.tokenizer, prompt, 6) for m, prompt in zip(models, prompts, strict=True)]
        with lm.edited(edit_of(factors), rows):
            assert lm.generate(prompts, max_new_tokens=6) == [lm.tokenizer.decode(ids) for ids in expected]
        assert expected != plain


def test_generation_stops_row_by_row(lm):
    prompts = [prompt for prompt, _ in PAIRS]
    alone = [greedy(plain_model(lm), lm.tokenizer, prompt, 6) for prompt in prompts]
    stop = alone[1][2]
    expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in alone]
    lm.model.generation_config.eos_token_id = stop
    assert lm.generate(prompts, max_new_tokens=6) == [lm.tokenizer.decode(ids) for ids in expected]


def test_each_prompt_may_have_its_own_room(lm):
    prompts = [prompt for prompt, _ in PAIRS]
    alone = [lm.generate(prompt, max_new_tokens=room) for prompt, room in zip(prompts, (1, 6, 3), strict=True)]
    assert lm.generate(prompts, max_new_tokens=[1, 6, 3]) == alone
    with pytest.raises(UserError, match="2 numbers for 3 prompts"):
        lm.generate(prompts, max_new_tokens=[1, 6])


def test_generation_makes_room_in_the_context(lm):
    prompt = "long" + " long" * 199
    expected = greedy(plain_model(lm), lm.tokenizer, prompt, 6, keep=lm.max_length - 6)
    with pytest.warns(UserWarning, match="lose their beginning"):
        assert lm.generate(prompt, max_new_tokens=6) == lm.tokenizer.decode(expected)
    with pytest.raises(UserError, match="max_new_tokens=128 leaves no room"):
        lm.generate("A", max_new_tokens=128)


def test_layers_that_are_given_their_input_by_name_are_seen_like_any_other(tokenizer):
    lm, by_name = (random_lm("gpt2", tokenizer) for _ in range(2))
    mlp = by_name.forward.blocks[2].mlp
    mlp.forward = lambda states: mlp.c_proj(x=mlp.act(mlp.c_fc(x=states)))
    names = [site.name for site in lm.select(blocks=[2])]
    batch = lm.encode(PAIRS)
    expected, found = lm.capture(batch, names), by_name.capture(batch, names)
    before, after = lm.record_activations(batch, names), by_name.record_activations(batch, names)
    for name in names:
        assert torch.equal(found.u[name], expected.u[name])
        assert torch.equal(found.delta[name], expected.delta[name])
        assert torch.equal(after[name].inputs, before[name].inputs)


def test_a_new_maximum_length_holds_for_rows_and_text_alike(lm):
    lm.max_length = 8
    with pytest.warns(UserWarning, match="lose their beginning"):
        assert lm.encode([("A much longer prompt about a river and about a city", "it")]).input_ids.shape == (1, 8)
    with pytest.warns(UserWarning, match="lose their beginning"):
        assert lm.generate("A much longer prompt about a river and about a city", 2)
