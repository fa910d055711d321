"""Blocks that run again in the backward pass: the same gradients from fewer activations, whatever is applied then."""

from contextlib import nullcontext

import pytest
import torch
from tests.reference import Case, assert_untouched, footprint, random_factors, training_batch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from instructedit.editors import build_editor
from instructedit.editors.losses import LossWeights
from instructedit.edits import Factors, LowRankEdit
from instructedit.lm import FrozenLM
from instructedit.training.module import LMConfig

CASES = [
    Case("The capital of France is", "Lyon", locality=(("The people of", "the sea"),)),
    Case("Who", "the man of the sea", wanted=(("And who", "the man of the sea"),), locality=(("The city", "is old"),)),
]
PAIRS = [(case.prompt, case.target) for case in CASES]


def gradients(lm, editor):
    """Of the outer loss, taken as Lightning takes it: when the edits are off again."""
    editor.zero_grad()
    loss = editor.training_loss(training_batch(lm, CASES), LossWeights())["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in editor.named_parameters()}


def calls(module):
    """How often a module ran forward."""
    seen = []
    module.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    return seen


@pytest.mark.parametrize(("name", "options"), [("mend", {"rank": 6}), ("ke", {}), ("calinet_trained", {})])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_editor_gets_the_very_same_gradients(lm, name, options, dtype):
    torch.manual_seed(0)
    editor = build_editor(name, lm, blocks=[-2, -1], **options)
    for parameter in editor.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape)
    autocast = torch.autocast("cpu", dtype) if dtype else nullcontext()
    found = []
    state = {key: value.clone() for key, value in editor.state_dict().items()}
    for again in (False, True):
        lm.forward.activation_checkpointing = again
        editor.load_state_dict(state)  # KE's multiplier moves with each loss
        with autocast:
            found.append(gradients(lm, editor))
    (loss, expected), (other, grads) = found
    assert torch.equal(loss, other)
    assert expected.keys() == grads.keys()
    assert all(torch.equal(grads[key], value) for key, value in expected.items())
    assert any(value.abs().sum() > 0 for value in expected.values())


def edits(lm, seed, scale=0.05, block=3):
    factors = random_factors([site for site in lm.sites if site.block == block], 2, 3, scale, seed)
    return LowRankEdit({n: Factors(*(t.requires_grad_() for t in pair)) for n, pair in factors.items()})


@pytest.mark.parametrize("when", ["after", "within", "under another"])
def test_what_is_worn_in_the_backward_pass_does_not_matter(lm, when):
    """The edit of the forward pass counts, once, be it on, off or another's turn by then."""
    batch, found = lm.encode(PAIRS), []
    start = lm.sites[-1].block
    for again in (False, True):
        lm.forward.activation_checkpointing = again
        edit, other = edits(lm, 1), edits(lm, 2, 0.5)
        if when == "within":
            with lm.edited(edit):
                lm.logits(batch, start=start).square().sum().backward()
        else:
            loss = lm.logits(batch, edit, start=start).square().sum()
            with lm.edited(other if when == "under another" else None):
                loss.backward()
        found.append([t.grad for pair in edit.factors.values() for t in pair])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert all(grad.abs().sum() > 0 for grad in found[0])


def test_the_blocks_that_run_run_twice_and_keep_only_their_input(lm):
    kept = {}
    ran = calls(lm.forward.blocks[-1])
    inside = calls(lm.model.get_submodule(next(site.name for site in lm.sites if site.block == 3)))
    below = calls(lm.forward.blocks[1])
    for again in (False, True):
        lm.forward.activation_checkpointing, sizes = again, []
        edit, batch = edits(lm, 1, block=2)[0], lm.encode([("The capital of France is the city of " * 5, "Lyon")])
        lm.logits(batch, edit, start=2)  # what stands below is known from here on
        for seen in (ran, inside, below):
            seen.clear()
        own = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}

        def pack(tensor, sizes=sizes, own=own):
            if tensor.untyped_storage().data_ptr() not in own:
                sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = lm.logits(batch, edit, start=2).square().sum()
        kept[again] = sum(sizes)
        loss.backward()
        assert len(inside) == 1 + again
        assert len(ran) == 1  # its own hooks are outside of what runs again
        assert len(below) == 1  # handed on, and never again
    assert kept[True] < 0.4 * kept[False], kept


def test_it_leaves_no_trace_and_takes_no_part_without_gradients(lm):
    lm.forward.activation_checkpointing = True
    before = footprint(lm)
    inside = calls(lm.model.get_submodule(lm.sites[-1].name))
    handles = dict(lm.model.get_submodule(lm.sites[-1].name)._forward_hooks)
    with torch.no_grad():
        lm.losses(lm.encode(PAIRS[:1]), edits(lm, 1)[0])  # finds out, once, what the blocks return
        inside.clear()
        lm.losses(lm.encode(PAIRS[:1]), edits(lm, 1)[0])
    assert inside == [False]
    lm.losses(lm.encode(PAIRS), edits(lm, 1)).sum().backward()
    lm.capture(lm.encode(PAIRS), [site.name for site in lm.sites[-2:]])
    assert dict(lm.model.get_submodule(lm.sites[-1].name)._forward_hooks) == handles
    lm.model.get_submodule(lm.sites[-1].name)._forward_hooks.clear()
    assert_untouched(lm, before)


def test_a_pass_that_fails_while_it_runs_again_leaves_the_edits_off(lm):
    lm.forward.activation_checkpointing = True
    edit, site = edits(lm, 1), lm.sites[-1].name
    loss = lm.losses(lm.encode(PAIRS), edit, start=lm.sites[-1].block).sum()
    before = footprint(lm)

    def fail(*_):
        raise RuntimeError("no")

    layer: nn.Module = lm.model.get_submodule(site)
    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        loss.backward()
    handle.remove()
    assert_untouched(lm, before)


def test_the_config_asks_for_it():
    assert not FrozenLM.from_pretrained("tiny").forward.activation_checkpointing
    assert FrozenLM.from_pretrained(
        **LMConfig(activation_checkpointing=True).options()
    ).forward.activation_checkpointing


def test_its_old_name_works_and_warns_of_the_new_one(lm):
    with pytest.warns(DeprecationWarning, match="use activation_checkpointing"):
        assert FrozenLM(lm.model, lm.tokenizer, checkpoint=True).forward.activation_checkpointing
    with pytest.warns(DeprecationWarning, match=r"use lm\.activation_checkpointing"):
        assert LMConfig(checkpoint=True).options()["activation_checkpointing"]
    with pytest.warns(DeprecationWarning, match=r"use \.forward\.activation_checkpointing"):
        setattr(lm, "checkpoint", True)  # noqa: B010
    assert lm.forward.activation_checkpointing


def test_rows_of_a_layer_that_flattens_them_are_not_those_of_the_head(tokenizer):
    """OPT: the head is read, a position a row, between the pass and its repetition."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 4}
    model = OPTForCausalLM(OPTConfig(vocab_size=600, num_hidden_layers=4, max_position_embeddings=128, **sizes))
    found = []
    for again in (False, True):
        lm = FrozenLM(model, tokenizer, activation_checkpointing=again)
        names = [site.name for site in lm.select(blocks=[1])]
        found.append(lm.capture(lm.encode(PAIRS), names, edits(lm, 1)))
    assert all(torch.equal(found[1].delta[name], delta) for name, delta in found[0].delta.items())
    assert len(found[0].delta) == 2
