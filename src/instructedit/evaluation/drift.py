"""How far an edit moves a model's predictions on plain text that has nothing to do with it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from instructedit.edits import Edit
from instructedit.errors import UserError
from instructedit.lm import FrozenLM, TokenBatch
from instructedit.lm.own_text import documents_of
from instructedit.lm.position_losses import answer_losses, divergences
from instructedit.paths import cache_folder

#: Largest number of rows of the fixed text sample, and of tokens in a row.
_ROWS, _LENGTH = 4, 64
#: Largest number of texts that the sample is taken from.
_TEXTS = 200


@dataclass(frozen=True)
class Drift:
    """Change that an edit makes to the predictions on unrelated text.

    Attributes:
        kl: Mean over the positions of KL(unedited ‖ edited) of the next token's distribution, in nats.
        perplexity_before: Perplexity of the text under the unedited model.
        perplexity_after: Perplexity of the text under the edited model.
        positions: Number of predictions that these are means of.
    """

    kl: float
    perplexity_before: float
    perplexity_after: float
    positions: int


def text_sample(lm: FrozenLM, text: str) -> TokenBatch:
    """Returns the first tokens of a text, at most 256, each to be predicted from those before it in its row.

    Args:
        lm: The model, whose tokenizer is used.
        text: Source for `instructedit.lm.own_text.documents_of`: ``tiny``, a file, ``sampled``, or a hub id.

    Raises:
        UserError: If there is no text.
    """
    texts = itertools.islice(documents_of(lm, text, cache_folder() / "sampled"), _TEXTS)
    plain = "\n".join(document for document in texts if not document.startswith("Task:"))  # no instructions
    length = min(_LENGTH, lm.max_length)
    ids = lm.text.document(plain)[: _ROWS * length]
    rows = [row for i in range(0, len(ids), length) if len(row := ids[i : i + length]) > 1]
    if not rows:
        raise UserError(f"{text}: no text in it to compare predictions on")
    return TokenBatch.of([(row, len(row) - 1) for row in rows]).to(lm.device)


@torch.no_grad()
def drifts(lm: FrozenLM, sample: TokenBatch, edit: Edit) -> list[Drift]:
    """Measures how far each of n edits moves the predictions on a text sample.

    Args:
        lm: The model.
        sample: The sample from `text_sample`.
        edit: The edits.

    Raises:
        UserError: If an edited model's logits are NaN.
    """
    n, count = len(edit), len(sample.answers)
    before = lm.scores.unedited_states(sample, lm.first_block(edit.sites))
    tiled = sample.select(torch.arange(len(sample)).repeat(n))
    edit_index = torch.arange(n, device=lm.device).repeat_interleave(len(sample))
    answers = tiled.answers

    def drift(logits: Tensor, at: slice) -> tuple[Tensor, ...]:
        same = torch.arange(at.start, at.stop, device=lm.device) % count
        unedited = lm.forward.head(before[same])
        return divergences(logits, unedited), answer_losses(unedited, answers[at]), answer_losses(logits, answers[at])

    columns = lm.scores.chunked_logits(lm.scores.states(tiled, edit, edit_index), drift)
    means = torch.stack([column.view(n, count).mean(-1) for column in columns], -1)
    if means.isnan().any():
        raise UserError(f"{lm.name}: its logits on plain text are not numbers (NaN); try dtype float32")
    return [Drift(max(0.0, kl), _exp(old), _exp(new), count) for kl, old, new in means.tolist()]


def _exp(nll: float) -> float:
    """Returns the perplexity; infinite if it exceeds the range of floats."""
    return math.exp(nll) if nll < 700 else math.inf
