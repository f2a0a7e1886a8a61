"""How a tool is called: tries, time-outs, results that do not fit, fallbacks, breakers, rates, caches."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from governed import CALLS, decisions, flaky, nothing_called, now, using  # noqa: F401
from hedgehogs import doing

import agentkit as ak
from agentkit import Budget, Run
from agentkit.errors import Stopped, ToolFailed, UsageError
from agentkit.testing import FakeClock

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


def test_the_record_counts_tries_and_what_tools_cost(now: FakeClock) -> None:
    record = using(flaky(2, ConnectionError("reset"), cost_usd=0.4))
    assert (record.tool_calls, record.usd) == (3, pytest.approx(1.2))
    assert using(flaky(0, ValueError()), arguments={"place": 7}).tool_calls == 0


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
    go_on = threading.Event()

    @ak.tool
    def slow(place: str) -> str:
        """Take a while."""
        go_on.wait(60)
        return place

    start = time.monotonic()
    record = using(slow, budget=replace(Budget.unlimited(), seconds=0.2))
    assert str(record.error).startswith("BudgetExceeded: budget of 0.2 seconds")
    assert time.monotonic() - start < 30
    go_on.set()


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


@pytest.mark.parametrize("error", [SystemExit(3), UsageError("no such table")])
def test_whatever_a_tool_raises_is_its_own_failure(error: BaseException) -> None:
    @ak.tool
    def odd(place: str) -> str:
        """Fail oddly."""
        raise error

    assert str(using(odd).error).startswith("ToolFailed: tool 'odd' failed (error)")


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


def test_wrong_questions_do_not_close_a_tool_for_others() -> None:
    tool = flaky(8, KeyError("no such place"))
    for _ in range(8):
        assert "failed (error): KeyError" in str(using(tool).error)
    assert using(tool).output == {"value": "from A"}
