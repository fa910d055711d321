"""Measurements on a model with or without edits: its replies to prompts, and which weights it has."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from instructedit.edits import Edit
from instructedit.errors import UserError
from instructedit.lm import FrozenLM


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
