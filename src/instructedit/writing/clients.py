"""Language models as writers: servers that speak OpenAI's protocol, and local models.

A `Writer` asks one of them through a response cache, a `Ledger` with a hard cap, and a rate limit.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import urlsplit

from instructedit.errors import UserError
from instructedit.writing.files import read_json, write_json
from instructedit.writing.ledger import Ledger

if TYPE_CHECKING:
    import openai

    from instructedit.lm import FrozenLM

T = TypeVar("T")
R = TypeVar("R")
Message = dict[str, str]

LOCAL = "local:"
#: Settings that some servers do not know: left out once a server has refused one by name.
OPTIONAL = ("response_format", "seed", "temperature", "max_completion_tokens")


@dataclass(frozen=True)
class Question:
    """A question to a language model.

    Attributes:
        messages: The question for a model that follows instructions: ``role`` and ``content``.
        start: The question for a model that only continues text; it ends with the dash of a list's first item.
        schema: JSON schema of the reply.
        seed: Seed of the reply; another seed gives another reply.
        listing: The question for a model that chats, but is not trusted with JSON: it is to reply with a list.
    """

    messages: tuple[Message, ...]
    start: str
    schema: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    listing: str = ""


@dataclass(frozen=True)
class Reply:
    """A language model's reply to a question.

    Attributes:
        text: The text of the reply.
        refusal: The model's words if it refused.
        cut: Whether the reply hit the limit on its length.
        prompt_tokens: Tokens of the question; None if the server does not report them.
        reply_tokens: Tokens of the reply; likewise.
        retries: Tries beyond the first.
    """

    text: str
    refusal: str | None = None
    cut: bool = False
    prompt_tokens: int | None = None
    reply_tokens: int | None = None
    retries: int = 0


class AskError(UserError):
    """Error of a question that got no reply after a number of tries."""

    def __init__(self, message: str, tries: int) -> None:
        super().__init__(message)
        self.tries = tries


class Model(ABC):
    """Base class of a language model that answers questions.

    Attributes:
        name: Its name, as provenance shows it.
        structured: Whether it follows instructions and can give JSON; else it gives a list, one description a line.
        batch_size: Number of descriptions to ask for at once.
    """

    name: str
    structured: bool
    batch_size: int

    @abstractmethod
    def ask(self, question: Question, max_tokens: int, tries: int) -> Reply:
        """Asks for one reply of at most `max_tokens` tokens, in at most `tries` tries.

        Raises:
            AskError: If there is no reply.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Returns everything that a reply depends on besides the question."""

    def size(self, question: Question) -> int:
        """Returns a high estimate of a question's tokens: half its bytes, as tokens of plain text have about four."""
        return 16 + sum(len(m["content"].encode()) for m in question.messages) // 2


