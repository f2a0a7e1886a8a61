"""What the agents of one run share: what they found out, and who writes to which thing outside."""

from __future__ import annotations

import threading
from typing import Any

from agentkit.errors import ConflictingWrite


class Claims:
    """Which agent of a run tree writes to which thing; the first to write keeps it until the run is over."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: dict[tuple[str, str], str] = {}

    def take(self, kind: str, value: Any, agent: str) -> ConflictingWrite | None:
        """Claim the thing `value` of a kind (`order_id`, say) for `agent`; the error if it is another's."""
        with self._lock:
            owner = self._owners.setdefault((kind, repr(value)), agent)
        if owner == agent:
            return None
        return ConflictingWrite(f"agent {agent!r} may not write to {kind} {value!r}: {owner!r} of this run already has")


class Blackboard:
    """To be written."""
