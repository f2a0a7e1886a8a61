"""Upkeep of a lake, which machines share: nothing of what was deleted stays, small files become large ones.

What was deleted or overwritten is still in old Parquet files, in old snapshots and in statistics of the catalogue. Files are
written anew while others read and fold; then, alone for a moment, old snapshots expire and their files go. Each step may be cut
off by a kill: the next upkeep takes all of them again. What lies on the disks of other machines they take out with their
next fold.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from agentkit_tracking.runlog.blanking import HAVE, Named, blank, blank_stretches, doom, named, of_runs
from agentkit_tracking.runlog.database import one, quoted, transaction
from agentkit_tracking.runlog.lake import CATALOGUE, Lake, keep_texts_out
from agentkit_tracking.runlog.recall import recall
from agentkit_tracking.runlog.segments import SUFFIX, segment_files

if TYPE_CHECKING:
    import duckdb

_PATIENCE_S = 120.0  # for readers and folds to end, or upkeep of another machine
_DONE = "caught-up"  # how many erasures and prunings this machine has applied to its segments
# Read by every fold of every machine, so it is kept short: of all events only the erasures.
_ERASURES = "CREATE TABLE IF NOT EXISTS log.erasures (event VARCHAR)"
_HAS_ERASURES = "SELECT count(*) FROM duckdb_tables() WHERE database_name = 'log' AND table_name = 'erasures'"
_WRITE_ANEW = (
    "FROM ducklake_flush_inlined_data('log')",  # what is few rows lies in PostgreSQL
    "FROM ducklake_rewrite_data_files('log', delete_threshold => 0.0)",
)
_MERGE = "FROM ducklake_merge_adjacent_files('log')"
_EXPIRE = (
    "FROM ducklake_expire_snapshots('log', older_than => TIMESTAMPTZ '9999-01-01')"  # whatever clocks say; one stays
)
_REMOVE = "FROM ducklake_cleanup_old_files('log', cleanup_all => true)"
_UNKNOWN = "SELECT path FROM ducklake_delete_orphaned_files('log', cleanup_all => true, dry_run => true)"
# Statistics of whole tables keep the smallest and the largest text there ever was. Without bounds DuckLake would take those of
# the next insertion for all, so these are wide enough for any text.
_WIDEN = """
    UPDATE ducklake_table_column_stats s SET min_value = '', max_value = chr(1114111)
    FROM ducklake_column c JOIN ducklake_table t USING (table_id)
    WHERE c.table_id = s.table_id AND c.column_id = s.column_id AND s.min_value IS NOT NULL
        AND t.table_name = 'events' AND c.column_name IN ('user_hash', 'session', 'private')
"""
# Where texts were; PostgreSQL keeps what was deleted until then.
_TEXTS = """
    SELECT table_name FROM {catalogue}.ducklake_inlined_data_tables
    UNION ALL VALUES ('ducklake_table_column_stats'), ('ducklake_file_column_stats')
"""
_OUTDATED = """
    DELETE FROM log.positions p WHERE EXISTS (
        SELECT 1 FROM log.segments s WHERE s.segment = p.segment
        AND (s.next_byte > p.next_byte OR s.next_byte = p.next_byte AND s.state <> 'open' AND p.state = 'open')
    )
