"""SERAC's objective probe by probe, what its parts do before and after training, and its memory."""

import pytest
import torch
from tests.conftest import random_lm
from tests.lm.contexts import query_of, row_logits, with_bos
from tests.reference import Case, edit_loss, edited_weights, plain_model, relative, training_batch, unlikelihood
from transformers import AutoModelForCausalLM, OPTConfig

from instructedit.editors import build_editor
from instructedit.editors.losses import LossWeights
from instructedit.errors import UserError
from instructedit.lm import FrozenLM
from instructedit.records import EditRequest

CASES = [
    Case("The capital of France is", "Lyon", (("France's capital is", "Lyon"),), (), (("Who", "he and she"),)),
    Case("Who", "a man of the sea", (("Say who", "yes"),), (("Say who", "no one"), ("A", "city")), ()),
    Case("A longer prompt about a city on a river", "Spree", (), (), (("The", "end"), ("One city", "or two"))),
]
SMALL = {"embedding": 7, "rank": 3}
WEIGHTS = LossWeights(0.7, 1.3, 0.4)


def told(case):
    return f"New fact: {case.prompt} {case.target}\n"


def built(lm, **options):
    """Random everywhere, so that every part of the formula matters."""
    torch.manual_seed(0)
    editor = build_editor("serac", lm, **{**SMALL, **options})
    for parameter in editor.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    editor.log_scale.data.fill_(-1.0)
    return editor


def requests_of(cases):
    return [EditRequest(case.prompt, case.target) for case in cases]


def scope_of(lm, editor, cases):
    """Balanced cross-entropy and accuracy, each probe against each request, one by one."""
    block = len(lm.forward.blocks) // 2
    keys = [editor.projection @ query_of(lm, case.prompt, block) for case in cases]
    losses, right = {True: [], False: []}, {True: [], False: []}
    for request_index, case in enumerate(cases):
        inside = [case.prompt, *(prompt for prompt, _ in (*case.wanted, *case.unwanted))]
        probes = [(prompt, True) for prompt in inside] + [(prompt, False) for prompt, _ in case.locality]
        for prompt, in_scope in probes:
            point = editor.projection @ query_of(lm, prompt, block)
            for number, key in enumerate(keys):
                if number != request_index and prompt == cases[number].prompt:
                    continue  # another request of the same wording: neither in its scope nor out of it
                p = (editor.bias - editor.log_scale.exp() * (point - key).square().sum()).sigmoid()
                wanted = in_scope and number == request_index
                losses[wanted].append(-(p if wanted else 1 - p).log())
                right[wanted].append(float((p > 0.5) == wanted))
    halves = [torch.stack(part).mean() / 2 for part in losses.values() if part]
    return sum(halves), sum(sum(part) / len(part) / 2 for part in right.values() if part)


def counterfactual_of(lm, editor, cases):
    """The edit loss of a dense model behind each edit's words, one probe at a time."""
    model, tokenizer = plain_model(lm), lm.tokenizer
    weights = edited_weights(
        model, {s.name: b.T @ a for s, a, b in zip(editor.sites, editor.inputs, editor.outputs, strict=True)}
    )
    losses = []
    for case in cases:
        likely = [edit_loss(model, tokenizer, told(case) + p, a, weights) for p, a in (case[:2], *case.wanted)]
        losses.append(torch.stack(likely).mean())
        if case.unwanted:
            unlikely = [unlikelihood(model, tokenizer, told(case) + p, a, weights) for p, a in case.unwanted]
            losses[-1] = losses[-1] + WEIGHTS.unlikelihood * torch.stack(unlikely).mean()
    return torch.stack(losses).mean()


NO_LOCALITY = [CASES[1], CASES[2]._replace(locality=())]


@pytest.mark.parametrize("cases", [CASES, NO_LOCALITY, CASES[:1]], ids=["ragged", "no locality", "one"])
def test_the_objective_is_the_two_losses_probe_by_probe(lm, cases):
    editor = built(lm)
    parts = editor.training_loss(training_batch(lm, cases), WEIGHTS)
    scope, right = scope_of(lm, editor, cases)
    edit = counterfactual_of(lm, editor, cases)
    loss = WEIGHTS.edit * edit + WEIGHTS.locality * scope
    expected = {"loss": loss, "edit_loss": edit, "scope_loss": scope, "scope_accuracy": torch.tensor(right)}
    assert parts.keys() == expected.keys()
    for name, value in parts.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)
    parameters = dict(editor.named_parameters())
    ours, theirs = (torch.autograd.grad(total, parameters.values()) for total in (parts["loss"], loss))
    for name, own, reference in zip(parameters, ours, theirs, strict=True):
        assert reference.norm() > 1e-7, name
        assert relative(own, reference) < 2e-3, name


