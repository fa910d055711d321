"""Average of a metric's scores as a torchmetrics class, which collects one value per probe and averages by record.

The values come from :mod:`instructedit.metrics.functional`. One instance serves one metric of one task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from instructedit.metrics.functional import row_mean

_KEYS = ("cluster", "id", "probe")


class PerRecordMean(Metric):
    """Nested mean of scores: over a record's probes, then over a cluster's records, then over clusters.

    A probe that occurs twice counts once, since a DistributedSampler pads by repeating records. Hence the result is the
    same on any number of processes, however the records are spread over them. nan values are left out.

    ``compute()`` returns a scalar: ``scale`` times the mean; nan without values.

    Args:
        scale: Factor from the values to the result; a metric declares its own (`EditingMetric.scale`).
        kwargs: Options of torchmetrics.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0

    probe_keys: list[Tensor]  # each [entries, 3]: cluster, record id, probe index
    probe_values: list[Tensor]  # each [entries]

    def __init__(self, scale: float = 100.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale = scale
        self.add_state("probe_keys", [], dist_reduce_fx="cat")
        self.add_state("probe_values", [], dist_reduce_fx="cat")

    def update(
        self,
        ids: Tensor | Sequence[int],
        clusters: Tensor | Sequence[int],
        probes: Tensor | Sequence[int],
        values: Tensor | Sequence[float],
    ) -> None:
        """Adds one value per probe.

        Args:
            ids: Record of each value, [entries], as an integer that is the same on every process.
            clusters: Cluster of that record, [entries], also as such an integer; the record's id if it has no cluster.
            probes: Index of the probe within its record, [entries].
            values: Scores, [entries], in 0..1 (Fluency: in its own unit).

        Raises:
            ValueError: If the four differ in length.
        """
        keys = [torch.as_tensor(key, dtype=torch.int64, device=self.device) for key in (clusters, ids, probes)]
        scores = torch.as_tensor(values, dtype=torch.float32, device=self.device).detach()
        if scores.ndim != 1 or any(key.shape != scores.shape for key in keys):
            got = ", ".join(str(list(x.shape)) for x in (*keys, scores))
            raise ValueError(f"clusters, ids, probes and values: expected four [entries], got {got}")
        self.probe_keys.append(torch.stack(keys, dim=1))
        self.probe_values.append(scores)

    def compute(self) -> Tensor:
        """Averages repeats, then probes, then records, then clusters."""
        keys, values = self._rows()
        keys, values = keys[~values.isnan()], values[~values.isnan()]
        for depth in (3, 2, 1):  # average a probe's entries, a record's probes, a cluster's records
            keys, group = torch.unique(keys[:, :depth], dim=0, return_inverse=True)
            values = row_mean(values, group, len(keys))
        return self.scale * values.mean()

    def table(self) -> dict[str, np.ndarray]:
        """Returns this process's entries, with repeats and nan values: columns cluster, id, probe and value.

        ``pandas.DataFrame(metric.table())`` reads it. Inside ``with metric.sync_context():``, which all processes must
        enter, it holds the entries of all processes.
        """
        keys, values = self._rows()
        columns = dict(zip(_KEYS, keys.cpu().numpy().T, strict=True))
        return {**columns, "value": values.cpu().numpy()}

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gathers the entries of all processes; see ``torchmetrics.Metric.sync``."""
        self._ensure_rows()
        super().sync(*args, **kwargs)

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Returns all entries: keys [entries, 3] and values [entries]."""
        self._ensure_rows()
        return dim_zero_cat(self.probe_keys), dim_zero_cat(self.probe_values)

    def _ensure_rows(self) -> None:
        """Gives a process without entries tensors of the right type and shape.

        For an empty list torchmetrics would send a float32 vector, which does not fit the other processes' int64 keys.
        """
        if len(self.probe_keys) == 0:
            self.probe_keys = [torch.empty(0, len(_KEYS), dtype=torch.int64, device=self.device)]
            self.probe_values = [torch.empty(0, device=self.device)]
