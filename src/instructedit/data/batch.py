"""Batches of edit records as tokens: the requests, and the probes of the loss."""

from __future__ import annotations

import random
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from instructedit.instructions import Instructor, RenderedRecord, render_records
from instructedit.lm import Text, TokenBatch
from instructedit.records import EditRecord, EditRequest, Probe

#: Share of additional in-scope probes without an instruction in training, if an editor reads instructions separately.
_PLAIN = 0.5


@dataclass
class RequestBatch:
    """The input of an editor: n edit requests.

    Attributes:
        requests: The requests as given by the user.
        prompts: Their prompts as the editor reads them, with any prepended instructions.
        tokens: Prompts with targets; row i is request i.
        instructions: Each request's instruction; empty if it has none.
    """

    requests: list[EditRequest]
    prompts: list[str]
    tokens: TokenBatch
    instructions: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.requests)

    def to(self, device: torch.device | str) -> Self:
        """Moves the batch to another device."""
        return replace(self, tokens=self.tokens.to(device))


@dataclass
class ProbeBatch:
    """Tokenised probes of n requests.

    Attributes:
        tokens: Prompts with answers.
        request_index: Index of each row's request, [rows].
        unwanted: Rows whose answer should become unlikely (ConvSent's opposite replies), bool [rows], on the host.
    """

    tokens: TokenBatch
    request_index: Tensor
    unwanted: Tensor

    def to(self, device: torch.device | str) -> Self:
        """Moves the batch to another device."""
        return type(self)(self.tokens.to(device), self.request_index.to(device), self.unwanted)


@dataclass
class EditBatch:
    """A training batch: n requests, what they should change, and what they should leave alone.

    Attributes:
        records: The records that it was made from.
        requests: The requests, for the editor.
        in_scope: Probes for the edit loss; the requests themselves are the first n rows.
        locality: Probes for the locality loss; None if no record has any.
    """

    records: list[EditRecord]
    requests: RequestBatch
    in_scope: ProbeBatch
    locality: ProbeBatch | None

    def __len__(self) -> int:
        return len(self.records)

    @property
    def tokens(self) -> list[TokenBatch]:
        """All rows of the batch; those of the requests are included in `in_scope`."""
        return [self.in_scope.tokens, *([self.locality.tokens] if self.locality else [])]

    def to(self, device: torch.device | str) -> Self:
        """Moves the batch to another device."""
        locality = self.locality and self.locality.to(device)
        return type(self)(self.records, self.requests.to(device), self.in_scope.to(device), locality)


def batch_requests(
    text: Text, requests: Sequence[EditRequest], prefixes: Sequence[str] = (), names: Sequence[str] = (),
    apart: bool = False,
) -> RequestBatch:  # fmt: skip
    """Tokenises edit requests.

    Args:
        text: Tokenization of prompts and answers.
        requests: The requests.
        prefixes: Each request's instruction, to prepend to its prompt; none by default.
        names: Name of each request in errors.
        apart: Leave prompts plain, because the editor reads instructions separately.
    """
    instructions = list(prefixes) or [""] * len(requests)
    prompts = [r.prompt if apart else prefix + r.prompt for prefix, r in zip(instructions, requests, strict=True)]
    pairs = [(prompt, r.target) for prompt, r in zip(prompts, requests, strict=True)]
    names = names or [f"edit request {r.prompt!r}" for r in requests]
    return RequestBatch(list(requests), prompts, text.encode(pairs, names), instructions)


def batch_rendered(text: Text, rendered: Sequence[RenderedRecord]) -> RequestBatch:
    """Tokenises the requests of rendered records."""
    names = [f"record {one.record.id}" for one in rendered]
    apart = any(one.apart for one in rendered)
    requests, prefixes = [one.record.request for one in rendered], [one.prefix for one in rendered]
    return batch_requests(text, requests, prefixes, names, apart)


@dataclass(frozen=True)
class Collator:
    """Makes training batches from records, as a pure function of the records, the draws and the seed.

    Attributes:
        text: Tokenization of prompts and answers.
        instructor: Draws the instructions; None leaves prompts plain.
        rephrases: Most in-scope probes that a record adds to its request (drawn anew each time).
        portability: Most probes of the edit's implications that a record adds.
        replies: Most replies of each sentiment that a ConvSent record adds.
        locality: Most locality probes that a record adds.
        seed: Seed of the draws.
    """

    text: Text
    instructor: Instructor | None
    rephrases: int = 1
    replies: int = 2
    locality: int = 2
    seed: int = 0
    portability: int = 0

    def __call__(self, drawn: Sequence[tuple[int, EditRecord]]) -> EditBatch:
        """Makes a batch from pairs of (number of the draw, record)."""
        steps, records = [draw for draw, _ in drawn], [record for _, record in drawn]
        rendered = render_records(records, self.instructor, steps)
        rngs = [random.Random(f"{self.seed}/{draw}/{record.id}") for draw, record in drawn]
        requests = batch_rendered(self.text, rendered)
        return EditBatch(records, requests, self._in_scope(rendered, requests, rngs), self._locality(rendered, rngs))

    def _in_scope(
        self, rendered: list[RenderedRecord], requests: RequestBatch, rngs: list[random.Random]
    ) -> ProbeBatch:
        most = {
            "generalization": self.rephrases, "portability": self.portability,
            "wanted": self.replies, "opposite": self.replies,
        }  # fmt: skip
        chosen = _drawn(rendered, rngs, most)
        apart = [one.apart and one.prefix != "" for one in rendered]
        plain = {(i, p) for i, p in chosen if apart[i] and rngs[i].random() < _PLAIN}
        # Requests that an editor reads plainly are also scored with their instruction prepended.
        chosen = [(i, one.record.reliability) for i, one in enumerate(rendered) if apart[i]] + chosen
        request_index = torch.tensor([*range(len(rendered)), *(i for i, _ in chosen)])
        unwanted = torch.tensor([False] * len(rendered) + [p.kind == "opposite" for _, p in chosen])
        if not chosen:
            return ProbeBatch(requests.tokens, request_index, unwanted)
        more = self._encode(rendered, chosen, plain)
        return ProbeBatch(TokenBatch.cat([requests.tokens, more]), request_index, unwanted)

    def _locality(self, rendered: list[RenderedRecord], rngs: list[random.Random]) -> ProbeBatch | None:
        chosen = _drawn(rendered, rngs, {"locality": self.locality})
        if not chosen:
            return None
        request_index = torch.tensor([i for i, _ in chosen])
        return ProbeBatch(self._encode(rendered, chosen), request_index, torch.zeros(len(chosen), dtype=torch.bool))

    def _encode(
        self, rendered: list[RenderedRecord], chosen: list[tuple[int, Probe]], plain: Container[Any] = ()
    ) -> TokenBatch:
        pairs = [(p.prompt if (i, p) in plain else rendered[i].ask(p), p.answers[0]) for i, p in chosen]
        return self.text.encode(pairs, [f"record {rendered[i].record.id}, {p.kind} probe" for i, p in chosen])


def _drawn(
    rendered: list[RenderedRecord], rngs: list[random.Random], most: Mapping[str, int]
) -> list[tuple[int, Probe]]:
    """Draws probes from each record, at most `most` of each kind, and pairs each with its record's index."""
    chosen: list[tuple[int, Probe]] = []
    for i, (one, rng) in enumerate(zip(rendered, rngs, strict=True)):
        for kind, count in most.items():
            probes = one.record.of(kind)
            chosen += [(i, p) for p in rng.sample(probes, min(count, len(probes)))]
    return chosen
