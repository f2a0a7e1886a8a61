"""What a person is asked before a call, and what a person can answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

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

    `at` is UTC, ISO 8601; `signature` is the signed envelope of the decision where a key stands behind it.
    """

    verdict: Verdict
    by: str = ""
    reason: str = ""
    at: str = ""
    arguments: dict[str, Any] | None = None
    signature: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def granted(self) -> bool:
        """Whether the call may be made."""
        return self.verdict in ("approve", "modify")


# Only True and a granting Decision approve: a chatty approver that returns "no" must not.
Approver = Callable[[ApprovalRequest], "bool | Decision"]


def decide(approver: Approver | None, request: ApprovalRequest) -> Decision:
    """Ask `approver`; without one the answer is no."""
    if approver is None:
        return Decision("reject", reason="nobody was there to approve")
    answer = approver(request)
    if isinstance(answer, Decision):
        return answer
    return Decision("approve" if answer is True else "reject")
