"""Failures worth reading: the records with the worst results, with the model's answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from instructedit.experiments.results import Results
from instructedit.experiments.sections.base import Panel, Section

if TYPE_CHECKING:
    from pandas import DataFrame

_COLUMNS = ["row", "task", "record", "probe", "prompt", "target", "before", "after", "accuracy"]


class FailuresSection(Section):
    """Section with the records of lowest in-scope accuracy for each row and task; ties are broken by record id.

    Option ``records``: number of records for each (3 by default). Only probes with free answers can be read, so records
    without any (ConvSent's) are left out.
    """

    name: ClassVar[str] = "failures"

    def show(self, results: Results) -> Iterator[Panel]:
        """Yields a table of failures, or nothing if no row has free answers."""
        import pandas as pd

        records = int(results.options(self).get("records", 3))
        tables = {name: runs[0].table for name, runs in results.rows.items()}
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
    """Selects the worst probe of the worst records: ``task, record, probe, prompt, target, before, after, accuracy``.

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
    # An instruction may precede the prompt; the last line is the question itself.
    frame["prompt"] = [text.strip().splitlines()[-1] if text.strip() else "" for text in frame["prompt"]]
    return frame[[name for name in _COLUMNS if name != "row"]]


def _edits(table: DataFrame) -> bool:
    """True if a row has free answers and its edits changed any accuracy."""
    if "generated" not in table:
        return False
    spoken = table[table["generated"].notna()]
    return bool((spoken["accuracy"] != spoken["accuracy_before"]).any())
