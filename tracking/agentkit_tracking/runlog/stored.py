"""Events in the database and its archives, checked by DuckDB against their hash chain; part of the verification."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentkit_tracking.runlog.blanking import OF_CALLED
from agentkit_tracking.runlog.database import one, quoted
from agentkit_tracking.runlog.events import COLUMNS
from agentkit_tracking.runlog.segments import ID_SIZE, START
from agentkit_tracking.runlog.upkeep import WHOLE, archived, parquet

if TYPE_CHECKING:
    from pathlib import Path

    import duckdb

BATCH = 250_000  # events checked at once
MOST = 1_000  # faults of one kind said of one batch
_SEGMENT = re.compile(rf"[0-9a-f]{{{ID_SIZE}}}")
_TYPES = json.dumps(COLUMNS)
_TOLD = {
    **{name: f"k.told.{name}" for name in COLUMNS},
    **{
        name: f"""CASE WHEN contains(k.private, '"{name}"') AND json_valid(k.private) THEN CASE WHEN json_valid(k.private) THEN k.private->>'{name}' END END"""
        for name in ("user_hash", "session")
    },
}
_COLUMN = " ".join(
    f"WHEN k.{name} IS DISTINCT FROM {told} THEN "
    f"'its column {name} says ' || coalesce(k.{name}::VARCHAR, 'nothing') || ', the event ' || coalesce(({told})::VARCHAR, 'nothing')"
    for name, told in _TOLD.items()
)
# Why an event is not as it was written, or null. `links` has the hash that each is to follow.
_CHECK = f"""
    SELECT k.place, k.segment, k.n, k.told.run_id AS run_id, CASE
        WHEN k.n < 0 THEN 'no event has such a number'
        WHEN k.told IS NULL OR NOT coalesce(starts_with(k.event, '{{"id":"' || k.segment || '-' || k.n || '"'), false)
            THEN 'what stands in its place is ' || coalesce(CASE WHEN json_valid(k.event) THEN 'event ' || left(k.event->>'id', 60) END, 'no event')
        WHEN (k.n = 0 OR l.hash IS NOT NULL)
            AND sha256(CASE WHEN k.n = 0 THEN '{START}' ELSE l.hash END || k.event) IS DISTINCT FROM k.hash
            THEN 'it was changed: its hash does not follow from it and the event before'
        WHEN k.private IS NULL AND (e.run_id IS NULL OR NOT e.is_whole AND coalesce(k.told.type NOT IN {OF_CALLED}, true)) THEN 'its private part was taken out, and no erasure says so'
        WHEN k.private IS NOT NULL AND sha256(k.salt || k.private) IS DISTINCT FROM left(right(k.event, 66), 64)
            THEN 'its private part was changed'
        {_COLUMN} END AS why, k.n > 0 AND l.hash IS NULL AS is_after_gap
    FROM (
        SELECT *, CASE WHEN json_valid(event) THEN json_transform(event, '{_TYPES}') END AS told
        FROM kept WHERE $within
    ) k
    LEFT JOIN links l ON l.segment = k.segment AND l.n = greatest(k.n, 0) - 1
    LEFT JOIN erased e ON e.run_id = k.told.run_id
