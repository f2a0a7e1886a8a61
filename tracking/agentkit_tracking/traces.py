"""One MLflow trace per run, built from its record.

Written in the background (MLflow's queue drops when full): for people to look at, never the audit record.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from datetime import datetime
from functools import cache
from typing import Any

from agentkit.errors import AgentkitError
from agentkit.records import RunRecord, Step
from agentkit_tracking.home import connect, experiment_id, tracking_uri

_PAUSE_S = 60.0  # after a failure, until the store is tried again
_paused_until = 0.0
_log = logging.getLogger(__name__)
_SPAN_TYPES = {"model": "CHAT_MODEL", "tool": "TOOL", "approval": "TOOL", "decision": "CHAIN"}


def write(record: RunRecord) -> None:
    """The sink agentkit calls for every finished run; `AGENTKIT_TRACES=off` turns it off.

    Evaluation runs are logged in bulk with their evaluation, not trace by trace; the trace of a run holds those of the
    systems and agents it called. A store that fails costs a warning
    and the trace: the run is over, its effects are done, and the run log has it.
    """
    global _paused_until
    if (
        record.kind == "evaluation"
        or record.parent is not None
        or os.environ.get("AGENTKIT_TRACES", "on").lower() in ("off", "0", "false")
    ):
        return
    if time.monotonic() < _paused_until:
        return
    from mlflow.exceptions import MlflowException

    try:
        log_trace(record)
    except (AgentkitError, MlflowException) as e:
        _paused_until = time.monotonic() + _PAUSE_S
        _log.warning("run %s has no trace, nor has any in the next %g s: %s", record.run_id, _PAUSE_S, e)


def log_trace(record: RunRecord) -> str:
    """Write the trace of a record; returns the trace id."""
    connect()
    _import_pyfunc()
    import mlflow
    from mlflow.entities import SpanStatus, SpanStatusCode

    start = int(datetime.fromisoformat(record.started_at).timestamp() * 1e9)
    root = mlflow.start_span_no_context(
        record.system,
        span_type="AGENT",
        inputs=record.inputs,
        attributes={"agentkit.run_id": record.run_id, "agentkit.usd": record.usd, "agentkit.route": record.route or ""},
        experiment_id=experiment_id(record.system),
        start_time_ns=start,
        tags={
            "agentkit.run_id": record.run_id,
            "agentkit.release": record.release or "draft",
            "agentkit.state": record.state,
            "agentkit.route": record.route or "",
            "agentkit.usd": f"{record.usd:.6f}",
        },
    )
    phase: Any = None
    for step in record.steps:
        if step.kind == "transition":
            # A transition ends the phase it leaves: its span covers that state.
            _finish(phase, start, step)
            phase = _begin(root, start, step)
            continue
        _child(phase or root, start, step)
    _finish(phase, start, record.steps[-1] if record.steps else None)
    code = SpanStatusCode.OK if record.state == "DONE" else SpanStatusCode.ERROR
    root.end(
        outputs=record.output if record.error is None else {"error": record.error},
        status=SpanStatus(code, record.error or ""),
        end_time_ns=start + int(record.seconds * 1e9),
    )
    return str(root.trace_id)


@cache
def _import_pyfunc() -> None:
    """The first span imports this; it warns of type hints in mlflow's own models, which means nothing to a user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        import mlflow.pyfunc.context  # noqa: F401


def _begin(root: Any, start: int, step: Step) -> Any:
    """A span for the state the transition enters; none for the final ones."""
    import mlflow

    if step.name in ("DONE", "FAILED"):
        return None
    return mlflow.start_span_no_context(
        step.name, parent_span=root, span_type="CHAIN", start_time_ns=start + int((step.started + step.seconds) * 1e9)
    )


def _finish(phase: Any, start: int, step: Step | None) -> None:
    if phase is not None and step is not None:
        status = "ERROR" if step.name == "FAILED" else "OK"
        phase.end(status=status, end_time_ns=start + int((step.started + step.seconds) * 1e9))


def _child(parent: Any, start: int, step: Step) -> None:
    import mlflow

    begin = start + int(step.started * 1e9)
    span = mlflow.start_span_no_context(
        step.name,
        parent_span=parent,
        span_type=_SPAN_TYPES[step.kind],
        inputs={"inputs": step.inputs} if step.inputs is not None else None,
        attributes={"agentkit.agent": step.agent or "", "agentkit.usd": step.usd},
        start_time_ns=begin,
    )
    if step.model:
        usage = {
            "input_tokens": step.tokens_in,
            "output_tokens": step.tokens_out,
            "total_tokens": step.tokens_in + step.tokens_out,
        }
        # With the cost given, MLflow does not look it up through litellm (seconds of import, a price we do not use).
        cost = {"total_cost": step.usd}
        span.set_attributes({"mlflow.chat.tokenUsage": usage, "mlflow.llm.model": step.model, "mlflow.llm.cost": cost})
    span.end(
        outputs=step.error or step.outputs,
        status="ERROR" if step.error else "OK",
        end_time_ns=begin + int(step.seconds * 1e9),
    )


def link(system: str, trace_id: str) -> str:
    """Where the MLflow UI shows a trace: on the tracking server, or on `agentkit ui` at its default port."""
    uri = tracking_uri()
    base = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    return f"{base}/#/experiments/{experiment_id(system)}/traces?selectedEvaluationId={trace_id}"


def flush() -> None:
    """Wait until the traces written so far are stored."""
    import mlflow

    mlflow.flush_trace_async_logging()
