"""ConvSent: the sentiment of replies about an entity is changed (SERAC's data; Mitchell et al. 2022)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from instructedit.errors import UserError
from instructedit.records import EditRecord, EditRequest, Probe
from instructedit.tasks.base import LoadReport, Task
from instructedit.tasks.raw import Raw

#: Each label with the field that holds its replies.
_FIELDS = {"positive": "pos", "negative": "neg"}
_OPPOSITE = {"positive": "negative", "negative": "positive"}
_CHOICES = ("hash", "positive", "negative", "both")


class ConvSent(Task):
    """Reader of ``ent, pos, neg``: an entity and replies about it with positive and with negative sentiment.

    Each entity becomes several cases, which form one cluster; the target of each is another wanted reply.

    Args:
        cases: At most this many cases per entity and label (the paper matches each topic to 10).
        labels: The wanted sentiment: "positive", "negative", "both", or "hash" to choose one by the entity's name.

    Raises:
        UserError: If there is no such choice of labels, or `cases` is less than 1.
    """

    name = "convsent"
    title = "ConvSent"
    fields = ("ent", *_FIELDS.values(), "id", "case_id")

    @classmethod
    def recognises(cls, data: Mapping[str, object]) -> bool:
        """True if the record has an entity and replies about it."""
        return {"ent", *_FIELDS.values()} <= data.keys()

    def __init__(self, cases: int = 10, labels: Literal["hash", "positive", "negative", "both"] = "hash") -> None:
        if cases < 1:
            raise UserError(f"task 'convsent': cases must be at least 1, got {cases}")
        if labels not in _CHOICES:
            raise UserError(f"task 'convsent': labels must be one of {', '.join(_CHOICES)}; got {labels!r}")
        self.cases = cases
        self.labels = labels

    def parse(self, raw: Raw, report: LoadReport) -> Iterable[EditRecord]:
        """Makes the cases of one entity, still without the locality probe, which needs the other entities."""
        entity, cluster = raw.text("ent"), report.record_id(raw)
        prompt = f"What do you think of {entity}?"
        replies = {label: _replies(raw, field, report) for label, field in _FIELDS.items()}
        case = 0
        for label in self._wanted_labels(entity):
            # The cases share their probes: the full training split would otherwise hold millions of copies.
            wanted = [Probe("wanted", prompt, (text,)) for text in replies[label]]
            opposite = [Probe("opposite", prompt, (text,)) for text in replies[_OPPOSITE[label]]]
            if not wanted:
                report.drop("entity without wanted replies")
            for i, target in enumerate(replies[label][: self.cases]):
                slots = {"LABEL": label, "TOPIC": entity}
                request = EditRequest(prompt, target, task=self.name, subject=entity, slots=slots)
                yield EditRecord(f"{cluster}/{case}", request, (*wanted[:i], *wanted[i + 1 :], *opposite), cluster)
                case += 1

    def build(self, raws: Sequence[Raw], report: LoadReport) -> list[EditRecord]:
        """Makes the cases of all entities, each with a question about another entity of the split for locality."""
        records = [record for raw in raws for record in self._parsed(raw, report)]
        topics: dict[str, EditRecord] = {}
        for record in records:
            topics.setdefault(_topic(record), record)
        report.note("entity that comes again", len({record.cluster for record in records}) - len(topics))
        if len(topics) < 2:
            report.note("case without another entity for locality", len(records))
            return records
        return [replace(record, probes=(*record.probes, _elsewhere(record, topics))) for record in records]

    def _wanted_labels(self, entity: str) -> list[str]:
        both = list(_FIELDS)
        if self.labels == "hash":
            return [both[_hash(entity.casefold()) % 2]]
        return both if self.labels == "both" else [self.labels]


def _replies(raw: Raw, field: str, report: LoadReport) -> list[str]:
    """Returns the field's replies, each once; blank and repeated ones are counted."""
    every = raw.texts(field)
    filled = [text for text in every if text]
    report.drop("blank reply", len(every) - len(filled))
    once = list(dict.fromkeys(filled))
    report.drop("repeated reply", len(filled) - len(once))
    return once


def _elsewhere(record: EditRecord, topics: dict[str, EditRecord]) -> Probe:
    """Makes the locality probe: the question about another entity with one of its replies, both chosen by a hash."""
    own, names = _topic(record), list(topics)
    seed = _hash(f"{own}/{record.id.rpartition('/')[2]}")
    place, seed = seed % len(names), seed // len(names)
    other = topics[names[place] if names[place] != own else names[place - 1]]
    replies = other.of("reliability", "wanted", "opposite")
    return replace(replies[seed % len(replies)], kind="locality", group="Other_Topic")


def _topic(record: EditRecord) -> str:
    return record.request.slots["TOPIC"].casefold()


def _hash(text: str) -> int:
    """Returns a hash of a text that stays the same from run to run, unlike Python's own."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
