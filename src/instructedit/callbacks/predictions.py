"""Output of `predict`: the model's answers before and after each edit."""

from __future__ import annotations

from typing import Any

import lightning as L  # noqa: N812

from instructedit.artifacts import artifacts
from instructedit.console import console


class PredictionTable(L.Callback):
    """Prints the answers of the first records and logs those of the main process as ``tables/predictions``.

    Args:
        shown: Number of records to print.
    """

    def __init__(self, shown: int = 20) -> None:
        self.shown = shown
        self.rows: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.rows = []

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        columns = ("task", "record", "kind", "prompt", "answer", "before", "after")
        self.rows += [{c: row.get(c) for c in columns} for row in outputs if row.get("after") is not None]

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or not self.rows:
            return
        from pandas import DataFrame
        from rich.table import Table
        from rich.text import Text

        table = Table("task", "prompt", "target", "before", "after")
        for row in [r for r in self.rows if r["before"] is not None][: self.shown]:
            words = [str(row[c]).strip().splitlines() for c in ("prompt", "answer", "before", "after")]
            table.add_row(*map(Text, (row["task"], *(lines[-1] if lines else "" for lines in words))))
        console().print(table)
        for keeper in artifacts(trainer):
            keeper.log_table(DataFrame(self.rows), "predictions")
