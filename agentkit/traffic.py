"""Reads recorded provider traffic: one HTTP reply of any of the usual protocols into one shape.

The reading is done by the provider adapters that DSPy itself calls models with (`dspy.lm15`), so that what a recording
is read as is what the same reply would have been live. Protocols: OpenAI chat completions (as Groq, Mistral, OpenRouter,
DeepSeek and others speak it) and responses, Anthropic messages, Google generateContent; whole bodies and event streams.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from agentkit.errors import DataError

Protocol = Literal["chat", "responses", "anthropic", "google"]


@dataclass(frozen=True)
class Recorded:
    """What one recorded reply says. Token counts are the provider's own, None where it gave none."""

    protocol: Protocol
    text: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()  # name, arguments
    finish: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    error: str | None = None
    details: dict[str, int] = field(default_factory=dict)  # cache_read_tokens, reasoning_tokens, …


def read_reply(request: dict[str, Any], status: int, body: str, *, host: str = "") -> Recorded:
    """One reply to `request` (its JSON body).

    Raises:
        DataError: it is a reply of none of the protocols, or not a whole one.
    """
    protocol = protocol_of(request, body, host)
    if protocol is None:
        raise DataError(f"the reply of {host or 'an unnamed host'} follows none of the protocols known here")
    if protocol == "responses" and not _is_stream(body) and _parsed(body).get("status") in ("queued", "in_progress"):
        raise DataError("the responses reply is not a whole one: the provider is still at work on it")
    adapter, asked = _adapter(protocol), _request(request)
    if status >= 400:
        return Recorded(protocol, error=str(adapter.normalize_error(status, body)))
    from dspy.lm15 import LM15Error

    try:
        response = _streamed(adapter, asked, body) if _is_stream(body) else _whole(adapter, asked, status, body)
    except LM15Error as e:
        if type(e).__name__ == "StreamAssemblyError" or "is not JSON" in str(e):
            raise DataError(f"the {protocol} reply is not a whole one: {e}") from e
        return Recorded(protocol, error=str(e))  # an error told with status 200
    except (TypeError, ValueError, KeyError) as e:
        raise DataError(f"the {protocol} reply has an unknown form: {e}") from e
    usage = response.usage
    counted = ("cache_read_tokens", "cache_write_tokens", "reasoning_tokens")
    return Recorded(
        protocol,
        "".join(part.text for part in response.message.parts if part.type == "text"),
        tuple({"name": call.name, "arguments": call.input} for call in response.tool_calls),
        response.finish_reason,
        usage.input_tokens,
        usage.output_tokens,
        details={name: n for name in counted if (n := getattr(usage, name)) is not None},
    )


def protocol_of(request: dict[str, Any], body: str, host: str = "") -> Protocol | None:
    """Which protocol an exchange speaks, by the form of its reply and request; None if none of those known here."""
    if _is_stream(body):
        return _protocol_of_stream(body, request)
    reply = _parsed(body)
    found: dict[Protocol, bool] = {
        "chat": isinstance(reply.get("choices"), list),
        "responses": reply.get("object") == "response",
        "anthropic": reply.get("type") == "message" and "stop_reason" in reply,
        "google": "candidates" in reply or "promptFeedback" in reply,
    }
    if any(found.values()):
        return next(protocol for protocol, fits in found.items() if fits)
    return _protocol_of_request(request, host) if "error" in reply else None


def _protocol_of_stream(body: str, request: dict[str, Any]) -> Protocol | None:
    for name, sign in _STREAMS.items():
        if sign in body.replace(" ", ""):
            return name
    return _protocol_of_request(request, "") if '"error"' in body else None


_STREAMS: dict[Protocol, str] = {
    "anthropic": '"type":"message_start"',
    "responses": '"type":"response.',
    "google": '"candidates":',
    "chat": '"choices":',
}


def _protocol_of_request(request: dict[str, Any], host: str) -> Protocol | None:
    """An error looks the same in several protocols; what was asked tells them apart."""
    if "contents" in request:
        return "google"
    if isinstance(request.get("messages"), list):
        return "anthropic" if "anthropic" in host else "chat"
    return "responses" if "input" in request else None


def _parsed(body: str) -> dict[str, Any]:
    try:
        reply = json.loads(body)
    except ValueError:
        return {}
    return reply if isinstance(reply, dict) else {}


def _is_stream(body: str) -> bool:
    return body.lstrip().startswith(("event:", "data:", ":", "id:"))


@cache
def _adapter(protocol: Protocol) -> Any:
    from dspy import lm15

    adapters = {
        "chat": lm15.OpenAIChatLM,
        "responses": lm15.OpenAILM,
        "anthropic": lm15.AnthropicLM,
        "google": lm15.GeminiLM,
    }
    return adapters[protocol](api_key="recorded")  # never sent: only the readers are used


def _request(request: dict[str, Any]) -> Any:
    from dspy.lm15 import Message, Request

    return Request(model=str(request.get("model") or "recorded"), messages=(Message.user("recorded"),))


def _whole(adapter: Any, asked: Any, status: int, body: str) -> Any:
    from dspy._vendor.lm15.providers.base import HttpResponse  # public under no other name in 3.4

    return adapter.parse_response(asked, HttpResponse(status, "", [], body.encode()))


def _streamed(adapter: Any, asked: Any, body: str) -> Any:
    from dspy._vendor.lm15.result import coalesce_stream
    from dspy._vendor.lm15.sse import parse_sse
    from dspy.lm15 import materialize_response

    lines = iter([line.encode() + b"\n" for line in body.split("\n")])
    raw = parse_sse(lines, max_line_bytes=2**26, max_event_bytes=2**26)
    kept = _without_server_tools(raw)
    events = (event for one in kept for event in adapter.parse_stream_events(asked, one) if event is not None)
    return materialize_response(coalesce_stream(events, model=asked.model), asked)


_OWN_BLOCKS = ("text", "thinking", "redacted_thinking", "tool_use")


def _without_server_tools(events: Iterator[Any]) -> Iterator[Any]:
    """Anthropic's own tools (web search, code execution) stream their arguments like ours, but are no calls to us."""
    theirs: set[int] = set()
    for event in events:
        if '"content_block_' in event.data:
            data = json.loads(event.data)
            kind = data.get("content_block", {}).get("type", "")
            if data["type"] == "content_block_start" and kind not in _OWN_BLOCKS:
                theirs.add(data["index"])
            if data["index"] in theirs and data["type"] == "content_block_delta":
                continue
        yield event
