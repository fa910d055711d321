"""ROME against its closed form and its objective, on plain models with hooks of our own."""

import warnings

import pytest
import torch
from tests.conftest import random_lm
from tests.reference import dense_copy, edit_loss, plain_model, relative

from instructedit.editors import build_editor
from instructedit.errors import UserError
from instructedit.lm.covariance import covariances
from instructedit.records import EditRequest
from instructedit.testbed.corpus import documents
from instructedit.testbed.pretrain import train_tokenizer

REQUESTS = [
    EditRequest("The capital of France is", "Lyon", subject="France"),
    EditRequest("In the old city of Paris a man", "sees the sea", subject="Paris"),
    EditRequest("Who", "a queen", subject="Who"),
]
TOKENS = 1500
#: No decay: a random LM's losses fall too slowly to outweigh it.
OPTIONS = {"text": "tiny", "tokens": TOKENS, "contexts": 0, "blocks": [1], "steps": 8, "weight_decay": 0.0}


pytestmark = pytest.mark.usefixtures("kept_covariances")


def built(lm, **options):
    return build_editor("rome", lm, **{**OPTIONS, **options})


def batch_of(editor, requests):
    return editor.requests(requests, None)


def last_token(tokenizer, text, end):
    """The first token with which the text up to `end` characters is whole."""
    ids = tokenizer(text)["input_ids"]
    return next(t for t in range(len(ids)) if len(tokenizer.decode(ids[: t + 1])) >= end)


def position(tokenizer, request, front=""):
    """Of the last token of the subject where it stands last."""
    found = [i for i in range(len(request.prompt)) if request.prompt.startswith(request.subject, i)]
    return last_token(tokenizer, front + request.prompt, len(front) + found[-1] + len(request.subject))


def watched(model, tokenizer, layer, text):
    """What the layer sees and gives at each token of one text, [tokens, in] and [tokens, out]."""
    seen = []

    def hook(module, args, kwargs, output):
        given = args[0] if args else kwargs["hidden_states"]
        seen.append((given[0], (output[0] if isinstance(output, tuple) else output)[0]))

    handle = model.get_submodule(layer).register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(torch.tensor([tokenizer(text)["input_ids"]]))
    handle.remove()
    return seen[0]


def key_and_output(lm, layer, request, front=""):
    inputs, outputs = watched(plain_model(lm), lm.tokenizer, layer, f"{front}{request.prompt} {request.target}")
    at = position(lm.tokenizer, request, front)
    return inputs[at], outputs[at]


def pushed(lm, layer, at, vector):
    """A plain model whose layer gives `vector` more at one position."""
    model = plain_model(lm)

    def hook(module, args, output):
        given = output[0] if isinstance(output, tuple) else output
        more = torch.cat([given[:, :at], given[:, at : at + 1] + vector, given[:, at + 1 :]], 1)
        return (more, *output[1:]) if isinstance(output, tuple) else more

    model.get_submodule(layer).register_forward_hook(hook)
    return model


def values_of(editor, requests, lm):
    """The editor's values, and what they replace as we see it ourselves, both [n, out]."""
    (site,) = editor.sites
    now = torch.stack([key_and_output(lm, site.name, request)[1] for request in requests])
    return editor.values(editor.facts(batch_of(editor, requests)), site, now), now


# -- the update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contexts", [0, 2])
def test_the_edited_layer_maps_the_plain_prompts_key_to_its_value(lm, contexts):
    editor = built(lm, contexts=contexts)
    edit, (site,) = editor.edit(REQUESTS), editor.sites
    wanted, now = values_of(editor, REQUESTS, lm)
    for i, request in enumerate(REQUESTS):
        model = dense_copy(lm, {site.name: edit.delta(site.name)[i]})
        _, outputs = watched(model, lm.tokenizer, site.name, f"{request.prompt} {request.target}")
        torch.testing.assert_close(outputs[position(lm.tokenizer, request)], wanted[i], atol=1e-3, rtol=1e-3)
        assert relative(wanted[i], now[i]) > 0.5