"""
_NO_FILE = 2**62  # numbers from here on are those of no file of a table
_PLAIN = re.compile(r"[A-Za-z0-9_]+")


@dataclass(frozen=True)
class Size:
    """Parquet files, and their bytes."""

    files: int = 0
    bytes: int = 0


@contextmanager
def in_turn(database: object) -> Iterator[None]:
    """Meanwhile no other machine is at the upkeep of this lake; nothing to wait for where it is none.

    Raises:
        LogBusy: another one was at it all the time.
    """
    if not isinstance(database, Lake):
        yield
        return
    with database.turn(_PATIENCE_S):
        yield


def share_erasures(lake: Lake) -> None:
    """Let folds of other machines know of all erasures that were folded here.

    While nobody folds: what was read before is stored by now, and taken out of the lake with the rest; what is stored later, by
    a fold that looks whether it is `up_to_date`.
    """

    def share(connection: duckdb.DuckDBPyConnection) -> None:
        connection.execute(_ERASURES)
        connection.execute(
            "INSERT INTO log.erasures SELECT DISTINCT event FROM log.events "
            "WHERE type = 'erasure' AND event NOT IN (SELECT event FROM log.erasures)"
        )

    with lake.alone(_PATIENCE_S) as connection:
        lake.retrying(lambda: share(connection))


def up_to_date(lake: Lake, connection: duckdb.DuckDBPyConnection) -> bool:
    """Whether this machine has taken out of its segments whatever was erased or pruned."""
    return _caught_up(lake) == _state(connection)


def _caught_up(lake: Lake) -> str:
    note = lake.folder / _DONE
    return note.read_text() if note.is_file() else "0 0"


def _state(connection: duckdb.DuckDBPyConnection) -> str:
    """Rows are only added to both."""
    return f"{len(_erasures(connection))} {one(connection.execute('SELECT count(*) FROM log.pruned'))}"


def catch_up(lake: Lake, segments: Path, connection: duckdb.DuckDBPyConnection) -> None:
    """Take out of this machine's segments what was erased or pruned, on any machine; for who has the lease of folds.

    Runs that are under way go as far as they have come, as everywhere.
    """
    state = _state(connection)
    if _caught_up(lake) == state:
        return
    erasures = _erasures(connection)
    pruned = connection.execute("SELECT segment, first_n, last_n FROM log.pruned").fetchall()
    if erasures:
        chosen = of_runs(_all(erasures))
        for path in segment_files(segments):
            blank(path, chosen)
    blank_stretches(segments, pruned)
    recall(lake.folder)
    (lake.folder / _DONE).write_text(state)


def _erasures(connection: duckdb.DuckDBPyConnection) -> list[str]:
    if not one(connection.execute(_HAS_ERASURES)):
        return []
    return [event for (event,) in connection.execute("SELECT event FROM log.erasures").fetchall()]


def _all(erasures: list[str]) -> Named:
    told = [erasure for event in erasures if (erasure := named(event)) is not None]
    runs = {run for erasure in told for run in erasure.runs}
    return Named(tuple(runs), tuple({run for erasure in told for run in erasure.callers} - runs))


def drop_positions(lake: Lake) -> None:
    """Remove positions of folds that others followed; folds only add to them."""
    with lake.writing(_PATIENCE_S) as connection:
        lake.retrying(lambda: _to_the_end(connection, _OUTDATED))


def settle(lake: Lake, *, merge: bool = False, pseudonym: str | None = None) -> tuple[Size, Size]:
    """Leave nothing behind of what was deleted or overwritten; for whose turn it is.

    Args:
        merge: make large files of small ones, too.
        pseudonym: files that killed folds left, and that no table knows, go if they have something of this user, or of runs
            that erasures name.

    Returns:
        The lake before and after.

    Raises:
        LogBusy: somebody was reading or folding all the time; the old files are still there.
    """
    with lake.writing(_PATIENCE_S) as connection:
        before = _size(connection)
        for step in (*_WRITE_ANEW, _MERGE) if merge else _WRITE_ANEW:
            lake.retrying(lambda step=step: _do(connection, step))  # type: ignore[misc]
    with lake.alone(_PATIENCE_S) as connection:
        if pseudonym is not None:
            _discard(connection, _left_by_killed(connection, pseudonym))
        keep_texts_out(connection)  # of a lake that an earlier version made
        _do(connection, _EXPIRE)
        _do(connection, _REMOVE)
        _do(connection, f"FROM postgres_execute('{CATALOGUE}', {quoted(_WIDEN)})")
        for (table,) in connection.execute(_TEXTS.format(catalogue=CATALOGUE)).fetchall():
            assert _PLAIN.fullmatch(table)
            vacuum = quoted(f"VACUUM (FULL) {table}")
            _do(connection, f"FROM postgres_execute('{CATALOGUE}', {vacuum}, use_transaction => false)")
        return before, _size(connection)


def _do(connection: duckdb.DuckDBPyConnection, step: str) -> None:
    _to_the_end(connection, f"SELECT count(*) FROM ({step})")


def _to_the_end(connection: duckdb.DuckDBPyConnection, statement: str) -> None:
    connection.execute(statement).fetchall()


def _size(connection: duckdb.DuckDBPyConnection) -> Size:
    tables = (f"FROM {CATALOGUE}.{kind}" for kind in ("ducklake_data_file", "ducklake_delete_file"))
    union = " UNION ALL ".join(f"SELECT file_size_bytes {table}" for table in tables)
    files, size = connection.execute(f"SELECT count(*), coalesce(sum(file_size_bytes), 0) FROM ({union})").fetchall()[0]
    return Size(int(files), int(size))


def _left_by_killed(connection: duckdb.DuckDBPyConnection, pseudonym: str) -> list[str]:
    """Files of transactions that came to no end, as far as they must go: nobody else is at it, so none is under way."""
    import duckdb

    doom(connection, _all(_erasures(connection)))
    found = []
    for (path,) in connection.execute(_UNKNOWN).fetchall():
        source = f"read_parquet({quoted(path)}, hive_partitioning = false)"
        try:
            query = f"SELECT count(*) FROM {source} WHERE user_hash = ? OR {HAVE}"
            is_unwanted = bool(one(connection.execute(query, [pseudonym])))
        except duckdb.BinderException:
            is_unwanted = False  # of another table, which has nothing of people's
        except duckdb.InvalidInputException:
            is_unwanted = True  # half a file, which nobody can read
        if is_unwanted:
            found.append(path)
    return found


def _discard(connection: duckdb.DuckDBPyConnection, files: list[str]) -> None:
    """Put files on DuckLake's list of those to be removed: it can remove them wherever they are."""
    rows = [[_NO_FILE + n, path] for n, path in enumerate(files)]
    if rows:
        with transaction(connection):
            connection.executemany(
                f"INSERT INTO {CATALOGUE}.ducklake_files_scheduled_for_deletion VALUES (?, ?, false, now())", rows
            )


def others(lake: Lake, segments: Path) -> tuple[str, ...]:
    """Machines whose disks hold segments, as far as the lake knows them, each with when it folded last (UTC)."""
    mine = [path.name.removesuffix(SUFFIX) for path in segment_files(segments)]
    with lake.reading() as connection:
        assert connection is not None
        rows = connection.execute(
            "SELECT host, epoch(max(folded_at)) FROM log.segments WHERE host <> ? OR state = 'open' AND "
            "segment NOT IN (SELECT unnest(?::VARCHAR[])) GROUP BY host ORDER BY host",
            [socket.gethostname(), mine],
        ).fetchall()
    return tuple(f"{host} ({datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M})" for host, at in rows)
