"""CaliNet's slots against a feed-forward layer that is wider for good, and against a training loop of its own."""

import copy

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import ARCHITECTURES, random_lm
from tests.reference import (
    Case,
    answer_logits,
    assert_changes_nothing,
    edit_loss,
    plain_model,
    relative,
    training_batch,
)
from transformers.optimization import Adafactor
from transformers.pytorch_utils import Conv1D

from instructedit.editors import build_editor
from instructedit.editors.losses import LossWeights
from instructedit.edits import SlotEdit, Slots
from instructedit.errors import UserError
from instructedit.lm import FrozenLM
from instructedit.records import EditRequest

PAIRS = [("The capital of France is", "Lyon"), ("Who", "a man of the sea"), ("A long prompt of a city", "or two")]
REQUESTS = [EditRequest(*pair) for pair in PAIRS]
FLOAT32 = {"atol": 1e-4, "rtol": 1e-4}
#: The function that an activation is, in plain words.
ACT = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def some_slots(lm, modules, n=3, count=5, seed=0):
    rng, hidden = torch.Generator().manual_seed(seed), lm.model.config.hidden_size
    return {
        module: Slots(
            torch.randn(n, count, hidden, generator=rng) * 0.5,
            torch.randn(n, count, generator=rng) * 0.5,
            torch.randn(n, count, hidden, generator=rng) * 0.5,
        )
        for module in modules
    }


def one_of(slots, i):
    return {module: tuple(part[i] for part in parts) for module, parts in slots.items()}


def with_slots(lm, slots, activation):
    """A plain model that adds Σ_s v_s act(k_s · x + b_s), slot by slot, to its feed-forward layers' outputs."""
    model = plain_model(lm)
    for module, (keys, biases, values) in slots.items():

        def add(_, args, output, keys=keys, biases=biases, values=values):
            for k, b, v in zip(keys, biases, values, strict=True):
                output = output + ACT[activation](args[0] @ k + b).unsqueeze(-1) * v
            return output

        model.get_submodule(module).register_forward_hook(add)
    return model


def mlps(lm, blocks):
    return tuple(dict.fromkeys(site.mlp for site in lm.select(blocks=blocks)))


def one_by_one(lm, models):
    pairs = zip(models, PAIRS, strict=True)
    return torch.cat([answer_logits(model, lm.tokenizer, *pair) for model, pair in pairs]).detach()


# -- slots are a wider layer ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def relu_lm(tokenizer):
    """GPT-2 with an activation that transformers and the slots write alike."""
    lm = random_lm("gpt2", tokenizer)
    config = copy.deepcopy(lm.model.config)
    config.activation_function = "relu"
    model = hf.GPT2LMHeadModel(config)
    model.load_state_dict(lm.model.state_dict())
    return FrozenLM(model, tokenizer, "relu")


def widened(lm, slots):
    """A plain model whose feed-forward matrices hold the slots: keys beside c_fc, values below c_proj."""
    model = plain_model(lm)
    for module, (keys, biases, values) in slots.items():
        mlp = model.get_submodule(module)
        into, out = Conv1D(mlp.c_fc.nf + len(keys), 32), Conv1D(32, mlp.c_fc.nf + len(keys))
        into.weight.data = torch.cat([mlp.c_fc.weight, keys.T], 1)
        into.bias.data = torch.cat([mlp.c_fc.bias, biases])
        out.weight.data = torch.cat([mlp.c_proj.weight, values])
        out.bias.data = mlp.c_proj.bias.data
        mlp.c_fc, mlp.c_proj = into, out
    return model.requires_grad_(False)


