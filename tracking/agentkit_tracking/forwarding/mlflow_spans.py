"""Spans in MLflow's words, as its stores keep them: attributes are JSON, what belongs to the trace stands at the root."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from typing import Any

import orjson

from agentkit.records import RunRecord, Step
from agentkit_tracking.forwarding.assembly import LoggedRun
from agentkit_tracking.forwarding.ids import otel_trace_id, trace_id
from agentkit_tracking.forwarding.spans import Span, spans

_TYPES = {
    "run": "AGENT",
    "phase": "CHAIN",
    "model": "CHAT_MODEL",
    "tool": "TOOL",
    "approval": "GUARDRAIL",
    "decision": "CHAIN",
}
TAG = "mlflow.traceTag."  # at the root: MLflow makes tags of the trace of them
_SHORT = 250  # characters of MLflow's columns for sessions and users


def mlflow_spans(run: LoggedRun) -> list[dict[str, Any]]:
    """The spans of a run's trace, the root first, as `mlflow.entities.Span.from_dict` takes them."""
    run_id = run.record.run_id
    otel_id = b64encode(bytes.fromhex(otel_trace_id(run_id))).decode()
    request = _json(trace_id(run_id))
    return [_span(span, otel_id, request) for span in spans(run)]


def _span(span: Span, otel_id: str, request: str) -> dict[str, Any]:
    if span.kind == "run":
        attributes = _of_run(span.run.record, is_root=span.parent is None)
    elif span.step is not None:
        attributes = _of_step(span, span.step)
    else:
        attributes = {}
    attributes |= {"mlflow.traceRequestId": request, "mlflow.spanType": _TYPES[span.kind]}
    return {
        "trace_id": otel_id,
        "span_id": _base64(span.id),
        "parent_span_id": None if span.parent is None else _base64(span.parent),
        "name": f"approval of {span.name}" if span.kind == "approval" else span.name,
        "start_time_unix_nano": span.start,
        "end_time_unix_nano": span.end,
        "events": _events(span),
        "status": {
            "code": "STATUS_CODE_ERROR" if span.is_error else "STATUS_CODE_OK",
            "message": span.error or "",
        },
        "attributes": {
            name: value if name == "mlflow.traceRequestId" else _json(value)
            for name, value in attributes.items()
            if value is not None
        },
        "links": [],
    }


def _events(span: Span) -> list[dict[str, Any]]:
    """What marks a span as failed in MLflow's tree of spans."""
    if not span.is_error:
        return []
    said = {"exception.type": span.error_type or "error", "exception.message": span.error or span.error_type or ""}
    return [{"name": "exception", "time_unix_nano": span.end, "attributes": said}]


def _of_run(record: RunRecord, *, is_root: bool) -> dict[str, Any]:
    result = record.output if record.error is None else {"error": record.error}
    if record.error is not None and record.partial:
        result = {"error": record.error, "partial": record.partial}
    attributes: dict[str, Any] = {
        "mlflow.spanInputs": record.inputs,
        "mlflow.spanOutputs": result,
        "agentkit.run_id": record.run_id,
        "agentkit.release": record.release or "draft",
        "agentkit.stage": record.stage,
        "agentkit.state": record.state,
        "agentkit.route": record.route or "",
        "agentkit.usd": _finite(record.usd),
        "agentkit.degraded": record.degraded,
        "agentkit.budget_used": record.budget_used,
    }
    if is_root:
        tags = {
            "mlflow.traceName": record.system,
            "agentkit.run_id": record.run_id,
            "agentkit.release": record.release or "draft",
            "agentkit.stage": record.stage,
            "agentkit.state": record.state,
            "agentkit.route": record.route or "",
            "agentkit.usd": "unknown" if _finite(record.usd) is None else f"{record.usd:.6f}",
        }
        attributes |= {TAG + name: value for name, value in tags.items()}
        attributes["session.id"] = _short(record.session)
        attributes["user.id"] = _short(record.user_hash)
    return attributes


def _of_step(span: Span, step: Step) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "mlflow.spanInputs": _inputs(step),
        "mlflow.spanOutputs": {"error": step.error} if step.error is not None else _outputs(step),
        "agentkit.agent": step.agent,
        "agentkit.state": step.state,
        "agentkit.cached": step.cached or None,
        "agentkit.tries": step.tries or None,
    }
    usd = _finite(step.usd)
    if step.model:
        attributes |= {
            "mlflow.llm.model": step.model,
            "mlflow.llm.provider": step.model.partition("/")[0] if "/" in step.model else None,
            "mlflow.chat.tokenUsage": {
                "input_tokens": step.tokens_in,
                "output_tokens": step.tokens_out,
                "total_tokens": step.tokens_in + step.tokens_out,
            },
        }
    if usd is not None and (step.model or usd):
        # Given, MLflow does not look it up through litellm: seconds of import for a price that is not ours.
        attributes["mlflow.llm.cost"] = {"total_cost": usd}
    return attributes


def _inputs(step: Step) -> Any:
    if step.inputs is None or isinstance(step.inputs, dict):
        return step.inputs
    return {"reason" if step.kind == "decision" else "inputs": step.inputs}


def _outputs(step: Step) -> Any:
    """What a model said as MLflow shows a chat."""
    if step.kind == "model" and isinstance(step.outputs, list) and all(isinstance(o, str) for o in step.outputs):
        return {"choices": [{"message": {"role": "assistant", "content": said}} for said in step.outputs]}
    return step.outputs


def _json(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        return json.dumps(value, ensure_ascii=False, default=str)


def _base64(identity: str) -> str:
    return b64encode(bytes.fromhex(identity)).decode()


def _finite(usd: float) -> float | None:
    return usd if math.isfinite(usd) else None


def _short(text: str | None) -> str | None:
    return None if text is None else text[:_SHORT]
