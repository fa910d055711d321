"""KE against its formula with dense gradients, one request at a time; and the margin that its training keeps."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import random_lm
from tests.reference import (
    Case,
    answer_logits,
    assert_changes_nothing,
    gradients,
    outer_losses,
    plain_model,
    relative,
    tokens,
    training_batch,
)

from instructedit.editors import build_editor, load_editor
from instructedit.editors.losses import LossWeights, editing_loss
from instructedit.errors import UserError
from instructedit.records import EditRequest

CASES = [
    Case("The capital of France is", "Lyon", (("France's capital is", "Lyon"),), (), (("Who", "he and she"),)),
    Case("Who", "a man of the sea", (("Say who", "yes"),), (("Say who", "no one"), ("A", "city")), ()),
    Case("A longer prompt about a city on a river", "Spree", (), (), (("The", "end"), ("One city", "or two"))),
]
SMALL = {"lstm": 6, "condition": 10, "hidden": 8, "blocks": (1, 3), "scale": 5.0}


def built(lm, **options):
    """Random everywhere and away from its start, so that every part of the formula matters."""
    torch.manual_seed(0)
    editor = build_editor("ke", lm, **{**SMALL, **options})
    for parameter in editor.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    for site, gates in zip(editor.sites, editor.gates, strict=True):  # γ, so that the gradient counts beside β̂
        sizes = gates.layers[2].parametrizations.weight.original0.data
        sizes[2 * site.in_features : -site.out_features - 1] *= 200
    return editor


@pytest.fixture
def editor(lm):
    return built(lm)


def requests_of(cases):
    return [EditRequest(case.prompt, case.target) for case in cases]


def what_it_says(lm, case):
    """The model's own most likely token at each place of the answer, as a text."""
    logits = answer_logits(plain_model(lm), lm.tokenizer, case.prompt, case.target)
    return lm.tokenizer.decode(logits.argmax(-1))


def condition(lm, editor, case):
    """h: the LSTM over one row without padding, both ends of it, a layer, tanh."""
    ids = lm.tokenizer(f"{what_it_says(lm, case).strip()} >> {case.target} || {case.prompt}")["input_ids"]
    embedded = plain_model(lm).get_input_embeddings().weight[ids]
    outputs, _ = editor.reader(embedded)  # [tokens, 2 · lstm]
    ends = torch.cat([outputs[-1, : editor.lstm], outputs[0, editor.lstm :]])  # the last step of each direction
    return (editor.summary.weight @ ends + editor.summary.bias).tanh()


def weight_normed(layer, x):
    """g · v/‖v‖, row by row."""
    size, direction = (getattr(layer.parametrizations.weight, f"original{i}") for i in (0, 1))
    return (size * direction / direction.norm(dim=1, keepdim=True)) @ x + layer.bias


def ke_deltas(lm, editor, cases, gradient=1.0):
    """ΔW = s·σ(η)·(α̂ ⊙ ∇W + β̂) of every request and site, dense, [{site: [out, in]}], differentiable."""
    names, found = [site.name for site in editor.sites], []
    for case in cases:
        h, seen = condition(lm, editor, case), gradients(lm, names, case.prompt, case.target)
        found.append({})
        for site, gates in zip(editor.sites, editor.gates, strict=True):
            first, _, last = gates.layers
            alpha, beta, gamma, delta, eta = weight_normed(last, weight_normed(first, h).tanh()).split(gates.sizes)
            gate, shift = torch.outer(gamma, alpha.softmax(0)), torch.outer(delta, beta.softmax(0))
            dense = gate * seen.weight[site.name] * gradient + shift
            found[-1][site.name] = editor.scale * eta.sigmoid() * dense
    return found


def test_the_update_is_the_dense_formula_request_by_request(lm, editor):
    with torch.no_grad():
        edit, expected = editor.compute_edit(training_batch(lm, CASES).requests), ke_deltas(lm, editor, CASES)
        shifts = ke_deltas(lm, editor, CASES, gradient=0.0)
    for site in editor.sites:
        for i, own in enumerate(expected):
            assert relative(edit.delta(site.name)[i], own[site.name]) < 1e-4, (site.name, i)
            assert relative(own[site.name], shifts[i][site.name]) > 0.1  # the gradient's part is not lost in β̂
        assert relative(expected[0][site.name], expected[1][site.name]) > 0.1  # each request has its own


