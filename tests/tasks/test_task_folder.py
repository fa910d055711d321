"""A task of one's own: what a folder with a task.yaml means, and what it is told where it is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from instructedit.cli import main
from instructedit.data.module import EditData, TaskSource
from instructedit.errors import UserError
from instructedit.instructions import InstructionBank
from instructedit.reports import read_cases
from instructedit.tasks import find_task, load_records, task_name, task_title

ROWS = [{"q": f"The moon of Zor {i} is", "a": f"Umi {i}", "again": [f"Zor {i}'s moon?"]} for i in range(10)]
SPEC = {
    "title": "Moons",
    "fields": {"prompt": "q", "target": "a", "rephrase": "again"},
    "splits": {"train": "moons.json[:60%]", "val": "moons.json[60%:80%]", "test": "moons.json[-2:]"},
}


def folder(tmp_path: Path, spec: object = None, rows: object = ROWS, name: str = "moons") -> Path:
    place = tmp_path / name
    place.mkdir()
    (place / "task.yaml").write_text(yaml.safe_dump(SPEC if spec is None else spec))
    (place / "moons.json").write_text(json.dumps(rows))
    return place


def test_a_folder_is_a_task_by_its_path(tmp_path, monkeypatch):
    place = folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    for path in (str(place), "moons", "./moons", "moons/task.yaml"):
        assert (task_name(path), task_title(path)) == ("moons", "Moons")
    records, report = load_records("moons", split="train")
    assert [r.request.prompt for r in records] == [f"The moon of Zor {i} is" for i in range(6)]
    assert (report.read, report.kept, report.task) == (10, 6, "moons")
    test = load_records("moons", split="test")[0]
    assert [r.id for r in test] == ["moons/test/8", "moons/test/9"]
    assert test[0].task == "moons"
    assert [(p.kind, p.prompt, p.answers) for p in test[0].probes] == [("generalization", "Zor 8's moon?", ("Umi 8",))]
    assert len(load_records("moons", split="train[:2]")[0]) == 2
    assert [case.request.target for case in read_cases("moons")] == ["Umi 8", "Umi 9"]


def test_without_splits_a_file_is_named_after_each(tmp_path):
    place = folder(tmp_path, {"title": "Moons", "fields": SPEC["fields"], "name": "other"})
    (place / "moons.json").rename(place / "train.json")
    assert load_records(str(place))[0][0].id == "other/train/0"
    with pytest.raises(UserError, match="no file for split 'val'"):
        load_records(str(place), split="val")


def test_a_format_is_seen_or_given(tmp_path):
    knowedit = {"prompt": "The moon of Zor is", "target_new": "Umi", "locality": {"G": []}}
    spec = {"title": "Moons", "splits": {"train": "moons.json"}}
    place = folder(tmp_path, spec, [knowedit])
    records, report = load_records(str(place))
    assert (records[0].id, report.dropped) == ("moons/train/0", {"probe group empty": 1})
    (place / "moons.json").write_text(json.dumps([{"ent": "Zor", "pos": ["good", "fine"], "neg": ["bad"]}]))
    (place / "task.yaml").write_text(yaml.safe_dump(spec | {"options": {"labels": "both"}}))
    assert {r.request.target for r in load_records(str(place))[0]} == {"good", "fine", "bad"}
    (place / "task.yaml").write_text(yaml.safe_dump(spec | {"format": "recent"}))
    with pytest.raises(UserError, match=r"moons.json, record 0: field 'target_new' is missing"):
        load_records(str(place))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, "title"),
        ([1], "expected keys and values"),
        (SPEC | {"titel": "x"}, "titel"),
        (SPEC | {"splits": {"dev": "a.json"}}, "splits: unknown split 'dev'"),
        (SPEC | {"fields": {"promt": "q"}}, "fields: unknown field 'promt' (did you mean 'prompt'?)"),
        (SPEC | {"fields": {}, "format": "rom"}, "format: unknown format 'rom' (did you mean 'rome'?)"),
        (SPEC | {"format": "rome"}, "fields: the format 'rome' has its own"),
        (SPEC | {"name": "Big Moons"}, "'Big Moons' cannot be a task's name"),
        (SPEC | {"name": "zsre"}, "there is a task 'zsre' already"),
        (SPEC | {"bank": "none.yaml"}, "none.yaml: cannot be read"),
        (SPEC | {"splits": {"val": "moons.json"}}, "splits: there is no 'train', only: val"),
        (SPEC | {"fields": {}}, "record 0: fields of no known format (q, a, again)"),
        ({"title": "Moons", "splits": SPEC["splits"], "format": "zsre", "options": {"x": 1}}, "options: "),
    ],
)
def test_what_is_wrong_is_one_line_with_its_place(tmp_path, spec, said):
    place = folder(tmp_path, spec)
    with pytest.raises(UserError) as error:
        load_records(str(place))
    assert said in str(error.value)
    assert str(place) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no folder with a task.yaml; instructedit new-task"):
        load_records(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"options go to its task\.yaml"):
        load_records(str(folder(tmp_path)), cases=1)


def test_the_example_runs_and_is_not_overwritten(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["new-task", "myown", "--title", 'My "own"']) == 0
    assert "next: instructedit fit --scale tiny --editor instructedit --task myown" in capsys.readouterr().out
    sizes = {}
    for split in ("train", "val", "test"):
        records, report = load_records("myown", split=split)
        sizes[split] = len(records)
        assert not report.dropped
        assert {"generalization", "locality"} <= {p.kind for record in records for p in record.probes}
        assert not any("not read" in remark for remark in report.noted)
    assert sizes == {"train": 36, "val": 12, "test": 12}
    bank = InstructionBank.for_task(find_task("myown").name)
    assert (bank.task, len(bank.split("train")), len(bank.split("heldout"))) == ('My "own"', 3, 1)
    before = (tmp_path / "myown" / "facts.csv").read_bytes()
    assert main(["new-task", "myown"]) == 2
    assert "cannot be made: File exists" in capsys.readouterr().err
    assert (tmp_path / "myown" / "facts.csv").read_bytes() == before
    assert main(["new-task", "Two words"]) == 2
    assert not (tmp_path / "Two words").exists()


def test_records_that_are_trained_on_too_are_counted_in_a_warning(tmp_path):
    rows = [*ROWS, ROWS[0]]
    spec = SPEC | {"splits": {"train": "moons.json[:9]", "val": "moons.json[-3:]", "test": "moons.json[8:]"}}
    place = str(folder(tmp_path, spec, rows))
    data = EditData(train=[TaskSource(place)])
    with pytest.warns(UserWarning, match="2 of 3 records of 'moons' to validate are trained on, too"):
        data.setup("fit")
    assert data.titles == {"moons": "Moons"}
    for given in ([TaskSource(place)], []):  # a test by itself looks at the training records where it can
        data = EditData(train=given, test=[TaskSource(place)])
        if given:
            with pytest.warns(UserWarning, match="1 of 2 records of 'moons' to test are trained on, too"):
                data.setup("test")
        else:
            data.setup("test")


def test_one_file_for_train_and_test_takes_parts(tmp_path):
    file = tmp_path / "facts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": row["q"], "target": row["a"]}) for row in ROWS))
    parts = [load_records("flat", str(file), split)[0] for split in ("train[:80%]", "test[80%:]")]
    assert [len(part) for part in parts] == [8, 2]
    assert not {r.request.prompt for r in parts[0]} & {r.request.prompt for r in parts[1]}
    with pytest.raises(UserError, match="no records left"):
        load_records("flat", str(file), "test[10:]")
    with pytest.raises(UserError, match=r"'test\[10' is no split"):
        load_records("flat", str(file), "test[10")


@pytest.mark.parametrize("form", ["counterfact", "recent", "zsre"])
def test_a_format_reads_the_flat_form_as_the_task_of_that_name_does(tmp_path, form):
    flat = {"prompt": "Zor is", "target_new": "Umi", "locality_prompt": "Rik is", "locality_ground_truth": "Ela"}
    place = folder(tmp_path, {"title": "Moons", "splits": {"train": "moons.json"}, "format": form}, [flat])
    (record,), report = load_records(str(place))
    assert [(probe.prompt, probe.answers) for probe in record.of("locality")] == [("Rik is", ("Ela",))]
    assert (record.task, report.noted) == ("moons", {"record without portability": 1})
