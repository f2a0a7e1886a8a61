"""The road of a tool call: tries, time-outs, fallbacks, breakers, caches, checks, claims, tiers, budgets, stops."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from hedgehogs import doing
from hypothesis import given, settings
from hypothesis import strategies as st

import agentkit as ak
from agentkit import Budget, Decision, Run, RunRecord
from agentkit import control as control_module
from agentkit.budget import Ledger
from agentkit.control import Notice
from agentkit.errors import PolicyRefused, Stopped, ToolFailed, UsageError
from agentkit.testing import FakeClock

CALLS: list[Any] = []


@pytest.fixture(autouse=True)
def nothing_called() -> None:
    CALLS.clear()


@pytest.fixture
def now() -> Iterator[FakeClock]:
    with FakeClock() as clock:
        yield clock


def flaky(failures: int, error: Exception, **options: Any) -> ak.Tool[..., Any]:
    """A tool that fails so often before it works."""

    @ak.tool(**options)
    def fetch(place: str) -> str:
        """Fetch from a place."""
        CALLS.append(place)
        if len(CALLS) <= failures:
            raise error
        return f"from {place}"

    return fetch


def using(tool: ak.Tool[..., Any], *others: ak.Tool[..., Any], **options: Any) -> RunRecord:
    arguments = options.pop("arguments", {"place": "A"})
    return doing(lambda run: run.call(tool, **arguments), tool, *others, **options).run()


def decisions(record: RunRecord, name: str) -> list[Any]:
    return [(s.outputs, s.inputs) for s in record.steps if s.kind == "decision" and s.name == name]


# ---- tries


def test_a_connection_that_fails_is_tried_three_times_one_and_two_seconds_apart(now: FakeClock) -> None:
    record = using(flaky(2, ConnectionError("reset")))
    assert (record.output, len(CALLS)) == ({"value": "from A"}, 3)
    assert now.monotonic() == pytest.approx(3)
    assert [why.rpartition("; ")[2] for _, why in decisions(record, "retry")] == ["next try in 1 s", "next try in 2 s"]


def test_after_three_tries_it_has_failed(now: FakeClock) -> None:
    record = using(flaky(9, ConnectionError("reset")))
    assert record.error == "ToolFailed: tool 'fetch' failed after 3 attempts (error): ConnectionError: reset"
    assert len(CALLS) == 3


@pytest.mark.parametrize("error", [ValueError("no such place"), KeyError("x"), ZeroDivisionError()])
def test_an_error_that_would_only_come_again_is_not_repeated(error: Exception) -> None:
    assert "ToolFailed: tool 'fetch' failed (error)" in str(using(flaky(9, error)).error)
    assert len(CALLS) == 1


def test_a_write_is_not_repeated_because_it_may_have_happened(now: FakeClock) -> None:
    record = using(flaky(1, ConnectionError("reset"), permission="write"))
    assert str(record.error).endswith("whether it took effect is unknown")
    assert [e["outcome"] for e in record.effects] == ["unknown"]
    assert len(CALLS) == 1


def test_an_idempotent_write_is_repeated_with_the_same_key(now: FakeClock) -> None:
    @ak.tool(permission="write", idempotent=True)
    def pay(usd: float, idempotency_key: str) -> str:
        """Pay."""
        CALLS.append(idempotency_key)
        if len(CALLS) < 3:
            raise TimeoutError
        return "paid"

    def twice(run: Run) -> list[str]:
        return [run.call(pay, usd=1), run.call(pay, usd=1)]

    record = doing(twice, pay, autonomy=ak.Autonomy(failures_from=None)).run()
    assert record.output == {"value": ["paid", "paid"]}
    assert (CALLS[0] == CALLS[1] == CALLS[2], CALLS[3] == CALLS[0], len(CALLS)) == (True, False, 4)
    assert [e["outcome"] for e in record.effects] == ["done", "done"]
    assert "idempotency_key" not in pay.spec()["arguments"]["properties"]
    with pytest.raises(UsageError, match="idempotency_key"):
        pay.validate({"usd": 1, "idempotency_key": "mine"})


def test_every_try_is_reserved_in_the_budget(now: FakeClock) -> None:
    record = using(flaky(9, ConnectionError("reset")), budget=replace(Budget.unlimited(), tool_calls=2))
    assert str(record.error).startswith("BudgetExceeded: budget of 2 tool_calls")
    assert len(CALLS) == 2


def test_a_wait_never_goes_past_the_runs_own_time(now: FakeClock) -> None:
    record = using(flaky(9, ConnectionError("reset")), budget=replace(Budget.unlimited(), seconds=2))
    assert "failed after 2 attempts" in str(record.error)
    assert now.monotonic() == pytest.approx(1)


# ---- time


def test_a_tool_that_hangs_is_left_to_itself_and_cannot_act_through_the_run_any_more() -> None:
    late, told = threading.Event(), threading.Event()
    refusals: list[BaseException] = []

    @ak.tool(permission="write", criticality="low")
    def pay(usd: float) -> str:
        """Pay."""
        CALLS.append(usd)
        return "paid"

    @ak.tool(timeout_s=0.05, tries=1)
    def slow(place: str) -> str:
        """Take too long, then pay."""
        assert late.wait(10)
        try:
            pay(1.0)
        except BaseException as e:
            refusals.append(e)
        told.set()
        return "too late"

    def work(run: Run) -> str:
        with pytest.raises(ToolFailed, match=r"slow.*timeout.*no answer within 0\.05 s"):
            run.call(slow, place="A")
        late.set()
        assert told.wait(10)
        return str(run.call(pay, usd=2))  # the run itself goes on

    record = doing(work, slow, pay).run()
    assert (record.output, CALLS) == ({"value": "paid"}, [2.0])
    assert isinstance(refusals[0], Stopped)


def test_a_tool_may_not_take_longer_than_the_run_has_left() -> None:
    @ak.tool
    def slow(place: str) -> str:
        """Take a while."""
        time.sleep(5)
        return place

    start = time.monotonic()
    record = using(slow, budget=replace(Budget.unlimited(), seconds=0.2))
    assert str(record.error).startswith("BudgetExceeded: budget of 0.2 seconds")
    assert time.monotonic() - start < 4


def test_the_context_reaches_the_tool_and_a_tool_without_time_out_runs_on_the_runs_thread() -> None:
    @ak.tool
    def whose() -> list[Any]:
        """Tell where this runs."""
        from agentkit.current import current_run

        return [current_run() is not None, threading.current_thread() is threading.main_thread()]

    @ak.tool(timeout_s=None)
    def here() -> bool:
        """Tell where this runs."""
        return threading.current_thread() is threading.main_thread()

    assert using(whose, arguments={}).output == {"value": [True, False]}
    assert using(here, arguments={}).output == {"value": True}


# ---- results


def test_a_result_of_another_type_is_a_failure_of_the_tool() -> None:
    @ak.tool
    def count(place: str) -> int:
        """Count."""
        return "many"  # type: ignore[return-value]

    record = using(count)
    assert "failed (malformed): result: Input should be a valid integer" in str(record.error)


def test_a_write_whose_result_is_malformed_has_happened_nobody_knows_how() -> None:
    @ak.tool(permission="write", criticality="low")
    def pay(place: str) -> int:
        """Pay."""
        return "?"  # type: ignore[return-value]

    record = using(pay)
    assert [e["outcome"] for e in record.effects] == ["unknown"]


def test_an_agent_may_catch_a_failure_and_go_on() -> None:
    tool = flaky(9, ValueError("no such place"))

    def work(run: Run) -> str:
        try:
            return str(run.call(tool, place="A"))
        except ToolFailed as e:
            return f"{e.fault}: {e.message}"

    assert doing(work, tool).run().output == {"value": "error: ValueError: no such place"}


# ---- fallback, breaker, rate, cache


def test_a_fallback_is_called_with_the_same_arguments_and_the_record_says_why() -> None:
    @ak.tool
    def mirror(place: str) -> str:
        """Fetch from elsewhere."""
        return f"mirror of {place}"

    main = flaky(9, ValueError("gone"), fallback=mirror)
    record = using(main, mirror)
    assert record.output == {"value": "mirror of A"}
    assert decisions(record, "fallback") == [("mirror", "tool 'fetch' failed (error): ValueError: gone")]
    with pytest.raises(ak.AgentkitError, match="falls back on 'mirror', which is not among its tools"):
        using(main)


def test_no_fallback_after_a_write_that_may_have_happened() -> None:
    @ak.tool(permission="write", criticality="low")
    def other_bank(place: str) -> str:
        """Pay elsewhere."""
        raise AssertionError("it would have been paid twice")

    record = using(flaky(9, TimeoutError(), permission="write", fallback=other_bank), other_bank)
    assert "whether it took effect is unknown" in str(record.error)


def test_a_tool_that_keeps_failing_is_left_alone_for_a_while(now: FakeClock) -> None:
    tool = flaky(5, ConnectionError("down"))
    assert "failed after 3 attempts (error)" in str(using(tool).error)
    assert "circuit open" in str(using(tool).error)
    assert len(CALLS) == 5
    now.tick(31)
    assert using(tool).output == {"value": "from A"}


def test_calls_of_a_rate_limited_tool_wait_their_turn(now: FakeClock) -> None:
    tool = flaky(0, ValueError(), per_second=2)
    record = doing(lambda run: [run.call(tool, place=str(i)) for i in range(6)], tool).run()
    assert len(record.output["value"]) == 6  # type: ignore[index]
    assert now.monotonic() == pytest.approx(2)  # a burst of two, then two a second


def test_a_read_may_be_answered_from_memory_for_a_while(now: FakeClock) -> None:
    @ak.tool(cache_s=60)
    def look(place: str) -> list[str]:
        """Look."""
        CALLS.append(place)
        return [place]

    def work(run: Run) -> Any:
        first = run.call(look, place="A")
        first.append("changed by the caller")
        return [run.call(look, place="A"), run.call(look, place="B")]

    record = doing(work, look).run()
    assert record.output == {"value": [["A"], ["B"]]}
    assert [s.cached for s in record.steps if s.kind == "tool"] == [False, True, False]
    now.tick(61)
    using(look)
    assert CALLS == ["A", "B", "A"]
    with pytest.raises(UsageError, match="only what a read returns can be cached"):
        ak.tool(permission="write", cache_s=1)(look.function)


# ---- checks and claims


def own_order(arguments: Any, user: str | None) -> str | None:
    """Orders belong to their user."""
    return None if arguments["order_id"] == f"order of {user}" else f"{arguments['order_id']!r} is not {user!r}'s"


@ak.tool(permission="write", criticality="low", check=own_order, writes_to="order_id")
def cancel(order_id: str) -> str:
    """Cancel an order."""
    CALLS.append(order_id)
    return "cancelled"


def test_a_tools_own_check_sees_the_caller_and_refuses_for_good() -> None:
    def stubborn(run: Run) -> str:
        try:
            return str(run.call(cancel, order_id="order of ann"))
        except PolicyRefused:
            return "cancelled"

    system = doing(stubborn, cancel)
    with ak.acting_for("bob"):
        record = system.run()
    assert record.error == "PolicyRefused: tool 'cancel' was not called: 'order of ann' is not 'bob''s"
    assert (record.state, record.effects, CALLS) == ("FAILED", [], [])
    with ak.acting_for("ann", session="s-1"):
        record = system.run()
    assert (record.output, CALLS) == ({"value": "cancelled"}, ["order of ann"])
    assert (record.session, len(record.user_hash or ""), "ann" in str(record.user_hash)) == ("s-1", 16, False)
    assert system.run().state == "FAILED"  # nobody is nobody's owner


def test_arguments_changed_by_a_person_are_checked_like_any_others() -> None:
    wary = ak.tool(permission="write", criticality="high", check=own_order)(cancel.function)

    def other(request: ak.ApprovalRequest) -> Decision:
        return Decision("modify", by="eve", arguments={"order_id": "order of bob"})

    with ak.acting_for("ann"), ak.approve_with(other):
        record = using(wary, arguments={"order_id": "order of ann"})
    assert str(record.error).startswith("PolicyRefused")
    assert CALLS == []


def test_a_person_may_change_the_arguments() -> None:
    wary = flaky(0, ValueError(), permission="write", criticality="high")

    def smaller(request: ak.ApprovalRequest) -> Decision:
        assert request.key
        return Decision("modify", by="ann", reason="B is enough", arguments={"place": "B"})

    with ak.approve_with(smaller):
        record = using(wary)
    assert (record.output, CALLS) == ({"value": "from B"}, ["B"])
    assert [e["arguments"] for e in record.effects] == [{"place": "B"}]
    moves = [s.outputs for s in record.steps if s.kind == "transition"]
    assert "approved with changes by ann: B is enough" in moves


# ---- tiers


class Plane:
    """A control plane in memory."""

    def __init__(self) -> None:
        self.stop: Callable[..., str | None] = lambda *_: None
        self.told: list[Notice] = []

    def stopped(self, *what: Any) -> str | None:
        return self.stop(*what)

    def ledgers(self, system: str, user: str | None, *budgets: Budget | None) -> tuple[Ledger, ...]:
        return ()

    def notify(self, notice: Notice) -> None:
        self.told.append(notice)


@pytest.fixture
def plane(monkeypatch: pytest.MonkeyPatch) -> Plane:
    found = Plane()
    for module in ("agentkit.runs", "agentkit.systems"):
        monkeypatch.setattr(f"{module}.control", lambda: found)
    assert control_module.Control is not None
    return found


def test_tier_two_acts_and_tells_people_but_not_of_a_rehearsal(plane: Plane) -> None:
    tool = flaky(0, ValueError(), permission="write")
    record = using(tool)
    assert record.output == {"value": "from A"}
    assert [(n.kind, n.text, n.details["arguments"]) for n in plane.told] == [
        ("acted", "hedgehog called fetch", {"place": "A"})
    ]
    assert decisions(record, "tier of fetch") == [(2, "write of medium criticality")]
    doing(lambda run: run.call(tool, place="A"), tool).run(kind="evaluation")
    assert len(plane.told) == 1


def test_an_effect_in_doubt_is_told(plane: Plane) -> None:
    using(flaky(9, TimeoutError(), permission="write", criticality="low"))
    assert [n.kind for n in plane.told] == ["unknown"]


def test_what_an_agent_is_unsure_of_waits_for_a_person() -> None:
    tool = flaky(0, ValueError(), permission="write", criticality="low")

    def unsure(run: Run) -> Any:
        run.confidence = 0.5
        return run.call(tool, place="A")

    record = doing(unsure, tool).run()
    assert (record.output, CALLS) == ({"value": None}, [])
    assert decisions(record, "tier of fetch") == [(3, "confidence is 0.50, below 0.7")]


def test_after_two_failures_and_near_the_end_of_a_budget_writes_wait() -> None:
    broken = flaky(99, ValueError("no"))
    pay = ak.tool(permission="write", criticality="low")(flaky(0, ValueError()).function)
    pay.name = "pay"

    def after(failures: int) -> Callable[[Run], Any]:
        def work(run: Run) -> Any:
            for _ in range(failures):
                with pytest.raises(ToolFailed):
                    run.call(broken, place="A")
            CALLS.extend(["B"] * 99)
            return run.call(pay, place="B")

        return work

    assert doing(after(1), broken, pay).run().output != {"value": None}
    CALLS.clear()
    record = doing(after(2), broken, pay).run()
    assert decisions(record, "tier of pay")[0] == (3, "2 calls of this run have failed")

    def spent(run: Run) -> Any:
        return [run.call(pay, place=str(i)) for i in range(5)]

    record = doing(spent, pay, budget=replace(Budget.unlimited(), tool_calls=5)).run()
    assert [tier for tier, _ in decisions(record, "tier of pay")] == [1, 1, 1, 1, 3]


def test_a_release_in_production_is_watched_more_closely() -> None:
    tool = flaky(0, ValueError(), permission="write", criticality="low")
    system = doing(lambda run: run.call(tool, place="A"), tool)
    assert decisions(system.run(), "tier of fetch") == [(1, "write of low criticality")]
    system.stage = "production"
    record = system.run()
    assert decisions(record, "tier of fetch") == [(2, "it takes effect in production")]
    assert record.stage == "production"


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


# ---- permissions


def test_the_permission_matrix_can_be_printed_and_forbidden_stays_forbidden() -> None:
    read = flaky(0, ValueError())

    system = doing(lambda run: None, read, cancel)
    agent = system.agents["hedgehog"]
    type(agent).forbidden_tools = ("wire_money",)
    assert system.permissions().to_dicts() == [
        {"tool": "cancel", "hedgehog": "write"},
        {"tool": "fetch", "hedgehog": "read"},
        {"tool": "wire_money", "hedgehog": "forbidden"},
    ]
    type(agent).forbidden_tools = ("fetch",)
    assert str(using_agent(system, read).error).startswith("PermissionDenied")
    with pytest.raises(ak.AgentkitError, match="'fetch' is among its tools and forbidden to it"):
        agent.check()


def using_agent(system: ak.System, tool: ak.Tool[..., Any]) -> RunRecord:
    agent = system.agents["hedgehog"]
    type(agent).execute = lambda self, run, plan, text="": run.call(tool, place="A")  # type: ignore[assignment]
    return system.run()


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


def test_what_a_person_approved_is_checked_again_when_they_have_thought() -> None:
    shipped: list[str] = []

    def not_shipped(arguments: Any, user: str | None) -> str | None:
        return "it has been shipped" if shipped else None

    wary = ak.tool(permission="write", criticality="high", check=not_shipped)(cancel.function)

    def slowly(request: ak.ApprovalRequest) -> bool:
        shipped.append(request.arguments["order_id"])
        return True

    with ak.approve_with(slowly):
        record = using(wary, arguments={"order_id": "A"})
    assert str(record.error) == "PolicyRefused: tool 'cancel' was not called: it has been shipped"
    assert (CALLS, record.effects) == ([], [])


def test_the_same_write_again_waits_for_a_person_unless_repeating_it_changes_nothing() -> None:
    def twice(run: Run) -> Any:
        first = run.call(tool, place="A")
        return [first, run.call(tool, place="A"), run.last_decision and run.last_decision.verdict]

    tool = flaky(0, ValueError(), permission="write", criticality="low")
    record = doing(twice, tool).run()
    assert record.output == {"value": ["from A", None, "reject"]}
    assert decisions(record, "tier of fetch")[1] == (3, "this run has done exactly that already")
    tool = flaky(0, ValueError(), permission="write", criticality="low", idempotent=True)
    assert doing(twice, tool).run().output == {"value": ["from A", "from A", None]}


# ---- tools from a schema

SCHEMA = {
    "type": "object",
    "properties": {
        "rows": {"type": "array", "items": {"type": "object", "properties": {"price": {"type": "number"}}}},
        "note": {"type": "object", "additionalProperties": {"type": "string"}},
        "usd": {"type": "number", "maximum": 100},
    },
    "required": ["usd"],
}
MISFITS = {
    "missing": ({}, "'usd' is a required property"),
    "over": ({"usd": 101}, "greater than the maximum of 100"),
    "not a number": ({"usd": float("nan")}, "NaN or infinite"),
    "infinite inside": ({"usd": 1, "rows": [{"price": float("inf")}]}, "NaN or infinite"),
    "extra": ({"usd": 1, "to": "me"}, "'to' was unexpected"),
    "extra inside": ({"usd": 1, "rows": [{"price": 1, "discount": 1}]}, "'discount' was unexpected"),
    "another type": ({"usd": "1"}, "'1' is not of type 'number'"),
}


@pytest.mark.parametrize(("arguments", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_a_tool_from_a_json_schema_is_as_strict_as_a_typed_one(arguments: dict[str, Any], message: str) -> None:
    tool = ak.Tool.from_schema("pay", "Pay.", SCHEMA, lambda **values: CALLS.append(values), permission="write")
    with pytest.raises(UsageError, match=message):
        tool.validate(arguments)
    record = using(tool, arguments=arguments)
    assert (record.state, CALLS) == ("FAILED", [])


def test_a_tool_from_a_json_schema_runs_like_any_other() -> None:
    tool = ak.Tool.from_schema("pay", "Pay.", SCHEMA, lambda **values: values, permission="write", human_at={"usd": 50})
    arguments = {"usd": 5, "rows": [{"price": 1.5}], "note": {"any": "thing"}}
    assert using(tool, arguments=arguments).output == {"value": arguments}
    assert using(tool, arguments={"usd": 50}).output == {"value": None}
    assert tool.spec()["arguments"] == SCHEMA
    with pytest.raises(UsageError, match="no valid JSON schema"):
        ak.Tool.from_schema("pay", "Pay.", {"type": "nonsense"}, print)
    with pytest.raises(UsageError, match=r"human_at names \['eur'\]"):
        ak.Tool.from_schema("pay", "Pay.", SCHEMA, print, permission="write", human_at={"eur": 1})


# ---- ways round the rules that do not lead round them


@ak.tool(permission="execute", criticality="high")
def wipe(disk: str) -> str:
    """Wipe a disk."""
    CALLS.append(disk)
    return "wiped"


def test_a_thread_without_the_runs_context_calls_no_tool() -> None:
    def work(run: Run) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(wipe, disk="a").result()

    record = doing(work).run()
    assert "was called outside any run while runs are under way" in str(record.error)
    assert CALLS == []
    assert wipe("b") == "wiped"  # no run: a plain function


def test_a_thread_that_outlives_its_run_calls_nothing_any_more() -> None:
    from contextvars import copy_context

    tool, go, errors = flaky(0, ValueError()), threading.Event(), list[BaseException]()

    def later(run: Run) -> None:
        assert go.wait(10)
        try:
            run.call(tool, place="A")
        except BaseException as e:
            errors.append(e)

    threads: list[threading.Thread] = []

    def work(run: Run) -> str:
        threads.append(threading.Thread(target=copy_context().run, args=(later, run)))
        threads[0].start()
        return "done"

    assert doing(work, tool).run().state == "DONE"
    go.set()
    threads[0].join(10)
    assert (len(errors), CALLS) == (1, [])


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


def test_a_refusal_by_the_tool_itself_is_one() -> None:
    @ak.tool(permission="write", criticality="low")
    def wary(place: str) -> str:
        """Refuse."""
        raise PolicyRefused("wary", "not here")

    def stubborn(run: Run) -> str:
        try:
            return str(run.call(wary, place="A"))
        except Exception:
            return "swallowed"

    record = doing(stubborn, wary).run()
    assert record.error == "PolicyRefused: tool 'wary' was not called: not here"
    assert [e["outcome"] for e in record.effects] == ["failed"]


@pytest.mark.parametrize("rounds", [40])
def test_side_by_side_the_same_write_is_made_once(rounds: int) -> None:
    from contextvars import copy_context

    @ak.tool(permission="write", criticality="low")
    def pay(usd: float) -> str:
        """Pay."""
        CALLS.append(usd)
        return "paid"

    def work(run: Run) -> Any:
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(copy_context().run, lambda: run.call(pay, usd=1)) for _ in range(4)]
            return sorted(str(job.result()) for job in jobs)

    for _ in range(rounds):
        assert doing(work, pay).run().output == {"value": ["None", "None", "None", "paid"]}
    assert len(CALLS) == rounds


def test_a_system_that_is_called_does_not_repeat_its_callers_write_and_shares_its_doubts() -> None:
    tool = flaky(0, ValueError(), permission="write", criticality="low")
    inner = doing(lambda run: run.call(tool, place="A"), tool, name="inner")

    def twice(run: Run) -> Any:
        return [run.call(tool, place="A"), inner.run().output]

    record = doing(twice, tool).run()
    assert record.output == {"value": ["from A", {"value": None}]}

    def unsure(run: Run) -> Any:
        run.confidence = 0.1
        return inner.run().output

    record = doing(unsure, tool).run()
    assert record.output == {"value": {"value": None}}
    assert decisions(record, "tier of fetch") == [(3, "confidence is 0.10, below 0.7")]


def test_the_record_counts_tries_and_what_tools_cost(now: FakeClock) -> None:
    record = using(flaky(2, ConnectionError("reset"), cost_usd=0.4))
    assert (record.tool_calls, record.usd) == (3, pytest.approx(1.2))
    assert using(flaky(0, ValueError()), arguments={"place": 7}).tool_calls == 0


def test_wrong_questions_do_not_close_a_tool_for_others() -> None:
    tool = flaky(8, KeyError("no such place"))
    for _ in range(8):
        assert "failed (error): KeyError" in str(using(tool).error)
    assert using(tool).output == {"value": "from A"}


@pytest.mark.parametrize("error", [SystemExit(3), UsageError("no such table")])
def test_whatever_a_tool_raises_is_its_own_failure(error: BaseException) -> None:
    @ak.tool
    def odd(place: str) -> str:
        """Fail oddly."""
        raise error

    assert str(using(odd).error).startswith("ToolFailed: tool 'odd' failed (error)")


def test_a_check_looks_and_does_not_change() -> None:
    def meddling(arguments: Any, user: str | None) -> None:
        arguments["place"] = "B"

    tool = flaky(0, ValueError(), check=meddling)
    assert "does not support item assignment" in str(using(tool).error)
    assert CALLS == []


def test_a_write_belongs_in_execute() -> None:
    tool = flaky(0, ValueError(), permission="write", criticality="low")
    system = doing(lambda run: None, tool)
    type(system.agents["hedgehog"]).plan = lambda self, run, text="": run.call(tool, place="A")  # type: ignore[assignment]
    assert "was called in PLANNING; call it in `execute`" in str(system.run().error)
    assert CALLS == []


def test_a_claim_is_free_again_when_the_write_was_not_made() -> None:
    def by(name: str) -> ak.System:
        return doing(lambda run: run.call(cancel, order_id="A"), cancel, name=name)

    cancel.check, before = None, cancel.check
    careful = ak.Autonomy(tiers={**ak.Autonomy().tiers, "write": {"low": 3, "medium": 3, "high": 3}})
    try:
        first, second = by("first"), by("second")
        first.autonomy = careful
        record = doing(lambda run: [first.run().output, second.run().output], cancel).run()
    finally:
        cancel.check = before
    assert record.output == {"value": [{"value": None}, {"value": "cancelled"}]}


WRONG: dict[str, dict[str, Any]] = {
    "tries": {"tries": 10},
    "tries must be": {"tries": 2.5},
    "idempotent": {"idempotent": "no"},
    "cost_usd": {"cost_usd": -1},
    "timeout_s": {"timeout_s": 0},
}


@pytest.mark.parametrize(("message", "options"), WRONG.items())
def test_options_out_of_range_are_refused(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=message):
        flaky(0, ValueError(), **options)


def test_a_fallback_must_take_the_same_arguments() -> None:
    with pytest.raises(UsageError, match="must take the same arguments"):
        flaky(0, ValueError(), permission="execute", fallback=wipe)


def test_an_inventory_without_its_comma_is_refused() -> None:
    for attribute, value in (("forbidden_tools", "danger"), ("tools", wipe), ("tools", (print,))):
        system = doing(lambda run: None)
        agent = system.agents["hedgehog"]
        setattr(type(agent), attribute, value)
        with pytest.raises(ak.AgentkitError, match=r"comma missing|is no tool"):
            agent.check()


def test_a_days_budget_limits_what_it_names() -> None:
    with pytest.raises(ak.AgentkitError, match=r"ak\.DailyBudget"):
        doing(lambda run: None, daily=Budget(usd=50))
    assert doing(lambda run: None, daily=ak.DailyBudget(usd=50)).run().state == "DONE"
    for amount in (-100, float("nan")):
        record = doing(lambda run, amount=amount: run.reserve(usd=amount)).run()
        assert "to reserve" in str(record.error)