def test_slots_are_a_feed_forward_layer_with_wider_matrices(relu_lm):
    slots = some_slots(relu_lm, mlps(relu_lm, [1, 3]))
    edit, batch = SlotEdit(slots, "relu"), relu_lm.encode(PAIRS)
    expected = one_by_one(relu_lm, [widened(relu_lm, one_of(slots, i)) for i in range(3)])
    torch.testing.assert_close(relu_lm.logits(batch, edit, None, 1), expected, **FLOAT32)
    assert (relu_lm.logits(batch) - expected).abs().max() > 0.5
    both = {module: tuple(part.flatten(0, 1) for part in parts) for module, parts in slots.items()}
    expected = one_by_one(relu_lm, [widened(relu_lm, both)] * 3)
    torch.testing.assert_close(relu_lm.logits(batch, edit.joined()), expected, **FLOAT32)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_slots_add_what_they_say_beside_any_feed_forward_layer(lm, activation):
    slots = some_slots(lm, mlps(lm, [1, 3]))
    edit, batch = SlotEdit(slots, activation), lm.encode(PAIRS)
    for rows in (None, [2, 0, 0]):
        applied = [with_slots(lm, one_of(slots, i), activation) for i in (rows or range(3))]
        found = lm.logits(batch, edit, rows and torch.tensor(rows))
        torch.testing.assert_close(found, one_by_one(lm, applied), **FLOAT32)


def test_an_edit_is_the_plain_layer_and_its_slots(lm):
    editor = build_editor("calinet", lm, slots=5, steps=5, lr=0.05, blocks=[1, 2], activation="silu")
    edit = editor.edit(REQUESTS)
    assert edit.sites == mlps(lm, [1, 2])
    slots = {module: tuple(parts) for module, parts in edit.slots.items()}
    applied = [with_slots(lm, one_of(slots, i), "silu") for i in range(3)]
    expected = one_by_one(lm, applied)
    torch.testing.assert_close(lm.logits(lm.encode(PAIRS), edit), expected, **FLOAT32)
    assert (expected - lm.logits(lm.encode(PAIRS))).abs().max() > 0.5


@pytest.mark.parametrize("name", ["calinet", "calinet_trained"])
def test_values_of_zero_change_nothing(lm, name):
    """What slots start with."""
    edit = build_editor(name, lm, **({"steps": 0, "lr": 0.01} if name == "calinet" else {})).edit(REQUESTS)
    batch = lm.encode(PAIRS)
    for slots in edit.slots.values():
        assert slots.keys.shape == (3, 64, 32)
        assert not slots.values.any()
        assert not slots.biases.any()
        # Keys of unit length on average, so that what a slot sees is of the size of what it reads.
        torch.testing.assert_close(slots.keys.square().sum(-1).mean().item(), 1.0, atol=0.1, rtol=0)
    assert_changes_nothing(lm, batch, edit)


def test_slots_stand_as_far_up_as_in_the_paper(lm, tokenizer):
    deep = random_lm("gpt2", tokenizer, layers=12)
    for name in ("calinet", "calinet_trained"):
        assert build_editor(name, deep).layers == mlps(deep, [11])  # the last of twelve
        assert build_editor(name, lm).layers == mlps(lm, [3])
    inside = lm.select(blocks=[1])[0].name
    assert build_editor("calinet", lm, blocks=[1], site_names=[inside]).layers == mlps(lm, [1])


# -- training ---------------------------------------------------------------------------------------------------------


def trained_by_hand(lm, pairs, options):
    """The slots that a loop of its own trains on the mean loss of the pairs: a plain model and the optimiser."""
    rng = torch.Generator().manual_seed(options["seed"])
    (module,) = mlps(lm, options["blocks"])
    keys = (torch.randn(options["slots"], 32, generator=rng) / 32**0.5).requires_grad_()
    values = torch.zeros(options["slots"], 32, requires_grad=True)
    if options["optimizer"] == "adam":
        method = torch.optim.Adam([keys, values], options["lr"])
    else:
        method = Adafactor([keys, values], options["lr"], scale_parameter=False, relative_step=False)
    for _ in range(options["steps"]):
        method.zero_grad()
        model = with_slots(lm, {module: (keys, torch.zeros(options["slots"]), values)}, options["activation"])
        loss = torch.stack([edit_loss(model, lm.tokenizer, *pair) for pair in pairs]).mean()
        if loss.item() < options["stop_below"]:
            break
        loss.backward()
        method.step()
    return keys.detach(), values.detach()


