"""The formulas in their plainest form, which the fast code must equal.

One request at a time, whole forward passes of copies of the plain transformers model, dense ΔW added to the weights,
weight gradients by autograd. Nothing here calls the code under test; of an editor it reads the parameters alone.
(`training_batch` hands the same requests to the code under test; `assert_changes_nothing` compares it with itself.)
"""

import copy
import itertools
from typing import NamedTuple

import torch
from torch.func import functional_call

from instructedit.data.batch import Collator
from instructedit.records import EditRecord, EditRequest, Probe


class Case(NamedTuple):
    """One request, and the (prompt, answer) pairs that its outer loss reads beside it."""

    prompt: str
    target: str
    wanted: tuple = ()
    unwanted: tuple = ()
    locality: tuple = ()


def training_batch(lm, cases):
    """The cases as the training batch that the code under test is given, every probe in it."""
    records = []
    for i, case in enumerate(cases):
        scope = "wanted" if case.unwanted else "generalization"
        kinds = {scope: case.wanted, "opposite": case.unwanted, "locality": case.locality}
        probes = tuple(Probe(kind, prompt, (answer,)) for kind, pairs in kinds.items() for prompt, answer in pairs)
        records.append(EditRecord(f"record {i}", EditRequest(case.prompt, case.target), probes))
    return Collator(lm.text, None, 9, 9, 9)(list(enumerate(records)))


def plain_model(lm):
    """A copy of the plain model of its own (some keep states of the last text, with the graph that made them)."""
    kept = [t for module in lm.model.modules() for t in vars(module).values() if isinstance(t, torch.Tensor)]
    return copy.deepcopy(lm.model, {id(tensor): tensor.detach().clone() for tensor in kept})


def tokens(tokenizer, prompt, answer):
    """Ids of the prompt and of the answer with its leading space; byte-level BPE splits between the two."""
    return tokenizer(prompt)["input_ids"], tokenizer(" " + answer)["input_ids"]


def answer_logits(model, tokenizer, prompt, answer, weights=None):
    """Logits that predict each answer token, [tokens, vocab]; `weights` replace the model's own by name."""
    front, back = tokens(tokenizer, prompt, answer)
    ids = torch.tensor([front + back])
    output = functional_call(model, weights or {}, (ids,), {"use_cache": False})
    return output.logits[0].float()[len(front) - 1 : -1]


def edit_loss(model, tokenizer, prompt, answer, weights=None):
    """L_e: mean over the answer's tokens of −log p."""
    answer_ids = tokens(tokenizer, prompt, answer)[1]
    log_p = answer_logits(model, tokenizer, prompt, answer, weights).log_softmax(-1)
    return -torch.stack([log_p[j, token] for j, token in enumerate(answer_ids)]).mean()


def unlikelihood(model, tokenizer, prompt, answer, weights=None):
    """Mean over the answer's tokens of −log(1 − p)."""
    answer_ids = tokens(tokenizer, prompt, answer)[1]
    p = answer_logits(model, tokenizer, prompt, answer, weights).softmax(-1)
    return -torch.stack([(1 - p[j, token]).log() for j, token in enumerate(answer_ids)]).mean()


def divergence(model, tokenizer, prompt, answer, weights=None):
    """Mean over the answer's positions of Σ_v p(v) (log p(v) − log q(v)), p unedited and q edited."""
    p = answer_logits(model, tokenizer, prompt, answer).detach().log_softmax(-1)
    q = answer_logits(model, tokenizer, prompt, answer, weights).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


class Gradients(NamedTuple):
    """u [tokens, in], δ [tokens, out] and the dense ∇W [out, in] of each site, of one request."""

    u: dict
    delta: dict
    weight: dict
    loss: torch.Tensor


@torch.enable_grad()
def gradients(lm, names, prompt, target):
    """A whole forward and backward pass of one request."""
    model = plain_model(lm).requires_grad_(True)
    seen = {}

    def keep(name):
        def hook(layer, args, output):
            output.retain_grad()
            seen[name] = args[0].detach()[0], output

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(keep(name))
    loss = edit_loss(model, lm.tokenizer, prompt, target)
    loss.backward()
    weight = {n: oriented(model.get_submodule(n), model.get_submodule(n).weight.grad) for n in names}
    return Gradients({n: seen[n][0] for n in names}, {n: seen[n][1].grad[0] for n in names}, weight, loss.detach())


def oriented(layer, matrix):
    """[out, in], however the layer stores it (GPT-2's Conv1D: [in, out])."""
    return matrix if isinstance(layer, torch.nn.Linear) else matrix.T


def mend_deltas(lm, editor, cases, training=False, history=()):
    """ΔW = −α Σ_t δ̃_t ũ_tᵀ [out, in] of every request and site, [{site: ΔW}], differentiable in the editor.

    In training the statistics are those of all tokens of all requests in `history` and in `cases`.
    """
    names = [site.name for site in editor.sites]
    seen = [gradients(lm, names, case.prompt, case.target) for case in cases]
    before = [gradients(lm, names, case.prompt, case.target) for case in history]
    shapes = {}
    for name in names:
        shapes.setdefault(seen[0].weight[name].shape, []).append(name)
    deltas = [{} for _ in cases]
    for network, group in zip(editor.networks, shapes.values(), strict=True):
        norms = [_saved(network.norm_u), _saved(network.norm_delta)]
        if training:
            kept = [_kept(g, name) for g in before + seen for name in group]
            norms = [_estimated(torch.cat(part)) for part in zip(*kept, strict=True)]
        for number, name in enumerate(group):
            alpha = editor.alpha[names.index(name)]
            for found, request in zip(deltas, seen, strict=True):
                found[name] = torch.zeros(seen[0].weight[name].shape)
                for u, delta in zip(*_kept(request, name), strict=True):
                    new_u, new_delta = _transformed(network, number, norms[0](u), norms[1](delta))
                    found[name] = found[name] - alpha * torch.outer(new_delta, new_u)
    return deltas


