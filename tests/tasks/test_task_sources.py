"""Where raw records come from: files and folders of every kind, the embedded data, the hub."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from instructedit.errors import UserError
from instructedit.tasks import Task, load_records
from instructedit.tasks.counterfact import CounterFact

ROWS = [{"prompt": f"The moon of Zor {i} is", "target_new": "Umi\u2028I", "locality": {}} for i in range(3)]
LIST = json.dumps(ROWS, indent=1).encode()
LINES = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode() + b"\n"


@pytest.mark.parametrize(
    "name", ["train.json", "a.jsonl", "A.JSON", "a.json.gz", "a.json.xz", "a.jsonl.gz", "a.jsonl.xz"]
)
def test_every_kind_of_file(name: str, tmp_path: Path) -> None:
    pack: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".xz": lzma.compress}
    path = tmp_path / name
    content = pack.get(path.suffix, bytes)(LINES if ".jsonl" in name else LIST)
    path.write_bytes(content)
    records, report = load_records("counterfact", str(path), "val")
    assert [r.id for r in records] == [f"counterfact/val/{i}" for i in range(3)]
    assert records[0].request.target == "Umi\u2028I"
    assert (report.read, report.kept, report.source) == (3, 3, str(path))
    assert report.fingerprint == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("split", "chosen"), [("train", "train.json"), ("val", "moons_val.jsonl"), ("test", "test.json.gz")]
)
def test_a_folder_has_one_file_for_a_split(split: str, chosen: str, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_bytes(LIST)
    (tmp_path / "moons_train.json").write_bytes(LIST)
    (tmp_path / "moons_val.jsonl").write_bytes(LINES)
    (tmp_path / "eval.json").write_bytes(LIST)
    (tmp_path / "test.json.gz").write_bytes(gzip.compress(LIST))
    (tmp_path / "test.txt").write_text("notes")
    assert load_records("counterfact", str(tmp_path), split)[1].source == str(tmp_path / chosen)


def test_a_file_that_starts_with_the_split_comes_before_one_that_has_it_further_on(tmp_path: Path) -> None:
    for name in ("train_moons.json", "other_moons_train.json", "moons_test.json"):
        (tmp_path / name).write_bytes(LIST)
    assert load_records("counterfact", str(tmp_path), "train")[1].source == str(tmp_path / "train_moons.json")
    assert load_records("counterfact", str(tmp_path), "test")[1].source == str(tmp_path / "moons_test.json")
    (tmp_path / "train_suns.json").write_bytes(LIST)
    with pytest.raises(UserError, match=r"there is: train_moons\.json, train_suns\.json"):
        load_records("counterfact", str(tmp_path), "train")


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (
            ["a_train.json", "b_train.json"],
            "more than one file for split 'train'; there is: a_train.json, b_train.json",
        ),
        (["train.json", "train.jsonl"], "more than one file for split 'train'; there is: train.json, train.jsonl"),
        (["notes.txt", "test.json"], "no file for split 'train'; there is: notes.txt, test.json"),
        ([], "no file for split 'train'; there is: nothing"),
        ([f"{i:03}.txt" for i in range(99)], "019.txt, ..."),
    ],
)
def test_a_folder_that_does_not_settle_the_file(names: list[str], problem: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(LIST)
    with pytest.raises(UserError) as caught:
        load_records("counterfact", str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert str(caught.value).endswith(problem)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", b'[{"prompt": "x"},\n {"prompt" 3}]', ": wrong JSON at line 2, column 12: "),
        ("a.json", b"", ": wrong JSON at line 1, column 1: "),
        ("a.jsonl", b'{"prompt": "x"}\n\n{"prompt": \n', ": wrong JSON at line 3, column "),
        ("a.json", b"[" * 100_000, ": JSON from line 1 cannot be read: "),
        ("a.jsonl", b"{}\n" + b"7" * 5000, ": JSON from line 2 cannot be read: "),
        ("a.json", b'{"prompt": "x"}', ": expected a list of objects, got dict"),
        ("a.json", b'[{"prompt": "x"}, 7]', ", record 1: expected an object, got int"),
        ("a.json", b'["\xff"]', ": not UTF-8 text at byte 2"),
        ("a.json.gz", LIST, ": cannot be read: "),
        ("a.json.xz", LIST, ": cannot be read: "),
        ("a.json.gz", gzip.compress(LIST)[:-9], ": cannot be read: "),
        ("a.csv", b'prompt,target_new\n"a\nb",c\n"d" e,f\n', ": wrong CSV at line 4: "),
        ("a.tsv", b"prompt,target_new", ": not a .json or .jsonl file"),
        ("a.json", b'[{"prompt": "x"}]', ", record 0: field 'target_new' is missing"),
    ],
)
def test_a_file_that_is_wrong_is_named(name: str, content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_records("counterfact", str(path))
    assert str(caught.value).startswith(f"{path}{problem}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"[]", b'[{"prompt": "x", "target_new": "y", "ground_truth": "y"}]'])
def test_a_file_without_an_edit_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^no records left: counterfact train from .*a.json: [01] records read"):
        load_records("counterfact", str(path))


@pytest.mark.parametrize(
    "source", ["data/none.json", "none", "/no/where", "~/no/where", "./no/where/x", "owner/none.jsonl.xz"]
)
def test_a_missing_file_is_named(source: str) -> None:
    with pytest.raises(UserError, match=rf"^{source}: no such file or folder$"):
        load_records("counterfact", source)


@pytest.mark.parametrize("source", ["x" * 5000, "~no-such-user/x"])
def test_a_path_that_cannot_be_looked_up(source: str) -> None:
    with pytest.raises(UserError, match=f"^{source}: cannot be read: "):
        load_records("counterfact", source)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.json").write_bytes(LIST)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"a\.json: cannot be read: Permission denied$"):
        load_records("counterfact", str(tmp_path / "a.json"))


def hub(monkeypatch: pytest.MonkeyPatch, **splits: list[dict[str, Any]]) -> None:
    def load(name: str, split: str) -> datasets.Dataset:
        if split not in splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
        return datasets.Dataset.from_list(splits[split])

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_the_hub_fills_absent_fields_with_nulls(monkeypatch: pytest.MonkeyPatch) -> None:
    far = {"Reasoning": [{"prompt": "Its colour is", "ground_truth": [["red", "rot"]]}]}
    rows = [fact | {"portability": far if i else {"Other": []}} for i, fact in enumerate(ROWS)]
    hub(monkeypatch, train=rows, validation=rows[:1])
    records, report = load_records("counterfact", "owner/moons")
    assert [p.answers for p in records[1].probes] == [("red", "rot")]
    assert (report.source, report.kept, len(report.fingerprint)) == ("owner/moons", 3, 64)
    assert report.fingerprint == load_records("counterfact", "owner/moons")[1].fingerprint
    assert load_records("counterfact", "owner/moons", "val")[0][0].id == "counterfact/val/0"


def test_a_hub_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, train=ROWS)
    for split in ("test", "val"):
        with pytest.raises(UserError, match=rf"^hub dataset 'owner/moons', split '{split}': Unknown split"):
            load_records("counterfact", "owner/moons", split)

    def fail(name: str, split: str) -> datasets.Dataset:
        raise ConnectionError(f"cannot reach\n{name}")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"^hub dataset 'owner/moons', split 'train': cannot reach owner/moons"):
        load_records("counterfact", "owner/moons")


def test_the_embedded_data_go_by_task_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = types.ModuleType("instructedit.testbed.datasets")
    tiny.raw_records = lambda task, split: [ROWS[0] | {"subject": f"{task} {split}"}]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, tiny.__name__, tiny)
    (record,), report = load_records("counterfact", split="test")
    assert record.request.subject == "counterfact test"
    assert record.id == "counterfact/test/0"
    assert report.source == "tiny"
    assert len(report.fingerprint) == 64


def test_a_task_by_name_or_ready_made(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_bytes(LIST)
    assert load_records(CounterFact(), str(tmp_path)) == load_records("counterfact", str(tmp_path))
    with pytest.raises(UserError, match=r"^unknown task 'moons'; there are: .*counterfact"):
        load_records("moons", str(tmp_path))
    with pytest.raises(UserError, match=r"^task 'counterfact': options go to its constructor: cases"):
        load_records(CounterFact(), str(tmp_path), cases=3)


def test_a_new_class_is_a_new_task(tmp_path: Path) -> None:
    class Moons(CounterFact):
        name = "moons"

    (tmp_path / "train.json").write_bytes(LIST)
    assert load_records("moons", str(tmp_path))[0][0].id == "moons/train/0"
    assert issubclass(Moons, Task)


def test_importing_the_tasks_is_light() -> None:
    code = "import sys, instructedit.tasks as t; t.task_names(); print({'torch', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
