"""Reports a run's validation scores while it runs, and stops it if it is not worth continuing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L  # noqa: N812

from instructedit.errors import UserError


class Pruning(L.Callback):
    """Reports a metric after every validation of a fit, and ends the fit when told to.

    Args:
        metric: Metric that validation logs; higher is better.
        report: Takes the value and the optimiser step, and returns whether to stop.

    Attributes:
        best: Highest value so far; -inf before the first validation.
        stopped: Whether the fit was ended early.
    """

    def __init__(self, metric: str, report: Callable[[float, int], bool]) -> None:
        self.metric, self.report = metric, report
        self.best, self.stopped = float("-inf"), False

    def on_validation_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.metric not in trainer.callback_metrics:
            known = ", ".join(name for name in trainer.callback_metrics if name.startswith("val/"))
            raise UserError(f"validation logs no {self.metric!r}; it logs: {known or 'nothing'}")
        value = float(trainer.callback_metrics[self.metric])
        self.best = max(self.best, value)
        if self.report(value, trainer.global_step):
            self.stopped = trainer.should_stop = True
