"""Connections: one event loop on one background thread of the process, one task on it for each connection held open."""

from __future__ import annotations

import asyncio
import atexit
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from agentkit.mcp.endpoints import Address, Command, Tail
from agentkit.mcp.untrusted import clean, clip
from agentkit.tool_calls import abandoned

if TYPE_CHECKING:
    import mcp
    import mcp_types

T = TypeVar("T")
Work = Callable[["mcp.Client"], Coroutine[Any, Any, T]]
CLOSE_S = 10.0  # seconds its end may take; the SDK closes stdin, then terminates, then kills
_POLL_S = 0.2  # a wait looks this often for whether anybody still wants its answer
_guard = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_sessions: set[Session] = set()
_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _running_loop() -> asyncio.AbstractEventLoop:
    global _loop
    with _guard:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            # A daemon: a server nobody closed must not keep the process from ending; `_end` closes it then.
            threading.Thread(target=_turn, args=(_loop,), name="agentkit-mcp", daemon=True).start()
        return _loop


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _submit(work: Coroutine[Any, Any, T]) -> Future[T]:
    return asyncio.run_coroutine_threadsafe(work, _running_loop())


@atexit.register
def _end() -> None:
    """Close what is open when the process ends, so that no server outlives it."""
    global _loop
    for session in list(_sessions):
        session.stop()
    for session in list(_sessions):
        session.wait()
    loop, _loop = _loop, None
    if loop is not None:
        loop.call_soon_threadsafe(loop.stop)


def _after_fork() -> None:
    """The thread and the connections are the parent's; a child makes its own."""
    global _guard, _loop
    _guard, _loop = threading.Lock(), None
    _sessions.clear()
    for connection in list(_connections):
        connection._lock, connection._session = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Session:
    """One session with a server, from its start to its end."""

    def __init__(self, where: Command | Address, start_s: float) -> None:
        self.ready: Future[mcp.Client] = Future()
        self.tail = Tail()
        self._stop = asyncio.Event()
        self._opening: Any = None  # the scope to cancel while it opens
        self._loop = _running_loop()
        _sessions.add(self)
        self._task = _submit(self._live(where, start_s))

    async def _live(self, where: Command | Address, start_s: float) -> None:
        """Open, wait to be stopped, close; all in one task, as the SDK's cancel scopes ask for."""
        import anyio
        import mcp

        try:
            with anyio.CancelScope(deadline=anyio.current_time() + start_s) as scope:
                self._opening = scope
                # No callbacks: what a server asks of us (sampling, elicitation, roots) is refused. No cache: it would be
                # the server that says how long we believe its listing.
                async with mcp.Client(where.transport(self.tail), cache=None, client_info=_client_info()) as client:
                    scope.deadline, self._opening = math.inf, None
                    self.tail.close()
                    self.ready.set_result(client)
                    await self._stop.wait()
            if not self.ready.done():
                raise TimeoutError("closed" if self._stop.is_set() else f"no answer within {start_s:g} s")
        except BaseException as e:
            if not self.ready.done():
                self.ready.set_exception(_first(e))
        finally:
            self.tail.close()
            _sessions.discard(self)

    def ask(self, deadline: Deadline, work: Work[T]) -> T:
        """The answer of `work`, once the server is there."""
        client = deadline.wait(self.ready, cancel=False)
        return deadline.wait(_submit(work(client)))

    @property
    def over(self) -> bool:
        """Whether it has ended, or was asked to."""
        return self._task.done() or self._stop.is_set()

    def stop(self) -> None:
        """Ask it to close."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._halt)

    def _halt(self) -> None:
        self._stop.set()
        if self._opening is not None:
            self._opening.cancel()

    def wait(self) -> None:
        """Until it is closed."""
        with suppress(BaseException):
            self._task.result(CLOSE_S)


def _client_info() -> mcp_types.Implementation:
    import mcp_types

    import agentkit

    return mcp_types.Implementation(name="agentkit", version=agentkit.__version__)


def _first(error: BaseException) -> BaseException:
    """What really happened, out of the groups that task groups wrap it in."""
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    return error


class Late(Exception):
    """The tool's time is up, or nobody waits for it any more."""


class Unreachable(Exception):
    """No connection; nothing was sent."""


class Deadline:
    """So many seconds from now for all that waits with it; None: for ever."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self._end = seconds, math.inf if seconds is None else time.monotonic() + seconds

    def wait(self, answer: Future[T], *, cancel: bool = True) -> T:
        """The answer; where time is up the request is cancelled, which tells the server, too."""
        try:
            while True:
                left = self._end - time.monotonic()
                with suppress(TimeoutError):
                    return answer.result(max(0.0, min(_POLL_S, left)))
                if answer.done():
                    return answer.result()
                if left <= 0 or abandoned():
                    raise Late(f"no answer within {self.seconds:g} s")
        except BaseException:
            if cancel:
                answer.cancel()
            raise


class Connection:
    """The connection to one server: opened at first use, again (once per use) where it is lost, until `close`."""

    def __init__(self, where: Command | Address, start_s: float) -> None:
        self.label = str(clean(where.label))
        self._where, self._start_s = where, start_s
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._at_end: weakref.finalize[..., Any] | None = None
        _connections.add(self)

    def reach(self, deadline: Deadline, work: Work[T]) -> tuple[Session, T]:
        """A session that has just done `work`, and its answer. A lost one is replaced, once."""
        session, new = self._current()
        while True:
            try:
                return session, session.ask(deadline, work)
            except Late:
                raise
            except Exception as e:
                self.drop(session)
                if new:
                    raise Unreachable(self.why(session, e)) from e
                session, new = self._current(lost=session)

    def _current(self, lost: Session | None = None) -> tuple[Session, bool]:
        """The session, and whether it is new; `lost` is replaced."""
        with self._lock:
            old = self._session
            if old is not None and old is not lost and not old.over:
                return old, False
            if old is not None:
                old.stop()
            session = self._session = Session(self._where, self._start_s)
            if self._at_end is not None:
                self._at_end.detach()
            self._at_end = weakref.finalize(self, session.stop)
            return session, True

    def drop(self, session: Session) -> None:
        """Give up a session that is lost; the next use opens another."""
        with self._lock:
            if self._session is session:
                self._session = None
        session.stop()

    def close(self) -> None:
        """End the session, and wait until it has ended."""
        with self._lock:
            session, self._session = self._session, None
        if session is not None:
            session.stop()
            session.wait()

    def why(self, session: Session, error: BaseException) -> str:
        """What went wrong, with the server's last words and without the secrets of its address."""
        if isinstance(error, FileNotFoundError) and isinstance(self._where, Command):
            return f"there is no program {self._where.command!r} here"
        address = getattr(self._where, "url", self.label)
        told = clean(str(error)).replace(address, self.label)
        return f"{type(error).__name__}: {clip(told)}{session.tail.said()}"