def test_an_update_has_rank_one(lm):
    editor = built(lm, contexts=2)
    (delta,) = (editor.edit(REQUESTS).delta(site.name) for site in editor.sites)
    sizes = torch.linalg.svdvals(delta.double())
    assert (sizes[:, 0] > 1e-3).all()
    assert (sizes[:, 1] < 1e-6 * sizes[:, 0]).all()


def test_an_update_is_the_least_that_maps_the_key_to_the_value(lm):
    """min tr(ΔW C ΔWᵀ) with (W + ΔW) k = v: its stationary point, one dense linear system."""
    editor = built(lm)
    edit, (site,) = editor.edit(REQUESTS), editor.sites
    moment = covariances(lm, [site.name], "tiny", TOKENS)[site.name].double()
    wanted, _ = values_of(editor, REQUESTS, lm)
    for i, request in enumerate(REQUESTS):
        key, now = (tensor.double() for tensor in key_and_output(lm, site.name, request))
        system = torch.zeros(site.in_features + 1, site.in_features + 1, dtype=torch.float64)
        system[:-1, :-1], system[:-1, -1], system[-1, :-1] = 2 * moment, key, key
        right = torch.zeros(site.in_features + 1, site.out_features, dtype=torch.float64)
        right[-1] = wanted[i].double() - now
        expected = torch.linalg.solve(system, right)[:-1].T
        assert relative(edit.delta(site.name)[i].double(), expected) < 1e-3


def test_a_key_is_averaged_over_the_prompt_and_its_contexts(lm):
    """ΔW = (v − W k)(C⁻¹ k̄)ᵀ / (C⁻¹ k̄)ᵀ k, k of the plain prompt and k̄ the mean."""
    editor, request = built(lm, contexts=3), REQUESTS[1]
    edit, (site,) = editor.edit([request]), editor.sites
    fronts = editor._prefixes
    assert len(set(fronts)) == 3
    assert [front.split()[0].removesuffix(".") for front in fronts] != [""] * 3
    keys = torch.stack([key_and_output(lm, site.name, request, front)[0] for front in ("", *fronts)]).double()
    assert relative(keys.mean(0), keys[0]) > 0.05
    moment = covariances(lm, [site.name], "tiny", TOKENS)[site.name].double()
    direction = torch.linalg.solve(moment, keys.mean(0))
    (wanted,), (now,) = values_of(editor, [request], lm)
    expected = torch.outer((wanted - now).double(), direction) / (direction @ keys[0])
    assert relative(edit.delta(site.name)[0].double(), expected) < 1e-3


def test_random_contexts_are_the_same_each_time_and_leave_the_generator_alone(lm):
    before = torch.get_rng_state()
    one, other, third = (built(lm, contexts=4, seed=seed) for seed in (0, 0, 1))
    found = [editor.edit(REQUESTS[:1]).delta(editor.sites[0].name) for editor in (one, other, third)]
    assert torch.equal(torch.get_rng_state(), before)
    assert one._prefixes == other._prefixes != third._prefixes
    assert torch.equal(found[0], found[1])
    for prefix, opening in zip(one._prefixes, ("The", "Therefore", "Because", "I"), strict=True):
        assert prefix.startswith(opening)
        assert "\n" not in prefix


# -- the value --------------------------------------------------------------------------------------------------------


def test_the_value_makes_the_target_likely_where_it_is_put(lm):
    editor = built(lm, steps=20)
    (site,) = editor.sites
    wanted, now = values_of(editor, REQUESTS, lm)
    for i, request in enumerate(REQUESTS):
        at = position(lm.tokenizer, request)
        with torch.no_grad():
            before, after = (
                edit_loss(pushed(lm, site.name, at, vector), lm.tokenizer, request.prompt, request.target)
                for vector in (0 * now[i], wanted[i] - now[i])
            )
        assert after < before - 0.2


