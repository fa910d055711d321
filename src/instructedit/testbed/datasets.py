"""Four task datasets built from the embedded facts, in the schemas of the real ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from instructedit.errors import UserError
from instructedit.testbed.corpus import compose, reply
from instructedit.testbed.world import Fact, World, frames, share, split_of, world

Json = dict[str, Any]
#: Replies of each sentiment in a ConvSent record, as in the real data.
REPLIES = 10


def raw_records(task: str, split: str) -> list[Json]:
    """Returns the records of a task, as its JSON file would hold them.

    Args:
        task: ``counterfact``, ``recent``, ``convsent`` or ``zsre``.
        split: ``train``, ``val`` or ``test``; no two splits share a subject.

    Raises:
        UserError: If there is no such task or split.
    """
    if task not in MAKERS:
        raise UserError(f"task {task!r} has no embedded data; those with: {', '.join(MAKERS)}")
    if split not in ("train", "val", "test"):
        raise UserError(f"no split {split!r} in the embedded data; one of train, val, test")
    return list(MAKERS[task](world(), split))


def _rng(fact: Fact, use: str) -> random.Random:
    return random.Random(f"{use}/{fact.relation.table}/{fact.relation.column}/{fact.subject}")


def _counterfact(facts: World, split: str) -> Iterator[Json]:
    for fact in facts.known:
        # The facts of about 60 % of the subjects: the others stay unedited, for locality.
        if fact.relation.asked_only or split_of(fact.subject) != split or share("cf", fact.subject) > 0.6:
            continue
        rng = _rng(fact, "counterfact")
        target = _other_object(fact, rng, facts)
        if not target:
            continue
        contrast = fact.relation.fill(frames()["contrast"], fact.subject, w=target)
        yield {
            **_statement(fact, target, rng),
            "ground_truth": fact.object,
            "portability": _portability(fact, target, rng, facts),
            "locality": {**_locality(fact, rng, facts), "Forgetfulness": [_probe(contrast, fact.object)]},
        }


def _recent(facts: World, split: str) -> Iterator[Json]:
    for fact in facts.recent:
        if split_of(fact.subject) == split:
            rng = _rng(fact, "recent")
            yield {
                **_statement(fact, fact.object, rng),
                "portability": _portability(fact, fact.object, rng, facts),
                "locality": _locality(fact, rng, facts),
            }


def _zsre(facts: World, split: str) -> Iterator[Json]:
    for fact in facts.known:
        if not fact.relation.asked_only or split_of(fact.subject) != split:
            continue
        rng = _rng(fact, "zsre")
        target = _other_object(fact, rng, facts)
        if not target:
            continue
        asks, again = (fact.relation.fill(q, fact.subject) for q in rng.sample(fact.relation.questions, 2))
        yield {
            "subject": fact.subject,
            "prompt": asks,
            "target_new": target,
            "ground_truth": [fact.object],
            "rephrase_prompt": again,
            "cond": f"{fact.object} >> {target} || {asks}",
            "portability": _portability(fact, target, rng, facts),
            "locality": _locality(fact, rng, facts, asked=True),
        }


def _convsent(facts: World, split: str) -> Iterator[Json]:
    for topic, _ in facts.topics:
        if split_of(topic) == split:
            rng = random.Random(f"convsent/{topic}")
            yield {"ent": topic, "pos": _replies(topic, rng, "positive"), "neg": _replies(topic, rng, "negative")}


def _replies(topic: str, rng: random.Random, sentiment: str) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < REPLIES:
        found.setdefault(reply(topic, rng, sentiment))
    return list(found)


def _other_object(fact: Fact, rng: random.Random, facts: World) -> str | None:
    others = [o for o in facts.objects[fact.relation] if o != fact.object]
    return rng.choice(others) if others else None


def _probe(prompt: str, answer: str) -> Json:
    return {"prompt": prompt, "ground_truth": [[answer]]}


def _statement(fact: Fact, target: str, rng: random.Random) -> Json:
    prompt, again = rng.sample(fact.relation.statements, 2)
    rephrase = [fact.relation.fill(f, fact.subject) for f in (again, fact.relation.heldout)]
    return {
        "subject": fact.subject,
        "prompt": fact.relation.fill(prompt, fact.subject),
        "target_new": target,
        "rephrase": rephrase,
    }


def _portability(fact: Fact, target: str, rng: random.Random, facts: World) -> Json:
    relation = fact.relation
    frame = rng.choice(relation.statements)
    aliases = [_probe(relation.fill(frame, a), target) for a in facts.aliases.get(fact.subject, ())]
    hops = [_probe(compose(relation, h.relation, fact.subject), h.object) for h in facts.hops(target)]
    inverse = [_probe(relation.inverse.format(o=target), fact.subject)] if relation.inverse else []
    return {"Subject_Aliasing": aliases, "Reasoning": hops[:3], "Logical_Generalization": inverse}


def _locality(fact: Fact, rng: random.Random, facts: World, asked: bool = False) -> Json:
    def ask(other: Fact) -> Json:
        choices = other.relation.questions if asked else other.relation.statements
        return _probe(other.relation.fill(rng.choice(choices), other.subject), other.object)

    def draw(number: int, pool: tuple[Fact, ...]) -> list[Json]:
        fits = [f for f in pool if split_of(f.subject) == split and f != fact]
        return [ask(f) for f in rng.sample(fits, min(number, len(fits)))]

    split = split_of(fact.subject)
    elsewhere = [t for t in facts.known_of_table if t != fact.relation.table]
    same_relation = tuple(f for f in facts.known_of_table[fact.relation.table] if f.relation == fact.relation)
    return {
        "Relation_Specificity": draw(2, facts.hops(fact.subject)),
        "Neighborhood": draw(1, same_relation),
        "Distant": draw(1, facts.known_of_table[rng.choice(elsewhere)]),
    }


MAKERS: dict[str, Callable[[World, str], Iterator[Json]]] = {
    "counterfact": _counterfact,
    "recent": _recent,
    "convsent": _convsent,
    "zsre": _zsre,
}
