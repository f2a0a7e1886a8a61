"""The run log as people use it: appended to by runs, asked with SQL."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from agentkit.errors import AgentkitError, UsageError
from agentkit.records import RunRecord, Step
from agentkit.runs import REHEARSALS
from agentkit_tracking.home import home
from agentkit_tracking.runlog import events
from agentkit_tracking.runlog.database import one, open_database
from agentkit_tracking.runlog.segments import SUFFIX, Event, Segment

if TYPE_CHECKING:
    import duckdb
    import polars as pl

    from agentkit_tracking.runlog.folding import Folded

SYNC_ENV = "AGENTKIT_LOG_SYNC"
_SYNCS = ("run", "step", "off")
# Bytes and number of segments beyond which a reader folds first, unless somebody is at it.
_FOLD_FROM, _FOLD_FROM_FILES = 64 << 20, 200


class RunLog:
    """Appends to and reads the run log in `folder` (default: `log` in the home).

    `AGENTKIT_LOG_SYNC` says when an event is on the disk, not only with the system: at the end of a `run` (the default; of
    evaluations never), at every `step`, or `off`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or home() / "log"
        self.database = open_database(self.folder)
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._segment: Segment | None = None  # of the process `_pid`
        self._known: dict[str, set[int]] = {}  # runs under way: which of their steps are kept
        self._unsettled: dict[str, Path] = {}  # runs of which more may be kept than is known, and where it was to go

    @property
    def segments(self) -> Path:
        """Where the segments lie."""
        return self.folder / "segments"

    # ---- writing

    def append(self, record: RunRecord) -> None:
        """Keep a finished run: what of it has not been kept while it ran, in one write.

        Raises:
            LogUnwritable: nothing of it was written; earlier events are untouched.
        """
        known = self._kept(record.run_id)
        self._own().append(events.finished(record, known, self._keep))
        self._known.pop(record.run_id, None)
        self._unsettled.pop(record.run_id, None)
        if self._sync != "off" and record.kind not in REHEARSALS:
            self._own().sync()

    def progress(self, run: Any, steps: Sequence[tuple[int, Step]]) -> None:
        """Keep steps of a run under way, with their places in its record; the first time also that it began.

        Raises:
            LogUnwritable: none of them was written.
        """
        known = self._kept(run.run_id)
        new = [] if known is not None else [events.began(run, self._keep)]
        new += [
            events.stepped(run, step, number, self._keep)
            for number, step in steps
            if step.run is None and number not in (known or ())
        ]
        own = self._own()
        self._unsettled[run.run_id] = own.path  # an interrupt may come when they are written and not known yet
        if new:
            own.append(new)
        self._known.setdefault(run.run_id, set()).update(number for number, _ in steps)
        self._unsettled.pop(run.run_id, None)
        if self._sync == "step":
            self._own().sync()

    def _kept(self, run_id: str) -> set[int] | None:
        """Which steps of a run under way are kept, by their places; None if not even that it began."""
        if (path := self._unsettled.get(run_id)) is not None:
            from agentkit_tracking.runlog import reading

            with suppress(AgentkitError, OSError):  # it cannot be read now: rather a step twice than none
                # Of a file that another thread has left, everything may be folded by now.
                is_ours = self._segment is not None and self._segment.path == path
                found = reading.kept_in(path, run_id) if is_ours else reading.kept(self, run_id)
                if found is not None:
                    self._known[run_id] = self._known.get(run_id, set()) | found
                self._unsettled.pop(run_id, None)
        return self._known.get(run_id)

    def write(self, new: Sequence[Event], *, sync: bool = True) -> list[str]:
        """Append events of any kind, in one write; returns their ids."""
        ids = self._own().append(new)
        if sync and self._sync != "off":
            self._own().sync()
        return ids

    @cached_property
    def _keep(self) -> Any:
        return events.payloads()

    @cached_property
    def _sync(self) -> str:
        chosen = os.environ.get(SYNC_ENV, "run")
        if chosen not in _SYNCS:
            raise UsageError(f"{SYNC_ENV}={chosen!r}: use {', '.join(_SYNCS)}")
        return chosen

    def _own(self) -> Segment:
        """The segment of this process."""
        if self._pid != os.getpid():
            self.leave()
        with self._lock:
            if self._segment is None:
                self._segment = Segment(self.segments)
            return self._segment

    def leave(self) -> None:
        """After a fork, in the child: the segment is the parent's, and a thread that is not here may have held the lock."""
        self._lock, self._pid = threading.Lock(), os.getpid()
        if self._segment is not None:
            self._segment.forget()
            self._segment = None

    def close(self) -> None:
        """Close this process's segment; the next append opens another."""
        with self._lock:
            if self._segment is not None and self._pid == os.getpid():
                self._segment.close()
            self._segment = None

    # ---- folding and reading

    def fold(self) -> Folded | None:
        """Fold the segments into the database; None if another process is at it."""
        from agentkit_tracking.runlog.folding import fold

        return fold(self.segments, self.database)

    @contextmanager
    def connection(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A DuckDB connection with the views of the log on what is folded and what is not, as of now.

        It keeps folds waiting; let go of it soon.

        Raises:
            LogBusy: another program keeps the database locked.
        """
        from agentkit_tracking.runlog import reading

        if self._has_much_unfolded():
            self.fold()
        with reading.connection(self) as connection:
            yield connection

    def _has_much_unfolded(self) -> bool:
        try:
            with os.scandir(self.segments) as entries:
                sizes = [e.stat(follow_symlinks=False).st_size for e in entries if e.name.endswith(SUFFIX)]
        except OSError:
            return False
        return sum(sizes) > _FOLD_FROM or len(sizes) > _FOLD_FROM_FILES

    def sql(self, query: str, parameters: list[Any] | None = None) -> pl.DataFrame:
        """Query the views `runs`, `steps`, `outcomes`, `feedback` and `events` with DuckDB SQL; tracking/RUNLOG.md has columns.

        One statement that reads, and only the log: no other file, no setting, no `COPY … TO`. `connection` has no such limits.

        Raises:
            UsageError: it does something else, or DuckDB refuses it; its message is passed on.
        """
        import duckdb

        from agentkit_tracking.runlog import asking

        with self.connection() as connection:
            try:
                asking.check(connection, query, self.database)
                asking.confine(connection, self.database)
                return asking.frame(connection.sql(query, params=parameters))
            except duckdb.PermissionException as e:
                raise UsageError(f"{asking.ONLY_READING}: {e}") from e
            except duckdb.Error as e:
                raise UsageError(f"the run log cannot answer this query: {e}") from e

    def runs(self, limit: int | None = None) -> pl.DataFrame:
        """Runs, newest first; those under way (or broken off) included."""
        tail = f" LIMIT {int(limit)}" if limit is not None else ""
        return self.sql(f"SELECT * FROM runs ORDER BY started_at DESC{tail}")

    def steps(self, run_id: str | None = None) -> pl.DataFrame:
        """Steps in order, of one run or of all; those of runs that it called are steps of these."""
        if run_id is None:
            return self.sql("SELECT * FROM steps ORDER BY run_id, step")
        return self.sql("SELECT * FROM steps WHERE run_id = ? ORDER BY step", [run_id])

    def has_outcome(self, run_id: str) -> bool:
        """Whether the end of this run is kept."""
        return not self.sql("SELECT 1 FROM outcomes WHERE run_id = ?", [run_id]).is_empty()

    def feedback(self) -> pl.DataFrame:
        """What people said of runs, newest first."""
        return self.sql("SELECT * FROM feedback ORDER BY given_at DESC")

    def find(self, run_id: str) -> RunRecord:
        """The run whose id begins with `run_id`, whole, without the live result; as kept: redacted.

        Raises:
            UsageError: none begins so, or several do.
        """
        import duckdb

        with self.connection() as connection:
            found = connection.execute(
                "SELECT DISTINCT run_id FROM runs WHERE starts_with(run_id, ?) ORDER BY run_id LIMIT 3", [run_id]
            ).fetchall()
            if len(found) != 1:
                several = ", ".join(row[0] for row in found)
                raise UsageError(
                    f"the run log in {self.folder} has no run {run_id!r}; `agentkit log` lists them"
                    if not found
                    else f"{run_id!r} begins several runs, among them {several}; give more of the id"
                )
            try:
                return _record(connection, found[0][0])
            except duckdb.Error as e:
                raise UsageError(f"the run log cannot answer this query: {e}") from e


def _record(connection: duckdb.DuckDBPyConnection, run_id: str) -> RunRecord:
    # A program that forks within a run may end it twice: the end that came last counts.
    query = "SELECT * FROM runs WHERE run_id = ? ORDER BY seconds DESC LIMIT 1"
    (row,) = connection.sql(query, params=[run_id]).pl().to_dicts()
    steps: list[Step] = []
    for made in connection.sql("SELECT * FROM steps WHERE run_id = ? ORDER BY step", params=[run_id]).pl().to_dicts():
        for name in ("inputs", "outputs"):
            made[name] = _parsed(made[name])
        step = events.step_of(made)
        steps.append(step)
        if step.kind == "handoff" and isinstance(step.outputs, str):
            steps += _handed(connection, step)
    for name in ("inputs", "output", "effects", "partial"):
        row[name] = _parsed(row[name])
    names = {f for f in RunRecord.__slots__ if f not in ("steps", "result", "pid")}
    values = {name: row[name] for name in names}
    values["started_at"] = row["started_at"].isoformat()
    values["inputs"] = row["inputs"] or {}
    values["effects"] = row["effects"] or []
    values["phases"] = {name: seconds for name, seconds in (row["phases"] or {}).items() if seconds is not None}
    values["usd"] = math.nan if row["usd"] is None else row["usd"]
    return RunRecord(**values, steps=steps)


def _handed(connection: duckdb.DuckDBPyConnection, handoff: Step) -> list[Step]:
    """The steps of the run that the work was handed to, as steps of the one that handed it."""
    if not one(connection.execute("SELECT count(*) FROM runs WHERE run_id = ?", [handoff.outputs])):
        return []
    child = _record(connection, handoff.outputs)
    return [
        replace(
            step,
            started=step.started + handoff.started,
            agent=step.agent or child.route or child.system,
            run=step.run or child.run_id,
        )
        for step in child.steps
        if step.kind not in ("transition", "handoff")
    ]


def _parsed(text: str | None) -> Any:
    return None if text is None else orjson.loads(text)
