"""Any OpenTelemetry endpoint as a target: OTLP over HTTP, set up by the standard `OTEL_EXPORTER_OTLP_…` variables."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from agentkit_tracking.forwarding.assembly import LoggedFeedback, LoggedRun
from agentkit_tracking.forwarding.consumer import Place
from agentkit_tracking.forwarding.errors import Rejected, Unavailable
from agentkit_tracking.forwarding.otlp_spans import otlp_spans

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

CONTENT_ENV = "AGENTKIT_OTLP_CONTENT"
_DEFAULT = "http://localhost:4318"
_CERTAIN = (400, 413, 422)  # OTLP: not to be tried again as it is
_EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_SPANS = 2_000  # in one request


class OtlpTarget:
    """The endpoint that is in force when this is made."""

    def __init__(self) -> None:
        base = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or _DEFAULT
        endpoint = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or f"{base.rstrip('/')}/v1/traces"
        self.name = f"otlp-{sha256(endpoint.encode()).hexdigest()[:8]}"
        parts = urlsplit(endpoint)
        self.address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self._endpoint = endpoint
        self._content = os.environ.get(CONTENT_ENV, "off").lower() in ("on", "1", "true", "yes")
        headers = (os.environ.get(f"OTEL_EXPORTER_OTLP_{which}HEADERS", "") for which in ("", "TRACES_"))
        self._is_mlflow = any("x-mlflow-experiment-id" in given.lower() for given in headers)
        self._last: Any = None  # the last answer
        self._exporter: Any = None

    def send(self, runs: list[LoggedRun]) -> None:
        """Send the spans of runs.

        Raises:
            Unavailable: the endpoint does not answer, or asks for a pause.
            Rejected: it does not take them.
        """
        exporter, scope, resource = self._ready()
        batch: list[ReadableSpan] = []
        for run in runs:
            try:
                made = otlp_spans(run, self._content, resource, scope, is_for_mlflow=self._is_mlflow)
            except (AttributeError, KeyError, TypeError, ValueError) as e:
                raise Rejected(f"no spans can be made of it: {e!r}", is_certain=True) from e
            if batch and len(batch) + len(made) > _SPANS:
                self._export(exporter, batch)
                batch = []
            batch += made
        if batch:
            self._export(exporter, batch)

    def attach(self, feedback: LoggedFeedback, place: Place) -> None:
        """Feedback has no place in spans that are sent already."""

    def close(self) -> None:
        """Close the connection."""
        if self._exporter is not None:
            with suppress(Exception):
                self._exporter[0].shutdown()
            self._exporter = None

    def _export(self, exporter: Any, batch: list[ReadableSpan]) -> None:
        self._last = None
        with _quiet():
            exporter.export(batch)
        answer = self._last
        if answer is None:
            raise Unavailable(f"{self.address} does not answer")
        status, reason = answer.status_code, f"{answer.status_code} {answer.reason}: {answer.text[:300]}"
        if 200 <= status < 300:
            _check_whole(answer)
        elif status in _CERTAIN:
            raise Rejected(reason, is_certain=status != 422)
        elif status >= 500 and status not in (502, 503, 504):
            raise Rejected(reason)
        else:  # busy, or the address or the key is wrong: nothing that the runs could help
            raise Unavailable(reason, _seconds(answer.headers.get("Retry-After")))

    def _ready(self) -> tuple[Any, Any, Any]:
        if self._exporter is None:
            try:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            except ImportError as e:
                raise Unavailable("install agentkit-hedgehog[otlp] to send traces by OpenTelemetry") from e
            import requests
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope

            from agentkit import __version__

            session = requests.Session()
            session.hooks["response"].append(self._note)  # the exporter says only whether it went well
            given = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get(
                "OTEL_RESOURCE_ATTRIBUTES", ""
            )
            name = {} if given else {"service.name": "agentkit"}
            resource = Resource.create(name)
            scope = InstrumentationScope("agentkit", __version__)
            self._exporter = (
                OTLPSpanExporter(endpoint=self._endpoint, session=session, max_request_size=0),
                scope,
                resource,
            )
        return self._exporter  # type: ignore[no-any-return]

    def _note(self, response: Any, *_: Any, **__: Any) -> None:
        self._last = response


def _check_whole(answer: Any) -> None:
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    said = ExportTraceServiceResponse()
    try:
        said.ParseFromString(answer.content)
    except DecodeError:
        return  # some answer in JSON, or nothing
    if said.partial_success.rejected_spans:
        raise Rejected(
            f"{said.partial_success.rejected_spans} spans: {said.partial_success.error_message}", is_certain=True
        )


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else max(float(text), 0.0)
    except ValueError:
        return None


class _quiet:
    """The exporter logs every try; an outage is said once, by whoever forwards."""

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        logging.getLogger(_EXPORTER).addFilter(self._is_other)

    def __exit__(self, *_: object) -> None:
        logging.getLogger(_EXPORTER).removeFilter(self._is_other)

    def _is_other(self, record: logging.LogRecord) -> bool:
        return record.thread != self._thread
