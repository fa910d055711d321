"""Descriptions of a task by a language model: requested, checked, ranked, and assigned to the splits of a bank."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml

from instructedit.errors import UserError
from instructedit.instructions import Description, InstructionBank, Provenance
from instructedit.instructions.bank import SLOTS, VERSION
from instructedit.writing import prompts
from instructedit.writing.card import TaskCard
from instructedit.writing.checks import Rules
from instructedit.writing.clients import Writer
from instructedit.writing.files import write_whole
from instructedit.writing.ranking import quality

#: Rounds in which a model is asked for missing descriptions.
ROUNDS = 3
_FAULTS = 10  # faults that a model's prompt lists


@dataclass(frozen=True)
class Plan:
    """Numbers of descriptions to write and to keep, by kind.

    Attributes:
        n: Descriptions to write (paper: 20).
        keep: Descriptions to keep for training, the last of them held out (paper: 10).
        unseen: Further descriptions, for the transfer test (paper: 5).
        seed: Seed of the questions and of the splits.
        judge: Whether the model grades clarity and concision too.

    Raises:
        UserError: If the numbers do not fit together.
    """

    n: int = 20
    keep: int = 10
    unseen: int = 5
    seed: int = 0
    judge: bool = False

    def __post_init__(self) -> None:
        if self.keep < 2 or self.unseen < 0:
            raise UserError(f"keep must be at least 2 and unseen at least 0, got {self.keep} and {self.unseen}")
        if self.n < self.needed:
            raise UserError(f"n = {self.n} descriptions are too few to keep {self.keep} and {self.unseen} unseen ones")

    @property
    def needed(self) -> int:
        """Number of descriptions in the bank."""
        return self.keep + self.unseen


@dataclass(frozen=True)
class Written:
    """The model's usable descriptions, and a count of those that were refused.

    Attributes:
        usable: Descriptions that break no rule, in the order in which they came.
        refused: Rule → number of descriptions that broke it.
    """

    usable: tuple[str, ...]
    refused: Counter[str]

    def __str__(self) -> str:
        """Summarises in one line how many descriptions are usable, and why the others are not."""
        count = len(self.usable) + self.refused.total()
        why = ", ".join(f"{rule} ({number})" for rule, number in self.refused.most_common())
        return f"{len(self.usable)} of {count} descriptions are usable" + (f"; the others: {why}" if why else "")


def write(card: TaskCard, writer: Writer, rules: Rules, plan: Plan) -> Written:
    """Asks the model for descriptions until there are enough, or the rounds are over.

    Raises:
        UserError: If the model gives no reply of the right form.
    """
    usable: list[str] = []
    refused: Counter[str] = Counter()
    faults: list[str] = []
    for turn in range(ROUNDS):
        missing = plan.n - len(usable)
        if missing <= 0:
            break
        size = writer.model.batch_size
        batches = [min(size, missing - start) for start in range(0, missing, size)]
        first = plan.seed * 10_000 + turn * 100
        questions = [
            prompts.generation(card, count, first + i, tuple(usable), faults[-_FAULTS:])
            for i, count in enumerate(batches)
        ]
        for texts in writer.each(lambda question: _descriptions(writer, question), questions):
            for text in texts:
                if problem := rules.problem(text, usable):
                    refused[problem.rule] += 1
                    faults.append(f"{text!r} {problem}")
                else:
                    usable.append(text)
    return Written(tuple(usable), refused)


def _descriptions(writer: Writer, question: prompts.Question) -> list[str]:
    if not writer.model.structured:
        return prompts.listed_lines(writer.ask(question))
    found = prompts.asked(writer, question, prompts.Descriptions)
    return [" ".join(text.split()) for text in found.descriptions]


def ranked(texts: Sequence[str], grades: Mapping[str, float] | None = None) -> list[str]:
    """Sorts texts from best to worst by clarity and concision (`quality`), and by the model's grades if given."""

    def worth(text: str) -> float:
        return quality(text) if grades is None else (quality(text) + grades[text]) / 2

    return sorted(texts, key=lambda text: (-worth(text), text))


def judged(card: TaskCard, writer: Writer, texts: Sequence[str], seed: int) -> dict[str, float]:
    """Asks the model to grade clarity and concision; returns the mean grade of each text, from 0 to 1.

    Raises:
        UserError: If the model cannot follow instructions, or gives no reply of the right form.
    """
    if not writer.model.structured:
        raise UserError(f"{writer.model.name} gives lists alone; it cannot judge")

    def check(found: prompts.Grades) -> str | None:
        numbers = sorted(grade.number for grade in found.grades)
        return None if numbers == list(range(1, len(texts) + 1)) else f"must grade each of 1 to {len(texts)} once"

    found = prompts.asked(writer, prompts.judgement(card, texts, seed), prompts.Grades, check)
    return {texts[g.number - 1]: (g.clarity + g.concision - 2) / 8 for g in found.grades}


def chosen(card: TaskCard, writer: Writer, written: Written, plan: Plan) -> InstructionBank:
    """Makes the bank of the best descriptions.

    The seed decides at random which of them are for training, held out or unseen: were the unseen ones the worst of
    all, the transfer test would measure that.

    Raises:
        UserError: If there are too few usable descriptions.
    """
    if len(written.usable) < plan.needed:
        raise UserError(f"{written}; {plan.needed} are needed, so nothing is written")
    grades = judged(card, writer, written.usable, plan.seed) if plan.judge else None
    best = ranked(written.usable, grades)[: plan.needed]
    random.Random(plan.seed).shuffle(best)
    splits = ["train"] * (plan.keep - 1) + ["heldout"] + ["unseen"] * plan.unseen
    texts = enumerate(zip(splits, best, strict=True), 1)
    descriptions = tuple(Description(f"{card.task}-{i:02d}", split, text) for i, (split, text) in texts)  # type: ignore[arg-type]
    return InstructionBank(card.title, descriptions, provenance(writer, plan.seed))


def provenance(writer: Writer, seed: int) -> Provenance:
    """Returns the provenance of descriptions that a writer writes now."""
    return Provenance(writer.model.name, prompts.VERSION, datetime.now(UTC).date().isoformat(), seed)


def write_bank(bank: InstructionBank, file: Path) -> None:
    """Writes a bank that `InstructionBank.load` reads back unchanged, completely or not at all.

    Raises:
        UserError: If it cannot be written, or breaks a rule of banks.
    """
    slots = sorted({slot for d in bank.descriptions for slot in d.slots} - set(SLOTS))
    data = {"task": bank.task, "version": VERSION} | ({"slots": slots} if slots else {})
    if bank.provenance:
        data["provenance"] = asdict(bank.provenance)
    data["descriptions"] = [asdict(description) for description in bank.descriptions]

    def check(made: Path) -> None:
        if InstructionBank.load(made) != bank:
            raise UserError(f"{file}: the bank does not read back as it was written")

    write_whole(file, yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120), check)