@pytest.mark.parametrize("clamp", [0.3, 4.0])
def test_a_value_stays_within_the_clamp(lm, clamp):
    wanted, now = values_of(built(lm, clamp=clamp, steps=20, stop_below=0.0), REQUESTS, lm)
    share = (wanted - now).norm(dim=-1) / now.norm(dim=-1)
    torch.testing.assert_close(share, torch.full_like(share, clamp))  # each goes as far as it may


def descended(lm, editor, request, layer):
    """The value by its objective: one request, whole forward passes of plain models, Adam by its formula.

    Mean over prompts of −log p(target)/tokens + kl · KL(edited ‖ unedited) of "<subject> is a" + decay · ‖δ‖/‖v₀‖².
    """
    tokenizer, fronts = lm.tokenizer, ("", *(editor._prefixes or ()))
    now = key_and_output(lm, layer, request)[1]
    essence = f"{request.subject} is a"
    in_essence = last_token(tokenizer, essence, len(request.subject))

    def logits_of_essence(delta):
        changed = pushed(lm, layer, in_essence, delta)
        return changed(torch.tensor([tokenizer(essence)["input_ids"]])).logits[0, -1].log_softmax(-1)

    with torch.no_grad():
        before = logits_of_essence(torch.zeros_like(now))
    delta, first, second = (torch.zeros_like(now) for _ in range(3))
    for step in range(1, editor.steps + 1):
        delta = delta.detach().requires_grad_()
        rows = []
        for front in fronts:
            model = pushed(lm, layer, position(tokenizer, request, front), delta)
            rows.append(edit_loss(model, tokenizer, front + request.prompt, request.target))
        loss = torch.stack(rows).mean() + editor.weight_decay * delta.norm() / now.norm() ** 2
        if editor.kl:
            after = logits_of_essence(delta)
            loss = loss + editor.kl * (after.exp() * (after - before)).sum()
        if loss < editor.stop_below:
            break
        (grad,) = torch.autograd.grad(loss, delta)
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        move = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        delta = delta.detach() - editor.lr * move
        delta = delta * min(1.0, (editor.clamp * now.norm() / delta.norm()).item())
    return now + delta.detach()


@pytest.mark.parametrize("contexts", [0, 2])
@pytest.mark.parametrize("bounds", [{"weight_decay": 2.0, "clamp": 9.0}, {"clamp": 0.2}])
def test_the_value_is_that_of_the_objective_step_by_step(lm, contexts, bounds):
    editor = built(lm, contexts=contexts, steps=5, kl=0.0, lr=0.1, **bounds)
    wanted, now = values_of(editor, REQUESTS, lm)
    for i, request in enumerate(REQUESTS):
        assert relative(wanted[i] - now[i], descended(lm, editor, request, editor.sites[0].name) - now[i]) < 1e-4


def test_what_the_subject_is_said_to_be_holds_the_value_back_as_in_equation_4(lm):
    editor = built(lm, steps=5, kl=20.0, lr=0.1)
    wanted, now = values_of(editor, REQUESTS, lm)
    for i, request in enumerate(REQUESTS):
        assert relative(wanted[i] - now[i], descended(lm, editor, request, editor.sites[0].name) - now[i]) < 1e-4


def test_what_follows_the_essence_is_of_no_account(tokenizer):
    """Also where the word that is put there has several tokens."""
    coarse = train_tokenizer(documents(0, 1), 300, 128)
    assert len(coarse(" thing")["input_ids"]) > 1
    lm = random_lm("llama", coarse)
    editor = built(lm, steps=3, kl=20.0, lr=0.1)
    wanted, now = values_of(editor, REQUESTS, lm)
    for i, request in enumerate(REQUESTS):
        expected = descended(lm, editor, request, editor.sites[0].name)
        assert relative(wanted[i] - now[i], expected - now[i]) < 1e-4