class Served(Model):
    """A model of a server that speaks OpenAI's protocol.

    The `openai` library itself retries, with exponential backoff and jitter, and respects ``Retry-After``.

    Args:
        name: Name of the model on the server.
        base_url: Address of the server; the library's default is OpenAI's own, or ``$OPENAI_BASE_URL``.
        key_env: Environment variable that holds the key. It is sent to the server and goes nowhere else.
        temperature: Sampling temperature; the server's default if None.
        timeout: Seconds to wait for a reply.

    Raises:
        UserError: If the library or the key is missing, or a key stands in the address.
    """

    structured, batch_size = True, 10

    def __init__(
        self,
        name: str,
        base_url: str | None = None,
        key_env: str = "OPENAI_API_KEY",
        temperature: float | None = None,
        timeout: float = 60.0,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError("models of servers need the library openai: pip install 'instructedit[llm]'") from error
        self.name, self._key_env, self._timeout = name, key_env, timeout
        self._key = os.environ.get(key_env, "").strip()
        if not self._key:
            raise UserError(
                f"no key: set ${key_env} (any word for a server that asks for none), or use --model {LOCAL}NAME"
            )
        if base_url and (urlsplit(base_url).username or urlsplit(base_url).query):
            raise UserError(f"base_url: a key has no place in an address; put it into ${key_env}")
        try:
            self._client = openai.OpenAI(api_key=self._key, base_url=base_url, timeout=timeout)
        except (openai.OpenAIError, ValueError, TypeError) as error:
            raise UserError(f"base_url {base_url!r}: {self._clean(error)}") from error
        self._temperature = temperature
        self._left_out: set[str] = set()  # settings that the server does not know

    def identity(self) -> dict[str, Any]:
        """Returns the address, name and settings, without the key."""
        return {"base_url": str(self._client.base_url), "model": self.name, "temperature": self._temperature}

    def ask(self, question: Question, max_tokens: int, tries: int) -> Reply:
        import openai

        while True:
            try:
                raw = self._client.with_options(max_retries=tries - 1).chat.completions.with_raw_response.create(
                    **self._arguments(question, max_tokens)
                )
                return self._reply(raw)
            except openai.BadRequestError as error:
                if not (unknown := self._unknown(error)):
                    raise AskError(self._said(error), 1) from None
                self._left_out.add(unknown)  # and ask again at once: a refused request costs nothing
            except openai.OpenAIError as error:
                # From None: the library's errors hold the request, and with it the key.
                raise AskError(self._plainly(error, tries), self._tries(error, tries)) from None

    def _arguments(self, question: Question, max_tokens: int) -> dict[str, Any]:
        form = {"name": "reply", "schema": question.schema, "strict": True}
        wanted = {
            "response_format": {"type": "json_schema", "json_schema": form} if question.schema else None,
            "seed": question.seed,
            "temperature": self._temperature,
            "max_completion_tokens": max_tokens,
        }
        if "max_completion_tokens" in self._left_out:  # what older servers call it
            wanted["max_tokens"] = max_tokens
        sent = {name: value for name, value in wanted.items() if value is not None and name not in self._left_out}
        return {"model": self.name, "messages": list(question.messages), **sent}

    def _unknown(self, error: openai.BadRequestError) -> str | None:
        """Returns the optional setting that the server complains about; None if there is none."""
        text = f"{error.param} {error.message}"
        return next((name for name in OPTIONAL if name in text and name not in self._left_out), None)

    def _reply(self, raw: Any) -> Reply:
        retries = raw.retries_taken
        try:
            completion = raw.parse()
            choice = completion.choices[0]
            text, refusal = choice.message.content or "", getattr(choice.message, "refusal", None)
        except (AttributeError, IndexError, TypeError, ValueError):
            raise AskError(f"{self._where}: answers with something that is no chat completion", 1 + retries) from None
        if choice.finish_reason == "content_filter":
            refusal = refusal or "the server's content filter held it back"
        usage = completion.usage
        return Reply(
            self._clean(text),
            self._clean(refusal) if refusal else None,
            cut=choice.finish_reason == "length",
            prompt_tokens=usage.prompt_tokens if usage else None,
            reply_tokens=usage.completion_tokens if usage else None,
            retries=retries,
        )

    @property
    def _where(self) -> str:
        return str(self._client.base_url).rstrip("/")

    def _tries(self, error: openai.OpenAIError, tries: int) -> int:
        import openai

        fleeting = (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError, openai.ConflictError)
        return tries if isinstance(error, fleeting) else 1

    def _plainly(self, error: openai.OpenAIError, tries: int) -> str:
        import openai

        after = "" if tries == 1 else f" in {tries} tries"
        match error:
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                return f"{self._where}: refuses the key in ${self._key_env} ({error.status_code})"
            case openai.NotFoundError():
                return f"{self._where}: no model {self.name!r}, or no such address (404): {self._said(error)}"
            case openai.RateLimitError():
                return f"{self._where}: too many requests, or no credit (429){after}: {self._said(error)}"
            case openai.APITimeoutError():
                return f"{self._where}: no reply within {self._timeout:g} s{after}"
            case openai.APIConnectionError():
                return f"{self._where}: cannot be reached, or dropped the connection{after}"
            case openai.APIStatusError():
                return f"{self._where}: fails with {error.status_code}{after}: {self._said(error)}"
        return f"{self._where}: {self._clean(error)}"

    def _said(self, error: openai.APIStatusError) -> str:
        body = error.body if isinstance(error.body, dict) else {}
        return self._clean(body.get("message") or error.message)

    def _clean(self, said: object) -> str:
        """Returns a server's message in one line and without the key, which some servers repeat."""
        return " ".join(str(said).replace(self._key, "***").split())


class Local(Model):
    """A local transformers model that gives lists: the embedded LM, a real one by pip, a folder, or a hub id.

    Args:
        lm: The model. With its chat template (``chat=True``) it is asked for a list, else it continues one.
        temperature: Sampling temperature; 1 if None.
    """

    structured, batch_size = False, 4

    def __init__(self, lm: FrozenLM, temperature: float | None = None) -> None:
        self.lm, self.name, self._temperature = lm, f"{LOCAL}{lm.name}", 1.0 if temperature is None else temperature
        self._lock = threading.Lock()  # only one thread may use the model at a time

    def identity(self) -> dict[str, Any]:
        """Returns the weights' fingerprint and the settings."""
        return {"local": self.lm.fingerprint, "temperature": self._temperature, "chat": self.lm.text.chat}

    def size(self, question: Question) -> int:
        return len(self.lm.text.prompts([self._asked(question)])[0])

    def _asked(self, question: Question) -> str:
        return question.listing if self.lm.text.chat else question.start

    def ask(self, question: Question, max_tokens: int, tries: int) -> Reply:
        # Question and reply share a small context; a question that leaves the reply too little loses its beginning.
        max_tokens = min(max_tokens, max(self.lm.max_length // 4, self.lm.max_length - self.size(question) - 1))
        how: dict[str, Any] = {"top_k": None, "top_p": 0.95, "temperature": self._temperature, "ends": True}
        with self._lock:
            (text,) = self.lm.sample([self._asked(question)], max_tokens, [question.seed], **how)
        used = len(self.lm.token_ids(text))
        whole = text if self.lm.text.chat else f"-{text}"  # the dash of the first item stands in the question
        return Reply(whole, cut=used >= max_tokens - 1, prompt_tokens=self.size(question), reply_tokens=used)


@dataclass
class Writer:
    """A language model behind a response cache, a ledger and a rate limit.

    Attributes:
        model: The model that is asked.
        ledger: Counts calls and tokens, and refuses a question that could exceed its caps.
        cache: Folder of replies; None keeps none. A question that was asked before costs nothing.
        reply_tokens: Longest reply, in tokens.
        tries: Tries of one question, at most.
        concurrency: Questions at once.
        per_minute: Questions a minute, at most.
    """

    model: Model
    ledger: Ledger
    cache: Path | None = None
    reply_tokens: int = 2000
    tries: int = 5
    concurrency: int = 2
    per_minute: float | None = None

    def __post_init__(self) -> None:
        self._pace = threading.Lock()
        self._next = 0.0

    @classmethod
    def open(
        cls,
        model: str,
        ledger: Ledger,
        base_url: str | None = None,
        key_env: str = "OPENAI_API_KEY",
        temperature: float | None = None,
        timeout: float = 60.0,
        cache: Path | None = None,
        **limits: Any,
    ) -> Self:
        """Creates a writer from a model's name: ``local:NAME``, or the name on the server.

        Raises:
            UserError: If there is no such local model, no key, or a limit is out of range.
        """
        for name, value in limits.items():
            if value is not None and value <= 0:
                raise UserError(f"{name} must be positive, got {value}")
        if model.startswith(LOCAL):
            from instructedit.lm import FrozenLM
            from instructedit.lm.loading import load_tokenizer

            name = model.removeprefix(LOCAL)
            lm = FrozenLM.from_pretrained(name, chat=bool(load_tokenizer(name).chat_template))
            return cls(Local(lm, temperature), ledger, cache, **limits)
        return cls(Served(model, base_url, key_env, temperature, timeout), ledger, cache, **limits)

    def ask(self, question: Question) -> Reply:
        """Returns the model's reply, from the cache if the question was asked before.

        Raises:
            BudgetSpentError: If the call could exceed a cap.
            AskError: If the model gives no reply.
        """
        file = self.cache / f"{self._key(question)}.json" if self.cache else None
        if file and (kept := read_json(file)):
            self.ledger.count_cached()
            return Reply(**kept)
        size = self.model.size(question)
        reservation = self.ledger.reserve(size, self.reply_tokens, self.tries)
        tries, prompt, reply, estimated = 0, 0, 0, False
        try:
            self._wait()
            found = self.model.ask(question, reservation.reply, reservation.tries)
            tries = 1 + found.retries
            estimated = found.prompt_tokens is None or found.reply_tokens is None
            prompt = size if found.prompt_tokens is None else found.prompt_tokens
            reply = len(found.text.encode()) // 2 if found.reply_tokens is None else found.reply_tokens
        except AskError as error:
            tries = error.tries
            raise
        finally:
            self.ledger.commit(reservation, tries, prompt, reply, estimated)
        if file:
            write_json(file, asdict(found) | {"retries": 0})
        return found

    def each(self, ask: Callable[[T], R], about: Sequence[T]) -> list[R]:
        """Calls a function that asks, for each item and several at once; returns the results in order."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(ask, about))

    def _key(self, question: Question) -> str:
        parts = [self.model.identity(), asdict(question), self.reply_tokens]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _wait(self) -> None:
        """Waits until the rate limit allows the next question."""
        if not self.per_minute:
            return
        with self._pace:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + 60 / self.per_minute
        time.sleep(start - now)
