"""Budgets of a day, shared by every process: one row per scope and UTC day, changed by one conditional UPDATE."""

from __future__ import annotations

import logging
import math
from collections import deque
from typing import Any

from sqlalchemy import and_, select, true

from agentkit import clock
from agentkit.budget import AMOUNTS, Budget, Ledger
from agentkit.errors import BudgetExceeded
from agentkit_tracking.control.database import ControlError, Database
from agentkit_tracking.control.tables import USE, insert_new

_SLACK = 1e-9  # of adding and taking off decimal fractions thousands of times a day
_log = logging.getLogger(__name__)


class DailyBudgetExceeded(BudgetExceeded):
    """The day's budget of a scope would have been crossed; `limit` names the amount, `day` is UTC."""

    def __init__(self, limit: str, allowed: float, used: float, asked: float, *, scope: str, day: str) -> None:
        super().__init__(f"{limit} a day for {scope} on {day} (UTC)", allowed, used, asked)
        self.limit, self.scope, self.day = limit, scope, day


class SharedLedger(Ledger):
    """A day's ledger, kept in the control database.

    What is reserved counts at once, in every process. A process that dies between `reserve` and `settle` leaves its
    reservation counted until the day ends: too little is spent then, never too much.

    Args:
        budget: limits for one UTC day; `seconds` does not apply.
        scope: whose day it is, as stored; `name` is how messages call it.
    """

    def __init__(self, database: Database, scope: str, budget: Budget, name: str) -> None:
        super().__init__(budget)
        self.scope, self.name = scope, name
        self._database = database
        self._limited = {n: limit for n in AMOUNTS if (limit := getattr(budget, n)) is not None}
        self._open: dict[tuple[tuple[str, float], ...], deque[str]] = {}  # what was reserved: on which days

    @property
    def used(self) -> dict[str, float]:
        """Amounts used today, by all processes, reservations included.

        Raises:
            ControlError: the database cannot be read.
        """
        with self._database.reading() as connection:
            row = connection.execute(select(USE).where(self._today(_day()))).one_or_none()
        return {name: float(getattr(row, name)) if row else 0.0 for name in AMOUNTS}

    @property
    def seconds_left(self) -> float:
        """Infinite: a day has no wall-time limit for one call."""
        return math.inf

    def left(self, name: str) -> float:
        """How much of `name` can still be reserved today; infinite when there is no limit."""
        limit = self._limited.get(name)
        return math.inf if limit is None else limit - self.used[name]

    def excuse(self, seconds: float) -> None:
        """Nothing: waiting costs a day nothing."""

    def limits(self, name: str) -> bool:
        """Whether `name` is limited."""
        return name in self._limited

    def reserve(self, **amounts: float) -> None:
        """Set `amounts` aside, all of them or none.

        Raises:
            DailyBudgetExceeded: some limit would be crossed.
            ControlError: the database cannot be written; nothing has been set aside.
        """
        day = _day()
        with self._database.writing() as connection:
            more = {name: USE.c[name] + amount for name, amount in amounts.items()}
            fits = and_(
                true(), *(more[name] <= limit + _SLACK for name, limit in self._limited.items() if name in amounts)
            )
            update = USE.update().where(self._today(day), fits).values(more)
            if not connection.execute(update).rowcount:
                insert_new(connection, USE, scope=self.scope, day=day, **dict.fromkeys(AMOUNTS, 0.0))
                if not connection.execute(update).rowcount:
                    row = connection.execute(select(USE).where(self._today(day))).one()
                    raise self._exceeded(row, amounts, day)
        with self._lock:
            self._open.setdefault(_named(amounts), deque()).append(day)

    def settle(self, reserved: dict[str, float], actual: dict[str, float]) -> None:
        """Replace a reservation by what was really used, on the day on which it was made; NaN leaves it as reserved.

        A database that cannot be written fails no run whose call is done: the reservation stays counted.
        """
        changes = {
            name: (0.0 if math.isnan(used) else used - reserved.get(name, 0.0))
            for name in reserved.keys() | actual.keys()
            for used in [actual.get(name, 0.0)]
        }
        with self._lock:
            days = self._open.get(_named(reserved))
            day = days.popleft() if days else _day()
        changes = {name: change for name, change in changes.items() if change}
        if not changes:
            return
        try:
            with self._database.writing() as connection:
                connection.execute(
                    USE.update().where(self._today(day)).values({n: USE.c[n] + change for n, change in changes.items()})
                )
        except ControlError as e:
            _log.warning("%s on %s: what was reserved stays counted; %s", self.name, day, e)

    def _today(self, day: str) -> Any:
        return and_(USE.c.scope == self.scope, USE.c.day == day)

    def _exceeded(self, row: Any, amounts: dict[str, float], day: str) -> DailyBudgetExceeded:
        # A row that another process gave back to meanwhile crosses no limit any more: then the tightest is named.
        name = max(
            (n for n in amounts if n in self._limited),
            key=lambda n: getattr(row, n) + amounts[n] - self._limited[n],
        )
        used = float(getattr(row, name))
        return DailyBudgetExceeded(name, self._limited[name], used, amounts[name], scope=self.name, day=day)


def _day() -> str:
    return clock.utc().date().isoformat()


def _named(amounts: dict[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(amounts.items()))
