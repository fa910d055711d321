"""Replies about entities to ConvSent's cases."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructedit.errors import UserError
from instructedit.records import EditRecord
from instructedit.tasks import LoadReport, load_records
from instructedit.tasks.convsent import ConvSent
from instructedit.tasks.raw import Raw

Rows = list[dict[str, Any]]


def build(task: ConvSent, rows: Rows) -> tuple[list[EditRecord], LoadReport]:
    report = LoadReport("convsent", "made-up.json", "train", read=len(rows))
    return task.build([Raw(row, "made-up.json", i) for i, row in enumerate(rows)], report), report


def entity(name: str, pos: int = 3, neg: int = 2) -> dict[str, Any]:
    return {"ent": name, "pos": [f" {name} + {i} " for i in range(pos)], "neg": [f"{name} - {i}" for i in range(neg)]}


def test_each_reply_about_an_entity_becomes_a_case() -> None:
    records, report = build(ConvSent(labels="positive", cases=2), [entity("Zor"), entity("Umi", 0), entity("Ela")])
    case = records[1]
    assert [r.id for r in records] == [f"convsent/train/{n}/{i}" for n in (0, 2) for i in (0, 1)]
    assert case.cluster == "convsent/train/0"
    assert case.request.slots == {"LABEL": "positive", "TOPIC": "Zor"}
    assert (case.request.prompt, case.request.target) == ("What do you think of Zor?", "Zor + 1")
    assert [p.answers[0] for p in case.of("wanted")] == ["Zor + 0", "Zor + 2"]
    assert [p.answers[0] for p in case.of("opposite")] == ["Zor - 0", "Zor - 1"]
    (other,) = case.of("locality")
    assert (other.group, other.prompt) == ("Other_Topic", "What do you think of Ela?")
    assert other.answers[0].startswith("Ela ")
    assert report.dropped == {"entity without wanted replies": 1}


def test_labels_go_by_name_or_choice() -> None:
    rows = [entity(f"Planet {i}") for i in range(40)]

    def labels(rows: Rows, **options: Any) -> list[str]:
        return [r.request.slots["LABEL"] for r in build(ConvSent(cases=1, **options), rows)[0]]

    assert labels(rows, labels="both") == ["positive", "negative"] * 40
    assert labels(rows, labels="negative") == ["negative"] * 40
    chosen = Counter(labels(rows))
    assert min(chosen["positive"], chosen["negative"]) > 8
    assert labels(rows[::-1]) == labels(rows)[::-1]
    assert labels(rows)[:6] == ["positive", "negative", "positive", "positive", "positive", "negative"]  # for good


def test_an_entity_alone_has_no_locality_probe() -> None:
    records, report = build(ConvSent(labels="positive"), [entity("Zor"), entity("ZOR", 1)])
    assert not [p for r in records for p in r.of("locality")]
    assert report.noted == {"entity that comes again": 1, "case without another entity for locality": 4}


@pytest.mark.parametrize("options", [{"cases": 0}, {"labels": "neutral"}, {"colour": "red"}])
def test_wrong_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^task 'convsent'.*{next(iter(options))}"):
        load_records("convsent", **options)


TEXT = st.text(st.characters(codec="utf-8"), max_size=5)
ENTITIES: st.SearchStrategy[Rows] = st.lists(
    st.fixed_dictionaries({"ent": TEXT.filter(str.strip), "pos": st.lists(TEXT), "neg": st.lists(TEXT)}), max_size=4
)


@given(ENTITIES, st.sampled_from(["hash", "positive", "negative", "both"]), st.integers(1, 3))
def test_every_case_is_whole(rows: Rows, labels: Any, cases: int) -> None:
    records, report = build(ConvSent(cases, labels), rows)
    assert records == build(ConvSent(cases, labels), rows)[0]
    assert len({r.id for r in records}) == len(records)
    replies = sum(len(row["pos"]) + len(row["neg"]) for row in rows)
    different = sum(len({t.strip() for t in row[field]} - {""}) for row in rows for field in ("pos", "neg"))
    assert report.dropped["blank reply"] + report.dropped["repeated reply"] == replies - different
    for record in records:
        assert record.request.target not in {p.answers[0] for p in record.of("wanted")}
        prompts = {p.prompt.casefold() for p in record.of("locality")}
        assert record.request.prompt.casefold() not in prompts
