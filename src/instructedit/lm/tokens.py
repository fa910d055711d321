"""Token batches of prompts and answers: right-padded, with the answer positions marked."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import torch
from torch import Tensor

Shape = TypeVar("Shape", bound=tuple[int, ...])
HOST = torch.device("cpu")
#: Label of a position whose output is not used.
IGNORE = -100


@dataclass
class TokenBatch:
    """A batch of token rows, with the answers' tokens as labels.

    The tokens themselves stay on the host, so that lengths, places and cache keys need no device sync; `inputs`,
    `answer_at`, `rows` and `answers` are on the model's device.

    Attributes:
        input_ids: [rows, seq], padded on the right.
        attention_mask: [rows, seq], 0 on padding.
        labels: [rows, seq]: at each position the token that should come *next*, where that token belongs to the
            answer; `IGNORE` elsewhere. So the position that predicts the first answer token is labelled too.
        truncated: Number of rows whose prompt had to lose its beginning.
        device: Device of the model.
        unscored: Number of tokens of each answer before its first label, [rows]; None if there are none.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    truncated: int = 0
    device: torch.device = HOST
    unscored: Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @functools.cached_property
    def inputs(self) -> dict[str, Tensor]:
        """Inputs of the model; nothing is masked, since no token attends to the padding after it."""
        ids = self.input_ids.to(self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Number of tokens in each row, without padding."""
        sizes: list[int] = self.attention_mask.sum(-1).tolist()
        return sizes

    def unpadded(self) -> list[list[int]]:
        """Returns the token ids of each row, without padding."""
        return [ids[:size] for ids, size in zip(self.input_ids.tolist(), self.lengths, strict=True)]

    @functools.cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Row and position of each answer token's prediction, both [positions], row by row, on the host."""
        rows, positions = torch.nonzero(self.labels != IGNORE, as_tuple=True)
        return rows, positions

    @functools.cached_property
    def answer_at(self) -> tuple[Tensor, Tensor]:
        """Row and position of each answer token's prediction, both [positions], on the model's device."""
        rows, positions = self.places
        return rows.to(self.device), positions.to(self.device)

    @property
    def rows(self) -> Tensor:
        """Row of each answer position, [positions]."""
        return self.answer_at[0]

    @functools.cached_property
    def answers(self) -> Tensor:
        """The answer tokens of all rows, [positions]."""
        return self.labels[self.places].to(self.device)

    def answer_sizes(self) -> list[int]:
        """Counts the answer tokens of each row."""
        sizes: list[int] = self.places[0].bincount(minlength=len(self)).tolist()
        return sizes

    def to(self, device: torch.device | str) -> Self:
        """Moves the batch to another device, but for the tokens, which stay on the host."""
        return replace(self, device=torch.device(device))

    def select(self, rows: Tensor) -> Self:
        """Selects rows, no wider than the longest of them."""
        rows = rows.cpu()
        width = int(self.attention_mask[rows].sum(-1).max())
        return replace(
            self, input_ids=self.input_ids[rows, :width], attention_mask=self.attention_mask[rows, :width],
            labels=self.labels[rows, :width], truncated=0,
            unscored=None if self.unscored is None else self.unscored[rows],
        )  # fmt: skip

    def in_shapes(self, limit: int, tokens: int) -> Iterator[tuple[list[int], Self]]:
        """Yields row numbers and rows in parts of one width each, which follows from a row's own length (`rounded_up`).

        On a CPU, the results of a row are then bit-identical whatever rows come with it: the order of summation in its
        matrix products depends on the number of rows, but is the same for all multiples of eight.

        Args:
            limit: Maximum number of tokens in a row.
            tokens: Maximum number of tokens in a part, padding included.
        """
        for (width,), part in alike([(min(rounded_up(size), limit),) for size in self.lengths], tokens):
            rows = self.select(torch.tensor(part))
            more = (0, width - rows.input_ids.shape[1])
            pad = torch.nn.functional.pad
            yield part, replace(
                rows, input_ids=pad(rows.input_ids, more), attention_mask=pad(rows.attention_mask, more),
                labels=pad(rows.labels, more, value=IGNORE),
            )  # fmt: skip

    def padded(self, states: Sequence[Tensor]) -> Tensor:
        """Stacks values of each row's tokens, [length, …] each, into [rows, seq, …], with zeros at padding."""
        whole = states[0].new_zeros(*self.input_ids.shape, *states[0].shape[1:])
        for i, own in enumerate(states):
            whole[i, : len(own)] = own
        return whole

    def read_part(self) -> Self:
        """Returns the rows up to their last answer position: the model's outputs after it are not used."""
        answered = self.labels != IGNORE
        ends = (torch.arange(1, answered.shape[1] + 1) * answered).amax(-1)
        mask = (torch.arange(answered.shape[1]) < ends.unsqueeze(-1)).long()
        width = int(ends.max())
        return replace(
            self, input_ids=self.input_ids[:, :width], attention_mask=mask[:, :width], labels=self.labels[:, :width],
            truncated=0,
        )  # fmt: skip

    def prompts(self) -> Self:
        """Returns the rows without their answers."""
        first = (self.labels != IGNORE).long().argmax(-1)  # the last token of the prompt predicts the answer's first
        answered = (self.labels != IGNORE).any(-1)
        if self.unscored is not None:
            first = (first - self.unscored).clamp(min=0)
        ends = torch.where(answered, first + 1, self.attention_mask.sum(-1))
        mask = (torch.arange(self.input_ids.shape[1]) < ends.unsqueeze(-1)).long()
        width = int(ends.max())
        return replace(
            self, input_ids=self.input_ids[:, :width], attention_mask=mask[:, :width],
            labels=torch.full_like(self.labels[:, :width], IGNORE), truncated=0, unscored=None,
        )  # fmt: skip

    def after_prompts(self) -> Self:
        """Reduces each row to one answer position: the prompt's last token, which predicts the answer's first."""
        last = (self.labels != IGNORE).long().argmax(-1, keepdim=True)
        labels = torch.full_like(self.labels, IGNORE).scatter(-1, last, self.labels.gather(-1, last))
        return replace(self, labels=labels)

    def behind(self, contexts: Sequence[Tensor], max_length: int, opening: Sequence[int] = ()) -> TokenBatch:
        """Prepends a context to each row; the context loses its beginning if both together are too long.

        Args:
            contexts: Token ids, one sequence for each row.
            max_length: Maximum number of tokens in a row.
            opening: Tokens that stay in front of the context where a row starts with them (LLaMA's ``<s>``).
        """
        rows, labels = [], []
        for i, (own, context) in enumerate(zip(self.unpadded(), contexts, strict=True)):
            rows.append(prepend_context(own, context.tolist(), max_length, opening))
            label = self.labels[i, : len(own)].tolist()
            labels.append([IGNORE] * (len(rows[-1]) - len(label)) + label[-len(rows[-1]) :])
        batch = rows_of(rows).to(self.device)
        for i, label in enumerate(labels):
            batch.labels[i, : len(label)] = torch.tensor(label)
        return batch

    def by_length(self, worth: float = 0.8) -> list[Tensor]:
        """Groups row numbers by length: all in one group, or in a short and a long one if that saves enough padding.

        Args:
            worth: Split if the two groups have at most this share of the single group's tokens, padding included.
        """
        lengths, order = torch.tensor(self.lengths).sort()
        count = torch.arange(1, len(self) + 1)
        tokens = count * lengths + (len(self) - count) * lengths[-1]
        best = int(tokens.argmin())
        if tokens[best] > worth * tokens[-1]:
            return [torch.arange(len(self))]
        return [order[: best + 1].sort().values, order[best + 1 :].sort().values]

    def in_order(self, groups: Sequence[Tensor]) -> Tensor:
        """Returns the indices of the batch's answer positions among those of row groups in sequence, [positions].

        Args:
            groups: Row numbers, each group in ascending order.
        """
        rows = self.places[0]
        places = [torch.isin(rows, group).nonzero().squeeze(-1) for group in groups]
        return torch.cat(places).argsort().to(self.device)

    @classmethod
    def of(cls, rows: Sequence[tuple[list[int], int]], truncated: int = 0, width: int = 0) -> Self:
        """Creates a batch from token ids.

        Args:
            rows: The ids of each row, and how many of the last ones are the answer's.
            truncated: Number of rows whose prompt had to lose its beginning.
            width: Number of tokens that rows are padded to at least.
        """
        width = max(width, *(len(ids) for ids, _ in rows))
        input_ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORE)
        for i, (ids, size) in enumerate(rows):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            mask[i, : len(ids)] = 1
            labels[i, len(ids) - size - 1 : len(ids) - 1] = input_ids[i, len(ids) - size : len(ids)]
        return cls(input_ids, mask, labels, truncated)

    @classmethod
    def cat(cls, batches: Sequence[Self]) -> Self:
        """Concatenates the rows of several batches."""
        width = max(b.input_ids.shape[1] for b in batches)

        def joined(name: str, fill: int) -> Tensor:
            parts = [getattr(b, name) for b in batches]
            return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1]), value=fill) for p in parts])

        return cls(
            joined("input_ids", 0), joined("attention_mask", 0), joined("labels", IGNORE),
            sum(b.truncated for b in batches), batches[0].device,
            torch.cat([torch.zeros(len(b), dtype=torch.long) if b.unscored is None else b.unscored for b in batches])
            if any(b.unscored is not None for b in batches) else None,
        )  # fmt: skip


