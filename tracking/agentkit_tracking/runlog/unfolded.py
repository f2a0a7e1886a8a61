"""What segments hold that is not folded yet: where it begins, and its lines as Arrow tables and as rows."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentkit_tracking.runlog.events import COLUMNS
from agentkit_tracking.runlog.segments import (
    EVENT,
    HASH,
    ID,
    ID_SIZE,
    PRIVATE,
    SALT,
    START,
    Chain,
    Finding,
    Places,
    is_live,
    scan,
)

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

_CHUNK = 8 << 20  # bytes read at once
# Whether a process lives can be told on its own machine only; one that is silent for so long counts as ended.
_FOREIGN_S = 7 * 86_400
ARROW_ROWS = 16_384  # of an Arrow batch: DuckDB gives each to a thread
_CLOSED = b'"type":"segment","name":"closed"'
_WHAT, _WHO = json.dumps({"id": "VARCHAR", **COLUMNS}), json.dumps({"user_hash": "VARCHAR", "session": "VARCHAR"})

# From lines of segments, as `as_table` gives them, to rows of `events`. What agentkit has not written may be no JSON: one such
# row would spoil every query. Whoever uses them leaves those out: a filter in here would be pushed down and parse all twice.
ROWS = f"""
    SELECT segment, TRY_CAST(substring(what.id, {ID_SIZE + 2}) AS BIGINT) AS n, {", ".join(f"what.{name}" for name in COLUMNS)},
        who.user_hash, who.session, event, CASE WHEN NOT is_erased THEN private END AS private, salt, hash,
        what IS NOT NULL AND (who IS NOT NULL OR is_erased) AS is_json
    FROM (
        SELECT *, TRY(json_transform(event, '{_WHAT}')) AS what, TRY(json_transform(private, '{_WHO}')) AS who,
            private LIKE 'null%' AND rtrim(private) = 'null' AS is_erased
        FROM lines
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
    age_s = time.time() - changed(path)
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
            is_own = host in (None, socket.gethostname())  # who began it cannot be read where the first line is damaged
            if state == "open" and at_end and not live and (is_own or age_s > _FOREIGN_S):
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


def changed(path: Path) -> float:
    """When a file was last written to; now, where it is gone."""
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
    return pa.Table.from_batches(whole.to_batches(max_chunksize=ARROW_ROWS), schema)


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
