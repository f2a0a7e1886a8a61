"""Durable runs: every call a checkpoint; a run whose process is killed goes on where it stopped.

    from agentkit_tracking import durable

    with durable.Runner() as runner:
        record = runner.start("support_triage@production", {"text": "…"}).result()

What holds after a kill at any point: no run is lost; a tool that is idempotent is called again with the same key; a write of
any other is made once, or a person is asked what became of it; models are not asked again for what they have said; budget,
steps and release are those the run had. What the run's own code does besides calls is done again.

Needs DBOS (`pip install 'agentkit-hedgehog[durable]'`), which is imported when a name is first used that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agentkit.errors import UsageError

if TYPE_CHECKING:
    from agentkit_tracking.durable.journal import Journal, ReplayDiffers, Suspended
    from agentkit_tracking.durable.runner import Handle, Runner
    from agentkit_tracking.durable.standing import RunStatus, resume, runs, status
    from agentkit_tracking.durable.works import offer, work

_HOME = {
    "Handle": "runner",
    "Journal": "journal",
    "ReplayDiffers": "journal",
    "RunStatus": "standing",
    "Runner": "runner",
    "Suspended": "journal",
    "offer": "works",
    "resume": "standing",
    "runs": "standing",
    "status": "standing",
    "work": "works",
}
__all__ = [
    "Handle",
    "Journal",
    "ReplayDiffers",
    "RunStatus",
    "Runner",
    "Suspended",
    "offer",
    "resume",
    "runs",
    "status",
    "work",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'agentkit_tracking.durable' has no attribute {name!r}")
    try:
        value = getattr(import_module(f"agentkit_tracking.durable.{_HOME[name]}"), name)
    except ModuleNotFoundError as e:
        if e.name != "dbos":
            raise
        raise UsageError("durable runs need DBOS: pip install 'agentkit-hedgehog[durable]'") from e
    globals()[name] = value
    return value
