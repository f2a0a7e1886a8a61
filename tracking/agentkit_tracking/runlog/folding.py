"""Folding: what segments hold goes into the database, each event exactly once.

Positions and events change in one transaction, so that a kill at any moment repeats nothing and loses nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from agentkit_tracking.runlog import lake_upkeep, legacy
from agentkit_tracking.runlog.database import Database, LogBusy, connected, insert, lease, transaction
from agentkit_tracking.runlog.events import COLUMNS
from agentkit_tracking.runlog.lake import Lake
from agentkit_tracking.runlog.segments import SUFFIX, Finding, is_live, number, segment_files
from agentkit_tracking.runlog.unfolded import (
    ARROW_ROWS,
    ROWS,
    Part,
    Position,
    SegmentGone,
    as_table,
    changed,
    parts,
    positions,
)

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

Item = TypeVar("Item")

# Events in one transaction, which readers wait for. A row group of DuckDB: of others, checkpoints make new ones, which took a
# third of a fold.
BATCH = 122_880
_BATCH_BYTES = 128 << 20  # in memory four times over, as lines and as rows


@dataclass
class Folded:
    """What one fold did; `busy` says why it stopped early."""

    events: int = 0
    segments: int = 0
    findings: list[tuple[str, Finding]] = field(default_factory=list)
    busy: str | None = None


def fold(folder: Path, database: Database) -> Folded | None:
    """Fold what the segments in `folder` hold; None if another process is at it.

    Raises:
        UsageError: the database is newer than this program, or cannot be opened.
    """
    with lease(database.folder) as mine:
        if not mine:
            return None
        legacy.bring_over(database.folder)
        for scratch in folder.glob(".*"):  # of processes killed while they began a segment
            if scratch.is_file() and time.time() - changed(scratch) > 60 and not is_live(scratch):
                scratch.unlink(missing_ok=True)
        return _fold(folder, database)


def _fold(folder: Path, database: Database) -> Folded:
    done = Folded()
    try:
        while not _fold_on(folder, database, done):
            pass
    except LogBusy as e:
        done.busy = str(e)
    return done


def _fold_on(folder: Path, database: Database, done: Folded) -> bool:
    """Fold the rest; false if that must be begun anew, since another machine erased what may have been read already."""
    with database.reading() as connection:
        known = {} if connection is None else positions(connection)
        if connection is not None and isinstance(database, Lake):
            lake_upkeep.catch_up(database, folder, connection)
    if connection is None and segment_files(folder):
        with database.writing():
            pass  # makes it; beside a thread that reads, it would take long
    with connected(spare=2) as through:  # cores, for reading and parsing
        for batch in _ahead(_parsed(_ahead(_batches(folder, known)))):
            with database.writing(through=through) as connection:
                if isinstance(database, Lake) and not lake_upkeep.up_to_date(database, connection):
                    return False
                database.retrying(partial(_store_whole, connection, batch, appends_only=database.is_shared))
            done.events += sum(len(part.places[0]) for part in batch.parts)
            done.segments += len(batch.parts)
            done.findings += [(part.after.segment, found) for part in batch.parts for found in part.findings]
            for part in batch.parts:
                if part.after.state != "open":
                    with suppress(OSError):
                        (folder / f"{part.after.segment}{SUFFIX}").unlink()
    return True


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same, the next one being made while the one before is used."""
    with ThreadPoolExecutor(1) as maker:
        upcoming = maker.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = maker.submit(next, items, None)
            yield item


@dataclass
class Batch:
    """What one transaction stores; of the rows only those that are JSON."""

    parts: list[Part]
    rows: pa.Table


def _parsed(batches: Iterator[tuple[list[Part], pa.Table]]) -> Iterator[Batch]:
    with connected() as connection:
        connection.execute("SET threads = 1; SET arrow_large_buffer_size = true")
        for parts, lines in batches:
            connection.register("lines", lines)
            rows = connection.sql(ROWS).to_arrow_table(ARROW_ROWS)
            connection.unregister("lines")
            for part in parts:
                part.content = b""  # rows are copies; what was read need not wait until they are stored
            del lines
            yield Batch(parts, rows)


def _batches(folder: Path, known: dict[str, Position]) -> Iterator[tuple[list[Part], pa.Table]]:
    batch: list[Part] = []
    size = weight = 0

    def room() -> int:
        return BATCH - size

    for path in segment_files(folder):
        with suppress(SegmentGone):
            for part in parts(path, known.get(path.stem) or Position(path.stem), room=room):
                batch.append(part)
                size, weight = size + len(part.places[0]), weight + len(part.content)
                if room() <= 0 or weight >= _BATCH_BYTES:
                    yield batch, as_table(batch)
                    batch, size, weight = [], 0, 0
    if batch:
        yield batch, as_table(batch)


def _store_whole(connection: duckdb.DuckDBPyConnection, batch: Batch, *, appends_only: bool) -> None:
    with transaction(connection):
        _store(connection, batch, appends_only)


def _store(connection: duckdb.DuckDBPyConnection, batch: Batch, appends_only: bool = False) -> None:
    """`appends_only`: with other machines, whose transactions conflict with a deletion but not with an insertion."""
    connection.register("rows", batch.rows)
    columns = "segment, n, " + ", ".join(COLUMNS) + ", user_hash, session, event, private, salt, hash"
    connection.execute(f"INSERT INTO log.events ({columns}) SELECT {columns} FROM rows WHERE is_json").fetchall()
    bad = connection.execute("SELECT segment, left(event, 60) FROM rows WHERE NOT is_json").fetchall()
    connection.unregister("rows")
    latest = {part.after.segment: part.after for part in batch.parts}
    now = datetime.now(UTC)
    if not appends_only:
        connection.execute("DELETE FROM log.positions WHERE segment IN (SELECT unnest(?))", [list(latest)])
    insert(
        connection,
        "log.positions",
        "segment, state, host, pid, next_byte, n, hash, torn_bytes, folded_at",
        [[p.segment, p.state, p.host, p.pid, p.next_byte, p.n, p.hash, p.torn_bytes, now] for p in latest.values()],
    )
    found = [[part.after.segment, f.offset, f.n, f.fault, f.why, now] for part in batch.parts for f in part.findings]
    found += [[segment, None, _number_in(text), "damaged", "it is no JSON", now] for segment, text in bad]
    insert(connection, "log.findings", "segment, byte, n, fault, why, found_at", found)
    _sign(connection, [(p.segment, p.n, p.hash) for p in latest.values() if p.n >= 0])


def _number_in(event: str) -> int | None:
    try:
        return number(event.encode())
    except ValueError:
        return None


def _sign(connection: duckdb.DuckDBPyConnection, ends: list[tuple[str, int, str]]) -> None:
    from agentkit_tracking.runlog import heads  # keys take a while to import

    heads.sign(connection, ends)
