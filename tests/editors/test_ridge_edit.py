"""RidgeEdit against the dense normal equations, and what its parts promise."""

import copy
from dataclasses import replace

import pytest
import torch
from tests.reference import Case, gradients, relative, training_batch

from instructedit.data.batch import Collator
from instructedit.editors import build_editor
from instructedit.editors.ridge import PastKeys, PriorKeys, ridge
from instructedit.edits import Factors, LowRankEdit
from instructedit.errors import UserError
from instructedit.instructions import Instructor
from instructedit.lm import FrozenLM
from instructedit.lm.covariance import covariances
from instructedit.records import EditRecord, EditRequest, Probe

CASES = [
    Case("The capital of France is", "Lyon", (("France's capital is", "Lyon"),), (), (("Who", "he and she"),)),
    Case("A longer prompt about a city on a river", "Spree", (), (), (("The", "end"), ("One city", "or two"))),
]
REQUESTS = [
    EditRequest(c.prompt, c.target, task=task) for c, task in zip(CASES, ("counterfact", "recent"), strict=True)
]
TEXT = {"text": "tiny", "tokens": 2000}


def new_editor(lm, **options):
    torch.manual_seed(0)
    return build_editor("ridge_edit", lm, **{"rank": 6, "blocks": (1, 3), "edit_rate": 0.5, **TEXT, **options})


def shaken(editor):
    """Random everywhere, so that every part matters."""
    rng = torch.Generator().manual_seed(0)
    for name, parameter in editor.named_parameters():
        if "log_" not in name:
            parameter.data += torch.randn(parameter.shape, generator=rng) * 0.1
    return editor


@pytest.mark.parametrize(("prior", "identity"), [(3.0, 0.2), (0.5, 5.0)])
def test_the_solution_is_that_of_the_normal_equations(prior, identity):
    rng = torch.Generator().manual_seed(0)
    text, keys, values = (torch.randn(*size, generator=rng) for size in ((40, 9), (2, 5, 9), (2, 5, 4)))
    moment = text.T @ text / 40
    keys[1, 3:], values[1, 3:] = 0, 0  # padding
    prior_keys = PriorKeys(moment)
    scaled = keys / prior_keys.unit
    solved = prior_keys.solve(scaled, torch.tensor([prior, identity]).log())
    found = LowRankEdit({"site": Factors(solved / prior_keys.unit, ridge(scaled, solved, values))}).delta("site")
    for k, v, delta in zip(keys.double(), values.double(), found, strict=True):
        k, unit = k / moment.diagonal().mean().sqrt(), moment.diagonal().mean()
        c = prior * moment.double() / unit + identity * torch.eye(9, dtype=torch.float64)
        expected = v.T @ k @ torch.linalg.inv(c + k.T @ k) / unit.sqrt()
        assert relative(delta.double(), expected) < 1e-5
    assert (ridge(scaled, solved, values)[1, 3:] == 0).all()


def test_past_keys_are_the_inverse_of_the_sum():
    rng = torch.Generator().manual_seed(0)
    first, more = torch.randn(12, 9, generator=rng).double(), torch.randn(2, 4, 9, generator=rng).double()
    c = first.T @ first
    past = PastKeys(torch.linalg.inv(c))
    for keys in more:
        past, c = past.and_these(keys), c + keys.T @ keys
    assert relative(past.inverse, torch.linalg.inv(c)) < 1e-9


def tokens_of(lm, name, cases):
    """u and −½ norm(u)² δ of the tokens that each case's loss depends on, [(keys, values)]."""
    found = []
    for case in cases:
        own = gradients(lm, [name], case.prompt, case.target)
        read = (own.delta[name] != 0).any(-1)  # other tokens take no part
        u, delta = own.u[name][read].double(), own.delta[name][read].double()
        found.append((u, -0.5 * u.square().mean(-1, keepdim=True) * delta))
    return found


def normal_equations(moment, keys, values, past=None):
    """V Kᵀ (C + K Kᵀ)⁻¹ with the C that an editor starts with, and `past` keys in it."""
    unit, size = moment.diagonal().mean().double().sqrt(), len(moment)
    c = size * (moment.double() / unit**2 + 0.1 * torch.eye(size, dtype=torch.float64))
    k = keys / unit
    if past is not None:
        c = c + past.T @ past / unit**2
    return values.T @ k @ torch.linalg.inv(c + k.T @ k) / unit


