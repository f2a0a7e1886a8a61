"""Folding: what segments hold goes into the database, each event exactly once.

Positions and events change in one transaction, so that a kill at any moment repeats nothing and loses nothing.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from agentkit_tracking.runlog import lake_upkeep, legacy
from agentkit_tracking.runlog.database import Database, LogBusy, connected, insert, lease, transaction
from agentkit_tracking.runlog.events import COLUMNS
from agentkit_tracking.runlog.lake import Lake
from agentkit_tracking.runlog.segments import (
    EVENT,
    HASH,
    ID,
    ID_SIZE,
    PRIVATE,
    SALT,
    START,
    SUFFIX,
    Chain,
    Finding,
    Places,
    is_live,
    number,
    scan,
    segment_files,
)

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

Item = TypeVar("Item")

# Events in one transaction, which readers wait for; in memory twice. A row group of DuckDB: of others, checkpoints make new
# ones, which took a third of a fold.
BATCH = 122_880
_CHUNK = 8 << 20  # bytes read at once
# Whether a process lives can be told on its own machine only; one that is silent for so long counts as ended.
_FOREIGN_S = 7 * 86_400
_ROWS = 16_384  # of an Arrow batch: DuckDB gives each to a thread
_CLOSED = b'"type":"segment","name":"closed"'
_WHAT, _WHO = json.dumps({"id": "VARCHAR", **COLUMNS}), json.dumps({"user_hash": "VARCHAR", "session": "VARCHAR"})

# From lines of segments, as `as_table` gives them, to rows of `events`. What agentkit has not written may be no JSON: one such
# row would spoil every query.
_READ = f"""
    SELECT segment, event, private, salt, hash, TRY(json_transform(event, '{_WHAT}')) AS what,
        TRY(json_transform(private, '{_WHO}')) AS who, what IS NOT NULL AND (who IS NOT NULL OR private LIKE 'null%') AS is_json
    FROM lines
"""
ROWS = f"""
    SELECT segment, TRY_CAST(substring(what.id, {ID_SIZE + 2}) AS BIGINT) AS n, {", ".join(f"what.{name}" for name in COLUMNS)},
        who.user_hash, who.session, event, CASE WHEN private NOT LIKE 'null%' THEN private END AS private, salt, hash
    FROM ({_READ}) WHERE is_json
"""


@dataclass
class Position:
    """How far a segment is folded."""

    segment: str
    next_byte: int = 0
    n: int = -1
    hash: str = START
    state: str = "open"  # then `closed` by its process, or `ended` without that
    host: str | None = None
    pid: int | None = None
    torn_bytes: int = 0


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
            if scratch.is_file() and time.time() - _changed(scratch) > 60 and not is_live(scratch):
                scratch.unlink(missing_ok=True)
        return _fold(folder, database)


def _fold(folder: Path, database: Database) -> Folded:
    done = Folded()
    try:
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
                    database.retrying(partial(_store_whole, connection, batch, appends_only=database.is_shared))
                done.events += sum(len(part.places[0]) for part in batch.parts)
                done.segments += len(batch.parts)
                done.findings += [(part.after.segment, found) for part in batch.parts for found in part.findings]
                for part in batch.parts:
                    if part.after.state != "open":
                        with suppress(OSError):
                            (folder / f"{part.after.segment}{SUFFIX}").unlink()
    except LogBusy as e:
        done.busy = str(e)
    return done


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same, the next one being made while the one before is used."""
    with ThreadPoolExecutor(1) as maker:
        upcoming = maker.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = maker.submit(next, items, None)
            yield item


def positions(connection: duckdb.DuckDBPyConnection) -> dict[str, Position]:
    """How far every segment is folded."""
    rows = connection.execute(
        "SELECT segment, next_byte, n, hash, state, host, pid, torn_bytes FROM log.segments"
    ).fetchall()
    return {row[0]: Position(*row) for row in rows}


@dataclass
class Part:
    """A stretch of one segment, where its good lines begin and end, and where that leads."""

    after: Position
    content: bytes
    places: Places
    findings: list[Finding]


@dataclass
class Batch:
    """What one transaction stores: rows of `events`, and lines that are no JSON (segment, beginning of the event)."""

    parts: list[Part]
    rows: pa.Table
    bad: list[tuple[str, str]]


def _parsed(batches: Iterator[tuple[list[Part], pa.Table]]) -> Iterator[Batch]:
    with connected() as connection:
        connection.execute("SET threads = 1; SET arrow_large_buffer_size = true")
        for parts, lines in batches:
            connection.register("lines", lines)
            rows, bad = connection.sql(ROWS).to_arrow_table(_ROWS), []
            if rows.num_rows < lines.num_rows:
                query = f"SELECT segment, left(event, 60) FROM ({_READ}) WHERE NOT is_json"
                bad = connection.execute(query).fetchall()
            connection.unregister("lines")
            yield Batch(parts, rows, bad)


def _batches(folder: Path, known: dict[str, Position]) -> Iterator[tuple[list[Part], pa.Table]]:
    batch: list[Part] = []
    size = 0

    def room() -> int:
        return BATCH - size

    for path in segment_files(folder):
        with suppress(SegmentGone):
            for part in parts(path, known.get(path.stem) or Position(path.stem), room=room):
                batch.append(part)
                size += len(part.places[0])
                if room() <= 0:
                    yield batch, as_table(batch)
                    batch, size = [], 0
    if batch:
        yield batch, as_table(batch)


class SegmentGone(Exception):
    """A segment was folded and removed by another process just now."""


