"""The run log of several machines: DuckLake, tables as Parquet in a shared place with their catalogue in PostgreSQL.

    AGENTKIT_LOG_URL='ducklake:postgresql://user@host/database?data_path=s3://bucket/agentkit'

Every machine folds the segments on its own disk; all of them at once, since appends do not conflict. A fold is one
transaction, as with the file.

Whoever reads or folds holds a shared advisory lock of PostgreSQL, and whoever removes files an exclusive one: no file goes while
somebody reads it, and none that belongs to a transaction under way. A process that is killed lets go of its lock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from agentkit.errors import UsageError
from agentkit_tracking.runlog.database import Database, LogBusy, migrate, one, quoted, version
from agentkit_tracking.runlog.migrations import NEWEST, ZSTD

if TYPE_CHECKING:
    import duckdb

SCHEME = "ducklake:"
CATALOGUE = "__ducklake_metadata_log"  # as DuckLake attaches the PostgreSQL database
_OBJECTS = "s3://"
_EXTENSIONS = ("ducklake", "postgres_scanner")
_TRIES = 12  # of a commit that met another; each waits longer
_MESSAGE = "conflict"
_MADE_AT_ONCE = ("duplicate key", "already exists")  # a new catalogue, by another machine, too
_READER_PATIENCE_S = 15.0  # for files to be removed
_FOLDER_PATIENCE_S = 5.0  # it can come back later
# Advisory locks, numbers that others would hardly take: the room of the files, the turn at upkeep, changes of the schema.
_ROOM, _TURN, _SCHEMA = 0x6167656E746B6974, 0x6167656E746B6975, 0x6167656E746B6976
_NO_STATISTICS = """
    ALTER TABLE ducklake_file_column_stats ALTER min_value SET STATISTICS 0, ALTER max_value SET STATISTICS 0;
    ALTER TABLE ducklake_table_column_stats ALTER min_value SET STATISTICS 0, ALTER max_value SET STATISTICS 0
