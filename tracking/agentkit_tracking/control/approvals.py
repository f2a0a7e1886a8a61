"""The approvals desk: questions to people, kept with their answers in the control database, so that they survive restarts.

A question is one row per call of a run. An answer is a signed statement that holds the hash of all that was asked: it fits no
other question, and none that was changed afterwards. Who waits checks the signature and that the call is still the one it
is about to make; a row that somebody else wrote into the database decides nothing.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import Connection, Row, select

from agentkit import clock
from agentkit.approvals import ApprovalRequest, Approver, Decision, Verdict
from agentkit.control import Notice
from agentkit.errors import TrustError, UsageError
from agentkit.jsonable import jsonable
from agentkit_tracking.control.card import REASON, card, clip, visible
from agentkit_tracking.control.database import Database, stamp
from agentkit_tracking.control.decisions import (
    STATUS,
    Approval,
    Status,
    asked_digest,
    checked,
    decided,
    is_same_call,
    judged,
    read_row,
    request_of,
    request_text,
    settled,
    sha,
    sign_decision,
)
from agentkit_tracking.control.notices import Outbox, put
from agentkit_tracking.control.tables import APPROVALS, REFUSED, insert_new
from agentkit_tracking.keys import load_trust
from agentkit_tracking.statements import Digest

__all__ = ["POLL_S", "Approval", "Desk", "decided", "desk_approver"]

HOURS_ENV = "AGENTKIT_APPROVAL_HOURS"
DEFAULT_HOURS = 24.0  # a working day and the night before it
POLL_S = 0.5  # a decision is acted on within this time
_LETTERS = "23456789abcdefghjkmnpqrstuvwxyz"  # none that is read as another
_ID_LENGTH = 8
_log = logging.getLogger(__name__)


class Desk:
    """The approvals in a control database.

    Args:
        hours: how long a question waits before it counts as rejected; default: `AGENTKIT_APPROVAL_HOURS` or 24.
        heed: called while waiting; what it raises ends the wait (the control plane raises for stops here).
    """

    def __init__(
        self,
        database: Database,
        outbox: Outbox | None = None,
        *,
        hours: float | None = None,
        heed: Callable[[ApprovalRequest], None] | None = None,
    ) -> None:
        self._database, self._outbox, self._heed = database, outbox or Outbox(database), heed
        self._hours = hours
        self._asked_here: dict[str, Digest] = {}  # what this process asked, whatever the database says meanwhile

    # ---- who asks

    def ask(self, request: ApprovalRequest) -> str:
        """Put a question, once per call of a run; returns its id.

        Raises:
            UsageError: the same call of this run was asked with other arguments.
            ControlError: it could not be written.
        """
        values = {name: jsonable(value) for name, value in request.arguments.items()}
        request = replace(request, key=request.key or secrets.token_hex(16), arguments=values)
        with self._database.writing() as connection:
            if (row := self._of_call(connection, request)) is not None:
                return str(row.id)
            approval = self._insert(connection, request)
            notice = Notice("approval", request.run_id, request.system, _headline(approval), _details(approval))
            put(connection, notice)
        self._outbox.announce(notice)
        return approval.id

    def decision(self, identity: str, request: ApprovalRequest | None = None) -> Decision | None:
        """The answer, or None while there is none that counts. One that has expired is rejected, and recorded so.

        Args:
            request: the call about to be made; the row must ask about exactly this one.

        Raises:
            TrustError: the row asks about another call than `request`; it was altered.
            UsageError: there is no such approval.
        """
        row = self._row(identity)
        approval = read_row(row, load_trust())
        asked = asked_digest(row.id, row.request, row.created_at, row.expires_at)
        is_other_call = request is not None and not is_same_call(approval.request, request)
        if is_other_call or self._asked_here.get(identity, asked) != asked:
            raise TrustError(
                f"approval {identity} was altered in the control database: it is not what run {row.run_id} asked; "
                "nothing was called"
            )
        if approval.problem:
            self._refuse(row, approval.problem)
        if approval.decision is None and approval.expires_at <= clock.utc():
            return self._expire(row)
        return approval.decision

    def wait(
        self, request: ApprovalRequest, poll_s: float = POLL_S, heed: Callable[[], None] | None = None
    ) -> Decision:
        """Ask, and wait for the answer: for hours, and after a restart again where the call has a key.

        Args:
            poll_s: seconds between two looks.
            heed: called before every look; what it raises ends the wait, and the question stays.
        """
        request = replace(request, key=request.key or secrets.token_hex(16))
        identity = self.ask(request)
        heed = heed or (partial(self._heed, request) if self._heed else None)
        while True:
            if heed is not None:
                heed()
            if (found := self.decision(identity, request)) is not None:
                return found
            clock.sleep(poll_s)

    # ---- who decides

    def waiting(self) -> list[Approval]:
        """What needs a decision, the one that expires first at the top. Records those that have expired."""
        now = stamp(clock.utc())
        self._expire_all(now)
        with self._database.reading() as connection:
            rows = connection.execute(select(APPROVALS).where(APPROVALS.c.expires_at > now)).all()
        return sorted((a for a in _read_all(rows) if a.decision is None), key=lambda a: a.expires_at)

    def all(self, limit: int = 100) -> list[Approval]:
        """The newest, decided ones included."""
        with self._database.reading() as connection:
            rows = connection.execute(select(APPROVALS).order_by(APPROVALS.c.created_at.desc()).limit(limit)).all()
        return _read_all(rows)

    def get(self, prefix: str) -> Approval:
        """The approval whose id begins so.

        Raises:
            UsageError: none or several do.
        """
        wanted = prefix.strip().lower()
        known = wanted and set(wanted) <= set(_LETTERS)
        with self._database.reading() as connection:
            query = select(APPROVALS).where(APPROVALS.c.id.like(f"{wanted}%")).limit(2)
            rows = connection.execute(query).all() if known else []
        if len(rows) != 1:
            count = "no approval begins" if not rows else "several approvals begin"
            raise UsageError(f"{count} with {prefix!r}; see `agentkit approvals list --all`")
        return read_row(rows[0], load_trust())

    def decide(
        self,
        identity: str,
        verdict: Verdict,
        reason: str = "",
        arguments: dict[str, Any] | None = None,
        *,
        shown: Approval | None = None,
    ) -> Decision:
        """Sign and record a decision.

        Args:
            arguments: of `modify`: all arguments, by the names that were asked, as they shall be.
            shown: the approval as the person saw it; if it has changed since, nothing is signed.

        Raises:
            TrustError: the question is not the one that was shown.
            UsageError: it is decided (by whom is said) or has expired; a rejection or a change without a reason; a
                change that changes nothing or names other arguments; no key to sign with.
        """
        row = self._row(identity)
        approval = read_row(row, load_trust())
        now = clock.utc()
        if shown is not None and (shown.id, request_text(shown.request)) != (identity, request_text(approval.request)):
            raise TrustError(f"approval {identity} was altered after it was shown to you; look at it again")
        if approval.decision is not None or approval.expires_at <= now:
            raise UsageError(f"approval {identity} is decided: {decided(settled(approval))}")
        reason, arguments = checked(approval, verdict, reason, arguments)
        envelope = sign_decision(row, approval, verdict, reason, arguments, now)
        if approval.problem:
            self._refuse(row, approval.problem)
        if not self._swap(row, STATUS[verdict], envelope, now):
            raise UsageError(f"approval {identity} is decided: {decided(self.get(identity))}")
        return judged(self._row(identity), load_trust())

    # ---- rows

    def _row(self, identity: str) -> Row[Any]:
        with self._database.reading() as connection:
            row = connection.execute(select(APPROVALS).where(APPROVALS.c.id == identity)).one_or_none()
        if row is None:
            raise UsageError(f"there is no approval {identity!r}; see `agentkit approvals list --all`")
        return row

    def _of_call(self, connection: Connection, request: ApprovalRequest) -> Row[Any] | None:
        where = APPROVALS.c.run_id == request.run_id, APPROVALS.c.call_key == sha(request.key)
        row = connection.execute(select(APPROVALS).where(*where)).one_or_none()
        if row is not None and not is_same_call(request_of(row.request), request):
            raise UsageError(
                f"run {request.run_id} asked about call {request.key!r} before, with other arguments (approval {row.id}); "
                "a call keeps its arguments, or gets another key"
            )
        return row

    def _insert(self, connection: Connection, request: ApprovalRequest) -> Approval:
        now = clock.utc()
        expires_at = now + timedelta(hours=self._hours if self._hours is not None else _hours())
        asked = request_text(request)
        while True:
            identity = "".join(secrets.choice(_LETTERS) for _ in range(_ID_LENGTH))
            values = {
                "id": identity,
                "run_id": request.run_id,
                "call_key": sha(request.key),
                "request": asked,
                "created_at": stamp(now),
                "expires_at": stamp(expires_at),
                "status": "waiting",
            }
            if insert_new(connection, APPROVALS, **values):
                self._asked_here[identity] = asked_digest(identity, asked, stamp(now), stamp(expires_at))
                return Approval(identity, request, now, expires_at, "waiting")
            if (row := self._of_call(connection, request)) is not None:  # PostgreSQL: somebody else was faster
                return read_row(row, load_trust())

    def _swap(self, row: Row[Any], status: Status, envelope: str | None, now: datetime) -> bool:
        """Set the outcome of a row that is still as it was read: of two deciders one finds it changed."""
        before = APPROVALS.c.decision.is_(None) if row.decision is None else APPROVALS.c.decision == row.decision
        where = [APPROVALS.c.id == row.id, APPROVALS.c.status == row.status, APPROVALS.c.request == row.request, before]
        where.append(
            APPROVALS.c.expires_at <= stamp(now) if status == "expired" else APPROVALS.c.expires_at > stamp(now)
        )
        with self._database.writing() as connection:
            update = APPROVALS.update().where(*where).values(status=status, decision=envelope)
            return bool(connection.execute(update).rowcount)

    def _expire(self, row: Row[Any]) -> Decision | None:
        self._swap(row, "expired", None, clock.utc())  # unless another process did so, or decided, at this moment
        return read_row(self._row(row.id), load_trust()).decision

    def _expire_all(self, now: str) -> None:
        is_over = APPROVALS.c.status == "waiting", APPROVALS.c.expires_at <= now
        with self._database.reading() as connection:
            if connection.execute(select(APPROVALS.c.id).where(*is_over).limit(1)).first() is None:
                return
        with self._database.writing() as connection:
            connection.execute(APPROVALS.update().where(*is_over).values(status="expired"))

    def _refuse(self, row: Row[Any], problem: str) -> None:
        """Keep a decision that does not count, once, as evidence; and tell people."""
        digest = sha(f"{row.status}\n{row.request}\n{row.expires_at}\n{row.decision}")
        values = {"approval_id": row.id, "sha256": digest, "at": stamp(clock.utc()), "decision": row.decision}
        with self._database.reading() as connection:
            known = (REFUSED.c.approval_id == row.id) & (REFUSED.c.sha256 == digest)
            if connection.execute(select(REFUSED.c.at).where(known)).first() is not None:
                return
        with self._database.writing() as connection:
            is_new = insert_new(connection, REFUSED, **values, problem=problem)
        if is_new:
            text = f"a decision stored for approval {row.id} was refused: {problem}"
            self._outbox.notify(Notice("approval", row.run_id, "", text, {"approval": row.id, "problem": problem}))


def desk_approver() -> Approver:
    """The approver that puts every question to the desk of the present settings and waits; a stop ends the wait."""
    from agentkit_tracking.control.plane import ControlPlane

    return ControlPlane().approver()


def _read_all(rows: Iterable[Row[Any]]) -> list[Approval]:
    """Rows, without those that cannot be read: one damaged row must not hide the others."""
    found = []
    for row in rows:
        try:
            found.append(read_row(row, load_trust()))
        except TrustError as e:
            _log.error("%s", e)
    return found


def _hours() -> float:
    given = os.environ.get(HOURS_ENV)
    try:
        hours = DEFAULT_HOURS if not given else float(given)
        if not 0 < hours <= 24 * 365:
            raise ValueError
    except ValueError:
        raise UsageError(f"{HOURS_ENV} must be a number of hours above 0, got {given!r}") from None
    return hours


def _headline(approval: Approval) -> str:
    request = approval.request
    reason = clip(visible(request.reason), REASON)
    return f"{request.agent} waits for a decision about {request.tool} ({reason}): approval {approval.id}"


def _details(approval: Approval) -> dict[str, Any]:
    return {
        "approval": approval.id,
        "agent": approval.request.agent,
        "tool": approval.request.tool,
        "expires_at": stamp(approval.expires_at),
        "card": card(approval),
    }
