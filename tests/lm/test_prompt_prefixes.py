"""Keys and values of what prompts begin with, against whole rows."""

import pytest
import torch
from tests.conftest import ARCHITECTURES, random_lm

from instructedit.lm.cache.prompt_prefixes import SHORTEST, Beginning, PromptPrefixes
from instructedit.lm.tokens import rows_of

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
    assert seen == [len(INSTRUCTION), 2, 4]  # 4 5 6 and 7 are one tree
    lm.forget()
    lm.prefixes.of(rows_of([[*INSTRUCTION, 8, 5]]), 2)
    assert seen[3:] == [len(INSTRUCTION), 2]


def test_states_do_not_depend_on_what_came_before(tokenizer):
    rows = rows_of([[*INSTRUCTION, 1, 2, 3], [*INSTRUCTION, 4]])
    fresh, used = (with_lines(random_lm("gpt2", tokenizer)) for _ in range(2))
    used.prefixes.of(rows_of([[*INSTRUCTION, 7, 7, 7, 7], [*INSTRUCTION[3:], 1]]), 2)
    assert torch.equal(fresh.prefixes.of(rows, 2), used.prefixes.of(rows, 2))


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