def test_gradients_of_the_outer_loss_are_the_dense_ones(lm, editor):
    batch, parameters = training_batch(lm, CASES), dict(editor.named_parameters())
    found = editing_loss(lm, editor.compute_edit(batch.requests), batch)
    expected = outer_losses(lm, ke_deltas(lm, editor, CASES), CASES)
    ours, dense = (torch.autograd.grad(edit + kl, parameters.values()) for edit, kl in (found, expected))
    for name, own, reference in zip(parameters, ours, dense, strict=True):
        assert reference.norm() > 1e-8, name
        assert relative(own, reference) < 2e-3, name


def test_the_rank_is_the_number_of_tokens_that_the_loss_reaches_plus_one(lm):
    case, editor = Case("A city", "by the sea"), built(lm, blocks=(1, 3))
    prompt, answer = tokens(lm.tokenizer, case.prompt, case.target)
    edit = editor.edit(requests_of([case]))
    for site in editor.sites:  # the last token predicts nothing; above the top block only answers are read
        reached = len(answer) if site.block == 3 else len(prompt) + len(answer) - 1
        sizes = torch.linalg.svdvals(edit.delta(site.name)[0].double())
        assert reached + 1 < min(edit.delta(site.name)[0].shape)  # else the shape alone would bound it
        assert sizes[reached] > 1e-5 * sizes[0]
        assert sizes[reached + 1] < 1e-6 * sizes[0]


@pytest.mark.parametrize("how", ["scale", "gates"])
def test_gates_at_zero_change_nothing(lm, how):
    editor = built(lm, scale=0.0 if how == "scale" else 5.0)
    if how == "gates":
        for gates in editor.gates:  # α and β are then flat, γ = δ = 0 and σ(η) = ½
            gates.layers[2].parametrizations.weight.original0.data.zero_()
            gates.layers[2].bias.data.zero_()
    edit = editor.edit(requests_of(CASES))
    assert all(not edit.delta(site.name).any() for site in editor.sites)
    batch = lm.encode([case[:2] for case in CASES])
    assert_changes_nothing(lm, batch, edit)
    edit = built(lm).edit(requests_of(CASES))
    with pytest.raises(AssertionError):
        assert_changes_nothing(lm, batch, edit)


# -- the margin -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [1e-3, 0.9, 30.0])
def test_the_multiplier_climbs_by_what_the_divergence_exceeds_the_margin(lm, margin):
    editor, batch = built(lm, margin=margin, multiplier_rate=0.5), training_batch(lm, CASES)
    edit, divergence = (loss.item() for loss in outer_losses(lm, ke_deltas(lm, editor, CASES), CASES))
    assert 0.1 < divergence < 0.8  # above the first margin, below the others
    multiplier = 1.0
    for _ in range(2):
        parts = editor.training_loss(batch, LossWeights(0.2, 77.0))  # the weight of locality takes no part
        loss = 0.2 * edit + multiplier * (divergence - margin)
        multiplier = max(0.0, multiplier + 0.5 * (divergence - margin))
        found = {name: value.item() for name, value in parts.items()}
        expected = {"loss": loss, "edit_loss": edit, "locality_loss": divergence, "multiplier": multiplier}
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert editor.multiplier.item() == pytest.approx(multiplier, rel=1e-4, abs=1e-6)
    assert (multiplier > 1) == (margin < 0.1)
    assert (multiplier == 0) == (margin > 10)


def test_the_multiplier_takes_no_gradient(lm, editor):
    loss = editor.training_loss(training_batch(lm, CASES), LossWeights(1.0, 1.0))["loss"]
    loss.backward()
    assert not editor.multiplier.requires_grad
    again = editor.training_loss(training_batch(lm, CASES), LossWeights(1.0, 1.0))["loss"]
    again.backward()  # nothing of the first step's graph hangs on to the multiplier


@pytest.fixture(scope="module")
def one_lm(tokenizer):
    return random_lm("gpt2", tokenizer)