"""
# Files of extensions whose signature DuckDB has verified in this process: doing so for each connection takes 0.3 s.
_verified: set[Path] = set()


class Lake(Database):
    """A DuckLake that several machines write to.

    Args:
        folder: of the run log on this machine, where its segments lie.
        url: `ducklake:` and the address of the PostgreSQL database, with `data_path`, the folder or bucket of the Parquet
            files, as a parameter. A bucket's credentials, region and endpoint come from the environment (`AWS_…`).

    Raises:
        UsageError: the address is none of this kind.
    """

    is_shared = True

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder)
        parts = urlsplit(url.removeprefix(SCHEME))
        options = dict(parse_qsl(parts.query))
        self.data_path = options.pop("data_path", "")
        if parts.scheme not in ("postgresql", "postgres") or not self.data_path:
            raise UsageError(
                f"AGENTKIT_LOG_URL: expected {SCHEME}postgresql://user@host/database?data_path=FOLDER_OR_BUCKET, found "
                f"{parts.scheme or 'no'} address {'with' if self.data_path else 'without'} data_path"
            )
        self._catalogue = urlunsplit(parts._replace(query=urlencode(options)))

    def __str__(self) -> str:
        parts = urlsplit(self._catalogue)
        return f"the lake in {parts.hostname}{parts.path}"  # without its password

    @contextmanager
    def reading(self) -> Iterator[duckdb.DuckDBPyConnection | None]:
        """A connection on one snapshot of the lake, attached as `log`.

        Raises:
            LogBusy: another machine has been removing files all the time.
            UsageError: the lake cannot be reached, or was written by a newer version.
        """
        with self._shared(_READER_PATIENCE_S) as connection:
            connection.execute("BEGIN")
            yield connection

    @contextmanager
    def writing(
        self, patience: float = _FOLDER_PATIENCE_S, through: duckdb.DuckDBPyConnection | None = None
    ) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection with the lake attached as `log`, brought up to date if need be; others read and write at once.

        It is never `through` another: it has extensions and credentials of its own.

        Raises:
            LogBusy: another machine has been removing files all the time.
            UsageError: the lake cannot be reached, or was written by a newer version.
        """
        with self._shared(patience) as connection:
            yield connection

    @contextmanager
    def alone(self, patience: float) -> Iterator[duckdb.DuckDBPyConnection]:
        """As `writing`, while nobody on any machine reads or writes.

        Raises:
            LogBusy: somebody was at it all the time.
        """
        with self._holding(_ROOM, "alone", patience), self._attached() as connection:
            yield connection

    @contextmanager
    def turn(self, patience: float) -> Iterator[None]:
        """Upkeep is done by one machine at a time.

        Raises:
            LogBusy: another one was at it all the time.
        """
        with self._holding(_TURN, "alone", patience):
            yield

    def retrying(self, work: Callable[[], None]) -> None:
        """Do a transaction; again, where another machine's commit came in between."""
        import duckdb

        for tried in range(1, _TRIES + 1):
            try:
                return work()
            except duckdb.Error as e:
                if _MESSAGE not in str(e).lower() or tried == _TRIES:
                    raise
                time.sleep(0.02 * 2 ** min(tried, 6))
        return None

    @contextmanager
    def _shared(self, patience: float) -> Iterator[duckdb.DuckDBPyConnection]:
        with self._holding(_ROOM, "shared", patience), self._attached() as connection:
            if _last_migration(connection) != NEWEST:
                with self._holding(_SCHEMA, "alone", patience):
                    if version(connection) < NEWEST:
                        migrate(connection, without=ZSTD)
                        keep_texts_out(connection)
            yield connection

    @contextmanager
    def _attached(self) -> Iterator[duckdb.DuckDBPyConnection]:
        import duckdb

        is_bucket = self.data_path.startswith(_OBJECTS)
        with _connected(*_EXTENSIONS, *(["httpfs"] if is_bucket else [])) as connection:
            if is_bucket:
                _give_secret(connection, self.data_path)
            self._attach(connection, f"{SCHEME}postgres:", f"DATA_PATH {quoted(self.data_path)}")
            try:
                yield connection
            except duckdb.IOException as e:
                if (_bucket(self.data_path) if is_bucket else self.data_path) not in str(e):
                    raise
                raise UsageError(
                    f"the files of {self} in {self.data_path} cannot be reached: {str(e).splitlines()[0]}; events are kept "
                    f"meanwhile{'; look at the AWS_… variables' if is_bucket else ''}"
                ) from e

    def _attach(self, connection: duckdb.DuckDBPyConnection, kind: str, options: str) -> None:
        import duckdb

        for tried in range(1, _TRIES + 1):
            try:
                connection.execute(f"ATTACH {quoted(kind + self._catalogue)} AS log ({options})")
                return
            except duckdb.Error as e:
                if tried < _TRIES and any(said in str(e) for said in _MADE_AT_ONCE):
                    time.sleep(0.05)
                    continue
                said = str(e).splitlines()[0].replace(self._catalogue, "its catalogue")  # it quotes the password
                raise UsageError(f"{self} cannot be opened: {said}") from None

    @contextmanager
    def _holding(self, lock: int, how: Literal["shared", "alone"], patience: float) -> Iterator[None]:
        """Hold an advisory lock of the catalogue, in a session of its own: its end, or this process's, lets go of it."""
        import duckdb

        taking = "pg_advisory_xact_lock" + ("_shared" if how == "shared" else "")
        with _connected("postgres_scanner") as session:
            # A snapshot, which other levels keep, would keep PostgreSQL from clearing away what was deleted.
            self._attach(session, "", "TYPE postgres, ISOLATION_LEVEL 'read committed'")
            session.execute("BEGIN")
            try:
                for query in (
                    f"set_config('lock_timeout', '{patience * 1000:.0f}', true)",
                    "set_config('idle_in_transaction_session_timeout', '0', true)",
                    f"{taking}({lock})",
                ):
                    session.execute(f"FROM postgres_query('log', {quoted(f'SELECT {query}')})").fetchall()
            except duckdb.Error as e:
                if "lock timeout" not in str(e):
                    raise
                is_upkeep = lock != _ROOM or how == "shared"
                who = "another machine was at the upkeep of" if is_upkeep else "somebody was reading or folding into"
                raise LogBusy(f"{who} {self} for {patience:g} s; try again. Events are being kept meanwhile") from e
            yield


