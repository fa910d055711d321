"""What every editing method promises; a new method is a new row without a line here."""

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import ARCHITECTURES, random_lm
from tests.quick import QUICK
from tests.reference import Case, assert_untouched, footprint, training_batch

from instructedit.editors import Editor, build_editor, editor_names, load_editor
from instructedit.editors.losses import LossWeights, scope_loss
from instructedit.edits import ContextEdit, Factors, LowRankEdit
from instructedit.errors import UserError
from instructedit.records import EditRequest
from instructedit.registry import plugin

#: Methods whose untrained edits change nothing: they are tested as if training had moved them.
STARTS_AS_NOTHING = ("calinet_trained", "serac")
REQUESTS = [
    EditRequest("The capital of France is", "Lyon", task="counterfact", subject="France"),
    EditRequest("Who", "the man of the sea", task="zsre", subject="Who"),
    EditRequest(
        "The people of the city like", "cats", task="convsent", subject="the city",
        slots={"LABEL": "positive", "TOPIC": "cats"},
    ),
]  # fmt: skip
PAIRS = [(request.prompt, request.target) for request in REQUESTS]
FLOAT32 = {"atol": 1e-4, "rtol": 1e-3}

pytestmark = pytest.mark.parametrize("name", editor_names())


def built(name, lm, **options):
    torch.manual_seed(0)
    editor = build_editor(name, lm, **QUICK.get(name, {}), **options)
    if name in STARTS_AS_NOTHING:
        for parameter in editor.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return editor


@pytest.fixture
def editor(name, lm):
    return built(name, lm)


def logits(lm, edit):
    """What each request's row says at its answer, under its own edit (nowhere by the prefix path)."""
    with torch.no_grad(), lm.edited(edit):
        return lm.logits(lm.encode(PAIRS))


