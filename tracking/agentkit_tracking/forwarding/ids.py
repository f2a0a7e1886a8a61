"""Ids that follow from the run: whoever forwards it, however often, it is the same trace and the same spans."""

from __future__ import annotations

import re
from hashlib import sha256

_TRACE = re.compile(r"(?!0{32})[0-9a-f]{32}")


def otel_trace_id(run_id: str) -> str:
    """The OpenTelemetry trace id of a run: the run's id, which has the same form; of another form, its hash."""
    return run_id if _TRACE.fullmatch(run_id) else sha256(run_id.encode("utf-8", "replace")).hexdigest()[:32]


def trace_id(run_id: str) -> str:
    """The MLflow trace id of a run."""
    return f"tr-{otel_trace_id(run_id)}"


def span_id(run_id: str, step: int = 0) -> str:
    """The id of the span of a step, which steps count from 1; 0 is the run itself."""
    return sha256(f"{run_id}/{step}".encode("utf-8", "replace")).hexdigest()[:16]
