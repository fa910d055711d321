"""What an edit promises, on every causal LM that the installed transformers can build."""

import copy
import functools
import os
import re
import warnings

import pytest
import torch
from tests.lm.architectures.survey import PAGE, found
from tests.lm.architectures.tiny import CLASSES, NAMES, NOT_TRIED, tiny_lm, tiny_model, tokenizer
from tests.quick import QUICK
from tests.reference import assert_untouched, footprint, greedy, oriented, plain_model, random_factors
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from instructedit.editors import build_editor, editor_names
from instructedit.edits import Factors, LowRankEdit, load_edit
from instructedit.errors import UserError
from instructedit.lm import FrozenLM
from instructedit.lm.architectures import STATUS, architectures, markdown
from instructedit.lm.prefix_trees import PrefixTrees
from instructedit.records import EditRequest

KNOWN = architectures()
EDITABLE = [name for name in NAMES if KNOWN[name].sites]
PROMPTS = ["The capital of France is", "Who wrote", "The people of the city like a"]
PAIRS = [(PROMPTS[0], "Lyon"), (PROMPTS[1], "the man of the sea"), (PROMPTS[2], "cats")]
NEW = 4
CLOSE = {"atol": 1e-4, "rtol": 1e-3}

#: One architecture of those whose layers have the same names; the others take their time in `make test-all`.
TWINS = {KNOWN[name].sites: name for name in reversed(EDITABLE)}
each = pytest.mark.parametrize(
    "name", [name if name in TWINS.values() else pytest.param(name, marks=pytest.mark.slow) for name in EDITABLE]
)


@functools.cache
def sites(name):
    """Those of the two highest blocks that have any, as an editor would choose them."""
    lm = tiny_lm(name)
    top = sorted({site.block for site in lm.sites})[-2:]
    return lm.select(blocks=top)


@functools.cache
def factors(name):
    return random_factors(sites(name), len(PAIRS), 2)


def edit_of(name):
    return LowRankEdit({site: Factors(*pair) for site, pair in factors(name).items()})


@functools.cache
def merged(name, number):
    """A copy of the plain model with the dense edit in its weights, made without the code under test."""
    model = plain_model(tiny_lm(name))
    for site, (a, b) in factors(name).items():
        layer = model.get_submodule(site)
        layer.weight.data += oriented(layer, b[number].T @ a[number])
    return model


def answer_logits(model, batch, row):
    """At the answer positions of one row, alone and without padding."""
    size = batch.lengths[row]
    logits = model(input_ids=batch.input_ids[row : row + 1, :size], use_cache=False).logits[0]
    return logits[batch.labels[row, :size] != -100]


def plain_logits(model, batch, row):
    with torch.no_grad():
        return answer_logits(model, batch, row)


def test_everything_is_known():
    assert KNOWN.keys() == CLASSES.keys()
    assert {name for name, row in KNOWN.items() if row.not_tried} == NOT_TRIED.keys()
    assert {row.status for row in KNOWN.values()} == set(STATUS)


@pytest.mark.parametrize("name", NAMES)
def test_the_sites_are_those_of_the_table(name):
    row = {"model": KNOWN[name].model} | {
        key: list(value) if isinstance(value, tuple) else value
        for key in ("blocks", "sites", "experts", "refused")
        if (value := getattr(KNOWN[name], key))
    }
    assert found(name, tiny_lm(name)) == row


#: Its plan is for its variant with experts.
PLANS = [name for name in EDITABLE if name != "doge"]


def test_the_table_agrees_with_the_plans_of_tensor_parallelism():
    """An independent source: which layers of a block transformers splits up, by hand, for each architecture."""
    compared = 0
    for name in PLANS:
        plan = getattr(CONFIG_MAPPING[name], "base_model_tp_plan", None) or {}
        within = {path.partition(".*.")[2] for path in plan}
        planned = {path for path in within if re.fullmatch(r"(mlp|feed_forward|ffn)\.(?!.*expert)\w+", path)}
        if planned:
            compared += 1
            assert planned == set(KNOWN[name].sites), name
    assert compared > 50


