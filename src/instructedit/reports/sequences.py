"""A user's requests as records that a sequence of edits is scored on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from instructedit.lm import FrozenLM
from instructedit.records import EditRecord, Probe
from instructedit.reports.cases import EditCase
from instructedit.reports.neighbours import draw_neighbours, draw_paraphrases

#: Tokens of a neighbour's answer.
_ANSWER = 5
#: Neighbours that are drawn for a case that brings none.
_DRAWN = 4


def case_records(lm: FrozenLM, cases: Sequence[EditCase]) -> list[EditRecord]:
    """Makes a record of each case: paraphrases should give the target, neighbours what the unedited model says.

    Args:
        lm: Gives the answers of neighbours, its own next words.
        cases: The cases; paraphrases and neighbours of those that bring none are drawn as for a report, where the
            embedded facts know the relation.
    """
    neighbours = [_neighbours(case) for case in cases]
    prompts = list(dict.fromkeys(prompt for own in neighbours for prompt in own))
    words = dict(zip(prompts, lm.generate(prompts, _ANSWER), strict=True)) if prompts else {}
    return [
        EditRecord(f"{number:05}", case.request, tuple(_probes(case, own, words)))
        for number, (case, own) in enumerate(zip(cases, neighbours, strict=True))
    ]


def _neighbours(case: EditCase) -> tuple[str, ...]:
    return case.neighbours or tuple(prompt for prompt, _ in draw_neighbours(case.request, _DRAWN))


def _probes(case: EditCase, neighbours: Sequence[str], words: dict[str, str]) -> Iterator[Probe]:
    target = case.request.target
    for prompt in case.paraphrases or draw_paraphrases(case.request):
        yield Probe("generalization", prompt, (target,))
    for prompt in neighbours:
        yield Probe("locality", prompt, (words[prompt].strip() or target,))
