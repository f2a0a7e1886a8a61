"""Forwarding: finished runs go from the run log to where people look, MLflow or any OpenTelemetry endpoint.

    segments, log.duckdb ─ reading ─ assembly ─ consumer ─┬─ mlflow_target ─ traces, feedback
              position after each batch taken ◄───────────┘└─ otlp ─ spans by the GenAI conventions

A consumer of the log of its own, off the agents' path: it keeps how far it is only once the target has taken a batch, so a
kill at any moment repeats some runs and loses none; ids follow from the run, so what is repeated is no double.
"""

from agentkit_tracking.forwarding.errors import Rejected, Unavailable
from agentkit_tracking.forwarding.ids import span_id, trace_id

__all__ = ["Rejected", "Unavailable", "span_id", "trace_id"]
