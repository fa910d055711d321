"""Dumps editing areas: the normalised directions of the edits of a test run (InstructEdit, section 4.2)."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
from lightning.pytorch.utilities import rank_zero_info

from instructedit.analysis import EditingAreas, area_maps
from instructedit.artifacts import artifacts
from instructedit.edits import Edit, LowRankEdit
from instructedit.records import EditRecord


class EditingAreaDump(L.Callback):
    """Logs ``areas/areas.safetensors`` (factored) and ``figures/areas`` (t-SNE coloured by task).

    Only edits of low rank have areas. With several processes only the first one's share of the records is collected.

    Args:
        records_per_task: Number of test records of each task; 0 turns the dump off.
        max_rank: Number of leading directions of each area to keep; None keeps all.
    """

    def __init__(self, records_per_task: int = 60, max_rank: int | None = 8) -> None:
        self.records_per_task, self.max_rank = records_per_task, max_rank
        self.parts: list[EditingAreas] = []
        self.seen: Counter[str] = Counter()
        self.clusters: set[tuple[str, str]] = set()
        self.areas: EditingAreas | None = None

    def on_test_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.parts, self.seen, self.clusters, self.areas = [], Counter(), set(), None
        if trainer.is_global_zero:
            pl_module.watchers.append(self._keep)

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            pl_module.watchers.remove(self._keep)

    def _keep(self, records: list[EditRecord], edit: Edit) -> None:
        if not isinstance(edit, LowRankEdit):
            return
        chosen = []
        for i, record in enumerate(records):
            # One record represents its cluster: ten cases of one topic would fall on one spot of the map.
            cluster = record.task, record.cluster
            if self.seen[record.task] < self.records_per_task and cluster not in self.clusters:
                self.seen[record.task] += 1
                self.clusters.add(cluster)
                chosen.append(i)
        if chosen:
            ids, tasks = [records[i].id for i in chosen], [records[i].task for i in chosen]
            self.parts.append(EditingAreas.of_edits(ids, tasks, edit[chosen], self.max_rank))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not self.parts:
            return
        self.areas = EditingAreas.concat(self.parts)
        titles = pl_module.data.titles
        self.areas.tasks = [titles.get(t, t) for t in self.areas.tasks]
        keepers = artifacts(trainer)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "areas.safetensors")
            self.areas.save(file, half=True)
            for keeper in keepers:
                keeper.log_file(file, "areas")
        if len(self.areas) < 5:
            rank_zero_info("too few test records for a map of editing areas")
        elif keepers:
            figure = area_maps({pl_module.editor.name: self.areas})
            for keeper in keepers:
                keeper.log_figure(figure, "areas")
