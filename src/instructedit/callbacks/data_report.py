"""Logs which data were read and which were dropped."""

from __future__ import annotations

from typing import Any

import lightning as L  # noqa: N812
from lightning.pytorch.trainer.states import TrainerFn

from instructedit.artifacts import artifacts


class DataReport(L.Callback):
    """Logs each dataset, its fingerprint as a tag, and the report of its reader as ``data.<stage>.json``."""

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        data = pl_module.data
        for keeper in artifacts(trainer):
            keeper.log_fingerprints(data.fingerprints)
            keeper.log_datasets([vars(report) for report in data.reports])
            keeper.log_json([vars(report) for report in data.reports], f"data.{TrainerFn(stage).value}")
