"""A loopback server that speaks OpenAI's chat-completions protocol (not streaming), for tests of the provider path."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

MODEL = "openai/loopback-1"
Answer = str | Callable[[dict[str, Any]], str]


@dataclass(frozen=True)
class Reply:
    """What the server does with one request.

    `text` may be a function of the request's JSON; `delay` is in seconds; `body` is sent in place of a completion;
    `hang_up` closes the connection without a word.
    """

    text: Answer = "[[ ## label ## ]]\nbilling\n\n[[ ## completed ## ]]"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    tokens_in: int = 100
    tokens_out: int = 10
    body: bytes | None = None
    hang_up: bool = False

    def content(self, request: dict[str, Any]) -> bytes:
        """The body: as given, else an error object, else a completion."""
        if self.body is not None:
            return self.body
        if self.status != 200:
            return json.dumps({"error": {"message": f"status {self.status}", "type": "test", "code": None}}).encode()
        text = self.text(request) if callable(self.text) else self.text
        completion = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {
                "prompt_tokens": self.tokens_in,
                "completion_tokens": self.tokens_out,
                "total_tokens": self.tokens_in + self.tokens_out,
            },
        }
        return json.dumps(completion).encode()


class Provider:
    """Answers the first requests by `script`, one reply each, and all later ones by its last reply.

    `requests` holds the JSON of every request that arrived, `times` when (monotonic seconds), `keys` the bearer token.
    """

    def __init__(self, *script: Reply) -> None:
        self._script = script or (Reply(),)
        self._lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: list[str] = []
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.provider = self
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Provider:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __len__(self) -> int:
        return len(self.requests)

    def take(self, request: dict[str, Any], key: str) -> Reply:
        """Count a request and say how to answer it."""
        with self._lock:
            self.requests.append(request)
            self.times.append(time.monotonic())
            self.keys.append(key)
            return self._script[min(len(self.requests), len(self._script)) - 1]


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    provider: Provider

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that stopped waiting is what some tests are about; no traceback for it."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = self.server.provider.take(request, self.headers.get("Authorization", ""))
        time.sleep(reply.delay)
        if reply.hang_up:
            self.close_connection = True
            return
        content = reply.content(request)
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""
