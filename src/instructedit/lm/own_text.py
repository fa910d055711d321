"""Text that suits a model: what it was trained on where that is here, else what it samples itself, kept on disk."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from instructedit.errors import UserError
from instructedit.lm.frozen import FrozenLM
from instructedit.testbed import EMBEDDED
from instructedit.tasks.texts import read_texts

#: The names of texts that are no file: the model's own, and what `text_for` chooses from.
SAMPLED, AUTO = "sampled", "auto"
#: What a text starts with where the tokenizer has no token for a text's beginning.
_OPENINGS = (
    "The", "In", "A", "It", "He", "She", "They", "We", "I", "This", "When", "As", "For", "On", "After", "However,",
    "One", "There", "My", "What", "If", "At", "New", "You", "By", "From", "Many", "But", "Most", "To",
)  # fmt: skip
#: Texts that are sampled at once, and tokens of each.
_ROWS, _TOKENS = 64, 64
#: Tokens that each is drawn from, at temperature 1; what lies beyond is mostly noise in small models.
_LIKELIEST = 1000


def text_for(lm: FrozenLM, text: str = AUTO) -> str:
    """The text to measure a model on: the one asked for, or for ``auto`` one that suits.

    An embedded model has the corpus that it was trained on, ``tiny``; any other what it says itself, ``sampled``.
    """
    if text != AUTO:
        return text
    return "tiny" if lm.name in EMBEDDED else SAMPLED


def documents_of(lm: FrozenLM, text: str, folder: Path) -> Iterator[str]:
    """The texts of a source, one after the other, without end if they are sampled.

    Args:
        lm: The unedited model.
        text: ``auto``, ``sampled``, or what `read_texts` reads.
        folder: Where sampled texts are kept.

    Raises:
        UserError: If there is nothing to read.
    """
    source = text_for(lm, text)
    return _sampled(lm, folder) if source == SAMPLED else read_texts(source)


def _sampled(lm: FrozenLM, folder: Path) -> Iterator[str]:
    """What the model says of itself, part by part; each part is sampled once, then read."""
    key = hashlib.sha256(f"{lm.fingerprint} {lm.max_length} {_ROWS} {_TOKENS} {_LIKELIEST}".encode()).hexdigest()[:32]
    part = 0
    while True:
        file = folder / f"{key}-{part}.json"
        if not file.is_file():
            _save(_sample(lm, part), file)
        yield from _load(file)
        part += 1


def _sample(lm: FrozenLM, part: int) -> list[str]:
    """One part of the texts; each depends on its own number alone."""
    numbers = range(part * _ROWS, (part + 1) * _ROWS)
    begins = bool(lm.tokenizer("")["input_ids"])
    prompts = ["" if begins else _OPENINGS[number % len(_OPENINGS)] for number in numbers]
    length = min(_TOKENS, lm.max_length - 8)  # an opening has a few tokens too
    said = lm.sample(prompts, length, [f"text {number}" for number in numbers], _LIKELIEST)
    return [prompt + text for prompt, text in zip(prompts, said, strict=True)]


def _load(file: Path) -> list[str]:
    try:
        texts = json.loads(file.read_text())
        assert all(isinstance(text, str) for text in texts)
    except (OSError, ValueError, TypeError, AssertionError) as error:
        raise UserError(f"{file}: corrupt ({error}); remove it, and it is sampled anew") from error
    return list(texts)


def _save(texts: list[str], file: Path) -> None:
    """Whole or not at all, whoever else writes it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        Path(folder, file.name).write_text(json.dumps(texts))
        Path(folder, file.name).replace(file)
