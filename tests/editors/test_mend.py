"""MEND against its formula, written out one token at a time; and the running normalisation that it reads through."""

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import (
    Case,
    edit_loss,
    edited_weights,
    gradients,
    mend_deltas,
    outer_losses,
    plain_model,
    relative,
    training_batch,
)

from instructedit.editors import build_editor, normalizer
from instructedit.editors.losses import editing_loss
from instructedit.editors.normalizer import RunningNorm
from instructedit.lm import TokenBatch

CASES = [
    Case("The capital of France is", "Lyon", (("France's capital is", "Lyon"),), (), (("Who", "he and she"),)),
    Case("Who", "a man of the sea", (("Say who", "yes"),), (("Say who", "no one"), ("A", "city")), ()),
    Case("A longer prompt about a city on a river", "Spree", (), (), (("The", "end"), ("One city", "or two"))),
]
HISTORY = [Case("Another city", "is here"), Case("It was", "a river")]


def requests(lm, cases):
    return training_batch(lm, cases).requests


def new_editor(lm, **options):
    return build_editor("mend", lm, **{"rank": 6, "blocks": (1, 3), **options})


@pytest.fixture
def editor(lm):
    """Random everywhere, so that every part of the formula matters."""
    editor = new_editor(lm)
    rng = torch.Generator().manual_seed(0)
    for name, parameter in editor.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        parameter.data = noise - 4 if name == "log_alpha" else parameter.data + noise * 0.1
    return editor


def test_factors_are_the_dense_sum_over_tokens(lm, editor):
    names = [site.name for site in editor.sites]

    def agree(found, expected):
        for name in names:
            for i, own in enumerate(expected):
                assert relative(found.delta(name)[i], own[name]) < 2e-4, (name, i)

    with torch.no_grad():
        agree(editor.compute_edit(requests(lm, CASES)), mend_deltas(lm, editor, CASES))  # statistics: none yet
        editor.train()
        agree(editor.compute_edit(requests(lm, HISTORY)), mend_deltas(lm, editor, HISTORY, training=True))
        agree(editor.compute_edit(requests(lm, CASES)), mend_deltas(lm, editor, CASES, training=True, history=HISTORY))
        editor.eval()
        agree(editor.compute_edit(requests(lm, CASES)), mend_deltas(lm, editor, CASES))


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_the_outer_loss_are_the_dense_ones(lm, editor, training):
    editor.train(training)
    batch = training_batch(lm, CASES)
    parameters = dict(editor.named_parameters())
    found = editing_loss(lm, editor.compute_edit(batch.requests), batch)
    expected = outer_losses(lm, mend_deltas(lm, editor, CASES, training=training), CASES)
    for part in range(2):
        torch.testing.assert_close(found[part], expected[part], atol=1e-5, rtol=1e-4)
    ours, dense = (torch.autograd.grad(0.1 * edit + kl, parameters.values()) for edit, kl in (found, expected))
    for name, own, reference in zip(parameters, ours, dense, strict=True):
        assert reference.norm() > 1e-6, name
        assert relative(own, reference) < 2e-3, name


def test_the_start_is_minus_alpha_times_the_gradient(lm):
    editor = new_editor(lm, edit_rate=0.03)
    names = [site.name for site in editor.sites]
    edit = editor.edit([r.request for r in training_batch(lm, CASES).records])
    for i, case in enumerate(CASES):
        expected = gradients(lm, names, case.prompt, case.target)
        for name in names:
            assert relative(edit.delta(name)[i], -0.03 * expected.weight[name]) < 1e-4


def test_at_the_start_the_factors_are_the_normalised_ones(lm):
    editor = new_editor(lm, edit_rate=1.0).train()
    factors = editor.compute_edit(requests(lm, CASES)).factors
    for network, group in zip(editor.networks, editor.groups, strict=True):
        for part, norm in enumerate((network.norm_u, network.norm_delta)):
            kept = torch.cat([factors[editor.sites[i].name][part].flatten(0, 1) for i in group])
            kept = kept[kept.any(-1)]
            assert len(kept) == norm.count
            torch.testing.assert_close(kept.mean(0), torch.zeros(kept.shape[1]), atol=1e-5, rtol=0)
            torch.testing.assert_close(kept.std(0), torch.ones(kept.shape[1]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_a_small_step_goes_down(lm, training):
    editor = new_editor(lm, edit_rate=3e-2 if not training else 1e-4).train(training)
    with torch.no_grad():
        edit = editor.compute_edit(requests(lm, CASES))
        model = plain_model(lm)
        for i, case in enumerate(CASES):
            weights = edited_weights(model, {site: edit.delta(site)[i] for site in edit.sites})
            before = edit_loss(model, lm.tokenizer, case.prompt, case.target)
            assert edit_loss(model, lm.tokenizer, case.prompt, case.target, weights) < before


def test_only_tokens_that_the_loss_reads_are_counted(lm, editor):
    edit = editor.train().compute_edit(requests(lm, CASES))
    names = [site.name for site in editor.sites]
    seen = [gradients(lm, names, case.prompt, case.target) for case in CASES]
    kept = {n: [int((g.delta[n].abs().sum(-1) > 0).sum()) for g in seen] for n in names}
    for network, group in zip(editor.networks, editor.groups, strict=True):
        count = sum(sum(kept[names[i]]) for i in group)
        assert network.norm_u.count == network.norm_delta.count == count
    for name, (a, b) in edit.factors.items():
        assert (a.any(-1) & b.any(-1)).sum(-1).tolist() == kept[name]
    answers = [len(lm.tokenizer(" " + case.target)["input_ids"]) for case in CASES]
    assert kept[names[-1]] == answers  # in the last block only the positions that predict the answer


def test_padding_reaches_neither_statistics_nor_factors(lm, editor):
    batch, found = requests(lm, CASES[:2]), []
    tokens = batch.tokens
    ids, mask = (torch.nn.functional.pad(t, (0, 9)) for t in (tokens.input_ids, tokens.attention_mask))
    labels = torch.nn.functional.pad(tokens.labels, (0, 9), value=-100)
    for given_tokens in (tokens, TokenBatch(torch.where(mask.bool(), ids, 11), mask, labels)):
        batch.tokens, own = given_tokens, copy.deepcopy(editor).train()
        own._lm = editor._lm
        found.append((own.compute_edit(batch), own.state_dict()))
    for site in editor.sites:
        for part in range(2):
            once, again = (edit.factors[site.name][part] for edit, _ in found)
            torch.testing.assert_close(once, again, atol=1e-4, rtol=1e-3)
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], tensor, atol=1e-5, rtol=1e-4)


