"""For the tests of orchestrators: agents that do a function's work, crews of them, and what their records say."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import dspy
import pytest
from hedgehogs import Found, Hedgehog
from pydantic import BaseModel

import agentkit as ak
from agentkit import Run, RunRecord
from agentkit.blackboard import Blackboard
from agentkit.orchestration import Orchestrator, Verdict

Work = Callable[..., Any]
PAID: list[tuple[str, float]] = []


@ak.tool(permission="write", human_at={"usd": 50}, writes_to="order_id")
def refund(order_id: str, usd: float) -> str:
    """Pay money back."""
    PAID.append((order_id, usd))
    return f"RF-{order_id}"


@ak.tool
def look_up(order_id: str) -> str:
    """Look up an order."""
    return f"order {order_id}"


@pytest.fixture(autouse=True)
def nothing_paid_yet() -> None:
    PAID.clear()


def node(name: str, work: Work | None = None, *tools: ak.Tool[..., Any], takes: str = "", may: str = "") -> ak.Agent:
    """An agent that does `work(run, **inputs)`; it needs the inputs `takes` and is given those of `may`, if they exist."""

    class Node(Hedgehog):
        def plan(self, run: Run, **inputs: Any) -> Any:
            return inputs

        def execute(self, run: Run, plan: Any, **inputs: Any) -> Any:
            return work(run, **plan) if work else name

        def reflect(self, run: Run, plan: Any, facts: Any, **inputs: Any) -> Any:
            return facts if isinstance(facts, BaseModel) else Found(value=facts)

    kind = inspect.Parameter.KEYWORD_ONLY
    needed = [inspect.Parameter(n, kind) for n in ("self", "run", *takes.split())]
    Node.plan.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*needed, *(inspect.Parameter(n, kind, default=None) for n in may.split())]
    )
    Node.name, Node.tools = name, tools
    return Node()


class Asks(Hedgehog):
    """Asks a model, and calls a tool."""

    tools = (look_up,)

    def __init__(self, name: str) -> None:
        super().__init__()
        self.ask = dspy.Predict("text -> answer")
        type(self).name = name

    def execute(self, run: Run, plan: Any, text: str = "") -> Any:
        run.call(look_up, order_id="A")
        return self.ask(text=text).answer


class Report(BaseModel):
    """Whatever was found."""

    found: dict[str, Any]
    missing: list[str] = []


def gather(run: Run, board: Blackboard) -> dict[str, Any]:
    """All that agents found, by their names."""
    latest = {entry.key: board.read(entry.key) for entry in board.entries}
    return {"found": {key: value["value"] for key, value in latest.items() if value and key != "checker"}}


def crew(*agents: ak.Agent, flow: Any = (), **options: Any) -> Orchestrator:
    options = {"result": Report, "compose": gather, **options}
    return Orchestrator("crew", agents, flow=flow, **options)


def fail(error: BaseException) -> Work:
    def work(run: Run, **inputs: Any) -> Any:
        raise error

    return work


def spend(times: int) -> Work:
    return lambda run: [run.call(look_up, order_id=str(i)) for i in range(times)]


def long(board: Blackboard) -> bool:
    return bool(board.read("look")["value"] > 10)


def decisions(record: RunRecord) -> dict[str, Any]:
    return {s.name: s.outputs for s in record.steps if s.kind == "decision"}


def statuses(record: RunRecord) -> dict[str, str]:
    return {n.removeprefix("agent "): o["status"] for n, o in decisions(record).items() if n.startswith("agent ")}


# --- a verifier ----------------------------------------------------------------------------------------------------


def verifier(*verdicts: Any, takes: str = "result") -> ak.Agent:
    """Answers so, one after the other."""
    left = list(verdicts)

    def check(run: Run, **inputs: Any) -> Any:
        verdict = left.pop(0)
        if isinstance(verdict, Exception):
            raise verdict
        return verdict(**inputs) if callable(verdict) else verdict

    agent = node("checker", check, takes=takes)
    type(agent).result = Verdict
    return agent


YES, NO = Verdict(ok=True, reason="it is sound"), Verdict(ok=False, reason="no source is named")
