"""A frozen LM in bfloat16 under a float32 editor; autocast; NaN is an error."""

import functools

import pytest
import torch
from tests.conftest import ARCHITECTURES, random_lm
from tests.lm.precisions import CASES, PAIRS, REQUESTS, built, logits, saved, trained
from tests.reference import assert_untouched, footprint, random_factors, training_batch

from instructedit.editors import build_editor, editor_names
from instructedit.editors.losses import locality_loss, scope_loss
from instructedit.editors.mend import GradientNetwork
from instructedit.editors.normalizer import RunningNorm
from instructedit.edits import Factors, LowRankEdit
from instructedit.errors import UserError
from instructedit.lightning_cli import run
from instructedit.lm import FrozenLM
from instructedit.records import EditRequest
from instructedit.registry import plugin

pytestmark = pytest.mark.usefixtures("own_cache")


def trainable():
    from instructedit.editors import Editor

    return [name for name in editor_names() if plugin(Editor, "instructedit.editors", name).trainable]


# -- bfloat16 -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=ARCHITECTURES)
def half(request, tokenizer):
    return random_lm(request.param, tokenizer, torch.bfloat16)


@pytest.fixture
def whole(half, request, tokenizer):
    """The same weights, rounded to bfloat16, in a model that computes in float32."""
    lm = random_lm(half.name.removeprefix("random-"), tokenizer)
    lm.model.load_state_dict(half.model.state_dict())
    return lm


@pytest.mark.parametrize("name", editor_names())
def test_every_editor_edits_a_model_in_bfloat16(name, half):
    editor = built(name, half)
    before = footprint(half)
    edit = editor.edit(REQUESTS)
    assert_untouched(half, before)
    assert all(t.isfinite().all() for t in edit.state().values())
    assert all(t.dtype == torch.float32 for t in edit.state().values() if t.is_floating_point())
    applied = logits(half, edit)
    assert applied.dtype == torch.bfloat16
    assert applied.isfinite().all()
    starts_as_nothing = name in ("unedited", "calinet_trained", "serac")
    assert edit.is_identity or starts_as_nothing or not torch.equal(applied, logits(half, None))


@pytest.mark.parametrize("name", trainable())
def test_every_trained_editor_learns_over_a_model_in_bfloat16(name, half, whole):
    editor, losses = trained(half, name)
    start = built(name, half).state_dict()
    assert all(value.dtype in (torch.float32, torch.float64) for value in editor.state_dict().values())
    assert all(value.isfinite().all() for value in editor.state_dict().values())
    moved = [key for key, _ in editor.named_parameters() if not torch.equal(editor.state_dict()[key], start[key])]
    assert moved
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, trained(whole, name)[1], rtol=0.1, atol=0.02)


def test_losses_are_taken_in_float32(half):
    """A softmax in bfloat16 would be off by a hundredth; states differ in the last bit, by how a CPU multiplies."""
    close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-5)
    batch, names = training_batch(half, CASES), [site.name for site in half.sites[-2:]]
    edit = LowRankEdit({n: Factors(*f) for n, f in random_factors(half.sites[-2:], 2, 2).items()})

    def exact(tokens, applied, request_index, start=None):
        with torch.no_grad():
            return half.logits(tokens, applied, request_index, start).double().log_softmax(-1)

    def row_means(tokens, values):
        return torch.stack([values[tokens.rows == row].mean() for row in range(len(tokens))])

    def of_requests(values, request_index):
        return torch.stack([values[request_index == request].mean() for request in range(len(CASES))]).mean()

    def nll(tokens, log_p):
        return row_means(tokens, -log_p[torch.arange(len(log_p)), tokens.answers])

    tokens, request_index = batch.in_scope.tokens, batch.in_scope.request_index
    plain = nll(tokens, exact(tokens, None, None))
    close(half.losses(tokens).double(), plain)
    started = nll(tokens, exact(tokens, None, None, half.first_block(names)))  # where states are rounded already
    close(half.capture(tokens, names).loss.double(), started)
    applied = nll(tokens, exact(tokens, edit, request_index))
    close(scope_loss(half, edit, batch.in_scope, len(CASES)).double(), of_requests(applied, request_index))
    tokens, request_index = batch.locality.tokens, batch.locality.request_index
    # Rows and trees of bfloat16 are rounded otherwise: both sides take the states that the loss takes.
    p, q = (
        half.head(half.scores.unedited_states(tokens, half.first_block(edit.sites))).double().log_softmax(-1),
        exact(tokens, edit, request_index),
    )
    kl = row_means(tokens, (p.exp() * (p - q)).sum(-1))
    close(locality_loss(half, edit, batch.locality, len(CASES)).double(), of_requests(kl, request_index))


# -- autocast -------------------------------------------------------------------------------------------------------


def test_statistics_do_not_feel_autocast():
    torch.manual_seed(0)
    x = torch.randn(500, 6) * 3 + 100
    exact, under = RunningNorm(6), RunningNorm(6)
    for part in x.split(100):
        exact(part)
        with torch.autocast("cpu", torch.bfloat16):
            assert under(part).dtype == torch.float32
    for key, value in exact.state_dict().items():
        assert torch.equal(under.state_dict()[key], value)
    torch.testing.assert_close(under.mean.double(), x.double().mean(0), rtol=1e-6, atol=0)


