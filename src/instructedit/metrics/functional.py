"""The paper's metrics as pure functions, without state, model or files.

Answer positions are flattened over all rows of a batch, without padding: ``logits [positions, vocab]``,
``labels [positions]`` (the right token at that position) and ``rows [positions]`` (the row, 0..n_rows-1, that a
position belongs to). Shares are in 0..1 here; the paper's tables show them times 100.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: A word with its inner apostrophes and hyphens, or one mark that is neither a word nor a space.
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*|[^\w\s]")
_SENTENCE_END = re.compile(r"""[.!?…]["'”\u2019»)\]]*(?=\s|$)""")
#: Marks that may surround an answer without changing it. Signs with a meaning at an edge (C++, C#, -5, 5 %) are kept.
_SURROUNDING = " .,;:!?…\"'`“”\u2018\u2019„«»()[]{}"


def row_mean(values: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """Computes the mean of the values of each row.

    Args:
        values: Numbers or booleans, [positions].
        rows: Row of each value, [positions], integers in 0..n_rows-1, in any order.
        n_rows: Number of rows.

    Returns:
        Means, [n_rows], in float32 (float64 for float64 values); nan for a row without positions.

    Raises:
        IndexError: If a row lies outside 0..n_rows-1 (on a GPU: a device-side assertion).
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    empty = values.new_zeros(n_rows)
    return empty.index_add(0, rows, values) / empty.index_add(0, rows, torch.ones_like(values))


def token_accuracy(predicted: Tensor, labels: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """Computes the share of answer tokens predicted right under teacher forcing.

    It measures Reliability, Generalization and Portability. The paper's equations 4, 5 and 7 read as exact match; the
    field counts tokens (Yao et al. 2023), and so do we. :func:`exact_match` is the stricter reading.

    Args:
        predicted: The edited model's most likely tokens, [positions].
        labels: The answer's tokens, [positions].
        rows: Row of each position, [positions].
        n_rows: Number of rows.

    Returns:
        Shares in 0..1, [n_rows]; nan for a row without positions.
    """
    return row_mean(predicted == labels, rows, n_rows)


def exact_match(predicted: Tensor, labels: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """Returns 1 for each row whose answer tokens are all predicted right under teacher forcing, else 0.

    Args:
        predicted: The edited model's most likely tokens, [positions].
        labels: The answer's tokens, [positions].
        rows: Row of each position, [positions].
        n_rows: Number of rows.

    Returns:
        0.0 or 1.0, [n_rows]; nan for a row without positions.
    """
    return token_accuracy(predicted, labels, rows, n_rows).floor()  # only a share of exactly 1 stays 1; nan stays nan


def agreement(predicted: Tensor, reference: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """Computes Locality (paper eq. 6): the share of answer positions whose most likely token the edit left unchanged.

    Args:
        predicted: The edited model's most likely tokens, [positions].
        reference: The unedited model's most likely tokens at the same positions, [positions].
        rows: Row of each position, [positions].
        n_rows: Number of rows.

    Returns:
        Shares in 0..1, [n_rows]; nan for a row without positions.
    """
    return row_mean(predicted == reference, rows, n_rows)


def log_likelihood(logits: Tensor, labels: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """Computes the mean log-probability of the answer's tokens, in float32.

    Args:
        logits: Unnormalised scores, [positions, vocab], of any float type.
        labels: The answer's tokens, [positions], in 0..vocab-1.
        rows: Row of each position, [positions].
        n_rows: Number of rows.

    Returns:
        Nats per token, at most 0, [n_rows], float32; nan for a row without positions.

    Raises:
        RuntimeError: If a label lies outside the vocabulary, as a padding label would (on a GPU: a device-side
            assertion).
    """
    logits = logits.float()
    picked = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return row_mean(picked - logits.logsumexp(-1), rows, n_rows)


class ConvSentSuccess(NamedTuple):
    """SERAC's edit success on ConvSent and its two factors, each in 0..1 and of the inputs' shape.

    Attributes:
        success: ``sentiment * topic``.
        sentiment: z_sent: how far the edited model prefers replies with the wanted sentiment.
        topic: z_topic: 1 if the edited model finds those replies at least as likely as before the edit, else below 1.
    """

    success: Tensor
    sentiment: Tensor
    topic: Tensor


def convsent_edit_success(wanted_before: Tensor, wanted_after: Tensor, opposite_after: Tensor) -> ConvSentSuccess:
    """Computes edit success on ConvSent (Mitchell et al. 2022, SERAC): z_sent * z_topic.

    z_sent = sigmoid(wanted_after - opposite_after) and z_topic = min(1, exp(wanted_after - wanted_before)).

    Args:
        wanted_before: Mean log-probability (see :func:`log_likelihood`) of the replies with the wanted sentiment under
            the unedited model, one value per record, [records].
        wanted_after: Mean log-probability of the same replies under the edited model, [records].
        opposite_after: Mean log-probability of the replies with the opposite sentiment under the edited model,
            [records].
    """
    sentiment = torch.sigmoid(wanted_after - opposite_after)
    topic = (wanted_after - wanted_before).clamp(max=0).exp()  # min(1, exp(d)) = exp(min(0, d)), without overflow
    return ConvSentSuccess(sentiment * topic, sentiment, topic)


def ngram_entropy(text: str, n: int) -> float:
    """Computes the entropy of the text's word n-grams, -Σ f log₂ f over their relative frequencies f.

    Words are runs of letters and digits, apostrophes and hyphens inside them included; every other visible mark is a
    word of its own. Upper and lower case differ.

    Args:
        text: Any text.
        n: Length of the n-grams in words, at least 1.

    Returns:
        Bits, at least 0; 0.0 for a text of fewer than n words.
    """
    words = _WORD.findall(text)
    counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))  # zip stops at the shortest list
    total = counts.total()
    return math.fsum(count / total * math.log2(total / count) for count in counts.values())


def fluency(text: str) -> float:
    """Computes Fluency of a generated text (paper eq. 8, after ROME): 100 · (2/3·H₂ + 4/3·H₃) / 2, low if repetitive.

    Args:
        text: About 100 generated tokens; shorter texts score lower, since n words hold at most log₂ n bits.

    Returns:
        Fluency on the scale of the paper's tables, already times 100: about 600 for fluent text of 100 tokens, 0.0 for
        a text of fewer than three words.
    """
    return 100 * (2 / 3 * ngram_entropy(text, 2) + 4 / 3 * ngram_entropy(text, 3)) / 2


def answer_match(generated: str, answers: Sequence[str]) -> bool:
    """True if freely generated text gives one of the accepted answers.

    The text is cut at its first newline. The rest, as a whole or up to any of its sentence ends (``.``, ``!``, ``?`` or
    ``…`` before a space or the end), must equal an answer after normalisation: case, runs of spaces, and surrounding
    punctuation and quotes do not count. Every sentence end is tried, since an answer may contain some itself
    ("J. R. R. Tolkien", "St. Louis"). A longer sentence that only starts with an answer is no match: "Lyon is nice"
    does not answer "Lyon".

    Args:
        generated: The continuation alone, without the prompt and without special tokens.
        answers: The right answer and its aliases; any of them counts.
    """
    line = generated.split("\n", 1)[0]
    readings = [line, *(line[: end.end()] for end in _SENTENCE_END.finditer(line))]
    return not {_normalised(a) for a in answers}.isdisjoint(_normalised(r) for r in readings)


def _normalised(text: str) -> str:
    folded = " ".join(unicodedata.normalize("NFC", text.casefold()).split())
    return folded.strip(_SURROUNDING) or folded  # an answer that consists only of marks keeps them
