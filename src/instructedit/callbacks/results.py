"""Tables and figures of a test run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L  # noqa: N812

from instructedit.artifacts import artifacts
from instructedit.console import console
from instructedit.evaluation import Outcome, Row
from instructedit.processes import from_all

if TYPE_CHECKING:
    from pandas import DataFrame


class ResultTables(L.Callback):
    """Collects the probe rows of `test`, prints the result table, and logs tables, intervals and the bar chart.

    It logs ``tables/probes`` (one row for each probe, with the model's answers before and after), ``tables/summary``
    (means with intervals), ``figures/metrics``, and a metric ``test/<task>/<metric>`` for each mean that the module has
    not logged itself (``reliability.exact``, ``locality.Forgetfulness``, …).

    Args:
        method: Name of the editor in tables; by default its own name.
        show: Print the table.
    """

    def __init__(self, method: str | None = None, show: bool = True) -> None:
        self.method, self.show = method, show
        self.rows: list[Row] = []
        self.table: DataFrame | None = None
        self.summary: DataFrame | None = None

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.rows = []

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if isinstance(outputs, Outcome):
            self.rows += outputs.rows

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        rows = from_all(self.rows)
        if not trainer.is_global_zero or not rows:
            return
        from pandas import DataFrame

        from instructedit.analysis import metric_bars, rich_table
        from instructedit.analysis.summary import summarise

        self.table = DataFrame(rows).drop(columns="aliases")
        self.summary = summarise(DataFrame(rows), self.method or pl_module.editor.name)
        titles = pl_module.data.titles
        if self.show:
            console().print(rich_table(self.summary, titles=titles))
        if keepers := artifacts(trainer):
            figure = metric_bars(self.summary, titles=titles)
            for keeper in keepers:
                keeper.log_table(self.table, "probes")
                keeper.log_table(self.summary, "summary")
                keeper.log_figure(figure, "metrics")
        means = {f"test/{row.task}/{row.metric}": row.mean for row in self.summary.itertuples()}
        more = {name: mean for name, mean in means.items() if name not in trainer.callback_metrics}
        for logger in trainer.loggers:  # at the step of Lightning's own metrics, so that the UI draws bars, not lines
            logger.log_metrics(more, trainer.global_step)
