"""Any OpenTelemetry endpoint as a target: OTLP over HTTP, set up by the standard `OTEL_EXPORTER_OTLP_…` variables."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from agentkit_tracking.forwarding.assembly import LoggedFeedback, LoggedRun
from agentkit_tracking.forwarding.consumer import Partial, Place
from agentkit_tracking.forwarding.errors import Rejected, Unavailable
from agentkit_tracking.forwarding.otlp_spans import otlp_spans

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

CONTENT_ENV = "AGENTKIT_OTLP_CONTENT"
_DEFAULT = "http://localhost:4318"
_BUSY = (502, 503, 504)
_TOO_LARGE = 413
_OF_CONTENT = (400, _TOO_LARGE, 422)  # perhaps
_LOGGERS = ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.util.re")
_SPANS = 2_000  # in one request
_Sent = tuple[str, "ReadableSpan"]  # the id of the run that a span is of


class OtlpTarget:
    """The endpoint that is in force when this is made."""

    def __init__(self) -> None:
        self._endpoint, self._fault = _endpoint()
        self.name = f"otlp-{sha256(self._endpoint.encode()).hexdigest()[:8]}"
        self.address = "the OTLP endpoint" if self._fault else _shown(urlsplit(self._endpoint))
        self.in_part: list[Partial] = []
        self._content = os.environ.get(CONTENT_ENV, "off").lower() in ("on", "1", "true", "yes")
        headers = (os.environ.get(f"OTEL_EXPORTER_OTLP_{which}HEADERS", "") for which in ("", "TRACES_"))
        self._is_mlflow = any("x-mlflow-experiment-id" in given.lower() for given in headers)
        self._last: Any = None  # the last answer, or what there was in place of one
        self._exporter: Any = None

    def send(self, runs: list[LoggedRun]) -> None:
        """Send the spans of runs.

        Raises:
            Unavailable: the endpoint does not answer, not as OTLP does, or asks for a pause.
            Rejected: it does not take them.
        """
        exporter, scope, resource = self._ready()
        made: list[list[_Sent]] = []  # all, before some are sent: what is rejected after that is sent twice
        for run in runs:
            try:
                found = otlp_spans(run, self._content, resource, scope, is_for_mlflow=self._is_mlflow)
            except (AttributeError, KeyError, TypeError, ValueError) as e:
                raise Rejected(f"no spans can be made of it: {e!r}", is_certain=True) from e
            made.append([(run.record.run_id, span) for span in found])
        for batch in _requests(made):
            self._export(exporter, batch)

    def attach(self, feedback: LoggedFeedback, place: Place) -> None:
        """Feedback has no place in spans that are sent already."""

    def close(self) -> None:
        """Close the connection."""
        if self._exporter is not None:
            with suppress(Exception):
                self._exporter[0].shutdown()
            self._exporter = None

    def _export(self, exporter: Any, batch: list[_Sent]) -> None:
        self._last = None
        with _quiet():
            exporter.export([span for _, span in batch])
        answer = self._last
        if answer is None:
            raise Rejected("its spans cannot be encoded", is_certain=True)
        if isinstance(answer, Exception):
            raise Unavailable(f"it does not answer: {self._without_secrets(_why(answer))}")
        status, reason = answer.status_code, f"{answer.status_code} {answer.reason}: {_begin(answer)}"
        if 200 <= status < 300:
            self._note_rejected(batch, *_rejected_spans(answer))
        elif status == _TOO_LARGE and len(batch) > 1:
            half = len(batch) // 2
            self._export(exporter, batch[:half])
            self._export(exporter, batch[half:])
        elif status in _OF_CONTENT or (status >= 500 and status not in _BUSY):
            raise Rejected(reason)
        else:  # busy, or the address or the key is wrong: nothing that the runs could help
            raise Unavailable(reason, _seconds(answer.headers.get("Retry-After")))

    def _note_rejected(self, batch: list[_Sent], count: int, message: str) -> None:
        """A partial success: what was taken must not be sent again, and which spans were not is not said."""
        run_ids = list(dict.fromkeys(run_id for run_id, _ in batch))
        if count >= len(batch):
            self.in_part += [Partial([run_id], f"{count} spans: {message}") for run_id in run_ids]
        elif count > 0:
            self.in_part.append(Partial(run_ids, f"{count} of {len(batch)} spans: {message}"))

    def _ready(self) -> tuple[Any, Any, Any]:
        if self._exporter is None:
            if fault := self._fault or _wrong_protocol():
                raise Unavailable(fault)
            try:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            except ImportError as e:
                raise Unavailable("install agentkit-hedgehog[otlp] to send traces by OpenTelemetry") from e
            import requests
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope

            from agentkit import __version__

            _check_headers()
            session: Any = requests.Session()
            session.request = self._noting(session.request)  # the exporter says only whether it went well
            given = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get(
                "OTEL_RESOURCE_ATTRIBUTES", ""
            )
            name = {} if given else {"service.name": "agentkit"}
            resource = Resource.create(name)
            scope = InstrumentationScope("agentkit", __version__)
            with _quiet():
                exporter = OTLPSpanExporter(endpoint=self._endpoint, session=session, max_request_size=0)
            self._exporter = exporter, scope, resource
        return self._exporter  # type: ignore[no-any-return]

    def _noting(self, request: Any) -> Any:
        from requests import RequestException

        def noted(*args: Any, **kwargs: Any) -> Any:
            try:
                self._last = request(*args, **kwargs)
            except Exception as e:
                # The exporter tries again until its time is over, the last time perhaps with none left: a ValueError.
                if self._last is None or isinstance(e, RequestException):
                    self._last = e
                raise
            return self._last

        return noted

    def _without_secrets(self, text: str) -> str:
        parts = urlsplit(self._endpoint)
        for secret in (parts.query, parts.netloc.rpartition("@")[0]):
            text = text.replace(secret, "…") if secret else text
        return text


def _requests(made: list[list[_Sent]]) -> Iterator[list[_Sent]]:
    """Runs whole in one request, where they fit into one."""
    batch: list[_Sent] = []
    for run in made:
        if batch and len(batch) + len(run) > _SPANS:
            yield batch
            batch = []
        batch = batch + run
        while len(batch) > _SPANS:
            yield batch[:_SPANS]
            batch = batch[_SPANS:]
    if batch:
        yield batch


# ---- the setting


def _endpoint() -> tuple[str, str | None]:
    """Where traces go, and what is wrong with it; never the address itself, which may hold a key."""
    variable = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
    endpoint = os.environ.get(variable)
    if is_base := not endpoint:
        variable = "OTEL_EXPORTER_OTLP_ENDPOINT"
        endpoint = os.environ.get(variable) or _DEFAULT
    assert endpoint is not None
    try:
        parts = urlsplit(endpoint)
        found = "the port 0" if parts.port == 0 else None
    except ValueError:
        parts, found = SplitResult("", "", "", "", ""), "a port or brackets that cannot be"
    else:
        if "://" not in endpoint:
            found = "nothing before the host"
        elif parts.scheme not in ("http", "https"):
            found = f"{parts.scheme}://"
        elif not parts.hostname:
            found = "no host"
    if found:
        return endpoint, (
            f"{variable} is not an address of OTLP over HTTP: expected http://HOST:PORT or https://HOST:PORT, "
            f"found {found}; set it to the collector's HTTP port, usually 4318"
        )
    if is_base:
        endpoint = parts._replace(path=f"{parts.path.rstrip('/')}/v1/traces").geturl()
    return endpoint, None


def _shown(endpoint: SplitResult) -> str:
    return endpoint._replace(netloc=endpoint.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _wrong_protocol() -> str | None:
    variable = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
    protocol = os.environ.get(variable) or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    if protocol.strip().lower() == "http/protobuf":
        return None
    return (
        f"OTEL_EXPORTER_OTLP_PROTOCOL asks for {protocol!r}, and traces are sent only by http/protobuf; set {variable}"
        "=http/protobuf, and the endpoint to the collector's HTTP port, usually 4318"
    )


def _check_headers() -> None:
    """What cannot be sent is said by us; OpenTelemetry would write it out, with the key in it.

    Raises:
        Unavailable: a header is malformed.
    """
    import requests
    from opentelemetry.util.re import parse_env_headers

    variable = "OTEL_EXPORTER_OTLP_TRACES_HEADERS"
    given = os.environ.get(variable)
    if not given:
        variable = "OTEL_EXPORTER_OTLP_HEADERS"
        given = os.environ.get(variable, "")
    with _quiet() as quiet:
        headers = parse_env_headers(given, liberal=True)
    if quiet.kept:
        raise Unavailable(
            f"{variable} cannot be read: expected NAME=VALUE, URL-encoded, with commas between, found "
            f"{len(quiet.kept)} that are not so; write a blank as %20, é as %C3%A9"
        )
    for name, value in headers.items():
        try:
            requests.utils.check_header_validity((name, value))
            value.encode("latin-1")
        except (requests.exceptions.InvalidHeader, UnicodeEncodeError):
            raise Unavailable(
                f"{variable}: the value of {name} has characters that no header can hold, such as the end of a line; "
                "remove them"
            ) from None


# ---- answers


def _rejected_spans(answer: Any) -> tuple[int, str]:
    """How many spans were not taken, and why.

    Raises:
        Unavailable: this is no answer of OTLP; somebody else is at that address, such as a page to log in.
    """
    from google.protobuf import json_format
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    said, content = ExportTraceServiceResponse(), answer.content
    kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    try:
        if content.lstrip().startswith(b"{"):
            json_format.Parse(content, said)
        elif content.strip():
            if kind.startswith("text/"):
                raise DecodeError
            said.ParseFromString(content)
    except (DecodeError, json_format.ParseError, UnicodeDecodeError):
        raise Unavailable(
            f"what answers is no OTLP collector: {answer.status_code} with {kind or 'a body of no type'}: "
            f"{_begin(answer)}; check the endpoint and what is in front of it"
        ) from None
    return said.partial_success.rejected_spans, said.partial_success.error_message


def _begin(answer: Any) -> str:
    return " ".join(answer.text[:300].split())


def _why(error: Exception) -> str:
    """What went wrong with a request, without the address, which may hold a key."""
    import requests

    if isinstance(error, requests.ConnectionError | requests.Timeout):
        cause = error.args[0] if error.args else error
        return str(getattr(cause, "reason", cause))
    return str(error) if type(error) is OSError else type(error).__name__  # OSError: a file of certificates is missing


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


class _quiet:
    """The exporter logs every try, and headers; here that is kept, and said once by whoever forwards."""

    def __enter__(self) -> _quiet:
        self._thread = threading.get_ident()
        self.kept: list[logging.LogRecord] = []
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(self._is_other)
        return self

    def __exit__(self, *_: object) -> None:
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(self._is_other)

    def _is_other(self, record: logging.LogRecord) -> bool:
        if record.thread == self._thread:
            self.kept.append(record)
        return record.thread != self._thread
