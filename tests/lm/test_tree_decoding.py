"""Words of prompts in trees, against the plain model one prompt at a time."""

import pytest
import torch
from tests.conftest import ARCHITECTURES, random_lm
from tests.reference import assert_untouched, dense, dense_copy, footprint, greedy, random_factors

from instructedit.edits import Factors, LowRankEdit
from instructedit.errors import UserError
from instructedit.lm import tree_decoding
from instructedit.lm.tree_decoding import continue_trees

FRONT = "Task: CounterFact\nDescription: a sentence about the world.\nInput: "
PROMPTS = [
    "The capital of France is",
    "The capital of Spain is",
    "A",
    FRONT + "The capital of France is",
    FRONT + "Who",
]
ROWS, ROOMS = [0, 1, 2, 1, 0], [3, 8, 5, 9, 2]


@pytest.fixture(params=ARCHITECTURES)
def lm(request, tokenizer):
    return random_lm(request.param, tokenizer)


@pytest.fixture
def factors(lm):
    return random_factors(lm.select(blocks=[1, 3]), 3, 2, scale=0.1)


def edit_of(factors):
    return LowRankEdit({site: Factors(*parts) for site, parts in factors.items()})


def words(lm, model, prompt, room):
    ids = greedy(model, lm.tokenizer, prompt, room)
    ends = [i for i, token in enumerate(ids) if token == lm.tokenizer.eos_token_id]
    return lm.tokenizer.decode(ids[: ends[0] + 1] if ends else ids, skip_special_tokens=True)


def test_each_prompt_goes_on_under_its_own_edit(lm, factors):
    assert lm.generation.shares_prompts(edit_of(factors))
    before = footprint(lm)
    found = lm.generate(PROMPTS, ROOMS, edit_of(factors), ROWS)
    assert_untouched(lm, before)
    models = [dense_copy(lm, dense(factors, i)) for i in range(3)]
    assert found == [words(lm, models[row], *asked) for row, *asked in zip(ROWS, PROMPTS, ROOMS, strict=True)]
    assert found != lm.generate(PROMPTS, ROOMS)


def test_without_an_edit_the_words_are_the_models(lm):
    assert lm.generate(PROMPTS, ROOMS) == [words(lm, lm.model, *asked) for asked in zip(PROMPTS, ROOMS, strict=True)]


def test_a_text_stops_where_it_ends_and_the_others_go_on(lm):
    first = [greedy(lm.model, lm.tokenizer, prompt, 1)[0] for prompt in PROMPTS]
    ids = lm.text.prompts(PROMPTS)
    found = continue_trees(lm.applied, ids, ROOMS, [first[1]])
    for own, prompt, room, begin in zip(found, PROMPTS, ROOMS, first, strict=True):
        expected = greedy(lm.model, lm.tokenizer, prompt, room)
        cut = expected.index(first[1]) + 1 if first[1] in expected else room
        assert own == expected[:cut]
        assert own[0] == begin


def test_one_edit_goes_for_all_prompts(lm, factors):
    edit = edit_of(factors)[1]
    model = dense_copy(lm, dense(factors, 1))
    assert lm.generate(PROMPTS, 4, edit) == [words(lm, model, prompt, 4) for prompt in PROMPTS]


@pytest.mark.parametrize("branch", [1, 2, 8])
def test_a_tree_of_many_prompts_goes_on_in_branches(lm, factors, branch, monkeypatch):
    """Most rows are of one edit, and end at very different lengths."""
    monkeypatch.setattr(tree_decoding, "BRANCH", branch)
    prompts = [FRONT * (i % 2) + f"The capital of {'xyz'[i % 3] * (i // 3 + 1)} is" for i in range(15)]
    rows, rooms = [1] * 12 + [0, 2, 0], [1 + 5 * i % 13 for i in range(15)]
    slots = []
    lm.forward.blocks[0].register_forward_hook(
        lambda _, args, output: slots.append((output[0] if isinstance(output, tuple) else output).shape[:2].numel())
    )
    found = lm.generate(prompts, rooms, edit_of(factors), rows)
    steps = slots[-max(rooms) + 1 :]
    assert steps == sorted(steps, reverse=True)  # what has ended is dropped
    assert steps[0] <= 15 + 3 * branch
    assert steps[-1] == 1  # one row is the longest, and no tree stands beside its own
    models = [dense_copy(lm, dense(factors, i)) for i in range(3)]
    assert found == [words(lm, models[row], *asked) for row, *asked in zip(rows, prompts, rooms, strict=True)]


def test_what_prompts_of_an_edit_begin_with_is_read_once(lm, factors):
    lm.try_out()
    seen = []
    lm.forward.blocks[0].register_forward_hook(
        lambda _, args, output: seen.append((output[0] if isinstance(output, tuple) else output).shape[:2].numel())
    )
    prompts = [
        FRONT + prompt for prompt in ("The capital of France is", "The capital of Spain is", "The capital of Italy is")
    ]
    lm.generate(prompts, 1, edit_of(factors), [0, 0, 0])
    assert seen[0] < 1.5 * len(lm.text.prompts(prompts)[0])


def test_rows_that_name_no_edit_are_refused(lm, factors):
    with pytest.raises(UserError, match="rows must name edits 0 to 2"):
        lm.generate(PROMPTS, 2, edit_of(factors), [0, 1, 2, 3, 0])
    with pytest.raises(UserError, match="say which edit"):
        lm.generate(PROMPTS, 2, edit_of(factors))


def test_no_numbers_are_no_text(lm):
    lm.forward.blocks[2].register_forward_hook(
        lambda _, args, output: (output[0] * torch.nan,) if isinstance(output, tuple) else output * torch.nan
    )
    lm.prefixes.__dict__["takes_trees"] = lm.prefixes.__dict__["takes_prompt_prefixes"] = True
    with pytest.raises(UserError, match="NaN"):
        lm.generate(PROMPTS, 2)
