"""Finds the edit rate that suits the model, before training starts."""

from __future__ import annotations

from typing import Any

import lightning as L  # noqa: N812
from lightning.pytorch.utilities import rank_zero_info

from instructedit.artifacts import artifacts
from instructedit.editors.mend import Mend
from instructedit.editors.rates import RateLoss, best_rate, sweep_rates


class EditRateSweep(L.Callback):
    """Initialises MEND's edit rates to the rate with the smallest outer loss on a few training records.

    It runs only if the editor asks for it (``edit_rate: auto``) and no rates were loaded with a checkpoint. The records
    are the first of the training stream, as training will see them. It logs the metric ``edit_rate``,
    ``tables/edit_rates`` and ``figures/edit_rates``.

    Args:
        records: Number of training records that each rate is measured on.

    Attributes:
        tried: The losses that were measured; empty if the sweep did not run.
    """

    def __init__(self, records: int = 8) -> None:
        self.records = records
        self.tried: list[RateLoss] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        editor = pl_module.editor
        if not (isinstance(editor, Mend) and editor.rate_is_open):
            return
        pl_module.lm.to(pl_module.device)
        batch = pl_module.data.first_records(self.records).to(pl_module.device)
        self.tried = sweep_rates(editor, batch, pl_module.loss_weights)
        rate = trainer.strategy.broadcast(best_rate(self.tried))  # all processes use the same rate, despite rounding
        editor.start_at(rate)
        least, unedited = min(found.loss for found in self.tried[1:]), self.tried[0].loss
        rank_zero_info(
            f"edit_rate: {rate:.2g}, the least outer loss ({least:.3g}; unedited {unedited:.3g}) of "
            f"{len(self.tried) - 1} rates on {len(batch)} training records"
        )
        if not least < unedited:
            rank_zero_info("edit_rate: no rate lowers the loss; are the edits too few, or c_loc too large?")
        self._log(trainer, rate)

    def _log(self, trainer: Any, rate: float) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({"edit_rate": rate}, 0)
        if trainer.is_global_zero and (keepers := artifacts(trainer)):
            from pandas import DataFrame

            from instructedit.analysis.figures import edit_rate_curve

            table = DataFrame(self.tried)
            figure = edit_rate_curve(table, rate)
            for keeper in keepers:
                keeper.log_table(table, "edit_rates")
                keeper.log_figure(figure, "edit_rates")