def parts(
    path: Path, position: Position, *, check: bool = True, room: Callable[[], int] = lambda: sys.maxsize
) -> Iterator[Part]:
    """What a segment holds beyond a position, in stretches.

    Args:
        check: whether hashes are to follow from each other.
        room: how many events the next stretch may have.

    Raises:
        SegmentGone: it is not there any more.
    """
    if position.state != "open":
        # It was folded whole; the process that did has died before it could remove the file.
        yield Part(position, b"", ([], [], []), [])
        return
    live = is_live(path)  # before reading: what is read of one that is not is all there will ever be
    age_s = time.time() - _changed(path)
    chain = Chain(position.n, position.hash.encode())
    try:
        opened = path.open("rb")
    except FileNotFoundError as e:
        raise SegmentGone(path) from e
    with opened:
        start, size = position.next_byte, _CHUNK
        while True:
            opened.seek(start)  # again what was unfinished, or too much for the batch
            content = opened.read(size)
            is_all = len(content) < size
            if b"\n" not in content and not is_all:
                size *= 2  # for one long line
                continue
            is_first, size = start == 0, _CHUNK
            places, findings, end = scan(content, start, chain, check=check, segment=path.stem, most=room())
            if not _is_text(memoryview(content)[:end]):
                places = _only_text(content, start, places, findings)
            starts, _, ends = places
            start += end
            rest = len(content) - end
            at_end = is_all and b"\n" not in content[end:]
            state, torn = "open", 0
            if starts and not rest and _CLOSED in content[starts[-1] : starts[-1] + 400]:
                state = "closed"
            host, pid = _opened(content[starts[0] : ends[0]]) if is_first and starts else (position.host, position.pid)
            if state == "open" and at_end and not live and (host == socket.gethostname() or age_s > _FOREIGN_S):
                state, torn = "ended", rest
            position = Position(position.segment, start, chain.n, chain.digest.decode(), state, host, pid, torn)
            if starts or findings or state != "open":
                yield Part(position, content, places, findings)
            if at_end:
                return


def _is_text(content: bytes | memoryview) -> bool:
    try:
        str(content, "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _only_text(content: bytes, offset: int, places: Places, findings: list[Finding]) -> Places:
    """Without lines whose checksum fits and which are no UTF-8 all the same: agentkit has not written them."""
    good = []
    for start, split, end in zip(*places, strict=True):
        if _is_text(content[start:end]):
            good.append((start, split, end))
        else:
            findings.append(Finding(offset + start, None, "damaged", "it is no UTF-8"))
    return [p[0] for p in good], [p[1] for p in good], [p[2] for p in good]


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def _opened(line: bytes) -> tuple[str | None, int | None]:
    try:
        first = json.loads(line)["event"]
        return str(first["host"]), int(first["pid"])
    except (ValueError, KeyError, TypeError):
        return None, None


def as_table(parts: list[Part]) -> pa.Table:
    """The lines as Arrow: segment, event, private, salt, hash. Texts are views of the bytes that were read, not copies."""
    import numpy as np
    import pyarrow as pa

    schema = pa.schema([(name, pa.string_view()) for name in ("segment", "event", "private", "salt", "hash")])
    batches = []
    for part in parts:
        if not part.places[0]:
            continue
        begin, split, end = (np.asarray(places, np.int64) for places in part.places)
        texts = [
            (begin + ID, begin + ID + ID_SIZE),
            (begin + EVENT, split),
            (split + len(PRIVATE), end - 1),
            (begin + SALT.start, begin + SALT.stop),
            (begin + HASH.start, begin + HASH.stop),
        ]
        batches.append(pa.record_batch([_views(part.content, *place) for place in texts], schema))
    whole = pa.Table.from_batches(
        batches, schema
    ).combine_chunks()  # DuckDB takes a millisecond for each, however small
    return pa.Table.from_batches(whole.to_batches(max_chunksize=_ROWS), schema)


def _views(buffer: bytes, starts: Any, ends: Any) -> Any:
    """Strings in a buffer, as Arrow's view layout: length, then up to 12 bytes, or 4 of them, buffer and place."""
    import numpy as np
    import pyarrow as pa

    data, sizes = np.frombuffer(buffer, np.uint8), ends - starts
    views = np.empty((len(starts), 4), "<i4")
    views[:, 0], views[:, 2], views[:, 3] = sizes, 0, starts
    views[:, 1] = np.lib.stride_tricks.sliding_window_view(data, 4)[starts].view("<i4")[:, 0]
    short = sizes <= 12
    if short.any():
        places = np.arange(12)
        texts = data[np.minimum(starts[short, None] + places, len(data) - 1)]
        views[short, 1:] = np.where(places < sizes[short, None], texts, 0).astype(np.uint8).view("<i4")
    return pa.Array.from_buffers(
        pa.string_view(), len(starts), [None, pa.py_buffer(views.tobytes()), pa.py_buffer(buffer)]
    )


def _store_whole(connection: duckdb.DuckDBPyConnection, batch: Batch, *, appends_only: bool) -> None:
    with transaction(connection):
        _store(connection, batch, appends_only)


def _store(connection: duckdb.DuckDBPyConnection, batch: Batch, appends_only: bool = False) -> None:
    """`appends_only`: with other machines, whose transactions conflict with a deletion but not with an insertion."""
    connection.register("rows", batch.rows)
    columns = "segment, n, " + ", ".join(COLUMNS) + ", user_hash, session, event, private, salt, hash"
    connection.execute(f"INSERT INTO log.events ({columns}) FROM rows").fetchall()
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
    found += [[segment, None, _number_in(text), "damaged", "it is no JSON", now] for segment, text in batch.bad]
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
