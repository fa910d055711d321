"""Prompts near an edit whose answers should stay, where the user names none: drawn from the embedded facts."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import NamedTuple

from instructedit.records import EditRequest
from instructedit.tasks.tiny.world import Fact, World, world


class Neighbour(NamedTuple):
    """A prompt and how it is related to the edit."""

    prompt: str
    group: str


def draw_neighbours(request: EditRequest, number: int) -> list[Neighbour]:
    """Draws prompts; the same request has the same ones in every run.

    Where the facts know whom the request is about, up to half ask the same of others of that kind ("The capital of
    France is" → "The capital of Chile is"), and two ask something else about it. The rest are facts about anything.

    Args:
        request: The edit.
        number: How many.
    """
    facts = world()
    rng = random.Random(f"neighbours/{request.prompt}/{request.target}")
    subject = _subject(request, facts)
    found: dict[str, str] = {}
    for group, pool, most in (
        ("same question", _same_question(request.prompt, subject, facts, rng) if subject else iter(()), number // 2),
        ("same subject", _about(facts.hops(subject) if subject else (), rng), 2),
        ("other facts", _about(facts.known, rng), number),
    ):
        left = min(most, number - len(found))
        for prompt in pool:
            if left < 1:
                break
            if prompt != request.prompt and prompt not in found:
                found[prompt] = group
                left -= 1
    return [Neighbour(*item) for item in found.items()]


def _subject(request: EditRequest, facts: World) -> str | None:
    """The entity that the request is about, as its prompt writes it, if the facts know it: the longest one."""
    named = [request.subject] if request.subject in facts.about else list(facts.about)
    there = [name for name in named if name and re.search(rf"\b{re.escape(name)}\b", request.prompt)]
    return max(there, key=len, default=None)


def _same_question(prompt: str, subject: str, facts: World, rng: random.Random) -> Iterator[str]:
    table = facts.about[subject][0].relation.table
    others = [name for name in dict.fromkeys(fact.subject for fact in facts.known_of_table[table]) if name != subject]
    yield from (prompt.replace(subject, other) for other in rng.sample(others, len(others)))


def _about(facts: tuple[Fact, ...], rng: random.Random) -> Iterator[str]:
    for fact in rng.sample(facts, len(facts)):
        yield fact.relation.fill(rng.choice(fact.relation.statements), fact.subject)
