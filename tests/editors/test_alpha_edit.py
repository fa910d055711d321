"""AlphaEdit against its dense formula, block by block on plain models that hold what is done so far."""

import pytest
import torch
from tests.editors.test_memit import at_fact, wanted_of
from tests.editors.test_rome import REQUESTS, TOKENS, batch_of
from tests.reference import dense_copy, relative

from instructedit.editors import build_editor
from instructedit.editors.alpha_edit import NullSpace
from instructedit.errors import UserError
from instructedit.lm.covariance import covariances

OPTIONS = {"text": "tiny", "tokens": TOKENS, "contexts": 0, "blocks": [0, 1], "steps": 4, "weight_decay": 0.0}


pytestmark = pytest.mark.usefixtures("kept_covariances")


def built(lm, **options):
    return build_editor("alpha_edit", lm, **{**OPTIONS, **options})


def projection(moment, energy):
    """P [in, in] and E‖P u‖²: from the least eigenvalue upwards, until the share is reached."""
    values, vectors = torch.linalg.eigh(moment.double())
    p, left = torch.zeros_like(vectors), 0.0
    for value, vector in zip(values, vectors.T, strict=True):
        if left + value > energy * moment.trace():
            break
        p, left = p + torch.outer(vector, vector), left + value
    return p, left


def dense_formula(lm, editor, requests, wanted, earlier=(), before=None):
    """ΔW = R Kᵀ P (K_p K_pᵀ P + K Kᵀ P + L2·I)⁻¹ of each block, {site: [out, in]}, and the keys, {site: [in, n]}."""
    moments = covariances(lm, [site.name for site in editor.sites], "tiny", TOKENS)
    top, done, all_keys = lm.forward.block_name(editor.sites[-1].block), {}, {}
    for number, site in enumerate(editor.sites):
        total = {name: delta.clone() for name, delta in (before or {}).items()}
        for name, delta in done.items():
            total[name] = total.get(name, 0) + delta
        model = dense_copy(lm, total)
        keys = torch.stack([at_fact(lm, model, site.name, request)[0] for request in requests], 1)
        left = len(editor.sites) - number
        r = [(wanted[i].double() - at_fact(lm, model, top, one)[1]) / left for i, one in enumerate(requests)]
        p, remaining = projection(moments[site.name], editor.energy)
        past = sum((k[site.name] @ k[site.name].T for k in earlier), start=torch.zeros_like(p))
        l2 = remaining if editor.l2 == "auto" else editor.l2
        system = past @ p + keys @ keys.T @ p + l2 * torch.eye(len(p), dtype=torch.float64)
        done[site.name] = torch.stack(r, 1) @ keys.T @ p @ system.inverse()
        all_keys[site.name] = keys
    return done, all_keys


@pytest.mark.parametrize("options", [{}, {"energy": 0.5, "l2": 3.0}], ids=str)
def test_separate_and_joint_edits_are_the_dense_formula(lm, options):
    editor = built(lm, **options)
    apart, together = editor.edit(REQUESTS[:2]), editor.edit(REQUESTS[:2], together=True)
    wanted, _ = wanted_of(lm, editor, REQUESTS[:2])
    for i, request in enumerate(REQUESTS[:2]):
        for site, delta in dense_formula(lm, editor, [request], wanted[i : i + 1])[0].items():
            assert relative(apart.delta(site)[i].double(), delta) < 2e-3, (site, i)
    for site, delta in dense_formula(lm, editor, REQUESTS[:2], wanted)[0].items():
        assert together.factors[site].a.shape[1] == 2
        assert relative(together.delta(site)[0].double(), delta) < 2e-3, site


def test_the_next_edit_of_a_sequence_keeps_the_keys_of_those_before(lm):
    editor = built(lm, energy=0.5)
    state = editor.begin_sequence()
    with torch.no_grad():
        first, state = editor.make_next(batch_of(editor, REQUESTS[:2]), state)
        alone = editor.compute_joint_edit(batch_of(editor, REQUESTS[:2]))
        before = {site: first.delta(site)[0] for site in first.sites}
        wanted, _ = wanted_of(lm, editor, REQUESTS[:2])
        _, keys = dense_formula(lm, editor, REQUESTS[:2], wanted)
        with lm.edited(first):
            batch = batch_of(editor, REQUESTS[2:])
            facts, top = editor.facts(batch), lm.forward.block_name(editor.sites[-1].block)
            now = editor.at_facts(facts, [top])[top].outputs
            wanted = editor.values(facts, editor.sites[-1], now)
            second, _ = editor.make_next(batch, state)
            forgetful, _ = editor.make_next(batch, editor.begin_sequence())
    expected, _ = dense_formula(lm, editor, REQUESTS[2:], wanted, [keys], before)
    for site, delta in expected.items():
        assert torch.equal(first.delta(site), alone.delta(site))
        assert relative(second.delta(site)[0].double(), delta) < 2e-3, site
        old = keys[site].float()
        assert (second.delta(site)[0] @ old).norm() < 0.7 * (forgetful.delta(site)[0] @ old).norm()


@pytest.mark.parametrize("energy", [0.02, 0.3])
def test_an_update_touches_no_more_of_plain_text_than_its_share(energy):
    rng = torch.Generator().manual_seed(0)
    text = torch.randn(200, 12, generator=rng) * torch.linspace(0.1, 4, 12)
    null = NullSpace(text.T @ text / 200, energy)
    seen = null.solve(null.coordinates(text), 1.0, None)
    share = (seen.square().sum() / text.square().sum()).item()
    assert 0 < share <= energy
    assert share == pytest.approx(null.left / text.square().sum(-1).mean().item(), rel=1e-5)
    wider = NullSpace(text.T @ text / 200, 1.0)
    torch.testing.assert_close(wider.solve(wider.coordinates(text), 1.0, None).float(), text, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"energy": 0.0}, "energy must be a share"), ({"energy": 1.5}, "1.5"), ({"l2": 0.0}, "l2 must be a number above")],
)
def test_options_that_make_no_sense_are_refused(lm, options, told):
    with pytest.raises(UserError, match=f"editor 'alpha_edit': .*{told}"):
        built(lm, **options)


def test_a_share_without_a_direction_is_refused(lm):
    with pytest.raises(UserError, match=r"energy 1e-12 leaves .* no direction"):
        built(lm, energy=1e-12).edit(REQUESTS[:1])
