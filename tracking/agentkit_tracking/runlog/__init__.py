"""The run log: every process appends to a segment of its own; a fold brings them into DuckDB; readers see both at once.

agentkit run ─ sink ─ segment (JSON lines, hash chain) ─ fold ─ log.duckdb ─ archive (Parquet, a day a file)
                         └──────── fresh ───────┬──────────────────┴─────────────────┘
                                        log.sql(), log.runs(), …
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from typing import Any

from agentkit.records import RunRecord, Step
from agentkit_tracking.runlog.log import RunLog
from agentkit_tracking.runlog.segments import LogUnwritable

__all__ = ["LogUnwritable", "RunLog", "own", "sink"]

_logs: dict[tuple[str | None, str], RunLog] = {}  # by what decides where the home is


def own() -> RunLog:
    """The run log in the home, the same object for the whole process: what is appended goes to one segment."""
    place = os.environ.get("AGENTKIT_HOME"), os.getcwd()
    log = _logs.get(place)
    if log is None:
        log = _logs.setdefault(place, RunLog())
    return log


class _Sink:
    """What agentkit hands runs to, as they happen and when they are over (entry point `agentkit.sinks`)."""

    def __call__(self, record: RunRecord) -> None:
        own().append(record)

    def progress(self, run: Any, steps: Sequence[Step], first: int) -> None:
        own().progress(run, steps, first)


sink = _Sink()


def _leave() -> None:
    for log in _logs.values():
        log.leave()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave)


@atexit.register
def _close() -> None:
    for log in _logs.values():
        log.close()
