"""OpenTelemetry: spans by the GenAI conventions at a collector, without content unless asked for, and whatever it answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from collector import Collector, attributes, collecting, rejecting
from crews import crew, node, nothing_paid_yet, refund  # noqa: F401
from forwarded import SPANS, keep, made, own_log
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes
from servers import free_port
from typer.testing import CliRunner

from agentkit.records import Step
from agentkit_pipelines.cli import app
from agentkit_tracking.forwarding import Unavailable, otlp_spans
from agentkit_tracking.forwarding.consumer import Consumer
from agentkit_tracking.forwarding.ids import otel_trace_id
from agentkit_tracking.forwarding.otlp import OtlpTarget
from agentkit_tracking.runlog import RunLog

SECRET = "I paid twice"


@pytest.fixture
def log(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunLog]:
    for name in (
        "OTEL_EXPORTER_OTLP_HEADERS",
        "OTEL_SERVICE_NAME",
        "OTEL_RESOURCE_ATTRIBUTES",
        "AGENTKIT_OTLP_CONTENT",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with own_log() as log:
        yield log


def forward(log: RunLog) -> Consumer:
    consumer = Consumer(log, OtlpTarget())
    try:
        consumer.forward()
    finally:
        consumer.target.close()
    return consumer


def spans_of(collector: Collector, run_id: str) -> dict[str, Span]:
    return {span.name: span for span in collector.by_trace()[otel_trace_id(run_id)]}


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_a_run_is_an_agent_with_chats_and_tools_by_the_conventions(log: RunLog, collector: Collector) -> None:
    (run_id,) = keep(log, 1)
    forward(log)
    spans = spans_of(collector, run_id)
    assert spans.keys() == {
        "invoke_agent shop", "PLANNING", "EXECUTING", "REFLECTING", "chat gpt-x", "execute_tool pay",
        "decision tier of pay", "decision action",
    }  # fmt: skip
    assert len(spans) == SPANS
    agent, chat, tool = (spans[n] for n in ("invoke_agent shop", "chat gpt-x", "execute_tool pay"))
    assert attributes(agent) | {
        "gen_ai.operation.name": "invoke_agent", "gen_ai.provider.name": "openai", "gen_ai.agent.name": "shop",
        "gen_ai.agent.version": "a" * 64, "gen_ai.conversation.id": "chat-17", "user.id": "0bfe935e70c321c7",
        "session.id": "chat-17", "agentkit.run_id": run_id, "agentkit.stage": "production", "agentkit.state": "DONE",
        "agentkit.route": "clerk", "agentkit.usd": 0.25,
    } == attributes(agent)  # fmt: skip
    assert attributes(chat) | {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai", "gen_ai.request.model": "gpt-x",
        "gen_ai.usage.input_tokens": 100, "gen_ai.usage.output_tokens": 20, "gen_ai.agent.name": "clerk",
        "agentkit.usd": 0.25,
    } == attributes(chat)  # fmt: skip
    assert attributes(tool) | {
        "gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "pay", "gen_ai.tool.type": "function",
    } == attributes(tool)  # fmt: skip
    assert (agent.kind, chat.kind, tool.kind) == (
        Span.SPAN_KIND_INTERNAL,
        Span.SPAN_KIND_CLIENT,
        Span.SPAN_KIND_INTERNAL,
    )
    assert {span.status.code for span in spans.values()} == {Status.STATUS_CODE_UNSET}
    assert not agent.parent_span_id
    assert spans["PLANNING"].parent_span_id == agent.span_id
    assert chat.parent_span_id == spans["PLANNING"].span_id
    assert agent.end_time_unix_nano - agent.start_time_unix_nano == 1_000_000_000
    assert collector.resources[0]["service.name"] == "agentkit"


def test_the_names_are_those_of_the_conventions(
    log: RunLog, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTKIT_OTLP_CONTENT", "on")
    steps = [*made().steps[:3], Step("tool", "pay", "EXECUTING", 0.4, 0.1, error="ValueError: no"), *made().steps[4:]]
    log.append(made(steps=steps, state="FAILED", error="ValueError: no"))
    forward(log)
    ours = {name for span in collector.spans for name in attributes(span)}
    known = {v for k, v in vars(gen_ai_attributes).items() if k.startswith("GEN_AI_")} | {error_attributes.ERROR_TYPE}
    assert {name for name in ours if name.startswith(("gen_ai.", "error."))} <= known
    assert {name for name in ours if not name.startswith(("gen_ai.", "error.", "agentkit."))} == {
        "session.id",
        "user.id",
    }


def test_no_content_leaves_unless_asked_for(log: RunLog, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = [Step("tool", "pay", "EXECUTING", 0.4, 0.1, "clerk", {"iban": SECRET}, error=f"ValueError: {SECRET}")]
    for record in (made(), made(steps=failed, state="FAILED", error=f"ValueError: {SECRET}", output=None)):
        log.append(record)
    forward(log)
    sent = "\n".join(str(span) for span in collector.spans)
    assert SECRET not in sent
    assert "paid 5.00" not in sent
    assert "as planned" not in sent
    assert "ValueError" in sent, "of what class an error is, is said"

    monkeypatch.setenv("AGENTKIT_OTLP_CONTENT", "on")
    collector.spans.clear()
    (run_id,) = keep(log, 1)
    forward(log)
    spans = spans_of(collector, run_id)
    agent, chat, tool = (attributes(spans[n]) for n in ("invoke_agent shop", "chat gpt-x", "execute_tool pay"))
    assert SECRET in agent["gen_ai.input.messages"]
    assert json.loads(chat["gen_ai.output.messages"]) == [
        {"role": "assistant", "parts": [{"type": "text", "content": "pay"}], "finish_reason": "stop"}
    ]
    assert json.loads(tool["gen_ai.tool.call.arguments"]) == {"amount": 5.0}
    assert json.loads(tool["gen_ai.tool.call.result"]) == "paid 5.00"


def test_a_failure_has_its_type_and_status(log: RunLog, collector: Collector) -> None:
    steps = [
        *made().steps[:3],
        Step("tool", "pay", "EXECUTING", 0.4, 0.1, "clerk", error="TimeoutError: 5 s"),
        Step("transition", "FAILED", "EXECUTING", 0.4, 0.2, outputs="TimeoutError: 5 s"),
    ]
    log.append(record := made(steps=steps, state="FAILED", error="TimeoutError: 5 s", output=None))
    forward(log)
    spans = spans_of(collector, record.run_id)
    for name in ("invoke_agent shop", "execute_tool pay"):
        assert spans[name].status.code == Status.STATUS_CODE_ERROR
        assert attributes(spans[name])["error.type"] == "TimeoutError"
    assert spans["PLANNING"].status.code == Status.STATUS_CODE_UNSET


def test_agents_that_a_run_called_are_agents_inside_it(log: RunLog, collector: Collector) -> None:
    record = crew(node("payer", lambda run: run.call(refund, order_id="A", usd=1), refund)).run(text="x")
    forward(log)
    spans = spans_of(collector, record.run_id)
    names = {span.span_id: name for name, span in spans.items()}
    agents = {
        n: attributes(s) for n, s in spans.items() if attributes(s).get("gen_ai.operation.name") == "invoke_agent"
    }
    assert agents.keys() == {"invoke_agent crew", "invoke_agent payer"}
    assert agents["invoke_agent payer"]["agentkit.run_id"] != record.run_id
    assert names[spans["execute_tool refund"].parent_span_id] == "EXECUTING"


@pytest.mark.parametrize(
    ("model", "provider", "name"),
    [
        ("openai/gpt-x", "openai", "gpt-x"),
        ("azure/gpt-x", "azure.ai.openai", "gpt-x"),
        ("bedrock/anthropic.claude", "aws.bedrock", "anthropic.claude"),
        ("ollama_chat/llama:7b", "ollama", "llama:7b"),
        ("openrouter/meta/llama", "openrouter", "meta/llama"),
        ("embedded/default", "agentkit", "default"),
        ("bare", "agentkit", "bare"),
    ],
)
def test_providers_are_named_as_the_conventions_do(
    log: RunLog, collector: Collector, model: str, provider: str, name: str
) -> None:
    log.append(record := made(steps=[Step("model", model, "PLANNING", 0, 0.1, outputs=["x"], model=model)]))
    forward(log)
    chat = attributes(spans_of(collector, record.run_id)[f"chat {name}"])
    assert (chat["gen_ai.provider.name"], chat["gen_ai.request.model"]) == (provider, name)


def test_the_standard_variables_hold(log: RunLog, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{collector.url}/elsewhere")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=secret")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "claims")
    keep(log, 1)
    forward(log)
    assert len(collector.spans) == SPANS
    (headers,) = collector.headers
    assert (headers["x-key"], headers["Content-Encoding"]) == ("secret", "gzip")
    assert collector.resources[0]["service.name"] == "claims"


# --- what it answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_collector_is_given_the_time_it_asks_for(log: RunLog, collector: Collector, status: int) -> None:
    (run_id,) = keep(log, 1)
    collector.answers = [(status, {"Retry-After": "7"}, b"")]
    consumer = Consumer(log, OtlpTarget())
    with pytest.raises(Unavailable) as busy:
        consumer.forward()
    assert busy.value.retry_after == 7
    assert collector.requests == 1
    consumer.forward()
    assert len(spans_of(collector, run_id)) == SPANS
    assert len(collector.spans) == SPANS
    consumer.target.close()


def test_a_short_pause_is_waited_for_at_once(log: RunLog, collector: Collector) -> None:
    keep(log, 1)
    collector.answers = [(503, {"Retry-After": "0"}, b""), (429, {"Retry-After": "0.1"}, b"")]
    assert forward(log).done.runs == 1
    assert (collector.requests, len(collector.spans)) == (3, SPANS)


def test_a_collector_that_dies_loses_nothing(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    first = keep(log, 5)
    with collecting(port) as collector:
        forward(log)
        assert len(collector.by_trace()) == 5
    second = keep(log, 5)
    with pytest.raises(Unavailable, match="does not answer"):
        forward(log)
    with collecting(port) as collector:
        forward(log)
        assert collector.by_trace().keys() == set(second)
        assert not collector.by_trace().keys() & set(first)


def test_one_bad_run_does_not_hold_up_the_others(log: RunLog, collector: Collector) -> None:
    ids = keep(log, 8)
    bad = bytes.fromhex(otel_trace_id(ids[3]))
    take = collector.take

    def picky(headers: dict[str, str], body: bytes) -> Any:
        if bad in body:
            return 400, {}, b"bad trace"
        return take(headers, body)

    collector.take = picky  # type: ignore[method-assign]
    consumer = forward(log)
    for _ in range(3):
        consumer._again_at = 0.0
        consumer.forward()
    assert collector.by_trace().keys() == set(ids) - {ids[3]}
    assert consumer.done.refused == 1
    assert "400" in consumer.file.refused_path.read_text()


def test_a_success_that_is_none_for_some_spans_is_noticed(log: RunLog, collector: Collector) -> None:
    (run_id,) = keep(log, 1)
    collector.always = rejecting(SPANS, "quota")
    consumer = forward(log)
    while consumer.is_owing:
        consumer._again_at = 0.0
        consumer.forward()
    refused = json.loads(consumer.file.refused_path.read_text())
    assert (refused["run_id"], refused["why"]) == (run_id, f"{SPANS} spans: quota")


@pytest.mark.parametrize("status", [301, 401, 403, 404])
def test_a_wrong_address_or_key_refuses_no_run(log: RunLog, collector: Collector, status: int) -> None:
    ids = keep(log, 3)
    collector.always = (status, {}, b"")
    consumer = Consumer(log, OtlpTarget())
    for _ in range(4):
        with pytest.raises(Unavailable, match=str(status)):
            consumer.forward()
    collector.always = (200, {}, b"")
    consumer.forward()
    assert collector.by_trace().keys() == set(ids)
    consumer.target.close()


def test_many_spans_go_in_several_requests(log: RunLog, collector: Collector) -> None:
    keep(log, 600)
    forward(log)
    assert len(collector.by_trace()) == 600
    assert 3 <= collector.requests <= 6


# --- by hand and in the background ------------------------------------------------------------------------------------


def test_the_command_says_what_it_did(log: RunLog, collector: Collector) -> None:
    keep(log, 3)
    log.close()
    done = CliRunner().invoke(app, ["forward", "otlp"])
    assert (done.exit_code, "3 runs" in done.output) == (0, True), done.output
    assert len(collector.by_trace()) == 3


def test_the_command_says_that_nobody_answers(
    log: RunLog, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    keep(log, 1)
    log.close()
    done = CliRunner().invoke(app, ["forward", "otlp"])
    assert done.exit_code == 1
    assert "nothing is lost" in done.output + capfd.readouterr().err


def test_agents_send_beside_their_work(log: RunLog, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    import agentkit as ak
    from agentkit_tracking import traces

    monkeypatch.setenv("AGENTKIT_TRACES", "otlp")
    shop = ak.System("shop", [node("clerk")])
    records = [shop.run(text="x") for _ in range(3)]
    assert traces.flush(30)
    assert collector.by_trace().keys() == {record.run_id for record in records}


def test_without_the_package_it_says_what_to_install(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    keep(log, 1)
    with pytest.raises(Unavailable, match=r"agentkit-hedgehog\[otlp\]"):
        forward(log)


def test_every_table_of_names_is_used() -> None:
    named: Callable[[str], str] = otlp_spans._provider
    assert {named(f"{ours}/m") for ours in otlp_spans._PROVIDERS} == set(otlp_spans._PROVIDERS.values())
    known = {value for name, value in vars(gen_ai_attributes.GenAiProviderNameValues).items() if name.isupper()}
    assert set(otlp_spans._PROVIDERS.values()) <= {v.value for v in known}
