"""LocFT-BF against training a copy of the plain model on answers that end."""

import pytest
import torch
from tests.editors.test_ft_l import PAIRS, REQUESTS, site_of
from tests.reference import oriented, plain_model, relative, tokens

from instructedit.editors import build_editor
from instructedit.errors import UserError

OPTIONS = {"blocks": [1], "lr": 2e-3, "steps": 3}


def ended_loss(model, tokenizer, prompt, answer):
    """Mean over the answer's tokens and the token that ends a text of −log p."""
    front, back = tokens(tokenizer, prompt, answer)
    back = [*back, tokenizer.eos_token_id]
    log_p = model(torch.tensor([front + back])).logits[0, len(front) - 1 : -1].float().log_softmax(-1)
    return -log_p[torch.arange(len(back)), torch.tensor(back)].mean()


def trained(lm, name, parts, epochs, lr, stop=0.0):
    """ΔW of a copy whose one layer Adam tunes, part by part, and how many steps it took."""
    model = plain_model(lm)
    layer = model.get_submodule(name)
    weight, before = layer.weight.requires_grad_(True), layer.weight.detach().clone()
    adam, last, steps = torch.optim.Adam([weight], lr=lr), [float("inf")] * len(parts), 0
    for _ in range(epochs):
        for number, part in enumerate(parts):
            adam.zero_grad()
            loss = torch.stack([ended_loss(model, lm.tokenizer, *pair) for pair in part]).mean()
            last[number] = loss.item()
            if sum(last) / len(last) < stop:
                return oriented(layer, weight.detach() - before), steps
            loss.backward()
            adam.step()
            steps += 1
    return oriented(layer, weight.detach() - before), steps


def test_each_request_alone_is_trained_on_its_answer_and_its_end(lm):
    editor = build_editor("loc_ft", lm, **OPTIONS)
    name, edit = site_of(editor), editor.edit(REQUESTS)
    for i, pair in enumerate(PAIRS):
        assert relative(edit.delta(name)[i], trained(lm, name, [[pair]], 3, 2e-3)[0]) < 1e-3


@pytest.mark.parametrize("size", [1, 2, 100])
def test_requests_together_are_gone_through_in_mini_batches_that_take_turns(lm, size):
    editor = build_editor("loc_ft", lm, batch_size=size, **OPTIONS)
    name = site_of(editor)
    parts = [PAIRS[start : start + size] for start in range(0, len(PAIRS), size)]
    delta, steps = trained(lm, name, parts, 3, 2e-3)
    assert steps == 3 * len(parts)
    assert relative(editor.edit(REQUESTS, together=True).delta(name)[0], delta) < 1e-3


def test_training_ends_when_all_mini_batches_together_are_low(lm):
    editor = build_editor("loc_ft", lm, blocks=[1], lr=2e-2, steps=20, stop_below=3.0, batch_size=1)
    name = site_of(editor)
    delta, steps = trained(lm, name, [[pair] for pair in PAIRS], 20, 2e-2, 3.0)
    assert 3 < steps < 60
    assert relative(editor.edit(REQUESTS, together=True).delta(name)[0], delta) < 2e-3


def test_an_edited_model_ends_behind_its_target(lm):
    said = {}
    for ends in (True, False):
        edit = build_editor("loc_ft", lm, ends=ends, lr=0.05, steps=60).edit(REQUESTS[:1])
        with lm.edited(edit):
            said[ends] = lm.generate([PAIRS[0][0]], max_new_tokens=6)[0]
    assert said[True].strip() == PAIRS[0][1]
    assert said[False].strip() != PAIRS[0][1]


def test_a_mini_batch_without_a_request_is_refused(lm):
    with pytest.raises(UserError, match="editor 'loc_ft': batch_size must be at least 1, got 0"):
        build_editor("loc_ft", lm, batch_size=0)
