"""MLflow traces: one per run, made from the run log beside the agents, for people to look at; never the audit record."""

from __future__ import annotations

import logging
from functools import cache

from agentkit.errors import UsageError
from agentkit.records import RunRecord
from agentkit.runs import REHEARSALS
from agentkit_tracking.forwarding import trace_id
from agentkit_tracking.home import experiment_id, tracking_uri

__all__ = ["flush", "link", "trace_id", "write"]
_log = logging.getLogger("agentkit.forwarding")


def write(record: RunRecord) -> None:
    """The sink agentkit calls for every finished run: has it forwarded in the background (`AGENTKIT_TRACES=off`: not here).

    Evaluations, chaos and replays have no traces; the trace of a run holds those of the systems and agents it called.
    """
    if record.kind in REHEARSALS or record.parent is not None:
        return
    from agentkit_tracking import runlog
    from agentkit_tracking.forwarding import background

    try:
        background.start(runlog.own())
    except UsageError as e:  # the run is over, its effects are done, and the run log has it
        _warn_once(str(e))


@cache
def _warn_once(why: str) -> None:
    _log.warning("runs are not forwarded: %s", why)


def flush(seconds: float = 60.0) -> bool:
    """Wait until what the run log has by now is forwarded; False if that is not so after this time, or cannot be."""
    from agentkit_tracking import runlog
    from agentkit_tracking.forwarding import background

    return background.flush(runlog.own(), seconds)


def link(system: str, trace_id: str) -> str:
    """Where the MLflow UI shows a trace: on the tracking server, or on `agentkit ui` at its default port."""
    uri = tracking_uri()
    base = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    return f"{base}/#/experiments/{experiment_id(system)}/traces?selectedEvaluationId={trace_id}"
