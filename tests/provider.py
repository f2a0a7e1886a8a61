"""A loopback server that speaks OpenAI's chat-completions protocol, for tests of the provider path."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODEL = "openai/loopback-1"
FAST = {"Retry-After": "0.01"}  # headers of a failure that may be retried at once
Request = dict[str, Any]


def answer(**fields: str) -> str:
    """A completion in the form DSPy asks for."""
    return "\n\n".join(f"[[ ## {name} ## ]]\n{text}" for name, text in (fields | {"completed": ""}).items())


BILLING = answer(label="billing")


def prompt(request: Request) -> str:
    """Everything the model is given to read."""
    return "".join(message["content"] for message in request["messages"])


@dataclass(frozen=True)
class Reply:
    """What the server does with one request.

    `text` and `delay` (seconds) may be functions of the request's JSON. `tokens_in` None counts four characters as
    one; `usage` False leaves the count out; `body` is sent in place of a completion; `hang_up` closes the connection
    without a word, `cut` after so many bytes of the body (of a stream: so many events); `finish` is why the model
    stopped. A request with `stream` is answered word by word.
    """

    text: str | Callable[[Request], str] = BILLING
    delay: float | Callable[[Request], float] = 0.0
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    tokens_in: int | None = 100
    tokens_out: int = 10
    usage: bool = True
    body: bytes | None = None
    hang_up: bool = False
    cut: int | None = None
    finish: str = "stop"

    def content(self, request: Request) -> bytes:
        """The body: as given, else an error object, else a completion."""
        if self.body is not None:
            return self.body
        if self.status != 200:
            return json.dumps({"error": {"message": f"it went wrong with {self.status}", "type": "test"}}).encode()
        message = {"role": "assistant", "content": self.said(request)}
        completion = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": self.finish}],
        }
        return json.dumps(completion | ({"usage": self.counted(request)} if self.usage else {})).encode()

    def said(self, request: Request) -> str:
        """The completion's text."""
        return self.text(request) if callable(self.text) else self.text

    def counted(self, request: Request) -> dict[str, int]:
        """The completion's usage."""
        tokens_in = len(prompt(request)) // 4 if self.tokens_in is None else self.tokens_in
        return {
            "prompt_tokens": tokens_in,
            "completion_tokens": self.tokens_out,
            "total_tokens": tokens_in + self.tokens_out,
        }

    def events(self, request: Request) -> list[bytes]:
        """The completion as a stream of server-sent events, word by word."""
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": request["model"]}
        words = self.said(request).replace("\n", "\n ").split(" ")
        deltas = [{"content": word if word.endswith("\n") else f"{word} "} for word in words]
        choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
        choices.append({"index": 0, "delta": {}, "finish_reason": self.finish})
        chunks = [{**head, "choices": [choice]} for choice in choices]
        chunks.append({**head, "choices": [], "usage": self.counted(request)})
        return [f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks] + [b"data: [DONE]\n\n"]


def in_bad_health(replies: int, *, share: float = 0.3, seed: int = 7) -> list[Reply]:
    """A script of good answers of all lengths, and a share of every failure that may be retried."""
    dice = random.Random(seed)
    bad = [
        Reply(status=500, headers=FAST),
        Reply(status=429, headers=FAST),
        Reply(hang_up=True),
        Reply(cut=40),
        Reply(body=b"<html>"),
    ]
    good = [Reply(tokens_in=None, tokens_out=n) for n in (1, 100, 256)]
    return [dice.choice(bad if dice.random() < share else good) for _ in range(replies)]


class Provider:
    """Answers the first requests by `script`, one reply each, and all later ones by its last reply.

    `requests` holds the JSON of every request that arrived, `times` when (monotonic seconds), `keys` its credential.
    """

    def __init__(self, *script: Reply) -> None:
        self._script = script or (Reply(),)
        self._lock = threading.Lock()
        self.requests: list[Request] = []
        self.times: list[float] = []
        self.keys: list[str] = []
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.provider = self
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Provider:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def settings(self, *, price: tuple[float, float] | None = (1000, 2000), more: str = "", **options: object) -> str:
        """An `agentkit.toml` whose tier `fast` is this server; the price is USD per million tokens in and out.

        `more` is TOML put at its end.
        """
        options = {"api_base": self.url, "api_key": "a-key", **options}
        lines = ["[models]", f'fast = "{MODEL}"', f'[options."{MODEL}"]']
        lines += [f"{name} = {json.dumps(value)}" for name, value in options.items()]
        if price is not None:
            lines += [f'[prices."{MODEL}"]', f"input = {price[0]}", f"output = {price[1]}"]
        return "\n".join([*lines, more])

    def take(self, request: Request, key: str) -> Reply:
        """Count a request and say how to answer it."""
        with self._lock:
            self.requests.append(request)
            self.times.append(time.monotonic())
            self.keys.append(key)
            return self._script[min(len(self.requests), len(self._script)) - 1]


Serve = Callable[..., Provider]


@contextmanager
def serving(folder: Path) -> Iterator[Serve]:
    """`serve(*replies, **settings)` starts a provider and points the settings file in `folder` at it."""
    with ExitStack() as stack:

        def serve(*script: Reply, **settings: Any) -> Provider:
            provider = stack.enter_context(Provider(*script))
            (folder / "agentkit.toml").write_text(provider.settings(**settings))
            return provider

        yield serve


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    provider: Provider

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that stopped waiting is what some tests are about; no traceback for it."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: 40 ms otherwise
    server: _Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = self.server.provider.take(request, self.headers.get("Authorization", ""))
        time.sleep(reply.delay(request) if callable(reply.delay) else reply.delay)
        if reply.hang_up:
            self.close_connection = True
            return
        if request.get("stream") and reply.status == 200 and reply.body is None:
            self._stream(reply, reply.events(request))
            return
        content = reply.content(request)
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: reply.cut])
        if reply.cut is not None:
            self.close_connection = True

    def _stream(self, reply: Reply, events: list[bytes]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for event in events[: reply.cut]:
            self.wfile.write(event)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""
