"""The control plane: approvals, stops, budgets of a day, notices; one database for all processes.

`ControlPlane` is what runs use (entry point `agentkit.control`); it imports the rest when there is something to read.
"""

from agentkit_tracking.control.database import ControlError
from agentkit_tracking.control.plane import HOLDS_WITHIN_S, ControlPlane

__all__ = ["HOLDS_WITHIN_S", "ControlError", "ControlPlane"]
