"""FT-L: fine-tuning of one layer under a norm bound (Zhu et al. 2020; a baseline of ROME and Yao et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from instructedit.data.batch import RequestBatch
from instructedit.editors.base import Editor
from instructedit.editors.optimisation import Values, optimise, row_losses
from instructedit.editors.options import AUTO, options
from instructedit.editors.scales import weight_size
from instructedit.edits import DenseEdit, Edit
from instructedit.lm import TokenBatch
from instructedit.metrics import row_mean


@options
class FtL(Editor):
    """Fine-tunes the MLP's output projection of one block on each request: ‖ΔW‖_∞ ≤ ε (Zhu et al. 2020).

    Defaults: block 0, 25 steps of Adam, until the loss is below 1e-2, as in ROME's baseline, which has lr = ε = 5e-4
    for GPT2-XL. Weights differ by a factor of ten between models, so both are shares of the weights' size by default.
    InstructEdit's paper uses AdaFactor (appendix A). ROME's baseline scores every target token at the prompt's last
    position, which no target of several tokens can satisfy; by default each token is scored at its own position here.

    Args:
        steps: Largest number of gradient steps.
        lr: Learning rate; ``auto``: a share of the size of the layer's weights (their root mean square).
        bound: ε, the largest change of any weight; ``auto``: a share of the weights' size; None: no bound.
        loss: ``target``: each target token at its own position; ``last_prompt``: all of them at the prompt's last
            position, as in common code.
        optimizer: ``adam`` or ``adafactor``.
        stop_below: A request is finished when its loss falls below this.
        blocks: The block, negative from the top; None means the first, as in the paper.
    """

    name: ClassVar[str] = "ft_l"
    PAPER_BLOCKS = ((0,), 48)
    OUTPUT_SITES = True
    REMEDY = "a larger lr or bound, or more steps"
    #: The share of the weights' size that ``auto`` stands for, chosen on validation records of the embedded models.
    AUTO_LR, AUTO_BOUND = 0.03, 0.1

    steps: int = 25
    lr: float | Literal["auto"] = AUTO
    bound: float | Literal["auto"] | None = AUTO
    loss: Literal["target", "last_prompt"] = "target"
    optimizer: Literal["adam", "adafactor"] = "adam"
    stop_below: float = 1e-2
    blocks: Sequence[int] | None = None

    def compute_edit(self, batch: RequestBatch) -> DenseEdit:
        """Tunes one dense ΔW for each request and site."""
        return self._tuned(row_losses(self._loss(), batch.tokens, DenseEdit.of, together=False), len(batch))

    def compute_joint_edit(self, batch: RequestBatch) -> DenseEdit:
        """Tunes one ΔW on the mean loss of all requests."""
        return self._tuned(row_losses(self._loss(), batch.tokens, DenseEdit.of, together=True), 1)

    def _loss(self) -> Callable[[TokenBatch, Edit], Tensor]:
        """Returns the function that computes the loss of each row under its edit, [rows]."""
        of_rows = self._at_last_prompt_token if self.loss == "last_prompt" else self.lm.losses
        return of_rows

    def _tuned(self, losses: Callable[[Values, Tensor], Tensor], count: int, rounds: int = 1) -> DenseEdit:
        """Optimises `count` matrices for each site, in `rounds` times the configured steps (see `optimise`)."""
        start = {s.name: torch.zeros(count, s.out_features, s.in_features, device=self.lm.device) for s in self.sites}
        sizes = {site.name: weight_size(self.lm, site) for site in self.sites}
        lr = {name: self.AUTO_LR * size for name, size in sizes.items()} if self.lr == AUTO else self.lr
        found = optimise(
            start, losses, self.steps * rounds, lr, self.optimizer,
            stop_below=self.stop_below, project=partial(self._project, sizes),
        )  # fmt: skip
        return DenseEdit.of(found)

    def _project(self, sizes: Mapping[str, float], values: Values, request: int) -> None:
        """Clamps the changes of a request to the bound, given the size of each site's weights."""
        if self.bound is None:
            return
        for name, change in values.items():
            bound = self.AUTO_BOUND * sizes[name] if self.bound == AUTO else self.bound
            change.clamp_(-bound, bound)

    def _at_last_prompt_token(self, tokens: TokenBatch, edit: Edit) -> Tensor:
        """Computes −1/|y| Σ_j log p(y_j | x) for each row, every token scored at the prompt's last position, [rows]."""
        log_p = self.lm.logits(tokens.after_prompts(), edit).float().log_softmax(-1)  # [rows, vocab]
        return row_mean(-log_p[tokens.rows, tokens.answers], tokens.rows, len(tokens))