OPTIONS = {"slots": 4, "steps": 5, "lr": 0.02, "seed": 3, "stop_below": 0.0, "activation": "gelu", "blocks": [2]}


@pytest.mark.parametrize("optimizer", ["adam", "adafactor"])
def test_each_requests_slots_are_trained_as_if_it_were_alone(lm, optimizer):
    losses = torch.tensor([edit_loss(lm.model, lm.tokenizer, *pair).item() for pair in PAIRS])
    for stop in (0.0, losses.median().item() + 0.05):  # two are good enough and stay where they start
        options = {**OPTIONS, "optimizer": optimizer, "stop_below": stop}
        edit = build_editor("calinet", lm, **options).edit(REQUESTS)
        ((keys, biases, values),) = edit.slots.values()
        assert not biases.any()
        assert values.flatten(1).any(-1).tolist() == (losses > stop).tolist()
        for i, pair in enumerate(PAIRS):
            found = trained_by_hand(lm, [pair], options)
            assert relative(keys[i], found[0]) < 1e-3
            assert relative(values[i], found[1]) < 1e-3 if losses[i] > stop else torch.equal(values[i], found[1])
        after = lm.losses(lm.encode(PAIRS), edit)
        assert torch.equal(after < losses - 0.05, losses > stop)


@pytest.mark.parametrize("optimizer", ["adam", "adafactor"])
@pytest.mark.parametrize("down", [None, 0.3])
def test_together_one_set_of_slots_is_trained_on_the_mean_loss_until_it_is_low_enough(lm, optimizer, down):
    batch = lm.encode(PAIRS)
    first = lm.losses(batch).mean().item()
    options = {**OPTIONS, "optimizer": optimizer}
    if down:
        options |= {"steps": 30, "stop_below": first - down}
    edit = build_editor("calinet", lm, **options).edit(REQUESTS, together=True)
    assert len(edit) == 1
    ((keys, _, values),) = edit.slots.values()
    found = trained_by_hand(lm, PAIRS, options)
    assert relative(keys[0], found[0]) < 1e-3
    assert relative(values[0], found[1]) < 1e-3
    after = lm.losses(batch, edit).mean()
    assert first - down - 0.3 < after < first - down if down else after < first - 0.05


@given(seed=st.integers(0, 2**40), slots=st.integers(1, 8))
@settings(max_examples=10, deadline=None)
def test_all_requests_start_at_the_keys_of_the_seed(relu_lm, seed, slots):
    def keys(seed):
        edit = build_editor("calinet", relu_lm, slots=slots, seed=seed, steps=0).edit(REQUESTS)
        ((keys, _, _),) = edit.slots.values()
        assert torch.equal(keys, keys[:1].expand_as(keys))
        return keys[0]

    assert torch.equal(keys(seed), keys(seed))
    assert not torch.equal(keys(seed), keys(seed + 1))


# -- one set of slots for a dataset -----------------------------------------------------------------------------------


def moved(editor, scale=0.3):
    rng = torch.Generator().manual_seed(0)
    for parameter in editor.parameters():
        parameter.data += torch.randn(parameter.shape, generator=rng) * scale
    return editor


