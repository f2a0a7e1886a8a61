"""Spans by OpenTelemetry's conventions for generative AI (semantic conventions 1.37 and later).

What people and models wrote is sent only with `AGENTKIT_OTLP_CONTENT=on`: the conventions make content opt-in.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import orjson

from agentkit.records import Step
from agentkit_tracking.forwarding.assembly import LoggedRun
from agentkit_tracking.forwarding.ids import otel_trace_id
from agentkit_tracking.forwarding.mlflow_spans import TAG
from agentkit_tracking.forwarding.spans import Span, spans

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

_OPERATIONS = {"run": "invoke_agent", "model": "chat", "tool": "execute_tool"}
# Where the name that a model is called by differs from the provider's name in the conventions.
_PROVIDERS = {
    "azure": "azure.ai.openai",
    "azure_ai": "azure.ai.inference",
    "bedrock": "aws.bedrock",
    "gemini": "gcp.gemini",
    "mistral": "mistral_ai",
    "vertex_ai": "gcp.vertex_ai",
    "watsonx": "ibm.watsonx.ai",
    "xai": "x_ai",
}
OURS = "agentkit"  # the provider of what runs in process


def otlp_spans(
    run: LoggedRun, content: bool, resource: Resource, scope: InstrumentationScope, *, is_for_mlflow: bool = False
) -> list[ReadableSpan]:
    """The spans of a run's trace, the root first.

    Args:
        content: whether what people and models wrote is to be in them.
        is_for_mlflow: whether costs and the trace's tags are to be said in MLflow's words, too; costs it would look up
            elsewhere, through litellm, whose import alone holds up its server for half a minute.
    """
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

    trace = int(otel_trace_id(run.record.run_id), 16)
    flags = TraceFlags(TraceFlags.SAMPLED)

    def context(identity: str) -> SpanContext:
        return SpanContext(trace, int(identity, 16), is_remote=False, trace_flags=flags)

    def status(span: Span) -> Status:
        if not span.is_error:
            return Status(StatusCode.UNSET)
        return Status(StatusCode.ERROR, span.error if content else span.error_type)

    return [
        ReadableSpan(
            name=_name(span),
            context=context(span.id),
            parent=None if span.parent is None else context(span.parent),
            resource=resource,
            attributes={
                name: value
                for name, value in {
                    **_attributes(span, content),
                    **(_for_mlflow(span) if is_for_mlflow else {}),
                }.items()
                if value is not None
            },
            kind=SpanKind.CLIENT if span.kind == "model" else SpanKind.INTERNAL,
            status=status(span),
            start_time=span.start,
            end_time=span.end,
            instrumentation_scope=scope,
        )
        for span in spans(run)
    ]


def _name(span: Span) -> str:
    """What the conventions ask for: operation and target."""
    if span.kind == "model":
        return f"chat {_model(span)[1]}"
    if span.kind == "run":
        return f"invoke_agent {span.name}"
    if span.kind == "phase":
        return span.name
    return f"{_OPERATIONS.get(span.kind, span.kind)} {span.name}"


def _attributes(span: Span, content: bool) -> dict[str, Any]:
    run = span.run.record
    found: dict[str, Any] = {
        "gen_ai.operation.name": _OPERATIONS.get(span.kind),
        "gen_ai.conversation.id": run.session,
        "error.type": span.error_type,
        "agentkit.run_id": run.run_id,
    }
    if span.kind == "run":
        found |= _of_run(span, content)
    elif span.step is not None:
        found |= _of_step(span, span.step, content)
    return found


def _of_run(span: Span, content: bool) -> dict[str, Any]:
    run = span.run.record
    models = {_provider(logged.step.model) for one in span.run.whole() for logged in one.steps if logged.step.model}
    found: dict[str, Any] = {
        "gen_ai.provider.name": models.pop() if len(models) == 1 else OURS,
        "gen_ai.agent.name": span.name,
        "gen_ai.agent.id": f"{run.system}@{run.release}" if run.release else run.system,
        "gen_ai.agent.version": run.release,
        "session.id": run.session,
        "user.id": run.user_hash,
        "agentkit.system": run.system,
        "agentkit.release": run.release or "draft",
        "agentkit.stage": run.stage,
        "agentkit.state": run.state,
        "agentkit.route": run.route,
        "agentkit.usd": _finite(run.usd),
        "agentkit.kind": run.kind,
    }
    if content:
        found["gen_ai.input.messages"] = _messages("user", _json(run.inputs))
        said = _json(run.output) if run.output is not None else None
        found["gen_ai.output.messages"] = None if said is None else _messages("assistant", said, reason="stop")
    return found


def _of_step(span: Span, step: Step, content: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "gen_ai.agent.name": step.agent,
        "agentkit.phase": step.state,
        "agentkit.usd": _finite(step.usd) if step.model or step.usd else None,
        "agentkit.cached": step.cached or None,
    }
    if span.kind == "model":
        provider, model = _model(span)
        found |= {
            "gen_ai.provider.name": provider,
            "gen_ai.request.model": model,
            "gen_ai.usage.input_tokens": step.tokens_in,
            "gen_ai.usage.output_tokens": step.tokens_out,
        }
        if content and isinstance(step.outputs, list):
            texts = [said if isinstance(said, str) else _json(said) for said in step.outputs]
            found["gen_ai.output.messages"] = _messages("assistant", *texts, reason="stop")
    elif span.kind == "tool":
        found |= {
            "gen_ai.tool.name": step.name,
            "gen_ai.tool.type": "function",
            "agentkit.tool.tries": step.tries or None,
        }
        if content:
            found["gen_ai.tool.call.arguments"] = None if step.inputs is None else _json(step.inputs)
            found["gen_ai.tool.call.result"] = None if step.outputs is None else _json(step.outputs)
    else:
        found[f"agentkit.{span.kind}.name"] = step.name
        found[f"agentkit.{span.kind}.result"] = span.result
        if content:
            found[f"agentkit.{span.kind}.inputs"] = None if step.inputs is None else _json(step.inputs)
            found[f"agentkit.{span.kind}.outputs"] = None if step.outputs is None else _json(step.outputs)
    return found


def _for_mlflow(span: Span) -> dict[str, Any]:
    if span.parent is None:
        run = span.run.record
        tags = {"run_id": run.run_id, "release": run.release or "draft", "stage": run.stage, "state": run.state}
        return {f"{TAG}agentkit.{name}": value for name, value in tags.items()}
    usd = _finite(span.step.usd) if span.step is not None and span.step.model else None
    return {} if usd is None else {"mlflow.llm.cost": {"total_cost": usd}}


def _model(span: Span) -> tuple[str, str]:
    model = (span.step.model if span.step else None) or span.name
    return _provider(model), model.partition("/")[2] or model


def _provider(model: str) -> str:
    name = model.partition("/")[0] if "/" in model else ""
    return OURS if name in ("", "embedded") else _PROVIDERS.get(name, name.removesuffix("_chat"))


def _messages(role: str, *texts: str, reason: str | None = None) -> str:
    """As the conventions' schema of messages has them; `reason`: why the model stopped."""
    end = {} if reason is None else {"finish_reason": reason}
    return _json([{"role": role, "parts": [{"type": "text", "content": text}], **end} for text in texts])


def _json(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        return json.dumps(value, ensure_ascii=False, default=str)


def _finite(usd: float) -> float | None:
    return usd if math.isfinite(usd) else None