def _kept(request, name):
    keep = [t for t in range(len(request.u[name])) if request.delta[name][t].abs().sum() > 0]
    return request.u[name][keep], request.delta[name][keep]


def _saved(norm):
    if norm.count < 2:
        return lambda x: x - norm.mean
    return lambda x: (x - norm.mean) / ((norm.squares / (norm.count - 1)).sqrt().float() + norm.eps)


def _estimated(rows):
    mean, deviation = rows.double().mean(0).float(), rows.double().std(0).float()
    return lambda x: (x - mean) / (deviation + 1e-7)


def _transformed(network, number, u, delta):
    z = torch.cat([u, delta])
    for layer in range(len(network.up)):
        low = network.down[layer].T @ z
        mapped = network.up[layer].T @ low + network.bias[layer]
        mapped = mapped * network.scale[layer, number] + network.shift[layer, number]
        z = z + torch.where(mapped >= 0, mapped, 0)
    return z[: len(u)], z[len(u) :]


def edited_weights(model, deltas):
    """The dense weights W + ΔW by parameter name, as the model stores them."""
    weights = {}
    for name, delta in deltas.items():
        layer = model.get_submodule(name)
        weights[f"{name}.weight"] = layer.weight + oriented(layer, delta).to(layer.weight.dtype)
    return weights


def outer_losses(lm, deltas, cases):
    """Edit loss and locality loss of a batch of requests, each under its own dense weights."""
    model, tokenizer = plain_model(lm), lm.tokenizer
    edit, locality = [], []
    for case, own in zip(cases, deltas, strict=True):
        weights = edited_weights(model, own)
        likely = [(case.prompt, case.target), *case.wanted]
        loss = torch.stack([edit_loss(model, tokenizer, *pair, weights) for pair in likely]).mean()
        if case.unwanted:
            loss = loss + torch.stack([unlikelihood(model, tokenizer, *p, weights) for p in case.unwanted]).mean()
        edit.append(loss)
        if case.locality:
            rows = [divergence(model, tokenizer, *pair, weights) for pair in case.locality]
            locality.append(torch.stack(rows).mean())
    return torch.stack(edit).mean(), torch.stack(locality).mean() if locality else torch.zeros(())


def dense_copy(lm, deltas):
    """A plain model of its own with dense changes {site: ΔW [out, in]} in its weights."""
    model = plain_model(lm)
    for name, delta in deltas.items():
        layer = model.get_submodule(name)
        layer.weight.data += oriented(layer, delta).to(layer.weight.dtype)
    return model


def relative(found, expected):
    """Size of the difference against the size of what is expected, for float32 sums of many terms."""
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def random_factors(sites, n, rank, scale=0.05, seed=0):
    """Random a [n, rank, in] and b [n, rank, out] for each site."""
    rng = torch.Generator().manual_seed(seed)
    return {
        s.name: (
            torch.randn(n, rank, s.in_features, generator=rng),
            torch.randn(n, rank, s.out_features, generator=rng) * scale,
        )
        for s in sites
    }


def dense(factors, i):
    """ΔW = Σ_t b_t a_tᵀ of edit i, {site: [out, in]}, summed one by one."""
    return {name: sum(torch.outer(v, u) for u, v in zip(a[i], b[i], strict=True)) for name, (a, b) in factors.items()}


def greedy(model, tokenizer, prompt, new, keep=10_000):
    """The most likely next token, one at a time, without a cache or padding."""
    ids = tokenizer(prompt)["input_ids"][-keep:]
    with torch.no_grad():
        for _ in range(new):
            ids = [*ids, int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids[-new:]


def footprint(lm):
    """Everything about a model that an edit could leave behind."""
    model = lm.model
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "tensors": {k: v.clone() for k, v in itertools.chain(model.named_parameters(), model.named_buffers())},
        "hooks": [len(getattr(module, name)) for module in model.modules() for name in hooks],
        "forward": ["forward" in vars(module) for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "gradients": [(p.requires_grad, p.grad is None) for p in model.parameters()],
        "random": torch.get_rng_state(),
    }


def assert_untouched(lm, before):
    """That the model's footprint is what it was, bit by bit."""
    for what, now in footprint(lm).items():
        if what == "tensors":
            assert now.keys() == before[what].keys()
            assert all(torch.equal(now[name], before[what][name]) for name in now)
        else:
            assert torch.equal(now, before[what]) if what == "random" else now == before[what], what


def assert_changes_nothing(lm, batch, edit):
    """That edits leave what the model says as it is: bit by bit where both read the rows of the batch.

    Left to choose, the model reads each edit's rows in trees of their own, and rows without edits in common ones. These
    are products of other shapes, which are rounded otherwise.
    """
    said = []
    for applied in (edit, None):
        with torch.no_grad(), lm.edited(applied):
            said.append(lm.logits(batch))
    assert torch.equal(*said)
    torch.testing.assert_close(lm.logits(batch, edit), lm.logits(batch), atol=1e-5, rtol=1e-5)
