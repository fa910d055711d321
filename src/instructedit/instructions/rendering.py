"""From a description to the text that stands in front of a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping

from instructedit.errors import UserError
from instructedit.instructions.bank import SLOT, Description, InstructionBank
from instructedit.records import EditRequest

#: The line that a prompt stands in.
LAST_LINE = "Input: "


def render(
    bank: InstructionBank, description: Description, request_or_slots: EditRequest | Mapping[str, str], prompt: str
) -> str:
    """The prompt with its task's instruction in front: ``[Task]``, ``[Description]``, ``[Input]`` (Section 4.1).

    Args:
        bank: Gives the task's title.
        description: The wording to use.
        request_or_slots: The slots' values, or the request that holds them. Values without a slot are ignored.
        prompt: Any prompt of the edit; kept as it is.

    Raises:
        UserError: If a slot of the description has no value.
    """
    slots = request_or_slots.slots if isinstance(request_or_slots, EditRequest) else request_or_slots
    return in_front(bank.task, description.text, slots, f"description {description.id!r} of task {bank.task}") + prompt


def in_front(task: str | None, text: str | None, slots: Mapping[str, str], name: str) -> str:
    """What stands in front of a prompt.

    Args:
        task: The task's title; without one there is no such line.
        text: A description or a free sentence; without one there is no such line.
        slots: The values of its slots.
        name: What to call it in errors.

    Raises:
        UserError: If a slot has no value.
    """

    def value(slot: re.Match[str]) -> str:
        if not (found := slots.get(slot[1], "")).strip():
            raise UserError(f"no value for slot [{slot[1]}] of {name}")
        return found

    # One pass, so that a value which itself holds square brackets is not filled again.
    described = f"Description: {SLOT.sub(value, text)}" if text is not None else ""
    return "\n".join([*filter(None, (f"Task: {task}" if task else "", described)), LAST_LINE])
