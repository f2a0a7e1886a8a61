"""Which processes are alive: each holds a lock as long as it lives, so whose lock can be had is dead.

Beside SQLite it is a locked file; on PostgreSQL an advisory lock of a session of its own, which the server lets go of with
the connection. No clock is compared, and nothing has to be renewed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from sqlalchemy import Connection

_log = logging.getLogger("agentkit.durable")
# A session that was cut off comes back within a look or two; its runs are not taken from it at once.
PATIENCE_S = 5.0


class Register(Protocol):
    """Says which executors are dead, and that this one is not."""

    def keep(self) -> None:
        """Hold this process's lock, again if it was lost."""
        ...

    def dead(self, executors: Iterable[str]) -> set[str]:
        """Those that are not alive."""
        ...

    def looks_dead(self, executor: str) -> bool:
        """Whether it is not alive at this moment."""
        ...

    def forget(self, executor: str) -> None:
        """Nothing is left of a dead executor."""
        ...

    def close(self) -> None:
        """Let go of the lock."""
        ...


class Files:
    """Locked files in a folder: processes of one machine."""

    def __init__(self, folder: Path, executor: str) -> None:
        self._folder, self._executor = folder, executor
        self._held: int | None = None

    def keep(self) -> None:
        """Lock this process's file; a process that dies lets go of it."""
        if self._held is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._held = _locked(self._folder / self._executor, os.O_CREAT)
            if self._held is not None:
                _held.add(self._held)

    def dead(self, executors: Iterable[str]) -> set[str]:
        """Those whose file is not locked."""
        return {one for one in executors if self.looks_dead(one)}

    def forget(self, executor: str) -> None:
        """Remove a dead executor's file."""
        (self._folder / executor).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove this process's file, then unlock it."""
        if self._held is not None:
            self.forget(self._executor)
            _held.discard(self._held)
            os.close(self._held)
            self._held = None

    def looks_dead(self, executor: str) -> bool:
        """Whether its file is not locked."""
        if executor == self._executor:
            return False
        try:
            descriptor = _locked(self._folder / executor)
        except FileNotFoundError:
            return True
        if descriptor is None:
            return False
        os.close(descriptor)
        return True


def _locked(path: Path, flags: int = 0) -> int | None:
    """An open and exclusively locked file, or None where another process has locked it."""
    import fcntl

    descriptor = os.open(path, os.O_RDWR | flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


_held: set[int] = set()


def _let_go() -> None:
    """In a forked child: a lock belongs to the open file, which it would keep for a parent that is dead."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


class Sessions:
    """Advisory locks of a PostgreSQL server: processes of any machine. No pooler may stand between that shares sessions."""

    def __init__(self, url: str, executor: str) -> None:
        from sqlalchemy import NullPool, create_engine

        # The server gives a silent client up after half a minute, which matters where a whole machine is lost.
        alive = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "connect_timeout": 5}
        server = "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3"
        self._engine = create_engine(
            url, poolclass=NullPool, isolation_level="AUTOCOMMIT", connect_args={**alive, "options": server}
        )
        self._executor = executor
        self._held: Connection | None = None
        self._seen_dead: dict[str, float] = {}

    def keep(self) -> None:
        """Take this process's lock; after a cut connection again."""
        from sqlalchemy import text
        from sqlalchemy.exc import SQLAlchemyError

        try:
            if self._held is not None:
                self._held.execute(text("SELECT 1"))
                return
        except SQLAlchemyError as e:
            _log.warning("the session that says this process is alive was cut: %s", e)
            self._held.invalidate()  # type: ignore[union-attr]
            self._held.close()  # type: ignore[union-attr]
            self._held = None
        held = self._engine.connect()
        held.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _key(self._executor)})
        self._held = held

    def dead(self, executors: Iterable[str]) -> set[str]:
        """Those whose lock could be had now and `PATIENCE_S` ago."""
        now = time.monotonic()
        free = {one for one in executors if one != self._executor and self.looks_dead(one)}
        self._seen_dead = {one: self._seen_dead.get(one, now) for one in free}
        return {one for one, since in self._seen_dead.items() if now - since >= PATIENCE_S}

    def forget(self, executor: str) -> None:
        """Nothing is kept of it."""
        self._seen_dead.pop(executor, None)

    def close(self) -> None:
        """End the session, and with it the lock."""
        if self._held is not None:
            self._held.close()
            self._held = None
        self._engine.dispose()

    def looks_dead(self, executor: str) -> bool:
        """Whether its lock can be had."""
        from sqlalchemy import text

        with self._engine.connect() as connection:
            free = connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": _key(executor)}).scalar()
        return bool(free)  # the lock is gone with the connection


def _key(executor: str) -> int:
    digest = hashlib.sha256(f"agentkit executor {executor}".encode()).digest()
    return int.from_bytes(digest[:8], signed=True)
