"""FT-L: fine-tuning one layer under a bound (Zhu et al. 2020; as the baseline of ROME and of Yao et al. 2023)."""

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

    Block 0, 25 steps of Adam, until the loss is below 1e-2, as in ROME's baseline, which has lr = ε = 5e-4 for
    GPT2-XL. Weights differ by a factor of ten between models, so both are shares of the weights' own size by default.
    InstructEdit's paper uses AdaFactor (appendix A). That baseline scores every target token at the prompt's last
    position, which no target of several tokens can satisfy; the default here is each token at its own.

    Args:
        steps: Gradient steps, at most.
        lr: Learning rate; ``auto``: a share of the layer's weights (their root mean square).
        bound: ε, the largest change of any weight; ``auto``: a share of them; None leaves it free.
        loss: ``target``: each target token at its own position; ``last_prompt``: all of them at the prompt's last
            position, as in common code.
        optimizer: ``adam`` or ``adafactor``.
        stop_below: A request is done when its loss is below this.
        blocks: The block, negative from the top; None means as far up as in the paper, the first.
    """

    name: ClassVar[str] = "ft_l"
    PAPER_BLOCKS = ((0,), 48)
    OUTPUT_SITES = True
    REMEDY = "a larger lr or bound, or more steps"
    #: What ``auto`` is as a share of the weights' size, chosen on validation records of the embedded models.
    AUTO_LR, AUTO_BOUND = 0.03, 0.1

    steps: int = 25
    lr: float | Literal["auto"] = AUTO
    bound: float | Literal["auto"] | None = AUTO
    loss: Literal["target", "last_prompt"] = "target"
    optimizer: Literal["adam", "adafactor"] = "adam"
    stop_below: float = 1e-2
    blocks: Sequence[int] | None = None

    def compute_edit(self, batch: RequestBatch) -> DenseEdit:
        """One dense ΔW for each request and site."""
        return self._tuned(row_losses(self._loss(), batch.tokens, DenseEdit.of, together=False), len(batch))

    def compute_joint_edit(self, batch: RequestBatch) -> DenseEdit:
        """One ΔW, tuned on the mean loss of all requests."""
        return self._tuned(row_losses(self._loss(), batch.tokens, DenseEdit.of, together=True), 1)

    def _loss(self) -> Callable[[TokenBatch, Edit], Tensor]:
        """The loss of each row under its edit, [rows]."""
        of_rows = self._at_last_prompt_token if self.loss == "last_prompt" else self.lm.losses
        return of_rows

    def _tuned(self, losses: Callable[[Values, Tensor], Tensor], count: int, rounds: int = 1) -> DenseEdit:
        """Matrices that minimise losses (see `optimise`), so many of them, in so many times the steps."""
        start = {s.name: torch.zeros(count, s.out_features, s.in_features, device=self.lm.device) for s in self.sites}
        sizes = {site.name: weight_size(self.lm, site) for site in self.sites}
        lr = {name: self.AUTO_LR * size for name, size in sizes.items()} if self.lr == AUTO else self.lr
        found = optimise(
            start, losses, self.steps * rounds, lr, self.optimizer,
            stop_below=self.stop_below, project=partial(self._project, sizes),
        )  # fmt: skip
        return DenseEdit.of(found)

    def _project(self, sizes: Mapping[str, float], values: Values, request: int) -> None:
        """Cuts the changes of a request at the bound, given the size of each site's weights."""
        if self.bound is None:
            return
        for name, change in values.items():
            bound = self.AUTO_BOUND * sizes[name] if self.bound == AUTO else self.bound
            change.clamp_(-bound, bound)

    def _at_last_prompt_token(self, tokens: TokenBatch, edit: Edit) -> Tensor:
        """−1/|y| Σ_j log p(y_j | x) of each row, every token read off the one position after the prompt, [rows]."""
        log_p = self.lm.logits(tokens.after_prompts(), edit).float().log_softmax(-1)  # [rows, vocab]
        return row_mean(-log_p[tokens.rows, tokens.answers], tokens.rows, len(tokens))