def test_the_page_shows_the_table():
    assert PAGE.read_text() == markdown()


@pytest.mark.parametrize("name", [name for name in NAMES if KNOWN[name].status == "refused"])
def test_a_refusal_is_one_line_that_names_the_model(name):
    with pytest.raises(UserError) as refusal:
        tiny_lm(name).select(blocks=[-1])
    assert "\n" not in str(refusal.value)
    assert CLASSES[name] in str(refusal.value) or "routed experts" in str(refusal.value)


@each
def test_sites_have_the_shape_of_their_weights(name):
    lm = tiny_lm(name)
    for site in lm.sites:
        weight = lm.model.get_submodule(site.name).weight
        assert tuple(weight.shape) == (site.shape if site.transposed else site.shape[::-1])
        assert lm.first_block([site.name]) == site.block
    for block in {site.block for site in lm.sites}:
        own = [site for site in lm.sites if site.block == block]
        assert [site.output for site in own] == [False] * (len(own) - 1) + [True]
        assert own[-1].out_features == lm.applied.sites.width
        assert all(site.name.startswith(f"{site.mlp}.") for site in own)


@each
def test_applied_is_merged_and_a_batch_is_its_edits_alone(name):
    lm, edit = tiny_lm(name), edit_of(name)
    batch, before = lm.encode(PAIRS), footprint(lm)
    start = lm.first_block(edit.sites)
    together = lm.logits(batch, edit, start=start).split(batch.answer_sizes())
    for i in range(len(PAIRS)):
        torch.testing.assert_close(together[i], plain_logits(merged(name, i), batch, i), **CLOSE)
        alone = lm.logits(batch.select(torch.tensor([i])), edit[i], start=start)
        torch.testing.assert_close(together[i], alone, **CLOSE)
    lm.merge(edit[0])
    assert_untouched(lm, before)


@each
def test_the_words_are_those_of_the_merged_model(name):
    lm, edit = tiny_lm(name), edit_of(name)
    before = footprint(lm)
    said = lm.generate(PROMPTS, max_new_tokens=NEW)
    with lm.edited(edit):
        applied = lm.generate(PROMPTS, max_new_tokens=NEW)
    assert_untouched(lm, before)
    for i, prompt in enumerate(PROMPTS):
        for model, text in ((lm.model, said[i]), (merged(name, i), applied[i])):
            ids = greedy(model, lm.tokenizer, prompt, NEW)
            ends = [j for j, token in enumerate(ids) if token == lm.tokenizer.eos_token_id]
            assert text == lm.tokenizer.decode(ids[: ends[0] if ends else NEW], skip_special_tokens=True)


@each
def test_capture_is_the_weight_gradient(name):
    lm, names = tiny_lm(name), [site.name for site in sites(name)]
    batch = lm.encode(PAIRS)
    seen = lm.capture(batch, names)
    model = plain_model(lm).requires_grad_(True)
    logits = [answer_logits(model, batch, row) for row in range(len(PAIRS))]
    answers = batch.answers.split(batch.answer_sizes())
    losses = [nn.functional.cross_entropy(own, answer) for own, answer in zip(logits, answers, strict=True)]
    torch.testing.assert_close(seen.loss, torch.stack(losses).detach(), **CLOSE)
    torch.stack(losses).sum().backward()
    for site in names:
        layer = model.get_submodule(site)
        total = torch.einsum("rto,rti->oi", seen.delta[site], seen.u[site])
        torch.testing.assert_close(total, oriented(layer, layer.weight.grad), **CLOSE)


@each
def test_the_prefix_cache_changes_nothing(name):
    lm, edit = tiny_lm(name), edit_of(name)
    batch = lm.encode([(f"{front}{prompt}", answer) for front in ("", "Say it. ") for prompt, answer in PAIRS])
    rows = torch.arange(len(batch)) % len(PAIRS)
    lm.cache.clear()
    for start in range(1, lm.first_block(edit.sites) + 1):
        for _ in range(2):  # computed, then remembered
            found = lm.logits(batch, edit, rows, start)
            torch.testing.assert_close(found, lm.logits(batch, edit, rows), **CLOSE)


