"""Which prompts an edit is for: gates that compare a prompt with the entries of an edit."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

#: Numbers that a comparison of prompts and entries holds at once, at most (128 MB).
_ROOM = 1 << 25


class Prompts(Protocol):
    """What a gate may read of prompts: hidden states that enter a block of the unedited model, normalised."""

    def __call__(self, block: int) -> Tensor:
        """At the last token, and on average, [prompts, 2 · hidden]."""

    def tokens(self, block: int) -> tuple[Tensor, Tensor]:
        """At each token, [prompts, seq, hidden], and which of them are there, bool [prompts, seq]."""


def token_weights(states: Tensor, there: Tensor, importance: Tensor) -> Tensor:
    """Weighs the tokens of prompts by a learned direction of their states: a softmax over each prompt, [prompts, seq].

    Args:
        states: States at each token, [prompts, seq, hidden].
        there: Which tokens exist, bool [prompts, seq].
        importance: The direction, [hidden].
    """
    return (states @ importance).masked_fill(~there, -torch.inf).softmax(-1)


class Gate(NamedTuple):
    """Which prompts are in scope of which entry: logit = bias − scale · ‖P q − k‖², in scope where it is positive.

    Attributes:
        keys: One for each entry, [n, entries, size].
        projection: P, [size, query].
        bias: Scalar.
        scale: Scalar, positive.
        block: Queries q are made of hidden states that enter this block (`ContextStates.scope_embedding`), scalar.
    """

    keys: Tensor
    projection: Tensor
    bias: Tensor
    scale: Tensor
    block: Tensor

    def logits(self, query: Tensor, rows: Tensor) -> Tensor:
        """For each row its prompt against the entries of its edit, [rows, entries]."""
        gaps = (query @ self.projection.T).unsqueeze(1) - self.keys[rows]
        return self.bias - self.scale * gaps.square().sum(-1)

    def scores(self, prompts: Prompts, rows: Tensor) -> Tensor:
        """The same of prompts that are read now, a part of them at a time."""
        query = prompts(int(self.block)).to(self.projection.dtype)
        size = max(1, _ROOM // self.keys[0].numel())
        return torch.cat([self.logits(*part) for part in zip(query.split(size), rows.split(size), strict=True)])

    def select(self, chosen: list[int]) -> Gate:
        """The keys of the chosen edits."""
        return self._replace(keys=self.keys[chosen])

    def joined(self) -> Gate:
        """All keys as those of one edit."""
        return self._replace(keys=self.keys.flatten(0, 1)[None])

    def beside(self, other: Gate) -> Gate:
        """The keys of both, edit by edit; all else is taken to be the same."""
        return self._replace(keys=torch.cat([self.keys, other.keys], 1))


class MatchGate(NamedTuple):
    """Which prompts are in scope of which entry, by two readings of both.

    logit = bias + oᵀq − scale · ‖P q − k‖² − sharpness · (1 − Σ_i w_i max_j cos(t_i, T x_j))
    − backward · (1 − Σ_j v_j max_i cos(T x_j, t_i)) − crowd · log entries, in scope where it is positive. q is read of
    the whole prompt and says what is asked; the x_j are its tokens, among which each token t_i of the request looks for
    its like (late interaction; Khattab and Zaharia 2020), and the other way about: there subjects differ, and a shorter
    name of a subject is found in a longer one. v is the softmax of aᵀx_j over the prompt's tokens, w that of the
    request's. oᵀq depends on the question alone. The more entries there are, the closer a match must be.

    Attributes:
        keys: k of each entry, [n, entries, size].
        tokens: t of each entry, unit vectors, [n, entries, tokens, width]; zeros are padding.
        weights: w of each entry, [n, entries, tokens]; they sum to one, padding has none.
        projection: P, [size, 2 · hidden].
        token_projection: T, [width, hidden].
        opening: o, [2 · hidden].
        importance: a, [hidden].
        bias, scale, sharpness, backward, crowd: Scalars.
        block, token_block: Blocks whose inputs q and x are, scalars.
    """

    keys: Tensor
    tokens: Tensor
    weights: Tensor
    projection: Tensor
    token_projection: Tensor
    opening: Tensor
    importance: Tensor
    bias: Tensor
    scale: Tensor
    sharpness: Tensor
    backward: Tensor
    crowd: Tensor
    block: Tensor
    token_block: Tensor

    def scores(self, prompts: Prompts, rows: Tensor) -> Tensor:
        """Returns the logit of each row's prompt for each entry of its edit, [rows, entries].

        All rows of an edit are compared with its entries at once, without padding, which most of many entries is.
        """
        query = prompts(int(self.block)).to(self.projection.dtype)
        asked, opened = query @ self.projection.T, query @ self.opening
        states, there = prompts.tokens(int(self.token_block))
        states = states.to(self.projection.dtype)
        words = F.normalize(states[there] @ self.token_projection.T, dim=-1)
        matter = token_weights(states, there, self.importance)[there]
        lengths = there.sum(-1)
        spans = torch.cat([words, matter.unsqueeze(-1)], -1).split(lengths.tolist())
        order, found = [], []
        for edit in rows.unique().tolist():
            own = (rows == edit).nonzero().squeeze(-1)
            size = max(1, _ROOM // max(1, int(lengths[own].max() * (self.weights[edit] > 0).sum())))
            for part in own.split(size):
                order.append(part)
                together = torch.cat([spans[row] for row in part.tolist()])
                words, matter = together[:, :-1], together[:, -1]
                own_logits = self._logits(asked[part], words, matter, lengths[part], edit)
                found.append(own_logits + opened[part].unsqueeze(-1))
        return torch.cat(found)[torch.cat(order).argsort()]

    def _logits(self, asked: Tensor, words: Tensor, matter: Tensor, lengths: Tensor, edit: int) -> Tensor:
        """Computes the logits of prompts for the entries of one edit but for oᵀq, [prompts, entries].

        Args:
            asked: P q of each prompt, [prompts, size].
            words: T x of all their tokens, one prompt's behind the other's, [tokens, width].
            matter: v of these tokens, [tokens].
            lengths: Number of tokens of each, [prompts].
            edit: Index of the edit.
        """
        weights = self.weights[edit]
        real = weights > 0
        tokens, sizes = self.tokens[edit][real], real.sum(-1)
        entry = real.nonzero()[:, 0]
        prompt = torch.arange(len(asked), device=lengths.device).repeat_interleave(lengths)
        alike = _best(words, tokens, lengths).to(weights.dtype)  # products are of less precision under autocast
        matched = alike.new_zeros(len(asked), len(real)).index_add(1, entry, alike * weights[real])
        best = _best(tokens, words, sizes).to(weights.dtype)
        covered = best.new_zeros(len(real), len(asked)).index_add(1, prompt, best * matter).T
        keys = self.keys[edit]  # not ‖Pq − k‖² of each pair: prompts × entries × size numbers
        distance = asked.square().sum(-1, keepdim=True) + keys.square().sum(-1) - 2 * asked @ keys.T
        needed = self.crowd * math.log(self.keys.shape[1])
        missing = self.sharpness * (1 - matched) + self.backward * (1 - covered)
        return self.bias - self.scale * distance - missing - needed

    def select(self, chosen: list[int]) -> MatchGate:
        """The entries of the chosen edits."""
        return self._replace(**{name: tensor[chosen] for name, tensor in self._entries().items()})

    def joined(self) -> MatchGate:
        """All entries as those of one edit."""
        return self._replace(**{name: tensor.flatten(0, 1)[None] for name, tensor in self._entries().items()})

    def beside(self, other: MatchGate) -> MatchGate:
        """The entries of both, edit by edit; all else is taken to be the same."""
        width = max(self.tokens.shape[2], other.tokens.shape[2])
        pairs = zip(self._padded(width).items(), other._padded(width).values(), strict=True)
        return self._replace(**{name: torch.cat([own, more], 1) for (name, own), more in pairs})

    def _entries(self) -> dict[str, Tensor]:
        return {"keys": self.keys, "tokens": self.tokens, "weights": self.weights}

    def _padded(self, width: int) -> dict[str, Tensor]:
        missing = width - self.tokens.shape[2]
        tokens, weights = F.pad(self.tokens, (0, 0, 0, missing)), F.pad(self.weights, (0, missing))
        return {"keys": self.keys, "tokens": tokens, "weights": weights}


def _best(vectors: Tensor, others: Tensor, lengths: Tensor) -> Tensor:
    """For each segment of `vectors` the largest product with each of `others`, [segments, others].

    Both directions multiply anew: the transpose of one product, and its gradient's, take longer.
    """
    return torch.segment_reduce(vectors @ others.T, "max", lengths=lengths, axis=0)
