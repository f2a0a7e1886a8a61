"""Trying a tool: time-out, repetition, circuit breaker, outbound rate limit, cache of reads."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from concurrent.futures import TimeoutError as NotDone
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from agentkit import clock
from agentkit.breaker import Breaker
from agentkit.jsonable import canonical
from agentkit.threads import begin

if TYPE_CHECKING:
    from cachetools import TTLCache

T = TypeVar("T")
FIRST_WAIT_S = 1.0  # before the second try; doubled before each further one
_CACHED = 1024  # results per tool; the oldest go first


class Overdue(Exception):
    """A try took longer than it may; the thread it runs on is left to itself."""


class Lease:
    """A try's right to call further tools and models; it ends with the try's time."""

    over = False


_lease: ContextVar[Lease | None] = ContextVar("agentkit_lease", default=None)


def abandoned() -> bool:
    """Whether this code belongs to a try that has been given up."""
    lease = _lease.get()
    return lease is not None and lease.over


def within(seconds: float, work: Callable[[], T]) -> T:
    """`work()` on a thread of its own, with this one's context variables.

    Raises:
        Overdue: it was not done in time. It cannot be stopped, but what it calls through a run from then on is refused.
    """
    lease = Lease()

    def leased() -> T:
        _lease.set(lease)  # in the thread's own context
        return work()

    done = begin(leased, "agentkit-tool")
    try:
        return done.result(seconds)
    except NotDone:
        if done.done():
            raise  # the work's own time-out
        raise Overdue(f"no answer within {seconds:g} s") from None
    finally:
        lease.over = not done.done()


class RateLimit:
    """At most `per_second` passes a second, evenly spaced after a burst of one second's worth (a token bucket)."""

    def __init__(self, per_second: float) -> None:
        self.per_second = per_second
        self._lock = threading.Lock()
        self._tokens = self._most = max(1.0, per_second)
        self._at = clock.monotonic()

    def wait_s(self) -> float:
        """Take a place; seconds until it is due."""
        with self._lock:
            now = clock.monotonic()
            passed = max(0.0, now - self._at)  # another clock, of a test, may have been put in place of the one before
            self._tokens = min(self._most, self._tokens + passed * self.per_second) - 1
            self._at = now
            return max(0.0, -self._tokens / self.per_second)

    def reset(self) -> None:
        """Forget the passes so far."""
        with self._lock:
            self._tokens, self._at = self._most, clock.monotonic()


class Line:
    """What the runs of one process share about a tool: circuit breaker, rate limit, cache."""

    def __init__(self, per_second: float | None, cache_s: float | None) -> None:
        self.breaker = Breaker()
        self.rate = None if per_second is None else RateLimit(per_second)
        self._lock = threading.Lock()
        self._cache: TTLCache[bytes, Any] | None = None
        if cache_s is not None:
            from cachetools import TTLCache

            self._cache = TTLCache(_CACHED, cache_s, timer=clock.monotonic)

    def reset(self) -> None:
        """As if the tool had never been called: circuit closed, no place taken, nothing kept."""
        self.breaker.reset()
        if self.rate is not None:
            self.rate.reset()
        if self._cache is not None:
            with self._lock:
                self._cache.clear()

    def cached(self, arguments: Any) -> tuple[Any] | None:
        """A copy of the kept result for these arguments, in a tuple of one, or None."""
        if self._cache is None:
            return None
        with self._lock:
            found = self._cache.get(canonical(arguments), self)
        return None if found is self else (copy.deepcopy(found),)

    def keep(self, arguments: Any, result: Any) -> None:
        """Keep a copy of a result, if this tool's are kept."""
        if self._cache is not None:
            with self._lock:
                self._cache[canonical(arguments)] = copy.deepcopy(result)


def transient(error: BaseException) -> bool:
    """Whether another try may help: a time-out or a connection that failed, here or in httpx."""
    if isinstance(error, Overdue | OSError | EOFError):
        return True
    httpx = sys.modules.get("httpx")
    return httpx is not None and isinstance(error, httpx.TransportError)
