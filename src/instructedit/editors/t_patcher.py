"""T-Patcher: one neuron for each wrong token, added to the last feed-forward layer (Huang et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from instructedit.data.batch import RequestBatch
from instructedit.editors.base import Editor
from instructedit.editors.calinet import feed_forward_sites
from instructedit.editors.optimisation import Values, optimise
from instructedit.editors.options import AUTO, options
from instructedit.editors.scales import layer_scale
from instructedit.edits import SlotEdit, Slots
from instructedit.errors import UserError
from instructedit.lm.covariance import sample_inputs
from instructedit.lm.own_text import text_for


@options
class TPatcher(Editor):
    """Trains a patch (k, b, v) for each target token to fire at that token's position and to stay silent elsewhere.

    Loss of a request: l_e + a·l_a + m·(l_m1 + l_m2), with q the layer's input where a token is predicted and M the
    layer's inputs over other text: l_a = mean exp(−k·q − b); l_m1 = mean over the largest of exp(k·M + b − β);
    l_m2 = likewise of exp(k·(M − q) − γ).

    Defaults: last block, a = 1, m = 10, β = γ = −3, the 1,000 largest (Huang et al., generation, who train with Adam
    at 0.01). Their memory holds 40,000 queries from the task's own data; here it is from any text. The sizes of keys,
    biases and values differ by a factor of a hundred between models, so each has a rate of its own scale by default.

    Args:
        steps: Largest number of gradient steps on a request.
        lr: Learning rate; ``auto``: shares of the sizes of keys, biases and values; a value's initial size is then a
            share of that of the layer's outputs; otherwise its length is 1.
        a: Weight of the activation loss.
        m: Weight of the memory loss.
        beta: β, the (negative) level below which pre-activations at other positions must stay.
        gamma: γ, the (negative) difference to the token's own position below which they must stay.
        largest: Number of the memory's largest losses that count.
        text: Text of the memory: ``auto``, text that suits the model (the embedded corpus for the embedded models,
            for any other text sampled from it), ``sampled``, ``tiny``, a file, a hub id (see `read_texts`).
        memory: Number of positions in the memory.
        activation: Activation of the patches: ``gelu``, ``relu`` or ``silu``; the original uses the model's own.
        stop_below: A request is finished when its edit loss alone falls below this.
        seed: Seed of the initial value, which all patches share.
        blocks: The block, negative from the top.
    """

    name: ClassVar[str] = "t_patcher"
    changes_weights = False
    REMEDY = "a larger lr, a smaller m, or more steps"
    #: The shares of the sizes that ``auto`` stands for: the rate, and initial values. On 40 validation records of the
    #: embedded CounterFact, tiny and tiny-llama reach all targets at rates of 0.1 to 0.5; Generalization rises with the
    #: rate (from 27 and 32 at 0.1 to 59 and 47 at 0.3), and Locality falls (from 99 to 91). The initial size of values,
    #: 0.03 to 1, matters by 7 points at most. SmolLM2 reaches the first four targets at 0.1 and 0.3, Locality 78, 80.
    AUTO_LR, AUTO_START = 0.3, 0.1

    steps: int = 100
    lr: float | Literal["auto"] = AUTO
    a: float = 1.0
    m: float = 10.0
    beta: float = -3.0
    gamma: float = -3.0
    largest: int = 1000
    text: str = "auto"
    memory: int = 5000
    activation: str = "gelu"
    stop_below: float = 1e-2
    seed: int = 0
    blocks: Sequence[int] | None = (-1,)

    def build(self) -> None:
        modules = feed_forward_sites(self)
        if len(modules) != 1:
            raise UserError(f"editor 't_patcher' patches one feed-forward layer, got {', '.join(modules)}")
        self.module = modules[0]
        self.text = text_for(self.lm, self.text)  # so that a saved editor records which text
        self._memory: Tensor | None = None

    def compute_edit(self, batch: RequestBatch) -> SlotEdit:
        """Trains patches for each request, one for each token of its target."""
        if self._memory is None:
            self._memory = sample_inputs(self.lm, self.module, self.text, self.memory)
        tokens = batch.tokens
        inputs = self.lm.record_activations(tokens, [self.module])[self.module].inputs[tokens.answer_at].float()
        parts = list(inputs.split(tokens.answer_sizes()))
        q = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)  # [n, patches, hidden]
        real = (q != 0).any(-1)
        drawn = torch.randn(q.shape[-1], generator=torch.Generator().manual_seed(self.seed))
        lr, size = self._rates(q.shape[-1])
        start = {
            "keys": q / q.square().sum(-1, keepdim=True).clamp(min=1e-6),  # so that a patch gives act(1) initially
            "biases": q.new_zeros(q.shape[:2]),
            "values": drawn.to(q.device).expand_as(q) * size,
        }

        def edit(values: Values, which: Tensor) -> SlotEdit:
            own = real[which].unsqueeze(-1)
            return SlotEdit(
                {self.module: Slots(values["keys"], values["biases"], values["values"] * own)}, self.activation
            )

        def losses(values: Values, active: Tensor) -> Tensor:
            wrong = self.lm.losses(tokens.select(active), edit(values, active))
            aside = self._scope_losses(values["keys"], values["biases"], q[active], real[active])
            # A request whose target is predicted is finished, whatever its patches' activations elsewhere.
            return torch.where(wrong < self.stop_below, wrong, wrong + aside)

        every = torch.arange(len(batch), device=q.device)
        return edit(optimise(start, losses, self.steps, lr, stop_below=self.stop_below), every)

    def _rates(self, width: int) -> tuple[float | dict[str, float], float]:
        """Returns the learning rates, and the initial size of a value's coordinates."""
        if self.lr != AUTO:
            return self.lr, width**-0.5
        scale = layer_scale(self.lm, self.module)
        key = 1 / (width * scale.inputs)  # a coordinate of q/‖q‖²
        rates = {"keys": key, "biases": 1.0, "values": scale.outputs}
        return {name: self.AUTO_LR * size for name, size in rates.items()}, self.AUTO_START * scale.outputs

    def _scope_losses(self, keys: Tensor, biases: Tensor, q: Tensor, real: Tensor) -> Tensor:
        """Computes a·l_a + m·(l_m1 + l_m2) of each request, averaged over its patches, [n]."""
        assert self._memory is not None  # set by compute_edit
        own = (keys * q).sum(-1) + biases  # [n, patches]
        other = keys @ self._memory.T + biases.unsqueeze(-1)  # [n, patches, memory]
        top = other.topk(min(self.largest, other.shape[-1]), -1).values
        still = (top - self.beta).exp().mean(-1) + (top - own.unsqueeze(-1) - self.gamma).exp().mean(-1)
        loss = self.a * (-own).exp() + self.m * still
        return (loss * real).sum(-1) / real.sum(-1)
