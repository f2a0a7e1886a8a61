"""What becomes of past days: moved into Parquet files, or removed for good; the hash chain can be verified either way.

Each step can be cut off by a kill: a Parquet file counts once `log.archives` names it, in the transaction that takes its events out
of the database. What a killed process left behind is removed by the next one: files that the database says may go, and no others.
A lake is Parquet files anyway, many small ones; there `compact` makes them few.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

from agentkit.errors import UsageError
from agentkit_tracking.runlog import lake_upkeep, reading, upkeep
from agentkit_tracking.runlog.blanking import blank_stretches
from agentkit_tracking.runlog.database import LogBusy, insert, one, transaction
from agentkit_tracking.runlog.lake import Lake

if TYPE_CHECKING:
    import duckdb

    from agentkit_tracking.runlog.log import RunLog

_PATIENCE_S = 60.0  # for readers to leave


@dataclass(frozen=True)
class Kept:
    """What retention did: days and events that were moved or removed, and bytes by which the database (file) shrank."""

    days: int = 0
    events: int = 0
    freed_bytes: int = 0
    archive_bytes: int = 0
    files: int | None = None  # Parquet files of a lake, as it is now


def compact(log: RunLog, older_than_days: int, *, progress: upkeep.Progress = upkeep.quiet) -> Kept:
    """Move whole past days (UTC, by when they were logged) from the database into `archive/day=…/….parquet`.

    Queries, `verify` and erasures see archived events as before. In a lake no day is moved: many small files become few large
    ones, whatever their days, and old snapshots, which nobody reads, expire.

    Args:
        older_than_days: days that stay in the database, beside today.

    Raises:
        LogBusy: folds or readers hold the log all the time.
        UsageError: the number of days is negative.
    """
    first = _first_kept(older_than_days)
    log.fold()
    if isinstance(log.database, Lake):
        return _compact_lake(log.database, progress)
    events = archive_bytes = 0
    with upkeep.alone(log):
        upkeep.remove_orphans(log)
        days = _days(log, first)
        for done, (day, expected) in enumerate(days):
            progress(done, len(days))
            rows = f"SELECT * FROM log.events WHERE {_on(day)}"
            file = upkeep.new_archive(log, day)
            with log.database.reading() as connection:
                assert connection is not None
                count, digest = upkeep.write_archive(connection, rows, log.folder, file)
            _take_over(log, day, file, count, digest)
            assert count == expected  # nobody else is at it
            events += count
            archive_bytes += (log.folder / file).stat().st_size
        progress(len(days), len(days))
        freed = upkeep.give_back(log, events) if days else 0
    return Kept(len(days), events, freed, archive_bytes)


def _compact_lake(lake: Lake, progress: upkeep.Progress) -> Kept:
    progress(0, 2)
    with lake_upkeep.in_turn(lake):
        lake_upkeep.drop_positions(lake)
        progress(1, 2)
        before, after = lake_upkeep.settle(lake, merge=True)
    progress(2, 2)
    return Kept(freed_bytes=before.bytes - after.bytes, files=after.files)


def prune(log: RunLog, older_than_days: int, *, progress: upkeep.Progress = upkeep.quiet) -> Kept:
    """Remove whole past days for good, from the database and the archive.

    A signed row says which events are gone and from which hash the chain goes on.

    Raises:
        LogBusy: folds or readers hold the log all the time.
        LogUnreadable: an archive that is to go is damaged; nothing is removed.
        UsageError: the number of days is negative, or there is no key to sign with.
    """
    import duckdb

    from agentkit_tracking import keys

    first = _first_kept(older_than_days)
    log.fold()
    with lake_upkeep.in_turn(log.database), upkeep.alone(log):
        upkeep.remove_orphans(log)
        with log.database.reading() as connection:
            if connection is None:
                return Kept()
            files = [file for day, file, _, _ in upkeep.archived(connection) if day < first]
        progress(0, len(files) + 1)
        key = keys.signing_key()
        days = events = 0

        def remove(connection: duckdb.DuckDBPyConnection) -> None:
            nonlocal days, events
            with transaction(connection):
                days, events = _remove(connection, log, files, first, key)

        try:
            with log.database.writing(_PATIENCE_S) as connection:
                log.database.retrying(lambda: remove(connection))
        except (duckdb.Error, UnicodeDecodeError) as e:
            reading.check_archives(log, e)
            raise
        _blank_in_files(log)
        size = 0
        for done, file in enumerate(files, 1):
            size += (log.folder / file).stat().st_size if (log.folder / file).exists() else 0
            (log.folder / file).unlink(missing_ok=True)
            progress(done, len(files) + 1)
        upkeep.remove_orphans(log)
        if isinstance(log.database, Lake):  # in any case: a prune before may have been killed before it came here
            before, after = lake_upkeep.settle(log.database)
            kept = Kept(days, events, before.bytes - after.bytes, files=after.files)
        else:
            kept = Kept(days, events, size + (upkeep.give_back(log, events) if events else 0))
        progress(len(files) + 1, len(files) + 1)
    return kept


def _remove(
    connection: duckdb.DuckDBPyConnection, log: RunLog, files: list[str], first: date, key: object
) -> tuple[int, int]:
    """Days and events that go, with what is signed of them."""
    gone = _gone(connection, log, files, first)
    days = int(one(connection.execute("SELECT count(DISTINCT logged_at::DATE) FROM gone")))
    events = int(one(connection.execute("SELECT count(*) FROM gone")))
    _sign(connection, gone, key)
    if files:
        connection.execute("DELETE FROM log.archives WHERE file IN (SELECT unnest(?::VARCHAR[]))", [files])
        upkeep.expendable(connection, files)
    connection.execute(f"DELETE FROM log.events WHERE {_until(first)}")
    return days, events


def _first_kept(older_than_days: int) -> date:
    if older_than_days < 0:
        raise UsageError(f"days older than {older_than_days} are in the future; give 0 or more")
    return upkeep.before(older_than_days)


def _on(day: date) -> str:
    return (
        f"logged_at >= TIMESTAMPTZ '{day} 00:00:00+00' AND logged_at < TIMESTAMPTZ '{day} 00:00:00+00' + INTERVAL 1 DAY"
    )


def _until(first: date) -> str:
    return f"logged_at < TIMESTAMPTZ '{first} 00:00:00+00'"


def _days(log: RunLog, first: date) -> list[tuple[date, int]]:
    with log.database.reading() as connection:
        if connection is None:
            return []
        return connection.execute(
            f"SELECT logged_at::DATE, count(*) FROM log.events WHERE {_until(first)} GROUP BY 1 ORDER BY 1"
        ).fetchall()


def _take_over(log: RunLog, day: date, file: str, count: int, digest: str) -> None:
    """From now on the events of this day are those in the file."""
    with log.database.writing(_PATIENCE_S) as connection, transaction(connection):
        connection.execute("INSERT INTO log.archives VALUES (?, ?, ?, ?, now())", [day, file, count, digest])
        upkeep.counts(connection, file)
        deleted = int(one(connection.execute(f"DELETE FROM log.events WHERE {_on(day)}")))
        if deleted != count:
            raise LogBusy(f"another program changed {day} in {log.database.path}; nothing was moved, try again")


Stretch = tuple[str, int, int, str]  # segment, first and last number, hash of the last


def _gone(connection: duckdb.DuckDBPyConnection, log: RunLog, files: list[str], first: date) -> list[Stretch]:
    """The stretches of chains that go, and their events as the table `gone`."""
    missing = [file for file in files if not (log.folder / file).exists()]
    if missing:
        raise UsageError(f"the archive {missing[0]} is gone; see `agentkit log verify`, and restore it from a backup")
    sources = [f"SELECT segment, n, hash, logged_at FROM log.events WHERE {_until(first)}"]
    if files:
        sources.append(f"SELECT segment, n, hash, logged_at FROM {upkeep.parquet(log.folder, files)}")
    connection.execute(f"CREATE OR REPLACE TEMP TABLE gone AS {' UNION ALL '.join(sources)}")
    return connection.execute(
        "SELECT segment, min(n), max(n), arg_max(hash, n) FROM "
        "(SELECT segment, n, hash, n - row_number() OVER (PARTITION BY segment ORDER BY n) AS island "
        "FROM (SELECT DISTINCT segment, n, hash FROM gone)) GROUP BY segment, island ORDER BY segment, min(n)"
    ).fetchall()


def _sign(connection: duckdb.DuckDBPyConnection, gone: list[Stretch], key: object) -> None:
    from agentkit_tracking.keys import SigningKey
    from agentkit_tracking.runlog.heads import signed

    assert isinstance(key, SigningKey)
    names = ("segment", "first_n", "last_n", "hash")
    rows = [signed(dict(zip(names, stretch, strict=True)), key) for stretch in gone]
    insert(connection, "log.pruned", "segment, first_n, last_n, hash, signed_at, key_id, signature", rows)


def _blank_in_files(log: RunLog) -> None:
    """Segments that are still written to keep their lines until they are closed, but not what is private in them.

    All stretches that were ever pruned are looked at: a prune before may have been killed before it came here.
    """
    with log.database.reading() as connection:
        assert connection is not None
        rows = connection.execute("SELECT segment, first_n, last_n FROM log.pruned").fetchall()
    blank_stretches(log.segments, rows)
