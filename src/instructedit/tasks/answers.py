"""Helpers for the answers of probes in the datasets' forms, and for telling KnowEdit's form from the flat one."""

from __future__ import annotations

from collections.abc import Mapping

from instructedit.tasks.base import LoadReport

Answers = list[list[str]]

#: Fields of KnowEdit's records that hold groups of probes by name.
GROUPS = ("portability", "locality")


def has_groups(data: Mapping[str, object]) -> bool:
    """True if a record's probes are grouped by name, as in KnowEdit."""
    return "target_new" in data and any(isinstance(data.get(name), dict) for name in GROUPS)


def filled(answers: Answers, report: LoadReport) -> Answers:
    """Removes blank texts and empty alias lists from answers, and counts them in the report."""
    kept = []
    for i, aliases in enumerate(answers):
        if not aliases:
            report.drop("empty alias list" if i else "leading empty alias list")
        left = [alias for alias in aliases if alias]
        report.drop("blank answer", len(aliases) - len(left))
        if left:
            kept.append(left)
    return kept


def flat(answers: Answers, report: LoadReport) -> tuple[str, ...]:
    """Returns all answers and aliases in order, each once."""
    every = [alias for aliases in answers for alias in aliases]
    once = tuple(dict.fromkeys(every))
    report.drop("repeated answer", len(every) - len(once))
    return once


def restates(target: str, old: Answers, report: LoadReport) -> bool:
    """True if the target is already an old answer, ignoring case; such a record edits nothing."""
    same = target.casefold() in {alias.casefold() for aliases in old for alias in aliases}
    if same:
        report.drop("target equals the old answer")
    return same
