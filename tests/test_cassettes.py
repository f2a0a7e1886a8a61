"""Cassettes: recorded once, replayed offline; what is missing or stale is named. And recorded traffic, read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dspy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from provider import FAST, MODEL, Reply, Request, Serve, answer

import agentkit as ak
from agentkit.cassettes import RecordingMissing, cassette, differences, read_cassette
from agentkit.errors import DataError, ModelError, UsageError
from agentkit.models import build_lm
from agentkit.redaction import redact, without_secrets
from agentkit.testing import FakeClock
from agentkit.traffic import read_reply

TICKET = "I was charged twice for one order."
TAPE = Path("tape.jsonl")
KEY = "sk-proj-abcDEF123456789012345"


def triage(**options: Any) -> ak.System:
    return ak.adopt(dspy.Predict("ticket -> label", **options), name="triage", success=ak.metrics.exact("label"))


def echo(request: Request) -> str:
    """A different answer to each ticket."""
    return answer(label=f"desk {str(request['messages']).count('!')}")


def test_what_was_recorded_is_replayed_offline_and_counts_as_it_did(serve: Serve) -> None:
    provider = serve(Reply(text=echo, tokens_in=120, tokens_out=8))
    tickets = [TICKET + "!" * i for i in range(3)]
    with cassette(TAPE, "record") as tape:
        live = [triage().run(ticket=t) for t in tickets]
    assert tape.recorded == len(read_cassette(TAPE)) == 3
    with cassette(TAPE) as tape:
        again = [triage().run(ticket=t) for t in reversed(tickets)]
    assert tape.replayed == 3
    assert len(provider.requests) == 3
    assert [r.output for r in reversed(again)] == [r.output for r in live]
    for one, other in zip(reversed(again), live, strict=True):
        assert (one.model_calls, one.tokens_in, one.tokens_out, one.usd) == (1, 120, 8, other.usd)


def test_a_replay_needs_neither_key_nor_server(serve: Serve, project: Path) -> None:
    serve(Reply())
    with cassette(TAPE, "record"):
        triage().run(ticket=TICKET)
    (project / "agentkit.toml").write_text(f'[models]\nfast = "{MODEL}"')
    with cassette(TAPE):
        record = triage().run(ticket=TICKET)
    assert record.output == {"label": "billing"}
    assert record.usd == pytest.approx((100 * 1000 + 10 * 2000) / 1e6)  # no price is known now: as recorded


def test_budgets_hold_in_a_replay(serve: Serve) -> None:
    serve(Reply())
    with cassette(TAPE, "record"):
        triage().run(ticket=TICKET)
    with cassette(TAPE):
        record = triage().run(ticket=TICKET, ledger=ak.Ledger(ak.Budget(usd=0.01)))
    assert (record.error or "").startswith("BudgetExceeded")


def test_a_stale_recording_is_named_with_what_differs(serve: Serve) -> None:
    provider = serve(Reply())
    with cassette(TAPE, "record"):
        triage().run(ticket=TICKET)
        triage().run(ticket="Something else entirely, which is much longer than the ticket before it.")
    with cassette(TAPE), pytest.raises(RecordingMissing) as caught:
        triage(temperature=0.7)(ticket=TICKET.replace("twice", "thrice"))
    text, error = str(caught.value), caught.value
    assert text.startswith(f"{TAPE}: no recording of this request to {MODEL}; the nearest is of")
    assert "record-missing" in text
    assert [d.partition(":")[0] for d in error.differences] == ["messages[1].content", "parameters.temperature"]
    assert "thrice" in error.differences[0]
    assert error.differences[1] == "parameters.temperature: recorded nothing, asked 0.7"
    assert len(provider.requests) == 2


def test_another_model_is_another_request(serve: Serve, project: Path) -> None:
    serve(Reply())
    with cassette(TAPE, "record"):
        triage().run(ticket=TICKET)
    (project / "agentkit.toml").write_text('[models]\nfast = "openai/loopback-9"')
    with cassette(TAPE), pytest.raises(RecordingMissing) as caught:
        triage()(ticket=TICKET)
    assert caught.value.differences == ["model: recorded …'/loopback-1', asked …'/loopback-9'"]


def test_a_request_that_comes_more_often_than_recorded_is_an_error_unless_repeats_are_asked_for(serve: Serve) -> None:
    serve(Reply(text=answer(label="a")), Reply(text=answer(label="b")))
    with cassette(TAPE, "record"):
        assert [triage().run(ticket=TICKET).output for _ in range(2)] == [{"label": "a"}, {"label": "b"}]
    with cassette(TAPE):
        records = [triage().run(ticket=TICKET) for _ in range(3)]
    assert [r.output for r in records[:2]] == [{"label": "a"}, {"label": "b"}]
    assert records[2].error is not None
    assert "was asked this 3 times, and it was recorded 2 times" in records[2].error
    with cassette(TAPE, repeat=True):
        assert [triage().run(ticket=TICKET).output for _ in range(4)][2:] == [{"label": "b"}] * 2


def test_what_is_missing_can_be_added(serve: Serve) -> None:
    provider = serve(Reply())
    with cassette(TAPE, "record-missing"):
        triage().run(ticket=TICKET)
    with cassette(TAPE, "record-missing") as tape:
        triage().run(ticket=TICKET)
        triage().run(ticket="another")
    assert (tape.replayed, tape.recorded) == (1, 1)
    assert (len(provider.requests), len(read_cassette(TAPE))) == (2, 2)


def test_what_is_missing_is_added_on_a_line_of_its_own(serve: Serve) -> None:
    serve(Reply())
    with cassette(TAPE, "record"):
        triage().run(ticket=TICKET)
    TAPE.write_bytes(TAPE.read_bytes().rstrip(b"\n"))  # as some editors leave a file
    for _ in range(2):
        with cassette(TAPE, "record-missing") as tape:
            triage().run(ticket=TICKET)
            triage().run(ticket=TICKET + "!")
    assert (tape.recorded, tape.replayed) == (0, 2)
    assert len(read_cassette(TAPE)) == TAPE.read_bytes().count(b"\n") == 2
    TAPE.write_bytes(b"")
    with cassette(TAPE, "record-missing"):
        triage().run(ticket=TICKET)
    assert len(read_cassette(TAPE)) == 1


def test_rehearsals_of_every_kind_keep_out_of_the_cache_of_answers(serve: Serve, project: Path) -> None:
    provider = serve(Reply())
    path = project / "agentkit.toml"
    path.write_text(path.read_text() + "\n[cache]\nenabled = true\n")
    for kind, requests in (("run", 1), ("run", 1), ("evaluation", 2), ("chaos", 3), ("replay", 4)):
        assert triage().run(kind=kind, ticket="cached?").state == "DONE"
        assert len(provider.requests) == requests, kind


def test_a_recording_that_is_broken_off_does_not_replace_the_old_one(serve: Serve) -> None:
    serve(Reply())
    with cassette(TAPE, "record"):
        triage().run(ticket=TICKET)
    before = TAPE.read_bytes()

    def interrupted() -> None:
        with cassette(TAPE, "record"):
            triage().run(ticket="another")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert TAPE.read_bytes() == before
    assert len(read_cassette(Path("tape.jsonl.part"))) == 1


def test_a_failed_attempt_is_not_recorded_but_what_the_provider_says_of_the_request_is(serve: Serve) -> None:
    serve(Reply(status=500, headers=FAST), Reply(), Reply(status=400))
    with FakeClock(), cassette(TAPE, "record"):
        live = [triage().run(ticket=t) for t in ("one", "two")]
    assert [r.model_calls for r in live] == [2, 1]
    with cassette(TAPE):
        again = [triage().run(ticket=t) for t in ("one", "two")]
    assert [r.error for r in again] == [r.error for r in live]
    assert [r.model_calls for r in again] == [1, 1]


def test_calls_outside_a_run_are_replayed_too(serve: Serve) -> None:
    provider = serve(Reply())
    lm = build_lm("fast")
    with cassette(TAPE, "record"):
        said = lm("hello")
    with cassette(TAPE):
        assert lm("hello") == said
        with pytest.raises(RecordingMissing):
            lm("good-bye")
    assert len(provider.requests) == 1
    assert lm.history[-1]["outputs"] == said


def test_a_missing_recording_does_not_fall_back(serve: Serve, project: Path) -> None:
    serve(Reply(), more='[fallbacks]\nfast = ["embedded/default"]')
    with cassette(TAPE, "record"):
        pass
    with cassette(TAPE):
        record = triage().run(ticket=TICKET)
    assert (record.error or "").startswith("RecordingMissing: tape.jsonl: the cassette is empty")


def test_nothing_that_looks_like_a_key_or_a_person_is_written(serve: Serve) -> None:
    serve(Reply(text=answer(label=f"use {KEY}")), api_key=KEY)
    with cassette(TAPE, "record"):
        triage().run(ticket=f"I am ada@example.org, card 4111 1111 1111 1111, Authorization: Bearer {KEY}")
    text = TAPE.read_text()
    assert not [secret for secret in (KEY, "ada@example.org", "4111 1111", "api_base") if secret in text]
    (exchange,) = read_cassette(TAPE)
    assert exchange["dspy"] == dspy.__version__
    assert exchange["adapter"] == "ChatAdapter"
    assert "[e-mail], card [card]" in exchange["request"]["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "tape.jsonl:1: no exchange of a cassette"),
        ("[]", "tape.jsonl:1: no exchange"),
        ('{"v": 9, "key": "", "model": "", "request": {}, "recorded_at": ""}', "format 9, expected 1"),
    ],
)
def test_a_damaged_cassette_is_named_with_its_line(project: Path, line: str, says: str) -> None:
    TAPE.write_text(f"{line}\n")
    with pytest.raises(DataError) as caught, cassette(TAPE):
        pass
    assert says in str(caught.value)


def test_a_missing_file_or_mode_is_said(project: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the cassette tape\.jsonl"), cassette(TAPE):
        pass
    with pytest.raises(UsageError, match="mode must be one of replay, record, record-missing"), cassette(TAPE, "new"):  # type: ignore[arg-type]
        pass


def test_a_whole_evaluation_runs_again_from_a_cassette(serve: Serve) -> None:
    from agentkit.examples import Example
    from agentkit_pipelines.evaluation import evaluate

    cases = [
        Example(id=f"c{i}", inputs={"ticket": f"{TICKET} {i}"}, expected={"label": "billing"}, task_type="t")
        for i in range(8)
    ]
    provider = serve(Reply())
    with cassette(TAPE, "record"):
        live = evaluate(triage(), cases, repeats=2, workers=4)
    sent = len(provider.requests)
    with cassette(TAPE):
        again = evaluate(triage(), cases, repeats=2, workers=4)
    assert len(provider.requests) == sent
    columns = ["success", "tokens_in", "cost_usd", "model_calls"]
    assert again.sort("case_id", "repeat").select(columns).equals(live.sort("case_id", "repeat").select(columns))


def test_many_threads_share_a_cassette(serve: Serve) -> None:
    import polars as pl

    serve(Reply(text=echo))
    frame = pl.DataFrame({"ticket": [TICKET + "!" * i for i in range(40)]})
    with cassette(TAPE, "record"):
        live = triage().map(frame, workers=16)
    with cassette(TAPE):
        again = triage().map(frame, workers=16)
    assert live["label"].to_list() == again["label"].to_list() == [f"desk {i}" for i in range(40)]


# ---- redaction


@pytest.mark.parametrize(
    "secret",
    [
        KEY,
        "sk-ant-api03-abcdefghijklmnop",
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
        "AIzaSyA1234567890abcdefghijklmnopqrstuv",
        "xoxb-123456789012-abcdefghijkl",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abcdefghijklmno",
        "-----BEGIN RSA PRIVATE KEY-----\nabc\ndef\n-----END RSA PRIVATE KEY-----",
    ],
)
@given(before=st.sampled_from(["", "key ", "x=", '{"k": "', "\n"]), after=st.sampled_from(["", " .", '"}', "\n"]))
def test_a_secret_goes_whatever_stands_around_it(secret: str, before: str, after: str) -> None:
    cleaned = without_secrets({"deep": [f"{before}{secret}{after}"]})["deep"][0]
    assert secret not in cleaned
    assert "[key]" in cleaned


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("password = hunter2hunter2", "password = [key]"),
        ("Authorization: Basic dXNlcjpwYXNzd29yZA==", "Authorization: Basic [key]"),
        ("ask ada.l+x@mail.example.org.", "ask [e-mail]."),
        ("card 4111-1111-1111-1111 or order 4111-1111-1111-1112", "card [card] or order 4111-1111-1111-1112"),
        ("token counts and secret santa, a basic question", "token counts and secret santa, a basic question"),
        ("ORD-10003 costs 14.99 on 2026-11-21", "ORD-10003 costs 14.99 on 2026-11-21"),
    ],
)
def test_what_is_taken_out_and_what_stays(text: str, cleaned: str) -> None:
    assert redact(text) == cleaned


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES, VALUES)
def test_values_have_differences_exactly_when_they_differ(a: Any, b: Any) -> None:
    assert differences(a, a) == []
    assert bool(differences(a, b)) == (json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True))


# ---- recorded traffic of providers: shapes made up after their documentation

CHAT = {
    "model": "m",
    "choices": [
        {
            "message": {
                "content": "hello",
                "tool_calls": [{"id": "1", "function": {"name": "look", "arguments": '{"at": "it"}'}}],
            },
            "finish_reason": "tool_calls",
        }
    ],
    "usage": {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}},
}
RESPONSES = {
    "object": "response",
    "model": "m",
    "status": "completed",
    "output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "hello"}]}],
    "usage": {"input_tokens": 9, "output_tokens": 3, "total_tokens": 12},
}
ANTHROPIC = {
    "type": "message",
    "model": "m",
    "content": [
        {"type": "text", "text": "hello"},
        {"type": "tool_use", "id": "1", "name": "look", "input": {"at": "it"}},
    ],
    "stop_reason": "tool_use",
    "usage": {"input_tokens": 9, "output_tokens": 3},
}
GOOGLE = {
    "candidates": [{"content": {"parts": [{"text": "hello"}]}, "finishReason": "STOP"}],
    "usageMetadata": {"promptTokenCount": 9, "candidatesTokenCount": 3, "totalTokenCount": 12},
}
MESSAGES = {"model": "m", "messages": []}


@pytest.mark.parametrize(
    ("request_", "reply", "protocol", "calls"),
    [
        (MESSAGES, CHAT, "chat", 1),
        ({"model": "m", "input": "hi"}, RESPONSES, "responses", 0),
        (MESSAGES, ANTHROPIC, "anthropic", 1),
        ({"contents": []}, GOOGLE, "google", 0),
    ],
    ids=["chat", "responses", "anthropic", "google"],
)
def test_a_whole_reply_is_read_alike_in_every_protocol(
    request_: dict[str, Any], reply: dict[str, Any], protocol: str, calls: int
) -> None:
    found = read_reply(request_, 200, json.dumps(reply))
    assert (found.protocol, found.text, found.tokens_in, found.tokens_out) == (protocol, "hello", 9, 3)
    assert found.tool_calls == ({"name": "look", "arguments": {"at": "it"}},) * calls
    assert found.finish == ("tool_call" if calls else "stop")
    assert found.error is None


def sse(*events: dict[str, Any], named: bool = False) -> str:
    lines = (f"event: {e['type']}\n" if named else "" for e in events)
    return "".join(f"{name}data: {json.dumps(e)}\n\n" for name, e in zip(lines, events, strict=True))


def chunk(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"model": "m", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


STREAMS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], bool]] = {
    "chat": (MESSAGES, [chunk("hel"), chunk("lo"), chunk("", "stop"), {"choices": [], "usage": CHAT["usage"]}], False),
    "anthropic": (
        MESSAGES,
        [
            {"type": "message_start", "message": {"model": "m", "usage": {"input_tokens": 9, "output_tokens": 1}}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "server_tool_use", "name": "search"}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": "{}"}},
            {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "hello"}},
            {
                "type": "message_delta",
                "delta": {"stop_reason": "end_turn"},
                "usage": {"input_tokens": 9, "output_tokens": 3},
            },
            {"type": "message_stop"},
        ],
        True,
    ),
    "responses": (
        {"model": "m", "input": "hi"},
        [
            {"type": "response.output_text.delta", "output_index": 0, "content_index": 0, "delta": "hello"},
            {"type": "response.completed", "response": RESPONSES},
        ],
        True,
    ),
    "google": (
        {"contents": []},
        [
            {"candidates": [{"content": {"parts": [{"text": "hel"}]}}]},
            {**GOOGLE, "candidates": [{"content": {"parts": [{"text": "lo"}]}, "finishReason": "STOP"}]},
        ],
        False,
    ),
}


@pytest.mark.parametrize("protocol", STREAMS)
def test_a_stream_is_read_as_the_whole_reply_would_be(protocol: str) -> None:
    request, events, named = STREAMS[protocol]
    found = read_reply(request, 200, sse(*events, named=named))
    assert (found.protocol, found.text, found.finish) == (protocol, "hello", "stop")
    assert (found.tokens_in, found.tokens_out) == (9, 3)


@pytest.mark.parametrize("protocol", STREAMS)
def test_a_stream_that_breaks_off_is_no_answer(protocol: str) -> None:
    request, events, named = STREAMS[protocol]
    last = 2 if protocol in ("chat", "anthropic") else 1
    with pytest.raises(DataError, match="not a whole one"):
        read_reply(request, 200, sse(*events[:-last], named=named))


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (429, '{"error": {"message": "slow down", "code": "rate_limit"}}', "slow down"),
        (200, '{"error": {"message": "broken inside"}}', "broken inside"),
    ],
)
def test_an_error_is_read_as_one(status: int, body: str, says: str) -> None:
    assert says in (read_reply(MESSAGES, status, body).error or "")


@pytest.mark.parametrize(
    ("request_", "body", "says"),
    [
        (MESSAGES, json.dumps(CHAT)[:-20], "none of the protocols"),
        ({}, '{"id": "conv_1", "object": "conversation"}', "none of the protocols"),
        ({"model": "m", "input": "hi"}, json.dumps({**RESPONSES, "status": "queued"}), "still at work"),
        (MESSAGES, '{"choices": [], "usage": {"prompt_tokens": "many"}}', "unknown form"),
    ],
)
def test_what_cannot_be_read_is_said(request_: dict[str, Any], body: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_reply(request_, 200, body)


def test_a_missing_recording_is_a_model_error() -> None:
    assert issubclass(RecordingMissing, ModelError)