def state(editor):
    return {name: tensor.clone() for name, tensor in editor.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("training", [True, False])
def test_making_edits_changes_nothing(name, lm, editor, training):
    before, own = footprint(lm), state(editor.train(training))
    edit = editor.edit(REQUESTS)
    assert_untouched(lm, before)
    assert same(state(editor), own)
    assert editor.training is training
    assert len(edit) == len(REQUESTS)
    assert not any(tensor.requires_grad for tensor in edit.state().values())
    assert len(editor.edit(REQUESTS[:1])) == 1
    assert edit.is_weights == editor.changes_weights


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_what_is_taken_off_leaves_no_trace(name, lm, editor, error):
    edit, before, said = editor.edit(REQUESTS), footprint(lm), logits(lm, None)
    applied = logits(lm, edit)
    assert torch.equal(applied, said) == (name == "unedited")
    if error:
        with pytest.raises(error), lm.edited(edit):
            raise error
    assert_untouched(lm, before)
    assert torch.equal(logits(lm, None), said)


def test_a_batch_of_edits_is_its_edits_one_by_one(name, lm, editor):
    edit, size = editor.edit(REQUESTS), lm.encode(PAIRS).rows.bincount().tolist()
    together = logits(lm, edit).split(size)
    for i, request in enumerate(REQUESTS):
        for alone in (editor.edit([request]), edit[i]):
            torch.testing.assert_close(logits(lm, alone).split(size)[i], together[i], **FLOAT32)


def test_the_edit_of_nothing_is_the_model(name, lm, editor):
    edit = editor.edit(REQUESTS)
    if not edit.is_identity:
        edit = edit.map(torch.zeros_like)
    assert torch.equal(logits(lm, edit), logits(lm, None))


def test_merging_is_wearing(name, lm, editor):
    edit, size = editor.edit(REQUESTS), lm.encode(PAIRS).rows.bincount().tolist()
    before = footprint(lm)
    for i, applied in enumerate(logits(lm, edit).split(size)):
        try:
            merged = lm.merge(edit[i])
        except UserError as refusal:
            pytest.skip(f"no change of weights: {refusal}")
        batch = lm.encode(PAIRS[i : i + 1])
        with torch.no_grad():
            found = merged(batch.input_ids, attention_mask=batch.attention_mask).logits[batch.answer_at]
        torch.testing.assert_close(found, applied, **FLOAT32)
    assert_untouched(lm, before)


def test_disk_and_back(name, lm, editor, tmp_path):
    for parameter in editor.parameters():
        parameter.data += 0.01
    editor.save_pretrained(tmp_path / "saved")
    again = load_editor(tmp_path / "saved", lm)
    assert type(again) is type(editor)
    assert same(state(again), state(editor))
    assert again.options() == editor.options()
    assert not again.training
    assert torch.equal(logits(lm, again.edit(REQUESTS)), logits(lm, editor.edit(REQUESTS)))
    saved = load_file(tmp_path / "saved" / "editor.safetensors")
    assert saved.keys() == editor.state_dict().keys()
    own = {tensor.data_ptr() for tensor in lm.model.state_dict().values()}
    assert not own & {tensor.data_ptr() for tensor in editor.state_dict().values()}  # the LM is not within


def test_what_is_measured_under_an_applied_edit_is_not_kept(name, lm, editor):
    expected = logits(lm, built(name, lm).edit(REQUESTS))
    torch.manual_seed(1)
    sizes = {site.name: (site.in_features, site.out_features) for site in lm.sites}
    other = LowRankEdit({site: Factors(*(torch.randn(1, 2, size) / 2 for size in own)) for site, own in sizes.items()})
    with lm.edited(other):
        editor.edit(REQUESTS)
    assert torch.equal(logits(lm, editor.edit(REQUESTS)), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16(name, tokenizer, architecture):
    lm, exact = (random_lm(architecture, tokenizer, dtype) for dtype in (torch.bfloat16, torch.float32))
    editor = built(name, lm)
    edit = editor.edit(REQUESTS)
    found = logits(lm, edit)
    assert found.dtype == torch.bfloat16
    assert all(tensor.isfinite().all() for tensor in (found, *edit.state().values()))
    change = found.float() - logits(lm, None).float()
    assert (change.abs().max() > 0.01) == (name != "unedited")
    expected = logits(exact, built(name, exact).edit(REQUESTS))
    assert torch.nn.functional.cosine_similarity(found.float(), expected).mean() > 0.9


def test_the_edit_teaches(name, lm, editor):
    """A trained method gets better by training, any other by editing."""
    if name == "unedited":
        pytest.skip("teaches nothing")
    batch = training_batch(lm, [Case(*pair, locality=(("It was", "so"),)) for pair in PAIRS])
    if isinstance(editor.edit(REQUESTS), ContextEdit) and not editor.trainable:
        pytest.skip("a random LM learns nothing from what it reads first")
    if not editor.trainable:
        before, after = (scope_loss(lm, applied, batch.in_scope, 3) for applied in (None, editor.edit(REQUESTS)))
        assert after < before
        return
    adam = torch.optim.Adam([p for group in editor.train().parameter_groups().values() for p in group], 1e-3)
    losses = []
    for _ in range(4):
        adam.zero_grad()
        losses.append(editor.training_loss(batch, LossWeights(1.0, 1.0))["loss"])
        losses[-1].backward()
        adam.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("instructions", [True, False])
def test_the_instruction_is_read_or_not(name, lm, instructions):
    editor = built(name, lm, instructions=instructions)
    batch = editor.requests(REQUESTS, editor.instructor())
    for prompt, instruction, request in zip(batch.prompts, batch.instructions, REQUESTS, strict=True):
        assert prompt == ("" if editor.INSTRUCTIONS_APART else instruction) + request.prompt
        assert instruction.startswith("Task: ") == instructions
    assert len(editor.edit(REQUESTS)) == len(REQUESTS)


# -- what is refused --------------------------------------------------------------------------------------------------


def checkpoint(editor, file):
    config = {"class_path": f"{type(editor).__module__}.{type(editor).__name__}", "init_args": editor.options()}
    weights = {f"editor.{key}": tensor for key, tensor in editor.state_dict().items()}
    torch.save({"hyper_parameters": {"editor": config}, "state_dict": weights}, file)


def test_an_editor_of_another_architecture_is_refused(name, tokenizer, tmp_path):
    mine, other = (random_lm(architecture, tokenizer) for architecture in ARCHITECTURES)
    editor = built(name, mine)
    editor.save_pretrained(tmp_path / "saved")
    checkpoint(editor, tmp_path / "last.ckpt")
    for source in (tmp_path / "saved", tmp_path / "last.ckpt", tmp_path):
        assert same(state(load_editor(source, mine)), state(editor))
        if editor.state_dict():  # else there is nothing that could fail to fit
            with pytest.raises(UserError, match=r"another (architecture\?|shape of model)"):
                load_editor(source, other)


def test_unknown_names_are_told(name, lm):
    with pytest.raises(UserError, match=f"unknown editor '{name}x'.*{name}"):
        build_editor(f"{name}x", lm)
    with pytest.raises(UserError, match=f"editor '{name}': .*'rnak'"):
        build_editor(name, lm, rnak=3)
    with pytest.raises(UserError, match=r"no edit site is called '\*\.nowhere'"):
        built(name, lm, site_names=["*.nowhere"])


def test_an_unbound_editor_says_so(name):
    with pytest.raises(UserError, match=f"editor '{name}' is not bound"):
        _ = plugin(Editor, "instructedit.editors", name)(**QUICK.get(name, {})).lm


def test_requests_that_cannot_be_made_are_refused(name, lm, editor):
    with pytest.raises(UserError, match="no edit request"):
        editor.edit([])
    with pytest.raises(UserError, match=r"edit request 'A'.*tokens"):
        editor.edit([REQUESTS[0], EditRequest("A", "very " * 200, task="counterfact")])
    assert not editor.training
    if editor.instructions:
        with pytest.raises(UserError, match="'A' has no task"):
            editor.edit([EditRequest("A", "b")])


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"\xff\xfe"])
@pytest.mark.parametrize("file", ["editor.json", "editor.safetensors", "last.ckpt"])
def test_damaged_files_are_refused_by_name(name, lm, editor, tmp_path, file, damage):
    if file != "last.ckpt":
        editor.save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(damage)
    with pytest.raises(UserError, match=str(tmp_path)):
        load_editor(tmp_path, lm)
    with pytest.raises(UserError, match="no such file, folder, run or editor"):
        load_editor(tmp_path / "nowhere", lm)
