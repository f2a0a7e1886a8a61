"""What retention and erasure share: being alone at it, days as Parquet files, and disk space given back."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from agentkit_tracking.runlog.database import LogBusy, lease, one, quoted, transaction
from agentkit_tracking.runlog.events import COLUMNS
from agentkit_tracking.runlog.unfolded import positions

if TYPE_CHECKING:
    import duckdb

    from agentkit_tracking.runlog.log import RunLog

Progress = Callable[[int, int], None]  # done, of how many
WHOLE = ", ".join(("segment", "n", *COLUMNS, "user_hash", "session", "event", "private", "salt", "hash"))
ARCHIVE = "archive"
_PATIENCE_S = 120.0  # for a fold or other upkeep to end
_SCRATCH = ".scratch-"
_OWN_SCRATCH = re.compile(rf"{re.escape(_SCRATCH)}([0-9a-f]{{20}}\.parquet|[0-9a-f]{{8}}(\.wal)?)")
_SPILL = ".spill"  # where DuckDB puts what does not fit into memory
_COPY = (
    f"COPY (SELECT {WHOLE} FROM ({{rows}}) ORDER BY segment, n) TO {{file}} "
    "(FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 65536)"
)
_WORTHWHILE = 4 << 20  # bytes of free blocks from which on a database is written anew


def quiet(done: int, total: int) -> None:
    """Progress that nobody watches."""


@contextmanager
def alone(log: RunLog, patience: float = _PATIENCE_S) -> Iterator[None]:
    """Meanwhile nothing is folded, archived or erased by anybody else. Runs go on, and what they append can be read.

    Raises:
        LogBusy: somebody else was at it all the time.
    """
    end = time.monotonic() + patience
    while True:
        with lease(log.folder) as mine:
            if mine:
                yield
                return
        if time.monotonic() > end:
            raise LogBusy(f"another process has been folding {log.folder} for {patience:g} s; try again")
        time.sleep(0.05)


def fold_all(log: RunLog, patience: float = _PATIENCE_S) -> None:
    """Fold everything that was appended before.

    Raises:
        LogBusy: somebody else was at it all the time, or held the database.
    """
    end = time.monotonic() + patience
    while (done := log.fold()) is None:
        if time.monotonic() > end:
            raise LogBusy(f"another process has been folding {log.folder} for {patience:g} s; try again")
        time.sleep(0.05)
    if done.busy:
        raise LogBusy(done.busy)


def before(older_than_days: int) -> date:
    """The first day (UTC) that is kept when whole days older than so many days go; today always is."""
    return datetime.now(UTC).date() - timedelta(days=older_than_days)


def unforwarded(log: RunLog, first: date) -> dict[str, int]:
    """Consumers of the log that have not read all that was logged before this day, with the number of runs that they miss.

    Raises:
        LogBusy: another program keeps the database locked.
    """
    from agentkit.runs import REHEARSALS
    from agentkit_tracking.forwarding.state import StateFile
    from agentkit_tracking.runlog import reading

    files = sorted(path for path in (log.folder / "consumers").glob("*.json") if not path.name.startswith("."))
    if not files:
        return {}
    with log.database.reading() as connection:
        known = positions(connection) if connection is not None and log.database.is_shared else {}
    others = [segment for segment, position in known.items() if position.host != socket.gethostname()]
    found = {}
    with reading.connection(log) as connection:
        for path in files:
            state = StateFile(log.folder, path.stem, "").load()
            marks = {segment: mark.n for segment, mark in state.marks.items()}
            unread = connection.execute(
                "SELECT count(*) FROM every_event e LEFT JOIN (SELECT unnest(?::VARCHAR[]) AS segment, unnest(?::BIGINT[]) AS n) m "
                "ON m.segment = e.segment WHERE e.type = 'outcome' AND e.n > coalesce(m.n, -1) "
                "AND NOT list_contains(?::VARCHAR[], coalesce(e.kind, '')) AND NOT list_contains(?::VARCHAR[], e.segment) "
                f"AND e.logged_at < TIMESTAMPTZ '{first} 00:00:00+00'",
                [list(marks), list(marks.values()), list(REHEARSALS), [] if state.everywhere else others],
            )
            if runs := int(one(unread)):
                found[path.stem] = runs
    return found


def new_archive(log: RunLog, day: date) -> str:
    """The path, from the log's folder, of a file for that day; until it `counts`, whoever finds it removes it."""
    name = f"{time.time_ns() // 1_000_000:012x}{os.urandom(4).hex()}.parquet"
    file = f"{ARCHIVE}/day={day:%Y-%m-%d}/{name}"
    with log.database.writing(_PATIENCE_S) as connection, transaction(connection):
        expendable(connection, [file])
    return file


def expendable(connection: duckdb.DuckDBPyConnection, files: list[str]) -> None:
    """From this transaction on, these archives may be removed."""
    connection.execute("INSERT INTO log.expendable SELECT unnest(?::VARCHAR[])", [files])


def counts(connection: duckdb.DuckDBPyConnection, file: str) -> None:
    """From this transaction on, this archive stays."""
    connection.execute("DELETE FROM log.expendable WHERE file = ?", [file])


