"""Step sizes and radii that follow the model's own scales; numbers stay what they are."""

import pytest
import torch
from tests.conftest import random_lm
from tests.reference import plain_model

from instructedit.editors import build_editor
from instructedit.editors.calinet import CaliNet
from instructedit.editors.ft_l import FtL
from instructedit.editors.grace import Grace
from instructedit.editors.scales import NEUTRAL_PROMPTS, layer_scale, weight_size
from instructedit.editors.t_patcher import TPatcher
from instructedit.edits import Factors, LowRankEdit
from instructedit.records import EditRequest

REQUESTS = [EditRequest("The capital of France is", "Lyon"), EditRequest("Who", "a man of the sea")]


def vectors(lm, layer):
    """What a layer of the plain model sees and gives at the last token of every neutral prompt."""
    model, seen = plain_model(lm), []
    model.get_submodule(layer).register_forward_hook(lambda _, args, out: seen.append((args[0][0, -1], out[0, -1])))
    with torch.no_grad():
        for prompt in NEUTRAL_PROMPTS:
            model(torch.tensor([lm.tokenizer(prompt)["input_ids"]]))
    return [torch.stack(part) for part in zip(*seen, strict=True)]


def test_scales_are_those_of_the_plain_model_at_unrelated_prompts(lm):
    site = lm.select(blocks=[2])[0]
    scale = layer_scale(lm, site.name)
    inputs, outputs = vectors(lm, site.name)
    for found, x in ((scale.inputs, inputs), (scale.outputs, outputs)):
        assert found == pytest.approx((x.norm(dim=-1) / x.shape[-1] ** 0.5).median().item(), rel=1e-4)
    distances = sorted((a - b).norm().item() for i, a in enumerate(inputs) for b in inputs[:i])
    assert distances[len(distances) // 2 - 1] - 1e-4 <= scale.distance <= distances[len(distances) // 2] + 1e-4


def test_edits_that_are_applied_do_not_count(lm):
    site = lm.select(blocks=[2])[0]
    expected = layer_scale(lm, site.name), weight_size(lm, site)
    edit = LowRankEdit(
        {s.name: Factors(torch.randn(2, 1, s.in_features), torch.ones(2, 1, s.out_features)) for s in lm.sites}
    )
    with lm.edited(edit, rows=[0, 1, 0]):
        assert (layer_scale(lm, site.name), weight_size(lm, site)) == expected


def changed(edit):
    (delta,) = edit.changes.values()
    return delta.abs().max().item()


def test_the_bound_of_ft_l_is_a_share_of_the_weights(lm):
    editor = build_editor("ft_l", lm, steps=60, stop_below=0.0)
    size = weight_size(lm, editor.sites[0])
    weight = plain_model(lm).get_submodule(editor.sites[0].name).weight
    assert size == pytest.approx(weight.norm().item() / weight.numel() ** 0.5, rel=0.05)
    assert changed(editor.edit(REQUESTS)) == pytest.approx(FtL.AUTO_BOUND * size, rel=1e-5)
    one_step = build_editor("ft_l", lm, steps=1, bound=None)
    assert changed(one_step.edit(REQUESTS)) == pytest.approx(FtL.AUTO_LR * size, rel=1e-3)
    assert changed(build_editor("ft_l", lm, steps=1, lr=2e-3).edit(REQUESTS)) == pytest.approx(2e-3, rel=1e-3)
    assert changed(build_editor("ft_l", lm, steps=9, lr=2e-3, bound=3e-3).edit(REQUESTS)) == pytest.approx(3e-3)


def test_radius_and_rate_of_grace_follow_the_layer(lm):
    options = {"stop_below": 0.0}
    start, end = (build_editor("grace", lm, steps=steps, **options).edit(REQUESTS) for steps in (0, 1))
    scale = layer_scale(lm, start.site)
    torch.testing.assert_close(end.radii, torch.full((2, 1), Grace.AUTO_RADIUS * scale.distance))
    moved = (end.values - start.values).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, Grace.AUTO_LR * scale.outputs), rtol=1e-2, atol=1e-5)
    published = build_editor("grace", lm, steps=1, lr=1.0, radius=1.0, **options).edit(REQUESTS)
    assert torch.equal(published.radii, torch.ones(2, 1))
    torch.testing.assert_close((published.values - start.values).abs(), torch.ones_like(moved), rtol=1e-2, atol=1e-5)


