"""One editor under many wordings of its instruction (Figure 3): seen in training, held out, novel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar

from instructedit.experiments.results import Results
from instructedit.experiments.sections.base import Panel, Section
from instructedit.experiments.spec import Row

if TYPE_CHECKING:
    from pandas import DataFrame

_OPTION = "--model.evaluation.description="
_GROUPS = {"train": "seen", "heldout": "held out", "unseen": "novel"}


class DescriptionsSection(Section):
    """Section on descriptions: metrics of each row that tests one, their spread, and tests against the seen ones.

    A row is included if it sets ``--model.evaluation.description``; the instruction banks determine whether its
    description was trained on. Option ``resamples``: number of bootstrap samples (20,000 by default).
    """

    name: ClassVar[str] = "descriptions"

    def show(self, results: Results) -> Iterator[Panel]:
        """Yields a figure and tables, or nothing if no row sets a description."""
        from instructedit.analysis.descriptions import SEEN, description_dots, description_spread, description_tests
        from instructedit.analysis.seeds import interval_text

        groups = {name: group for name in results.rows if (group := group_of(results.grid.rows[name], results.titles))}
        if not groups:
            return
        summary = results.summary[results.summary["method"].isin(groups)]
        yield Panel(
            "descriptions", "Every description on its own", "Locality is asked without an instruction; what varies "
            "there is the edit, which was made with it.", figure=description_dots(summary, groups, results.titles),
        )  # fmt: skip
        spread = description_spread(summary, groups)
        note = "Of the means of a group's descriptions, × 100; deviation: their standard deviation."
        yield Panel("description-spread", "Spread of the descriptions", note, frame=titled(spread, results))
        if SEEN not in groups.values() or set(groups.values()) == {SEEN}:
            return
        resamples = int(results.options(self).get("resamples", 20_000))
        tests = description_tests({name: results.tables[name] for name in groups}, groups, resamples)
        gaps = [interval_text(*own) for own in zip(tests["mean"], tests["low"], tests["high"], strict=True)]
        tests.insert(4, "difference", gaps)
        note = (
            "Less the mean over the seen descriptions, record by record, a record's seeds averaged first, × 100; "
            f"paired bootstrap with {resamples:,} samples over records. corrected: p-values for the number of tests in "
            f"this table, {len(tests)} (Holm)."
        )
        shown = titled(tests.drop(columns=["mean", "low", "high"]), results)
        yield Panel("description-tests", "Difference from the seen descriptions", note, frame=shown)


def group_of(row: Row, tasks: Iterable[str]) -> str | None:
    """Returns whether a row's description was seen in training, held out or novel; None if the row sets none.

    Raises:
        UserError: If a task's bank has no such description, or the group differs between tasks.
    """
    from instructedit.errors import UserError
    from instructedit.instructions import InstructionBank

    chosen = [option.removeprefix(_OPTION) for option in row.overrides if option.startswith(_OPTION)]
    if not chosen:
        return None
    groups = {_GROUPS[InstructionBank.for_task(task).get(chosen[-1]).split] for task in tasks}
    if len(groups) != 1:
        raise UserError(f"description {chosen[-1]}: of another kind in each task: {', '.join(sorted(groups))}")
    return groups.pop()


def titled(frame: DataFrame, results: Results) -> DataFrame:
    """Replaces the tasks and metrics of a frame by their titles."""
    from instructedit.metrics import metric_title

    return results.titled(frame).assign(metric=frame["metric"].map(metric_title))
