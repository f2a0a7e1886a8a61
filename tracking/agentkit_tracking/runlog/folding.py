"""Folding: what segments hold goes into the database, each event exactly once.

Positions and events change in one transaction, so that a kill at any moment repeats nothing and loses nothing.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from agentkit_tracking.runlog import legacy
from agentkit_tracking.runlog.database import Database, LogBusy, lease, quoted, transaction
from agentkit_tracking.runlog.events import COLUMNS
from agentkit_tracking.runlog.segments import EVENT, HASH, PRIVATE, SALT, START, SUFFIX, Chain, Finding, is_live, scan

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

BATCH = (
    122_880  # events in one transaction, a row group of DuckDB: how long readers wait, and how much is in memory, twice
)
_CHUNK = 32 << 20  # bytes read at once
_FOREIGN_S = (
    7 * 86_400
)  # whether a process lives can be told on its own machine only; one silent for so long counts as ended
_ROWS = 16_384  # of an Arrow batch: DuckDB gives each to a thread
_CLOSED = b'"type":"segment","name":"closed"'
_TYPES = json.dumps(COLUMNS)


def _part(place: slice) -> str:
    return f"substr(line, {place.start + 1}, {place.stop - place.start})"


# From lines of segments, ends included, to rows of `events`.
ROWS = f"""
    SELECT segment, split_part(left(event, 64), '"', 4).split_part('-', 2)::BIGINT AS n,
        unnest(json_transform(event, '{_TYPES}')),
        CASE WHEN contains(private, '"user_hash"') THEN private->>'user_hash' END AS user_hash,
        CASE WHEN contains(private, '"session"') THEN private->>'session' END AS session,
        event, CASE WHEN rtrim(private) <> 'null' THEN private END AS private, salt, hash
    FROM (
        SELECT segment, {_part(HASH)} AS hash, {_part(SALT)} AS salt,
            substr(line, {EVENT + 1}, split - {EVENT + 1}) AS event,
            substr(line, split + {len(PRIVATE)}, length(line) - split - {len(PRIVATE) + 1}) AS private
        FROM (SELECT segment, line, instr(line, {quoted(PRIVATE.decode())}) AS split FROM lines)
    )
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
        for batch in _ahead(_batches(folder, known)):
            with database.writing() as connection:
                database.retrying(partial(_store_whole, connection, batch, appends_only=database.is_shared))
            done.events += sum(len(part.starts) for part in batch)
            done.segments += len(batch)
            done.findings += [(part.after.segment, found) for part in batch for found in part.findings]
            for part in batch:
                if part.after.state != "open":
                    with suppress(OSError):
                        (folder / f"{part.after.segment}{SUFFIX}").unlink()
    except LogBusy as e:
        done.busy = str(e)
    return done


def _ahead(batches: Iterator[list[Part]]) -> Iterator[list[Part]]:
    """The same, the next one being read while the one before is stored."""
    with ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(next, batches, None)
        while (batch := upcoming.result()) is not None:
            upcoming = reader.submit(next, batches, None)
            yield batch


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
    starts: list[int]
    ends: list[int]
    findings: list[Finding]


