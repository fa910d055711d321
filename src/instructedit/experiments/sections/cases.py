"""Answers of models before and after an edit, side by side (Appendix C)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from instructedit.experiments.results import Results
from instructedit.experiments.sections.base import Panel, Section

if TYPE_CHECKING:
    from pandas import DataFrame

_KEYS = ["task", "record"]


class CasesSection(Section):
    """Section with the free answers of the first compared pair of rows, for records chosen by a fixed rule.

    The rule: the first records of each task, in the order of the data, that the first row of the pair answers right
    and the second wrong, vice versa, and that both answer wrong. A separate table counts the records of each sort, so
    that the cases are not taken as representative. All are of the first seed. Replies (ConvSent) have no single right
    wording and are left out. Option ``each``: number of records of each sort and task (2 by default).
    """

    name: ClassVar[str] = "cases"

    def show(self, results: Results) -> Iterator[Panel]:
        """Yields the cases and their counts, or nothing if no compared pair has free answers."""
        pair = next((pair for pair in results.grid.compare if set(pair) <= set(results.rows)), None)
        if pair is None:
            return
        answers = {name: answered(results.rows[name][0].table) for name in pair}
        if not all(map(len, answers.values())):
            return
        a, b = pair
        each = int(results.options(self).get("each", 2))
        others = answers[b][[*_KEYS, "after", "generated"]]
        table = answers[a].merge(others, on=_KEYS, suffixes=(f"/{a}", f"/{b}"))
        right = {name: table[f"generated/{name}"] > 0 for name in pair}
        sorts = {
            f"only {a} right": right[a] & ~right[b],
            f"only {b} right": right[b] & ~right[a],
            "both wrong": ~right[a] & ~right[b],
            "both right": right[a] & right[b],
        }
        table["sort"] = ""
        for sort, chosen in sorts.items():
            table.loc[chosen, "sort"] = sort
        shown = table[table["sort"] != "both right"].groupby(["task", "sort"], sort=False).head(each)
        order = {sort: i for i, sort in enumerate(sorts)}
        shown = shown.sort_values("sort", key=lambda column: column.map(order), kind="stable")
        shown = shown.sort_values("task", key=lambda column: column.map([*results.titles].index), kind="stable")
        columns = {f"after/{name}": name for name in pair}
        frame = shown[["task", "sort", "prompt", "answer", "before", *columns]].rename(columns=columns)
        texts = ["prompt", "answer", "before", *pair]
        frame[texts] = frame[texts].map(one_line)
        note = (
            f"Free generation, seed {results.rows[a][0].seed}. Of each task the first {each} records, in the order of "
            f"the data, of each sort: only {a} right, only {b} right, both wrong. answer: what the edit asks for."
        )
        frame = frame.rename(columns={"answer": "target"}).assign(task=frame["task"].map(results.titles))
        yield Panel("cases", "Before and after", note, frame=frame.reset_index(drop=True))
        counts = table.groupby(["task", "sort"], sort=False).size().unstack("sort", fill_value=0)
        counts = counts.reindex(columns=[*sorts], fill_value=0).rename_axis(columns=None).reset_index()
        counts["task"] = counts["task"].map(results.titles)
        yield Panel("case-counts", "How often each sort comes", "Records of the test, same seed.", frame=counts)


def answered(table: DataFrame) -> DataFrame:
    """Selects the requests that a model answered freely, one row each.

    The prompt and the answer before the edit are those without an instruction; the answer after it is the one that the
    method's results are based on, with an instruction if the method uses them.
    """
    if "generated" not in table:
        return table.head(0)
    asked = table[(table["kind"] == "reliability") & table["generated"].notna()]
    words = asked.loc[asked["view"] == "plain", [*_KEYS, "prompt", "answer", "before"]]
    return words.merge(asked.loc[asked["main"], [*_KEYS, "after", "generated"]], on=_KEYS)


def one_line(text: object) -> str:
    """Joins the lines of a long answer, or of a prompt with its instruction, into one."""
    return " / ".join(line.strip() for line in str(text or "").strip().splitlines())
