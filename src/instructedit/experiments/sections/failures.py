"""Failures worth reading: the records that went worst, in the model's words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from instructedit.experiments.results import Results
from instructedit.experiments.sections.base import Panel, Section

if TYPE_CHECKING:
    from pandas import DataFrame

_COLUMNS = ["row", "task", "record", "probe", "prompt", "target", "before", "after", "accuracy"]


class FailuresSection(Section):
    """Of each row and task the records with the lowest in-scope accuracy; ties go by record id.

    Option ``records``: how many of each (3 by default). Only probes that the model answered in its own words can be
    read, so records without any (ConvSent's) are left out.
    """

    name: ClassVar[str] = "failures"

    def show(self, results: Results) -> Iterator[Panel]:
        """Nothing where no row let the model answer freely."""
        import pandas as pd

        records = int(results.options(self).get("records", 3))
        tables = {name: children[0].table for name, children in results.rows.items()}
        parts = [worst(table, records).assign(row=name) for name, table in tables.items() if _edits(table)]
        frame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
        if frame.empty:
            return
        frame = results.titled(frame)
        yield Panel(
            "failures",
            "Failures worth reading",
            f"Of each row and task the {records} records with the lowest mean in-scope accuracy (× 100, of the first "
            "seed; ties by record id), each with its worst probe. Before and after are the model's own words; the "
            "words before the edit are kept for the request alone.",
            frame=frame[_COLUMNS],
        )


def worst(table: DataFrame, records: int) -> DataFrame:
    """The worst probe of the worst records of each task: ``task, record, probe, prompt, target, before, after``.

    ``accuracy`` is the record's mean over its in-scope probes, × 100.
    """
    import pandas as pd

    spoken = table[table["main"] & table["generated"].notna()]
    parts = []
    for _, rows in spoken.groupby("task", sort=False):
        means = rows.groupby("record")["accuracy"].mean().reset_index()
        chosen = means[means["accuracy"] < 1].sort_values(["accuracy", "record"]).head(records)
        probes = rows.sort_values(["accuracy", "probe"], kind="stable").drop_duplicates("record")
        parts.append(chosen.merge(probes.drop(columns="accuracy"), on="record").assign(
            accuracy=lambda found: 100 * found["accuracy"]
        ))  # fmt: skip
    frame = pd.concat(parts, ignore_index=True) if parts else table.head(0).copy()
    frame = frame.drop(columns="probe").rename(columns={"kind": "probe", "answer": "target"})
    if "before" not in frame:
        frame["before"] = None
    # An instruction fronts the prompt: its last line is what was asked.
    frame["prompt"] = [text.strip().splitlines()[-1] if text.strip() else "" for text in frame["prompt"]]
    return frame[[name for name in _COLUMNS if name != "row"]]


def _edits(table: DataFrame) -> bool:
    """Whether there are words to read, and the row changed anything at all."""
    if "generated" not in table:
        return False
    spoken = table[table["generated"].notna()]
    return bool((spoken["accuracy"] != spoken["accuracy_before"]).any())
