"""Logs what was read and what was dropped."""

from __future__ import annotations

from typing import Any

import lightning as L  # noqa: N812
from lightning.pytorch.trainer.states import TrainerFn

from instructedit.tracking import MLflowTracker


class DataReport(L.Callback):
    """Logs each dataset's fingerprint as a tag and its reading report as ``data.json``."""

    def setup(self, trainer: Any, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(trainer.logger, MLflowTracker) or not trainer.is_global_zero:
            return
        trainer.logger.log_fingerprints(trainer.datamodule.fingerprints)
        reports = [vars(report) for report in trainer.datamodule.reports]
        trainer.logger.log_json(reports, f"data.{TrainerFn(stage).value}")
