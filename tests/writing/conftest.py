"""A server on loopback that speaks OpenAI's protocol and answers as the test scripts it."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

KEY = "sk-secret-0123456789"
DROP = "drop"  # the connection is closed without a reply


def completion(content: Any, finish: str = "stop", usage: tuple[int, int] | None = (100, 50), **message: Any) -> dict:
    """A chat completion as a server sends it."""
    text = content if isinstance(content, str) or content is None else json.dumps(content)
    return {
        "id": "c", "object": "chat.completion", "created": 0, "model": "scripted",
        "choices": [
            {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
        ],
        "usage": usage and {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)},
    }  # fmt: skip


def failure(status: int, message: str, **more: Any) -> tuple[int, dict]:
    return status, {"error": {"message": message, "type": "error", **more}}


@dataclass
class Server:
    """Answers each request with the next of ``script``, the last one again and again.

    An answer is a body, (status, body), `DROP`, or a function of the request that gives one of these.
    """

    url: str
    script: list[Any] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, request: dict[str, Any], key: str | None) -> Any:
        with self.lock:
            self.requests.append(request)
            self.keys.append(key)
            assert self.script, "nothing is scripted"
            found = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        return found(request) if callable(found) else found

    @property
    def asked(self) -> list[str]:
        """The last message of each request."""
        return [request["messages"][-1]["content"] for request in self.requests]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = state.answer(body, self.headers["Authorization"])
            if found == DROP:
                self.close_connection = True
                self.connection.close()
                return
            status, data = found if isinstance(found, tuple) else (200, found)
            text = data if isinstance(data, str) else json.dumps(data)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("retry-after-ms", "1")  # so that no test waits
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    state = Server(f"http://127.0.0.1:{http.server_address[1]}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=http.serve_forever, args=(0.05,))
    thread.start()
    yield state
    http.shutdown()
    http.server_close()
    thread.join()
