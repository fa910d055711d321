"""Cost of the questions to a language model, and the cap that it never exceeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Self

from instructedit.errors import UserError
from instructedit.writing.files import read_json, write_json

_LEAST_REPLY = 64  # tokens; no useful reply is shorter


class BudgetSpentError(UserError):
    """Error of a question that could exceed the cap."""


class Reservation(NamedTuple):
    """Budget of one question: its tokens in total, those for its reply among them, and its tries."""

    tokens: int
    reply: int
    tries: int


@dataclass
class Ledger:
    """Counter of calls and tokens that refuses a call, before it is made, if it could exceed a cap.

    Attributes:
        max_calls: Cap on calls, each further try counted.
        max_tokens: Cap on tokens, of questions and replies together.
        file: File in which the counts are saved after every call, so that a resumed run goes on counting.
        calls: Calls made so far, further tries included.
        retries: The further tries among them.
        cached: Replies that came from the cache, at no cost.
        prompt_tokens: Tokens of the questions.
        reply_tokens: Tokens of the replies.
        estimated: Calls whose tokens the server did not report; these are estimated from the text, on the high side.
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
    _reserved: list[Reservation] = field(default_factory=list, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    @classmethod
    def open(cls, max_calls: int, max_tokens: int, file: Path | None = None) -> Self:
        """Opens a ledger that goes on from the counts in its file, if there are any."""
        return cls(max_calls, max_tokens, file, **((read_json(file) if file else None) or {}))

    @property
    def tokens(self) -> int:
        """Tokens of questions and replies together, so far."""
        return self.prompt_tokens + self.reply_tokens

    def reserve(self, prompt: int, reply: int, tries: int) -> Reservation:
        """Reserves budget for a question, so that no other question can take it; `commit` gives back what is not used.

        Args:
            prompt: Tokens of the question, at most.
            reply: Tokens wanted for the reply; fewer are reserved if little is left.
            tries: Tries wanted; likewise.

        Raises:
            BudgetSpentError: If too little is left.
        """
        with self._lock:
            calls = self.max_calls - self.calls - sum(each.tries for each in self._reserved)
            tokens = self.max_tokens - self.tokens - sum(each.tokens for each in self._reserved) - prompt
            if calls < 1 or tokens < min(reply, _LEAST_REPLY):
                raise BudgetSpentError(
                    f"the budget is spent: {self}; caps: {self.max_calls} calls, {self.max_tokens} tokens"
                )
            granted = min(reply, tokens)
            reservation = Reservation(prompt + granted, granted, min(tries, calls))
            self._reserved.append(reservation)
            return reservation

    def commit(
        self, reservation: Reservation, tries: int, prompt: int = 0, reply: int = 0, estimated: bool = False
    ) -> None:
        """Counts what a question actually used, and ends its reservation."""
        with self._lock:
            self._reserved.remove(reservation)
            self.calls += tries
            self.retries += max(0, tries - 1)
            self.prompt_tokens += prompt
            self.reply_tokens += reply
            self.estimated += estimated
            self._save()

    def count_cached(self) -> None:
        """Counts a reply that came from the cache and cost nothing."""
        with self._lock:
            self.cached += 1
            self._save()

    def counts(self) -> dict[str, int]:
        """Returns the counts as plain data."""
        names = ("calls", "retries", "cached", "prompt_tokens", "reply_tokens", "estimated")
        return {name: getattr(self, name) for name in names}

    def _save(self) -> None:
        if self.file:
            write_json(self.file, self.counts())

    def __str__(self) -> str:
        """Summarises the counts in one line."""
        return (
            f"{self.calls} calls ({self.retries} of them retries), {self.cached} replies from the cache, "
            f"{self.prompt_tokens} + {self.reply_tokens} tokens"
            + (f" (estimated for {self.estimated} calls)" if self.estimated else "")
        )
