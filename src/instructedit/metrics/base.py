"""Declarations of metrics, which training, tables, figures and pages read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from instructedit.registry import plugins

if TYPE_CHECKING:
    from pandas import DataFrame, Series


class EditingMetric:
    """Declares one metric; a file in `metrics/scores/` (or a subclass in a user's own code) adds it everywhere.

    A subclass states its name, which probe rows it reads (see `instructedit.evaluate`) and which of their columns holds
    its score. In the Trainer, `PerRecordMean` averages that score.

    Attributes:
        name: The key in tables and logs.
        title: The heading in tables and figures.
        meaning: One sentence for someone who has not read the paper.
        place: Rank in the order of metrics in tables, lowest first.
        headline: Whether it appears in every result table and figure.
        probes: Kinds of the probe rows that it reads.
        column: The column of its score; a score lies in 0..1, or has a unit of its own.
        scale: Factor from a score to the number in a table.
        chooses: Whether its mean is part of ``val/score``, by which the best checkpoint is chosen.
        variants: Suffix to the column of a stricter score; ``{".exact": "exact"}`` adds ``reliability.exact``.
        asked_plainly: Whether ``.plain``, the score of the prompts without the instruction, is reported as well.
        asked_instructed: Whether ``.instructed``, the score of those with it, is reported as well.
        by_group: Whether the dataset's own groups of probes are reported as well, such as ``locality.Forgetfulness``.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    meaning: ClassVar[str] = ""
    place: ClassVar[int] = 100
    headline: ClassVar[bool] = True
    probes: ClassVar[tuple[str, ...]] = ()
    column: ClassVar[str] = ""
    scale: ClassVar[float] = 100.0
    chooses: ClassVar[bool] = False
    variants: ClassVar[Mapping[str, str]] = {}
    asked_plainly: ClassVar[bool] = False
    asked_instructed: ClassVar[bool] = False
    by_group: ClassVar[bool] = False

    @property
    def is_share(self) -> bool:
        """True if its numbers in tables lie in 0..100."""
        return self.scale == 100

    def values(self, rows: DataFrame) -> Iterator[tuple[str, Series]]:
        """Scores each record of one task.

        Args:
            rows: The task's probe rows.

        Yields:
            (name with its suffix, one value for each record, indexed by (cluster, record)): the mean over the record's
            probes, a hundredth of the number in tables.
        """
        own = rows[rows["kind"].isin(self.probes)]
        further = {"plain": self.asked_plainly, "instructed": self.asked_instructed}
        asked = {"": own[own["main"]]}
        asked |= {f".{view}": own[own["view"] == view] for view, reported in further.items() if reported}
        for suffix, part in asked.items():
            for variant, column in {"": self.column, **self.variants}.items():
                yield from self._means(f"{self.name}{suffix}{variant}", part, column)
        if self.by_group:
            for group, part in asked[""].groupby("group", sort=False):
                if group:
                    yield from self._means(f"{self.name}.{group}", part, self.column)

    def _means(self, name: str, rows: DataFrame, column: str) -> Iterator[tuple[str, Series]]:
        if column in rows and rows[column].notna().any():
            means = rows.groupby(["cluster", "record"], sort=False)[column].mean()
            yield name, means if self.is_share else means * (self.scale / 100)


class AnswerMetric(EditingMetric):
    """Declares the share of answer tokens that the edited model predicts, with two stricter variants.

    ``.exact`` counts an answer only if all of its tokens are predicted under teacher forcing, ``.generated`` only if
    the model gives it in free generation.
    """

    column = "accuracy"
    variants: ClassVar[Mapping[str, str]] = {".exact": "exact", ".generated": "generated"}
    asked_plainly = True


def editing_metrics() -> dict[str, EditingMetric]:
    """Returns every declared metric by its name, in the order of the tables."""
    found = [declared() for declared in plugins(EditingMetric, "instructedit.metrics.scores").values()]
    return {metric.name: metric for metric in sorted(found, key=lambda metric: metric.place)}


def headline_metrics() -> tuple[str, ...]:
    """Returns the names of the metrics that appear in every result table and figure, in order."""
    return tuple(name for name, metric in editing_metrics().items() if metric.headline)


def metric_title(name: str) -> str:
    """Returns the title of a metric with its suffix: ``reliability.exact`` becomes ``Reliability (exact)``."""
    head, _, rest = name.partition(".")
    declared = editing_metrics().get(head)
    return (declared.title if declared else head.capitalize()) + f" ({rest.replace('.', ', ')})" * bool(rest)
