"""Edit records as tokens: the requests of a batch, and the probes that its loss reads."""

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

#: Share of the further in-scope probes that are asked plainly in training, where an editor reads the instruction apart.
_PLAIN = 0.5


@dataclass
class RequestBatch:
    """What an editor is given: n edit requests.

    Attributes:
        requests: As the user said them.
        prompts: Their prompts as the editor reads them, the instruction in front where there is one.
        tokens: Prompts with targets, row i is request i.
        instructions: Each one's instruction, empty for none.
    """

    requests: list[EditRequest]
    prompts: list[str]
    tokens: TokenBatch
    instructions: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.requests)

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        return replace(self, tokens=self.tokens.to(device))


@dataclass
class ProbeBatch:
    """Probes of n requests.

    Attributes:
        tokens: Prompts with answers.
        request_index: Which request each row belongs to, [rows].
        unwanted: Rows whose answer should become unlikely (ConvSent's opposite replies), bool [rows], on the host.
    """

    tokens: TokenBatch
    request_index: Tensor
    unwanted: Tensor

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        return type(self)(self.tokens.to(device), self.request_index.to(device), self.unwanted)


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

    @property
    def tokens(self) -> list[TokenBatch]:
        """All rows of it; the requests' are among those of `in_scope`."""
        return [self.in_scope.tokens, *([self.locality.tokens] if self.locality else [])]

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        locality = self.locality and self.locality.to(device)
        return type(self)(self.records, self.requests.to(device), self.in_scope.to(device), locality)


def batch_requests(
    text: Text, requests: Sequence[EditRequest], prefixes: Sequence[str] = (), names: Sequence[str] = (),
    apart: bool = False,
) -> RequestBatch:  # fmt: skip
    """Tokenises edit requests.

    Args:
        text: How prompts and answers become tokens.
        requests: The requests.
        prefixes: The instruction of each one, in front of its prompt; none by default.
        names: What to call each in errors.
        apart: Leave prompts plain: the editor reads instructions beside them.
    """
    instructions = list(prefixes) or [""] * len(requests)
    prompts = [r.prompt if apart else prefix + r.prompt for prefix, r in zip(instructions, requests, strict=True)]
    pairs = [(prompt, r.target) for prompt, r in zip(prompts, requests, strict=True)]
    names = names or [f"edit request {r.prompt!r}" for r in requests]
    return RequestBatch(list(requests), prompts, text.encode(pairs, names), instructions)


def batch_rendered(text: Text, rendered: Sequence[RenderedRecord]) -> RequestBatch:
    """Tokenises the requests of records whose instructions are drawn."""
    names = [f"record {one.record.id}" for one in rendered]
    apart = any(one.apart for one in rendered)
    requests, prefixes = [one.record.request for one in rendered], [one.prefix for one in rendered]
    return batch_requests(text, requests, prefixes, names, apart)


@dataclass(frozen=True)
class Collator:
    """Makes training batches of records; a pure function of the records, the draws and the seed.

    Attributes:
        text: How prompts and answers become tokens.
        instructor: Draws the instructions; None leaves prompts plain.
        rephrases: In-scope probes a record contributes beside its request, at most (drawn afresh each time).
        portability: The same for probes of what follows from the edit.
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
    portability: int = 0

    def __call__(self, drawn: Sequence[tuple[int, EditRecord]]) -> EditBatch:
        """Tokenises a batch of (number of the draw, record)."""
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
        plain = {(i, p) for i, p in chosen if rendered[i].apart and rngs[i].random() < _PLAIN}
        # What an editor reads plainly is asked behind its instruction too.
        chosen = [(i, one.record.reliability) for i, one in enumerate(rendered) if one.apart] + chosen
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
    """Draws probes of each record, at most so many of each kind, with the record's number."""
    chosen: list[tuple[int, Probe]] = []
    for i, (one, rng) in enumerate(zip(rendered, rngs, strict=True)):
        for kind, count in most.items():
            probes = one.record.of(kind)
            chosen += [(i, p) for p in rng.sample(probes, min(count, len(probes)))]
    return chosen