def _batches(folder: Path, known: dict[str, Position]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    size = 0
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        for part in parts(path, known.get(path.stem) or Position(path.stem)):
            batch.append(part)
            size += len(part.starts)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def parts(path: Path, position: Position, *, check: bool = True, file: BinaryIO | None = None) -> Iterator[Part]:
    """What a segment (open already as `file`, perhaps) holds beyond a position, in stretches."""
    if position.state != "open":
        # It was folded whole; the process that did has died before it could remove the file.
        yield Part(position, b"", [], [], [])
        return
    live = is_live(path)  # before reading: what is read of one that is not is all there will ever be
    age_s = time.time() - _changed(path)
    chain = Chain(position.n, position.hash.encode())
    try:
        opened = file or open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return
    with opened:
        opened.seek(position.next_byte)
        rest, start = b"", position.next_byte
        while True:
            chunk = opened.read(_CHUNK)
            content = rest + chunk
            end = content.rfind(b"\n") + 1
            rest, content = content[end:], content[:end]
            is_first = start == 0
            starts, ends, findings = scan(content, start, chain, check=check)
            start += end
            at_end = len(chunk) < _CHUNK
            state, torn = "open", 0
            if starts and not rest and _CLOSED in content[starts[-1] : starts[-1] + 400]:
                state = "closed"
            host, pid = _opened(content[starts[0] : ends[0]]) if is_first and starts else (position.host, position.pid)
            if state == "open" and at_end and not live and (host == socket.gethostname() or age_s > _FOREIGN_S):
                state, torn = "ended", len(rest)
            position = Position(position.segment, start, chain.n, chain.digest.decode(), state, host, pid, torn)
            if starts or findings or state != "open":
                yield Part(position, content, starts, ends, findings)
            if at_end:
                return


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def _opened(line: bytes) -> tuple[str | None, int | None]:
    first = json.loads(line)["event"]
    return first.get("host"), first.get("pid")


def as_table(parts: list[Part]) -> pa.Table:
    """The lines as Arrow, for `ROWS`; the bytes are not copied."""
    import numpy as np
    import pyarrow as pa

    schema = pa.schema([("segment", pa.string()), ("line", pa.large_string())])
    batches = []
    for part in parts:
        ends = np.asarray(part.ends, np.int64)
        starts = np.asarray(part.starts, np.int64)
        for first in range(0, len(starts), _ROWS):
            begin, end = starts[first : first + _ROWS], ends[first : first + _ROWS]
            # Lines follow each other; where damage lies between two, the first would hold it, too.
            whole = np.append(begin, end[-1] + 1)
            if (whole[1:] != end + 1).any():
                texts = pa.array([part.content[b : e + 1] for b, e in zip(begin, end, strict=True)], pa.large_binary())
                lines = texts.cast(pa.large_string())
            else:
                buffers = [None, pa.py_buffer(whole), pa.py_buffer(part.content)]
                lines = pa.Array.from_buffers(pa.large_string(), len(begin), buffers)
            segment = pa.array([part.after.segment], pa.string())
            batches.append(pa.record_batch([pa.repeat(segment[0], len(begin)), lines], schema))
    return pa.Table.from_batches(batches, schema)


def _store_whole(connection: duckdb.DuckDBPyConnection, batch: list[Part], *, appends_only: bool) -> None:
    with transaction(connection):
        _store(connection, batch, appends_only)


def _store(connection: duckdb.DuckDBPyConnection, batch: list[Part], appends_only: bool = False) -> None:
    """`appends_only`: with other machines, whose transactions conflict with a deletion but not with an insertion."""
    connection.register("lines", as_table(batch))
    columns = "segment, n, " + ", ".join(COLUMNS) + ", user_hash, session, event, private, salt, hash"
    connection.execute(f"INSERT INTO log.events ({columns}) {ROWS}")
    connection.unregister("lines")
    latest = {part.after.segment: part.after for part in batch}
    now = datetime.now(UTC)
    if not appends_only:
        connection.execute("DELETE FROM log.positions WHERE segment IN (SELECT unnest(?))", [list(latest)])
    connection.executemany(
        "INSERT INTO log.positions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [[p.segment, p.state, p.host, p.pid, p.next_byte, p.n, p.hash, p.torn_bytes, now] for p in latest.values()],
    )
    found = [[part.after.segment, f.offset, f.n, f.fault, f.why, now] for part in batch for f in part.findings]
    if found:
        connection.executemany("INSERT INTO log.findings VALUES (?, ?, ?, ?, ?, ?)", found)
    _sign(connection, [(p.segment, p.n, p.hash) for p in latest.values() if p.n >= 0])


def _sign(connection: duckdb.DuckDBPyConnection, ends: list[tuple[str, int, str]]) -> None:
    from agentkit_tracking.runlog import heads  # keys take a while to import

    heads.sign(connection, ends)
