"""Decoding against transformers' own cache, against concatenation, and draws against the distribution they are of."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import ARCHITECTURES, random_lm
from tests.lm.architectures.tiny import tiny_model
from tests.reference import dense, dense_copy, greedy, plain_model, random_factors
from transformers import GPT2Config, MistralConfig, modeling_utils

from instructedit.edits import Factors, LowRankEdit
from instructedit.errors import UserError
from instructedit.lm import decoding, hooks
from instructedit.lm.decoding import Decoder, Draw, _Buffer, draws, preallocated_cache

PROMPTS = ["The capital of France is", "A", "In the year 1969 the first people"]


# -- keys and values --------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=8), room=st.integers(1, 20),
    at_rest=st.sampled_from([None, torch.float16]), data=st.data(),
)  # fmt: skip
def test_a_buffer_holds_what_concatenation_would(sizes, room, at_rest, data):
    buffer, held, expected = _Buffer(room, at_rest), torch.tensor([]), None
    for size in sizes:
        new = torch.randn(3, 2, size, 5)
        expected = new if expected is None else torch.cat([expected, new], -2)
        held = buffer.after(held, new)
        assert torch.equal(held, expected.to(at_rest))
        if data.draw(st.booleans()):  # as a beam search does
            order = torch.tensor(data.draw(st.permutations(range(3))))
            held, expected = held[order], expected[order]
        if expected.shape[-2] > 1 and data.draw(st.booleans()):  # as a rejected guess does
            held, expected = held[..., :-1, :], expected[..., :-1, :]


def test_a_buffer_with_room_copies_nothing():
    buffer = _Buffer(10, None)
    held = buffer.after(torch.tensor([]), torch.randn(2, 1, 4, 3))
    place = held.data_ptr()
    for _ in range(6):
        held = buffer.after(held, torch.randn(2, 1, 1, 3))
        assert held.data_ptr() == place
    assert buffer.after(held, torch.randn(2, 1, 1, 3)).shape[-2] == 11  # more than there is room for


def test_layers_that_forget_keep_their_own_cache(tokenizer):
    assert preallocated_cache(MistralConfig(sliding_window=4), 20) is None


def test_the_cache_of_a_plain_model_has_room():
    cache = preallocated_cache(GPT2Config(n_layer=2, n_embd=8, n_head=2), 6)
    first, second = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 1, 4)
    for layer in range(2):
        kept = cache.update(first, 2 * first, layer)[0].data_ptr()
        keys, values = cache.update(second, 2 * second, layer)
        assert torch.equal(keys, torch.cat([first, second], -2))
        assert torch.equal(values, 2 * keys)
        assert keys.data_ptr() == kept
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize("at_rest", [torch.float16, torch.bfloat16])
def test_keys_and_values_are_rounded_at_rest_alone(at_rest):
    cache = preallocated_cache(GPT2Config(n_layer=1, n_embd=8, n_head=2), 6, at_rest)
    parts = [torch.randn(2, 2, 3, 4), torch.randn(2, 2, 1, 4)]
    cache.update(parts[0], -parts[0], 0)
    keys, values = cache.update(parts[1], -parts[1], 0)
    assert torch.equal(keys, torch.cat(parts, -2).to(at_rest).float())
    assert torch.equal(values, -keys)
    assert cache.layers[0].keys.dtype == at_rest
    assert cache.get_seq_length() == 4


# -- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 5])
def test_draws_follow_the_distribution_of_the_likeliest_tokens(k):
    count, logits = 4000, torch.tensor([0.3, 2.0, -1.0, 1.5, 0.9, 1.1, -torch.inf])
    even = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count
    chosen = Draw(even, k)(logits.repeat(count, 1), torch.zeros(count, dtype=torch.long))
    found = torch.bincount(chosen, minlength=len(logits)) / count
    kept = logits.where(logits >= logits.topk(k).values[-1], -torch.inf)
    torch.testing.assert_close(found, kept.softmax(-1), atol=1.5 / count, rtol=0)


@pytest.mark.parametrize("k", [None, 0, 4])
@pytest.mark.parametrize(("p", "temperature"), [(1.0, 1.0), (1.0, 0.5), (0.6, 1.0), (0.8, 2.0)])
def test_draws_follow_the_whole_distribution_or_its_nucleus(k, p, temperature):
    count, logits = 4000, torch.tensor([0.3, 2.0, -1.0, 1.5, 0.9, 1.1, 3.0])
    even = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count
    draw = Draw(even, k, never=[6], p=p, temperature=temperature)
    given = logits.repeat(count, 1)
    found = torch.bincount(draw(given, torch.zeros(count, dtype=torch.long)), minlength=7) / count
    assert torch.equal(given[0], logits)
    shares = (logits[:6] / temperature).softmax(-1)
    if k:
        shares = shares.where(shares >= shares.topk(k).values[-1], 0)
        shares /= shares.sum()
    order = shares.argsort(descending=True)
    kept = order[: int((shares[order].cumsum(-1) < p - 1e-6).sum()) + 1]
    expected = torch.zeros(7).index_copy(0, kept, shares[kept] / shares[kept].sum())
    torch.testing.assert_close(found, expected, atol=1.5 / count, rtol=0)


def test_each_row_takes_the_draw_of_its_own_step():
    logits, choose = torch.zeros(3, 4), Draw(torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.1, 0.9]]).double(), 2)
    first, second, third = (choose(logits, torch.tensor(steps)).tolist() for steps in ((0, 0, 0), (1, 1, 0), (1, 1, 1)))
    assert first == [second[1], second[0], first[0]]
    assert second[2] == first[2]
    assert third == [second[0], second[1], second[0]]
    assert first[0] != first[1]


@given(seeds=st.lists(st.text(max_size=5), min_size=1, max_size=5, unique=True), tokens=st.integers(1, 6))
def test_a_rows_draws_are_its_own(seeds, tokens):
    found = draws(seeds, tokens)
    assert found.shape == (len(seeds), tokens)
    assert ((found >= 0) & (found < 1)).all()
    assert len({tuple(row) for row in found.tolist()}) == len(seeds)
    for i, seed in enumerate(seeds):
        assert torch.equal(draws([seed], tokens + 2)[0, :tokens], found[i])


# -- texts ------------------------------------------------------------------------------------------------------------


def by_hand(model, tokenizer, prompt, seed, count, k, ends=(0,)):
    """Sampled text, the whole row through the model for each token."""
    ids, said = tokenizer(prompt)["input_ids"], []
    for draw in draws([seed], count)[0]:
        logits = model(torch.tensor([ids + said])).logits[0, -1]
        logits[list(ends)] = -torch.inf
        likeliest = logits.topk(k)
        reached = likeliest.values.double().softmax(-1).cumsum(-1)
        said.append(int(likeliest.indices[min(int((reached <= draw).sum()), k - 1)]))
    return tokenizer.decode(said)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampled_text_is_drawn_row_by_row_under_each_rows_edit(tokenizer, architecture):
    lm = random_lm(architecture, tokenizer)
    factors = random_factors(lm.select(blocks=[1, 3]), 3, 2)
    models = [dense_copy(lm, dense(factors, i)) for i in (2, 0, 0)]
    seeds = ["a", 7, "b"]
    expected = [
        by_hand(model, tokenizer, prompt, seed, 12, 5)
        for model, prompt, seed in zip(models, PROMPTS, seeds, strict=True)
    ]
    edit = LowRankEdit({name: Factors(*pair) for name, pair in factors.items()})
    with lm.edited(edit, [2, 0, 0]):
        assert lm.sample(PROMPTS, 12, seeds) == expected
    plain = [by_hand(plain_model(lm), tokenizer, p, s, 12, 5) for p, s in zip(PROMPTS, seeds, strict=True)]
    assert lm.sample(PROMPTS, 12, seeds) == plain
    assert lm.sample(PROMPTS[1:2], 12, seeds[1:2]) == plain[1:2]
    assert plain != expected
    assert lm.sample([], 12, []) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampled_text_of_rounded_keys_and_values(tokenizer, architecture, monkeypatch):
    lm, caches = random_lm(architecture, tokenizer), []
    _ = lm.generation.decoder.layout

    def kept(*args):
        caches.append(preallocated_cache(*args))
        return caches[-1]

    monkeypatch.setattr(decoding, "preallocated_cache", kept)
    exact = lm.sample(PROMPTS, 12, [1, 2, 3])
    assert lm.sample(PROMPTS, 12, [1, 2, 3], kv_dtype="float16") == exact  # no draw here is so near a bound
    assert [cache.layers[0].keys.dtype for cache in caches] == [torch.float32, torch.float16]
    with pytest.raises(UserError, match="kv_dtype: 'int8' is none of float32, bfloat16, float16"):
        lm.sample(PROMPTS, 12, [1, 2, 3], kv_dtype="int8")


@pytest.mark.parametrize("several", [False, True])
def test_sampled_text_does_not_end_early(tokenizer, several):
    lm = random_lm("gpt2", tokenizer)
    first = greedy(plain_model(lm), tokenizer, PROMPTS[0], 1)[0]
    lm.model.generation_config.eos_token_id = [first, 5] if several else first
    assert lm.generate(PROMPTS[0], max_new_tokens=9) == tokenizer.decode([first])
    (said,) = lm.sample(PROMPTS[:1], 9, [0], top_k=1)
    expected = by_hand(lm.model, tokenizer, PROMPTS[0], 0, 9, 1, [first, 5] if several else [first])
    assert said == expected


def test_the_random_state_stays(lm):
    state = torch.get_rng_state()
    lm.sample(PROMPTS, 4, [0, 1, 2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_reads_last_positions_in_one_piece(tokenizer, architecture):
    lm, given = random_lm(architecture, tokenizer), []
    _ = lm.generation.decoder.layout

    head = lm.model.get_output_embeddings()
    seen = head.register_forward_hook(lambda _, args, __: given.append(args[0].is_contiguous()))
    lm.sample(PROMPTS, 3, [1, 2, 3])
    seen.remove()
    assert len(given) == 3
    assert all(given)
    assert not head._forward_pre_hooks
    with hooks.contiguous_inputs(None):  # of a model without a head
        pass


@pytest.mark.parametrize("name", ["gpt2", "openai-gpt"])
def test_transformers_does_not_suspect_padding(name, monkeypatch):
    """Token 0 pads and ends texts; openai-gpt reads whole rows in each step."""
    model = tiny_model(name)
    model.config.pad_token_id = 0
    said = []
    monkeypatch.setattr(modeling_utils.logger, "warning_once", said.append)
    text = Decoder(model)([[5, 6, 0], [0, 7]], [3, 5])
    assert list(map(len, text)) == [3, 5]
    assert not said
