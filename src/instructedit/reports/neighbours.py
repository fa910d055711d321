"""Paraphrases and neighbours for edits whose user gives none, drawn from the embedded facts."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import NamedTuple

from instructedit.records import EditRequest
from instructedit.testbed.world import Fact, Relation, World, world

#: Largest numbers of paraphrases, and of neighbours that ask something else about the subject.
_PARAPHRASES, _ABOUT = 2, 2


class Neighbour(NamedTuple):
    """A prompt and how it is related to the edit."""

    prompt: str
    group: str


def draw_paraphrases(request: EditRequest) -> list[str]:
    """Draws paraphrases of a prompt that is an embedded phrasing of a known relation; of others, none."""
    facts = world()
    subject = _subject(request, facts)
    if subject is None or (relation := _relation(request.prompt, subject, facts)) is None:
        return []
    rng = random.Random(f"paraphrases/{request.prompt}")
    others = [words for frame in relation.statements if (words := relation.fill(frame, subject)) != request.prompt]
    return rng.sample(others, min(_PARAPHRASES, len(others)))


def draw_neighbours(request: EditRequest, number: int) -> list[Neighbour]:
    """Draws prompts whose answers the edit should not change; a request has the same ones in every run.

    If the facts know the subject of the request, up to half ask the same about other subjects of that kind ("The
    capital of France is" → "The capital of Chile is"), and up to two ask something else about it. The rest are facts
    about other subjects.

    Args:
        request: The edit request.
        number: Largest number of prompts.
    """
    facts = world()
    rng = random.Random(f"neighbours/{request.prompt}/{request.target}")
    subject = _subject(request, facts)
    same = _same_question(request.prompt, subject, facts, rng) if subject else iter(())
    about = [fact for fact in facts.hops(subject or "") if not _asks(request.prompt, fact)]
    others = [fact for fact in facts.known if fact.subject != subject]
    found: dict[str, str] = {}
    for group, pool, most in (
        ("same question", same, number // 2),
        ("same subject", _prompts(about, rng), _ABOUT),
        ("other facts", _prompts(others, rng), number),
    ):
        left = min(most, number - len(found))
        for prompt in pool:
            if left < 1:
                break
            if prompt not in found:
                found[prompt] = group
                left -= 1
    return [Neighbour(*item) for item in found.items()]


def _subject(request: EditRequest, facts: World) -> str | None:
    """Returns the known entity that the prompt names: the request's subject, else the longest one; None without any."""
    named = [request.subject] if request.subject in facts.about else list(facts.about)
    there = [name for name in named if name and re.search(rf"\b{re.escape(name)}\b", request.prompt)]
    return max(there, key=len, default=None)


def _relation(prompt: str, subject: str, facts: World) -> Relation | None:
    """Returns the relation of which the prompt is an embedded phrasing, or None."""
    for fact in facts.about[subject]:
        frames = (*fact.relation.statements, *fact.relation.questions, fact.relation.heldout)
        if any(fact.relation.fill(frame, subject) == prompt for frame in frames):
            return fact.relation
    return None


def _asks(prompt: str, fact: Fact) -> bool:
    """True if a prompt about the fact's subject asks for that fact, judged by its wording."""
    return fact.relation.noun in prompt or _relation(prompt, fact.subject, world()) == fact.relation


def _same_question(prompt: str, subject: str, facts: World, rng: random.Random) -> Iterator[str]:
    table = facts.about[subject][0].relation.table
    others = [name for name in dict.fromkeys(fact.subject for fact in facts.known_of_table[table]) if name != subject]
    yield from (prompt.replace(subject, other) for other in rng.sample(others, len(others)))


def _prompts(facts: list[Fact], rng: random.Random) -> Iterator[str]:
    for fact in rng.sample(facts, len(facts)):
        yield fact.relation.fill(rng.choice(fact.relation.statements), fact.subject)
