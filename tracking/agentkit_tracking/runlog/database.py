"""The database that segments are folded into: a DuckDB file, or by `AGENTKIT_LOG_URL` a lake (see `lake.py`).

DuckDB locks a file for one process. So nobody keeps it open: it is opened for one query or one fold, behind two file locks, the
room (readers together, or one folder alone) and the door to it, which lets nobody in once the folder waits. No process meets
a lock error of another that goes this way, and none waits longer than for one query or one fold.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentkit.errors import AgentkitError, UsageError
from agentkit_tracking.runlog.migrations import MIGRATIONS, NEWEST

if TYPE_CHECKING:
    import duckdb

URL_ENV = "AGENTKIT_LOG_URL"
_PATIENCE_S = 15.0  # of a reader, for a fold to end or a foreign program to let go
_FOLDER_PATIENCE_S = 2.0  # a folder holds up readers while it waits, and can come back later
_POLL_S = 0.01


class LogBusy(AgentkitError):
    """The database of the run log is held by somebody else for longer than one waits."""


class Database:
    """Opens the database for one reader or one writer at a time.

    Args:
        folder: of the run log; `log.duckdb` lies in it.
    """

    is_shared = False  # with other machines

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "log.duckdb"

    def __str__(self) -> str:
        return str(self.path)

    def retrying(self, work: Callable[[], None]) -> None:
        """Do a transaction."""
        work()

    @contextmanager
    def reading(self) -> Iterator[duckdb.DuckDBPyConnection | None]:
        """A connection with the database attached as `log`, read-only; None where there is none yet.

        Raises:
            LogBusy: another program has held it open for writing all the time.
            UsageError: it was written by a newer version.
        """
        if not self.path.exists() or self._is_blank():
            yield None
            return
        while True:
            with self._in_room(alone=False, patience=_PATIENCE_S), connected() as connection:
                _attach(connection, self.path, " (READ_ONLY)", _PATIENCE_S)
                if version(connection) == NEWEST:
                    yield connection
                    return
            with self.writing(_PATIENCE_S):
                pass  # brings it up to date

    @contextmanager
    def writing(
        self, patience: float = _FOLDER_PATIENCE_S, through: duckdb.DuckDBPyConnection | None = None
    ) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection with the database attached as `log`, made or brought up to date if need be, for one transaction.

        Args:
            through: the connection to use; for many transactions a new one for each takes a fifth of the time.

        Raises:
            LogBusy: somebody has read it all the time.
            UsageError: it was written by a newer version.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._in_room(alone=True, patience=patience):
            if not self.path.exists() or self._is_blank():
                self._make()
            with connected() if through is None else nullcontext(through) as connection:
                _attach(connection, self.path, "", patience)
                try:
                    migrate(connection)
                    yield connection
                finally:
                    _detach(connection)

    def _is_blank(self) -> bool:
        """Whether nothing was ever stored in the file: a full disk may have left it so."""
        with suppress(OSError):
            return self.path.stat().st_size == 0
        return False

    def _make(self) -> None:
        """A database under another name first: a disk that is full half-way leaves none that cannot be opened."""
        scratch = self.folder / f".log-{os.getpid()}.duckdb"
        try:
            with connected() as connection:
                with suppress(FileNotFoundError):
                    os.unlink(scratch)  # of a process of this number that was killed
                connection.execute(f"ATTACH {quoted(scratch)} AS log")
                migrate(connection)
            os.replace(scratch, self.path)
        except Exception as e:
            for left in self.folder.glob(f"{scratch.name}*"):
                os.unlink(left)
            raise UsageError(f"{self.path} cannot be made: {str(e).splitlines()[0]}; events are kept meanwhile") from e

    @contextmanager
    def _in_room(self, *, alone: bool, patience: float) -> Iterator[None]:
        try:
            import fcntl
        except ImportError:  # then DuckDB's own lock and patience have to do
            yield
            return
        end = time.monotonic() + patience
        kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        with _lock_file(self.folder / "door.lock") as door, _lock_file(self.folder / "room.lock") as room:
            while True:
                # Who waits for the room holds the door, but not for long: one slow reader must not keep out all others.
                turn = min(end, time.monotonic() + _FOLDER_PATIENCE_S)
                if _locked(door, kind, end) and _locked(room, kind, turn):
                    break
                fcntl.flock(door, fcntl.LOCK_UN)
                if time.monotonic() > end:
                    raise LogBusy(f"{self} was in use for {patience:g} s; try again")
                time.sleep(20 * _POLL_S)
            if not alone:
                fcntl.flock(door, fcntl.LOCK_UN)
            yield


def open_database(folder: Path) -> Database:
    """Where the run log in `folder` is folded to: what `AGENTKIT_LOG_URL` names, or a file in the folder."""
    url = os.environ.get(URL_ENV)
    if not url:
        return Database(folder)
    from agentkit_tracking.runlog.lake import Lake

    return Lake(folder, url)


@contextmanager
def held(path: Path, *, alone: bool, patience: float) -> Iterator[None]:
    """Hold a file, with others or alone; one that dies lets go.

    Raises:
        LogBusy: it could not be had for `patience` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock_file(path) as file:
        try:
            import fcntl
        except ImportError:
            yield
            return
        if not _locked(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH, time.monotonic() + patience):
            raise LogBusy(f"{path} was in use for {patience:g} s; try again")
        yield


