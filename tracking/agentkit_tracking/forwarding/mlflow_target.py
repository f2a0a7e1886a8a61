"""MLflow as a target: a run is a trace in the experiment of its system, feedback an assessment of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from agentkit.errors import UsageError
from agentkit_tracking.forwarding import mlflow_bulk
from agentkit_tracking.forwarding.assembly import LoggedFeedback, LoggedRun
from agentkit_tracking.forwarding.consumer import Place
from agentkit_tracking.forwarding.errors import Rejected, Unavailable
from agentkit_tracking.forwarding.ids import span_id, trace_id
from agentkit_tracking.forwarding.mlflow_spans import mlflow_spans
from agentkit_tracking.home import experiment, home, is_local_store, open_stores, registry_uri, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

_LIMIT = 250  # characters of MLflow's columns
_Trace = tuple[str, list[dict[str, Any]]]


class MlflowTarget:
    """The MLflow that is in force when this is made: `MLFLOW_TRACKING_URI`, or the store in the home."""

    def __init__(self) -> None:
        self._uri, self._registry, self._folder = tracking_uri(), registry_uri(), home()
        self.name = "mlflow" if is_local_store() else f"mlflow-{sha256(self._uri.encode()).hexdigest()[:8]}"
        self.address = _without_password(self._uri)
        self._pid = os.getpid()
        self._engine: Any = None

    def send(self, runs: list[LoggedRun]) -> None:
        """Write the traces of runs; those of one system in one request or transaction.

        Raises:
            Unavailable: MLflow cannot be reached, or its database is busy.
            Rejected: MLflow does not take them.
        """
        by_system: dict[str, list[LoggedRun]] = {}
        for run in runs:
            by_system.setdefault(run.record.system, []).append(run)
        with self._said() as client:
            for system, some in by_system.items():
                traces = [(trace_id(run.record.run_id), _built(run)) for run in some]
                self._write(client, system, traces)

    def _write(self, client: MlflowClient, system: str, traces: list[_Trace]) -> None:
        from mlflow.entities import Span
        from mlflow.tracing.client import TracingClient

        where = experiment(client, system, self._uri, self._folder)
        tracing = TracingClient(self._uri)
        if mlflow_bulk.can_write(tracing.store):
            self._engine = tracing.store.engine
            traces = self._insert(traces, where)
        if traces:
            spans = [Span.from_dict(span) for _, trace in traces for span in trace]
            tracing.log_spans(str(where.experiment_id), spans)

    def _insert(self, traces: list[_Trace], where: Any) -> list[_Trace]:
        """Write the traces that are new; returns the others."""
        from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

        try:
            with self._engine.begin() as connection:
                known = mlflow_bulk.known(connection, [identity for identity, _ in traces])
                rows = mlflow_bulk.Rows()
                for identity, spans in traces:
                    if identity not in known:
                        rows.add(identity, spans, where.experiment_id, where.artifact_location)
                rows.insert(connection)
        except IntegrityError:  # another writer was quicker
            return traces
        except OperationalError as e:
            raise Unavailable(f"its database does not take writes: {str(e.orig).splitlines()[0]}") from e
        except DBAPIError as e:
            raise Rejected(str(e.orig).splitlines()[0]) from e
        return [trace for trace in traces if trace[0] in known]

    def attach(self, feedback: LoggedFeedback, place: Place) -> None:
        """Add what was said of a run: its label, its rating and its comment as assessments, each once.

        Raises:
            Unavailable: MLflow cannot be reached.
            Rejected: the trace is not there.
        """
        from mlflow.exceptions import MlflowException
        from mlflow.tracing.client import TracingClient

        trace = trace_id(place.root)
        span = None if place.root == place.run else span_id(place.run)
        with self._said():
            tracing = TracingClient(self._uri)
            for assessment in _assessments(feedback, span):
                try:
                    tracing.get_assessment(trace, assessment.assessment_id)
                except MlflowException as e:
                    if e.error_code != "RESOURCE_DOES_NOT_EXIST":
                        raise
                    tracing.log_assessment(trace, assessment)

    def close(self) -> None:
        """Let go of the database's connections; in a forked process they are the parent's, and only forgotten."""
        if self._engine is not None:
            self._engine.dispose(close=os.getpid() == self._pid)
            self._engine = None

    @contextmanager
    def _said(self) -> Iterator[MlflowClient]:
        """A client; errors of MLflow inside are said in our words."""
        try:
            client = open_stores(self._uri, self._registry, self._folder)
        except UsageError as e:
            raise Unavailable(str(e)) from e
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield client
        except UsageError as e:  # a deleted experiment
            raise Rejected(str(e), is_certain=True) from e
        except SQLAlchemyError as e:
            raise Unavailable(str(e).splitlines()[0]) from e
        except OSError as e:
            raise Unavailable(str(e)) from e
        except MlflowException as e:
            raise _said_by(client, e) from e


def _said_by(client: MlflowClient, error: MlflowException) -> Unavailable | Rejected:
    from mlflow.exceptions import MlflowException

    status, reason = error.get_http_status_code(), str(error).splitlines()[0][:500]
    if status in (401, 403, 408, 429, 502, 503, 504) or "database is locked" in reason:
        return Unavailable(reason)
    try:
        client.search_experiments(max_results=1)
    except MlflowException:
        return Unavailable(reason)
    return Rejected(reason)


def _built(run: LoggedRun) -> list[dict[str, Any]]:
    try:
        return mlflow_spans(run)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise Rejected(f"no trace can be made of it: {e!r}", is_certain=True) from e


def _assessments(feedback: LoggedFeedback, span: str | None) -> Iterator[Any]:
    from mlflow.entities import AssessmentSource, Feedback

    given_ms = int(datetime.fromisoformat(feedback.given_at).timestamp() * 1000)
    said = {"feedback": feedback.label, "rating": feedback.rating}
    if all(value is None for value in said.values()):
        said = {"comment": feedback.comment}
    for name, value in said.items():
        if value is None:
            continue
        assessment = Feedback(
            name=name,
            value=value,
            source=AssessmentSource(
                source_type="CODE" if feedback.source == "system" else "HUMAN",
                source_id=(feedback.by or feedback.source)[:_LIMIT],
            ),
            rationale=None if name == "comment" else feedback.comment,
            metadata={
                "agentkit.event": feedback.id,
                "agentkit.run_id": feedback.run_id,
                "agentkit.source": feedback.source,
            },
            span_id=span,
            create_time_ms=given_ms,
            last_update_time_ms=given_ms,
        )
        assessment.assessment_id = f"a-{sha256(f'{feedback.id}/{name}'.encode()).hexdigest()[:32]}"
        yield assessment


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return uri if parts.password is None else uri.replace(f":{parts.password}@", ":…@", 1)
