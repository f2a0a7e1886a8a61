"""The run log of several machines: DuckLake, tables as Parquet in a shared place with their catalogue in PostgreSQL.

    AGENTKIT_LOG_URL='ducklake:postgresql://user@host/database?data_path=s3://bucket/agentkit'

Every machine folds the segments on its own disk; all of them at once, since appends do not conflict. A fold is one
transaction, as with the file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from agentkit.errors import UsageError
from agentkit_tracking.runlog.database import Database, connected, migrate, quoted, version
from agentkit_tracking.runlog.migrations import NEWEST, ZSTD

if TYPE_CHECKING:
    import duckdb

SCHEME = "ducklake:"
_EXTENSIONS = ("ducklake", "postgres_scanner")
_TRIES = 12  # of a commit that met another; each waits longer
_MESSAGE = "conflict"


class Lake(Database):
    """A DuckLake that several machines write to.

    Args:
        folder: of the run log on this machine, where its segments lie.
        url: `ducklake:` and the address of the PostgreSQL database, with `data_path`, the folder or bucket of the Parquet
            files, as a parameter.

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
        """A connection on one snapshot of the lake, attached as `log`."""
        with self._attached() as connection:
            if version(connection) < NEWEST:
                self.retrying(lambda: migrate(connection, without=ZSTD))
            connection.execute("BEGIN")
            yield connection

    @contextmanager
    def writing(self, patience: float = 0.0) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection with the lake attached as `log`, brought up to date if need be."""
        with self._attached() as connection:
            if version(connection) < NEWEST:
                self.retrying(lambda: migrate(connection, without=ZSTD))
            yield connection

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
    def _attached(self) -> Iterator[duckdb.DuckDBPyConnection]:
        import duckdb

        with connected() as connection:
            for name in _EXTENSIONS:
                connection.execute(f"LOAD {quoted(_extension(name))}")
            try:
                connection.execute(
                    f"ATTACH {quoted(f'{SCHEME}postgres:{self._catalogue}')} AS log (DATA_PATH {quoted(self.data_path)})"
                )
            except duckdb.Error as e:
                raise UsageError(f"{self} cannot be opened: {str(e).splitlines()[0]}") from e
            yield connection


def _extension(name: str) -> Path:
    """The file of a DuckDB extension that came as a package."""
    import duckdb

    try:
        package = import_module(f"duckdb_extension_{name}")
        files = [*Path(str(package.__file__)).parent.glob(f"extensions/v{duckdb.__version__}/*.duckdb_extension")]
    except ImportError:
        files = []
    if not files:
        wanted = " ".join(f"duckdb-extension-{e.replace('_', '-')}==1.5.5" for e in _EXTENSIONS)
        raise UsageError(
            f"a lake needs DuckDB's extension {name}, which is not there for DuckDB {duckdb.__version__}; install "
            f"duckdb==1.5.5 {wanted} (there are none for DuckDB 2.0 yet)"
        )
    return files[0]
