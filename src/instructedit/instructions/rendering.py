"""From a description to the text that stands in front of a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping

from instructedit.errors import UserError
from instructedit.instructions.bank import SLOT, Description, InstructionBank
from instructedit.records import EditRequest


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

    def value(slot: re.Match[str]) -> str:
        if not (text := slots.get(slot[1], "")).strip():
            raise UserError(f"no value for slot [{slot[1]}] of description {description.id!r} of task {bank.task}")
        return text

    # One pass, so that a value which itself holds square brackets is not filled again.
    return f"Task: {bank.task}\nDescription: {SLOT.sub(value, description.text)}\nInput: {prompt}"
