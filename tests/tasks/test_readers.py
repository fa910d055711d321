"""Raw records of every dataset to edit records: shapes, oddities, mistakes, and the account of what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructedit.errors import UserError
from instructedit.records import EditRecord
from instructedit.tasks import LoadReport, Task, load_records, task_names
from instructedit.tasks.convsent import ConvSent
from instructedit.tasks.counterfact import CounterFact
from instructedit.tasks.raw import Raw
from instructedit.tasks.recent import Recent
from instructedit.tasks.zsre import ZsRE

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real datasets are not at {REAL}")

Rows = list[dict[str, Any]]


def build(task: Task, rows: Rows, split: str = "train") -> tuple[list[EditRecord], LoadReport]:
    report = LoadReport(task.name, "made-up.json", split, read=len(rows))
    return task.build([Raw(row, "made-up.json", i) for i, row in enumerate(rows)], report), report


def fact(**changes: Any) -> dict[str, Any]:
    row = {"subject": "Zor", "prompt": "The moon of Zor is", "target_new": "Umi", "portability": {}, "locality": {}}
    return row | changes


def mend(**changes: Any) -> dict[str, Any]:
    asked = {"Recalled Relation": "(Umi, colour, red)", "New Question": "Which colour has it?", "New Answer": "red"}
    row: dict[str, Any] = {
        "subject": "Zor",
        "src": "Which moon has Zor?",
        "pred": "Ota",
        "rephrase": "Zor's moon?",
        "alt": "Umi",
    }
    row |= {"answers": ["Ota"], "loc": "nq question: who sings", "loc_ans": "Ela", "portability": asked}
    return row | changes


def probe(answers: object, prompt: object = "Its colour is") -> dict[str, object]:
    return {"prompt": prompt, "ground_truth": answers}


def asked(record: EditRecord) -> list[tuple[str, str, str, tuple[str, ...]]]:
    return [(p.kind, p.group, p.prompt, p.answers) for p in record.probes]


def test_tasks_are_found_by_name() -> None:
    assert {"convsent", "counterfact", "recent", "zsre"} <= set(task_names())
    assert [t.title for t in (CounterFact, Recent, ConvSent, ZsRE)] == ["CounterFact", "Recent", "ConvSent", "ZsRE"]


@pytest.mark.parametrize(
    ("shape", "answers", "dropped"),
    [
        (" red ", ("red",), {}),
        (["red", "rot"], ("red", "rot"), {}),
        ([["red", "rot"], ["blue"]], ("red", "rot", "blue"), {}),
        ([[], ["red"]], ("red",), {"leading empty alias list": 1}),
        ([["red"], []], ("red",), {"empty alias list": 1}),
        ([["red", " "], [""]], ("red",), {"blank answer": 2}),
        ([["red", "rot"], ["red"]], ("red", "rot"), {"repeated answer": 1}),
        ("", (), {"blank answer": 1, "probe without an answer": 1}),
        ([[]], (), {"leading empty alias list": 1, "probe without an answer": 1}),
        ([], (), {"probe without an answer": 1}),
    ],
)
def test_answers_come_in_many_shapes(shape: object, answers: tuple[str, ...], dropped: dict[str, int]) -> None:
    (record,), report = build(CounterFact(), [fact(locality={"Relation_Specificity": [probe(shape)]})])
    found = [("locality", "Relation_Specificity", "Its colour is", answers)]
    assert asked(record) == (found if answers else [])
    assert report.dropped == dropped


def test_a_fact_keeps_its_groups_and_aliases_rephrase_it() -> None:
    alias = probe([["Umi", "the Umi"]], "The moon of planet Zor is")
    row = fact(portability={"Reasoning": [probe("red")], "Subject_Aliasing": [alias], "Logical_Generalization": []})
    (record,), report = build(CounterFact(), [row | {"ground_truth": "Ota"}], "val")
    request = record.request
    assert (record.id, record.cluster, record.task) == ("counterfact/val/0", "counterfact/val/0", "counterfact")
    assert (request.prompt, request.target, request.subject) == ("The moon of Zor is", "Umi", "Zor")
    assert asked(record) == [
        ("generalization", "Subject_Aliasing", "The moon of planet Zor is", ("Umi", "the Umi")),
        ("portability", "Reasoning", "Its colour is", ("red",)),
        ("portability", "Subject_Aliasing", "The moon of planet Zor is", ("Umi", "the Umi")),
    ]
    assert report.dropped == {"probe group empty": 1}


def test_an_alias_that_lists_another_answer_still_generalizes_to_the_target() -> None:
    (record,), report = build(CounterFact(), [fact(portability={"Subject_Aliasing": [probe("Uma")]})])
    assert [p.answers for p in record.probes] == [("Umi", "Uma"), ("Uma",)]
    assert report.noted == {"alias probe that does not list the target": 1}


@pytest.mark.parametrize("rephrase", ["Zor's moon is", ["Zor's moon is", " "]])
@pytest.mark.parametrize("name", ["rephrase", "rephrase_prompt"])
def test_a_rephrase_field_takes_the_place_of_aliases(name: str, rephrase: object) -> None:
    row = fact(portability={"Subject_Aliasing": [probe("Umi")]}) | {name: rephrase}
    (record,), report = build(CounterFact(), [row])
    assert [(p.group, p.answers) for p in record.of("generalization")] == [("rephrase", ("Umi",))]
    assert report.dropped["blank rephrase"] == isinstance(rephrase, list)


def test_duplicates_and_edits_to_the_old_answer_are_left_out_and_counted() -> None:
    rows = [fact(), fact(prompt="The star of Zor is"), fact(), fact(prompt="The sun of Zor is", ground_truth="UMI")]
    records, report = build(CounterFact(), [*rows, {"prompt": "Zor is", "target_new": "far", "ground_truth": ""}])
    assert [r.id for r in records] == ["counterfact/train/0", "counterfact/train/1", "counterfact/train/4"]
    assert report.dropped == {"duplicate edit": 1, "target equals the old answer": 1}
    assert report.noted == {"record without portability": 1, "record without locality": 1}
    assert "duplicate edit (1)" in str(report)
    assert "\n" not in report.line()


def test_recent_takes_the_target_out_of_probes_that_rule_it_out() -> None:
    prompt = "The moon of Zor, which is not Umi I, is"
    answers: list[object] = [[["umi", "U."], ["Ota"]], [["Umi"]], [["x", "umi i"], ["Ela", "E."]], []]
    locality = {"Forgetfulness": [probe(a, prompt) for a in answers], "Relation_Specificity": [probe([["Umi"]])]}
    (record,), report = build(Recent(), [fact(locality=locality)])
    assert [p.answers for p in record.probes] == [("Ota",), ("Ela", "E."), ("Umi",)]
    ruled_out = {"answer that its probe rules out": 3, "probe answer equals the target": 1}
    assert report.dropped == ruled_out | {"probe without an answer": 1}


def test_zsre_in_the_form_of_yao() -> None:
    rows = [mend(), mend(alt="Ota"), mend(src="Who?", loc_ans=" "), mend(src="What?", alt="Colour", portability=None)]
    records, report = build(ZsRE(), [*rows, mend(src="Why?", alt="COLOUR")], "test")
    assert [r.id for r in records] == [f"zsre/test/{i}" for i in (0, 2, 3, 4)]
    assert asked(records[0]) == [
        ("generalization", "rephrase", "Zor's moon?", ("Umi",)),
        ("portability", "Reasoning", "Which colour has it?", ("red",)),
        ("locality", "NQ", "nq question: who sings", ("Ela",)),
    ]
    assert report.dropped == {"target equals the old answer": 1, "blank answer": 1, "probe without an answer": 1}
    assert report.noted == {"record without portability": 1, "portability question that contains the target": 1}


def test_zsre_in_the_form_of_knowedit() -> None:
    row = fact(ground_truth=["Ota"], rephrase_prompt="Zor's moon?", locality={"Relation_Specificity": [probe(["x"])]})
    row["portability"] = {"Logical_Generalization": [probe("Zor", "Which planet has Umi?")]}
    (record,), report = build(ZsRE(), [row, row | {"target_new": "Ota"}])
    assert [p.kind for p in record.probes] == ["generalization", "portability", "locality"]
    assert report.dropped == {"target equals the old answer": 1}
    assert report.noted == {"portability question that contains the target": 1}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (CounterFact(), {"target_new": "Umi"}, "field 'prompt' is missing"),
        (CounterFact(), fact(target_new=None), "field 'target_new' is missing"),
        (CounterFact(), fact(target_new=" "), "field 'target_new' is empty"),
        (CounterFact(), fact(subject=3), "field 'subject': expected text, got int"),
        (CounterFact(), fact(ground_truth={}), "field 'ground_truth': expected text or a list, got dict"),
        (Recent(), fact(locality=[]), "field 'locality': expected an object, got list"),
        (Recent(), fact(locality={"A": "x"}), "field 'locality.A': expected a list, got str"),
        (Recent(), fact(locality={"A": ["x"]}), "field 'locality.A[0]': expected an object, got str"),
        (Recent(), fact(locality={"A": [{"prompt": "x"}]}), "field 'locality.A[0].ground_truth' is missing"),
        (Recent(), fact(locality={"A": [probe("x"), probe("x", 7)]}), "'locality.A[1].prompt': expected text, got int"),
        (Recent(), fact(locality={"A": [probe(["x", 7])]}), "'locality.A[0].ground_truth[1]': expected text, got int"),
        (Recent(), fact(locality={"A": [probe([[7]])]}), "'locality.A[0].ground_truth[0][0]': expected text, got int"),
        (ZsRE(), mend(alt=""), "field 'alt' is empty"),
        (ZsRE(), mend(portability={"New Answer": "x"}), "field 'portability.New Question' is missing"),
        (ConvSent(), {"ent": "Zor", "pos": ["x"]}, "field 'neg' is missing"),
        (ConvSent(), {"ent": "Zor", "pos": "x", "neg": []}, "field 'pos': expected a list, got str"),
        (ConvSent(), {"ent": "Zor", "pos": [1], "neg": []}, "field 'pos[0]': expected text, got int"),
    ],
)
def test_a_wrong_record_is_named(task: Task, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(task, [fact(ent="Umi", pos=["x"], neg=["y"]), row])
    assert str(caught.value).startswith("made-up.json, record 1: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


TEXT = st.text(st.characters(codec="utf-8"), max_size=5)
WORDS = TEXT.filter(str.strip)
PROBES = st.lists(st.builds(probe, TEXT | st.lists(TEXT | st.lists(TEXT, max_size=3), max_size=3), WORDS), max_size=3)
GROUPS = st.dictionaries(st.sampled_from(["Reasoning", "Subject_Aliasing", "Forgetfulness"]), PROBES)


@given(st.sampled_from([CounterFact(), Recent(), ZsRE()]), WORDS, GROUPS, GROUPS)
def test_every_probe_is_kept_or_counted(task: Task, target: str, portability: Any, locality: Any) -> None:
    (record,), report = build(task, [fact(target_new=target, portability=portability, locality=locality)])
    lost = report.dropped["probe without an answer"] + report.dropped["probe answer equals the target"]
    groups = [*portability.values(), *locality.values()]
    assert len(record.of("portability", "locality")) + lost == sum(map(len, groups))
    assert report.dropped["probe group empty"] == groups.count([])


@needs_real_data
@pytest.mark.parametrize(
    ("task", "file", "kept", "dropped", "noted"),
    [
        (
            "counterfact",
            "counterfact/train_cf.json",
            1411,
            {"duplicate edit": 11, "target equals the old answer": 6},
            {},
        ),
        ("counterfact", "counterfact/test_cf_first100.json", 100, {"leading empty alias list": 5}, {}),
        (
            "recent",
            "recent/recent_train.json",
            570,
            {"probe answer equals the target": 151, "probe group empty": 35},
            {},
        ),
        ("recent", "recent/recent_test_first100.json", 100, {"probe answer equals the target": 54}, {}),
        ("zsre", "zsre/zsre_mend_eval_portability_gpt4_first40.json", 40, {}, {"contains the target": 9}),
        ("zsre", "zsre/ZsRE-test-all_disjoint200.json", 186, {"target equals the old answer": 14}, {}),
        ("convsent", "convsent/blender_val.json", 7211, {"repeated reply": 30}, {"entity that comes again": 1}),
        ("convsent", "convsent/blender_test_first60.json", 558, {"repeated reply": 2}, {}),
    ],
)
def test_real_files(task: str, file: str, kept: int, dropped: dict[str, int], noted: dict[str, int]) -> None:
    records, report = load_records(task, str(REAL / file), "train")
    assert len(records) == len({r.id for r in records}) == report.kept == kept
    assert dropped.items() <= report.dropped.items()
    assert {next(k for k in report.noted if part in k): n for part, n in noted.items()}.items() <= report.noted.items()
