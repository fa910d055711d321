"""Text that suits a model: its training corpus if that is available, else text that it samples itself, kept on disk."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from instructedit.errors import UserError
from instructedit.lm.frozen import FrozenLM
from instructedit.lm.generation import Drawing, Generation
from instructedit.tasks.texts import read_texts
from instructedit.testbed import EMBEDDED

#: Names of texts that are not files: the one that a model samples itself, and the one that `text_for` chooses.
SAMPLED, AUTO = "sampled", "auto"
#: First words of sampled texts, if the tokenizer has no token for a text's beginning.
_OPENINGS = (
    "The", "In", "A", "It", "He", "She", "They", "We", "I", "This", "When", "As", "For", "On", "After", "However,",
    "One", "There", "My", "What", "If", "At", "New", "You", "By", "From", "Many", "But", "Most", "To",
)  # fmt: skip
#: Texts that are sampled at once, and tokens of each.
_ROWS, _TOKENS = 64, 64
#: Number of likeliest tokens that each is drawn from, at temperature 1; the others are mostly noise in small models.
_LIKELIEST = 1000


def text_for(lm: FrozenLM, text: str = AUTO) -> str:
    """Returns the name of the text to measure a model on: the one asked for, or for ``auto`` one that suits.

    For an embedded model this is its training corpus, ``tiny``; for any other it is text that it samples itself,
    ``sampled``.
    """
    if text != AUTO:
        return text
    return "tiny" if lm.name in EMBEDDED else SAMPLED


def model_key(lm: FrozenLM, *about: object) -> str:
    """Returns a name for a file of what a model gives on plain text, by all of its weights and its tokenizer."""
    parts = (lm.exact_fingerprint, lm.text.exact_fingerprint, lm.max_length, *about)
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:32]


def documents_of(lm: FrozenLM, text: str, folder: Path) -> Iterator[str]:
    """Iterates over the texts of a source, without end if they are sampled.

    Args:
        lm: The unedited model.
        text: ``auto``, ``sampled``, or what `read_texts` reads.
        folder: Folder in which sampled texts are kept.

    Raises:
        UserError: If there is nothing to read.
    """
    source = text_for(lm, text)
    return _sampled(lm, folder) if source == SAMPLED else read_texts(source)


def _sampled(lm: FrozenLM, folder: Path) -> Iterator[str]:
    """Yields texts that the model samples itself, part by part; each part is sampled once, then read from disk."""
    key = model_key(lm, _ROWS, _TOKENS, _LIKELIEST)
    part = 0
    while True:
        file = folder / f"{key}-{part}.json"
        if not file.is_file():
            with lm.applied.suspended():
                texts = _sample(lm, part)
            _save(texts, file)
        yield from _load(file)
        part += 1


def _sample(lm: FrozenLM, part: int) -> list[str]:
    """Samples one part of the texts, outside of any chat template; each text depends on its own number alone."""
    text = replace(lm.text, chat=False)
    numbers = range(part * _ROWS, (part + 1) * _ROWS)
    begins = all(text.prompts([""]))
    prompts = ["" if begins else _OPENINGS[number % len(_OPENINGS)] for number in numbers]
    length = min(_TOKENS, lm.max_length - 8)  # an opening has a few tokens too
    seeds = [f"text {number}" for number in numbers]
    continuations = Generation(lm.context, text).sample(prompts, length, seeds, Drawing(_LIKELIEST))
    return [prompt + text for prompt, text in zip(prompts, continuations, strict=True)]


def _load(file: Path) -> list[str]:
    try:
        texts = json.loads(file.read_text())
        assert all(isinstance(text, str) for text in texts)
    except (OSError, ValueError, TypeError, AssertionError) as error:
        raise UserError(f"{file}: corrupt ({error}); remove it, and it is sampled anew") from error
    return list(texts)


def _save(texts: list[str], file: Path) -> None:
    """Writes the file atomically, even if other processes write it too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        Path(folder, file.name).write_text(json.dumps(texts))
        Path(folder, file.name).replace(file)
