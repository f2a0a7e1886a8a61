"""How the run log stands: what is folded, what is not, how large it is, and who has it open."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from agentkit_tracking.runlog.database import one
from agentkit_tracking.runlog.segments import SUFFIX, is_live
from agentkit_tracking.runlog.unfolded import Position, positions
from agentkit_tracking.runlog.upkeep import ARCHIVE, archived

if TYPE_CHECKING:
    import duckdb

    from agentkit_tracking.runlog.log import RunLog


@dataclass
class Status:
    """Counts of events, sizes in bytes."""

    folded: int = 0
    fresh_bytes: int = 0  # of segments, beyond what is folded
    live: int = 0  # segments that a process is writing to
    ended: int = 0  # whose process is gone, to be folded
    folded_at: datetime | None = None
    archived: int = 0
    days: int = 0  # that are archived
    pruned: int = 0
    findings: int = 0  # damage that folds came upon
    unsigned: int = 0  # segments whose last folded event no signature covers
    ended_twice: int = 0  # runs
    segment_bytes: int = 0
    database_bytes: int = 0
    archive_bytes: int = 0
    holders: list[str] = field(default_factory=list)  # processes that have the database open, where that can be told


def status(log: RunLog) -> Status:
    """How it stands now; nothing is folded for it.

    Raises:
        LogBusy: another program keeps the database locked.
    """
    found = Status(holders=holders(log.database.path))
    known: dict[str, Position] = {}
    with log.database.reading() as connection:
        if connection is not None:
            known = positions(connection)
            days = archived(connection)
            found.archived, found.days = sum(events for _, _, events, _ in days), len({day for day, *_ in days})
            found.folded = int(one(connection.execute("SELECT count(*) FROM log.events")))
            seconds = one(connection.execute("SELECT epoch(max(folded_at)) FROM log.segments"))
            found.folded_at = None if seconds is None else datetime.fromtimestamp(seconds, UTC)
            found.pruned = int(one(connection.execute("SELECT coalesce(sum(last_n - first_n + 1), 0) FROM log.pruned")))
            found.findings = int(one(connection.execute("SELECT count(*) FROM log.findings")))
            found.unsigned = int(one(connection.execute(_UNSIGNED)))
            found.ended_twice = ended_twice(connection, "log.events")
    for path in log.segments.glob(f"*{SUFFIX}"):
        size = _size(path)
        found.segment_bytes += size
        found.fresh_bytes += max(0, size - (known[path.stem].next_byte if path.stem in known else 0))
        if is_live(path):
            found.live += 1
        else:
            found.ended += 1
    found.database_bytes = _size(log.database.path)
    found.archive_bytes = sum(map(_size, (log.folder / ARCHIVE).glob("day=*/*.parquet")))
    return found


def ended_twice(connection: duckdb.DuckDBPyConnection, events: str) -> int:
    """How many runs have several ends among these events, each of which counts: earlier versions wrote one for every
    process that was forked inside a run and came to its end."""
    ends = f"SELECT run_id FROM {events} WHERE type = 'outcome' GROUP BY run_id HAVING count(*) > 1"
    return int(one(connection.execute(f"SELECT count(*) FROM ({ends})")))


_UNSIGNED = (
    "SELECT count(*) FROM log.segments s "
    "WHERE NOT EXISTS (SELECT 1 FROM log.heads h WHERE h.segment = s.segment AND h.n >= s.n)"
)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def holders(path: Path) -> list[str]:
    """Processes with a lock on a file, as `name (process id)`; none where the system does not say (Linux does)."""
    try:
        inode = path.stat().st_ino
        rows = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return []
    pids = sorted(
        {int(row[-4]) for row in rows if len(row) >= 8 and row[-3].endswith(f":{inode}") and row[-4].isdigit()}
    )
    return [f"{_name(pid)} ({pid})" for pid in pids if pid != os.getpid()]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "process"
