"""For the tests of forwarding: runs that cost nothing to make, a target in memory, and what MLflow shows of a system."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from agentkit.records import RunRecord, Step
from agentkit_tracking.forwarding.assembly import LoggedFeedback, LoggedRun
from agentkit_tracking.forwarding.consumer import Place
from agentkit_tracking.runlog import RunLog

_BEGAN = datetime(2026, 11, 20, 10, tzinfo=UTC)
_number = itertools.count()
SPANS = 8  # of `made`


def made(system: str = "shop", **values: Any) -> RunRecord:
    """A finished run with a priced model call, a tool, and a decision."""
    steps = [
        Step("transition", "PLANNING", "IDLE", 0.0, 0.1, outputs="request received"),
        Step("model", "openai/gpt-x", "PLANNING", 0.1, 0.2, "clerk", None, ["pay"], "openai/gpt-x", 100, 20, 0.25),
        Step("transition", "EXECUTING", "PLANNING", 0.1, 0.3, "clerk", outputs="plan is made"),
        Step("decision", "tier of pay", "EXECUTING", 0.4, 0.0, "clerk", "small", 1),
        Step("tool", "pay", "EXECUTING", 0.4, 0.1, "clerk", {"amount": 5.0}, "paid 5.00", tries=1),
        Step("transition", "REFLECTING", "EXECUTING", 0.4, 0.2, "clerk", outputs="tools are done"),
        Step("decision", "action", "REFLECTING", 0.6, 0.0, "clerk", "as planned", "pay"),
        Step("transition", "DONE", "REFLECTING", 0.6, 0.1, outputs="result is valid"),
    ]
    began = _BEGAN + timedelta(seconds=next(_number))
    given: dict[str, Any] = {
        "run_id": uuid.uuid4().hex, "system": system, "release": "a" * 64, "kind": "run", "started_at": began.isoformat(),
        "seconds": 1.0, "state": "DONE", "route": "clerk", "inputs": {"ticket": "I paid twice"},
        "output": {"action": "pay"}, "error": None, "effects": [], "phases": {"planning": 0.3}, "waited_s": 0.0,
        "model_calls": 1, "tool_calls": 1, "tokens_in": 100, "tokens_out": 20, "usd": 0.25, "steps": steps,
        "user_hash": "0bfe935e70c321c7", "session": "chat-17", "stage": "production",
    }  # fmt: skip
    return RunRecord(**{**given, **values})


def keep(log: RunLog, count: int, **values: Any) -> list[str]:
    """Put so many finished runs into the log; returns their ids."""
    records = [made(**values) for _ in range(count)]
    for record in records:
        log.append(record)
    return [record.run_id for record in records]


class Kept:
    """A target in memory: `runs` counts how often each was sent; `trouble(runs)` may raise."""

    name, address = "kept", "memory"

    def __init__(self, trouble: Callable[[list[LoggedRun]], None] = lambda runs: None) -> None:
        self.trouble = trouble
        self.calls: list[int] = []
        self.runs: dict[str, LoggedRun] = {}
        self.times: dict[str, int] = {}
        self.feedback: dict[str, tuple[LoggedFeedback, Place]] = {}

    def send(self, runs: list[LoggedRun]) -> None:
        self.trouble(runs)
        self.calls.append(len(runs))
        for run in runs:
            self.runs[run.record.run_id] = run
            self.times[run.record.run_id] = self.times.get(run.record.run_id, 0) + 1

    def attach(self, feedback: LoggedFeedback, place: Place) -> None:
        self.feedback[feedback.id] = feedback, place

    def close(self) -> None: ...


@contextmanager
def own_log() -> Iterator[RunLog]:
    """The run log of the test's home; no thread that forwards it outlives the test."""
    from agentkit_tracking.forwarding import background
    from agentkit_tracking.runlog import own

    try:
        yield own()
    finally:
        background.stop(10)


def traces_of(system: str = "shop", **options: Any) -> dict[str, Any]:
    """What MLflow has of a system: run id to trace; fails where a run has two."""
    from agentkit_tracking.home import connect, experiment_id

    found: dict[str, Any] = {}
    token = None
    while True:
        page = connect().search_traces(locations=[experiment_id(system)], max_results=500, page_token=token, **options)
        for trace in page:
            run_id = trace.info.tags["agentkit.run_id"]
            assert run_id not in found, f"two traces of run {run_id}"
            found[run_id] = trace
        token = page.token
        if not token:
            return found


def spans_in_database(path: Any) -> dict[str, int]:
    """Trace id to its number of spans, straight from MLflow's tables."""
    import sqlite3

    with sqlite3.connect(path) as connection:
        rows = connection.execute(
            "SELECT t.request_id, count(s.span_id) FROM trace_info t LEFT JOIN spans s ON s.trace_id = t.request_id GROUP BY 1"
        ).fetchall()
    connection.close()
    return dict(rows)
