"""A collector of OpenTelemetry traces on loopback, which decodes what it is sent, and can be made to fail."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

Answer = tuple[int, dict[str, str], bytes]
OK: Answer = (200, {}, b"")


@dataclass
class Collector:
    """What was taken; `answers` are given first, one a request, then `always`."""

    url: str = ""
    spans: list[Span] = field(default_factory=list)
    resources: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    always: Answer = OK
    requests: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def by_trace(self) -> dict[str, list[Span]]:
        """Spans by the hex of their trace."""
        found: dict[str, list[Span]] = {}
        for span in self.spans:
            found.setdefault(span.trace_id.hex(), []).append(span)
        return found

    def take(self, headers: dict[str, str], body: bytes) -> Answer:
        with self.lock:
            self.requests += 1
            self.headers.append(headers)
            answer = self.answers.pop(0) if self.answers else self.always
            if 200 <= answer[0] < 300:
                request = ExportTraceServiceRequest()
                request.ParseFromString(gzip.decompress(body) if headers.get("Content-Encoding") == "gzip" else body)
                for resource in request.resource_spans:
                    self.resources.append({a.key: value(a.value) for a in resource.resource.attributes})
                    for scope in resource.scope_spans:
                        self.spans += scope.spans
            return answer


def value(any_value: Any) -> Any:
    """What an attribute holds."""
    kind = any_value.WhichOneof("value")
    return None if kind is None else getattr(any_value, kind)


def attributes(span: Span) -> dict[str, Any]:
    """The attributes of a span."""
    return {a.key: value(a.value) for a in span.attributes}


def rejecting(count: int, why: str) -> Answer:
    """A success that is none for so many spans."""
    answer = ExportTraceServiceResponse()
    answer.partial_success.rejected_spans = count
    answer.partial_success.error_message = why
    return 200, {"Content-Type": "application/x-protobuf"}, answer.SerializeToString()


@contextmanager
def collecting(port: int = 0) -> Iterator[Collector]:
    """A collector on loopback."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, headers, content = collector.take(dict(self.headers), body)
            self.send_response(status)
            for name, text in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None: ...

    class Server(ThreadingHTTPServer):
        allow_reuse_address = True
        daemon_threads = True

    server = Server(("127.0.0.1", port), Handler)
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
