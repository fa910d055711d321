"""Edit success on ConvSent (Mitchell et al. 2022, SERAC)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from instructedit.metrics.base import EditingMetric

if TYPE_CHECKING:
    from pandas import DataFrame, Series


class EditSuccess(EditingMetric):
    """Declares edit success, the preference for replies of the wanted sentiment over those of the opposite one."""

    name = "success"
    title = "Edit success"
    meaning = "how far the edited model prefers replies of the wanted sentiment, while it keeps to the topic"
    place = 60
    headline = False
    probes = ("wanted", "opposite")

    def values(self, rows: DataFrame) -> Iterator[tuple[str, Series]]:
        """Scores each record that has scored replies of both sentiments, with the two factors of its success.

        Args:
            rows: Probe rows of one task.

        Yields:
            ``success``, ``success.sentiment`` and ``success.topic``, each indexed by (cluster, record).
        """
        main = rows[rows["main"]]
        if not set(self.probes) <= set(main["kind"]):
            return
        import pandas as pd
        import torch

        from instructedit.metrics.functional import convsent_edit_success

        wanted, opposite = (
            main[main["kind"] == kind].groupby(["cluster", "record"], sort=False) for kind in self.probes
        )
        means = pd.DataFrame(
            {
                "before": wanted["log_likelihood_before"].mean(),
                "after": wanted["log_likelihood"].mean(),
                "opposite": opposite["log_likelihood"].mean(),
            }
        ).dropna()
        found = convsent_edit_success(*(torch.tensor(means[c].to_numpy()) for c in ("before", "after", "opposite")))
        for suffix, values in zip(("", ".sentiment", ".topic"), found, strict=True):
            yield f"{self.name}{suffix}", pd.Series(values.numpy(), index=means.index)