def test_a_batch_is_its_requests_one_by_one(lm, editor):
    editor.train().compute_edit(requests(lm, HISTORY))
    editor.eval()
    together = editor.compute_edit(requests(lm, CASES))
    for i, case in enumerate(CASES):
        alone = editor.compute_edit(requests(lm, [case]))
        for site in editor.sites:
            assert relative(together.delta(site.name)[i], alone.delta(site.name)[0]) < 1e-4


def test_a_zero_start_gets_gradients_and_edit_rates_move(lm):
    editor, batch = new_editor(lm).train(), training_batch(lm, CASES)
    groups = editor.parameter_groups()
    assert sorted(map(id, sum(groups.values(), []))) == sorted(map(id, editor.parameters()))  # noqa: RUF017
    rates = {"network": 1e-6, "edit_rates": 1e-3}
    adam = torch.optim.Adam([{"params": p, "lr": rates[name]} for name, p in groups.items()])
    start = {name: p.detach().clone() for name, p in editor.named_parameters()}
    for _ in range(3):
        adam.zero_grad()
        loss = editing_loss(lm, editor.compute_edit(batch.requests), batch)
        (0.1 * loss.edit + loss.locality).backward()
        assert all(up.grad.any() for network in editor.networks for up in network.up)
        adam.step()
    assert editor.monitored()["edit_rates"] is editor.log_alpha
    assert ((editor.log_alpha - start["log_alpha"]).abs() > 5e-4).all()  # at their own rate
    for name, parameter in editor.named_parameters():
        if name != "log_alpha":
            moved = (parameter - start[name]).abs().max()
            assert 0 < moved < 1e-5, name


def rows_of(counts, offset):
    rng = torch.Generator().manual_seed(sum(counts))
    return [torch.randn(n, 3, generator=rng) * torch.tensor([1.0, 0.1, 5.0]) + offset for n in counts]


@given(counts=st.lists(st.integers(0, 7), min_size=1, max_size=6), offset=st.floats(-50, 50), stop=st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_batches_merge_to_all_at_once_also_after_a_restart(counts, offset, stop):
    norm, parts = RunningNorm(3).train(), rows_of(counts, offset)
    for i, part in enumerate(parts):
        if i == stop:
            saved, norm = norm.state_dict(), RunningNorm(3).train()
            norm.load_state_dict(saved)
        norm(part)
    whole = torch.cat(parts).double()
    assert norm.count == len(whole)
    if len(whole) > 1:
        torch.testing.assert_close(norm.mean.double(), whole.mean(0), atol=1e-4, rtol=1e-5)
        x, norm = rows_of([4], offset)[0], norm.eval()
        expected = (x - whole.mean(0)) / (whole.std(0) + 1e-7)
        torch.testing.assert_close(norm(x).double(), expected, atol=5e-3, rtol=1e-3)


def test_identity_before_any_token_and_frozen_in_evaluation():
    norm, x = RunningNorm(3).eval(), torch.randn(5, 3)
    assert torch.equal(norm(x), x)
    assert norm.count == 0
    norm.train()(x[:0])
    assert torch.equal(norm.eval()(x), x)
    norm.train()(x)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    assert before.keys() == {"count", "mean", "squares"}
    norm.eval()(10 * x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())


def test_estimates_wait_for_no_device():
    norm = RunningNorm(3).train().to("meta")  # whose tensors hold nothing: looking into one raises
    assert norm(torch.randn(5, 3, device="meta")).shape == (5, 3)


def test_constant_coordinates_stay_finite():
    norm = RunningNorm(2).train()
    out = norm(torch.tensor([[3.0, 1.0], [3.0, 2.0]]))
    assert out[:, 0].tolist() == [0, 0]
    assert out.isfinite().all()


PROCESS = """
import runpy, sys, torch
file, folder, rank = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=2)
norm = runpy.run_path(file)["RunningNorm"](3).train()
for part in torch.load(f"{folder}/rows.pt")[int(rank)]:
    norm(part)
torch.save(norm.state_dict(), f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path):
    parts = rows_of([4, 1, 0, 3, 0, 0], 5.0)
    torch.save([parts[::2], parts[1::2]], tmp_path / "rows.pt")  # uneven, and no token at all in the last step
    command = [sys.executable, "-c", PROCESS, normalizer.__file__, str(tmp_path)]
    running = [subprocess.Popen([*command, rank]) for rank in "01"]
    assert [process.wait(120) for process in running] == [0, 0]
    one = RunningNorm(3).train()
    one(torch.cat(parts))
    for rank in "01":
        for name, tensor in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(tensor, one.state_dict()[name], atol=1e-5, rtol=1e-5)
