"""Keys and values of what prompts begin with, against whole rows."""

from dataclasses import replace

import pytest
import torch
from tests.conftest import ARCHITECTURES, random_lm
from tests.reference import random_factors

from instructedit.edits import Factors, LowRankEdit
from instructedit.lm.cache.prompt_prefixes import SHORTEST, Beginning, PromptPrefixes
from instructedit.lm.tokens import IGNORE, SHAPE, rows_of

BREAK = 99
INSTRUCTION = [*range(10, 10 + 2 * SHORTEST), BREAK]


def beginning(ids, blocks=2):
    sizes = (blocks, 1, len(ids), 2)
    return Beginning(tuple(ids), torch.ones(len(ids), 4), torch.ones(sizes), torch.ones(sizes))


def with_lines(lm):
    lm.prefixes.prompt_prefixes.breaks = lambda token: token == BREAK
    return lm.try_out()


def read(lm):
    """How many positions the first block runs on, pass by pass."""
    seen = []
    lm.forward.blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape[:2].numel()),
        with_kwargs=True,
    )
    return seen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_behind_a_known_beginning_are_the_rows_themselves(tokenizer, architecture):
    lm = with_lines(random_lm(architecture, tokenizer))
    assert lm.prefixes.takes_prompt_prefixes
    batches = [
        [[*INSTRUCTION, 1, 2, 3], [*INSTRUCTION, 4], [5, 6, 7]],
        [[*INSTRUCTION, 9, 9], [*INSTRUCTION, 1, BREAK], [300, *INSTRUCTION, 301, 302], [7]],
        [[*INSTRUCTION, 1, 2, 3, 4, 5], [5, 6, BREAK, 8]],
    ]
    for rows in batches:
        found = lm.prefixes.of(rows_of(rows), 3)
        for row, states in zip(rows, found, strict=True):
            expected = lm.forward.up_to_block(rows_of([row]), 3)[0]
            torch.testing.assert_close(states[: len(row)], expected, rtol=1e-4, atol=1e-5)
    assert len(lm.prefixes.prompt_prefixes) == 2


def test_a_known_instruction_does_not_run_again(tokenizer):
    lm = with_lines(random_lm("llama", tokenizer))
    seen = read(lm)
    lm.prefixes.of(rows_of([[*INSTRUCTION, 1, 2]]), 2)
    lm.prefixes.of(rows_of([[*INSTRUCTION, 4, 5, 6], [*INSTRUCTION, 4, 7]]), 2)
    assert seen == [len(INSTRUCTION), SHAPE, 2 * SHAPE]  # what stands behind it is padded
    lm.forget()
    lm.prefixes.of(rows_of([[*INSTRUCTION, 8, 5]]), 2)
    assert seen[3:] == [len(INSTRUCTION), SHAPE]


def test_states_do_not_depend_on_what_came_before(tokenizer):
    rows = rows_of([[*INSTRUCTION, 1, 2, 3], [*INSTRUCTION, 4]])
    fresh, used = (with_lines(random_lm("gpt2", tokenizer)) for _ in range(2))
    used.prefixes.of(rows_of([[*INSTRUCTION, 7, 7, 7, 7], [*INSTRUCTION[3:], 1]]), 2)
    assert torch.equal(fresh.prefixes.of(rows, 2), used.prefixes.of(rows, 2))


def test_rows_longer_than_what_was_tried_are_run_as_rows(tokenizer, monkeypatch):
    lm = with_lines(random_lm("gpt2", tokenizer))
    monkeypatch.setattr("instructedit.lm.prefix_states.WIDTH", 20)
    lm.prefixes.of(rows_of([[*INSTRUCTION, 1]]), 2)
    assert not len(lm.prefixes.prompt_prefixes)


