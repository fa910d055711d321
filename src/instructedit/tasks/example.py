"""Example of a user's own task: a folder that runs as it is, to be filled with other records."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from instructedit.errors import UserError
from instructedit.tasks.csv_files import SEPARATOR
from instructedit.tasks.folder import FILE, TaskFolder
from instructedit.testbed.datasets import raw_records

RECORDS = 60  # in the example
_COLUMNS = (
    "prompt", "target", "subject", "old", "rephrase", "locality", "locality_answer", "portability",
    "portability_answer",
)  # fmt: skip

_TASK = """\
# A task of your own. Its records are in facts.csv; docs/how-to/own-data.md explains every key.
title: {title}  # what instructions and tables call it
bank: bank.yaml  # descriptions for editors that read instructions; without this line the task has none
splits:  # split to file, or a part of one; also three files: {{train: train.jsonl, val: val.jsonl, test: test.jsonl}}
  train: "facts.csv[:60%]"
  val: "facts.csv[60%:80%]"
  test: "facts.csv[80%:]"
# Fields that have other names in your file, for instance:
# fields: {{prompt: question, target: new_answer, rephrase: [paraphrase_1, paraphrase_2]}}
"""

_BANK = """\
# What the task edits, each time in other words: one sentence stands in front of a request. Training and tests draw from
# those marked train; --model.evaluation.descriptions heldout tests with the other.
task: {title}
version: 1
descriptions:
  - {{id: own-1, split: train, text: "Change what the model says of one fact about the subject."}}
  - {{id: own-2, split: train, text: "The statement gets a new ending; keep everything else as it was."}}
  - {{id: own-3, split: train, text: "Give the new answer wherever this fact is asked for."}}
  - {{id: own-4, split: heldout, text: "Replace a known fact by the one that is given here."}}
"""


def write_example(folder: str | Path, title: str | None = None) -> Path:
    """Writes ``task.yaml``, ``facts.csv`` and ``bank.yaml`` into a new folder.

    Args:
        folder: The new folder; its name becomes the task's.
        title: Title of the task in tables and instructions; the folder's name by default.

    Raises:
        UserError: If there is such a folder or file already, or its name cannot be a task's.
    """
    place = Path(folder).expanduser()
    TaskFolder.check_name(place.resolve().name.lower(), str(place))
    try:
        place.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}; give another name") from error
    called = json.dumps(title or place.resolve().name, ensure_ascii=False)
    for name, text in ((FILE, _TASK), ("bank.yaml", _BANK)):
        (place / name).write_text(text.format(title=called), encoding="utf-8")
    with (place / "facts.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(map(_row, raw_records("counterfact", "train")[:RECORDS]))
    return place


def _row(record: dict[str, object]) -> dict[str, object]:
    """Converts a record of KnowEdit's form to a line of the flat form, with its first probes."""
    row = {"prompt": record["prompt"], "target": record["target_new"], "subject": record["subject"]}
    row |= {"old": record["ground_truth"], "rephrase": _cell(record.get("rephrase", []))}
    for kind in ("locality", "portability"):
        groups = record[kind]
        assert isinstance(groups, dict)
        probes = [items[0] for items in groups.values() if items][:2]
        row[kind] = _cell([probe["prompt"] for probe in probes])
        row[f"{kind}_answer"] = _cell([_first(probe["ground_truth"]) for probe in probes])
    return row


def _cell(texts: object) -> str:
    return SEPARATOR.join(texts) if isinstance(texts, list) else str(texts)


def _first(answers: object) -> str:
    while isinstance(answers, list):
        answers = answers[0]
    return str(answers)
