"""Keys and values of what prompts begin with, against whole rows."""

import pytest
import torch
from tests.conftest import ARCHITECTURES, random_lm

from instructedit.lm.prompt_prefixes import ROW, SHORTEST, Beginning, PromptPrefixes, shared_tokens
from instructedit.lm.tokens import rows_of

INSTRUCTION = list(range(10, 10 + ROW))


def beginning(ids, blocks=2):
    tokens = len(ids)
    return Beginning(
        tuple(ids), torch.ones(tokens, 4), torch.ones(blocks, 1, tokens, 2), torch.ones(blocks, 1, tokens, 2)
    )


def read(lm):
    """How many positions the first block runs on, pass by pass."""
    seen = []
    lm.blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape[:2].numel()),
        with_kwargs=True,
    )
    return seen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_behind_a_known_beginning_are_the_rows_themselves(tokenizer, architecture):
    lm = random_lm(architecture, tokenizer)
    assert lm._takes_beginnings
    batches = [
        [[*INSTRUCTION, 1, 2, 3], [*INSTRUCTION, 4], [5, 6, 7]],
        [[*INSTRUCTION, 9, 9], [*INSTRUCTION, 1, 2, 8], [*INSTRUCTION[:SHORTEST], 300, 301, 302], [7]],
        [[*INSTRUCTION, 1, 2, 3, 4, 5], [5, 6, 7, 8]],
    ]
    for rows in batches:
        found = lm._behind_beginnings(rows, 3)
        for row, states in zip(rows, found, strict=True):
            torch.testing.assert_close(states, lm._prefix(rows_of([row]), 3)[0], rtol=1e-4, atol=1e-5)
    assert len(lm.beginnings)


def test_a_known_instruction_does_not_run_again(tokenizer):
    lm = random_lm("llama", tokenizer)
    lm.try_out()
    lm.prefix(rows_of([[*INSTRUCTION, 1, 2]]), 2)
    lm.prefix(rows_of([[*INSTRUCTION, 3]]), 2)  # what both share is the instruction
    seen = read(lm)
    lm.prefix(rows_of([[*INSTRUCTION, 4, 5, 6], [*INSTRUCTION, 4, 7]]), 2)
    assert seen == [4]  # 4 5 6 and 7, in one tree
    lm.forget()
    lm.prefix(rows_of([[*INSTRUCTION, 8, 5]]), 2)
    assert seen == [4, ROW + 2]


def test_another_block_knows_nothing_of_it(tokenizer):
    lm = random_lm("gpt2", tokenizer)
    lm.try_out()
    row = [*INSTRUCTION, 1, 2]
    lm.prefix(rows_of([row]), 1)
    torch.testing.assert_close(lm.prefix(rows_of([row]), 3)[0], lm._prefix(rows_of([row]), 3)[0], rtol=1e-4, atol=1e-5)


def test_the_longest_known_beginning_is_found():
    known = PromptPrefixes(1 << 20)
    assert known.find(1, INSTRUCTION) is None
    known.add(1, beginning([*INSTRUCTION, 1, 2]))
    known.add(1, beginning([0, *INSTRUCTION]))
    assert known.find(2, [*INSTRUCTION, 3]) is None  # of another block
    assert known.find(1, [*INSTRUCTION, 3]).ids == tuple(INSTRUCTION)
    assert known.find(1, INSTRUCTION).ids == tuple(INSTRUCTION[:-1])  # one token is left to run
    assert known.find(1, INSTRUCTION[: SHORTEST - 1]) is None
    assert known.find(1, [*INSTRUCTION[: SHORTEST - 1], 99, 99]) is None


def test_what_shares_little_does_not_cut_a_beginning_short():
    known = PromptPrefixes(1 << 20)
    long = [*INSTRUCTION, *range(100, 100 + ROW)]
    known.add(1, beginning(long))
    assert known.find(1, [*INSTRUCTION[:SHORTEST], 1, 1]).ids == tuple(long[:SHORTEST])
    assert known.find(1, [*long, 5]).ids == tuple(long)
    assert known.find(1, [*long[:-1], 5]).ids == tuple(long[:-1])  # shares most of it, and takes its place
    assert tuple(long) not in {ids for _, ids in known._sorted}


def test_only_long_rows_that_are_mostly_unknown_are_worth_keeping():
    known = PromptPrefixes(1 << 20)
    assert known.lacks(1, INSTRUCTION)
    assert not known.lacks(1, INSTRUCTION[:-1])  # too short
    known.add(1, beginning(INSTRUCTION))
    assert not known.lacks(1, [*INSTRUCTION, 1])
    assert known.lacks(1, [*INSTRUCTION, *range(200, 300)])


def test_room_is_kept_and_the_least_lately_used_goes_first():
    one = beginning(INSTRUCTION).nbytes
    known = PromptPrefixes(2 * one)
    rows = [[first, *INSTRUCTION[1:]] for first in (1, 2, 3)]
    for row in rows[:2]:
        known.add(1, beginning(row))
    known.find(1, [*rows[0], 5])
    known.add(1, beginning(rows[2]))
    assert [row[0] for _, row in known._sorted] == [1, 3]
    assert known.bytes == 2 * one
    known.add(1, beginning(list(range(500))))  # larger than all the room
    assert len(known) == 2
    known.clear()
    assert (len(known), known.bytes, known.find(1, rows[0])) == (0, 0, None)


def test_tokens_in_common():
    assert shared_tokens([1, 2, 3], [1, 2, 4]) == 2
    assert shared_tokens([1, 2], [1, 2, 4]) == 2
    assert shared_tokens([], [1]) == 0


def test_without_room_nothing_is_kept(tokenizer):
    lm = random_lm("gpt2", tokenizer)
    lm.beginnings.max_bytes = 0
    assert not lm._takes_beginnings
    lm.prefix(rows_of([[*INSTRUCTION, 1]]), 2)
    assert not len(lm.beginnings)