def keep_texts_out(connection: duckdb.DuckDBPyConnection) -> None:
    """Let PostgreSQL keep no texts of people: no rows of events, and no statistics on DuckLake's about them."""
    connection.execute(
        "CALL ducklake_set_option('log', 'data_inlining_row_limit', 0, table_name => 'events')"
    ).fetchall()
    connection.execute(f"FROM postgres_execute('{CATALOGUE}', {quoted(_NO_STATISTICS)})").fetchall()


def _last_migration(connection: duckdb.DuckDBPyConnection) -> int:
    """As `version`, which looks at all tables for it; several times as fast."""
    import duckdb

    try:
        return int(one(connection.execute("SELECT coalesce(max(version), 0) FROM log.migrations")))
    except duckdb.CatalogException:
        return 0


@contextmanager
def _connected(*extensions: str) -> Iterator[duckdb.DuckDBPyConnection]:
    import duckdb

    files = [_extension(name) for name in extensions]
    is_verified = _verified.issuperset(files)
    with duckdb.connect(config={"allow_unsigned_extensions": str(is_verified).lower()}) as connection:
        for file in files:
            connection.execute(f"LOAD {quoted(file)}")
        _verified.update(files)
        connection.execute("SET allow_unsigned_extensions = false")
        connection.execute("SET TimeZone = 'UTC'")
        yield connection


def _give_secret(connection: duckdb.DuckDBPyConnection, place: str) -> None:
    """Let a connection reach the bucket; no message has a credential in it.

    Raises:
        UsageError: the environment has no credentials, or a wrong endpoint.
    """
    import duckdb

    key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    if not key or not secret:
        raise UsageError(f"{place} needs AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment")
    given = {
        "KEY_ID": key,
        "SECRET": secret,
        "REGION": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        "SCOPE": _OBJECTS + _bucket(place),
    }
    if token := os.environ.get("AWS_SESSION_TOKEN"):
        given["SESSION_TOKEN"] = token
    if url := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        endpoint = urlsplit(url)
        if endpoint.scheme not in ("http", "https") or not endpoint.netloc or "@" in endpoint.netloc:
            raise UsageError(
                "AWS_ENDPOINT_URL: expected http://host:port or https://host, found another kind of address"
            )
        given |= {
            "ENDPOINT": f"{endpoint.netloc}{endpoint.path.rstrip('/')}",
            "URL_STYLE": "path",
            "USE_SSL": str(endpoint.scheme == "https").lower(),
        }
    values = ", ".join(f"{name} {quoted(value)}" for name, value in given.items())
    try:
        connection.execute(f"CREATE SECRET (TYPE s3, {values})")
        for name in ("s3_access_key_id", "s3_secret_access_key", "s3_session_token"):
            connection.execute(
                f"SET {name} = ''"
            )  # which the extension takes from the environment, for any query to see
    except duckdb.Error:
        raise UsageError(f"DuckDB does not take the AWS_… variables for {place}") from None  # its message quotes them


def _bucket(place: str) -> str:
    return place.removeprefix(_OBJECTS).partition("/")[0]


def _extension(name: str) -> Path:
    """The file of a DuckDB extension that came as a package."""
    import duckdb

    try:
        package = import_module(f"duckdb_extension_{name}")
        files = [*Path(str(package.__file__)).parent.glob(f"extensions/v{duckdb.__version__}/*.duckdb_extension")]
    except ImportError:
        files = []
    if not files:
        wanted = " ".join(f"duckdb-extension-{e.replace('_', '-')}==1.5.5" for e in dict.fromkeys((*_EXTENSIONS, name)))
        raise UsageError(
            f"a lake needs DuckDB's extension {name}, which is not there for DuckDB {duckdb.__version__}; install "
            f"duckdb==1.5.5 {wanted} (there are none for DuckDB 2.0 yet)"
        )
    return files[0]
