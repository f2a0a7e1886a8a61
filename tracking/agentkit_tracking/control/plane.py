"""The control plane as runs see it: light until something was written to it."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from agentkit import clock
from agentkit.approvals import ApprovalRequest, Approver
from agentkit.budget import AMOUNTS, Budget, Ledger
from agentkit.control import Notice
from agentkit.errors import AgentkitError, Stopped
from agentkit_tracking.control.database import ControlError, Database, Place, database, place

if TYPE_CHECKING:
    from agentkit_tracking.control.approvals import Desk
    from agentkit_tracking.control.notices import Outbox
    from agentkit_tracking.control.stops import Stop, Stops

# How old a process's knowledge of the stops may be, seconds: the time within which a stop or its end holds everywhere. A
# second is less than an operator needs to look up, and a read (0.3 ms) each second costs a process nothing.
HOLDS_WITHIN_S = 1.0
_READ_AGAIN_S = 0.9  # a run looks at most 0.05 s later


_log = logging.getLogger("agentkit.notices")


class _Parts:
    """What is built on one control database, as it is needed."""

    def __init__(self, database: Database, heed: Callable[[ApprovalRequest], None]) -> None:
        self.database, self._heed = database, heed

    @cached_property
    def stops(self) -> Stops:
        from agentkit_tracking.control.stops import Stops

        return Stops(self.database)

    @cached_property
    def outbox(self) -> Outbox:
        from agentkit_tracking.control.notices import Outbox

        return Outbox(self.database)

    @cached_property
    def desk(self) -> Desk:
        from agentkit_tracking.control.approvals import Desk

        return Desk(self.database, self.outbox, heed=self._heed)


class ControlPlane:
    """Stops, daily budgets, notices and approvals of the present settings (entry point `agentkit.control`)."""

    def __init__(self) -> None:
        self._known: tuple[Place, float, tuple[Stop, ...] | str] | None = None  # read when; an error's text: closed
        self._parts_now: _Parts | None = None
        self._reading = threading.Lock()

    def stopped(self, system: str, release: str | None, agent: str | None, tool: str | None) -> str | None:
        """Why this must not go on (who stopped what, when and why), or None; at most `HOLDS_WITHIN_S` old.

        Raises:
            ControlError: whether it is stopped cannot be read, so nothing may run.
        """
        where, now, known = place(), clock.monotonic(), self._known
        if known is None or known[0] != where or not 0 <= now - known[1] < _READ_AGAIN_S:
            known = self._read_stops(where)
        if isinstance(known[2], str):
            raise ControlError(known[2])
        return next((str(s) for s in known[2] if s.target.covers(system, release, agent, tool)), None)

    def ledgers(
        self, system: str, user: str | None, daily: Budget | None, daily_per_user: Budget | None
    ) -> tuple[Ledger, ...]:
        """The day's ledgers of a system and of one of its users, shared by all processes; none where nothing is limited.

        Users are stored as a hash. Runs that name no user share one user's budget: leaving the name out gains nothing.
        """
        found: list[Ledger] = []
        if _limits(daily):
            found.append(self._ledger(f"system:{_sha(system)}", daily, system))
        if _limits(daily_per_user):
            scope = "anonymous" if user is None else _sha(f"{system}\n{user}")
            name = f"a user of {system}" if user is not None else f"the unnamed users of {system}"
            found.append(self._ledger(f"user:{_sha(system)}:{scope}", daily_per_user, name))
        return tuple(found)

    def notify(self, notice: Notice) -> None:
        """Keep, log and send a notice; returns after a database write and raises nothing."""
        try:
            self._parts.outbox.notify(notice)
        except Exception:  # a home that cannot be made, say: the run goes on
            _log.exception("a notice could not be kept: %r", notice.text)

    @property
    def desk(self) -> Desk:
        """The approvals desk."""
        return self._parts.desk

    @property
    def stops(self) -> Stops:
        """The stops, to add to."""
        return self._parts.stops

    @property
    def outbox(self) -> Outbox:
        """The notices."""
        return self._parts.outbox

    def approver(self) -> Approver:
        """Asks people through the desk, and waits."""
        return lambda request: self.desk.wait(request)

    def forget(self) -> None:
        """Read the stops anew at the next call; after this process has changed them itself."""
        self._known = None

    # ---- inside

    @property
    def _parts(self) -> _Parts:
        current = database()
        parts = self._parts_now
        if parts is None or parts.database is not current:
            parts = self._parts_now = _Parts(current, self._heed_stops)
        return parts

    def _read_stops(self, where: Place) -> tuple[Place, float, tuple[Stop, ...] | str]:
        with self._reading:  # the others wait: what they know is too old to go by
            known, now = self._known, clock.monotonic()
            if known is not None and known[0] == where and 0 <= now - known[1] < _READ_AGAIN_S:
                return known
            found: tuple[Stop, ...] | str
            try:
                found = self._parts.stops.in_force() if database().exists() else ()
            except AgentkitError as e:
                found = str(e)
            self._known = where, now, found
            return self._known

    def _heed_stops(self, request: ApprovalRequest) -> None:
        """End a wait whose run is stopped meanwhile."""
        if reason := self.stopped(request.system, request.release, request.agent, request.tool):
            raise Stopped(reason)

    def _ledger(self, scope: str, budget: Budget | None, name: str) -> Ledger:
        from agentkit_tracking.control.daily import SharedLedger

        assert budget is not None
        return SharedLedger(self._parts.database, scope, budget, name)


def _limits(budget: Budget | None) -> bool:
    return budget is not None and any(getattr(budget, name) is not None for name in AMOUNTS)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
