"""agentkit: LLM agents from notebook to production. See README.md for the road; `import agentkit as ak`."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentkit import mcp, metrics, testing
    from agentkit.agents import Agent
    from agentkit.approvals import ApprovalRequest, Decision
    from agentkit.autonomy import Autonomy
    from agentkit.blackboard import Blackboard
    from agentkit.budget import Budget, DailyBudget, Ledger
    from agentkit.callers import acting_for
    from agentkit.calls import intercept
    from agentkit.cassettes import cassette
    from agentkit.embedded import Weights, fit
    from agentkit.errors import AgentkitError
    from agentkit.example_tables import keep_cases
    from agentkit.examples import Example, read_examples
    from agentkit.flows import Edge, sequence
    from agentkit.models import build_lm
    from agentkit.orchestration import Orchestrator, Verdict, VerificationFailed
    from agentkit.planning import Planner
    from agentkit.records import RunRecord
    from agentkit.runs import Run
    from agentkit.sinks import add_sink
    from agentkit.states import State, diagram
    from agentkit.systems import System, adopt, approve_with
    from agentkit.tool_lint import lint_tools
    from agentkit.tools import Tool, tool

# Read when litellm is first imported, which would otherwise try a download.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

_HOME = {
    "Agent": "agents",
    "AgentkitError": "errors",
    "ApprovalRequest": "approvals",
    "Autonomy": "autonomy",
    "Blackboard": "blackboard",
    "Budget": "budget",
    "DailyBudget": "budget",
    "Decision": "approvals",
    "Edge": "flows",
    "Example": "examples",
    "Ledger": "budget",
    "Orchestrator": "orchestration",
    "Planner": "planning",
    "Run": "runs",
    "RunRecord": "records",
    "State": "states",
    "System": "systems",
    "Tool": "tools",
    "Verdict": "orchestration",
    "VerificationFailed": "orchestration",
    "Weights": "embedded",
    "acting_for": "callers",
    "add_sink": "sinks",
    "adopt": "systems",
    "approve_with": "systems",
    "build_lm": "models",
    "cassette": "cassettes",
    "diagram": "states",
    "fit": "embedded",
    "intercept": "calls",
    "keep_cases": "example_tables",
    "lint_tools": "tool_lint",
    "read_examples": "examples",
    "sequence": "flows",
    "tool": "tools",
}
_MODULES = ("mcp", "metrics", "testing")
__all__ = [
    "Agent",
    "AgentkitError",
    "ApprovalRequest",
    "Autonomy",
    "Blackboard",
    "Budget",
    "DailyBudget",
    "Decision",
    "Edge",
    "Example",
    "Ledger",
    "Orchestrator",
    "Planner",
    "Run",
    "RunRecord",
    "State",
    "System",
    "Tool",
    "Verdict",
    "VerificationFailed",
    "Weights",
    "acting_for",
    "add_sink",
    "adopt",
    "approve_with",
    "build_lm",
    "cassette",
    "diagram",
    "fit",
    "intercept",
    "keep_cases",
    "lint_tools",
    "mcp",
    "metrics",
    "read_examples",
    "sequence",
    "testing",
    "tool",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name on first use: dspy and scikit-learn take seconds (PEP 562)."""
    if name in _MODULES:
        return import_module(f"agentkit.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'agentkit' has no attribute {name!r}")
    value = getattr(import_module(f"agentkit.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
