"""UltraEdit against its dense formula, with statistics of all tokens at once."""

import pytest
import torch
from tests.reference import gradients, oriented, relative

from instructedit.editors import build_editor
from instructedit.editors.scales import NEUTRAL_PROMPTS, layer_scale
from instructedit.editors.ultra_edit import UltraEdit, least_squares
from instructedit.edits import LowRankEdit
from instructedit.errors import UserError
from instructedit.lm import FrozenLM
from instructedit.records import EditRequest

PAIRS = [("The capital of France is", "Lyon"), ("Who", "a man of the sea"), ("A long prompt of a city", "or two of it")]
REQUESTS = [EditRequest(*pair) for pair in PAIRS]
LAST_WORDS = [prompt.strip(",").split()[-1] for prompt in NEUTRAL_PROMPTS]
NEUTRAL = [(prompt, LAST_WORDS[(i + 1) % len(LAST_WORDS)]) for i, prompt in enumerate(NEUTRAL_PROMPTS)]


def built(lm, **options):
    return build_editor("ultra_edit", lm, **{"blocks": [1, 2], "rate": 0.01, **options})


def tokens_of(lm, names, pairs):
    """Keys and gradients of the tokens that the losses depend on, {site: ([tokens, in], [tokens, out])}."""
    found = [gradients(lm, names, *pair) for pair in pairs]
    read = {name: [(one.delta[name] != 0).any(-1) for one in found] for name in names}
    return {
        name: tuple(
            torch.cat([part[name][kept] for part, kept in zip(parts, read[name], strict=True)]).double()
            for parts in ([one.u for one in found], [one.delta for one in found])
        )
        for name in names
    }


def dense_formula(lm, editor, pairs, history=()):
    """V Hᵀ (H Hᵀ + I)⁻¹ of the pairs at once, {site: [out, in]}; `history` is what was edited before, with its LM."""
    names = [site.name for site in editor.sites]
    own = tokens_of(lm, names, pairs)
    known = [*history, own]
    deltas = {}
    for name in names:
        alike = [n for n in names if own[n][0].shape[1] == own[name][0].shape[1]]
        every = [torch.cat([tokens[n][part] for tokens in known for n in alike]) for part in (0, 1)]
        h, v = own[name]
        h_hat, v_hat = ((x - e.mean(0)) / (e.std(0) + 1e-7) for x, e in zip((h, v), every, strict=True))
        values = -editor.rate * h_hat.square().sum(-1, keepdim=True) * v_hat
        deltas[name] = values.T @ h @ (h.T @ h + torch.eye(h.shape[1], dtype=torch.float64)).inverse()
    return deltas


def test_separate_and_joint_edits_are_the_dense_formula(lm):
    editor = built(lm)
    first = tokens_of(lm, editor.names, NEUTRAL)
    apart, together = editor.edit(REQUESTS), editor.edit(REQUESTS, together=True)
    assert (len(apart), len(together)) == (3, 1)
    for i, pair in enumerate(PAIRS):
        for site, delta in dense_formula(lm, editor, [pair], [first]).items():
            assert relative(apart.delta(site)[i].double(), delta) < 2e-3, (site, i)
    for site, delta in dense_formula(lm, editor, PAIRS, [first]).items():
        assert relative(together.delta(site)[0].double(), delta) < 2e-3, site


def test_each_edit_of_a_sequence_adds_to_the_statistics(lm):
    editor = built(lm)
    first = tokens_of(lm, editor.names, NEUTRAL)
    batches = [editor.requests(part, None) for part in (REQUESTS[:2], REQUESTS[2:])]
    start = editor.begin_sequence()
    one, state = editor.make_next(batches[0], start)
    with lm.edited(one):
        two, _ = editor.make_next(batches[1], state)
    edited = FrozenLM(lm.merge(one), lm.tokenizer)
    seen = tokens_of(lm, editor.names, PAIRS[:2])
    for site, delta in dense_formula(edited, editor, PAIRS[2:], [first, seen]).items():
        assert relative(two.delta(site)[0].double(), delta) < 2e-3, site
    again, _ = editor.make_next(batches[0], start)  # a state is a value: the second use of it finds what the first did
    assert all(torch.equal(again.delta(site), one.delta(site)) for site in one.sites)


@pytest.mark.parametrize("tokens", [3, 9, 30])
def test_the_solution_is_that_of_the_normal_equations(tokens):
    rng = torch.Generator().manual_seed(0)
    keys, values = torch.randn(tokens, 9, generator=rng), torch.randn(tokens, 4, generator=rng)
    factors = least_squares(keys, values)
    assert factors.a.shape[1] == min(tokens, 9)
    expected = values.T @ keys @ torch.linalg.inv(keys.T @ keys + torch.eye(9))
    assert relative(LowRankEdit({"site": factors}).delta("site")[0], expected) < 1e-5


def test_it_edits_the_inputs_of_gated_layers_and_the_output_of_plain_ones(lm):
    ends = {site.name.rsplit(".", 1)[-1] for site in built(lm).sites}
    gated = hasattr(lm.model.config, "hidden_act")
    assert ends == ({"gate_proj", "up_proj"} if gated else {"c_proj"})
    assert {site.block for site in build_editor("ultra_edit", lm).sites} == {2, 3}  # 18 to 26 of 28, of 4
    named = built(lm, site_names=["*down_proj" if gated else "*c_fc"])
    assert {site.output for site in named.sites} == {gated}


def test_a_rate_is_derived_from_what_a_layer_gives(lm):
    auto = built(lm, rate="auto").edit(REQUESTS)
    fixed = built(lm, rate=1.0).edit(REQUESTS)
    for site in built(lm).sites:
        rate = UltraEdit.AUTO_RATE * layer_scale(lm, site.name).outputs / site.in_features
        torch.testing.assert_close(auto.delta(site.name), rate * fixed.delta(site.name), rtol=1e-3, atol=1e-7)


def test_an_update_is_a_step_down_the_loss(lm):
    """With small enough a step the loss falls as the gradient says, along ΔW: the sign is right."""
    editor = built(lm, rate=1e-6)
    edit, names = editor.edit(REQUESTS), editor.names
    for i, pair in enumerate(PAIRS):
        found = gradients(lm, names, *pair)
        assert sum((found.weight[n] * edit.delta(n)[i]).sum() for n in names) < 0
        assert all(oriented(lm.model.get_submodule(n), edit.delta(n)[i]).isfinite().all() for n in names)


def test_a_rate_that_makes_no_sense_is_refused(lm):
    with pytest.raises(UserError, match="editor 'ultra_edit': rate must be a number above zero"):
        built(lm, rate=0.0)