@given(
    margin=st.floats(1e-6, 1.0), decay=st.floats(0.1, 1.0), least=st.floats(1e-7, 1e-3),
    reliability=st.lists(st.floats(0, 100) | st.just(90.0), max_size=30),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_the_margin_shrinks_after_each_validation_above_the_share_down_to_its_end(
    one_lm, margin, decay, least, reliability
):
    editor = build_editor("ke", one_lm, **SMALL, margin=margin, margin_decay=decay, margin_min=least)
    expected = margin
    for share in reliability:
        editor.on_validation_end({"reliability": share, "locality": 100 - share})
        if share > 90:
            expected = max(expected * decay, least)
        assert editor.allowed.item() == pytest.approx(expected, rel=1e-4)
    editor.on_validation_end({"locality": 100.0})  # nothing is known of its success
    assert editor.allowed.item() == pytest.approx(expected, rel=1e-4)


def test_the_margin_of_the_paper(lm):
    editor = build_editor("ke", lm, **SMALL)
    assert editor.allowed.item() == pytest.approx(1e-3)
    for step in range(30):
        editor.on_validation_end({"reliability": 90.0})
        assert editor.allowed.item() == pytest.approx(max(1e-3 * 0.8**step, 1e-5), rel=1e-4)
        editor.on_validation_end({"reliability": 90.1})
    assert editor.allowed.item() == pytest.approx(1e-5)


def test_multiplier_and_margin_travel_with_the_checkpoint(lm, tmp_path):
    editor, batch = built(lm, margin=1e-3), training_batch(lm, CASES)
    for _ in range(3):
        editor.training_loss(batch, LossWeights(1.0, 1.0))
        editor.on_validation_end({"reliability": 100.0})
    applied = {"multiplier": editor.multiplier.clone(), "allowed": editor.allowed.clone()}
    assert applied["multiplier"] > 1
    assert applied["allowed"].item() == pytest.approx(1e-3 * 0.8**3)
    fresh = built(lm, margin=1e-3)
    fresh.load_state_dict(editor.state_dict())
    editor.save_pretrained(tmp_path)
    others = [fresh, load_editor(tmp_path, lm)]
    for other in others:
        assert {name: getattr(other, name) for name in applied} == applied
    expected = editor.training_loss(batch, LossWeights(1.0, 1.0))
    for other in others:
        found = other.training_loss(batch, LossWeights(1.0, 1.0))
        assert all(torch.equal(found[name], value) for name, value in expected.items())


PROCESS = """
import sys, torch
from instructedit.editors import load_editor
folder, rank = sys.argv[1:]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=2)
lm, batches, weights = torch.load(f"{folder}/all.pt", weights_only=False)
editor = load_editor(folder, lm)
for step in range(2):
    parts = editor.training_loss(batches[int(rank)], weights)
torch.save((parts["locality_loss"].detach(), editor.multiplier), f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_climb_together(tokenizer, tmp_path):
    lm = random_lm("llama", tokenizer)
    editor = built(lm)
    batches = [training_batch(lm, [case]) for case in CASES[::2]]
    editor.save_pretrained(tmp_path)
    torch.save((lm, batches, LossWeights(1.0, 1.0)), tmp_path / "all.pt")
    command = [sys.executable, "-c", PROCESS, str(tmp_path)]
    running = [subprocess.Popen([*command, rank]) for rank in "01"]
    assert [process.wait(120) for process in running] == [0, 0]
    (one, first), (other, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in "01")
    assert torch.equal(first, second)
    alone = [outer_losses(lm, ke_deltas(lm, editor, [case]), [case])[1].item() for case in CASES[::2]]
    assert [one.item(), other.item()] == pytest.approx(alone, rel=1e-4)
    assert abs(one - other) > 0.1  # so that neither's own share would do
    assert first.item() == pytest.approx(1 + 2 * 0.1 * (sum(alone) / 2 - 1e-3), rel=1e-5)


@pytest.mark.parametrize("option", ["lstm", "hidden"])
def test_a_network_without_units_is_refused(lm, option):
    with pytest.raises(UserError, match=f"editor 'ke': {option} must be at least 1, got 0"):
        built(lm, **{option: 0})
