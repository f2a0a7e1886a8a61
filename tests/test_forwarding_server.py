"""Forwarding to a real MLflow server: in bulk through its OpenTelemetry intake, past its death, and as any collector."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import servers
from forwarded import SPANS, keep, own_log, spans_in_database, traces_of

from agentkit_tracking import traces
from agentkit_tracking.forwarding import Unavailable
from agentkit_tracking.forwarding import consumer as consuming
from agentkit_tracking.forwarding.consumer import Consumer
from agentkit_tracking.forwarding.mlflow_target import MlflowTarget
from agentkit_tracking.forwarding.otlp import OtlpTarget
from agentkit_tracking.home import connect, experiment_id
from agentkit_tracking.runlog import RunLog, feedback

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Server:
    """An MLflow server that can be killed and started again at the same address, on the same database."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, servers.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.database = home / "mlflow.db"
        self._stack = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        home.mkdir()

    def start(self) -> None:
        arguments = ("--port", str(self.port))  # the last one counts
        self._process, _ = self._stack.enter_context(servers.start(self.home, *arguments, workers=1))
        servers.wait_until_healthy(self._process, self.url, self.home / "server.log")

    def kill(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("forwarding") / "server")
    yield server
    server.close()


@pytest.fixture
def log(own_home: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunLog]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(consuming, "BATCH", 10)
    with own_log() as log:
        yield log


def until_done(consumer: Consumer, seconds: float) -> int:
    """Forward until all is; returns how often the server was not there."""
    outages, end = 0, time.monotonic() + seconds
    while True:
        try:
            consumer.forward()
        except Unavailable:
            outages += 1
            assert time.monotonic() < end
            time.sleep(0.2)
        else:
            return outages


def test_a_server_that_comes_goes_and_comes_again_gets_every_run_once(log: RunLog, server: Server) -> None:
    ids = keep(log, 30)
    feedback.give(log, ids[0], "rejected", rating=2, comment="no", by="bob")
    consumer = Consumer(log, MlflowTarget())
    with pytest.raises(Unavailable, match="does not answer"):
        consumer.forward()
    server.start()
    consumer.forward()
    found = traces_of()
    assert found.keys() == set(ids)
    assert {(a.name, a.value) for a in found[ids[0]].info.assessments} == {("feedback", "rejected"), ("rating", 2.0)}
    trace = found[ids[0]]
    assert trace.info.trace_id == traces.trace_id(ids[0])
    assert trace.info.token_usage == {"input_tokens": 100, "output_tokens": 20, "total_tokens": 120}
    assert trace.info.cost["total_cost"] == pytest.approx(0.25)
    assert trace.info.trace_metadata["mlflow.trace.session"] == "chat-17"
    assert trace.info.trace_metadata["mlflow.trace.user"] == "0bfe935e70c321c7"
    assert trace.info.tags["agentkit.stage"] == "production"

    ids += keep(log, 150)
    threading.Timer(0.7, server.kill).start()
    outages = []
    forwarding = threading.Thread(target=lambda: outages.append(until_done(consumer, 300)))
    forwarding.start()
    time.sleep(3)
    ids += keep(log, 20)  # made while nobody is there
    server.start()
    forwarding.join(300)
    until_done(consumer, 60)
    assert outages != [0]
    assert spans_in_database(server.database) == {traces.trace_id(run_id): SPANS for run_id in ids}
    assert consumer.done.refused == 0

    consumer.file.forget()
    again = Consumer(log, MlflowTarget())
    again.forward()
    assert again.done.runs == len(ids)
    assert spans_in_database(server.database) == {traces.trace_id(run_id): SPANS for run_id in ids}
    assert len(traces_of()[ids[0]].info.assessments) == 2


def test_mlflow_understands_what_any_collector_is_sent(
    log: RunLog, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"x-mlflow-experiment-id={experiment_id('collected')}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    monkeypatch.setenv("AGENTKIT_OTLP_CONTENT", "on")
    (run_id,) = keep(log, 1, system="collected")
    consumer = Consumer(log, OtlpTarget())
    consumer.forward()
    consumer.target.close()
    trace = connect().get_trace(traces.trace_id(run_id))
    assert trace.info.state == "OK"
    assert {span.name: span.span_type for span in trace.data.spans if span.span_type != "UNKNOWN"} | {
        "invoke_agent collected": "AGENT", "chat gpt-x": "CHAT_MODEL", "execute_tool pay": "TOOL",
    } == {span.name: span.span_type for span in trace.data.spans if span.span_type != "UNKNOWN"}  # fmt: skip
    assert trace.info.token_usage == {"input_tokens": 100, "output_tokens": 20, "total_tokens": 120}
    assert trace.info.cost["total_cost"] == pytest.approx(0.25)
    assert trace.info.trace_metadata["mlflow.trace.session"] == "chat-17"
    assert trace.info.tags | {"agentkit.run_id": run_id, "agentkit.stage": "production"} == trace.info.tags
    assert len(trace.data.spans) == SPANS
    assert "I paid twice" in (trace.info.request_preview or "")