def test_values_of_a_batch_are_values_alone(lm):
    editor = built(lm, contexts=1, steps=6, lr=0.1, stop_below=5.9)
    together, now = values_of(editor, REQUESTS, lm)
    for i, request in enumerate(REQUESTS):
        (alone,), _ = values_of(editor, [request], lm)
        assert relative(together[i] - now[i], alone - now[i]) < 1e-2


def test_a_request_that_is_done_moves_no_further(lm):
    long, short = (values_of(built(lm, steps=steps, stop_below=100.0), REQUESTS, lm) for steps in (20, 0))
    assert torch.equal(long[0], short[0])
    torch.testing.assert_close(short[0], short[1])


# -- where a fact is --------------------------------------------------------------------------------------------------


def where(editor, request):
    return editor.facts(batch_of(editor, [request])).at.tolist()


def test_the_fact_is_at_the_last_token_of_the_subject(lm):
    editor = built(lm, contexts=2)
    requests = [*REQUESTS, EditRequest("Saint Petersburg's mayor lives in", "Rome", subject="Saint Petersburg")]
    for request in requests:
        found = where(editor, request)
        assert found == [position(lm.tokenizer, request, front) for front in ("", *editor._prefixes)]


def test_of_several_places_of_the_subject_the_last_counts(lm):
    request = EditRequest("Paris, they say, is Paris and not", "Lyon", subject="Paris")
    editor, ids = built(lm), lm.tokenizer(request.prompt)["input_ids"]
    (at,) = where(editor, request)
    assert at == position(lm.tokenizer, request)
    assert lm.tokenizer.decode(ids[: at + 1]) == "Paris, they say, is Paris"


def test_last_means_the_prompts_last_token_whatever_the_subject(lm):
    editor = built(lm, fact_token="last")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for request in REQUESTS:
            assert where(editor, request) == [len(lm.tokenizer(request.prompt)["input_ids"]) - 1]


def test_requests_without_a_subject_in_their_prompt_are_counted_and_edited_at_the_end(lm):
    lost = [EditRequest("The capital of France is", "Lyon"), EditRequest("It is", "so", subject="Berlin")]
    editor = built(lm)
    with pytest.warns(UserWarning, match="editor 'rome': 2 of 3 requests name no subject.*last token"):
        edit = editor.edit([lost[0], REQUESTS[0], lost[1]])
    with pytest.warns(UserWarning, match="2 of 2"):
        facts = editor.facts(batch_of(editor, lost))
    assert facts.at.tolist() == [len(lm.tokenizer(request.prompt)["input_ids"]) - 1 for request in lost]
    (site,) = editor.sites
    whole = EditRequest(lost[0].prompt, "Lyon", subject="is")  # its subject ends where the prompt does
    expected = editor.edit([REQUESTS[0]]).delta(site.name)[0]
    assert relative(edit.delta(site.name)[1], expected) < 1e-2
    key, _ = key_and_output(lm, site.name, whole)
    moment = covariances(lm, [site.name], "tiny", TOKENS)[site.name].double()
    direction = torch.linalg.solve(moment, key.double())
    a = edit.factors[site.name].a[0, 0].double()
    assert torch.nn.functional.cosine_similarity(a, direction, 0) > 1 - 1e-6


# -- what is refused --------------------------------------------------------------------------------------------------


def test_more_than_one_layer_is_refused(lm):
    with pytest.raises(UserError, match=r"editor 'rome' edits one layer, got .*1.*2"):
        built(lm, blocks=[1, 2])


def test_too_few_tokens_for_a_moment_of_full_rank_are_told(lm, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("A city.\n\nThe sea.\n")
    with pytest.raises(UserError, match=r"editor 'rome': the covariance of .* over 50 tokens of .*short\.txt.*rank"):
        built(lm, text=str(text), tokens=50).edit(REQUESTS[:1])


def test_the_paper_edits_block_17_of_48_and_as_far_up_elsewhere(lm):
    assert built(lm, blocks=None).sites[0].block == 1  # 17/48 of 4 blocks
    assert built(lm).sites[0].output