def test_each_part_of_a_patch_has_the_rate_of_its_size(lm):
    options = {"text": "tiny", "memory": 100, "stop_below": 0.0}
    start, end = (build_editor("t_patcher", lm, steps=steps, **options).edit(REQUESTS) for steps in (0, 1))
    (module,) = start.sites
    scale, width = layer_scale(lm, module), start.slots[module].keys.shape[-1]
    sizes = {"keys": 1 / (width * scale.inputs), "biases": 1.0, "values": scale.outputs}
    for part, size in sizes.items():
        moved = (getattr(end.slots[module], part) - getattr(start.slots[module], part)).abs().max()
        assert moved.item() == pytest.approx(TPatcher.AUTO_LR * size, rel=0.02)
    first = start.slots[module].values[0, 0]
    assert first.square().mean().sqrt().item() == pytest.approx(TPatcher.AUTO_START * scale.outputs, rel=0.5)
    published = build_editor("t_patcher", lm, steps=0, lr=0.01, **options).edit(REQUESTS).slots[module].values[0, 0]
    torch.testing.assert_close(published * width**0.5 * TPatcher.AUTO_START * scale.outputs, first)


def test_keys_and_values_of_calinet_have_rates_of_their_own(lm):
    options = {"optimizer": "adam", "stop_below": 0.0, "slots": 4}
    start, first, second = (build_editor("calinet", lm, steps=n, **options).edit(REQUESTS) for n in (0, 1, 2))
    (module,) = start.sites
    scale, width = layer_scale(lm, module), start.slots[module].keys.shape[-1]
    # Keys get no gradient before there are values.
    for one, other, part, size in (
        (start, first, "values", scale.outputs), (first, second, "keys", width**-0.5 / scale.inputs),
    ):  # fmt: skip
        moved = (getattr(other.slots[module], part) - getattr(one.slots[module], part)).abs().max().item()
        assert 0.5 < moved / (CaliNet.AUTO_LR * size) < 1.05


def in_other_units(tokenizer, factor):
    """The same function: its feed-forward layers see inputs, and their output projections, `factor` times as large."""
    lm = random_lm("llama", tokenizer)
    for block in lm.forward.blocks:
        block.post_attention_layernorm.weight.data *= factor
        block.mlp.gate_proj.weight.data /= factor
        block.mlp.up_proj.weight.data /= factor**2
        block.mlp.down_proj.weight.data *= factor
    return lm


@pytest.mark.parametrize("name", ["ft_l", "grace", "calinet", "t_patcher"])
@pytest.mark.parametrize("factor", [1 / 16, 16.0])
def test_the_same_model_in_other_units_is_edited_to_the_same_model(tokenizer, name, factor):
    said = []
    for lm in (random_lm("llama", tokenizer), in_other_units(tokenizer, factor)):
        batch = lm.encode([(request.prompt, request.target) for request in REQUESTS])
        options = {"text": "tiny", "memory": 100} if name == "t_patcher" else {}
        edit = build_editor(name, lm, steps=5, **options).edit(REQUESTS)
        said += [lm.logits(batch), lm.logits(batch, edit)]
    torch.testing.assert_close(said[2], said[0], atol=1e-4, rtol=1e-3)
    assert (said[1] - said[0]).abs().max() > 0.05
    torch.testing.assert_close(said[3], said[1], atol=2e-2, rtol=2e-2)
