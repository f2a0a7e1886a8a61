"""The errors agentkit raises.

AgentkitError
├── UsageError            the caller asked for something that cannot be done
│   ├── DataError         a file of examples or settings is not as documented
│   ├── ModelError        no usable language model: missing key, unknown name, unreachable server
│   │   └── MalformedOutput   the model's answer was cut off or of the wrong form, also when asked once more
│   └── SourceError       a notebook or module cannot be turned into a release
├── ReleaseError          a stored release is missing, altered or not the one asked for
│   ├── TrustError        no valid signature stands behind it, or what was signed is no longer what is stored
│   └── UnknownReference  nothing is registered under the reference (a UsageError, too)
├── IllegalTransition     a run tried to go where the transition table does not lead
├── VerificationFailed    a verifier said no to an orchestrator's result (in orchestration.py)
├── NothingFound          no agent of an orchestration brought anything back (in orchestration.py)
├── ToolFailed            a tool raised, hung, or returned what it must not; goes back to the model as data
└── Refusal               a rule stopped the run; never handed to the model as text
    ├── PermissionDenied  the tool is not in the agent's inventory, or is forbidden
    ├── PolicyRefused     the tool's own rule says no to these arguments for this caller
    ├── BudgetExceeded    a hard limit would have been crossed by the next call
    ├── Stopped           an operator has stopped the system, release, agent or tool
    ├── ConflictingWrite  another agent of the same run has already written to the same thing
    └── DelegationRefused agents hand work to each other in a circle, or too deep
"""

from __future__ import annotations

from typing import Literal


class AgentkitError(Exception):
    """Base of every error that agentkit raises on purpose."""


class UsageError(AgentkitError):
    """What was asked for cannot be done; the message says what to do instead."""


class DataError(UsageError):
    """A data or settings file does not follow its documented schema.

    `problems` holds one line per problem, each with its place in the file.
    """

    def __init__(self, message: str, problems: list[str] | None = None) -> None:
        super().__init__(message if not problems else "\n".join([message, *(f"  {p}" for p in problems)]))
        self.problems = problems or []


class ModelError(UsageError):
    """No usable language model: the key is missing, the name unknown or the server unreachable."""


class MalformedOutput(ModelError):
    """The model's answer was cut off or of the wrong form, and asking once more did not mend it.

    `model` is the model string, `found` what is wrong with the answer, `said` the beginning of it.
    """

    def __init__(self, model: str, found: str, said: str = "", *, repaired: bool = False) -> None:
        again = ", also when asked once more" if repaired else ""
        super().__init__(f"{model}: {found}{again}" + (f"; it said {said[:200]!r}" if said else ""))
        self.model, self.found, self.said, self.repaired = model, found, said, repaired


class SourceError(UsageError):
    """A notebook or module cannot be turned into a release."""


class ReleaseError(AgentkitError):
    """A stored release is missing, altered, or not the one that was asked for."""


class TrustError(ReleaseError):
    """No valid signature stands behind a release, or what was signed is no longer what is stored.

    `problems` holds one line for each thing that differs.
    """

    def __init__(self, message: str, problems: list[str] | None = None) -> None:
        super().__init__(message)
        self.problems = problems or [message]


class UnknownReference(ReleaseError, UsageError):
    """Nothing is registered under the reference."""


class IllegalTransition(AgentkitError):
    """The transition table has no arrow between the two states."""

    def __init__(self, source: str, target: str) -> None:
        super().__init__(f"no transition leads from {source} to {target}; see agentkit.states.TRANSITIONS")
        self.source, self.target = source, target


ToolFault = Literal["error", "timeout", "circuit open", "malformed"]


class ToolFailed(AgentkitError):
    """A tool did not do its work. Code may catch it and go on; an agent that plans by model is told as data.

    `unknown` says that an effect may have happened all the same.
    """

    def __init__(self, tool: str, fault: ToolFault, message: str, *, attempts: int = 1, unknown: bool = False) -> None:
        tries = f" after {attempts} attempts" if attempts > 1 else ""
        doubt = "; whether it took effect is unknown" if unknown else ""
        super().__init__(f"tool {tool!r} failed{tries} ({fault}): {message}{doubt}")
        self.tool, self.fault, self.message, self.attempts, self.unknown = tool, fault, message, attempts, unknown


class Refusal(AgentkitError):
    """A rule stopped the run. Ends the run; is never given to the model as text."""


class PermissionDenied(Refusal):
    """The agent called a tool that is not in its inventory, or one that is forbidden to it."""

    def __init__(self, agent: str, tool: str, allowed: list[str]) -> None:
        super().__init__(f"agent {agent!r} may not use tool {tool!r}; its inventory is {allowed!r}")
        self.agent, self.tool, self.allowed = agent, tool, allowed


class PolicyRefused(Refusal):
    """The tool's own rule said no to these arguments for this caller."""

    def __init__(self, tool: str, reason: str) -> None:
        super().__init__(f"tool {tool!r} was not called: {reason}")
        self.tool, self.reason = tool, reason


class Stopped(Refusal):
    """An operator has stopped this; it stays stopped until somebody resumes it."""


class ConflictingWrite(Refusal):
    """Two agents of one run wanted to write to the same thing."""


class DelegationRefused(Refusal):
    """Agents would have handed work to each other in a circle, or deeper than allowed."""


class BudgetExceeded(Refusal):
    """The next call would have crossed a hard limit, so it was not made."""

    def __init__(self, limit: str, allowed: float, used: float, asked: float) -> None:
        super().__init__(
            f"budget of {allowed:g} {limit} would be exceeded: {used:g} used, {asked:g} more asked for; "
            "raise the limit in the system's Budget or make the task smaller"
        )
        self.limit, self.allowed, self.used, self.asked = limit, allowed, used, asked
