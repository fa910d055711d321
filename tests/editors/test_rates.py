"""The sweep of MEND's edit rate: its losses by the plain formulas, what it leaves alone, and rates as logarithms."""

import json
import math

import pytest
import torch
from tests.conftest import random_lm
from tests.reference import (
    Case,
    edited_weights,
    gradients,
    outer_losses,
    plain_model,
    relative,
    training_batch,
    unlikelihood,
)

from instructedit.editors import build_editor, load_editor
from instructedit.editors.losses import LossWeights
from instructedit.editors.mend import PAPER_RATE
from instructedit.editors.rates import best_rate, sweep_rates
from instructedit.errors import UserError
from instructedit.records import EditRequest

CASES = [
    Case("The capital of France is", "Lyon", (("France's capital is", "Lyon"),), (), (("Who", "he and she"),)),
    Case("Who", "a man of the sea", (("Say who", "yes"),), (("Say who", "no one"),), ()),
    Case("A longer prompt about a city", "Spree", (), (), (("The", "end"), ("One city", "or two"))),
]
WEIGHTS = LossWeights(0.7, 1.3, 0.5)


def new_editor(lm, **options):
    return build_editor("mend", lm, **{"rank": 6, "blocks": (1, 3), **options})


def four_rates(lm):
    return new_editor(lm, blocks=None, site_names=[lm.sites[-1].name.replace(".3.", ".*.")])


def identity_deltas(lm, editor, rate):
    """−rate · Σ_t norm(δ_t) norm(u_t)ᵀ of every case, normalised over the tokens of all cases and sites of a shape."""
    names = [site.name for site in editor.sites]
    seen = [gradients(lm, names, case.prompt, case.target) for case in CASES]
    deltas = [{} for _ in CASES]
    for shape in {site.shape for site in editor.sites}:
        group = [site.name for site in editor.sites if site.shape == shape]
        tokens = [(i, n, g.delta[n].abs().sum(-1) > 0) for n in group for i, g in enumerate(seen)]
        parts = [[getattr(seen[i], part)[n][kept] for i, n, kept in tokens] for part in ("u", "delta")]
        stats = [(torch.cat(rows).mean(0), torch.cat(rows).std(0) + 1e-7) for rows in parts]
        for (i, n, _), u, delta in zip(tokens, *parts, strict=True):
            u, delta = ((x - mean) / std for x, (mean, std) in zip((u, delta), stats, strict=True))
            deltas[i][n] = -rate * delta.T @ u
    return deltas


def test_each_loss_is_that_of_the_dense_identity_editor(lm):
    editor = new_editor(lm)
    tried = sweep_rates(editor, training_batch(lm, CASES), WEIGHTS)
    assert [found.rate for found in tried] == sorted(found.rate for found in tried)
    assert tried[0].rate == 0
    for found in [tried[0], *tried[3:9]]:
        model, deltas = plain_model(lm), identity_deltas(lm, editor, found.rate)
        edit, locality = outer_losses(lm, deltas, [case._replace(unwanted=()) for case in CASES])
        weights = edited_weights(model, deltas[1])
        edit = edit + WEIGHTS.unlikelihood * unlikelihood(model, lm.tokenizer, "Say who", "no one", weights) / len(
            CASES
        )
        assert found.edit_loss == pytest.approx(edit.item(), rel=2e-3)
        assert found.locality_loss == pytest.approx(locality.item(), rel=2e-2, abs=1e-4)
        expected = WEIGHTS.edit * found.edit_loss + WEIGHTS.locality * found.locality_loss
        assert found.loss == pytest.approx(expected, rel=1e-5)


def test_the_best_rate_has_the_least_loss_and_worse_ones_on_both_sides(lm):
    tried = sweep_rates(new_editor(lm), training_batch(lm, CASES), WEIGHTS)
    rates, losses = [found.rate for found in tried], [found.loss for found in tried]
    best = best_rate(tried)
    at = rates.index(best)
    assert 0 < at < len(rates) - 1
    assert losses[at] == min(losses) < losses[0]
    assert rates[at + 1] / best == pytest.approx(10**0.125, rel=0.01)
    assert best / rates[at - 1] == pytest.approx(10**0.125, rel=0.01)
    assert len(rates) < 16


def test_a_model_of_another_scale_has_another_rate(tokenizer):
    """Normalised factors do not know how large the weights are that they are added to."""
    small, large = random_lm("gpt2", tokenizer), random_lm("gpt2", tokenizer)
    for block in large.blocks:
        block.mlp.c_proj.weight.data *= 30
    batch = training_batch(small, CASES)
    found = [best_rate(sweep_rates(new_editor(lm, site_names=["*.c_proj"]), batch, WEIGHTS)) for lm in (small, large)]
    assert found[1] > 2 * found[0]


