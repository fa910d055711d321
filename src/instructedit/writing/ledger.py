"""What the questions to a language model cost, and the cap that they never pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Self

from instructedit.errors import UserError
from instructedit.writing.files import read_json, write_json

_LEAST_REPLY = 64  # tokens; no reply of use is shorter


class BudgetSpentError(UserError):
    """The next question could pass the cap."""


class Reservation(NamedTuple):
    """What one question may take: tokens in all, of which for its reply, and tries."""

    tokens: int
    reply: int
    tries: int


@dataclass
class Ledger:
    """Counts calls and tokens; a call that could pass a cap is refused before it is made.

    Attributes:
        max_calls: Cap on calls, each further try counted.
        max_tokens: Cap on tokens, of questions and replies together.
        file: Where the counts are kept after every call, so that a resumed run goes on counting.
        calls: Made so far, further tries included.
        retries: The further tries among them.
        cached: Replies that came from the cache, at no cost.
        prompt_tokens: Of the questions.
        reply_tokens: Of the replies.
        estimated: Calls whose tokens the server did not tell; estimated from the text, upwards.
    """

    max_calls: int
    max_tokens: int
    file: Path | None = None
    calls: int = 0
    retries: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    reply_tokens: int = 0
    estimated: int = 0
    _held: list[Reservation] = field(default_factory=list, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    @classmethod
    def open(cls, max_calls: int, max_tokens: int, file: Path | None = None) -> Self:
        """A ledger that goes on from the counts in its file, if there are any."""
        return cls(max_calls, max_tokens, file, **((read_json(file) if file else None) or {}))

    @property
    def tokens(self) -> int:
        """Of questions and replies."""
        return self.prompt_tokens + self.reply_tokens

    def reserve(self, prompt: int, reply: int, tries: int) -> Reservation:
        """Leave for a question that other questions cannot take away; `commit` gives back what is not used.

        Args:
            prompt: Tokens of the question, at most.
            reply: Tokens that the reply should have room for; less is given where little is left.
            tries: Tries that it should have; likewise.

        Raises:
            BudgetSpentError: If too little is left.
        """
        with self._lock:
            calls = self.max_calls - self.calls - sum(reservation.tries for reservation in self._held)
            tokens = self.max_tokens - self.tokens - sum(reservation.tokens for reservation in self._held) - prompt
            if calls < 1 or tokens < min(reply, _LEAST_REPLY):
                raise BudgetSpentError(
                    f"the budget is spent: {self}; caps: {self.max_calls} calls, {self.max_tokens} tokens"
                )
            room = min(reply, tokens)
            reservation = Reservation(prompt + room, room, min(tries, calls))
            self._held.append(reservation)
            return reservation

    def commit(
        self, reservation: Reservation, tries: int, prompt: int = 0, reply: int = 0, estimated: bool = False
    ) -> None:
        """Counts what a question took in fact."""
        with self._lock:
            self._held.remove(reservation)
            self.calls += tries
            self.retries += max(0, tries - 1)
            self.prompt_tokens += prompt
            self.reply_tokens += reply
            self.estimated += estimated
            self._save()

    def count_cached(self) -> None:
        """Counts a reply that cost nothing."""
        with self._lock:
            self.cached += 1
            self._save()

    def counts(self) -> dict[str, int]:
        """The figures as plain data."""
        names = ("calls", "retries", "cached", "prompt_tokens", "reply_tokens", "estimated")
        return {name: getattr(self, name) for name in names}

    def _save(self) -> None:
        if self.file:
            write_json(self.file, self.counts())

    def __str__(self) -> str:
        """The account in one line."""
        return (
            f"{self.calls} calls ({self.retries} of them retries), {self.cached} replies from the cache, "
            f"{self.prompt_tokens} + {self.reply_tokens} tokens"
            + (f" (estimated for {self.estimated} calls)" if self.estimated else "")
        )
