"""Which run this code is part of."""

from __future__ import annotations

import sys
from contextvars import ContextVar
from typing import TYPE_CHECKING
from weakref import WeakSet

if TYPE_CHECKING:
    from agentkit.runs import Run

# Runs under way in this process. One that was left by an interrupt at a bad moment is out of it once it is collected.
OPEN: WeakSet[Run] = WeakSet()
CURRENT: ContextVar[Run | None] = ContextVar("agentkit_run", default=None)
DSPY_SETTING = "agentkit_run"  # DSPy hands its settings, but no context variables, to the threads it starts


def current_run() -> Run | None:
    """The run this code is part of, or None.

    Threads that DSPy starts (`dspy.Parallel`) belong to their caller's run; others need `contextvars.copy_context()`.
    """
    run = CURRENT.get()
    if run is None and (dspy := sys.modules.get("dspy")):
        run = dspy.settings.get(DSPY_SETTING)
    return run
