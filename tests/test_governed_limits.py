"""What ends a run or its calls: budgets, stops; and what is kept of a run that falls back or is cut short."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from governed import CALLS, Plane, flaky, nothing_called, now, plane, using  # noqa: F401
from hedgehogs import doing
from hypothesis import given, settings
from hypothesis import strategies as st

import agentkit as ak
from agentkit import Budget, Run, RunRecord
from agentkit.budget import Ledger
from agentkit.errors import Stopped
from agentkit.testing import FakeClock

# ---- budget


def test_the_call_a_person_is_asked_about_is_paid_for_while_they_think_and_given_back_if_they_say_no() -> None:
    tool = flaky(0, ValueError(), permission="write", criticality="high", cost_usd=0.6)
    seen: list[float] = []

    def work(run: Run) -> Any:
        with ak.approve_with(lambda request: False):
            run.approver = lambda request: seen.append(run.ledger.used["usd"]) or len(seen) > 1  # type: ignore[func-returns-value]
            return [run.call(tool, place="A"), run.call(tool, place="B"), run.ledger.used["usd"]]

    record = doing(work, tool, budget=replace(Budget.unlimited(), usd=1.5)).run()
    assert record.output == {"value": [None, "from B", 0.6]}, record.error
    assert seen == [0.6, 0.6]


def test_a_persons_time_is_not_charged_to_the_agent() -> None:
    tool = flaky(0, ValueError(), permission="write", criticality="high")

    def slowly(request: ak.ApprovalRequest) -> bool:
        time.sleep(0.3)
        return True

    with ak.approve_with(slowly):
        record = using(tool, budget=replace(Budget.unlimited(), seconds=0.2))
    assert (record.state, record.error) == ("DONE", None)
    assert record.waited_s >= 0.3


@settings(max_examples=25, deadline=None)
@given(
    limit=st.integers(0, 40),
    usd=st.sampled_from([None, 0.05, 0.31]),
    broken=st.sets(st.integers(0, 63)),
    workers=st.just(64),
)
def test_sixty_four_workers_on_one_budget_never_pass_any_limit(
    limit: int, usd: float | None, broken: set[int], workers: int
) -> None:
    made: list[int] = []

    @ak.tool(permission="write", criticality="low", cost_usd=0.01)
    def act(number: int) -> str:
        """Act."""
        made.append(number)
        if number in broken:
            raise ValueError("injected")
        return "done"

    act.line.breaker.failures = 1000
    shared = Ledger(replace(Budget.unlimited(), tool_calls=limit, usd=usd))
    system = doing(lambda run: run.call(act, number=run.inputs["text"]), act)

    def one(number: int) -> RunRecord:
        return system.run(text=number, ledger=shared)

    with ThreadPoolExecutor(workers) as pool:
        records = [*pool.map(one, range(workers))]
    most = min(limit, workers, *([] if usd is None else [round(usd / 0.01)]))
    assert len(made) == most
    assert shared.used["tool_calls"] == most
    assert sum("BudgetExceeded" in str(r.error) for r in records) == workers - most


def test_a_days_budget_limits_what_it_names() -> None:
    with pytest.raises(ak.AgentkitError, match=r"ak\.DailyBudget"):
        doing(lambda run: None, daily=Budget(usd=50))
    assert doing(lambda run: None, daily=ak.DailyBudget(usd=50)).run().state == "DONE"
    for amount in (-100, float("nan")):
        record = doing(lambda run, amount=amount: run.reserve(usd=amount)).run()
        assert "to reserve" in str(record.error)


# ---- stops


def test_a_stop_ends_new_runs_and_runs_under_way_before_their_next_call(plane: Plane) -> None:
    tool = flaky(0, ValueError(), permission="write", criticality="low")

    def stopped_meanwhile(run: Run) -> Any:
        run.call(tool, place="A")
        plane.stop = lambda *_: "stopped by ann: strange refunds"
        try:
            run.call(tool, place="B")
        except Stopped:
            return "swallowed"

    record = doing(stopped_meanwhile, tool).run()
    assert record.error == "Stopped: stopped by ann: strange refunds"
    assert CALLS == ["A"]
    assert str(using(tool).error).startswith("Stopped")
    assert CALLS == ["A"]


def test_one_tool_can_be_stopped_and_an_approved_call_is_still_halted(plane: Plane) -> None:
    tool, other = flaky(0, ValueError(), permission="write", criticality="high"), flaky(0, ValueError())
    plane.stop = lambda system, release, agent, name: "no" if name == "fetch" else None

    def then_stopped(request: ak.ApprovalRequest) -> bool:
        plane.stop = lambda system, release, agent, name: "stopped while you thought" if name == "fetch" else None
        return True

    assert str(using(tool).error) == "Stopped: no"
    plane.stop = lambda *_: None
    with ak.approve_with(then_stopped):
        assert str(using(tool).error) == "Stopped: stopped while you thought"
    assert CALLS == []
    other.name = "look"
    assert using(other).output == {"value": "from A"}


def test_a_stop_while_a_person_is_asked_ends_the_run_whatever_it_catches() -> None:
    tool = flaky(0, ValueError(), permission="write", criticality="high")

    def stubborn(run: Run) -> str:
        try:
            return str(run.call(tool, place="A"))
        except Exception:
            return "swallowed"

    def stopped(request: ak.ApprovalRequest) -> bool:
        raise Stopped("stopped by ann")

    with ak.approve_with(stopped):
        assert doing(stubborn, tool).run().error == "Stopped: stopped by ann"


def test_a_tool_that_is_stopped_is_not_tried_again(plane: Plane, now: FakeClock) -> None:
    @ak.tool
    def flaky_tool(place: str) -> str:
        """Fail, and be stopped."""
        CALLS.append(place)
        plane.stop = lambda system, release, agent, name: "stopped" if name == "flaky_tool" else None
        raise ConnectionError("reset")

    assert using(flaky_tool).error == "Stopped: stopped"
    assert CALLS == ["A"]


# ---- degrading


def test_an_agent_may_recover_with_a_lesser_result_but_never_from_a_refusal() -> None:
    broken = flaky(9, ValueError("down"))
    system = doing(lambda run: run.call(broken, place="A"), broken)
    kind = type(system.agents["hedgehog"])
    kind.recover = lambda self, run, error, text="": kind.result(value=f"ask a person: {error.fault}")  # type: ignore[assignment]
    record = system.run()
    assert (record.state, record.output) == ("DONE", {"value": "ask a person: error"})
    assert record.degraded == "ToolFailed: tool 'fetch' failed (error): ValueError: down"
    poor = doing(lambda run: run.call(broken, place="A"), broken, budget=Budget(tool_calls=0))
    type(poor.agents["hedgehog"]).recover = kind.recover
    record = poor.run()
    assert (record.state, record.degraded) == ("FAILED", None)


def test_a_run_that_is_cut_short_keeps_what_it_had_found() -> None:
    def spend(run: Run) -> None:
        run.reserve(usd=2)

    record = doing(spend, budget=Budget(usd=1)).run(text="the plan")
    assert record.state == "FAILED"
    assert record.partial == {"plan": "the plan"}


def test_a_plan_may_be_made_ten_times_and_no_more() -> None:
    from agentkit import State

    def restless(run: Run) -> None:
        for _ in range(20):
            run.to(State.REFLECTING, "done")
            run.to(State.PLANNING, "again")
            run.to(State.EXECUTING, "go")

    record = doing(restless).run()
    assert str(record.error).startswith("BudgetExceeded: budget of 10 plan steps would be exceeded: 10 used")
    assert sum(s.kind == "transition" and s.name == "EXECUTING" for s in record.steps) == 10
