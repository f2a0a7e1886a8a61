"""The run log: every process appends to a segment of its own; a fold brings them into DuckDB; readers see both at once.

agentkit run ─ sink ─ segment (JSON lines, hash chain) ─ fold ─ log.duckdb ─ archive (Parquet, a day a file)
                         └──────── fresh ───────┬──────────────────┴─────────────────┘
                                        log.sql(), log.runs(), …
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentkit.records import RunRecord, Step
from agentkit_tracking.home import home
from agentkit_tracking.runlog.log import RunLog
from agentkit_tracking.runlog.segments import LogUnwritable

__all__ = ["LogUnwritable", "RunLog", "own", "sink"]

_logs: dict[Path, RunLog] = {}
_places: dict[
    tuple[str | None, str], RunLog
] = {}  # by what decides where the home is, which is found by looking at folders


def own() -> RunLog:
    """The run log in the home, the same object for the whole process: what is appended goes to one segment."""
    given = os.environ.get("AGENTKIT_HOME")
    place = given, "" if given and os.path.isabs(given) else os.getcwd()
    log = _places.get(place)
    if log is None:
        folder = home() / "log"
        log = _places.setdefault(place, _logs.setdefault(folder, RunLog(folder)))
    return log


class _Sink:
    """What agentkit hands runs to, as they happen and when they are over (entry point `agentkit.sinks`)."""

    def __init__(self) -> None:
        self._begun: dict[str, RunLog] = {}  # a run goes on where it began, whatever becomes of the working directory

    def __call__(self, record: RunRecord) -> None:
        self._begun.get(record.run_id, own()).append(record)
        self._begun.pop(record.run_id, None)

    def progress(self, run: Any, steps: Sequence[tuple[int, Step]]) -> None:
        if run.run_id not in self._begun:
            self._begun[run.run_id] = own()
        self._begun[run.run_id].progress(run, steps)


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