def prepend_context(ids: list[int], context: list[int], max_length: int, opening: Sequence[int] = ()) -> list[int]:
    """Prepends a context to token ids; it loses its beginning if both are too long (see `TokenBatch.behind`)."""
    size = len(opening) if context and ids[: len(opening)] == list(opening) else 0
    budget = max(0, max_length - len(ids))
    return ids[:size] + (context[-budget:] if budget else []) + ids[size:]


def rows_of(rows: Sequence[list[int]], width: int = 0) -> TokenBatch:
    """Creates a batch without answers from token ids, padded to `width` tokens at least."""
    return TokenBatch.of([(ids, 0) for ids in rows], width=width)


#: Rows are padded to a multiple of this many tokens: a multiple of eight (see `TokenBatch.in_shapes`), and one that
#: keeps passes few, since even a pass of few rows takes as long as reading the weights.
SHAPE = 16


def rounded_up(tokens: int, multiple: int = SHAPE) -> int:
    """Rounds a number of tokens up to the next multiple."""
    return -(-tokens // multiple) * multiple


def alike(shapes: Sequence[Shape], tokens: int) -> Iterator[tuple[Shape, list[int]]]:
    """Yields each shape and the numbers of its rows, in parts of at most `tokens` tokens (or of one row)."""
    numbers: dict[Shape, list[int]] = {}
    for i, shape in enumerate(shapes):
        numbers.setdefault(shape, []).append(i)
    for shape, rows in numbers.items():
        most = max(1, tokens // sum(shape))
        yield from ((shape, rows[i : i + most]) for i in range(0, len(rows), most))
