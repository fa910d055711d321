"""The forms that public datasets have, each seen by its fields: flat, ROME's, MQuAKE's, RippleEdits'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tasks.test_readers import asked

from instructedit.errors import UserError
from instructedit.records import EditRecord
from instructedit.reports import read_cases
from instructedit.tasks import LoadReport, load_records
from instructedit.tasks.folder import recognised

FLAT = {"prompt": "The moon of Zor is", "target_new": "Umi", "subject": "Zor", "ground_truth": "Ota", "case_id": 3}
EASYEDIT = FLAT | {
    "rephrase_prompt": "Zor's moon is",
    "locality_prompt": "The moon of Rik is",
    "locality_ground_truth": "Ela",
    "portability_prompt": "The colour of Zor's moon is",
    "portability_ground_truth": "red",
}
ROME = {
    "case_id": 1,
    "requested_rewrite": {
        "prompt": "The moon of {} is",
        "relation_id": "P1",
        "target_new": {"str": "Umi", "id": "Q1"},
        "target_true": {"str": "Ota", "id": "Q2"},
        "subject": "Zor",
    },
    "paraphrase_prompts": ["So. Zor's moon is", " "],
    "neighborhood_prompts": ["The moon of Rik is"],
    "attribute_prompts": ["x"],
    "generation_prompts": ["y"],
}
MQUAKE = {
    "case_id": 1,
    "requested_rewrite": [ROME["requested_rewrite"] | {"question": "Which is the moon of Zor?"}],
    "questions": ["Which colour has Zor's moon?"],
    "new_answer": "red",
    "new_answer_alias": ["crimson"],
}


def query(prompt: str, *answers: str) -> dict[str, Any]:
    values = [{"value": each, "aliases": [each.upper()]} for each in answers]
    return {"test_queries": [{"prompt": prompt, "answers": values}], "condition_queries": [{}], "test_condition": "OR"}


RIPPLE = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the moon of What is Zor is New Umi.",
        "target_id": "Q1",
        "original_fact": {"prompt": "The name of the moon of What is Zor is New Ota.", "target_id": "Q2"},
    },
    "Relation_Specificity": [query("The colour of Zor is", "red")],
    "Subject_Aliasing": [query("The name of the moon of Zorro is", "New Umi")],
    "Logical_Generalization": [query("Umi is the moon of", ""), query("Umi moves round", "Zor", "Zar")],
    "Compositionality_I": [],
}


def read(task: str, rows: list[Any], tmp_path: Path) -> tuple[list[EditRecord], LoadReport]:
    (tmp_path / "a.json").write_text(json.dumps(rows))
    return load_records(task, str(tmp_path / "a.json"), "test")


def test_each_form_is_seen_by_its_fields():
    knowedit = FLAT | {"locality": {}}
    mend = {"src": "q", "alt": "a", "loc": "b", "loc_ans": "c"}
    rows = [FLAT, EASYEDIT, {"prompt": "p", "target": "t"}, knowedit, mend, ROME, MQUAKE, RIPPLE, {"ent": 1}]
    names = ["flat"] * 3 + ["counterfact", "zsre", "rome", "mquake", "rippleedits", None]
    assert [recognised(row) for row in rows] == names


def test_the_flat_form_of_easyedit(tmp_path):
    (record,), report = read("flat", [EASYEDIT], tmp_path)
    assert (record.request.prompt, record.request.target, record.request.subject) == (
        "The moon of Zor is",
        "Umi",
        "Zor",
    )
    assert asked(record) == [
        ("generalization", "rephrase", "Zor's moon is", ("Umi",)),
        ("portability", "", "The colour of Zor's moon is", ("red",)),
        ("locality", "", "The moon of Rik is", ("Ela",)),
    ]
    assert not report.noted
    assert not report.dropped


@pytest.mark.parametrize("task", ["counterfact", "recent", "zsre"])
def test_the_tasks_of_knowedit_read_easyedits_flat_form_too(task, tmp_path):
    """Their locality would be lost, and a test without locality looks as good as one that keeps all."""
    row = {name: value for name, value in EASYEDIT.items() if not name.startswith("portability")}
    (record,), report = read(task, [row], tmp_path)
    assert (record.request.task, record.id) == (task, f"{task}/test/0")
    assert asked(record) == [
        ("generalization", "rephrase", "Zor's moon is", ("Umi",)),
        ("locality", "", "The moon of Rik is", ("Ela",)),
    ]
    assert report.noted == {"record without portability": 1}
    with pytest.raises(UserError, match=r"a\.json.*'locality_prompt' has 1 prompts .* 0 answers"):
        read(task, [{name: value for name, value in row.items() if name != "locality_ground_truth"}], tmp_path)


def test_a_file_of_both_forms_keeps_its_aliases_and_counts_what_is_not_read(tmp_path):
    alias = {"Subject_Aliasing": [{"prompt": "The moon of Zorro is", "ground_truth": "Umi"}]}
    rows = [FLAT | {"portability": alias}, FLAT | {"prompt": "other", "locality_prompt": "x"}]
    (first, _), report = read("counterfact", rows, tmp_path)
    assert ("generalization", "Subject_Aliasing", "The moon of Zorro is", ("Umi",)) in asked(first)
    assert report.noted["field 'locality_prompt' that is not read"] == 1


def test_probes_of_the_flat_form_come_in_many_shapes(tmp_path):
    pairs = {"locality": ["a", "b"], "locality_answer": [["x", "y"], "z"]}
    objects = {"locality": [{"loc": "a", "loc_ans": "x"}, {"prompt": "b", "answer": ["z", ""]}]}
    groups = {"locality": {"Near": [{"prompt": "a", "ground_truth": "x"}], "Far": []}}
    aliases = {"locality": "a", "locality_answer": ["x", "y"]}
    rows = [{"prompt": f"p{i}", "target": "t"} | more for i, more in enumerate((pairs, objects, groups, aliases))]
    records, report = read("flat", rows, tmp_path)
    assert [[(p.group, p.prompt, p.answers) for p in record.probes] for record in records] == [
        [("", "a", ("x", "y")), ("", "b", ("z",))],
        [("", "a", ("x",)), ("", "b", ("z",))],
        [("Near", "a", ("x",))],
        [("", "a", ("x", "y"))],
    ]
    assert report.dropped == {"blank answer": 1}


def test_a_table(tmp_path):
    (tmp_path / "a.csv").write_text(
        'prompt,target,rephrase,locality,locality_answer\np,"t, u",q|r,a|b,x|y\nv,w,,,\n', encoding="utf-8-sig"
    )
    first, second = load_records("flat", str(tmp_path / "a.csv"))[0]
    assert first.request.target == "t, u"
    assert [(p.prompt, p.answers) for p in first.probes] == [
        ("q", ("t, u",)), ("r", ("t, u",)), ("a", ("x",)), ("b", ("y",)),
    ]  # fmt: skip
    assert second.probes == ()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"target": "Ota"}, "'target' and 'target_new' mean the same|'target_new' and 'target' mean"),
        (
            {"locality": ["a", "b"], "locality_answer": ["x"]},
            "'locality' has 2 prompts and 'locality_answer' 1 answers",
        ),
        ({"locality": "a"}, "'locality' has 1 prompts and 'locality_answer' 0 answers"),
        ({"locality": [" "], "locality_answer": ["x"]}, r"field 'locality\[0\]' is empty"),
        ({"locality": [{"prompt": "a"}]}, r"field 'locality\[0\]\.answer' is missing"),
        ({"target_new": 3}, "field 'target_new': expected text, got int"),
    ],
)
def test_a_flat_record_that_is_wrong_is_named(row, said, tmp_path):
    with pytest.raises(UserError, match=rf"a\.json, record 1: .*({said})"):
        read("flat", [FLAT, FLAT | row], tmp_path)


def test_fields_that_no_reader_knows_are_counted_by_name(tmp_path):
    _, report = read("flat", [FLAT | {"localty": "x"}, FLAT | {"prompt": "other", "localty": "y", "mood": 1}], tmp_path)
    assert report.noted["field 'localty' that is not read"] == 2
    assert report.noted["field 'mood' that is not read"] == 1
    _, report = read("counterfact", [FLAT | {"locality": {}, "locality_prompt": "x"}], tmp_path)
    assert report.noted["field 'locality_prompt' that is not read"] == 1


def test_a_field_that_stands_twice_is_an_error(tmp_path):
    (tmp_path / "a.json").write_text('[{"prompt": "p", "target": "t", "prompt": "q"}]')
    with pytest.raises(UserError, match=r"a\.json: JSON from line 1: field 'prompt' stands twice in one object"):
        load_records("flat", str(tmp_path / "a.json"))


def test_rome(tmp_path):
    (record,), report = read("rome", [ROME], tmp_path)
    assert (record.request.prompt, record.request.target, record.request.subject) == (
        "The moon of Zor is",
        "Umi",
        "Zor",
    )
    assert asked(record) == [
        ("generalization", "paraphrase", "So. Zor's moon is", ("Umi",)),
        ("locality", "Neighborhood", "The moon of Rik is", ("Ota",)),
    ]
    assert report.dropped == {"blank prompt": 1}


def test_mquake_makes_an_edit_of_each_rewrite(tmp_path):
    (record,), report = read("mquake", [MQUAKE], tmp_path)
    assert record.request.prompt == "The moon of Zor is"
    assert asked(record) == [
        ("generalization", "question", "Which is the moon of Zor?", ("Umi",)),
        ("portability", "Multi_Hop", "Which colour has Zor's moon?", ("red", "crimson")),
    ]
    other = MQUAKE["requested_rewrite"][0] | {"subject": "Rik"}
    records, report = read("mquake", [MQUAKE | {"requested_rewrite": [*MQUAKE["requested_rewrite"], other]}], tmp_path)
    assert [(r.id, r.cluster, r.request.subject) for r in records] == [
        ("mquake/test/0/0", "mquake/test/0", "Zor"), ("mquake/test/0/1", "mquake/test/0", "Rik"),
    ]  # fmt: skip
    assert not any(record.of("portability") for record in records)
    assert report.dropped == {"question that takes several edits": 1}


def test_rippleedits(tmp_path):
    (record,), report = read("rippleedits", [RIPPLE], tmp_path)
    assert (record.request.prompt, record.request.target) == ("The name of the moon of What is Zor is", "New Umi")
    assert asked(record) == [
        ("generalization", "Subject_Aliasing", "The name of the moon of Zorro is", ("New Umi", "NEW UMI")),
        ("locality", "Relation_Specificity", "The colour of Zor is", ("red", "RED")),
        ("portability", "Subject_Aliasing", "The name of the moon of Zorro is", ("New Umi", "NEW UMI")),
        ("portability", "Logical_Generalization", "Umi moves round", ("Zor", "ZOR", "Zar", "ZAR")),
    ]
    assert report.dropped == {"probe without an answer": 1}
    assert report.noted == {"test whose condition queries are not asked": 4}


def test_a_sentence_of_rippleedits_that_cannot_be_parted_is_counted(tmp_path):
    named = RIPPLE | {"edit": {"prompt": "Zor has the moon Umi.", "target": "Umi", "subject": "Zor"}}
    rows = [named, RIPPLE | {"edit": {"prompt": "Zor has the moon Umi."}}]
    (record,), report = read("rippleedits", rows, tmp_path)
    assert (record.request.prompt, record.request.target, record.request.subject) == ("Zor has the moon", "Umi", "Zor")
    assert report.dropped["edit whose sentence cannot be parted into prompt and target"] == 1
    same = RIPPLE["edit"] | {"prompt": RIPPLE["edit"]["original_fact"]["prompt"]}
    with pytest.raises(UserError, match="target equals the old answer"):
        read("rippleedits", [RIPPLE | {"edit": same}], tmp_path)


def test_files_of_these_forms_are_requests_too(tmp_path):
    for number, row in enumerate((ROME, MQUAKE, RIPPLE)):
        (tmp_path / f"{number}.json").write_text(json.dumps([row]))
        (case,) = read_cases(tmp_path / f"{number}.json")
        assert case.request.target in ("Umi", "New Umi")
        assert len(case.paraphrases) == 1


def test_a_target_of_rippleedits_is_no_part_of_a_word(tmp_path):
    edit = {"prompt": "The name of the moon of Zor is Umi.", "target": "i"}
    (record,), _ = read("rippleedits", [RIPPLE | {"edit": edit}], tmp_path)
    assert (record.request.prompt, record.request.target) == ("The name of the moon of Zor is", "Umi")


@pytest.mark.parametrize("task", ["flat", "counterfact", "recent", "zsre"])
def test_a_cell_of_a_table_holds_several_texts_whatever_the_task(task, tmp_path):
    lines = [
        "prompt,target_new,rephrase,locality_prompt,locality_ground_truth",
        "Zor is,Umi,Zor|It,Rik is|Ral is,Ela|Ota",
    ]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    (record,), _ = load_records(task, str(tmp_path / "a.csv"))
    assert [probe.prompt for probe in record.of("generalization", "locality")] == ["Zor", "It", "Rik is", "Ral is"]
