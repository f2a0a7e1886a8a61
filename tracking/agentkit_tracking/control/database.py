"""Where the control plane is kept: a SQLite file in the home, or what `AGENTKIT_CONTROL` names.

SQLite and PostgreSQL (`postgresql+psycopg2://…`) are tested; other SQLAlchemy addresses may work. SQLAlchemy is imported when
something is read or written, not before: a process whose control plane is empty does not pay for it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentkit.errors import AgentkitError, UsageError
from agentkit_tracking.home import file_lock, home

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

URL_ENV = "AGENTKIT_CONTROL"
BUSY_S = 30.0  # how long a writer waits for its turn; 64 processes that hammer one file need a few seconds
_CONNECT_S = 5  # a PostgreSQL server that is not there must be said within seconds
_SQLITE = "sqlite:///"
Place = tuple[str | None, str | None, str]


class ControlError(AgentkitError):
    """The control database cannot be read or written; whatever needed it is refused."""


def place() -> Place:
    """All that decides where the control plane is; cheap enough for every call."""
    return os.environ.get(URL_ENV), os.environ.get("AGENTKIT_HOME"), os.getcwd()


def database() -> Database:
    """The control database of the present settings; one object per process and place."""
    global _current
    where = place()
    if _current is not None and _current[0] == where:
        return _current[1]
    with _choosing:
        if _current is None or _current[0] != where:
            before, _current = _current, (where, Database(where[0]))
            if before is not None:
                before[1].close()
        return _current[1]


def close() -> None:
    """Close this process's connections; the next use opens others."""
    global _current
    with _choosing:
        before, _current = _current, None
    if before is not None:
        before[1].close()


class Database:
    """One control database; its schema is brought up to date at the first use that finds or needs it.

    Args:
        url: SQLAlchemy's; None is `control.db` in the home.
    """

    def __init__(self, url: str | None = None) -> None:
        if url and url.startswith("sqlite") and (not url.startswith(_SQLITE) or url in (_SQLITE, f"{_SQLITE}:memory:")):
            raise UsageError(f"{URL_ENV} is {url!r}; name a file, {_SQLITE}PATH: other processes must see it")
        self.path = Path(url.removeprefix(_SQLITE)).absolute() if url and url.startswith(_SQLITE) else None
        if not url:
            self.path = home() / "control.db"
        self._url = url
        self._engine: Engine | None = None
        self._inode: tuple[int, int] | None = None  # of the file that the engine has open
        self._opening = threading.RLock()
        # One SQLite writer at a time: threads that queue here wait in turn, those that poll the file's lock starve.
        self._turn = threading.Lock() if self.path else nullcontext()

    def __str__(self) -> str:
        if self.path:
            return str(self.path)
        from sqlalchemy import make_url

        return make_url(self._url or "").render_as_string(hide_password=True)

    def exists(self) -> bool:
        """Whether there is anything to read. One `os.stat` for a file; a server is taken to be there.

        Raises:
            ControlError: the file was there before and is gone, or cannot be looked at: stops may be lost.
        """
        if self.path is None:
            return True
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            if self._inode is None:
                return False
            raise ControlError(
                f"the control database {self.path} was here and is gone, stops with it; put it back, or restart this "
                "process if that was meant"
            ) from None
        except OSError as e:
            raise self._unusable(e) from e
        if self._inode is not None and self._inode != (found.st_dev, found.st_ino):
            self.close()  # put in its place; what is open is another file, which nobody else reads
        return True

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection for reading; every statement sees the present.

        Raises:
            ControlError: the database cannot be read.
        """
        with self._translated(), self._ready().connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction: all of it or, when something is raised inside, nothing.

        Raises:
            ControlError: the database cannot be written.
        """
        with (
            self._turn,
            self._translated(),
            self._ready().connect() as connection,
            connection.execution_options(agentkit_write=True).begin(),
        ):
            yield connection

    def close(self) -> None:
        """Close the connections that are idle."""
        with self._opening:
            engine, self._engine, self._inode = self._engine, None, None
            if engine is not None:
                engine.dispose()

    # ---- opening

    def _ready(self) -> Engine:
        is_there = self.exists()
        if self._engine is None or not is_there:
            with self._opening:
                if self._engine is None:
                    self._open()
        assert self._engine is not None
        return self._engine

    def _open(self) -> None:
        if self.path is None:
            engine = _server_engine(self._url or "")
            _migrate(engine)
        else:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # Two processes that turn the write-ahead log on at once would fail as "locked", whatever the time-out.
                with file_lock(self.path.with_name(f".{self.path.name}.lock")):
                    engine = _file_engine(self.path)
                    _migrate(engine)
                    found = os.stat(self.path)
            except OSError as e:
                raise self._unusable(e) from e
            self._inode = found.st_dev, found.st_ino
        self._engine = engine

    @contextmanager
    def _translated(self) -> Iterator[None]:
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (SQLAlchemyError, ModuleNotFoundError) as e:
            raise self._unusable(e) from e

    def _unusable(self, error: Exception) -> ControlError:
        said = str(getattr(error, "orig", None) or error).strip().splitlines() or [type(error).__name__]
        how = "restore the file or its permissions" if self.path else "start the server, install its driver"
        return ControlError(
            f"the control database {self} cannot be used ({said[0]}); nothing runs without it: {how}, or set "
            f"{URL_ENV} to another"
        )


_current: tuple[Place, Database] | None = None
_choosing = threading.Lock()
_inherited: list[Any] = []


def _after_fork() -> None:
    """A child opens connections of its own; those of its parent it neither uses nor closes, so they are kept."""
    global _current, _choosing
    if _current is not None:
        _inherited.append(_current[1])
    _current, _choosing = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _file_engine(path: Path) -> Engine:
    from sqlalchemy import URL, create_engine, event

    # Threads of one process never wait for a connection, only for their turn to write.
    engine = create_engine(
        URL.create("sqlite", database=str(path)), connect_args={"timeout": BUSY_S}, pool_size=4, max_overflow=-1
    )

    @event.listens_for(engine, "connect")
    def _(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say
        connection.execute("PRAGMA journal_mode=WAL")

    @event.listens_for(engine, "begin")
    def _(connection: Connection) -> None:
        if connection.get_execution_options().get("agentkit_write"):
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # else two readers that both go on to write: one fails

    return engine


def _server_engine(url: str) -> Engine:
    from sqlalchemy import create_engine, make_url

    limits: dict[str, Any] = {}
    if make_url(url).get_backend_name() == "postgresql":
        milliseconds = int(BUSY_S * 1000)
        limits = {
            "connect_timeout": _CONNECT_S,
            "options": f"-c lock_timeout={milliseconds} -c statement_timeout={milliseconds}",
        }
    return create_engine(url, connect_args=limits, pool_pre_ping=True, pool_size=4, max_overflow=12)


def _migrate(engine: Engine) -> None:
    from agentkit_tracking.control import tables

    with engine.connect().execution_options(agentkit_write=True) as connection, connection.begin():
        tables.migrate(connection)


# ---- times as they are stored


def stamp(time: datetime) -> str:
    """UTC, ISO 8601, always to the microsecond: as text, earlier is less."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def unstamp(text: str) -> datetime:
    """What `stamp` was given."""
    return datetime.fromisoformat(text)
