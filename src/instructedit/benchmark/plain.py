"""Plain implementation of MEND to time the engine against: one edit at a time, whole forward passes, dense ΔW.

This is what public code does, without its avoidable costs: no statistics on dense matrices, no copies through files. It
gives the engine's numbers (a test checks that), so that a difference in time is due to the method alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from instructedit.editors.losses import LossWeights
from instructedit.editors.mend import Mend
from instructedit.lm import FrozenLM
from instructedit.lm.sites import Site, add_to_weight
from instructedit.metrics import answer_match, fluency
from instructedit.records import EditRecord


class PlainMend:
    """MEND on a copy of the LM whose edited weights have dense gradients.

    Args:
        lm: The model.
        editor: The hypernetwork, shared with the engine.
    """

    def __init__(self, lm: FrozenLM, editor: Mend) -> None:
        self.lm, self.editor = lm, editor
        self.model = copy.deepcopy(lm.model).requires_grad_(False)
        self.layers = {site.name: self.model.get_submodule(site.name) for site in editor.sites}
        for layer in self.layers.values():
            layer.get_parameter("weight").requires_grad_(True)

    # -- one edit -----------------------------------------------------------------------------------------------------

    @torch.enable_grad()
    def deltas(self, prompt: str, target: str) -> dict[str, Tensor]:
        """Computes the dense ΔW [out, in] of each site for one request."""
        layer_io: dict[str, tuple[Tensor, Tensor]] = {}
        handles = []
        for name, layer in self.layers.items():

            def keep(_: object, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                output.retain_grad()
                layer_io[name] = (args[0].detach()[0], output)

            handles.append(layer.register_forward_hook(keep))
        try:
            loss = F.cross_entropy(*self.answers(prompt, target))
        finally:
            for handle in handles:
                handle.remove()
        loss.backward()
        for layer in self.layers.values():
            layer.get_parameter("weight").grad = None  # the dense gradient, computed and thrown away
        found: dict[str, Tensor] = {}
        for group, network in zip(self.editor.groups, self.editor.networks, strict=True):
            for number, i in enumerate(group):
                name = self.editor.sites[i].name
                u, output = layer_io[name]
                assert output.grad is not None  # retained
                delta = output.grad[0]
                kept = (delta != 0).any(-1)
                site = torch.full((int(kept.sum()),), number, device=u.device)
                new_u, new_delta = network(u[kept].float(), delta[kept].float(), site)
                found[name] = -self.editor.alpha[i] * (new_delta.T @ new_u)
        return {site.name: found[site.name] for site in self.editor.sites}

    def answers(
        self, prompt: str, answer: str, weights: dict[str, Tensor] | None = None, scored: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Returns one row's logits at its answer positions, [tokens, vocab], out of all; and its answer tokens."""
        batch = self.lm.encode([(prompt, answer)], scored=scored)
        with torch.autocast(self.lm.device.type, enabled=False):  # the LM keeps its own dtype, as in the engine
            output = functional_call(self.model, weights or {}, (), {**batch.inputs, "use_cache": False})
        return output.logits[batch.answer_at].float(), batch.answers

    def edited(self, deltas: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the dense weights W + ΔW by parameter name, differentiable in ΔW."""
        transposed = {site.name: site.transposed for site in self.editor.sites}
        weights = {}
        for name, delta in deltas.items():
            weight = self.layers[name].get_parameter("weight").detach()
            weights[f"{name}.weight"] = weight + (delta.T if transposed[name] else delta).to(weight)
        return weights

    # -- training -----------------------------------------------------------------------------------------------------

    def loss(self, record: EditRecord, weights: LossWeights) -> Tensor:
        """Computes the outer loss of one record with all its rephrasings and locality probes."""
        edited = self.edited(self.deltas(record.request.prompt, record.request.target))
        asked = [(p.prompt, p.answers[0]) for p in record.of("reliability", "generalization")]
        edit = torch.stack([F.cross_entropy(*self.answers(*pair, edited)) for pair in asked]).mean()
        kept = [self._divergence(p.prompt, p.answers[0], edited) for p in record.of("locality")]
        return weights.edit * edit + weights.locality * torch.stack(kept).mean()

    def _divergence(self, prompt: str, answer: str, edited: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            before = self.answers(prompt, answer)[0].log_softmax(-1)
        after = self.answers(prompt, answer, edited)[0].log_softmax(-1)
        return F.kl_div(after, before, log_target=True, reduction="none").sum(-1).mean()

    # -- evaluation ---------------------------------------------------------------------------------------------------

    @contextmanager
    def installed(self, deltas: dict[str, Tensor]) -> Iterator[None]:
        """Adds the edit to the copy's weights within the context."""
        before = {name: layer.get_parameter("weight").detach().clone() for name, layer in self.layers.items()}
        sites: dict[str, Site] = {site.name: site for site in self.editor.sites}
        with torch.no_grad():
            try:
                for name, delta in deltas.items():
                    add_to_weight(self.layers[name], sites[name], delta)
                yield
            finally:
                for name, weight in before.items():
                    self.layers[name].get_parameter("weight").copy_(weight)

    @torch.no_grad()
    def scores(self, record: EditRecord, fluency_tokens: int) -> list[dict[str, float]]:
        """Computes all metrics of one record: teacher-forced scores of every probe and alias, generations, fluency."""
        self.editor.eval()
        probes = (record.reliability, *record.probes)
        pairs = [(p, a) for p in probes for a in (p.answers[:1] if p.kind == "locality" else p.answers)]
        before = [self.answers(p.prompt, a, scored=True)[0] for p, a in pairs]
        deltas = {
            name: delta.detach() for name, delta in self.deltas(record.request.prompt, record.request.target).items()
        }
        rows = []
        with self.installed(deltas):
            for (probe, answer), was in zip(pairs, before, strict=True):
                logits, tokens = self.answers(probe.prompt, answer, scored=True)
                predicted = logits.argmax(-1)
                rows.append({
                    "accuracy": (predicted == tokens).float().mean().item(),
                    "exact": float((predicted == tokens).all()),
                    "agreement": (predicted == was.argmax(-1)).float().mean().item(),
                    "log_likelihood": logits.log_softmax(-1).gather(-1, tokens[:, None]).mean().item(),
                    "log_likelihood_before": was.log_softmax(-1).gather(-1, tokens[:, None]).mean().item(),
                })  # fmt: skip
            if record.of("wanted"):
                text = self._words(record.request.prompt, fluency_tokens, do_sample=True, top_k=5)
                rows.append({"fluency": fluency(text)})
            else:
                for probe in record.of("reliability", "generalization", "portability"):
                    longest = max(len(self.lm.tokenizer(" " + a)["input_ids"]) for a in probe.answers)
                    text = self._words(probe.prompt, longest + 4, do_sample=False)
                    rows.append({"generated": float(answer_match(text, probe.answers))})
        if not record.of("wanted"):
            self._words(record.request.prompt, 8, do_sample=False)  # the generation before the edit
        return rows

    def _words(self, prompt: str, tokens: int, **options: object) -> str:
        ids = self.lm.encode([(prompt, "a")]).prompts().inputs["input_ids"]
        with torch.autocast(self.lm.device.type, enabled=False):
            output = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=1,
                pad_token_id=self.lm.tokenizer.eos_token_id, **options,
            )  # fmt: skip
        return str(self.lm.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
