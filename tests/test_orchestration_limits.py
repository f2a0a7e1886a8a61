"""What an orchestrator's agents may spend together and alone, who can stop them, how deep work is handed on."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from crews import PAID, Asks, Report, crew, gather, look_up, node, nothing_paid_yet, refund, spend, statuses  # noqa: F401
from hedgehogs import doing, speaking

import agentkit as ak
from agentkit import Budget, Run, RunRecord
from agentkit.flows import Edge, sequence
from agentkit.orchestration import Orchestrator
from agentkit.testing import Scripted

# --- limits --------------------------------------------------------------------------------------------------------


def test_the_budget_of_the_whole_ends_the_whole(records: list[RunRecord]) -> None:
    agents = [node(n, spend(3), look_up) for n in "ab"]
    record = crew(*agents, node("c"), flow=[Edge("a", "c"), Edge("b", "c")], budget=Budget(tool_calls=5)).run()
    assert record.state == "FAILED"
    assert record.tool_calls in (4, 5)  # the sixth may be refused while the fifth is still under way
    assert (record.error or "").startswith("BudgetExceeded: budget of 5 tool_calls")
    assert "c" not in {r.route for r in records}


def test_once_the_whole_is_at_its_limit_no_agent_makes_another_call() -> None:
    refused, tried = threading.Event(), threading.Event()
    script = Scripted({"answer": "too late"})

    def spend_all(run: Run) -> None:
        try:
            spend(2)(run)
        finally:
            refused.set()
            tried.wait(10)

    class Late(Asks):
        def execute(self, run: Run, plan: Any, text: str = "") -> Any:
            refused.wait(10)
            try:
                return self.ask(text="is anybody there?").answer
            finally:
                tried.set()

    late = speaking(Late("late"), script)
    record = crew(node("a", spend_all, look_up), late, budget=Budget(tool_calls=1)).run()  # type: ignore[arg-type]
    assert ((record.error or "").partition(":")[0], script.prompts) == ("BudgetExceeded", [])


def test_an_agents_own_budget_ends_that_agent() -> None:
    agents = [node(n, spend(3), look_up) for n in "ab"]
    record = crew(*agents, budgets={"a": Budget(tool_calls=2)}, budget=Budget(tool_calls=5)).run()
    assert (record.state, (record.output or {})["missing"], record.tool_calls) == ("DONE", ["a"], 5)


def test_an_agents_own_budget_of_the_same_size_is_its_own() -> None:
    record = crew(
        node("a", spend(3), look_up), node("b"), budgets={"a": Budget(tool_calls=2)}, budget=Budget(tool_calls=2)
    ).run()
    assert (record.state, (record.output or {})["missing"]) == ("DONE", ["a"])


def test_a_budget_of_its_own_is_no_way_round_that_of_the_whole() -> None:
    record = crew(node("a", spend(9), look_up), budgets={"a": Budget.unlimited()}, budget=Budget(tool_calls=2)).run()
    assert (record.state, record.tool_calls) == ("FAILED", 2)


def test_a_system_that_an_agent_calls_spends_the_budget_of_the_whole() -> None:
    inner = doing(spend(3), look_up, name="inner")
    record = crew(node("a", lambda run: inner().value), node("b"), budget=Budget(tool_calls=2), workers=1).run()
    assert (record.error or "").startswith("BudgetExceeded: budget of 2 tool_calls")


def test_a_system_that_an_agent_calls_may_spend_its_own_budget_and_fail_alone() -> None:
    inner = doing(spend(3), look_up, name="inner", budget=Budget(tool_calls=1))
    record = crew(node("a", lambda run: inner().value), node("b")).run()
    assert (record.state, (record.output or {})["missing"]) == ("DONE", ["a"])


def test_how_much_of_the_whole_is_spent_decides_whether_a_person_is_asked() -> None:
    def pay(run: Run, **inputs: Any) -> Any:
        return run.call(refund, order_id="A", usd=1)

    agents = [node("a", spend(8), look_up), node("b", pay, refund)]
    record = crew(*agents, flow=sequence("a", "b"), budget=Budget(tool_calls=10)).run()
    assert (record.output or {})["found"] == {"a": [f"order {i}" for i in range(8)], "b": None}
    assert [s.name for s in record.steps if s.kind == "approval"] == ["refund"]


def test_the_time_of_the_whole_ends_an_agent_that_hangs() -> None:
    go_on, called = threading.Event(), list[str]()

    def hang(run: Run) -> None:
        go_on.wait(30)
        try:
            run.call(refund, order_id="A", usd=1)
        except Exception as e:
            called.append(type(e).__name__)

    began = time.perf_counter()
    record = crew(node("a", hang, refund), node("b"), budget=Budget(seconds=2)).run()
    assert time.perf_counter() - began < 25
    assert (record.error or "").startswith("BudgetExceeded: budget of 2 seconds")
    assert (record.partial or {})["b"] == {"value": "b"}
    left = [t for t in threading.enumerate() if t.name == "agentkit-a"]
    go_on.set()
    left[0].join(10)
    assert (called, PAID) == (["Stopped"], [])


class Plane:
    """A control plane that has stopped something."""

    def __init__(self, **what: str) -> None:
        self.what = what

    def stopped(self, system: str, release: str | None, agent: str | None, tool: str | None) -> str | None:
        now = {"system": system, "agent": agent, "tool": tool}
        return "stopped by ann" if self.what and all(now[k] == v for k, v in self.what.items()) else None

    def notify(self, notice: Any) -> None:
        pass


def test_who_stops_an_agent_stops_that_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    plane = Plane(system="crew", agent="a")
    monkeypatch.setattr("agentkit.runs.control", lambda: plane)
    record = crew(node("a", spend(1), look_up), node("b", spend(1), look_up)).run()
    assert (record.state, (record.output or {})["missing"]) == ("DONE", ["a"])


def test_who_stops_the_system_stops_all_its_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    plane = Plane()
    monkeypatch.setattr("agentkit.runs.control", lambda: plane)

    def stop(run: Run) -> Any:
        plane.what = {"system": "crew"}
        return run.call(look_up, order_id="A")

    record = crew(node("a", stop, look_up), node("b"), flow=sequence("a", "b")).run()
    assert (record.state, record.error, record.tool_calls) == ("FAILED", "Stopped: stopped by ann", 0)
    assert "b" not in statuses(record)


# --- delegation ----------------------------------------------------------------------------------------------------


def test_work_that_goes_in_a_circle_is_refused(records: list[RunRecord]) -> None:
    there: list[ak.System] = []
    a = doing(lambda run: there[1]().value, name="a")
    b = doing(lambda run: there[0]().value, name="b")
    there += [a, b]
    record = a.run()
    assert record.error == "DelegationRefused: work goes in a circle: a → b → a"
    assert [(r.system, r.state) for r in records] == [("b", "FAILED"), ("a", "FAILED")]


def test_an_agent_that_calls_its_own_orchestrator_fails_alone() -> None:
    there: list[ak.System] = []
    there.append(crew(node("a", lambda run: there[0]().found), node("b")))
    record = there[0].run()
    assert (record.state, (record.output or {})["missing"]) == ("DONE", ["a"])
    assert "work goes in a circle: crew → crew.a → crew" in (record.degraded or "")


def test_work_that_is_handed_on_too_deep_is_refused() -> None:
    deep = doing(lambda run: "the end", name="s5")
    for i in (4, 3, 2, 1):
        deep = doing(lambda run, inner=deep: inner().value, name=f"s{i}")  # type: ignore[misc]
    assert deep.run().error == "DelegationRefused: work is handed on more than 4 deep: s1 → s2 → s3 → s4 → s5"


def test_orchestrators_nest_as_deep_as_delegation_goes() -> None:
    inner = Orchestrator("inner", [node("x")], result=Report, compose=gather)
    record = crew(node("a", lambda run: inner().found)).run()
    assert record.output == {"found": {"a": {"x": "x"}}, "missing": []}
    third = doing(lambda run: inner().found, name="third")
    record = crew(node("a", lambda run: third().value)).run()
    assert "more than 4 deep: crew → crew.a → third → inner → inner.x" in (record.error or "")
