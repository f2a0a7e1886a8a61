"""The circuit breaker: open after failures in a row, one trial at a time, parallel calls do not queue."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit.breaker import Breaker, CircuitOpen
from agentkit.testing import FakeClock


def fail() -> None:
    raise ConnectionError("down")


def trip(breaker: Breaker) -> None:
    for _ in range(breaker.failures):
        with pytest.raises(ConnectionError):
            breaker.call(fail)


def test_after_failures_in_a_row_calls_fail_at_once_until_a_trial_succeeds() -> None:
    with FakeClock() as now:
        breaker = Breaker(failures=3, reset_s=30)
        trip(breaker)
        assert breaker.is_open
        with pytest.raises(CircuitOpen, match="the next try is in 30 s"):
            breaker.call(lambda: pytest.fail("must not be called"))
        now.tick(30)
        assert not breaker.is_open
        assert breaker.call(lambda: "up") == "up"
        for _ in range(2):  # counting begins anew
            with pytest.raises(ConnectionError):
                breaker.call(fail)
        assert breaker.call(lambda: "up") == "up"


def test_a_trial_that_fails_opens_it_for_as_long_again() -> None:
    with FakeClock() as now:
        breaker = Breaker(failures=2, reset_s=30)
        trip(breaker)
        now.tick(31)
        with pytest.raises(ConnectionError):
            breaker.call(fail)
        with pytest.raises(CircuitOpen):
            breaker.call(fail)
        now.tick(29)
        with pytest.raises(CircuitOpen):
            breaker.call(fail)


def test_while_a_trial_runs_the_others_fail_at_once() -> None:
    with FakeClock() as now:
        breaker, inside, done = Breaker(failures=1, reset_s=30), threading.Event(), threading.Event()
        trip(breaker)
        now.tick(30)

        def trial() -> str:
            inside.set()
            assert done.wait(10)
            return "up"

        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(breaker.call, trial)
            assert inside.wait(10)
            with pytest.raises(CircuitOpen):
                breaker.call(lambda: "second")
            done.set()
            assert first.result(10) == "up"
        assert breaker.call(lambda: "third") == "third"


def test_errors_that_are_not_the_callees_do_not_count() -> None:
    breaker = Breaker(failures=1)
    with pytest.raises(ConnectionError):
        breaker.call(fail, counts=lambda error: False)
    assert breaker.call(lambda: 1) == 1


def test_parallel_calls_do_not_wait_for_each_other() -> None:
    breaker, together = Breaker(), threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        assert len([*pool.map(lambda _: breaker.call(lambda: together.wait(10)), range(4))]) == 4


@given(outcomes=st.lists(st.booleans(), max_size=40), failures=st.integers(1, 5))
def test_it_is_open_exactly_after_that_many_failures_in_a_row(outcomes: list[bool], failures: int) -> None:
    with FakeClock():
        breaker, row = Breaker(failures, reset_s=60), 0
        for good in outcomes:
            if row >= failures:
                with pytest.raises(CircuitOpen):
                    breaker.call(lambda: None)
                continue
            if good:
                breaker.call(lambda: None)
                row = 0
            else:
                with pytest.raises(ConnectionError):
                    breaker.call(fail)
                row += 1
            assert breaker.is_open == (row >= failures)
