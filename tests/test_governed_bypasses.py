"""Ways round the rules that do not lead round them: threads, calls side by side, systems that call systems."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from governed import CALLS, decisions, flaky, nothing_called, wipe  # noqa: F401
from hedgehogs import doing

import agentkit as ak
from agentkit import Run


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


def test_a_write_belongs_in_execute() -> None:
    tool = flaky(0, ValueError(), permission="write", criticality="low")
    system = doing(lambda run: None, tool)
    type(system.agents["hedgehog"]).plan = lambda self, run, text="": run.call(tool, place="A")  # type: ignore[assignment]
    assert "was called in PLANNING; call it in `execute`" in str(system.run().error)
    assert CALLS == []