def write_archive(connection: duckdb.DuckDBPyConnection, rows: str, folder: Path, file: str) -> tuple[int, str]:
    """Write what the query `rows` yields into a Parquet file that `new_archive` named, and read it back.

    It is on the disk under its name when this returns, and counts only once `log.archives` names it.

    Returns:
        The number of its events, and its SHA-256.
    """
    final = folder / file
    place, scratch = final.parent, final.with_name(f"{_SCRATCH}{final.name}")
    place.mkdir(parents=True, exist_ok=True)
    connection.execute(f"SET temp_directory = {quoted(folder / _SPILL)}")
    connection.execute(_COPY.format(rows=rows, file=quoted(scratch)))
    written = f"read_parquet({quoted(scratch)}, hive_partitioning = false)"
    sums = [
        connection.execute(f"SELECT count(*), bit_xor(hash({WHOLE})) FROM {source}").fetchall()[0]
        for source in (f"({rows})", written)
    ]
    if sums[0] != sums[1]:
        scratch.unlink()
        raise OSError(f"{scratch} does not hold what was written to it; nothing was deleted. Check the disk")
    _sync(scratch)
    os.replace(scratch, final)
    for parent in (place, place.parent):
        _sync(parent)
    with open(final, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return int(sums[0][0]), digest


def archived(connection: duckdb.DuckDBPyConnection) -> list[tuple[date, str, int, str]]:
    """Day, file, events and SHA-256 of each archive that counts, oldest first."""
    return connection.execute("SELECT day, file, events, sha256 FROM log.archives ORDER BY day, file").fetchall()


def parquet(folder: Path, files: list[str]) -> str:
    """The archives as a source of SQL."""
    paths = ", ".join(quoted(folder / file) for file in files)
    return f"read_parquet([{paths}], union_by_name = true, hive_partitioning = false, filename = true)"


def remove_orphans(log: RunLog) -> int:
    """Remove files that a process which was killed left behind; for who is `alone`.

    Of archives, only what the database says may go: it may be a new one, or an old one from a backup.
    """
    if log.database.is_shared:
        return 0  # a lake has no archives
    with log.database.reading() as connection:
        unwanted = set() if connection is None else _expendable(connection)
    orphans = [log.folder / file for file in unwanted if (log.folder / file).is_file()]
    scratch = [*(log.folder / ARCHIVE).glob(f"day=*/{_SCRATCH}*"), *log.folder.glob(f"{_SCRATCH}*")]
    orphans += [path for path in scratch if _OWN_SCRATCH.fullmatch(path.name)]
    for path in orphans:
        path.unlink(missing_ok=True)
    shutil.rmtree(log.folder / _SPILL, ignore_errors=True)
    for day in {path.parent for path in orphans if path.parent != log.folder}:
        with suppress(OSError):  # it is not empty
            day.rmdir()
    return len(orphans)


def unknown_archives(connection: duckdb.DuckDBPyConnection | None, folder: Path) -> list[str]:
    """Parquet files among the archives that the database does not name; they count for nobody, and nobody removes them."""
    known: set[str] = set()
    if connection is not None:
        known = {file for _, file, _, _ in archived(connection)} | _expendable(connection)
    found = {str(path.relative_to(folder)) for path in (folder / ARCHIVE).rglob("*.parquet")}
    return sorted(file for file in found - known if not Path(file).name.startswith(_SCRATCH))


def _expendable(connection: duckdb.DuckDBPyConnection) -> set[str]:
    return {
        file
        for (file,) in connection.execute(
            "SELECT file FROM log.expendable WHERE file NOT IN (SELECT file FROM log.archives)"
        ).fetchall()
        if file.startswith(f"{ARCHIVE}/") and ".." not in file
    }


def give_back(log: RunLog, deleted: int = 0, *, always: bool = False) -> int:
    """Write the database anew, without what was deleted; returns by how many bytes it shrank. For who is `alone`.

    DuckDB never makes its file smaller, keeps a whole group of rows while one of them is left, and what was deleted stays
    readable in the file. Writing it anew takes as long as there are events left in it, so it is done where an eighth is
    to be won.

    Args:
        deleted: how many events were.
        always: also if there is little to win: what was deleted must not stay.
    """
    if log.database.is_shared or not log.database.path.exists():
        return 0
    path, scratch = log.database.path, log.folder / f"{_SCRATCH}{os.urandom(4).hex()}"
    before = path.stat().st_size
    with log.database.writing(_PATIENCE_S) as connection:
        connection.execute("CHECKPOINT log")
        free = "SELECT block_size * free_blocks FROM pragma_database_size() WHERE database_name = 'log'"
        unused = int(one(connection.execute(free)))
        left = int(one(connection.execute("SELECT count(*) FROM log.events")))
        if not always and unused < max(_WORTHWHILE, before // 8) and deleted * 7 < left:
            return 0
        connection.execute(f"ATTACH {quoted(scratch)} AS anew")
        connection.execute("COPY FROM DATABASE log TO anew")
        connection.execute("DETACH anew")
        connection.execute("DETACH log")
        _sync(scratch)
        os.replace(scratch, path)
        _sync(log.folder)
    return before - path.stat().st_size


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:
        if not path.is_dir():  # not every file system can sync a folder
            raise
    finally:
        os.close(fd)
