"""MEMIT against its dense normal equations, block by block on plain models that hold what is done so far."""

import pytest
import torch
from tests.conftest import random_lm
from tests.editors.test_rome import (
    REQUESTS,
    TOKENS,
    batch_of,
    descended,
    key_and_output,
    position,
    watched,
)
from tests.reference import dense_copy, plain_model, relative

from instructedit.editors import build_editor
from instructedit.errors import UserError
from instructedit.lm.covariance import covariances
from instructedit.records import EditRequest

OPTIONS = {"text": "tiny", "tokens": TOKENS, "contexts": 0, "blocks": [0, 1, 2], "steps": 8, "weight_decay": 0.0}


pytestmark = pytest.mark.usefixtures("kept_covariances")


def built(lm, **options):
    return build_editor("memit", lm, **{**OPTIONS, "moment_weight": 0.3, **options})


def wanted_of(lm, editor, requests):
    """The editor's values of the hidden states that leave the last block, [n, out], and these states."""
    last = editor.sites[-1]
    hidden = torch.stack([key_and_output(lm, lm.forward.block_name(last.block), request)[1] for request in requests])
    return editor.values(editor.facts(batch_of(editor, requests)), last, hidden), hidden


def at_fact(lm, model, layer, request, front=""):
    inputs, outputs = watched(model, lm.tokenizer, layer, f"{front}{request.prompt} {request.target}")
    at = position(lm.tokenizer, request, front)
    return inputs[at].double(), outputs[at].double()


def normal_equations(lm, editor, requests, wanted):
    """ΔW = R Kᵀ (λC + K Kᵀ)⁻¹ of each block in turn, dense, for these requests at once, {site: [out, in]}."""
    moments = covariances(lm, [site.name for site in editor.sites], "tiny", TOKENS)
    top, done = lm.forward.block_name(editor.sites[-1].block), {}
    for number, site in enumerate(editor.sites):
        model = dense_copy(lm, done)
        keys, missing = [], []
        for i, request in enumerate(requests):
            fronts = ("", *(editor._prefixes or ()))
            keys.append(torch.stack([at_fact(lm, model, site.name, request, front)[0] for front in fronts]).mean(0))
            missing.append((wanted[i].double() - at_fact(lm, model, top, request)[1]) / (len(editor.sites) - number))
        k, r = torch.stack(keys, 1), torch.stack(missing, 1)
        done[site.name] = r @ k.T @ (editor.moment_weight * moments[site.name].double() + k @ k.T).inverse()
    return done


@pytest.mark.parametrize("options", [{}, {"contexts": 2}, {"moment_weight": 20_000.0}, {"blocks": [2]}], ids=str)
def test_separate_edits_solve_the_normal_equations_of_one_key_each(lm, options):
    editor = built(lm, **options)
    edit, (wanted, hidden) = editor.edit(REQUESTS), wanted_of(lm, editor, REQUESTS)
    assert len(edit) == len(REQUESTS)
    assert list(edit.sites) == [site.name for site in editor.sites]
    for i, request in enumerate(REQUESTS):
        assert relative(wanted[i], hidden[i]) > 0.1
        expected = normal_equations(lm, editor, [request], wanted[i : i + 1])
        for site, delta in expected.items():
            assert relative(edit.delta(site)[i].double(), delta) < 2e-3, (site, i)


@pytest.mark.parametrize("options", [{}, {"contexts": 2}, {"moment_weight": 20_000.0}], ids=str)
def test_together_they_solve_those_of_all_keys(lm, options):
    editor = built(lm, **options)
    edit, (wanted, _) = editor.edit(REQUESTS, together=True), wanted_of(lm, editor, REQUESTS)
    assert len(edit) == 1
    expected = normal_equations(lm, editor, REQUESTS, wanted)
    for site, delta in expected.items():
        assert relative(edit.delta(site)[0].double(), delta) < 2e-3, site
        sizes = torch.linalg.svdvals(edit.delta(site)[0].double())
        assert sizes[len(REQUESTS) - 1] > 1e-4 * sizes[0]
        assert sizes[len(REQUESTS)] < 1e-6 * sizes[0]
    if not options:  # they meet: a random LM's keys are alike
        apart = editor.edit(REQUESTS).joined()
        assert all(relative(apart.delta(site), edit.delta(site)) > 0.1 for site in edit.sites)