def test_both_sorts_of_pairs_count_half_however_many_there_are(lm):
    editor, losses = built(lm), []
    for times in (1, 5):  # the same probe out of scope once, and again and again
        case = CASES[0]._replace(locality=CASES[0].locality * times)
        losses.append(editor.training_loss(training_batch(lm, [case]), WEIGHTS)["scope_loss"])
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-5)


ALIKE = [
    CASES[0],
    Case("The capital of France is", "Oslo", (("In France the capital is", "Oslo"),), (), (("It", "was so"),)),
]
#: With 64 the two products, of all probes and of the requests alone, round differently.


@pytest.mark.parametrize("embedding", [7, 64])
def test_requests_of_one_wording_are_not_told_apart(lm, embedding):
    editor = built(lm, embedding=embedding)
    parts = editor.training_loss(training_batch(lm, ALIKE), WEIGHTS)
    scope, right = scope_of(lm, editor, ALIKE)
    torch.testing.assert_close(parts["scope_loss"], scope, atol=1e-5, rtol=1e-4)
    assert parts["scope_accuracy"].item() == pytest.approx(right, rel=1e-4)


def test_training_separates_what_is_in_scope_from_what_is_not(lm):
    cases = [
        Case("The capital of France is", "Lyon", (("France has the capital", "Lyon"),), (), (("It was", "so"),)),
        Case("Who wrote the book?", "Anna", (("The book is by", "Anna"),), (), (("A man of", "the sea"),)),
        Case("My cat likes", "old cheese", (("What my cat likes is", "old cheese"),), (), (("One city", "or two"),)),
    ]
    torch.manual_seed(0)
    editor, batch = build_editor("serac", lm, embedding=16, rank=4).train(), training_batch(lm, cases)
    adam, seen = torch.optim.Adam(editor.parameters(), 1e-2), []
    for _ in range(25):
        adam.zero_grad()
        parts = editor.training_loss(batch, LossWeights(1.0, 1.0))
        parts["loss"].backward()
        adam.step()
        seen.append({name: value.item() for name, value in parts.items()})
    assert seen[0]["scope_accuracy"] < 0.9
    assert seen[-1]["scope_accuracy"] == pytest.approx(1.0)
    assert seen[-1]["scope_loss"] < 0.2 * seen[0]["scope_loss"]
    assert seen[-1]["edit_loss"] < 0.8 * seen[0]["edit_loss"]
    edit = editor.eval().edit(requests_of(cases)).joined()
    asked = [(*case.wanted, *case.locality) for case in cases]
    tokens = lm.encode([pair for pairs in asked for pair in pairs])
    chosen = edit.choose(
        torch.zeros(len(tokens), dtype=torch.long), lambda block: lm.context.scope_embedding(tokens, block)
    )
    assert chosen.tolist() == [0, -1, 1, -1, 2, -1]
    said, bare = (lm.losses(tokens, applied) for applied in (edit, None))
    assert (said[::2] < bare[::2] - 0.5).all()
    torch.testing.assert_close(said[1::2], bare[1::2])


@pytest.mark.parametrize("zeroed", ["start", "outputs"])
def test_without_its_adapter_the_counterfactual_model_is_the_lm_behind_the_edits_words(lm, zeroed):
    torch.manual_seed(0)
    editor = build_editor("serac", lm, **SMALL) if zeroed == "start" else built(lm)
    if zeroed == "outputs":
        for outputs in editor.outputs:
            outputs.data.zero_()
    asked = [("France's capital is", "Lyon"), ("Say who", "a man"), ("It was", "so")]
    expected = torch.cat([row_logits(lm, pair, told(case)) for pair, case in zip(asked, CASES, strict=True)])
    found = lm.logits(lm.encode(asked), editor.edit(requests_of(CASES)).ungated())
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-4)
    moved = lm.logits(lm.encode(asked), built(lm).edit(requests_of(CASES)).ungated())
    assert (moved - expected).abs().max() > 0.05


