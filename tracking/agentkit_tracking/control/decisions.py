"""Signed decisions: the statement a person signs about one question, and whether a stored one counts for its row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, ClassVar, Literal

from pydantic import Field
from sqlalchemy import Row

from agentkit.approvals import ApprovalRequest, Decision, Verdict
from agentkit.errors import TrustError, UsageError
from agentkit.jsonable import jsonable
from agentkit_tracking.control.database import unstamp
from agentkit_tracking.control.stops import NO_RELEASE, named
from agentkit_tracking.home import author
from agentkit_tracking.keys import Trust, signing_key
from agentkit_tracking.statements import Digest, Statement, check, day, read, sign, signer

_WHY_LENGTH = 1000
Status = Literal["waiting", "approved", "modified", "rejected", "expired"]
STATUS: dict[Verdict, Status] = {"approve": "approved", "modify": "modified", "reject": "rejected"}


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


def sign_decision(
    row: Row[Any],
    approval: Approval,
    verdict: Verdict,
    why: str,
    arguments: dict[str, Any] | None,
    now: datetime,
) -> str:
    """The envelope of a decision, signed with this user's key.

    Raises:
        UsageError: there is no key.
    """
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
        asked=asked_digest(row.id, row.request, row.created_at, row.expires_at),
        arguments_asked=sha(_canonical(request.arguments)),
        verdict=verdict,
        arguments=arguments,
        who=author()[:200],
        why=why,
    )
    return sign(statement, key)


def read_row(row: Row[Any], trust: Trust) -> Approval:
    """A row, its decision judged.

    Raises:
        TrustError: the question itself cannot be read.
    """
    try:
        times = unstamp(row.created_at), unstamp(row.expires_at)
        approval = Approval(row.id, request_of(row.request), *times, row.status)
    except (ValueError, TypeError) as e:
        raise TrustError(f"approval {row.id} was altered in the control database: it cannot be read") from e
    if row.status == "waiting" and row.decision is None:
        return approval
    if row.status == "expired":
        return settled(approval)
    try:
        return replace(approval, decision=judged(row, trust))
    except TrustError as e:
        return replace(approval, status="waiting", problem=str(e))


def judged(row: Row[Any], trust: Trust) -> Decision:
    """The decision of a row, if it counts.

    Raises:
        TrustError: no trusted key signed it, or not for exactly this row.
    """
    signed = read(row.decision or "", HumanDecision)
    key, said = check(signed, trust), signed.statement
    request = request_of(row.request)
    expected = (row.id, row.run_id, row.call_key, request.tool, sha(_canonical(request.arguments)))
    found = (said.approval, said.run_id, sha(said.key), said.tool, said.arguments_asked)
    asked = asked_digest(row.id, row.request, row.created_at, row.expires_at)
    if found != expected or said.asked != asked:
        raise TrustError("it was signed for another question, or the question was changed afterwards")
    if row.status != STATUS[said.verdict]:
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
        asked_at=unstamp(row.created_at).isoformat(),
    )


def settled(approval: Approval) -> Approval:
    """An approval whose time is over counts as rejected."""
    if approval.decision is not None:
        return approval
    hours = (approval.expires_at - approval.created_at).total_seconds() / 3600
    reason = f"expired: nobody decided within {hours:g} h"
    asked_at, at = approval.created_at.isoformat(), approval.expires_at.isoformat()
    return replace(approval, status="expired", decision=Decision("reject", reason=reason, at=at, asked_at=asked_at))


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


def checked(
    approval: Approval, verdict: Verdict, reason: str, arguments: dict[str, Any] | None
) -> tuple[str, dict[str, Any] | None]:
    """Reason and arguments as they are recorded.

    Raises:
        UsageError: they do not fit the verdict or what was asked.
    """
    reason = " ".join(reason.split())
    if verdict not in STATUS:
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


# ---- what was asked


def request_of(text: str) -> ApprovalRequest:
    """What `request_text` wrote."""
    request = ApprovalRequest(**json.loads(text))
    if not isinstance(request.arguments, dict):
        raise TypeError("arguments are an object")
    return request


def request_text(request: ApprovalRequest) -> str:
    """All that is asked and shown, as it is stored and hashed."""
    return json.dumps(asdict(request), sort_keys=True)


def is_same_call(one: ApprovalRequest, other: ApprovalRequest) -> bool:
    """Whether both ask about the same call of the same run, whatever is said of it."""
    return _call(one) == _call(other)


def _call(request: ApprovalRequest) -> tuple[str, ...]:
    arguments = _canonical({name: jsonable(value) for name, value in request.arguments.items()})
    return request.run_id, request.key, request.system, request.agent, request.tool, arguments


def asked_digest(identity: str, request: str, created_at: str, expires_at: str) -> Digest:
    """Of a row's question; a decision is signed for exactly this."""
    return sha(_canonical([identity, request, created_at, expires_at]))


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def sha(text: str) -> Digest:
    """SHA-256, also of lone surrogates."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