def test_the_sweep_leaves_the_editor_as_it_is(lm):
    editor, other = new_editor(lm).train(), training_batch(lm, CASES[:1])
    editor.compute_edit(other.requests)  # statistics of its own
    before = {name: tensor.clone() for name, tensor in editor.state_dict().items()}
    assert before["networks.0.norm_u.count"] > 0
    random = torch.get_rng_state()
    sweep_rates(editor, training_batch(lm, CASES), WEIGHTS)
    after = editor.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert editor.training
    assert torch.equal(torch.get_rng_state(), random)


def test_the_model_is_read_once_and_then_from_the_prefix_up(lm, monkeypatch):
    editor, captured = new_editor(lm), []
    capture = lm.capture
    monkeypatch.setattr(lm, "capture", lambda *args: captured.append(1) or capture(*args))
    tried = sweep_rates(editor, training_batch(lm, CASES), WEIGHTS)
    assert (len(captured), len(tried) > 8) == (1, True)
    monkeypatch.setattr(lm.prefixes, "_unknown", lambda *args, **options: 1 / 0)
    assert sweep_rates(editor, training_batch(lm, CASES), WEIGHTS) == tried  # its prompts are known by now


# -- rates as logarithms ----------------------------------------------------------------------------------------------


def test_auto_is_the_default_and_stands_for_the_papers_rate_until_it_is_measured(lm):
    editor = new_editor(lm)
    assert (editor.edit_rate, editor.rate_is_open) == ("auto", True)
    torch.testing.assert_close(editor.alpha, torch.full_like(editor.alpha, PAPER_RATE))
    editor.start_at(0.02)
    torch.testing.assert_close(editor.alpha, torch.full_like(editor.alpha, 0.02))
    assert not editor.rate_is_open
    assert not new_editor(lm, edit_rate=0.3).rate_is_open


@pytest.mark.parametrize("rate", [0, -1e-4, math.nan, math.inf])
def test_a_rate_without_a_logarithm_is_refused(lm, rate):
    with pytest.raises(UserError, match="editor 'mend': edit_rate must be a number"):
        new_editor(lm, edit_rate=rate)


def test_a_step_of_the_optimiser_is_a_share_of_each_rate(lm):
    editor = four_rates(lm)
    editor.log_alpha.data = torch.tensor([1e-6, 1e-4, 1e-2, 1.0]).log()
    start = editor.alpha.detach().clone()
    adam = torch.optim.Adam(editor.parameter_groups()["edit_rates"], lr=0.01)
    (editor.alpha / start).sum().backward()
    adam.step()
    torch.testing.assert_close(editor.alpha / start, torch.full((4,), math.exp(-0.01)))


def old_style(editor, rates):
    """What an editor saved when its rates were learned as they are."""
    weights = {name: tensor.clone() for name, tensor in editor.state_dict().items()}
    del weights["log_alpha"]
    return weights | {"alpha": torch.tensor(rates)}


def test_rates_of_an_older_editor_are_found_and_their_signs_dropped(lm, tmp_path):
    from safetensors.torch import save_file

    editor = four_rates(lm)
    editor.save_pretrained(tmp_path)
    rates = [1e-4, -2e-3, 0.3, 5e-5]
    save_file(old_style(editor, rates), tmp_path / "editor.safetensors")
    card = json.loads((tmp_path / "editor.json").read_text())
    (tmp_path / "editor.json").write_text(json.dumps({k: v for k, v in card.items() if k != "sha256"}))
    found = load_editor(tmp_path, lm)
    torch.testing.assert_close(found.alpha, torch.tensor(rates).abs())
    assert "alpha" not in found.state_dict()
    plain = four_rates(lm)
    plain.load_state_dict(old_style(editor, rates))  # as Lightning does
    torch.testing.assert_close(plain.alpha, torch.tensor(rates).abs())
    assert not plain.rate_is_open
    plain.load_state_dict(old_style(editor, [0.0] * 4))
    assert plain.alpha.isfinite().all()
    assert plain.log_alpha.isfinite().all()


def test_a_saved_editor_has_its_found_rates(lm, tmp_path):
    editor = new_editor(lm)
    editor.start_at(0.037)
    editor.save_pretrained(tmp_path)
    again = load_editor(tmp_path, lm)
    assert torch.equal(again.log_alpha, editor.log_alpha)
    assert (again.edit_rate, again.rate_is_open) == ("auto", False)
    request = [EditRequest("Who", "he")]
    name = editor.sites[0].name
    assert relative(again.edit(request).delta(name), editor.edit(request).delta(name)) < 1e-6
