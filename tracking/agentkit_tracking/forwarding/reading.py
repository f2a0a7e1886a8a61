"""What the run log holds beyond a position: what segments hold, read on from where it was left, and what was folded."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from agentkit_tracking.runlog import reading
from agentkit_tracking.runlog.segments import SUFFIX, Line, lines

if TYPE_CHECKING:
    import duckdb

    from agentkit_tracking.runlog import RunLog

_CHUNK = 4 << 20  # bytes of a segment at once
_SHARED_S = 60.0  # between looks into a database that machines share
_ROWS = 20_000  # of the database at once: folds wait meanwhile


class Mark(NamedTuple):
    """How far a segment is read: its last event, and the byte after that."""

    n: int = -1
    byte: int = 0


@dataclass(slots=True)
class Entry:
    """One event of the log as it was written: two pieces of JSON."""

    segment: str
    n: int
    event: bytes | str
    private: bytes | str | None


class Reader:
    """Reads what is new, each event once; `marks` says how far it is.

    Where machines share a database, what others folded is read only on demand, `everywhere`: they forward it themselves.
    """

    def __init__(self, log: RunLog, marks: dict[str, Mark], *, everywhere: bool = False) -> None:
        self.log, self.marks = log, marks
        self._host = socket.gethostname() if log.database.is_shared and not everywhere else None
        self._folded: object = None  # the state of the database that was read last
        self._seen: dict[str, int] = {}  # how large segments were when they were read last

    def has_news(self) -> bool:
        """Whether reading may find anything; costs a look at the folder."""
        return self._stamp() != self._folded or any(self._is_new(name, size) for name, size in self._sizes().items())

    def read(self) -> Iterator[Entry]:
        """What is new. `marks` follows: when an entry is handed out, it counts as read."""
        stamp = self._stamp()
        if stamp != self._folded:
            yield from self._from_database()
            self._folded = stamp
        for name, size in sorted(self._sizes().items()):
            if self._is_new(name, size):
                yield from self._from_segment(name)
                self._seen[name] = size

    def _is_new(self, name: str, size: int) -> bool:
        return size > max(self._mark(name).byte, self._seen.get(name, 0))

    def _from_segment(self, name: str) -> Iterator[Entry]:
        mark = self._mark(name)
        start, rest = mark.byte, b""
        try:
            file = open(self.log.segments / f"{name}{SUFFIX}", "rb")  # noqa: SIM115
        except FileNotFoundError:  # folded just now
            return
        with file:
            file.seek(start)
            while chunk := file.read(_CHUNK):
                content = rest + chunk
                end = content.rfind(b"\n") + 1
                for line in lines(content[:end], start):
                    if isinstance(line, Line) and line.n > mark.n:
                        self.marks[name] = Mark(line.n, line.offset + line.size)
                        yield Entry(name, line.n, line.event, line.private)
                rest, start = content[end:], start + end

    def _from_database(self) -> Iterator[Entry]:
        """Of segments that were folded and removed before they were read."""
        here = self._sizes()
        with self.log.database.reading() as connection:
            known = [] if connection is None else connection.execute(_FOLDED).fetchall()
        ends = {
            name: Mark(n, byte)
            for name, n, byte, host in known
            if name not in here and n > self._mark(name).n and self._host in (None, host)
        }
        while ends:
            rows = self._rows(ends)
            for segment, n, event, private in rows:
                self.marks[segment] = Mark(n, self._mark(segment).byte)
                yield Entry(segment, n, event, private)
            if len(rows) < _ROWS:
                self.marks.update(ends)
                return
            done = {row[0] for row in rows} - {rows[-1][0]}
            self.marks.update({name: ends.pop(name) for name in done})

    def _rows(self, ends: dict[str, Mark]) -> list[tuple[str, int, str, str | None]]:
        with reading.connection(self.log) as connection:
            _list(connection, "ends", list(ends), [self._mark(name).n for name in ends])
            return connection.execute(
                "SELECT e.segment, e.n, e.event, e.private FROM every_event e JOIN ends ON ends.name = e.segment "
                f"WHERE e.n > ends.n ORDER BY e.segment, e.n LIMIT {_ROWS}"
            ).fetchall()

    def _mark(self, name: str) -> Mark:
        return self.marks.get(name, _START)

    def _sizes(self) -> dict[str, int]:
        try:
            with os.scandir(self.log.segments) as entries:
                return {e.name.removesuffix(SUFFIX): e.stat().st_size for e in entries if e.name.endswith(SUFFIX)}
        except FileNotFoundError:
            return {}

    def _stamp(self) -> object:
        """What changes when something is folded."""
        if self.log.database.is_shared:
            return int(time.monotonic() / _SHARED_S)
        try:
            state = self.log.database.path.stat()
        except FileNotFoundError:
            return None
        return state.st_mtime_ns, state.st_size


_START = Mark()
_FOLDED = "SELECT segment, n, next_byte, host FROM log.segments"


def fetch_events(log: RunLog, run_ids: list[str]) -> Sequence[tuple[str, int, str, str | None]]:
    """All events of these runs: segment, number, event and private part as JSON."""
    with reading.connection(log) as connection:
        return connection.execute(
            "SELECT segment, n, event, private FROM every_event WHERE run_id IN (SELECT unnest(?)) AND type <> 'feedback' "
            "ORDER BY segment, n",
            [run_ids],
        ).fetchall()


def fetch_entries(log: RunLog, ids: list[str]) -> list[Entry]:
    """The events with these ids, `segment-number`."""
    with reading.connection(log) as connection:
        rows = connection.execute(
            "SELECT segment, n, event, private FROM every_event WHERE segment || '-' || n IN (SELECT unnest(?))", [ids]
        ).fetchall()
    return [Entry(*row) for row in rows]


def fetch_outcomes(log: RunLog, run_ids: list[str]) -> dict[str, tuple[str | None, str]]:
    """Of these runs those that have ended: what called them, and their kind."""
    with reading.connection(log) as connection:
        rows = connection.execute(
            "SELECT run_id, parent, kind FROM every_event WHERE type = 'outcome' AND run_id IN (SELECT unnest(?))",
            [run_ids],
        ).fetchall()
    return {run_id: (parent, kind) for run_id, parent, kind in rows}


def _list(connection: duckdb.DuckDBPyConnection, table: str, names: list[str], numbers: list[int]) -> None:
    connection.execute(f"CREATE TEMP TABLE {table} (name VARCHAR, n BIGINT)")
    connection.execute(f"INSERT INTO {table} SELECT unnest(?), unnest(?)", [names, numbers])
