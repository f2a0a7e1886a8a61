"""Hard limits on one run, one evaluation, one day: reserved before a call, settled after it."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, fields

from agentkit import clock
from agentkit.errors import BudgetExceeded


@dataclass(frozen=True)
class Budget:
    """Upper limits; `None` means unlimited."""

    model_calls: float | None = 20  # requests, those repeated after a failure included
    tool_calls: float | None = 50  # tries and fallbacks included
    tokens_in: float | None = 100_000
    tokens_out: float | None = 50_000
    usd: float | None = None  # of models and of tools that cost
    seconds: float | None = 300  # wall time since the ledger was opened

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and not value >= 0:
                raise ValueError(f"Budget.{f.name} must be None or a number >= 0, got {value!r}")

    @classmethod
    def unlimited(cls) -> Budget:
        """A budget without any limit, to set single ones with `dataclasses.replace`."""
        return cls(**{f.name: None for f in fields(cls)})


@dataclass(frozen=True)
class DailyBudget(Budget):
    """Upper limits of a UTC day; nothing is limited but what is named."""

    model_calls: float | None = None
    tool_calls: float | None = None
    tokens_in: float | None = None
    tokens_out: float | None = None
    usd: float | None = None
    seconds: None = None  # of no meaning for a day


AMOUNTS = tuple(f.name for f in fields(Budget) if f.name != "seconds")


class Ledger:
    """What has been reserved and used of one budget. Safe to share between threads.

    A call first reserves an upper estimate, which counts as used until `settle` replaces it by what the call
    really took; so concurrent calls cannot pass a limit together that they would not pass one by one. A ledger
    with parents passes every movement on, which is how an evaluation caps the sum of its runs, an orchestrator that
    of its agents, and a day that of all processes.
    """

    def __init__(self, budget: Budget, *parents: Ledger) -> None:
        self.budget = budget
        self._parents = parents
        self._lock = threading.Lock()
        self._used: dict[str, float] = dict.fromkeys(AMOUNTS, 0.0)
        self._opened = clock.monotonic()

    @property
    def used(self) -> dict[str, float]:
        """Amounts used so far, reservations included, plus `seconds` since opening."""
        with self._lock:
            return {**self._used, "seconds": clock.monotonic() - self._opened}

    @property
    def share(self) -> tuple[float, str]:
        """The largest used share of any limit of this ledger itself (0 to 1 and above), and of which."""
        used = self.used
        shares = [
            (float(used[name] > 0) if limit == 0 else used[name] / limit, name)
            for name in used
            if (limit := getattr(self.budget, name)) is not None
        ]
        return max(shares, default=(0.0, ""))

    @property
    def seconds_left(self) -> float:
        """Wall time until the nearest deadline, its own or of a ledger above; infinite when there is none."""
        own = math.inf if self.budget.seconds is None else self.budget.seconds - (clock.monotonic() - self._opened)
        return min([own, *(parent.seconds_left for parent in self._parents)])

    def left(self, name: str) -> float:
        """How much of `name` can still be reserved, here and in the ledgers above; infinite when there is no limit."""
        limit = getattr(self.budget, name)
        own = math.inf if limit is None else limit - self._used[name]
        return min([own, *(parent.left(name) for parent in self._parents)])

    def excuse(self, seconds: float) -> None:
        """Take `seconds` of waiting off the wall time used, here and above; negative seconds are added."""
        self._opened = min(self._opened + seconds, clock.monotonic())  # waits side by side do not add up
        for parent in self._parents:
            parent.excuse(seconds)

    def limits(self, name: str) -> bool:
        """Whether `name` is limited here or in a ledger above."""
        return getattr(self.budget, name) is not None or any(parent.limits(name) for parent in self._parents)

    def reserve(self, **amounts: float) -> None:
        """Set `amounts` aside.

        Raises:
            BudgetExceeded: some limit would be crossed; nothing has been set aside.
        """
        elapsed = clock.monotonic() - self._opened
        if self.budget.seconds is not None and elapsed >= self.budget.seconds:
            raise BudgetExceeded("seconds", self.budget.seconds, elapsed, 0)
        with self._lock:
            for name, amount in amounts.items():
                if not amount >= 0:
                    raise ValueError(f"expected {name} of 0 or more to reserve, got {amount!r}")
                limit = getattr(self.budget, name)
                if limit is not None and self._used[name] + amount > limit + 1e-12:
                    raise BudgetExceeded(name, limit, self._used[name], amount)
            self._reserve_above(amounts)
            for name, amount in amounts.items():
                self._used[name] += amount

    def _reserve_above(self, amounts: dict[str, float]) -> None:
        for i, parent in enumerate(self._parents):
            try:
                parent.reserve(**amounts)
            except BaseException:
                for before in self._parents[:i]:
                    before.settle(amounts, {})
                raise

    def settle(self, reserved: dict[str, float], actual: dict[str, float]) -> None:
        """Replace a reservation by what was really used; an amount nobody knows (NaN) stays as it was reserved."""
        actual = {
            name: reserved.get(name, 0.0) if x != x else x for name, x in actual.items()
        }  # only NaN is not itself
        used = self._used
        with self._lock:
            for name, amount in reserved.items():
                used[name] -= amount
            for name, amount in actual.items():
                used[name] += amount
        for parent in self._parents:
            parent.settle(reserved, actual)
