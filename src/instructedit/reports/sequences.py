"""Conversion of a user's requests to records, on which a sequence of edits is scored."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

from instructedit.lm import FrozenLM
from instructedit.records import EditRecord, Probe
from instructedit.reports.cases import EditCase
from instructedit.reports.neighbours import draw_neighbours, draw_paraphrases

#: Number of tokens in a neighbour's answer.
_ANSWER = 5
#: Number of neighbours to draw for a case that has none.
_DRAWN = 4


def case_records(lm: FrozenLM, cases: Sequence[EditCase]) -> list[EditRecord]:
    """Converts each case to a record: paraphrases should give the target, neighbours the unedited model's answer.

    Args:
        lm: The model, whose own continuations are the answers to neighbours.
        cases: The cases; if one has no paraphrases or neighbours, they are drawn as for a report, paraphrases only if
            the embedded facts know the relation.

    Warns:
        UserWarning: If cases have further prompts (`EditCase.ask`), which have no right answer and so no score.
    """
    if left_out := sum(len(case.ask) for case in cases):
        warnings.warn(
            f"a sequence does not ask the {left_out} prompts given under 'ask': they have no score", stacklevel=2
        )
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
