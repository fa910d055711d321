"""Task cards: what a language model is told about a task before it describes it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from instructedit.errors import UserError
from instructedit.records import EditRecord

#: Folder with one file for each task: ``edits: <what the task edits>``.
CARDS = Path(__file__).parent / "cards"

FIELDS = {
    "prompt": "what the edited model is asked",
    "target": "what it should say after the edit",
    "subject": "the entity that the edit is about",
}


@dataclass(frozen=True)
class TaskCard:
    """Summary of a task in words, with a few of its training records.

    Attributes:
        task: Name of the task.
        title: Title of the task, as instructions show it.
        edits: What the task edits, in one or two sentences.
        slots: Names of the slots that every description must have.
        examples: A few training records.
    """

    task: str
    title: str
    edits: str
    slots: tuple[str, ...]
    examples: tuple[EditRecord, ...]

    @classmethod
    def make(
        cls,
        task: str,
        title: str,
        train: Sequence[EditRecord],
        about: str | None = None,
        examples: int = 3,
        seed: int = 0,
    ) -> TaskCard:
        """Makes the card of a task.

        Args:
            task: Name of the task.
            title: Title of the task, as instructions show it.
            train: Its training records: the examples are drawn from them, and their slots are the task's.
            about: What the task edits; by default the text in ``cards/<task>.yaml``.
            examples: Number of examples to show.
            seed: Seed of the draw.

        Raises:
            UserError: If nothing says what the task edits.
        """
        drawn = random.Random(seed).sample(list(train), min(examples, len(train)))
        slots = sorted(set.intersection(*(set(record.request.slots) for record in train)))
        return cls(task, title, about or _packaged(task), tuple(slots), tuple(drawn))

    def __str__(self) -> str:
        """Returns the card as a prompt shows it."""
        lines = [f"Task: {self.title}", f"What it edits: {self.edits}", "Fields of a record:"]
        lines += [f"- {name}: {meaning}" for name, meaning in FIELDS.items()]
        lines += [f"- [{slot}]: a slot of the description, filled for each record" for slot in self.slots]
        lines += ["Example records:"]
        for record in self.examples:
            request = record.request
            values = {"prompt": request.prompt, "target": request.target, "subject": request.subject}
            values |= {f"[{slot}]": request.slots[slot] for slot in self.slots}
            lines.append("- " + "; ".join(f"{name}: {value}" for name, value in values.items() if value))
        return "\n".join(lines)


def _packaged(task: str) -> str:
    for file in CARDS.glob("*.yaml"):
        if file.stem == task:
            return " ".join(yaml.safe_load(file.read_text(encoding="utf-8"))["edits"].split())
    raise UserError(f"task {task!r} has no card ({CARDS.name}/{task}.yaml): say what it edits with --about")
