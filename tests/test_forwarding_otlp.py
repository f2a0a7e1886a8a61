"""What stands at an OTLP endpoint that is none, refuses, or is set up wrong: nothing is lost, all is said, no key is shown."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from collector import OK, Answer, Collector, attributes, rejecting
from forwarded import SPANS, keep, made, own_log
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from servers import free_port
from typer.testing import CliRunner

from agentkit.records import Step
from agentkit_pipelines.cli import app
from agentkit_tracking.forwarding import Unavailable
from agentkit_tracking.forwarding.consumer import Consumer
from agentkit_tracking.forwarding.otlp import OtlpTarget
from agentkit_tracking.runlog import RunLog

KEY = "S3CRETQ"
TRACES = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
BASE = "OTEL_EXPORTER_OTLP_ENDPOINT"
HEADERS = "OTEL_EXPORTER_OTLP_HEADERS"


@pytest.fixture
def log(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunLog]:
    for name in (TRACES, HEADERS, "OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_CERTIFICATE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with own_log() as log:
        yield log


@pytest.fixture
def consumer(log: RunLog, collector: Collector) -> Iterator[Consumer]:
    consumer = Consumer(log, OtlpTarget())
    yield consumer
    consumer.target.close()


def answering(collector: Collector, is_bad: Callable[[bytes], bool], answer: Answer) -> None:
    """Have the collector take what is not bad."""
    take = collector.take

    def picky(headers: dict[str, str], body: bytes) -> Answer:
        if is_bad(body):
            collector.requests += 1
            return answer
        return take(headers, body)

    collector.take = picky  # type: ignore[method-assign]


def refused_by(consumer: Consumer) -> list[dict[str, Any]]:
    path = consumer.file.refused_path
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def settle(consumer: Consumer) -> None:
    for _ in range(5):
        consumer._again_at = 0.0
        consumer.forward()


# --- a target that takes nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 413, 422, 500, 501])
def test_a_target_that_takes_nothing_refuses_nothing(
    log: RunLog, collector: Collector, consumer: Consumer, status: int
) -> None:
    ids = keep(log, 3)
    collector.always = status, {}, b"Client sent an HTTP request\nto an HTTPS server.\n"
    for _ in range(4):
        with pytest.raises(Unavailable, match=f"{status} .*: Client sent an HTTP request to an HTTPS server"):
            consumer.forward()
    collector.always = OK
    consumer.forward()
    assert collector.by_trace().keys() == set(ids)
    assert refused_by(consumer) == []


@pytest.mark.parametrize("status", [400, 500])
def test_one_bad_run_is_settled_without_others_to_come(
    log: RunLog, collector: Collector, consumer: Consumer, status: int
) -> None:
    ids = keep(log, 3)
    answering(collector, lambda body: bytes.fromhex(ids[1]) in body, (status, {}, b"boom"))
    consumer.forward()
    assert consumer.is_owing
    settle(consumer)
    assert not consumer.is_owing
    assert [line["run_id"] for line in refused_by(consumer)] == [ids[1]]
    assert collector.by_trace().keys() == {ids[0], ids[2]}


def test_the_command_comes_to_an_end_with_a_bad_run(log: RunLog, collector: Collector) -> None:
    ids = keep(log, 3)
    log.close()
    answering(collector, lambda body: bytes.fromhex(ids[1]) in body, (500, {}, b"boom"))
    first = CliRunner().invoke(app, ["forward", "otlp"])
    assert (first.exit_code, "2 runs" in first.output, "1 refused" in first.output) == (1, True, True), first.output
    assert CliRunner().invoke(app, ["forward", "otlp"]).exit_code == 0


# --- a 200 that is none -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("text/html", b"<html><body>Please log in</body></html>"),
        ("text/plain; charset=utf-8", b"Please log in"),
        ("", b"<html>Please log in"),
        ("application/json", b'{"error": "Please log in"}'),
        ("application/json", b'"Please log in"'),
        ("application/json", b'{"Please log in'),
        ("application/x-protobuf", b"\xff\xffPlease log in"),
    ],
)
def test_a_200_of_something_else_is_no_delivery(
    log: RunLog, collector: Collector, consumer: Consumer, kind: str, body: bytes
) -> None:
    ids = keep(log, 3)
    collector.always = 200, {"Content-Type": kind} if kind else {}, body
    with pytest.raises(Unavailable, match=r"no OTLP collector: 200 with .*Please log in.*check the endpoint"):
        consumer.forward()
    collector.spans.clear()
    collector.always = OK
    consumer.forward()
    assert collector.by_trace().keys() == set(ids)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/x-protobuf", b""),
        ("application/x-protobuf", ExportTraceServiceResponse(partial_success={}).SerializeToString()),
        ("", ExportTraceServiceResponse(partial_success={"error_message": "slow"}).SerializeToString()),
        ("application/json", b"{}"),
        ("application/json; charset=utf-8", b'{"partialSuccess": {}}'),
        ("text/plain", b" {}\n"),
        ("text/plain", b"\n"),
    ],
)
def test_all_answers_of_otlp_are_understood(
    log: RunLog, collector: Collector, consumer: Consumer, kind: str, body: bytes
) -> None:
    keep(log, 3)
    collector.always = 200, {"Content-Type": kind} if kind else {}, body
    consumer.forward()
    assert (consumer.done.runs, consumer.done.refused, consumer.is_owing) == (3, 0, False)


# --- a partial success ------------------------------------------------------------------------------------------------


def test_what_was_taken_in_part_is_not_sent_again(
    log: RunLog, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    ids = keep(log, 400)
    take = collector.take

    def picky(headers: dict[str, str], body: bytes) -> Answer:
        answer = take(headers, body)
        return rejecting(1, "too odd") if bytes.fromhex(ids[7]) in body else answer

    collector.take = picky  # type: ignore[method-assign]
    consumer = Consumer(log, OtlpTarget())
    consumer.forward()
    settle(consumer)
    consumer.target.close()
    assert len(collector.spans) == 400 * SPANS, "the specification forbids to send them again"
    [line] = refused_by(consumer)
    assert ids[7] in line["run_ids"]
    assert "1 of" in line["why"]
    assert "too odd" in line["why"]
    [said] = [r.message for r in caplog.records if r.name == "agentkit.forwarding"]
    assert f"part of {len(line['run_ids'])} runs is not forwarded" in said


@pytest.mark.parametrize(
    "answer",
    [
        rejecting(3 * SPANS, "quota"),
        (
            200,
            {"Content-Type": "application/json"},
            b'{"partialSuccess": {"rejectedSpans": "24", "errorMessage": "quota"}}',
        ),
    ],
)
def test_runs_of_which_nothing_was_taken_are_noted_one_by_one(
    log: RunLog, collector: Collector, consumer: Consumer, answer: Answer
) -> None:
    ids = keep(log, 3)
    collector.always = answer
    consumer.forward()
    assert [(line["run_id"], line["why"]) for line in refused_by(consumer)] == [(i, "24 spans: quota") for i in ids]
    assert (consumer.done.runs, consumer.done.refused, consumer.is_owing, collector.requests) == (0, 3, False, 1)


# --- what is too large ------------------------------------------------------------------------------------------------


def large(spans: int) -> list[Step]:
    return [Step("tool", f"pay {n}", "EXECUTING", 0.4, 0.1, "clerk", tries=1) for n in range(spans)]


def test_a_large_run_goes_in_several_requests(log: RunLog, collector: Collector, consumer: Consumer) -> None:
    log.append(made(steps=large(4_500)))
    keep(log, 2)
    consumer.forward()
    assert consumer.done.runs == 3
    spans = [span.span_id for span in collector.spans]
    assert (len(spans), len(set(spans)), collector.requests) == (4_501 + 2 * SPANS, 4_501 + 2 * SPANS, 3)


def test_a_run_too_large_for_one_request_is_split(log: RunLog, collector: Collector, consumer: Consumer) -> None:
    log.append(made(steps=large(500)))
    keep(log, 20)
    answering(collector, lambda body: len(body) > 30_000, (413, {}, b"too large"))
    consumer.forward()
    assert (consumer.done.runs, consumer.done.refused, consumer.is_owing) == (21, 0, False)
    spans = [span.span_id for span in collector.spans]
    assert len(spans) == len(set(spans)) == 501 + 20 * SPANS


# --- how long to wait -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "given"), [("1e10", 3600.0), ("inf", None), ("nan", None), ("soon", None)])
def test_a_huge_pause_is_cut(
    log: RunLog, collector: Collector, consumer: Consumer, asked: str, given: float | None
) -> None:
    keep(log, 1)
    collector.always = 429, {"Retry-After": asked}, b""
    with pytest.raises(Unavailable) as busy:
        consumer.forward()
    assert busy.value.retry_after == given


# --- what is set up wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "found"),
    [
        ("http://[::1", "a port or brackets that cannot be"),
        ("http://127.0.0.1:99999", "a port or brackets that cannot be"),
        (f"http://me:{KEY}/x@127.0.0.1", "a port or brackets that cannot be"),
        ("http://127.0.0.1:0", "the port 0"),
        (f"localhost:4318?key={KEY}", "nothing before the host"),
        (f"ftp://me:{KEY}@localhost", "ftp://"),
        (f"http://?key={KEY}", "no host"),
    ],
)
@pytest.mark.parametrize("variable", [TRACES, BASE])
def test_an_endpoint_that_is_none_is_said(
    log: RunLog,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    variable: str,
    endpoint: str,
    found: str,
) -> None:
    monkeypatch.setenv(variable, endpoint)
    keep(log, 1)
    log.close()
    done = CliRunner().invoke(app, ["forward", "otlp"])
    said = done.output + capfd.readouterr().err
    assert (done.exit_code, KEY in said) == (1, False), said
    assert f"{variable} is not an address of OTLP over HTTP: expected http://HOST:PORT" in said
    assert f"found {found}; set it to" in said


def test_grpc_is_refused_with_what_to_do(log: RunLog, consumer: Consumer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    keep(log, 1)
    with pytest.raises(Unavailable, match=r"asks for 'grpc'.*set OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=http/protobuf"):
        consumer.forward()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    consumer.forward()
    assert consumer.done.runs == 1


def test_why_nobody_answers_is_said(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    for bundle in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # requests prefers them
        monkeypatch.delenv(bundle, raising=False)
    keep(log, 1)
    port = free_port()
    for scheme, certificate, why in (
        ("http", "", "Connection refused"),
        ("https", "/no/such.pem", r"invalid path: /no/such\.pem"),
    ):
        monkeypatch.setenv(BASE, f"{scheme}://127.0.0.1:{port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", certificate)
        target = OtlpTarget()
        with pytest.raises(Unavailable, match=f"it does not answer: .*{why}"):
            Consumer(log, target).forward()
        target.close()


def test_a_certificate_that_nobody_trusts_is_said(log: RunLog, collector: Collector) -> None:
    keep(log, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(BASE, collector.url.replace("http:", "https:"))
        target = OtlpTarget()
    with pytest.raises(Unavailable, match=r"it does not answer: .*SSL"):
        Consumer(log, target).forward()
    target.close()


def test_a_try_for_which_no_time_is_left_does_not_hide_why_the_one_before_failed(
    log: RunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    import requests

    keep(log, 1)
    monkeypatch.setenv(BASE, f"http://127.0.0.1:{free_port()}")
    request, tries = requests.Session.request, []

    def late(self: Any, *args: Any, **kwargs: Any) -> Any:
        tries.append(kwargs.get("timeout"))
        return request(self, *args, **{**kwargs, "timeout": -1 if len(tries) > 1 else 5})

    monkeypatch.setattr(requests.Session, "request", late)
    target = OtlpTarget()
    with pytest.raises(Unavailable, match=r"it does not answer: .*Connection refused"):
        Consumer(log, target).forward()
    target.close()
    assert len(tries) > 1


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        (f"authorization={KEY}é", "cannot be read: expected NAME=VALUE, URL-encoded"),
        (f"x-a=1,{KEY}", "cannot be read: expected NAME=VALUE, URL-encoded"),
        (f"authorization={KEY}%0Ax-b:%201", "the value of authorization has characters that no header can hold"),
        (f"authorization={KEY}%E2%82%AC", "the value of authorization has characters that no header can hold"),
    ],
)
@pytest.mark.parametrize("variable", [HEADERS, "OTEL_EXPORTER_OTLP_TRACES_HEADERS"])
def test_a_malformed_header_is_said_without_its_value(
    log: RunLog,
    consumer: Consumer,
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str,
    headers: str,
    why: str,
) -> None:
    keep(log, 1)
    monkeypatch.setenv(variable, headers)
    with caplog.at_level(logging.DEBUG), pytest.raises(Unavailable, match=f"{variable}:? .*{why}") as said:
        consumer.forward()
    assert KEY not in f"{said.value} {caplog.text}"
    assert collector.requests == 0
    monkeypatch.setenv(variable, f"authorization={KEY}%C3%A9")
    consumer.forward()
    assert collector.headers[0]["authorization"].startswith(KEY)


class Paths:
    """A server that keeps what paths were asked for, and says `status`."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.status = 200
        paths = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                paths.asked.append(self.path)
                self.send_response(paths.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.thread = Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def paths() -> Iterator[Paths]:
    paths = Paths()
    yield paths
    paths.close()


def test_keys_in_the_address_are_used_and_shown_nowhere(
    log: RunLog,
    paths: Paths,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(BASE, f"http://me:{KEY}@127.0.0.1:{paths.port}/x/?api-key={KEY}&team=a")
    keep(log, 1)
    log.close()
    shown = []
    with caplog.at_level(logging.DEBUG, "agentkit"):
        for status, port in ((401, None), (200, None), (200, free_port())):
            paths.status = status
            if port:
                monkeypatch.setenv(BASE, f"http://me:{KEY}@127.0.0.1:{port}/x?api-key={KEY}")
            shown.append(CliRunner().invoke(app, ["forward", "otlp"]).output)
    shown += [caplog.text, *capfd.readouterr()]
    shown += [path.read_text() for path in (log.folder / "consumers").iterdir()]
    assert paths.asked == [f"/x/v1/traces?api-key={KEY}&team=a"] * 2
    assert f"http://127.0.0.1:{paths.port}/x/v1/traces" in shown[0]
    assert "Connection refused" in "".join(shown)
    assert KEY not in "".join(shown)
    assert "api-key" not in "".join(shown)


# --- sent to MLflow ---------------------------------------------------------------------------------------------------


def test_spans_for_mlflow_carry_the_tags_of_the_trace(
    log: RunLog, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = keep(log, 1)
    monkeypatch.setenv(HEADERS, "x-mlflow-experiment-id=1")
    target = OtlpTarget()
    Consumer(log, target).forward()
    target.close()
    tags = [{n: v for n, v in attributes(s).items() if "traceTag" in n} for s in collector.spans]
    assert [found for found in tags if found] == [
        {
            "mlflow.traceTag.agentkit.run_id": first,
            "mlflow.traceTag.agentkit.release": "a" * 64,
            "mlflow.traceTag.agentkit.stage": "production",
            "mlflow.traceTag.agentkit.state": "DONE",
        }
    ]
