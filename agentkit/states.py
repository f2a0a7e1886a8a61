"""The state machine every run goes through: one table, one place that takes a transition."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Where a run stands. DONE and FAILED are final."""

    IDLE = "IDLE"
    PLANNING = "PLANNING"
    EXECUTING = "EXECUTING"
    AWAITING_HUMAN = "AWAITING_HUMAN"
    REFLECTING = "REFLECTING"
    DONE = "DONE"
    FAILED = "FAILED"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.IDLE: frozenset({State.PLANNING, State.FAILED}),
    State.PLANNING: frozenset({State.EXECUTING, State.FAILED}),
    State.EXECUTING: frozenset({State.AWAITING_HUMAN, State.REFLECTING, State.FAILED}),
    State.AWAITING_HUMAN: frozenset({State.EXECUTING, State.FAILED}),
    # Back to PLANNING: reflection found the plan wanting.
    State.REFLECTING: frozenset({State.DONE, State.PLANNING, State.FAILED}),
    State.DONE: frozenset(),
    State.FAILED: frozenset(),
}

# The phases whose latency is reported; a wait for a person belongs to no phase.
PHASES: dict[State, str] = {
    State.PLANNING: "planning",
    State.EXECUTING: "execution",
    State.REFLECTING: "reflection",
}


def diagram() -> str:
    """The transition table as Mermaid text; marimo and GitHub draw it."""
    arrows = [f"    {a} --> {b}" for a, targets in TRANSITIONS.items() for b in sorted(targets)]
    return "\n".join(["stateDiagram-v2", "    [*] --> IDLE", *arrows, "    DONE --> [*]", "    FAILED --> [*]"])
