"""Stops a run that cannot succeed, with a message that says why."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import lightning as L  # noqa: N812
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from instructedit.errors import UserError


class Guards(L.Callback):
    """Stops a training run whose base model, loss or monitored tensors show that it cannot succeed.

    Args:
        patience: Number of optimiser steps after which every monitored tensor of the editor (MEND's edit rates) must
            have changed.
        max_base_loss: Largest loss of the unedited LM on the edit targets before training, as a multiple of that of a
            uniform guess, ln(vocabulary); a larger one means broken weights, a wrong tokenizer or a wrong dtype.
        base_records: Number of records on which that loss is measured; 0 skips the check.
    """

    def __init__(self, patience: int = 50, max_base_loss: float = 2.0, base_records: int = 32) -> None:
        self.patience, self.max_base_loss, self.base_records = patience, max_base_loss, base_records
        self._start: dict[str, Tensor] = {}
        self._first_step = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._start = {name: value.detach().clone() for name, value in pl_module.editor.monitored().items()}
        self._first_step = trainer.global_step
        if self.base_records:
            self._check_base(trainer, pl_module)

    @torch.no_grad()
    def _check_base(self, trainer: Any, module: Any) -> None:
        tasks = module.data.records["fit"].values()
        share = -(-self.base_records // len(tasks))
        records = [record for task in tasks for record in islice(task, share)]
        batch = module.lm.encode(
            [(r.request.prompt, r.request.target) for r in records], [f"record {r.id}" for r in records]
        )
        logits = module.lm.logits(batch).float()
        loss = F.cross_entropy(logits, batch.answers).item()
        limit = self.max_base_loss * math.log(logits.shape[-1])
        if not loss <= limit:
            raise UserError(
                f"the unedited {module.lm.name} has a loss of {loss:.1f} on the edit targets, above {limit:.1f} = "
                f"{self.max_base_loss:g} × ln(vocabulary): broken weights, a wrong tokenizer or dtype? "
                "(guards.max_base_loss)"
            )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at step {trainer.global_step} (records {batch.records[0].id}, …): "
                "try a smaller model.lr, or gradient clipping (trainer.gradient_clip_val)"
            )
        if self._start and trainer.global_step - self._first_step == self.patience:
            self._check_moved(pl_module)

    def _check_moved(self, module: Any) -> None:
        for name, value in module.editor.monitored().items():
            if torch.equal(value.detach().cpu(), self._start[name].cpu()):
                raise UserError(
                    f"{name} of editor {module.editor.name!r} did not move in {self.patience} steps: is "
                    "model.lr_edit_rates zero, or the loss independent of the edit?"
                )
        self._start = {}