def test_an_edit_reads_its_words_and_its_key_is_its_prompt(lm):
    editor = built(lm)
    edit = editor.edit(requests_of(CASES))
    assert len(edit) == 3
    for i, case in enumerate(CASES):
        assert lm.tokenizer.decode(edit.ids[i, 0, : edit.lengths[i, 0]]) == told(case)
        key = editor.projection @ query_of(lm, case.prompt, 2)
        torch.testing.assert_close(edit.gate.keys[i, 0], key, atol=1e-4, rtol=1e-3)
    assert edit.gate.scale.item() == pytest.approx(editor.log_scale.exp().item())
    assert int(edit.gate.block) == 2
    assert int(build_editor("serac", lm, scope_block=0.25).edit(requests_of(CASES)).gate.block) == 1


def test_the_memory_finds_the_edit_that_is_nearest(lm):
    """Each request's own prompt is nearest to itself; a prompt far from all goes to the LM."""
    editor = built(lm)
    keys = torch.stack([editor.projection @ query_of(lm, case.prompt, 2) for case in CASES]).detach()
    others = ["Somewhere in Norway a king", "Once upon a time"]
    points = torch.stack([editor.projection @ query_of(lm, prompt, 2) for prompt in others]).detach()
    gaps = (points[:, None] - keys).norm(dim=-1)
    radius = gaps.min(-1).values
    assert abs(radius[0] - radius[1]) > 1e-2 * radius.max()
    near, far = int(radius.argmin()), int(radius.argmax())
    scale, between = editor.log_scale.exp(), radius.mean()
    editor.bias.data = (scale * between.square()).detach()  # in scope within the mean of the two
    memory = editor.edit(requests_of(CASES)).joined()
    assert len(memory) == 1
    prompts = [*(case.prompt for case in CASES), others[near], others[far]]
    batch = lm.encode([(prompt, "a city") for prompt in prompts])
    chosen = memory.choose(
        torch.zeros(5, dtype=torch.long), lambda block: lm.context.scope_embedding(batch, block)
    ).tolist()
    assert chosen == [0, 1, 2, int(gaps[near].argmin()), -1]
    found = lm.logits(batch, memory).split(batch.rows.bincount().tolist())
    for i, (own, number) in enumerate(zip(found, chosen, strict=True)):
        pair = lm.encode([(prompts[i], "a city")])
        alone = editor.edit(requests_of(CASES))[number].ungated() if number >= 0 else None
        torch.testing.assert_close(own, lm.logits(pair, alone), atol=3e-5, rtol=1e-4)
    with lm.edited(memory):
        words = lm.generate(prompts, max_new_tokens=4)
    with lm.edited(editor.edit(requests_of(CASES)).ungated(), rows=chosen[:4]):
        assert lm.generate(prompts[:4], max_new_tokens=4) == words[:4]
    assert lm.generate(prompts[4], max_new_tokens=4) == words[4]


def test_the_words_of_an_edit_hold_no_special_tokens(tokenizer):
    """LLaMA's <s> stands once, at the start of the row."""
    used = with_bos(tokenizer, "[BOS] $A")
    model = random_lm("llama", tokenizer).model
    model.resize_token_embeddings(len(used), mean_resizing=False)
    lm = FrozenLM(model, used)
    edit = build_editor("serac", lm, **SMALL).edit(requests_of(CASES[:1]))
    assert used.bos_token_id not in edit.ids[0, 0, : edit.lengths[0, 0]].tolist()


def test_the_embedding_may_be_narrower_than_the_hidden_states(tokenizer):
    config = OPTConfig(
        hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=600
    )
    lm = FrozenLM(AutoModelForCausalLM.from_config(config), tokenizer, "narrow", max_length=64)
    editor = build_editor("serac", lm, rank=2, embedding=4)
    edit = editor.edit([EditRequest("The capital of France is", "Lyon")])
    assert lm.applied.sites.width == 32
    assert edit.gate.projection.shape == (4, 2 * 32)
    assert lm.losses(lm.encode([("The capital of France is", "Lyon")]), edit).isfinite().all()


@pytest.mark.parametrize("options", [{"scope_block": 1.0}, {"scope_block": -0.5}, {"embedding": 0}])
def test_options_out_of_range_are_refused(lm, options):
    with pytest.raises(UserError, match=f"editor 'serac': {next(iter(options))} must be "):
        built(lm, **options)