def test_the_lm_computes_in_its_own_dtype_under_autocast(lm, half):
    """Else what the prefix cache holds would depend on who asked first."""
    for model in (lm, half):
        batch, name = model.encode(PAIRS), model.sites[-1].name
        edit = LowRankEdit({n: Factors(*f) for n, f in random_factors(model.sites[-2:], 2, 3).items()})
        found = []
        for autocast in (True, False):
            model.cache.clear()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                seen = model.capture(batch, [name])
                found.append((model.prefix(batch, 2), model.logits(batch, edit), seen.u[name], seen.delta[name]))
        assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
        assert {tensor.dtype for tensor in found[0]} == {model.model.dtype}


def test_words_are_of_the_lms_own_dtype_under_autocast(lm, half):
    for model in (lm, half):
        seen = {}
        for autocast in (True, False):
            outputs = seen.setdefault(autocast, [])
            site = model.model.get_submodule(model.sites[-1].name)
            handle = site.register_forward_hook(lambda module, args, output, kept=outputs: kept.append(output.clone()))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model.generate([prompt for prompt, _ in PAIRS], max_new_tokens=5)
                model.sample([prompt for prompt, _ in PAIRS], 5, range(len(PAIRS)))
            handle.remove()
        assert all(torch.equal(one, two) for one, two in zip(seen[True], seen[False], strict=True))
        assert {output.dtype for output in seen[True]} == {model.model.dtype}


def test_a_hypernetwork_multiplies_in_bfloat16_under_autocast_and_adds_in_float32():
    torch.manual_seed(0)
    network = GradientNetwork(24, 16, 2, rank=8, hidden_layers=1).eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    u, delta, site = torch.randn(50, 24), torch.randn(50, 16), torch.arange(50) % 2
    exact = network(u, delta, site)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(u, delta, site)
    for one, two in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        assert not torch.equal(one, two)
        assert ((one - two).norm() / two.norm()) < 0.02
    sum(part.sum() for part in found).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())


@pytest.mark.parametrize("name", trainable())
def test_every_trained_editor_learns_under_autocast(name, lm, half):
    for model in (lm, half):
        editor, losses = trained(model, name, autocast=True)
        assert all(value.dtype in (torch.float32, torch.float64) for value in editor.state_dict().values())
        torch.testing.assert_close(losses, trained(model, name)[1], rtol=0.1, atol=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fit_under_mixed_precision(dtype, tmp_path, tokenizer):
    folder = saved(random_lm("gpt2", tokenizer), tmp_path / "lm")
    common = [
        "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false", "--areas.records_per_task=0", "--results.show=false",
        "--model.evaluation.generate=false", "--model.evaluation.fluency_tokens=0", "--model.editor=Mend",
        "--model.editor.rank=4", "--model.lr=1e-3", "--model.lr_edit_rates=1e-3", f"--model.lm.name={folder}",
        "--data.train=[{name: counterfact, size: 12}]", "--data.test=[{name: counterfact, size: 4}]",
        "--data.batch_size=4", "--data.val_size=4", "--trainer.max_steps=3", "--trainer.gradient_clip_val=1.0",
        f"--trainer.default_root_dir={tmp_path}",
    ]  # fmt: skip
    plain = run(["fit", *common]).model
    model = run(["fit", *common, f"--model.lm.dtype={dtype}", "--trainer.precision=bf16-mixed"]).model
    assert model.trainer.global_step == 3
    assert model.lm.model.dtype == getattr(torch, dtype)
    state = model.editor.state_dict()
    assert all(value.dtype in (torch.float32, torch.float64) for value in state.values())
    for key, value in plain.editor.state_dict().items():
        assert value.isfinite().all()
        if key.endswith("count"):
            # A δ of zero in bfloat16 may drop a token.
            torch.testing.assert_close(state[key], value, rtol=0.05, atol=0)
    untrained = build_editor("mend", plain.lm, rank=4)
    assert not torch.equal(state["log_alpha"], untrained.log_alpha)


# -- NaN is an error, never a score -----------------------------------------------------------------------------------


def broken(lm):
    """An edit with a NaN in one factor."""
    factors = {name: Factors(*pair) for name, pair in random_factors(lm.select(blocks=[-1]), 1, 2).items()}
    next(iter(factors.values())).b[0, 0, 0] = torch.nan
    return LowRankEdit(factors)


def test_scores_of_nothing_but_nan_are_refused(lm):
    batch = lm.encode([("The capital of France is", "Lyon"), ("A", "b")])
    for ask in (lm.losses, lambda batch, edit: lm.scores.token_scores(lm.scores.states(batch, edit), batch.answers)):
        with pytest.raises(UserError, match="not numbers"):
            ask(batch, broken(lm))
    assert lm.losses(batch).isfinite().all()


def test_requests_to_a_model_of_nan_are_refused(lm):
    site = lm.sites[-1].name
    parameters = list(lm.model.parameters())
    parameters[0].data[:] = torch.nan
    with pytest.raises(UserError, match="logits are not numbers"):
        lm.capture(lm.encode([("The capital of France is", "Lyon")]), [site])
    with pytest.raises(UserError, match="hidden states are not numbers"):
        _ = FrozenLM(lm.model, lm.tokenizer).sites


def test_an_edit_that_is_not_finite_is_refused(lm):
    editor = build_editor("mend", lm, rank=4)
    for parameter in editor.parameters():
        parameter.data[:] = torch.inf
    with pytest.raises(UserError, match=r"editor 'mend': the edit is not finite at .*:[ab]"):
        editor.edit([EditRequest("The capital of France is", "Lyon")])
