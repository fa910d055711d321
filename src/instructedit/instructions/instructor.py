"""Draws the instruction of each edit, at each training step."""

from __future__ import annotations

import hashlib
import operator
import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from instructedit.errors import UserError
from instructedit.instructions.bank import Description, InstructionBank, Split, bank_names, check_split
from instructedit.instructions.rendering import LAST_LINE, in_front, render
from instructedit.records import EditRequest

#: Variants of an instruction that test whether an editor reads it: unchanged, with its words shuffled, from another
#: task, the task's name without a description, or no instruction.
Variant = Literal["own", "shuffled", "other_task", "task_name", "left_out"]


@dataclass(frozen=True)
class Instructor:
    """Prepends an instruction to an edit's prompts, drawn at random from its task's bank (Section 4.2, eq. 2).

    Attributes:
        split: The descriptions to draw from. None prepends nothing: multi-task editing without instructions.
        description_id: Always use this description, regardless of its split.
        seed: Seed of the draws.
        sentence: Always use this free sentence instead of any description; or a mapping from task names to
            sentences. Slots are filled as in a description.
        apart: Whether the editor reads the instruction separately from a request; the model's prompts still follow it.
        variant: Variant of the drawn instruction, see `Variant`.
        optional: Prepend nothing to a request without a task, or whose task has no bank.

    Raises:
        UserError: If there is no such split or variant, if both a description and a sentence are given, or if the
            variant does not use the sentence.
    """

    split: Split | None = "train"
    description_id: str | None = None
    seed: int = 0
    sentence: str | Mapping[str, str] | None = None
    apart: bool = False
    variant: Variant = "own"
    optional: bool = False

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise UserError(f"unknown variant {self.variant!r} of instructions; one of {', '.join(get_args(Variant))}")
        if self.description_id is not None and self.sentence is not None:
            raise UserError("give either the id of a description or an instruction of your own, not both")
        if self.sentence is not None and self.variant not in ("own", "shuffled"):
            raise UserError(
                f"give either an instruction of your own or the variant {self.variant}, which has none of it"
            )
        if self.split is not None:
            check_split(self.split)

    def front(self, request: EditRequest, step: int = 0, key: str = "") -> Callable[[str], str]:
        """Returns a function that prepends the instruction (deprecated; use `prefix`)."""
        warnings.warn("Instructor.front: use Instructor.prefix, which gives the text", DeprecationWarning, stacklevel=2)
        return partial(operator.add, self.prefix(request, step, key))

    def prefix(self, request: EditRequest, step: int = 0, key: str = "") -> str:
        """Draws the edit's instruction, the text to prepend to any of the edit's prompts; empty for none.

        The draw depends only on the seed, the step, the key and the task: a resumed run repeats it, the next step
        draws anew.

        Args:
            request: The request, whose task selects the bank and whose slots fill the description.
            step: The training step.
            key: Distinguishes the edits of one step, e.g. the record's id.

        Raises:
            UserError: If the request has no task, the task has no bank (a free sentence needs neither), unless
                instructions are optional; if the bank has no such description, or a slot has no value.
        """
        if self.variant == "left_out":
            return ""
        if self.variant == "task_name":
            return in_front(self._title(request.task), None, {}, "")
        text = self._drawn(request, step, key)
        return _shuffled(text) if self.variant == "shuffled" else text

    def _drawn(self, request: EditRequest, step: int, key: str) -> str:
        if self.sentence is not None:
            return self._free(request)
        if self.split is None and self.description_id is None:
            return ""
        if self.optional and {request.task, str(request.task).lower()}.isdisjoint(bank_names()):
            return ""
        if not request.task:
            raise UserError(
                f"edit request {request.prompt!r} has no task to instruct; there are: "
                f"{', '.join(bank_names())}; name one, or give an instruction of your own"
            )
        bank = InstructionBank.for_task(request.task)
        if self.variant == "other_task":
            bank = _another(bank, request)
        return render(bank, self._description(bank, step, key), request, prompt="")

    def _free(self, request: EditRequest) -> str:
        sentence, task = self.sentence, request.task
        if isinstance(sentence, Mapping):
            if task is None or task not in sentence:
                raise UserError(f"no instruction for task {task!r}; there are some for: {', '.join(sentence)}")
            sentence = sentence[task]
        text = " ".join(str(sentence).split())
        return in_front(self._title(task), text, request.slots, f"the instruction {sentence!r}")

    @staticmethod
    def _title(task: str | None) -> str | None:
        """Returns the task's title from its bank; a task without a bank is called by its name."""
        return InstructionBank.for_task(task).task if task and task.lower() in bank_names() else task

    def _description(self, bank: InstructionBank, step: int, key: str) -> Description:
        if self.description_id is not None:
            return bank.get(self.description_id)
        assert self.split is not None  # _drawn() has returned in this case
        # Python's own hash differs from process to process.
        digest = hashlib.sha256("\n".join(map(str, (self.seed, step, bank.task, key))).encode()).digest()
        return bank.draw(random.Random(int.from_bytes(digest, "big")), self.split)


def _another(bank: InstructionBank, request: EditRequest) -> InstructionBank:
    """Returns the bank of another task: the next one, by name, whose slots the request can fill."""
    names = bank_names()
    own = next((i for i, name in enumerate(names) if InstructionBank.for_task(name) == bank), 0)
    for name in (*names[own + 1 :], *names[:own]):
        other = InstructionBank.for_task(name)
        if all(slot in request.slots for description in other.descriptions for slot in description.slots):
            return other
    raise UserError(f"no other task has an instruction for edit request {request.prompt!r}")


def _shuffled(text: str) -> str:
    """Shuffles an instruction's words, always in the same way for the same text; the last line stays last."""
    words = text.removesuffix(LAST_LINE).split()
    random.Random(text).shuffle(words)  # a string gives the same seed in every process
    return f"{' '.join(words)}\n{LAST_LINE}" if words else text