@pytest.fixture(params=[1, 2])  # more split rows where vectors end, and what is left over is rounded differently
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_have_the_same_bits_whatever_else_is_unknown(tokenizer, architecture, dtype, threads):
    """So a run that goes on with an empty cache is the one that did not stop."""
    lm = with_lines(random_lm(architecture, tokenizer))
    lm.model.to(dtype)
    draw = torch.Generator().manual_seed(threads)
    lengths = torch.randint(1, 60, (40,), generator=draw).tolist()
    rows = [torch.randint(1, 98, (size,), generator=draw).tolist() for size in lengths]
    rows += [[*INSTRUCTION[number:], *row[:20]] for number, row in enumerate(rows[:12])]
    batch = rows_of(rows)
    labelled = replace(batch, labels=batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORE))
    together, leaving = lm.prefixes.of(batch, 3), lm.scores.unedited_states(labelled, 2).split(labelled.answer_sizes())
    for part in ([0], [51], [3, 50, 7], list(range(0, 52, 2)), list(range(51, 10, -1))):
        lm.forget()
        some = labelled.select(torch.tensor(part))
        left = lm.scores.unedited_states(some, 2).split(some.answer_sizes())
        for i, states, top in zip(part, lm.prefixes.of(some, 3), left, strict=True):
            assert torch.equal(states[: len(rows[i])], together[i, : len(rows[i])]), (part, i)
            assert torch.equal(top, leaving[i]), (part, i)


def test_another_block_knows_nothing_of_it(tokenizer):
    lm = with_lines(random_lm("gpt2", tokenizer))
    row = [*INSTRUCTION, 1, 2]
    lm.prefixes.of(rows_of([row]), 1)
    torch.testing.assert_close(
        lm.prefixes.of(rows_of([row]), 3)[0], lm.forward.up_to_block(rows_of([row]), 3)[0], rtol=1e-4, atol=1e-5
    )


def test_a_beginning_is_all_lines_but_the_last():
    known = PromptPrefixes(1 << 20, lambda token: token == BREAK)
    assert known.of([*INSTRUCTION, 1, 2]) == tuple(INSTRUCTION)
    assert known.of([*INSTRUCTION, *INSTRUCTION, 3]) == tuple(INSTRUCTION * 2)
    assert known.of(INSTRUCTION) == ()  # one token is left to run
    assert known.of([*INSTRUCTION, BREAK]) == tuple(INSTRUCTION)
    assert known.of([*range(SHORTEST - 2), BREAK, 5]) == ()
    assert known.of([*range(SHORTEST - 1), BREAK, 5]) == (*range(SHORTEST - 1), BREAK)
    assert known.of(list(range(50))) == ()


def test_tokens_that_end_a_line_are_known(tokenizer):
    lm = random_lm("gpt2", tokenizer)
    row = lm.text.prompts(["Task: CounterFact\nDescription: a sentence about the world.\nInput: The capital"])[0]
    begun = lm.prefixes.prompt_prefixes.of(row)
    assert tokenizer.decode(begun) == "Task: CounterFact\nDescription: a sentence about the world.\n"


def test_room_is_kept_and_the_least_lately_used_goes_first():
    one = beginning(INSTRUCTION).nbytes
    known = PromptPrefixes(2 * one, lambda token: token == BREAK)
    rows = [(first, *INSTRUCTION[1:]) for first in (1, 2, 3)]
    for row in rows[:2]:
        known.add(1, beginning(row))
    assert known.find(1, rows[0]).ids == rows[0]
    known.add(1, beginning(rows[2]))
    assert [known.find(1, row) is not None for row in rows] == [True, False, True]
    assert known.bytes == 2 * one
    known.add(1, beginning(range(500)))  # larger than all the room
    assert len(known) == 2
    known.clear()
    assert (len(known), known.bytes, known.find(1, rows[0])) == (0, 0, None)


def test_without_room_nothing_is_kept(tokenizer):
    lm = random_lm("gpt2", tokenizer)
    lm.prefixes.prompt_prefixes.max_bytes = 0
    assert not lm.prefixes.takes_prompt_prefixes
    lm.prefixes.of(rows_of([[*INSTRUCTION, 1]]), 2)
    assert not len(lm.prefixes.prompt_prefixes)


def test_an_applied_edit_does_not_decide_what_the_model_takes(tokenizer):
    lm = with_lines(random_lm("gpt2", tokenizer))
    del lm.prefixes.takes_prompt_prefixes, lm.prefixes.takes_trees
    factors = random_factors(lm.select(blocks=[1]), 2, 2, scale=1.0)
    with lm.edited(LowRankEdit({name: Factors(*pair) for name, pair in factors.items()})):
        assert lm.prefixes.takes_trees
        assert lm.prefixes.takes_prompt_prefixes
