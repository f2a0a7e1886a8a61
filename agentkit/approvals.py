"""What a person is asked before a call, and what a person can answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from agentkit import clock

Verdict = Literal["approve", "modify", "reject"]


@dataclass(frozen=True)
class ApprovalRequest:
    """May `agent` call `tool` with `arguments`?

    `reason` says which rule sends the call to a person; `doing` what the agent was about, in a sentence or two;
    `key` names the call within the run (the idempotency key), so that asking twice about one call is asking once.
    """

    run_id: str
    agent: str
    tool: str
    arguments: dict[str, Any]
    reason: str
    system: str = ""
    release: str | None = None
    doing: str = ""
    confidence: float | None = None
    user: str | None = None
    key: str = ""


@dataclass(frozen=True)
class Decision:
    """A person's answer. `modify` approves other `arguments` than those asked about.

    `by` names the person who decided; it is empty where code did, or nobody in time. `asked_at` and `at`, when it was asked
    and answered, are UTC, ISO 8601; `signature` is the signed envelope of the decision where a key stands behind it.
    """

    verdict: Verdict
    by: str = ""
    reason: str = ""
    at: str = ""
    arguments: dict[str, Any] | None = None
    signature: dict[str, Any] | None = field(default=None, repr=False)
    asked_at: str = ""

    @property
    def granted(self) -> bool:
        """Whether the call may be made."""
        return self.verdict in ("approve", "modify")


# Only True and a granting Decision approve: a chatty approver that returns "no" must not.
Approver = Callable[[ApprovalRequest], "bool | Decision"]


def decide(approver: Approver | None, request: ApprovalRequest) -> Decision:
    """Ask `approver`; without one the answer is no. It says when it was asked and answered, if the approver does not."""
    asked_at = clock.utc().isoformat()
    if approver is None:
        return Decision("reject", reason="nobody was there to approve", at=asked_at, asked_at=asked_at)
    answer = approver(request)
    if not isinstance(answer, Decision):
        answer = Decision("approve" if answer is True else "reject")
    return replace(answer, at=answer.at or clock.utc().isoformat(), asked_at=answer.asked_at or asked_at)