@contextmanager
def lease(folder: Path, name: str = "fold") -> Iterator[bool]:
    """Whether this process may do the work of that name now; nobody waits, and one that dies lets go.

    Raises:
        UsageError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(
            f"{folder} cannot be made as a folder ({e.strerror}); move away what is in its place, or make the folder above "
            "it writable"
        ) from e
    with _lock_file(folder / f"{name}.lock") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except BlockingIOError:
            yield False
            return
        yield True


def _locked(file: int, how: int, until: float) -> bool:
    """Whether the lock could be had until then."""
    import fcntl

    while True:
        with suppress(BlockingIOError):
            fcntl.flock(file, how | fcntl.LOCK_NB)
            return True
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_S)


@contextmanager
def _lock_file(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as e:
        if e.errno not in (errno.EROFS, errno.EACCES):
            raise
        # An audit copy: nobody can write there, and who only reads needs no more than a file to lock.
        fd = os.open(path if path.exists() else path.parent, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def connected(*, spare: int = 0) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that leaves so many cores to others."""
    import duckdb

    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        if spare:
            threads = one(connection.execute("SELECT current_setting('threads')"))
            connection.execute(f"SET threads = {max(1, threads - spare)}")
        yield connection


def _attach(connection: duckdb.DuckDBPyConnection, path: Path, how: str, patience: float) -> None:
    import duckdb

    end = time.monotonic() + patience
    while True:
        try:
            connection.execute(f"ATTACH {quoted(path)} AS log{how}")
            return
        except duckdb.IOException as e:
            if "lock" not in str(e).lower():
                raise UsageError(f"{path} cannot be opened: {str(e).splitlines()[0]}") from e
            if time.monotonic() > end:
                raise LogBusy(
                    f"another program has {path} open for writing ({str(e).partition('Conflicting lock is ')[2][:120]}); "
                    "open it with read_only=True there, or close it. Events are being kept meanwhile"
                ) from e
            time.sleep(_POLL_S)


def _detach(connection: duckdb.DuckDBPyConnection) -> None:
    import duckdb

    with suppress(duckdb.Error):  # all is stored; on a full disk what follows fails
        connection.execute("DETACH log")


def version(connection: duckdb.DuckDBPyConnection) -> int:
    """The number of the last migration that the attached database has had; 0 for a blank one.

    Raises:
        UsageError: it is newer than this program.
    """
    tables = "SELECT count(*) FROM duckdb_tables() WHERE database_name = 'log' AND table_name = 'migrations'"
    if not one(connection.execute(tables)):
        return 0
    found = int(one(connection.execute("SELECT coalesce(max(version), 0) FROM log.migrations")))
    if found > NEWEST:
        raise UsageError(
            f"the run log's database has schema {found}, this agentkit knows {NEWEST}: it was written by a newer version; "
            "upgrade agentkit"
        )
    return found


def migrate(connection: duckdb.DuckDBPyConnection, *, without: str = "") -> None:
    """Bring the attached database up to date, each migration in a transaction of its own.

    Args:
        without: words that this kind of database does not take.
    """
    for number in range(version(connection) + 1, NEWEST + 1):
        with transaction(connection):
            for statement in MIGRATIONS[number]:
                connection.execute(statement.replace(without, "") if without else statement)
            connection.execute("INSERT INTO log.migrations VALUES (?, now())", [number])


@contextmanager
def transaction(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """All or nothing."""
    connection.execute("BEGIN")
    try:
        yield
    except BaseException:
        with suppress(Exception):  # it may have been rolled back already
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def insert(connection: duckdb.DuckDBPyConnection, table: str, columns: str, rows: Sequence[Sequence[Any]]) -> None:
    """Insert rows in one statement: of `executemany`, each takes DuckDB a millisecond."""
    if rows:
        values = ", ".join("unnest(?)" for _ in rows[0])
        connection.execute(
            f"INSERT INTO {table} ({columns}) SELECT {values}", [list(column) for column in zip(*rows, strict=True)]
        )


def one(result: Any) -> Any:
    """The single value of a result, which is read to its end: DuckDB 2 does nothing else on a connection before."""
    return result.fetchall()[0][0]


def quoted(text: object) -> str:
    """As a literal of SQL."""
    return "'" + str(text).replace("'", "''") + "'"
