"""The approvals desk: questions to people that survive restarts, and answers that are signed.

A question is one row per call of a run. An answer is a signed statement that holds the hash of all that was asked: it fits no
other question, and none that was changed afterwards. Who waits checks the signature and that the call is still the one it
is about to make; a row that somebody else wrote into the database decides nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field
from sqlalchemy import Connection, Row, select

from agentkit import clock
from agentkit.approvals import ApprovalRequest, Approver, Decision, Verdict
from agentkit.control import Notice
from agentkit.errors import TrustError, UsageError
from agentkit.jsonable import jsonable
from agentkit_tracking.control.card import REASON, card, clip, visible
from agentkit_tracking.control.database import Database, stamp, unstamp
from agentkit_tracking.control.notices import Outbox, put
from agentkit_tracking.control.stops import NO_RELEASE, named
from agentkit_tracking.control.tables import APPROVALS, REFUSED, insert_new
from agentkit_tracking.home import author
from agentkit_tracking.keys import Trust, load_trust, signing_key
from agentkit_tracking.statements import Digest, Statement, check, day, read, sign, signer

HOURS_ENV = "AGENTKIT_APPROVAL_HOURS"
DEFAULT_HOURS = 24.0  # a working day and the night before it
POLL_S = 0.5  # a decision is acted on within this time
_LETTERS = "23456789abcdefghjkmnpqrstuvwxyz"  # none that is read as another
_ID_LENGTH = 8
_WHY_LENGTH = 1000
_log = logging.getLogger(__name__)
Status = Literal["waiting", "approved", "modified", "rejected", "expired"]
_STATUS: dict[Verdict, Status] = {"approve": "approved", "modify": "modified", "reject": "rejected"}


class HumanDecision(Statement):
    """The signer decided about one call of one run."""

    predicate_type: ClassVar[str] = "urn:agentkit:decision:v1"

    approval: str
    run_id: str
    key: str
    tool: str
    asked: Digest = Field(description="of all that was asked and shown, with when and until when")
    arguments_asked: Digest = Field(description="of the arguments asked about, as canonical JSON")
    verdict: Verdict
    arguments: dict[str, Any] | None = Field(description="of a modification: those approved instead")
    who: str = Field(max_length=200)
    why: str = Field(max_length=_WHY_LENGTH)


@dataclass(frozen=True)
class Approval:
    """A question and, once there is one that counts, its answer.

    `problem` says why a decision that is stored does not count; such an approval still waits.
    """

    id: str
    request: ApprovalRequest
    created_at: datetime
    expires_at: datetime
    status: Status
    decision: Decision | None = None
    problem: str = ""


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
        approval = _read(row, load_trust())
        asked = _asked(row.id, row.request, row.created_at, row.expires_at)
        is_other_call = request is not None and not _is_same_call(approval.request, request)
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
        return _read(rows[0], load_trust())

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
        approval = _read(row, load_trust())
        now = clock.utc()
        if shown is not None and (shown.id, _text(shown.request)) != (identity, _text(approval.request)):
            raise TrustError(f"approval {identity} was altered after it was shown to you; look at it again")
        if approval.decision is not None or approval.expires_at <= now:
            raise UsageError(f"approval {identity} is decided: {decided(_settled(approval))}")
        reason, arguments = _checked(approval, verdict, reason, arguments)
        envelope = self._sign(row, approval, verdict, reason, arguments, now)
        if approval.problem:
            self._refuse(row, approval.problem)
        if not self._swap(row, _STATUS[verdict], envelope, now):
            raise UsageError(f"approval {identity} is decided: {decided(self.get(identity))}")
        return _judged(self._row(identity), load_trust())

    # ---- rows

    def _row(self, identity: str) -> Row[Any]:
        with self._database.reading() as connection:
            row = connection.execute(select(APPROVALS).where(APPROVALS.c.id == identity)).one_or_none()
        if row is None:
            raise UsageError(f"there is no approval {identity!r}; see `agentkit approvals list --all`")
        return row

    def _of_call(self, connection: Connection, request: ApprovalRequest) -> Row[Any] | None:
        where = APPROVALS.c.run_id == request.run_id, APPROVALS.c.call_key == _sha(request.key)
        row = connection.execute(select(APPROVALS).where(*where)).one_or_none()
        if row is not None and not _is_same_call(_request(row.request), request):
            raise UsageError(
                f"run {request.run_id} asked about call {request.key!r} before, with other arguments (approval {row.id}); "
                "a call keeps its arguments, or gets another key"
            )
        return row

    def _insert(self, connection: Connection, request: ApprovalRequest) -> Approval:
        now = clock.utc()
        expires_at = now + timedelta(hours=self._hours if self._hours is not None else _hours())
        asked = _text(request)
        while True:
            identity = "".join(secrets.choice(_LETTERS) for _ in range(_ID_LENGTH))
            values = {
                "id": identity,
                "run_id": request.run_id,
                "call_key": _sha(request.key),
                "request": asked,
                "created_at": stamp(now),
                "expires_at": stamp(expires_at),
                "status": "waiting",
            }
            if insert_new(connection, APPROVALS, **values):
                self._asked_here[identity] = _asked(identity, asked, stamp(now), stamp(expires_at))
                return Approval(identity, request, now, expires_at, "waiting")
            if (row := self._of_call(connection, request)) is not None:  # PostgreSQL: somebody else was faster
                return _read(row, load_trust())

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
        return _read(self._row(row.id), load_trust()).decision

    def _expire_all(self, now: str) -> None:
        is_over = APPROVALS.c.status == "waiting", APPROVALS.c.expires_at <= now
        with self._database.reading() as connection:
            if connection.execute(select(APPROVALS.c.id).where(*is_over).limit(1)).first() is None:
                return
        with self._database.writing() as connection:
            connection.execute(APPROVALS.update().where(*is_over).values(status="expired"))

    def _refuse(self, row: Row[Any], problem: str) -> None:
        """Keep a decision that does not count, once, as evidence; and tell people."""
        digest = _sha(f"{row.status}\n{row.request}\n{row.expires_at}\n{row.decision}")
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

    def _sign(
        self,
        row: Row[Any],
        approval: Approval,
        verdict: Verdict,
        why: str,
        arguments: dict[str, Any] | None,
        now: datetime,
    ) -> str:
        key, request = signing_key(), approval.request
        statement = HumanDecision(
            system=request.system,
            release=request.release or NO_RELEASE,
            time=now,
            signer=signer(key),
            approval=approval.id,
            run_id=request.run_id,
            key=request.key,
            tool=request.tool,
            asked=_asked(row.id, row.request, row.created_at, row.expires_at),
            arguments_asked=_sha(_canonical(request.arguments)),
            verdict=verdict,
            arguments=arguments,
            who=author()[:200],
            why=why,
        )
        return sign(statement, key)


def desk_approver() -> Approver:
    """The approver that puts every question to the desk of the present settings and waits; a stop ends the wait."""
    from agentkit_tracking.control.plane import ControlPlane

    return ControlPlane().approver()


# ---- reading


def _read_all(rows: Iterable[Row[Any]]) -> list[Approval]:
    """Rows, without those that cannot be read: one damaged row must not hide the others."""
    found = []
    for row in rows:
        try:
            found.append(_read(row, load_trust()))
        except TrustError as e:
            _log.error("%s", e)
    return found


def _read(row: Row[Any], trust: Trust) -> Approval:
    """A row, its decision judged.

    Raises:
        TrustError: the question itself cannot be read.
    """
    try:
        times = unstamp(row.created_at), unstamp(row.expires_at)
        approval = Approval(row.id, _request(row.request), *times, row.status)
    except (ValueError, TypeError) as e:
        raise TrustError(f"approval {row.id} was altered in the control database: it cannot be read") from e
    if row.status == "waiting" and row.decision is None:
        return approval
    if row.status == "expired":
        return _settled(approval)
    try:
        return replace(approval, decision=_judged(row, trust))
    except TrustError as e:
        return replace(approval, status="waiting", problem=str(e))


def _judged(row: Row[Any], trust: Trust) -> Decision:
    """The decision of a row.

    Raises:
        TrustError: no trusted key signed it, or not for exactly this row.
    """
    signed = read(row.decision or "", HumanDecision)
    key, said = check(signed, trust), signed.statement
    request = _request(row.request)
    expected = (row.id, row.run_id, row.call_key, request.tool, _sha(_canonical(request.arguments)))
    found = (said.approval, said.run_id, _sha(said.key), said.tool, said.arguments_asked)
    asked = _asked(row.id, row.request, row.created_at, row.expires_at)
    if found != expected or said.asked != asked:
        raise TrustError("it was signed for another question, or the question was changed afterwards")
    if row.status != _STATUS[said.verdict]:
        raise TrustError(f"the row says {row.status}, what was signed says {said.verdict}")
    if said.time > unstamp(row.expires_at):
        raise TrustError("it was signed after the approval had expired")
    if (said.verdict == "modify") != (said.arguments is not None) or (
        said.arguments is not None and said.arguments.keys() != request.arguments.keys()
    ):
        raise TrustError("its arguments are not those that were asked about")
    return Decision(
        verdict=said.verdict,
        by=named(said.who, key.owner),
        reason=said.why,
        at=said.time.isoformat(),
        arguments=said.arguments,
        signature=json.loads(signed.envelope),
    )


def _settled(approval: Approval) -> Approval:
    """An approval whose time is over counts as rejected."""
    if approval.decision is not None:
        return approval
    hours = (approval.expires_at - approval.created_at).total_seconds() / 3600
    reason = f"expired: nobody decided within {hours:g} h"
    return replace(
        approval, status="expired", decision=Decision("reject", reason=reason, at=approval.expires_at.isoformat())
    )


def decided(approval: Approval) -> str:
    """Who decided what, when and why, in a line."""
    decision = approval.decision
    if decision is None:
        return approval.status
    when = day(datetime.fromisoformat(decision.at))
    if not decision.by:
        return f"{decision.reason} ({when} UTC)"
    why = f": {decision.reason}" if decision.reason else ""
    return f"{approval.status} by {decision.by} on {when} UTC{why}"


def _checked(
    approval: Approval, verdict: Verdict, reason: str, arguments: dict[str, Any] | None
) -> tuple[str, dict[str, Any] | None]:
    reason = " ".join(reason.split())
    if verdict not in _STATUS:
        raise UsageError(f"a verdict is approve, modify or reject, not {verdict!r}")
    if verdict != "approve" and not reason:
        raise UsageError(f"say why: to {verdict} needs a reason")
    if len(reason) > _WHY_LENGTH:
        raise UsageError(f"the reason has {len(reason)} characters; {_WHY_LENGTH} are kept")
    if verdict != "modify":
        if arguments is not None:
            raise UsageError(f"to {verdict} takes no arguments; `modify` does")
        return reason, None
    return reason, _changed(approval.request.arguments, arguments)


def _changed(asked: dict[str, Any], arguments: dict[str, Any] | None) -> dict[str, Any]:
    if not isinstance(arguments, dict) or arguments.keys() != asked.keys():
        raise UsageError(f"to modify, give the arguments {', '.join(sorted(asked))}: exactly these")
    try:
        arguments = json.loads(json.dumps(arguments, allow_nan=False))
    except (TypeError, ValueError) as e:
        raise UsageError(f"the arguments are no JSON: {e}") from e
    if arguments == asked:
        raise UsageError("the arguments are those that were asked about: approve them, or change one")
    assert arguments is not None
    return arguments


# ---- what was asked


def _request(text: str) -> ApprovalRequest:
    request = ApprovalRequest(**json.loads(text))
    if not isinstance(request.arguments, dict):
        raise TypeError("arguments are an object")
    return request


def _text(request: ApprovalRequest) -> str:
    return json.dumps(asdict(request), sort_keys=True)


def _is_same_call(one: ApprovalRequest, other: ApprovalRequest) -> bool:
    return _call(one) == _call(other)


def _call(request: ApprovalRequest) -> tuple[str, ...]:
    arguments = _canonical({name: jsonable(value) for name, value in request.arguments.items()})
    return request.run_id, request.key, request.system, request.agent, request.tool, arguments


def _asked(identity: str, request: str, created_at: str, expires_at: str) -> Digest:
    return _sha(_canonical([identity, request, created_at, expires_at]))


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _sha(text: str) -> Digest:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


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


def changed_arguments(approval: Approval, settings: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The arguments asked about with some replaced.

    Raises:
        UsageError: a name that was not asked about.
    """
    arguments = dict(approval.request.arguments)
    for name, value in settings:
        if name not in arguments:
            raise UsageError(f"there is no argument {name!r}; there are {', '.join(sorted(arguments))}")
        arguments[name] = value
    return arguments
