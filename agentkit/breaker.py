"""A circuit breaker: after several failures in a row, calls fail at once until a trial call succeeds.

Our own because pybreaker 1.4 holds its lock for the length of a call, so that parallel calls would queue, and its clock
cannot be replaced. The pattern is from M. Nygard, "Release It!" (2007), chapter 5.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from agentkit import clock

T = TypeVar("T")


class CircuitOpen(Exception):
    """The call was not made; `retry_after` seconds from now one will be tried."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"too many failures in a row; the next try is in {retry_after:.0f} s")
        self.retry_after = retry_after


class Breaker:
    """Counts failures in a row. Safe to share between threads.

    Args:
        failures: in a row, from which on the circuit is open.
        reset_s: seconds until one trial call is let through; others still fail at once while it runs.
    """

    def __init__(self, failures: int = 5, reset_s: float = 30.0) -> None:
        self.failures, self.reset_s = failures, reset_s
        self._lock = threading.Lock()
        self._count = 0
        self._open_until = 0.0  # monotonic; the trial call is due then

    @property
    def is_open(self) -> bool:
        """Whether calls fail at once just now."""
        return self._count >= self.failures and clock.monotonic() < self._open_until

    def reset(self) -> None:
        """Close the circuit and forget the failures."""
        self._count = 0

    def call(self, work: Callable[[], T], counts: Callable[[BaseException], bool] = lambda error: True) -> T:
        """`work()`, unless the circuit is open; `counts` says which errors are the callee's failures.

        Raises:
            CircuitOpen: `work` was not called.
        """
        if self._count >= self.failures:
            self._admit_trial()
        try:
            result = work()
        except BaseException as e:
            if counts(e):
                self._failed()
            raise
        self._count = 0
        return result

    def _admit_trial(self) -> None:
        with self._lock:
            left = self._open_until - clock.monotonic()
            if left > 0:
                raise CircuitOpen(left)
            self._open_until = clock.monotonic() + self.reset_s

    def _failed(self) -> None:
        with self._lock:
            self._count += 1
            if self._count >= self.failures:
                self._open_until = clock.monotonic() + self.reset_s
