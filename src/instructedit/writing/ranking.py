"""How clear and how concise a description is: a measure that needs no model."""

from __future__ import annotations

import re

from instructedit.instructions.bank import SLOT

#: Words up to which a description is wholly concise, and from which on not at all.
SHORT, LONG = 12, 40


def clarity(text: str) -> float:
    """Flesch's reading ease (1948) over 100, cut to 0..1.

    206.835 − 1.015 · words per sentence − 84.6 · syllables per word; groups of vowels count as syllables, less a silent
    final e, and a slot as a word of one.
    """
    plain = SLOT.sub("it", text)
    words = re.findall(r"[^\W\d_]+", plain)
    if not words:
        return 0.0
    sentences = max(1, len(re.findall(r"[.!?]+(?:\s|$)", plain)))
    ease = 206.835 - 1.015 * len(words) / sentences - 84.6 * sum(map(_syllables, words)) / len(words)
    return min(1.0, max(0.0, ease / 100))


def concision(text: str) -> float:
    """1 up to `SHORT` words, falling linearly to 0 at `LONG`; a slot counts as one word."""
    words = len(SLOT.sub("it", text).split())
    return min(1.0, max(0.0, (LONG - words) / (LONG - SHORT)))


def quality(text: str) -> float:
    """Mean of clarity and concision, 0..1."""
    return (clarity(text) + concision(text)) / 2


def _syllables(word: str) -> int:
    groups = len(re.findall(r"[aeiouy]+", word.lower()))
    silent = groups > 1 and re.search(r"[^aeiouyl]e$", word.lower()) is not None
    return max(1, groups - silent)