"""


@dataclass(frozen=True)
class Fault:
    """One thing that is not as it was written, or that cannot be told (a remark)."""

    segment: str
    n: int | None  # the event's number, the first one's of several; None where it cannot be told
    run_id: str | None
    where: str  # the file, or `database`
    what: str

    def __str__(self) -> str:
        event = self.segment if self.n is None else f"{self.segment} event {self.n}"
        run = f" of run {self.run_id}" if self.run_id else ""
        return f"{event}{run} ({self.where}): {self.what}"


@dataclass
class Stored:
    """What was found: the last event of each segment, and faults."""

    events: int = 0
    last: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def open_kept(connection: duckdb.DuckDBPyConnection, folder: Path, faults: list[Fault]) -> None:
    """Make the view `kept` of all folded events, with their place; archives that cannot be read are faults."""
    sources = [f"SELECT 'database' AS place, {WHOLE} FROM log.events"]
    files = [
        file
        for _, file, events, digest in archived(connection)
        if _is_whole(connection, folder, file, events, digest, faults)
    ]
    if files:
        place = f"substr(filename, {len(str(folder)) + 2})"
        sources.append(f"SELECT {place} AS place, {WHOLE} FROM {parquet(folder, files)}")
    connection.execute(f"CREATE TEMP VIEW kept AS {' UNION ALL BY NAME '.join(sources)}")


def _is_whole(
    connection: duckdb.DuckDBPyConnection, folder: Path, file: str, events: int, digest: str, faults: list[Fault]
) -> bool:
    """Whether an archive can be read; whether it is the one that was written is said in `faults`."""
    import hashlib

    import duckdb

    try:
        if (folder / file).exists() and not (folder / file).is_file():
            raise OSError(errno.EINVAL, "something else stands there")
        with open(folder / file, "rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as e:
        faults.append(Fault("archive", None, None, file, f"its {events} events are gone: {e.strerror}"))
        return False
    if found == digest:
        return True
    faults.append(Fault("archive", None, None, file, "the file is not the one that was archived (another SHA-256)"))
    try:
        connection.execute(f"SELECT bit_xor(hash({WHOLE})) FROM {parquet(folder, [file])}").fetchall()
    except (duckdb.Error, UnicodeDecodeError) as e:  # a message that quotes damaged bytes may be no text
        faults.append(Fault("archive", None, None, file, f"its events cannot be read: {str(e).splitlines()[0]}"))
        return False
    return True


def batches(connection: duckdb.DuckDBPyConnection) -> Iterator[tuple[str, str, int]]:
    """Ranges of segments of about `BATCH` events each: the first, the last, and how many events."""
    first: str | None = None
    last, events = "", 0
    counted = connection.execute(
        "SELECT segment, count(*) FROM (SELECT segment FROM kept WHERE segment IS NOT NULL) GROUP BY 1 "
        "UNION ALL SELECT DISTINCT segment, 0 FROM good_pruned ORDER BY 1"
    ).fetchall()
    for segment, n in counted:
        first, last, events = segment if first is None else first, segment, events + n
        if events >= BATCH:
            yield first, last, events
            first, events = None, 0
    if first is not None:
        yield first, last, events


def check(connection: duckdb.DuckDBPyConnection, first: str, last: str, done: Stored) -> None:
    """Check the folded events of the segments from `first` to `last` by name; `erased`, `good_heads`, `good_pruned` are there."""
    within = f"segment BETWEEN {quoted(first)} AND {quoted(last)}"
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE links AS SELECT segment, n, hash FROM kept WHERE n IS NOT NULL AND {within} "
        f"UNION ALL SELECT segment, last_n, hash FROM good_pruned WHERE {within}"
    )
    found = connection.execute(
        f"SELECT * FROM ({_CHECK.replace('$within', within)}) WHERE why IS NOT NULL OR is_after_gap "
        f"ORDER BY segment, n LIMIT {MOST}"
    ).fetchall()
    twice = connection.execute(
        f"SELECT segment, n, count(*) FROM links GROUP BY ALL HAVING count(*) > 1 ORDER BY ALL LIMIT {MOST}"
    ).fetchall()
    after_twice = {(segment, n + 1) for segment, n, _ in twice}
    for place, segment, n, run_id, why, is_after_gap in found:
        if why is not None and (segment, n) not in after_twice:
            done.faults.append(Fault(segment, n, run_id, place, why))
        if is_after_gap:
            done.faults.append(_missing(connection, segment, n, place))
    done.faults += [
        Fault(segment, n, None, "database", f"it stands there {count} times") for segment, n, count in twice
    ]
    for kind, table in (("signed head", "good_heads"), ("position of the fold", "ends")):
        other = connection.execute(
            f"SELECT DISTINCT h.segment, h.n FROM {table} h JOIN links l ON l.segment = h.segment AND l.n = h.n "
            f"WHERE h.hash <> l.hash ORDER BY ALL LIMIT {MOST}"
        ).fetchall()
        for segment, n in other:
            what = f"the {kind} has another hash: this event or one before it was replaced, hashes and all"
            done.faults.append(Fault(segment, n, _run_of(connection, segment, n), "database", what))
    tally = connection.execute("SELECT segment, max(n) FROM links GROUP BY 1").fetchall()
    done.last.update(tally)
    if odd := [segment for segment, _ in tally if not _SEGMENT.fullmatch(segment)]:
        query = f"SELECT segment, min(n), place FROM kept WHERE segment IN (SELECT unnest(?)) GROUP BY ALL ORDER BY ALL LIMIT {MOST}"
        for segment, n, place in connection.execute(query, [odd]).fetchall():
            done.faults.append(Fault(segment, n, None, place, "no segment has such a name"))
    done.events += int(one(connection.execute(f"SELECT count(*) FROM kept WHERE {within}")))


def _missing(connection: duckdb.DuckDBPyConnection, segment: str, n: int, place: str) -> Fault:
    before = one(connection.execute("SELECT max(n) FROM links WHERE segment = ? AND n < ?", [segment, n]))
    return missing(segment, 0 if before is None else before + 1, n - 1, place)


def missing(segment: str, first: int, last: int, place: str, why: str = "") -> Fault:
    """Events that were there are not."""
    what = "this event is missing" if first == last else f"the events {first} to {last} are missing"
    return Fault(segment, first, None, place, f"{what}{why}")


def _run_of(connection: duckdb.DuckDBPyConnection, segment: str, n: int) -> Any:
    found = connection.execute("SELECT run_id FROM kept WHERE segment = ? AND n = ? LIMIT 1", [segment, n]).fetchall()
    return found[0][0] if found else None
