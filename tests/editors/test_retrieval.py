"""Retrieval against states of the plain model: which edit a prompt reads, and what the model says behind it."""

import pytest
import torch
from tests.lm.contexts import query_of, row_logits

from instructedit.editors import build_editor
from instructedit.editors.scales import NEUTRAL_PROMPTS
from instructedit.errors import UserError
from instructedit.records import EditRequest

REQUESTS = [EditRequest(prompt, "a new city") for prompt in NEUTRAL_PROMPTS[:6]]
TOLD = [f"New fact: {request.prompt} {request.target}\n" for request in REQUESTS]


def chosen(lm, edit, prompts):
    """The number of the context that each prompt reads; −1 for none."""
    batch = lm.encode([(prompt, "it") for prompt in prompts])
    return edit.choose(
        torch.zeros(len(prompts), dtype=torch.long), lambda block: lm.context.scope_embedding(batch, block)
    ).tolist()


def distances(lm, edit, prompts):
    """Distance² between all prompts, from states that we read ourselves."""
    points = torch.stack([edit.gate.projection @ query_of(lm, prompt, int(edit.gate.block)) for prompt in prompts])
    return (points[:, None] - points).square().sum(-1).detach()


def test_an_edit_is_a_sentence_beside_the_state_of_its_prompt(lm):
    edit = build_editor("retrieval", lm).edit(REQUESTS)
    assert int(edit.gate.block) == 2
    for i, request in enumerate(REQUESTS):
        assert lm.tokenizer.decode(edit.ids[i, 0, : edit.lengths[i, 0]]) == TOLD[i]
        key = edit.gate.projection @ query_of(lm, request.prompt, 2)
        torch.testing.assert_close(edit.gate.keys[i, 0], key, atol=1e-3, rtol=1e-3)


def test_prompts_that_have_nothing_to_do_with_one_another_read_their_own_edit_or_none(lm):
    edit = build_editor("retrieval", lm).edit(REQUESTS).joined()
    assert len(edit) == 1
    assert chosen(lm, edit, NEUTRAL_PROMPTS) == [*range(6), *[-1] * (len(NEUTRAL_PROMPTS) - 6)]


@pytest.mark.parametrize("share", [0.4, 1.1])
def test_a_prompt_reads_the_nearest_edit_within_the_radius(lm, share):
    edit = build_editor("retrieval", lm, radius=share).edit(REQUESTS).joined()
    every = distances(lm, edit, NEUTRAL_PROMPTS)
    rows, columns = torch.triu_indices(len(every), len(every), 1)
    median = every[rows, columns].median()
    expected = [int(row.argmin()) if row.min() < share * median else -1 for row in every[:, :6]]
    assert chosen(lm, edit, NEUTRAL_PROMPTS) == expected
    assert len(set(expected)) > 1


def test_behind_its_sentence_the_model_is_the_unedited_one(lm):
    edit = build_editor("retrieval", lm).edit(REQUESTS).joined()
    pairs = [(REQUESTS[4].prompt, "a city"), (NEUTRAL_PROMPTS[9], "a city")]
    found = lm.logits(lm.encode(pairs), edit)
    expected = torch.cat([row_logits(lm, pairs[0], TOLD[4]), row_logits(lm, pairs[1], "")])
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-4)


def test_distances_are_those_of_coordinates_in_units_of_their_deviation(lm):
    edit = build_editor("retrieval", lm, embedding=4000).edit(REQUESTS)
    states = torch.stack([query_of(lm, prompt, 2) for prompt in NEUTRAL_PROMPTS])[:, : lm.applied.sites.width]
    scaled = states / states.std(0)
    expected = (scaled[:, None] - scaled).square().sum(-1)
    found = distances(lm, edit, NEUTRAL_PROMPTS)
    apart = expected > 0
    assert (found[apart] / expected[apart] - 1).abs().max() < 0.15


@pytest.mark.parametrize(
    ("options", "told"), [({"radius": 0.0}, "radius must be a number above zero"), ({"scope_block": 1.0}, "got 1.0")]
)
def test_options_that_make_no_sense_are_refused(lm, options, told):
    with pytest.raises(UserError, match=f"editor 'retrieval': .*{told}"):
        build_editor("retrieval", lm, **options)
