"""Hard limits on one run (or one evaluation): reserved before a call, settled after it."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, fields

from agentkit.errors import BudgetExceeded


@dataclass(frozen=True)
class Budget:
    """Upper limits; `None` means unlimited."""

    model_calls: float | None = 20  # requests, those repeated after a failure included
    tool_calls: float | None = 50
    tokens_in: float | None = 100_000
    tokens_out: float | None = 50_000
    usd: float | None = None
    seconds: float | None = 300  # wall time since the ledger was opened

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and not value >= 0:
                raise ValueError(f"Budget.{f.name} must be None or a number >= 0, got {value!r}")


class Ledger:
    """What has been reserved and used of one budget. Safe to share between threads.

    A call first reserves an upper estimate, which counts as used until `settle` replaces it by what the call
    really took; so concurrent calls cannot pass a limit together that they would not pass one by one. A ledger
    with a parent passes every movement on, which is how an evaluation caps the sum of its runs.
    """

    def __init__(self, budget: Budget, parent: Ledger | None = None) -> None:
        self.budget = budget
        self._parent = parent
        self._lock = threading.Lock()
        self._used: dict[str, float] = {f.name: 0.0 for f in fields(Budget) if f.name != "seconds"}
        self._opened = time.monotonic()

    @property
    def used(self) -> dict[str, float]:
        """Amounts used so far, reservations included, plus `seconds` since opening."""
        with self._lock:
            return {**self._used, "seconds": time.monotonic() - self._opened}

    @property
    def seconds_left(self) -> float:
        """Wall time until the nearest deadline, its own or of a ledger above; infinite when there is none."""
        above = math.inf if self._parent is None else self._parent.seconds_left
        if self.budget.seconds is None:
            return above
        return min(above, self.budget.seconds - (time.monotonic() - self._opened))

    def limits(self, name: str) -> bool:
        """Whether `name` is limited here or in a ledger above."""
        return getattr(self.budget, name) is not None or (self._parent is not None and self._parent.limits(name))

    def reserve(self, **amounts: float) -> None:
        """Set `amounts` aside.

        Raises:
            BudgetExceeded: some limit would be crossed; nothing has been set aside.
        """
        elapsed = time.monotonic() - self._opened
        if self.budget.seconds is not None and elapsed >= self.budget.seconds:
            raise BudgetExceeded("seconds", self.budget.seconds, elapsed, 0)
        with self._lock:
            for name, amount in amounts.items():
                limit = getattr(self.budget, name)
                if limit is not None and self._used[name] + amount > limit + 1e-12:
                    raise BudgetExceeded(name, limit, self._used[name], amount)
            if self._parent is not None:
                self._parent.reserve(**amounts)
            for name, amount in amounts.items():
                self._used[name] += amount

    def settle(self, reserved: dict[str, float], actual: dict[str, float]) -> None:
        """Replace a reservation by what was really used; an amount nobody knows (NaN) stays as it was reserved."""
        actual = {name: reserved.get(name, 0.0) if math.isnan(x) else x for name, x in actual.items()}
        with self._lock:
            for name in reserved.keys() | actual.keys():
                self._used[name] += actual.get(name, 0.0) - reserved.get(name, 0.0)
        if self._parent is not None:
            self._parent.settle(reserved, actual)