def test_a_first_step_is_the_ridge_solution_for_the_normalised_gradient(lm):
    """Untrained, values are −α norm(u)² δ: statistics know no token yet, so that norm is the identity."""
    editor = new_editor(lm, steps=1, ends=False)
    moments = covariances(lm, editor.names, "tiny", 2000)
    batch = editor.requests(REQUESTS, editor.instructor())
    apart, together = editor.compute_edit(batch), editor.compute_joint_edit(batch)
    state = editor.begin_sequence()
    for i in range(2):
        last, state = editor.make_next(editor.requests(REQUESTS[i : i + 1], editor.instructor()), state)
    assert len(together) == 1
    for name in editor.names:
        both = tokens_of(lm, name, CASES)
        keys, values = (torch.cat(parts) for parts in zip(*both, strict=True))
        for i in range(2):
            assert relative(apart.delta(name)[i].double(), normal_equations(moments[name], *both[i])) < 1e-3
        assert relative(together.delta(name)[0].double(), normal_equations(moments[name], keys, values)) < 1e-3
        # In a sequence the second edit knows of the first one's keys.
        expected = normal_equations(moments[name], *both[1], past=both[0][0])
        assert relative(last.delta(name)[0].double(), expected) < 1e-3


def test_without_ridge_a_sequence_keeps_no_keys(lm):
    editor = new_editor(lm, ridge=False)
    batch = editor.requests(REQUESTS, editor.instructor())
    edit, state = editor.make_next(batch, editor.begin_sequence())
    assert state == {}
    for name in editor.names:
        assert relative(edit.delta(name)[0], editor.compute_joint_edit(batch).delta(name)[0]) < 1e-6


def test_the_second_step_edits_the_edited_model(lm):
    one, two = (shaken(new_editor(lm, steps=steps, second_reads="plain")) for steps in (1, 2))
    two.load_state_dict(one.state_dict(), strict=False)
    first, both = one.edit(REQUESTS), two.edit(REQUESTS)
    batch = two.requests(REQUESTS, two.instructor())
    for i in range(len(REQUESTS)):
        for name in two.names:
            width = first.factors[name].a.shape[1]
            torch.testing.assert_close(both.factors[name].a[i, :width], first.factors[name].a[i], rtol=1e-4, atol=1e-6)
    merged = FrozenLM(lm.merge(first[0]), lm.tokenizer)
    alone = merged.capture(batch.tokens.select(torch.tensor([0])), two.names)
    found = lm.capture(batch.tokens, two.names, first)
    for name in two.names:
        size = alone.delta[name].shape[1]
        torch.testing.assert_close(found.delta[name][:1, :size], alone.delta[name], rtol=1e-3, atol=1e-6)


def test_only_the_first_step_adds_to_the_statistics(lm):
    one, two = (new_editor(lm, steps=steps).train() for steps in (1, 2))
    for editor in (one, two):
        editor.compute_edit(editor.requests(REQUESTS, editor.instructor()))
    for ours, theirs in zip(one.networks, two.networks, strict=True):
        assert theirs.norm_delta.count > 0
        for name, value in ours.norm_delta.state_dict().items():
            assert torch.equal(value, theirs.norm_delta.state_dict()[name]), name


def test_the_instruction_conditions_the_editor_and_stands_nowhere(lm):
    editor = new_editor(lm, second_reads="plain")
    descriptions = [editor.edit(REQUESTS, description=None), editor.edit(REQUESTS, instruction="Do as you like.")]
    same = [torch.equal(a, b) for a, b in zip(*(e.state().values() for e in descriptions), strict=True)]
    assert all(same)  # nothing yet
    batch = editor.requests(REQUESTS, editor.instructor())
    assert batch.prompts == [r.prompt for r in REQUESTS]
    assert [text.split("\n")[0] for text in batch.instructions] == ["Task: CounterFact", "Task: Recent"]
    shaken(editor)
    one, other = editor.edit(REQUESTS), editor.edit(REQUESTS, instruction="No.")
    for name in editor.names:
        assert relative(one.delta(name), other.delta(name)) > 1e-3


