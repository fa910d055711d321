"""Edit records as tokens: the requests of a batch, and the probes that its loss reads."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from instructedit.instructions import Instructor
from instructedit.lm import Text, TokenBatch
from instructedit.records import EditRecord, EditRequest, Probe

Front = Callable[[str], str]


@dataclass
class RequestBatch:
    """What an editor is given: n edit requests.

    Attributes:
        requests: As the user said them.
        prompts: Their prompts as the editor reads them, the instruction in front where there is one.
        tokens: Prompts with targets, row i is request i.
    """

    requests: list[EditRequest]
    prompts: list[str]
    tokens: TokenBatch

    def __len__(self) -> int:
        return len(self.requests)

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        return type(self)(self.requests, self.prompts, self.tokens.to(device))


@dataclass
class ProbeBatch:
    """Probes of n requests.

    Attributes:
        tokens: Prompts with answers.
        owner: Which request each row belongs to, [rows].
        unwanted: Rows whose answer should become unlikely (ConvSent's opposite replies), bool [rows], on the host.
    """

    tokens: TokenBatch
    owner: Tensor
    unwanted: Tensor

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        return type(self)(self.tokens.to(device), self.owner.to(device), self.unwanted)


@dataclass
class EditBatch:
    """A training batch: n requests, what they should change, and what they should leave alone.

    Attributes:
        records: Where it came from.
        requests: For the editor.
        in_scope: Probes for the edit loss; the requests themselves are the first n rows.
        locality: Probes for the locality loss; None if no record has any.
    """

    records: list[EditRecord]
    requests: RequestBatch
    in_scope: ProbeBatch
    locality: ProbeBatch | None

    def __len__(self) -> int:
        return len(self.records)

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        locality = self.locality and self.locality.to(device)
        return type(self)(self.records, self.requests.to(device), self.in_scope.to(device), locality)


def plain(prompt: str) -> str:
    """No instruction in front."""
    return prompt


def batch_requests(
    text: Text,
    requests: Sequence[EditRequest],
    fronts: Sequence[Front],
    names: Sequence[str] = (),
) -> RequestBatch:
    """Tokenises edit requests, each behind its own instruction."""
    prompts = [front(r.prompt) for front, r in zip(fronts, requests, strict=True)]
    pairs = [(prompt, r.target) for prompt, r in zip(prompts, requests, strict=True)]
    names = names or [f"edit request {r.prompt!r}" for r in requests]
    return RequestBatch(list(requests), prompts, text.encode(pairs, names))


@dataclass(frozen=True)
class Collator:
    """Makes training batches of records; a pure function of the records, the draws and the seed.

    Attributes:
        text: How prompts and answers become tokens.
        instructor: Draws the instructions; None leaves prompts plain.
        rephrases: In-scope probes a record contributes beside its request, at most (drawn afresh each time).
        replies: The same for each side of ConvSent's replies.
        locality: Locality probes a record contributes, at most.
        seed: Of the draws.
    """

    text: Text
    instructor: Instructor | None
    rephrases: int = 1
    replies: int = 2
    locality: int = 2
    seed: int = 0

    def __call__(self, drawn: Sequence[tuple[int, EditRecord]]) -> EditBatch:
        """Tokenises a batch of (number of the draw, record)."""
        records = [record for _, record in drawn]
        fronts = [
            self.instructor.front(record.request, step=draw, key=record.id) if self.instructor else plain
            for draw, record in drawn
        ]
        rngs = [random.Random(f"{self.seed}/{draw}/{record.id}") for draw, record in drawn]
        requests = batch_requests(self.text, [r.request for r in records], fronts, [f"record {r.id}" for r in records])
        return EditBatch(
            records, requests, self._in_scope(records, requests, fronts, rngs), self._locality(records, rngs)
        )

    def _in_scope(
        self, records: list[EditRecord], requests: RequestBatch, fronts: list[Front], rngs: list[random.Random]
    ) -> ProbeBatch:
        chosen: list[tuple[int, Probe]] = []
        for i, (record, rng) in enumerate(zip(records, rngs, strict=True)):
            for kind, most in (
                ("generalization", self.rephrases),
                ("wanted", self.replies),
                ("opposite", self.replies),
            ):
                probes = record.of(kind)
                chosen += [(i, p) for p in rng.sample(probes, min(most, len(probes)))]
        owner = torch.tensor([*range(len(records)), *(i for i, _ in chosen)])
        unwanted = torch.tensor([False] * len(records) + [p.kind == "opposite" for _, p in chosen])
        if not chosen:
            return ProbeBatch(requests.tokens, owner, unwanted)
        more = self._encode([(fronts[i](p.prompt), p.answers[0]) for i, p in chosen], records, chosen)
        return ProbeBatch(TokenBatch.cat([requests.tokens, more]), owner, unwanted)

    def _locality(self, records: list[EditRecord], rngs: list[random.Random]) -> ProbeBatch | None:
        chosen: list[tuple[int, Probe]] = []
        for i, (record, rng) in enumerate(zip(records, rngs, strict=True)):
            probes = record.of("locality")
            chosen += [(i, p) for p in rng.sample(probes, min(self.locality, len(probes)))]
        if not chosen:
            return None
        tokens = self._encode([(p.prompt, p.answers[0]) for _, p in chosen], records, chosen)
        owner = torch.tensor([i for i, _ in chosen])
        return ProbeBatch(tokens, owner, torch.zeros(len(chosen), dtype=torch.bool))

    def _encode(
        self, pairs: list[tuple[str, str]], records: list[EditRecord], chosen: list[tuple[int, Probe]]
    ) -> TokenBatch:
        names = [f"record {records[i].id}, {p.kind} probe" for i, p in chosen]
        return self.text.encode(pairs, names)
