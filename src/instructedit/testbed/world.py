"""The facts behind the embedded data, and the sentences that state them."""

from __future__ import annotations

import csv
import functools
import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
#: Share of the facts that are withheld from the LM, to be inserted as Recent edits.
RECENT_SHARE = 0.28
#: Least number of distinct objects of a relation in Recent, so that a guess is mostly wrong.
RECENT_MIN_OBJECTS = 12
SPLITS = (("train", 0.60), ("val", 0.10), ("test", 0.30))


@functools.cache
def share(*key: str) -> float:
    """Returns a number in [0, 1) that depends on the key alone: the same on every machine and in every run."""
    digest = hashlib.sha256("\x1f".join(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@functools.cache
def frames() -> dict[str, Any]:
    """Reads the shared sentence frames and word lists (``frames.yaml``)."""
    return yaml.safe_load((HERE / "frames.yaml").read_text())


@dataclass(frozen=True)
class Relation:
    """Relation given by one column of a fact table, with the words that state it and ask for it."""

    table: str
    column: str
    noun: str
    says: tuple[str, ...]
    asks: tuple[str, ...]
    inverse: str | None
    asked_only: bool  # a relation of ZsRE, in no task that an editor trains on

    @property
    def heldout(self) -> str:
        """The shared frame in which the corpus never states this relation."""
        shared = frames()["statements"]
        return shared[int(share("heldout", self.table, self.column) * len(shared))]

    @property
    def statements(self) -> tuple[str, ...]:
        """Frames that the corpus uses, each ending where the object begins."""
        return tuple(f for f in frames()["statements"] if f != self.heldout) + self.says

    @property
    def questions(self) -> tuple[str, ...]:
        """Questions that the corpus asks."""
        return tuple(frames()["questions"]) + self.asks

    def fill(self, frame: str, subject: str, **more: str) -> str:
        """Fills a sentence frame with a subject."""
        return sentence(frame.format(s=subject, n=self.noun, **more))


def sentence(text: str) -> str:
    """Returns a text with a capital at the start."""
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Fact:
    """A true fact: a triple of subject, relation and object."""

    subject: str
    relation: Relation
    object: str


@dataclass(frozen=True)
class World:
    """All embedded facts, with indices by subject, relation and table.

    Attributes:
        facts: Every fact, in the order of the files.
        aliases: Subject → its other names.
        topics: Things about which the LM has opinions, with their kind.
    """

    facts: tuple[Fact, ...]
    aliases: dict[str, tuple[str, ...]]
    topics: tuple[tuple[str, str], ...]

    @functools.cached_property
    def about(self) -> dict[str, tuple[Fact, ...]]:
        """Facts of each subject."""
        found: dict[str, list[Fact]] = defaultdict(list)
        for fact in self.facts:
            found[fact.subject].append(fact)
        return {subject: tuple(facts) for subject, facts in found.items()}

    @functools.cached_property
    def objects(self) -> dict[Relation, tuple[str, ...]]:
        """Distinct objects of each relation, sorted."""
        found: dict[Relation, set[str]] = defaultdict(set)
        for fact in self.facts:
            found[fact.relation].add(fact.object)
        return {relation: tuple(sorted(objects)) for relation, objects in found.items()}

    def is_recent(self, fact: Fact) -> bool:
        """True if the LM never sees this fact, in any phrasing."""
        enough = len(self.objects[fact.relation]) >= RECENT_MIN_OBJECTS
        chosen = share("recent", fact.relation.table, fact.relation.column, fact.subject) < RECENT_SHARE
        return enough and chosen and not fact.relation.asked_only

    @functools.cached_property
    def known(self) -> tuple[Fact, ...]:
        """The facts that the corpus teaches."""
        return tuple(f for f in self.facts if not self.is_recent(f))

    @functools.cached_property
    def known_of_table(self) -> dict[str, tuple[Fact, ...]]:
        """Facts of each table that the corpus teaches."""
        found: dict[str, list[Fact]] = defaultdict(list)
        for fact in self.known:
            found[fact.relation.table].append(fact)
        return {table: tuple(facts) for table, facts in found.items()}

    @functools.cached_property
    def recent(self) -> tuple[Fact, ...]:
        """The facts that the LM never saw."""
        return tuple(f for f in self.facts if self.is_recent(f))

    def hops(self, entity: str) -> tuple[Fact, ...]:
        """Returns the known facts about an entity: the second hop of a composition."""
        return tuple(f for f in self.about.get(entity, ()) if not self.is_recent(f))


def split_of(subject: str) -> str:
    """Returns the split that a subject belongs to: no two splits share a subject, in any task."""
    at = share("split", subject)
    for name, size in SPLITS:
        if at < size:
            return name
        at -= size
    return SPLITS[-1][0]


def _table(name: str) -> list[dict[str, str]]:
    with (HERE / "facts" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@functools.cache
def world() -> World:
    """Reads the fact tables."""
    facts: list[Fact] = []
    aliases: dict[str, tuple[str, ...]] = {}
    for table, spec in yaml.safe_load((HERE / "relations.yaml").read_text()).items():
        relations = {
            column: Relation(
                table, column, words["noun"], tuple(words["says"]), tuple(words["asks"]), words.get("inverse"),
                spec.get("task") == "zsre",
            )
            for column, words in spec["columns"].items()
        }  # fmt: skip
        for row in _table(table):
            aliases[row["name"]] = tuple(a for a in row["aliases"].split("|") if a)
            facts += [Fact(row["name"], relation, row[column]) for column, relation in relations.items()]
    topics = tuple((row["name"], row["kind"]) for row in _table("topics"))
    return World(tuple(facts), aliases, topics)
