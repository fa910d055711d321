"""The text that the tiny LM is trained on: true facts in many phrasings, opinions, and instruction-like preambles."""

from __future__ import annotations

import random
from collections.abc import Iterator

from instructedit.testbed.world import Fact, Relation, World, frames, sentence, share, world

#: Share of the documents with a preamble shaped like an instruction, and of those made of several sentences.
PREAMBLE, SEVERAL = 0.25, 0.15
#: How often one pass states each fact.
SAYS = 2


def documents(seed: int, passes: int) -> Iterator[str]:
    """Yields the corpus: `passes` times over all known facts and topics, each time in freshly drawn words.

    The same seed gives the same documents. The facts that Recent inserts and the held-out phrasings never occur.
    """
    rng = random.Random(seed)
    facts = world()
    for _ in range(passes):
        sentences = list(_pass(facts, rng))
        rng.shuffle(sentences)
        while sentences:
            several = rng.randint(2, 4) if rng.random() < SEVERAL else 1
            text = " ".join(sentences.pop() for _ in range(min(several, len(sentences))))
            yield f"{preamble(rng)}{text}" if rng.random() < PREAMBLE else text


def _pass(facts: World, rng: random.Random) -> Iterator[str]:
    for fact in facts.known:
        for _ in range(SAYS):
            yield say(fact, rng, facts)
        if rng.random() < 0.3:
            yield from _hop(fact, rng, facts)
        if fact.relation.inverse and rng.random() < 0.5:
            yield f"{fact.relation.inverse.format(o=fact.object)} {fact.subject}."
    for subject, others in facts.aliases.items():
        for other in others:
            yield f"{sentence(rng.choice(frames()['alias']).format(a=other))} {subject}."
    for topic, _ in facts.topics:
        for _ in range(SAYS):
            yield opinion(topic, rng)


def say(fact: Fact, rng: random.Random, facts: World) -> str:
    """Phrases a fact as a statement (60 %), a question with its answer (30 %) or against a wrong object (10 %)."""
    names = (fact.subject, *facts.aliases.get(fact.subject, ()))
    subject = rng.choice(names[1:]) if len(names) > 1 and rng.random() < 0.2 else fact.subject
    relation, form = fact.relation, rng.random()
    if form < 0.6:
        stem = relation.fill(rng.choice(relation.statements), subject)
    elif form < 0.9:
        stem = relation.fill(rng.choice(relation.questions), subject)
    else:
        stem = relation.fill(frames()["contrast"], subject, w=wrong(fact, rng, facts))
    return f"{stem} {fact.object}."


def wrong(fact: Fact, rng: random.Random, facts: World) -> str:
    """Draws another object of the same relation."""
    return rng.choice([o for o in facts.objects[fact.relation] if o != fact.object])


def _hop(fact: Fact, rng: random.Random, facts: World) -> Iterator[str]:
    second = facts.hops(fact.object)
    if second:
        hop = rng.choice(second)
        yield f"{compose(fact.relation, hop.relation, fact.subject)} {hop.object}."


def compose(first: Relation, second: Relation, subject: str) -> str:
    """Returns the stem of a one-hop composition: "The continent of the birthplace of X is"."""
    return frames()["composition"].format(n2=second.noun, n=first.noun, s=subject)


def opinion(topic: str, rng: random.Random, sentiment: str | None = None) -> str:
    """Returns a question about a topic and a reply, in the LM's own sentiment nine times in ten unless one is given."""
    if sentiment is None:
        own, other = ("positive", "negative") if share("opinion", topic) < 0.5 else ("negative", "positive")
        sentiment = own if rng.random() < 0.9 else other
    return f"{frames()['opinion_question'].format(t=topic)} {reply(topic, rng, sentiment)}"


def reply(topic: str, rng: random.Random, sentiment: str) -> str:
    """Draws a reply about a topic with a sentiment, ``positive`` or ``negative``."""
    template = rng.choice(frames()["opinions"][sentiment])
    return sentence(template.format(t=topic, a=rng.choice(frames()["adjectives"][sentiment])))


def preamble(rng: random.Random) -> str:
    """Draws a preamble shaped like an instruction, but none of the instruction banks' own sentences."""
    words = {name: rng.choice(choices) for name, choices in frames()["preamble"].items()}
    description = " ".join(w for w in (words["verbs"], words["objects"], words["about"], words["ends"]) if w)
    return f"Task: {words['tasks']}\nDescription: {description}.\nInput: "
