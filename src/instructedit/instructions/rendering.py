"""Renders descriptions as the instruction that is prepended to a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping

from instructedit.errors import UserError
from instructedit.instructions.bank import SLOT, Description, InstructionBank
from instructedit.records import EditRequest

#: Start of the line that contains the prompt.
LAST_LINE = "Input: "


def render(
    bank: InstructionBank, description: Description, request_or_slots: EditRequest | Mapping[str, str], prompt: str
) -> str:
    """Prepends the task's instruction to a prompt: ``[Task]``, ``[Description]``, ``[Input]`` (Section 4.1).

    Args:
        bank: The bank that holds the task's title.
        description: The wording to use.
        request_or_slots: The slots' values, or the request that holds them. Values without a slot are ignored.
        prompt: Any prompt of the edit; left unchanged.

    Raises:
        UserError: If a slot of the description has no value.
    """
    slots = request_or_slots.slots if isinstance(request_or_slots, EditRequest) else request_or_slots
    return in_front(bank.task, description.text, slots, f"description {description.id!r} of task {bank.task}") + prompt


def in_front(task: str | None, text: str | None, slots: Mapping[str, str], name: str) -> str:
    """Returns the instruction to prepend to a prompt.

    Args:
        task: The task's title; without one its line is left out.
        text: A description or a free sentence; without one its line is left out.
        slots: The values of its slots.
        name: Name of the text in errors.

    Raises:
        UserError: If a slot has no value.
    """

    def value(slot: re.Match[str]) -> str:
        if not (found := slots.get(slot[1], "")).strip():
            raise UserError(f"no value for slot [{slot[1]}] of {name}")
        return found

    # One pass, so that square brackets inside a value are not filled again.
    described = f"Description: {SLOT.sub(value, text)}" if text is not None else ""
    return "\n".join([*filter(None, (f"Task: {task}" if task else "", described)), LAST_LINE])
