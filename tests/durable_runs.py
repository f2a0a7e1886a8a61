"""For the tests of durable runs: work registered for a test, effects in a place outside, kills at exact points."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("dbos")  # who imports this is skipped with it

from agentkit.approvals import ApprovalRequest
from agentkit.autonomy import Autonomy
from agentkit.budget import Budget
from agentkit.errors import ToolFailed
from agentkit.records import RunRecord
from agentkit.runs import Run
from agentkit.states import State
from agentkit.tools import Inventory, Tool, tool
from agentkit_tracking import durable
from agentkit_tracking.durable import works
from agentkit_tracking.runlog import RunLog

Person = Callable[[ApprovalRequest], Any]


class Killed(BaseException):
    """Stands for `kill -9` at an exact point: nothing more of the run is done or written in this process."""

    kills: ClassVar[list[int]] = []

    def __init__(self) -> None:
        self.kills.append(1)


def nobody(request: ApprovalRequest) -> bool:
    return False


@contextmanager
def opened(person: Person = nobody, **options: Any) -> Iterator[durable.Runner]:
    with durable.Runner(approver=person, poll_s=0.05, grace_s=5.0, **options) as runner:
        yield runner


@pytest.fixture
def given() -> Iterator[Callable[..., None]]:
    """Registers work for one test: `given(name, function, **options)`."""
    names: list[str] = []

    def register(name: str, function: Callable[..., Any], **options: Any) -> None:
        works.forget(name)
        durable.work(name, **options)(function)
        names.append(name)

    yield register
    for name in names:
        works.forget(name)


def executing(*tools: Tool[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Takes a run from IDLE to REFLECTING around `work(run, **inputs)`, which has `tools`."""

    def wrap(work: Callable[..., Any]) -> Callable[..., Any]:
        def whole(run: Run, **inputs: Any) -> Any:
            run.to(State.PLANNING, "asked")
            run.to(State.EXECUTING, "planned")
            with run.acting_as(Inventory("worker", tools)):
                found = work(run, **inputs)
            run.to(State.REFLECTING, "done")
            return found

        return whole

    return wrap


def logged(home: Path) -> list[dict[str, Any]]:
    """The runs in the log, whole, as data."""
    log = RunLog(home / "log")
    ids = log.sql("SELECT run_id FROM outcomes")["run_id"]
    return [json.loads(log.find(run_id).to_json()) for run_id in ids]


def stopped(run_id: str, before: int = -1) -> None:
    """Wait until a run is killed once more than `before`, or over, and nothing happens to it in this process."""
    end = time.monotonic() + 60
    runner = current_runner()
    while not (len(Killed.kills) > before >= 0 or durable.status(run_id).state in ("done", "failed")):
        assert time.monotonic() < end
        time.sleep(0.02)
    while runner._under_way:
        assert time.monotonic() < end
        time.sleep(0.01)


def current_runner() -> Any:
    from agentkit_tracking.durable import runner

    return runner._current


def taken_up(work: str, times: int = 2) -> RunRecord:
    """The record of a run that is killed by and by, by its own tools, and is over in the end."""
    for _ in range(times):
        before = len(Killed.kills)
        with opened() as runner:
            handle = runner.start(work, {}, run_id="r")
            stopped("r", before)
            if durable.status("r").state in ("done", "failed"):
                return handle.result(timeout_s=30)
    raise AssertionError(f"not over after {times} starts")


class Outside:
    """A place that effects are made in, and a kill on the way there or back, once."""

    def __init__(self, kill_at: set[tuple[str, int, str]] | None = None) -> None:
        self.effects: list[tuple[str, int]] = []
        self.keys: list[str] = []
        self.asked: list[ApprovalRequest] = []
        self.kill_at = kill_at or set()

    def reach(self, name: str, n: int, where: str) -> None:
        if (name, n, where) in self.kill_at:
            self.kill_at.remove((name, n, where))
            raise Killed

    def tools(self) -> tuple[Tool[..., Any], ...]:
        def act(name: str, n: int) -> str:
            self.reach(name, n, "before")
            self.effects.append((name, n))
            self.reach(name, n, "after")
            return f"{name} {n}"

        @tool
        def look(n: int) -> str:
            """Reads."""
            return act("look", n)

        @tool(permission="write", criticality="low", idempotent=True)
        def put(n: int, idempotency_key: str) -> str:
            """Writes by key."""
            self.keys.append(f"{n}:{idempotency_key}")
            return act("put", n)

        @tool(permission="write", criticality="low", human_at={"usd": 50})
        def send(n: int, usd: float = 0.0) -> str:
            """Writes each time."""
            return act("send", n)

        return look, put, send

    def person(self, answer: Any) -> Person:
        def asked(request: ApprovalRequest) -> Any:
            self.asked.append(request)
            return answer(request) if callable(answer) else answer

        return asked


AUTONOMY = Autonomy(budget_used_from=None, failures_from=None)


def killed_and_resumed(
    outside: Outside, given: Any, answer: Any, *calls: tuple[str, int], budget: Budget | None = None, **inputs: Any
) -> RunRecord:
    """A run that makes `calls`, killed wherever `outside.kill_at` says, and taken up as often as it takes."""
    tools = {one.name: one for one in outside.tools()}

    @executing(*tools.values())
    def work(run: Run) -> list[Any]:
        found = []
        for name, n in calls:
            try:
                found.append(run.call(tools[name], n=n, **inputs))
            except ToolFailed as e:
                found.append([e.unknown, e.fault])
        return [found, run.ledger.used["tool_calls"]]

    given("work", work, autonomy=AUTONOMY, budget=budget or Budget())
    for _ in range(1 + len(outside.kill_at)):
        before = len(Killed.kills)
        with opened(outside.person(answer)) as runner:
            handle = runner.start("work", {}, run_id="r")
            stopped("r", before)
            if durable.status("r").state in ("done", "failed"):
                return handle.result(timeout_s=30)
    raise AssertionError("the run is not over")


def interrupted(given: Any) -> Callable[..., Any]:
    """Registers `work`, which makes one call, and leaves its run `r` killed on the way there; the function registered."""
    outside = Outside({("look", 1, "before")})
    look, _, _ = outside.tools()
    function = executing(look)(lambda run: run.call(look, n=1))
    given("work", function)
    before = len(Killed.kills)
    with opened() as runner:
        runner.start("work", {}, run_id="r")
        stopped("r", before)
    return function
