"""Many new traces into MLflow's own tables with four statements.

`log_spans` of MLflow 3.17 asks the database about every tag of every trace: about 10 ms a trace, most of it in Python, while
agents run in the same process. Here are the rows that it would have written, for traces that are not there yet. Only for the tables
as they are in that version: with any other column MLflow's own way is taken.
"""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass, field
from typing import Any

_COLUMNS = {
    "trace_info": (
        "request_id experiment_id timestamp_ms execution_time_ms status client_request_id request_preview response_preview "
        "db_payload_generation trace_name session_id input_tokens output_tokens total_tokens cache_read_input_tokens "
        "cache_creation_input_tokens cache_creation_input_tokens_above_1hr input_cost output_cost total_cost"
    ),
    "trace_tags": "key value request_id",
    "trace_request_metadata": "key value request_id",
    "spans": (
        "trace_id experiment_id span_id parent_span_id name type status start_time_unix_nano end_time_unix_nano duration_ns "
        "content input_cost output_cost total_cost model_name model_provider"
    ),
}
_PREVIEW = 1000
_TAG = "mlflow.traceTag."
_NAME = "mlflow.traceName"
_TAG_VALUE, _MODEL = 4096, 500  # characters of MLflow's columns
_STATUS = {"STATUS_CODE_OK": "OK", "STATUS_CODE_ERROR": "ERROR"}


def can_write(store: Any) -> bool:
    """Whether a store of MLflow keeps traces in tables as this module knows them."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if type(store) is not SqlAlchemyStore or store.engine.dialect.name not in ("sqlite", "postgresql"):
        return False
    try:
        from mlflow.store.tracking.utils.sql_trace_rollups import rollups_enabled

        if rollups_enabled():
            return False
        tables = _tables()
    except (ImportError, AttributeError):
        return False
    return all(
        {column.name for column in table.columns} == set(_COLUMNS[name].split()) for name, table in tables.items()
    )


def _tables() -> dict[str, Any]:
    from mlflow.store.tracking.dbmodels import models

    found = (models.SqlTraceInfo, models.SqlTraceTag, models.SqlTraceMetadata, models.SqlSpan)
    return {model.__tablename__: model.__table__ for model in found}


@dataclass
class Rows:
    """What goes into each table."""

    trace_info: list[dict[str, Any]] = field(default_factory=list)
    trace_tags: list[dict[str, Any]] = field(default_factory=list)
    trace_request_metadata: list[dict[str, Any]] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)

    def add(self, trace_id: str, spans: list[dict[str, Any]], experiment_id: str, artifacts: str) -> None:
        """Add one trace; `artifacts` is the experiment's place for files."""
        root = spans[0]
        attributes = root["attributes"]
        usage = [_of(span, "mlflow.chat.tokenUsage") for span in spans]
        costs = [_of(span, "mlflow.llm.cost") for span in spans]
        started = min(span["start_time_unix_nano"] for span in spans) // 1_000_000
        ended = max(span["end_time_unix_nano"] for span in spans) // 1_000_000
        tags = {
            name.removeprefix(_TAG): str(json.loads(value))[:_TAG_VALUE]
            for name, value in attributes.items()
            if name.startswith(_TAG)
        }
        self.trace_info.append(
            {
                "request_id": trace_id,
                "experiment_id": int(experiment_id),
                "timestamp_ms": started,
                "execution_time_ms": ended - started,
                "status": _STATUS[root["status"]["code"]],
                "request_preview": _preview(attributes.get("mlflow.spanInputs")),
                "response_preview": _preview(attributes.get("mlflow.spanOutputs")),
                "db_payload_generation": 1,
                "trace_name": tags.pop(_NAME, None),
                "session_id": _value(attributes, "session.id"),
                **{name: _total(usage, name) for name in ("input_tokens", "output_tokens", "total_tokens")},
                **{name: _total(costs, name, 0.0) for name in ("input_cost", "output_cost", "total_cost")},
            }
        )
        tags["mlflow.artifactLocation"] = f"{artifacts.rstrip('/')}/traces/{trace_id}/artifacts"
        tags["mlflow.trace.spansLocation"] = "TRACKING_STORE"
        self.trace_tags += [{"request_id": trace_id, "key": key, "value": value} for key, value in tags.items()]
        user = _value(attributes, "user.id")
        if user:
            self.trace_request_metadata.append({"request_id": trace_id, "key": "mlflow.trace.user", "value": user})
        self.spans += [_span_row(trace_id, experiment_id, *row) for row in zip(spans, costs, strict=True)]

    def insert(self, connection: Any) -> None:
        """Write all rows; fails where one of the traces is there already."""
        for name, table in _tables().items():
            if rows := getattr(self, name):
                connection.execute(table.insert(), rows)


def known(connection: Any, trace_ids: list[str]) -> set[str]:
    """Which of these traces are there."""
    from sqlalchemy import select

    key = _tables()["trace_info"].c.request_id
    return {row[0] for row in connection.execute(select(key).where(key.in_(trace_ids)))}


def _span_row(trace_id: str, experiment_id: str, span: dict[str, Any], cost: dict[str, Any]) -> dict[str, Any]:
    attributes = span["attributes"]
    model, provider = (_value(attributes, name) for name in ("mlflow.llm.model", "mlflow.llm.provider"))
    return {
        "trace_id": trace_id,
        "experiment_id": int(experiment_id),
        "span_id": base64.b64decode(span["span_id"]).hex(),
        "parent_span_id": span["parent_span_id"] and base64.b64decode(span["parent_span_id"]).hex(),
        "name": span["name"],
        "type": _value(attributes, "mlflow.spanType"),
        "status": _STATUS[span["status"]["code"]],
        "start_time_unix_nano": span["start_time_unix_nano"],
        "end_time_unix_nano": span["end_time_unix_nano"],
        "content": json.dumps(span, ensure_ascii=False),
        **{name: _finite(cost.get(name)) for name in ("input_cost", "output_cost", "total_cost")},
        "model_name": model and model[:_MODEL],
        "model_provider": provider and provider[:_MODEL],
    }


def _of(span: dict[str, Any], name: str) -> dict[str, Any]:
    value = _value(span["attributes"], name)
    return value if isinstance(value, dict) else {}


def _value(attributes: dict[str, str], name: str) -> Any:
    text = attributes.get(name)
    return None if text is None else json.loads(text)


def _total(parts: list[dict[str, Any]], name: str, missing: float | None = None) -> Any:
    found = [part.get(name, missing) for part in parts if part]
    return sum(value for value in found if value is not None) if found else None


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _preview(text: str | None) -> str | None:
    return text if text is None or len(text) <= _PREVIEW else f"{text[: _PREVIEW - 3]}..."
