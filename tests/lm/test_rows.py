"""Rows of tokens without answers or behind a context, where a stretch ends, and what layers see and give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import ARCHITECTURES, random_lm
from tests.lm.contexts import CONTEXTS, FLOAT32, PAIRS, with_bos
from tests.reference import assert_untouched, dense, dense_copy, footprint, plain_model, random_factors, tokens

from instructedit.edits import Factors, LowRankEdit
from instructedit.errors import UserError
from instructedit.lm import IGNORE, Text, TokenBatch
from instructedit.lm.tokens import prepend_context, rows_of

# -- rows of tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, "[BOS] $A", "[BOS] $A [EOS]"])
def test_prompts_are_the_rows_without_their_answers(tokenizer, template):
    used = with_bos(tokenizer, template) if template else tokenizer
    first = used.convert_tokens_to_ids(["[BOS]"]) if template else []
    prompts = Text(used, 128).encode(PAIRS).prompts()
    for row, (prompt, _) in enumerate(PAIRS):
        ids = first + tokenizer(prompt)["input_ids"]
        assert prompts.input_ids[row][prompts.attention_mask[row].bool()].tolist() == ids
        assert prompts.attention_mask[row].tolist() == [1] * len(ids) + [0] * (len(prompts.input_ids[row]) - len(ids))
    assert (prompts.labels == IGNORE).all()
    assert prompts.input_ids.shape == prompts.labels.shape == prompts.attention_mask.shape
    longest = max(len(first) + len(tokenizer(prompt)["input_ids"]) for prompt, _ in PAIRS)
    assert prompts.input_ids.shape[1] == longest
    again = prompts.prompts()  # rows that answer nothing are prompts already
    assert torch.equal(again.input_ids, prompts.input_ids)
    assert torch.equal(again.attention_mask, prompts.attention_mask)


def test_after_prompts_only_the_answers_first_token_is_asked_for(tokenizer):
    batch = Text(tokenizer, 128).encode(PAIRS)
    found = batch.after_prompts()
    assert torch.equal(found.input_ids, batch.input_ids)
    assert torch.equal(found.attention_mask, batch.attention_mask)
    for row, pair in enumerate(PAIRS):
        prompt, answer = tokens(tokenizer, *pair)
        assert torch.nonzero(found.labels[row] != IGNORE).tolist() == [[len(prompt) - 1]]
        assert found.labels[row, len(prompt) - 1] == answer[0]
    assert max(len(tokens(tokenizer, *pair)[1]) for pair in PAIRS) > 1


IDS = st.lists(st.integers(1, 50), max_size=9)


@given(own=IDS.filter(bool), context=IDS, room=st.integers(1, 20), first=st.sampled_from([None, 99]))
@settings(max_examples=200, deadline=None)
def test_a_context_stands_between_the_first_token_and_the_row_and_loses_its_beginning(own, context, room, first):
    if first:
        own = [first, *own]
    found = prepend_context(own, context, room, [first] if first else [])
    kept = len(found) - len(own)
    assert kept == min(len(context), max(0, room - len(own)))
    assert found == own[: bool(first)] + context[len(context) - kept :] + own[bool(first) :]
    unopened = prepend_context(own, context, room)  # without a first token to look for
    assert unopened == context[len(context) - kept :] + own


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_labels_move_with_their_rows(data):
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 6)), min_size=1))
    width = max(p + a for p, a, _ in shapes)
    ids, mask = torch.zeros(2, len(shapes), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    for i, (prompt, answer, _) in enumerate(shapes):
        size = prompt + answer
        ids[i, :size], mask[i, :size] = torch.arange(1, size + 1) + 10 * i, 1
        labels[i, prompt - 1 : size - 1] = ids[i, prompt:size]
    contexts = [torch.full((size,), 999) for _, _, size in shapes]
    room = data.draw(st.integers(5, 15))
    batch = TokenBatch(ids, mask, labels).behind(contexts, room)
    for i, (prompt, answer, size) in enumerate(shapes):
        front = min(size, max(0, room - prompt - answer))
        row = [999] * front + ids[i, : prompt + answer].tolist()
        assert batch.input_ids[i, : len(row)].tolist() == row
        assert batch.attention_mask[i].tolist() == [1] * len(row) + [0] * (batch.input_ids.shape[1] - len(row))
        expected = [IGNORE] * (front + prompt - 1) + ids[i, prompt : prompt + answer].tolist()
        assert batch.labels[i].tolist() == expected + [IGNORE] * (batch.labels.shape[1] - len(expected))
    assert batch.input_ids.shape[1] == int(batch.attention_mask.sum(-1).max())


def test_behind_keeps_a_token_that_every_row_starts_with_in_front(tokenizer):
    used = with_bos(tokenizer)
    (bos,) = used.convert_tokens_to_ids(["[BOS]"])
    assert used.bos_token_id == bos
    contexts = [torch.tensor(tokenizer(text)["input_ids"]) for text in CONTEXTS]
    batch = Text(used, 128).encode(PAIRS).behind(contexts, 128, Text(used, 128).opening)
    for row, (pair, context) in enumerate(zip(PAIRS, contexts, strict=True)):
        prompt, answer = tokens(tokenizer, *pair)
        expected = [bos, *context.tolist(), *prompt, *answer]
        assert batch.input_ids[row][batch.attention_mask[row].bool()].tolist() == expected
        at = torch.nonzero(batch.labels[row] != IGNORE).squeeze(-1)
        assert at.tolist() == list(range(len(expected) - len(answer) - 1, len(expected) - 1))
        assert batch.labels[row, at].tolist() == answer


def spans(prompt, words):
    return [(prompt, word, prompt.rfind(word) + len(word)) for word in words]


SPANS = [
    *spans("The capital of France is", ["The", "France", "is"]),
    *spans("Saint Petersburg's mayor, Ωμέγα, was born in", ["Saint Petersburg", "mayor", "Ωμέγα", "in"]),
    *spans("Who", ["Who"]),
]


@pytest.mark.parametrize("template", [None, "[BOS] $A", "[BOS] $A [EOS]", "$A [EOS]"])
def test_the_position_of_a_stretch_is_that_of_its_last_token(tokenizer, template):
    used = with_bos(tokenizer, template) if template else tokenizer
    shift = bool(template) and template.startswith("[BOS]")
    pairs = [(prompt, "a city") for prompt, _, _ in SPANS]
    batch = Text(used, 128).encode(pairs)
    found = Text(used, 128).positions(pairs, [end for _, _, end in SPANS], batch)
    for row, (prompt, word, end) in enumerate(SPANS):
        ids = tokenizer(prompt)["input_ids"]
        whole = [len(tokenizer.decode(ids[: t + 1]).rstrip("\ufffd")) >= end for t in range(len(ids))]
        assert found[row] == whole.index(True) + shift, (prompt, word)
        assert tokenizer.decode(batch.input_ids[row, shift : found[row] + 1]).endswith(word)


@pytest.mark.parametrize("template", [None, "[BOS] $A"])
def test_a_position_moves_with_what_a_long_row_loses(tokenizer, template):
    used = with_bos(tokenizer, template) if template else tokenizer
    pairs = [("word " * 40 + "and Paris is", "Lyon"), ("Paris is", "Lyon"), ("Paris " + "word " * 40, "Lyon")]
    with pytest.warns(UserWarning, match="lose their beginning"):
        batch = Text(used, 20).encode(pairs)
    ends = [prompt.rfind("Paris") + 5 for prompt, _ in pairs]
    found = Text(used, 20).positions(pairs, ends, batch)
    for row in (0, 1):
        read = tokenizer.decode(batch.input_ids[row, : found[row] + 1])
        assert read.endswith("Paris")
        assert " is" not in read
    assert found[2] == bool(template)  # what is lost is nowhere; the first token that is left stands for it


# -- what layers see and give -----------------------------------------------------------------------------------------


def kinds_of(lm):
    """A site, the module of a whole MLP, and a block."""
    site = next(s for s in lm.select(blocks=[2]) if s.output)
    return [site.name, site.mlp, lm.forward.block_name(1), lm.forward.block_name(3)]


def looked_at(model, lm, names, pair):
    seen = {}

    def keep(name):
        def hook(module, args, kwargs, output):
            given = args[0] if args else kwargs["hidden_states"]
            seen[name] = given[0], (output[0] if isinstance(output, tuple) else output)[0]

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True)
    with torch.no_grad():
        model(torch.tensor([sum(tokens(lm.tokenizer, *pair), [])]))  # noqa: RUF017
    return seen


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("edited", [None, "own", "one", "rows"])
def test_what_layers_see_and_give_is_what_hooks_on_a_plain_model_see(lm, edited, cached):
    names, batch = kinds_of(lm), lm.encode(PAIRS)
    factors = random_factors(lm.select(blocks=[1, 2]), 3, 2, scale=0.1)
    edit, rows, applied = LowRankEdit({name: Factors(*pair) for name, pair in factors.items()}), None, (0, 1, 2)
    if edited == "one":
        edit, applied = edit[1], (1, 1, 1)
    elif edited == "rows":
        rows, applied = torch.tensor([2, 0, 0]), (2, 0, 0)
    edit = edit if edited else None
    before = footprint(lm)
    for _ in range(2):
        found = lm.record_activations(batch, names, edit, rows, cached=cached)
        assert found.keys() == set(names)
        for row, pair in enumerate(PAIRS):
            model = dense_copy(lm, dense(factors, applied[row])) if edited else plain_model(lm)
            for name, parts in looked_at(model, lm, names, pair).items():
                for own, expected in zip(found[name], parts, strict=True):
                    torch.testing.assert_close(own[row, : len(expected)], expected, **FLOAT32)
    assert_untouched(lm, before)
    assert bool(len(lm.cache)) is cached


def test_nothing_above_the_last_layer_that_is_looked_at_runs(lm):
    names, batch, ran = kinds_of(lm)[:3], lm.encode(PAIRS), []
    lm.record_activations(batch, names)  # the first time the model is run to learn what its blocks return
    handles = [lm.forward.blocks[i].register_forward_hook(lambda *_, i=i: ran.append(i)) for i in range(4)]
    lm.record_activations(batch, names, cached=False)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]  # and the third as far as its MLP


def test_a_layer_that_is_not_there_is_told(lm):
    with pytest.raises(UserError, match="no edit site 'nowhere'"):
        lm.record_activations(lm.encode(PAIRS), ["nowhere"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_without_answers_are_looked_at_as_well(tokenizer, architecture):
    lm = random_lm(architecture, tokenizer)
    ids, (name, *_) = [tokenizer(prompt)["input_ids"] for prompt, _ in PAIRS], kinds_of(lm)
    found = lm.record_activations(rows_of(ids), [name])[name]
    whole = lm.record_activations(lm.encode(PAIRS), [name])[name]
    for row, prompt in enumerate(ids):
        for short, long in zip(found, whole, strict=True):
            torch.testing.assert_close(short[row, : len(prompt)], long[row, : len(prompt)], **FLOAT32)
