"""What people set while agents run: stops, budgets shared by processes, notices to people.

`agentkit` only asks; the stores live in other packages and are found through the entry point `agentkit.control`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Protocol

from agentkit.budget import Budget, Ledger


@dataclass(frozen=True)
class Notice:
    """Something a person should hear of: a call made at tier 2, an approval that waits, an effect in doubt."""

    kind: str  # acted | approval | unknown | degraded
    run_id: str
    system: str
    text: str  # one sentence
    details: dict[str, Any] = field(default_factory=dict)


class Control(Protocol):
    """The control plane as a run sees it."""

    def stopped(self, system: str, release: str | None, agent: str | None, tool: str | None) -> str | None:
        """Why this must not go on (who stopped what, when and why), or None. Called before every call: cheap."""
        ...

    def ledgers(
        self, system: str, user: str | None, daily: Budget | None, daily_per_user: Budget | None
    ) -> tuple[Ledger, ...]:
        """The day's ledgers of a system and of one of its users, shared by all processes."""
        ...

    def notify(self, notice: Notice) -> None:
        """Tell people; returns at once and never fails the run."""
        ...


@cache
def control() -> Control | None:
    """The installed control plane, or None."""
    points = entry_points(group="agentkit.control")
    for point in points:
        plane: Control = point.load()()
        return plane
    return None