def test_answers_end_where_the_editor_says_so(lm):
    for ends in (True, False):
        tokens = new_editor(lm, ends=ends).requests(REQUESTS, None).tokens
        last = [tokens.answers[tokens.rows == i][-1].item() for i in range(2)]
        assert all((token == lm.tokenizer.eos_token_id) == ends for token in last)


def test_a_tokenizer_without_an_end_is_refused(lm):
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no token that ends a text"):
        new_editor(FrozenLM(lm.model, tokenizer))


def test_training_asks_plainly_and_behind_the_instruction(lm):
    probes = tuple(Probe("generalization", f"France ({i}) has the capital", ("Lyon",)) for i in range(40))
    probes += (Probe("portability", "The people of the capital of France are", ("Lyonnais",)),)
    record = EditRecord("r", REQUESTS[0], probes)
    collate = Collator(lm.text, Instructor(apart=True), rephrases=40, portability=1)
    batch = collate([(0, record)])
    texts = [lm.tokenizer.decode(ids) for ids in batch.in_scope.tokens.unpadded()]
    instructed = [text.startswith("Task: CounterFact\n") for text in texts]
    assert batch.requests.prompts == [REQUESTS[0].prompt]
    assert not instructed[0]
    assert instructed[1]
    assert texts[1].endswith(texts[0])
    assert 8 < sum(instructed[2:]) < 33
    assert sum("people" in text for text in texts) == 1


def test_a_request_whose_task_has_no_instruction_is_asked_once(lm):
    probe = Probe("generalization", "France has the capital", ("Lyon",))
    records = [EditRecord("r", replace(REQUESTS[0], task=task), (probe,)) for task in ("flat", "counterfact")]
    batch = Collator(lm.text, Instructor(apart=True, optional=True))(list(enumerate(records)))
    texts = [lm.tokenizer.decode(ids) for ids in batch.in_scope.tokens.prompts().unpadded()]
    asked = [text for text, own in zip(texts, batch.in_scope.request_index.tolist(), strict=True) if own == 0]
    assert asked == [REQUESTS[0].prompt, probe.prompt]
    assert batch.in_scope.request_index.tolist().count(1) == 3
    assert batch.requests.instructions[0] == ""


def test_gradients_reach_every_parameter(lm):
    editor = shaken(new_editor(lm)).train()
    batch = training_batch(lm, CASES)
    batch.requests = editor.requests(REQUESTS, editor.instructor())
    edit = editor.compute_edit(batch.requests)
    sum(f.b.square().sum() + f.a.square().sum() for f in edit.factors.values()).backward()
    for name, parameter in editor.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_in_training_so_many_requests_are_made_one_edit(lm):
    editor = shaken(new_editor(lm, together=2)).eval()
    more = [EditRequest("The river of Cairo is", "Rhine", task="recent"), EditRequest("Who", "he", task="zsre")]
    requests = [*REQUESTS, *more]
    joint = [editor.compute_joint_edit(editor.requests(requests[i::2], None)) for i in range(2)]
    alone = editor.compute_edit(editor.requests(requests[:3], None))
    editor.training = True  # the statistics stay as they are
    found = editor.compute_edit(editor.requests(requests, None))
    odd = editor.compute_edit(editor.requests(requests[:3], None))
    editor.together = 4
    whole = editor.compute_edit(editor.requests(requests, None))
    everything = editor.compute_joint_edit(editor.requests(requests, None))
    assert (len(found), len(whole), len(odd)) == (4, 1, 3)
    for site in found.sites:
        assert relative(found.delta(site), torch.cat([edit.delta(site) for edit in (*joint, *joint)])) < 1e-4
        assert relative(whole.delta(site), everything.delta(site)) < 1e-5
        assert relative(odd.delta(site), alone.delta(site)) < 1e-5


@pytest.mark.parametrize("option", ["steps", "together"])
def test_no_step_and_no_request_in_an_edit_are_refused(lm, option):
    with pytest.raises(UserError, match=f"editor 'ridge_edit': {option} must be at least 1, got 0"):
        new_editor(lm, **{option: 0})
