"""Questions from a bank of relations, each in several ways: from them a scope learns what asks the same.

The records of a task ask few relations, and mostly in one way each. The bank (``relations.yaml``) has more of both and
several names of one subject; it holds no answers, which the scope of an edit does not need.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

#: Share of questions in scope that stand behind an unrelated sentence.
_OPENED = 0.25


class Question(NamedTuple):
    """A question that is taken for a request.

    Attributes:
        prompt: The question.
        asked: Further questions, and whether each is in its scope.
    """

    prompt: str
    asked: list[tuple[str, bool]]


class Kind(NamedTuple):
    """Subjects of a kind, and what can be asked about them.

    Attributes:
        names: The names of each subject.
        relations: The ways to ask each relation, with ``{}`` in the subject's place.
    """

    names: list[list[str]]
    relations: list[list[str]]


@cache
def relation_bank() -> tuple[list[Kind], list[str]]:
    """Reads the bank: kinds of subjects, and sentences that may stand before a question."""
    with (Path(__file__).parent / "relations.yaml").open(encoding="utf-8") as file:
        read = yaml.safe_load(file)
    kinds = [
        Kind([[name] if isinstance(name, str) else name for name in kind["names"]], kind["relations"])
        for kind in read["kinds"].values()
    ]
    return kinds, read["openings"]


def draw_questions(count: int, seed: str) -> list[Question]:
    """Draws questions from the bank, every relation as often as any other.

    In scope of each are itself and up to two other ways to ask it, by any name of its subject and some behind an
    unrelated sentence; out of it are two other relations of the subject, and the same about two others of its kind.

    Args:
        count: How many.
        seed: Of the draws.
    """
    rng = random.Random(seed)
    kinds, openings = relation_bank()
    relations = [(kind, i) for kind in kinds for i in range(len(kind.relations))]
    return [_question(rng, *rng.choice(relations), openings) for _ in range(count)]


def _question(rng: random.Random, kind: Kind, relation: int, openings: Sequence[str]) -> Question:
    subject, *others = rng.sample(kind.names, 3)
    first, *ways = rng.sample(kind.relations[relation], len(kind.relations[relation]))
    prompt = _asked(first, rng.choice(subject))
    near = [_asked(way, rng.choice(subject)) for way in ways[:2]]
    near = [f"{rng.choice(openings)} {text}" if rng.random() < _OPENED else text for text in near]
    elsewhere = rng.sample([other for i, other in enumerate(kind.relations) if i != relation], 2)
    far = [_asked(rng.choice(other), rng.choice(subject)) for other in elsewhere]
    far += [_asked(way, rng.choice(other)) for way, other in zip((first, rng.choice(ways)), others, strict=True)]
    return Question(prompt, [(prompt, True), *((text, True) for text in near), *((text, False) for text in far)])


def _asked(way: str, name: str) -> str:
    text = way.format(name)
    return text[0].upper() + text[1:]
