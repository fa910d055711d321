"""The case study: which records the rule chooses, what stands beside what, and that the counts tell the whole."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from instructedit.experiments.runner import RunResult
from instructedit.experiments.sections import Results
from instructedit.experiments.sections.cases import CasesSection
from instructedit.experiments.spec import Grid, Row

TITLES = {"counterfact": "CounterFact", "zsre": "ZsRE (held out)"}
#: Record to whether A and B answer it right.
RIGHT = {"r0": (1, 1), "r1": (1, 0), "r2": (0, 0), "r3": (0, 1), "r4": (1, 0), "r5": (1, 0), "r6": (0, 0)}


def table(place: int, instructed: bool) -> pd.DataFrame:
    rows = []
    for task in TITLES:
        for record, right in RIGHT.items():
            base = {"task": task, "record": f"{task}/{record}", "kind": "reliability", "answer": "Zhang You"}
            said = "Zhang You" if right[place] else f"no{place}\nand on"
            prompt = f"Who is {record}?"
            plain = base | {"view": "plain", "main": not instructed, "prompt": prompt, "before": "James"}
            rows.append(plain | {"after": "plainly" if instructed else said, "generated": float(right[place])})
            if instructed:
                own = {"view": "instructed", "main": True, "prompt": f"Task: T\nInput: {prompt}", "before": "Task"}
                rows.append(base | own | {"after": said, "generated": float(right[place])})
            other = {"kind": "portability", "view": "plain", "main": True, "prompt": "?", "before": None}
            rows.append(base | other | {"after": "x", "generated": 0.0})
    rows.append(base | {"task": "convsent", "view": "plain", "main": True, "prompt": "Hm?", "before": None})
    return pd.DataFrame(rows)


def shown(renamed: bool = False, **options: int) -> list[pd.DataFrame]:
    rows = {"unedited": Row("unedited", fit=False), "B": Row("mend"), "A": Row("instructedit")}
    grid = Grid("t", (4,), rows, compare=(("A", "none"), ("A", "B")), options={"cases": options})
    tables = {"A": table(0, True), "B": table(1, False)}
    if renamed:  # as those of a reader that numbers each task's records from 0
        tables = {name: own.assign(record=own["record"].str.split("/").str[1]) for name, own in tables.items()}
    children = {name: [RunResult(name, 4, own, None, {}, Path())] for name, own in tables.items()}
    results = Results("cases", grid, "one", children, None, TITLES)
    return [one.frame for one in CasesSection().show(results) if one.frame is not None]


def test_the_first_records_of_each_sort_are_chosen() -> None:
    cases, _ = shown()
    assert list(cases) == ["task", "sort", "prompt", "target", "before", "A", "B"]
    assert cases["task"].tolist() == ["CounterFact"] * 5 + ["ZsRE (held out)"] * 5
    assert cases[["sort", "prompt"]].head(5).to_records(index=False).tolist() == [
        ("only A right", "Who is r1?"),
        ("only A right", "Who is r4?"),
        ("only B right", "Who is r3?"),
        ("both wrong", "Who is r2?"),
        ("both wrong", "Who is r6?"),
    ]


def test_the_words_are_the_ones_that_were_said() -> None:
    first, *_ = shown(each=1)[0].to_dict("records")
    assert first["before"] == "James"  # asked without an instruction
    assert first["target"] == "Zhang You"
    assert first["A"] == "Zhang You"  # asked with it: what A is scored by
    assert first["B"] == "no1 / and on"


def test_the_counts_are_of_all_records() -> None:
    _, counts = shown(each=1)
    assert counts.to_dict("records") == [
        {"task": title, "only A right": 3, "only B right": 1, "both wrong": 2, "both right": 1}
        for title in TITLES.values()
    ]


def test_records_of_two_tasks_may_have_one_id() -> None:
    for one, other in zip(shown(), shown(renamed=True), strict=True):
        pd.testing.assert_frame_equal(one, other)


def test_without_free_answers_or_a_pair_there_is_nothing() -> None:
    grid = Grid("t", (0,), {"A": Row("mend"), "B": Row("mend")}, compare=(("A", "B"),))
    bare = table(0, False).drop(columns=["generated", "after", "before"])
    children = {name: [RunResult("a", 0, bare, None, {}, Path())] for name in "AB"}
    assert list(CasesSection().show(Results("cases", grid, "one", children, None, TITLES))) == []
    alone = {"A": [RunResult("a", 0, table(0, False), None, {}, Path())]}
    assert list(CasesSection().show(Results("cases", grid, "one", alone, None, TITLES))) == []