def test_one_request_together_is_one_request(lm):
    editor = built(lm, contexts=1)
    for request in REQUESTS:
        alone, together = editor.edit([request]), editor.edit([request], together=True)
        for site in alone.sites:
            assert alone.delta(site).shape == together.delta(site).shape
            assert relative(together.delta(site), alone.delta(site)) < 1e-5


@pytest.mark.parametrize("together", [False, True])
def test_with_little_to_preserve_each_block_makes_up_its_share_of_what_is_missing(lm, together):
    """λ → 0: a block's update moves its own output by exactly the residual over the blocks left."""
    editor = built(lm, moment_weight=1e-7)
    edit, (wanted, hidden) = editor.edit(REQUESTS, together=together), wanted_of(lm, editor, REQUESTS)
    top = lm.forward.block_name(editor.sites[-1].block)
    for i, request in enumerate(REQUESTS):
        own, done, missing = 0 if together else i, {}, wanted[i].double() - hidden[i].double()
        for left, site in zip((3, 2, 1), editor.sites, strict=True):
            model = dense_copy(lm, done)
            key, gap = at_fact(lm, model, site.name, request)[0], wanted[i] - at_fact(lm, model, top, request)[1]
            delta = edit.delta(site.name)[own].double()
            assert relative(delta @ key, gap / left) < 5e-3, (site.name, i)
            done[site.name] = edit.delta(site.name)[own]
        after = at_fact(lm, dense_copy(lm, done), top, request)[1]
        assert (wanted[i] - after).norm() < 5e-3 * missing.norm()  # the last block closes the gap


def test_a_huge_weight_of_the_moments_changes_nothing(lm):
    edits = [built(lm, moment_weight=weight).edit(REQUESTS) for weight in (1.0, 1e12)]
    batch = lm.encode([(request.prompt, request.target) for request in REQUESTS])
    said = lm.logits(batch)
    changes = [(lm.logits(batch, edit) - said).abs().max() for edit in edits]
    assert changes[0] > 0.05
    assert changes[1] < 1e-5


@pytest.mark.parametrize("bounds", [{"weight_decay": 2.0, "clamp": 9.0}, {"clamp": 0.1}], ids=str)
def test_the_value_is_of_the_state_that_leaves_the_last_block(lm, bounds):
    editor = built(lm, contexts=1, steps=4, kl=0.0, lr=0.1, **bounds)
    wanted, hidden = wanted_of(lm, editor, REQUESTS)
    for i, request in enumerate(REQUESTS):
        expected = descended(lm, editor, request, lm.forward.block_name(2))
        assert relative(wanted[i] - hidden[i], expected - hidden[i]) < 1e-3


def test_a_request_without_a_subject_is_edited_at_its_end(lm):
    bare, editor = EditRequest("The capital of France is", "Lyon"), built(lm, blocks=[2])
    with pytest.warns(UserWarning, match="editor 'memit': 1 of 2 requests name no subject"):
        edit = editor.edit([REQUESTS[1], bare])
    site = editor.sites[0].name
    inputs, _ = watched(plain_model(lm), lm.tokenizer, site, bare.prompt)
    moment = covariances(lm, [site], "tiny", TOKENS)[site].double()
    direction = torch.linalg.solve(moment, inputs[-1].double())
    found = edit.factors[site].a[1, 0].double()
    assert torch.nn.functional.cosine_similarity(found, direction, 0) > 1 - 1e-6


def test_the_paper_edits_blocks_13_to_17_of_48(tokenizer):
    lm = random_lm("gpt2", tokenizer, layers=16)
    sites = built(lm, blocks=None).sites
    assert [site.block for site in sites] == [4, 5]
    assert all(site.output for site in sites)


@pytest.mark.parametrize("name", ["memit", "alpha_edit"])
def test_layers_inside_a_feed_forward_layer_are_refused(lm, name):
    inner = next(site.name for site in lm.sites if not site.output)
    with pytest.raises(UserError, match=f"editor '{name}' edits the output projections of MLPs, got {inner}$"):
        build_editor(name, lm, **{**OPTIONS, "blocks": [0], "site_names": [inner]})
