"""Measurements on a model with or without edits: its replies to prompts, and its predictions on plain text."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
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
class Reply:
    """The model's reply to one prompt, and its probabilities of the target.

    Attributes:
        words: Greedy continuation of the prompt.
        token_probability: Probability of the target per token: exp of the mean of log p over its tokens.
        probability: Probability of the whole target: the product over its tokens.
        rank: Rank of the target's first token among all tokens; 1 is the most likely.
        predicted: Whether every token of the target is the most likely one at its position, so that the greedy
            continuation begins with the target.
        target_tokens: Number of tokens of the target.
    """

    words: str
    token_probability: float
    probability: float
    rank: int
    predicted: bool
    target_tokens: int


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


@torch.no_grad()
def replies(
    lm: FrozenLM, asked: Sequence[tuple[str, str]], edit: Edit | None, rows: Sequence[int], start: int,
    max_new_tokens: int,
) -> list[Reply]:  # fmt: skip
    """Asks the model all prompts at once and returns its replies.

    Args:
        lm: The model.
        asked: (prompt, target) pairs.
        edit: The edits to apply; None asks the unedited model.
        rows: Index of the edit for each prompt.
        start: The lowest edited block; the unedited and the edited model share the states below it.
        max_new_tokens: Largest number of tokens in a reply.
    """
    tokens = lm.encode(asked, scored=True)
    answers = tokens.answers
    index = None if edit is None else torch.tensor(rows, device=lm.device)

    def score(logits: Tensor, at: slice) -> tuple[Tensor, ...]:
        logits = logits.float()
        own = logits.gather(-1, answers[at].unsqueeze(-1))
        nll = logits.logsumexp(-1) - own.squeeze(-1)
        return nll, (logits > own).sum(-1) + 1, logits.argmax(-1) == answers[at]

    columns = lm.scores.chunked_logits(lm.scores.states(tokens, edit, index, start), score)
    if columns[0].isnan().any():
        raise UserError(f"{lm.name}: its logits are not numbers (NaN), which is no score; try dtype float32")
    parts = [column.cpu().split(tokens.answer_sizes()) for column in columns]
    words = lm.generate([prompt for prompt, _ in asked], max_new_tokens, edit, None if edit is None else list(rows))
    return [
        Reply(text, math.exp(-nll.mean()), math.exp(-nll.sum()), int(rank[0]), bool(right.all()), len(nll))
        for text, nll, rank, right in zip(words, *parts, strict=True)
    ]


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
    means = torch.stack([column.view(n, count).mean(-1) for column in columns], -1).tolist()
    return [Drift(max(0.0, kl), _exp(old), _exp(new), count) for kl, old, new in means]


def _exp(nll: float) -> float:
    """Returns the perplexity; infinite if it exceeds the range of floats."""
    return math.exp(nll) if nll < 700 else math.inf


def weights_fingerprint(lm: FrozenLM) -> str:
    """Computes a fingerprint of a model's weights (sha256, hex) from names, shapes and a sample in bfloat16.

    Unlike `FrozenLM.fingerprint` it is the same in float32 and bfloat16, and under other versions of transformers.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(lm.model.state_dict().items()):
        sample = tensor.detach().flatten()[:: max(1, tensor.numel() // 1024)]
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(sample.to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()
