"""Time, through one seam: `agentkit.testing.FakeClock` replaces it, so that no test waits for real seconds."""

from __future__ import annotations

import time
from datetime import UTC, datetime


class Clock:
    """The real one."""

    def monotonic(self) -> float:
        """Seconds that never go back; for durations and deadlines in one process."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)

    def utc(self) -> datetime:
        """Wall-clock time; for what is kept or compared between processes."""
        return datetime.now(UTC)


_clock = Clock()


def monotonic() -> float:
    """`Clock.monotonic` of the clock in use."""
    return _clock.monotonic()


def sleep(seconds: float) -> None:
    """`Clock.sleep` of the clock in use."""
    _clock.sleep(seconds)


def utc() -> datetime:
    """`Clock.utc` of the clock in use."""
    return _clock.utc()


def use(clock: Clock) -> Clock:
    """Put `clock` in place of the one in use, which is returned. For tests; it holds for the whole process."""
    global _clock
    before, _clock = _clock, clock
    return before
