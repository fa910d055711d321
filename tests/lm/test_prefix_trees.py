"""Trees of tokens against the rows they stand for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import ARCHITECTURES, random_lm
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)

from instructedit.lm import FrozenLM
from instructedit.lm.prefix_trees import PrefixTrees
from instructedit.lm.tokens import rows_of

FRONT = "Task: CounterFact\nDescription: a sentence about the world that is to be changed.\nInput: "
PROMPTS = ["The capital of France is", "The capital of Spain is", "A", "In the year 1969 the first people"]
ROWS = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=9), min_size=1, max_size=12)


@given(rows=ROWS, width=st.integers(1, 20))
def test_each_row_finds_itself_in_a_tree(rows, width):
    prefix_trees = PrefixTrees.of(rows, width)
    for row, places in zip(rows, prefix_trees.places, strict=True):
        tree = int(places[0]) // prefix_trees.ids.shape[1]
        assert prefix_trees.ids.flatten()[places].tolist() == row
        assert prefix_trees.positions.flatten()[places].tolist() == list(range(len(row)))
        within = places - tree * prefix_trees.ids.shape[1]
        for number, place in enumerate(within.tolist()):
            assert prefix_trees.sees[tree, place].nonzero().flatten().tolist() == within[: number + 1].tolist()


@given(rows=ROWS, width=st.integers(1, 20))
def test_trees_are_full_and_hold_nothing_twice(rows, width):
    prefix_trees = PrefixTrees.of(rows, width)
    members = {}
    for row, places in zip(rows, prefix_trees.places, strict=True):
        members.setdefault(int(places[0]) // prefix_trees.ids.shape[1], []).append((row, places.tolist()))
    sizes = []
    for inside in members.values():
        beginnings = {tuple(row[: end + 1]) for row, _ in inside for end in range(len(row))}
        sizes.append(len({place for _, places in inside for place in places}))
        assert sizes[-1] == len(beginnings)
        assert sizes[-1] <= width or all(row == inside[0][0] for row, _ in inside)
    assert prefix_trees.ids.shape == (len(members), max(sizes))


@given(rows=ROWS, width=st.integers(1, 20))
def test_what_stands_in_several_trees_is_read_from_one(rows, width):
    prefix_trees = PrefixTrees.of(rows, width)
    once = prefix_trees.read_once(rows)
    first = {}
    for row, own, places in zip(rows, prefix_trees.places, once.places, strict=True):
        assert once.ids.flatten()[places].tolist() == row
        for end, place in enumerate(places.tolist(), 1):
            assert first.setdefault(tuple(row[:end]), int(own[end - 1])) == place


def test_padding_sees_itself():
    prefix_trees = PrefixTrees.of([[1] * 4, [2]], 4)
    assert prefix_trees.ids.shape == (2, 4)
    assert prefix_trees.sees.any(-1).all()  # a softmax over nothing would be nan


@given(rows=ROWS, width=st.integers(1, 20))
def test_states_come_back_row_by_row(rows, width):
    prefix_trees = PrefixTrees.of(rows, width)
    found = prefix_trees.states(prefix_trees.ids.unsqueeze(-1).double())
    assert found.shape == (len(rows), max(map(len, rows)), 1)
    for row, states in zip(rows, found, strict=True):
        assert states.flatten()[: len(row)].tolist() == row


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("block", [0, 2, 3])
def test_the_prefix_is_that_of_each_row(tokenizer, architecture, block):
    lm = random_lm(architecture, tokenizer)
    batch = lm.encode([(front + prompt, " Paris") for front in ("", FRONT) for prompt in PROMPTS])
    kept = batch.attention_mask.bool()
    found = lm.prefixes.of(batch, block)
    for i, row in enumerate(batch.input_ids):
        alone = lm.forward.up_to_block(rows_of([row[kept[i]].tolist()]), block)
        torch.testing.assert_close(found[i][kept[i]], alone[0], rtol=1e-4, atol=1e-5)
    assert not found[~kept].any()


# -- other architectures ----------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 600}
OTHERS = {
    "opt": (OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32), True),
    "gpt-neox": (GPTNeoXConfig(**SMALL, intermediate_size=64), True),
    "qwen2": (Qwen2Config(**SMALL, intermediate_size=64, num_key_value_heads=2), True),
    "sliding": (MistralConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, sliding_window=20), False),
    "bloom": (BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=600), False),
    "alibi": (FalconConfig(**SMALL, alibi=True, new_decoder_architecture=False), False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_takes_no_trees_gets_rows(tokenizer, name):
    config, takes = OTHERS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = torch.randn(parameter.shape) * 0.15
    lm = FrozenLM(model, tokenizer, name, max_length=128)
    assert lm.prefixes.takes_trees is takes
    batch = lm.encode([(FRONT + prompt, " Paris") for prompt in PROMPTS])
    kept = batch.attention_mask.bool()
    torch.testing.assert_close(
        lm.prefixes.of(batch, 2)[kept], lm.forward.up_to_block(batch, 2)[kept], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("window", [16, 60])
def test_a_window_that_the_config_of_the_cache_does_not_show(tokenizer, window):
    """GPT-Neo's local attention: rows shorter than its window say nothing of it."""
    config = GPTNeoConfig(
        hidden_size=32, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]], window_size=window,
        vocab_size=600, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = torch.randn(parameter.shape) * 0.15
    lm = FrozenLM(model, tokenizer, "windows", max_length=128)
    batch = lm.encode([(FRONT * 2 + prompt, " Paris") for prompt in PROMPTS])
    assert max(batch.lengths) > window
    kept = batch.attention_mask.bool()
    torch.testing.assert_close(
        lm.prefixes.of(batch, 3)[kept], lm.forward.up_to_block(batch, 3)[kept], rtol=1e-4, atol=1e-5
    )


def test_a_model_that_counts_positions_itself_gets_rows(tokenizer):
    lm = random_lm("gpt2", tokenizer)
    own = lm.model.forward
    lm.model.forward = lambda *args, position_ids=None, **kwargs: own(*args, **kwargs)
    assert not lm.prefixes.takes_trees
