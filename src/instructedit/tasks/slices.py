"""Parts of a split: ``train[:80%]``, ``facts.csv[-50:]``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from instructedit.errors import UserError
from instructedit.records import EditRecord

_PART = re.compile(r"\[((?:-?\d+%?)?):((?:-?\d+%?)?)\]")


def parted(text: str) -> tuple[str, str]:
    """Splits ``facts.csv[:80%]`` into the name and the part in brackets, which is empty if there are none."""
    bracket = text.rfind("[")
    return (text[:bracket], text[bracket:]) if bracket > 0 and _PART.fullmatch(text[bracket:]) else (text, "")


def split_and_part(text: str) -> tuple[str, str]:
    """Splits ``train[:80%]`` into the split and its part.

    Raises:
        UserError: If the text is not a split.
    """
    split, part = parted(text)
    if not re.fullmatch(r"\w+", split):
        raise UserError(f"data: {text!r} is no split; for instance train, train[:90%] or train[-50:]")
    return split, part


def part_of(records: Sequence[EditRecord], part: str) -> list[EditRecord]:
    """Selects the records of a part, in whole clusters, so that no topic is in two parts.

    Args:
        records: Records of a split, in order.
        part: ``[:80%]``, ``[-50:]`` or the like, in clusters (for most tasks a record is one); empty for all.
    """
    match = _PART.fullmatch(part)
    if not match:
        return list(records)
    clusters = list(dict.fromkeys(record.cluster for record in records))

    def bound(text: str) -> int | None:
        return None if not text else len(clusters) * int(text[:-1]) // 100 if text.endswith("%") else int(text)

    chosen = set(clusters[bound(match[1]) : bound(match[2])])
    return [record for record in records if record.cluster in chosen]