def test_trained_slots_are_the_same_for_every_request(lm):
    editor = moved(build_editor("calinet_trained", lm, slots=5, blocks=[1, 3]))
    edit, other = editor.edit(REQUESTS), editor.edit([EditRequest("Say", "something else")])
    together = editor.edit(REQUESTS, together=True)
    assert (len(edit), len(other), len(together)) == (3, 1, 1)
    for module in mlps(lm, [1, 3]):
        own = [editor.weights[f"{module}:{part}".replace(".", "/")] for part in ("keys", "values")]
        for made in (edit, other, together):
            keys, biases, values = made.slots[module]
            assert all(torch.equal(k, own[0]) for k in keys)
            assert all(torch.equal(v, own[1]) for v in values)
            assert not biases.any()
    batch = lm.encode(PAIRS)
    assert torch.equal(lm.logits(batch, together), lm.logits(batch, edit[1]))
    torch.testing.assert_close(lm.logits(batch, together), lm.logits(batch, edit), **FLOAT32)


def test_trained_slots_get_the_gradients_of_the_outer_loss(lm):
    """Against a plain model with the slots in hooks, the loss written out."""
    editor = moved(build_editor("calinet_trained", lm, slots=5, blocks=[2], activation="relu"), 0.2)
    cases = [Case(*PAIRS[0], wanted=(("France's capital is", "Lyon"),)), Case(*PAIRS[1], locality=(("It was", "so"),))]
    batch, weights = training_batch(lm, cases), LossWeights(0.3, 1.7)
    parts = editor.training_loss(batch, weights)
    (module,) = mlps(lm, [2])
    keys, values = (editor.weights[f"{module}:{part}".replace(".", "/")] for part in ("keys", "values"))
    model = with_slots(lm, {module: (keys, torch.zeros(5), values)}, "relu")
    own = [[(case.prompt, case.target), *case.wanted] for case in cases]
    edit = torch.stack(
        [torch.stack([edit_loss(model, lm.tokenizer, *pair) for pair in pairs]).mean() for pairs in own]
    ).mean()
    before, after = (answer_logits(m, lm.tokenizer, "It was", "so").log_softmax(-1) for m in (lm.model, model))
    expected = 0.3 * edit + 1.7 * (before.exp() * (before - after)).sum(-1).mean()
    torch.testing.assert_close(parts["loss"], expected, **FLOAT32)
    parameters = list(editor.parameters())
    assert {id(p) for p in parameters} == {id(keys), id(values)}
    found, dense = (torch.autograd.grad(loss, parameters) for loss in (parts["loss"], expected))
    for one, other in zip(found, dense, strict=True):
        assert other.norm() > 1e-4
        assert relative(one, other) < 1e-3


def test_trained_slots_move_under_adam_from_where_they_start(lm):
    editor = build_editor("calinet_trained", lm, slots=5)
    batch = training_batch(lm, [Case(*pair) for pair in PAIRS])
    adam = torch.optim.Adam(editor.parameter_groups()["network"], 0.02)
    start = {name: p.detach().clone() for name, p in editor.named_parameters()}
    assert len(start) == 2
    losses = []
    for _ in range(10):
        adam.zero_grad()
        losses.append(editor.training_loss(batch, LossWeights(1.0, 1.0))["loss"])
        losses[-1].backward()
        assert all(p.grad is not None for p in editor.parameters())
        adam.step()
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in editor.named_parameters():
        assert (parameter != start[name]).any(-1).all(), name  # every slot


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["calinet", "calinet_trained", "t_patcher"])
def test_models_whose_feed_forward_parts_stand_in_the_block_are_refused(tokenizer, name):
    config = hf.OPTConfig(
        vocab_size=600, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, ffn_dim=48,
        word_embed_proj_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    lm = FrozenLM(hf.OPTForCausalLM(config), tokenizer, "an OPT")
    message = rf"editor '{name}' .* those of an OPT are no modules of their own .*model\.decoder\.layers\.3\)"
    with pytest.raises(UserError, match=message):
        build_editor(name, lm)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["calinet", "calinet_trained"])
def test_an_activation_that_slots_do_not_have_is_refused(tokenizer, name, architecture):
    editor = build_editor(name, random_lm(architecture, tokenizer, layers=1), activation="tanh")
    with pytest.raises(UserError, match="no activation 'tanh'; one of gelu, relu, silu"):
        editor.edit(REQUESTS)
