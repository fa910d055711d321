"""Clarity and concision of a description, measured without a model."""

from __future__ import annotations

import re

from instructedit.instructions.bank import SLOT

#: Number of words up to which a description is fully concise, and from which on it is not concise at all.
SHORT, LONG = 12, 40


def clarity(text: str) -> float:
    """Computes Flesch's reading ease (1948), divided by 100 and clipped to 0..1.

    206.835 − 1.015 · words per sentence − 84.6 · syllables per word; each group of vowels counts as a syllable, except
    a silent final e, and a slot counts as a word of one syllable.
    """
    plain = SLOT.sub("it", text)
    words = re.findall(r"[^\W\d_]+", plain)
    if not words:
        return 0.0
    sentences = max(1, len(re.findall(r"[.!?]+(?:\s|$)", plain)))
    ease = 206.835 - 1.015 * len(words) / sentences - 84.6 * sum(map(_syllables, words)) / len(words)
    return min(1.0, max(0.0, ease / 100))


def concision(text: str) -> float:
    """Returns 1 up to `SHORT` words, falling linearly to 0 at `LONG`; a slot counts as one word."""
    words = len(SLOT.sub("it", text).split())
    return min(1.0, max(0.0, (LONG - words) / (LONG - SHORT)))


def quality(text: str) -> float:
    """Returns the mean of clarity and concision, 0..1."""
    return (clarity(text) + concision(text)) / 2


def _syllables(word: str) -> int:
    groups = len(re.findall(r"[aeiouy]+", word.lower()))
    silent = groups > 1 and re.search(r"[^aeiouyl]e$", word.lower()) is not None
    return max(1, groups - silent)