@each
def test_prompts_of_one_beginning_see_what_they_see_alone(name):
    lm, top = tiny_lm(name), len(tiny_lm(name).blocks) - 1
    batch = lm.encode([(f"{' it was so' * 8} {prompt}", answer) for prompt, answer in PAIRS])
    kept = batch.attention_mask.bool()
    assert len(PrefixTrees.of(batch.unpadded()).ids) == 1
    lm.cache.clear()
    torch.testing.assert_close(lm.prefixes.of(batch, top)[kept], lm.forward.up_to_block(batch, top)[kept], **CLOSE)


@each
def test_rows_and_batch_must_match(name):
    lm, edit = tiny_lm(name), edit_of(name)
    ids = lm.encode([(prompt, "x") for prompt in [*PROMPTS, PROMPTS[0]]]).input_ids
    with pytest.raises(UserError, match="3 edits and a batch of 4 rows"), lm.edited(edit):
        lm.model(input_ids=ids, use_cache=False)


#: Where PEFT takes the names of a dense block's layers for those of experts.
WITHOUT_ADAPTER = {
    "afmoe", "beam", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe",
    "glm4_moe_lite", "glm_moe_dsa",
}  # fmt: skip


@each
def test_a_saved_adapter_is_the_edit(name, tmp_path):
    peft = pytest.importorskip("peft")
    lm, edit, before = tiny_lm(name), edit_of(name)[1], footprint(tiny_lm(name))
    batch = lm.encode(PAIRS[1:2])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        lm.save(edit, tmp_path)
    assert_untouched(lm, before)
    if name in WITHOUT_ADAPTER:
        assert any("without a LoRA adapter" in str(warning.message) for warning in told)
        assert not (tmp_path / "adapter_config.json").exists()
    else:
        adapted = peft.PeftModel.from_pretrained(plain_model(lm), str(tmp_path))
        torch.testing.assert_close(plain_logits(adapted, batch, 0), plain_logits(merged(name, 1), batch, 0), **CLOSE)
    torch.testing.assert_close(lm.logits(batch, load_edit(tmp_path)), plain_logits(merged(name, 1), batch, 0), **CLOSE)


REQUESTS = [EditRequest(prompt, target, task="counterfact", subject=prompt.split()[-2]) for prompt, target in PAIRS[:1]]


#: Every editor costs a second or two.
EVERY = EDITABLE if os.environ.get("EVERY_ARCHITECTURE") else sorted(TWINS.values())


@pytest.mark.parametrize("name", EVERY)
def test_every_editor_makes_an_edit_or_refuses_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setenv("INSTRUCTEDIT_CACHE", str(tmp_path))
    lm = tiny_lm(name)
    top = max(site.block for site in sites(name))
    refused, before = {}, footprint(lm)
    for method in editor_names():
        try:
            edit = build_editor(method, lm, blocks=[top], **QUICK.get(method, {})).edit(REQUESTS)
            assert lm.logits(lm.encode(PAIRS[:1]), edit).isfinite().all()
        except UserError as refusal:
            refused[method] = str(refusal)
    assert not any("\n" in line for line in refused.values())
    bare = {site.mlp for site in sites(name)} & {lm.forward.block_name(i) for i in range(len(lm.forward.blocks))}
    assert refused.keys() == ({"calinet", "calinet_trained", "t_patcher"} if bare else set()), refused
    state = footprint(lm)
    assert_untouched(lm, before | {"random": state["random"]})


@pytest.mark.parametrize("name", ["gemma3", "llama"])
def test_a_row_is_no_longer_than_the_language_tower_allows(name):
    unlimited = copy.deepcopy(tokenizer())
    unlimited.model_max_length = 10**30
    model = tiny_model(name)
    assert FrozenLM(model, unlimited).max_length == model.config.get_text_config().max_position_embeddings
