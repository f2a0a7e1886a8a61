"""Durable runs: what is given back, what is asked, what a kill at any point leaves behind."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("dbos")

from agentkit import current
from agentkit.approvals import ApprovalRequest, Decision
from agentkit.autonomy import Autonomy
from agentkit.budget import Budget, Ledger
from agentkit.callers import acting_for
from agentkit.errors import AgentkitError, BudgetExceeded, Stopped, ToolFailed, UsageError
from agentkit.records import RunRecord
from agentkit.runs import Run
from agentkit.states import State
from agentkit.tools import Inventory, Tool, tool
from agentkit_pipelines import durable_cli
from agentkit_tracking import durable, runlog
from agentkit_tracking.control import ControlPlane
from agentkit_tracking.control.database import ControlError
from agentkit_tracking.durable import works
from agentkit_tracking.durable.journal import IN_DOUBT

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
    return [json.loads(line) for path in (home / "runs").glob("*.jsonl") for line in path.read_text().splitlines()]


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


# ---- a run that nobody interrupts


def test_a_durable_run_is_recorded_once_with_every_step(given: Any, own_home: Path) -> None:
    outside = Outside()
    record = killed_and_resumed(outside, given, nobody, ("look", 0), ("put", 1), ("send", 2))
    assert record.state == "DONE"
    assert record.output == {"value": [["look 0", "put 1", "send 2"], 3.0]}
    assert [s.name for s in record.steps if s.kind == "tool"] == ["look", "put", "send"]
    assert [one["outcome"] for one in record.effects] == ["done", "done"]
    [line] = logged(own_home)
    assert RunRecord(**{**line, "steps": record.steps}) == record
    with closing(sqlite3.connect(own_home / "durable.db")) as database:
        kinds = database.execute("SELECT DISTINCT serialization FROM operation_outputs").fetchall()
        assert kinds == [("portable_json",)]
        assert database.execute("SELECT serialization FROM workflow_status").fetchall() == [("portable_json",)]


def test_starting_the_same_id_twice_is_starting_once(given: Any, own_home: Path) -> None:
    given("echo", executing()(lambda run, text: text))
    with opened() as runner:
        first = runner.start("echo", {"text": "a"}, run_id="r").result(timeout_s=30)
        assert runner.start("echo", {"text": "a"}, run_id="r").result(timeout_s=30) == first
        with pytest.raises(UsageError, match="does something else"):
            runner.start("echo", {"text": "b"}, run_id="r")
        with pytest.raises(UsageError, match="a durable runner is open"):
            durable.Runner().launch()
        with pytest.raises(UsageError, match="no durable run 'other'"):
            runner.handle("other")
    assert len(logged(own_home)) == 1


def test_an_error_and_a_refusal_end_the_run_as_failed_and_nothing_is_repeated(given: Any, own_home: Path) -> None:
    begun = []

    @tool
    def look() -> str:
        """Reads."""
        return "seen"

    @executing(look)
    def greedy(run: Run) -> None:
        begun.append(run.run_id)
        for _ in range(3):
            run.call(look)

    given("greedy", greedy, budget=Budget(tool_calls=2))
    with opened() as runner:
        record = runner.start("greedy", {}).result(timeout_s=30)
    assert record.state == "FAILED"
    assert record.error is not None
    assert record.error.startswith("BudgetExceeded: budget of 2 tool_calls would be exceeded")
    assert len(begun) == 1
    [status] = durable.runs()
    assert (status.state, status.last, status.restarts) == ("failed", record.error, 0)
    with opened():
        time.sleep(0.3)
    assert len(begun) == 1
    assert len(logged(own_home)) == 1


def test_what_cannot_be_found_again_is_refused(given: Any) -> None:
    with opened() as runner, pytest.raises(UsageError, match="no other process could find it again"):
        runner.start(lambda run: None, {})
    with pytest.raises(UsageError, match="not in 'mysql"):
        durable.Runner("mysql://localhost/x")
    given("twice", lambda run: None)
    with pytest.raises(UsageError, match="already"):
        durable.work("twice")(lambda run: None)
    with pytest.raises(UsageError, match="choose another name"):
        durable.work("a/b")(lambda run: None)


def test_a_runner_without_a_database_says_so(own_home: Path) -> None:
    assert durable.runs() == []
    with pytest.raises(UsageError, match="nothing was run durably yet"):
        durable.status("r")
    own_home.mkdir()
    (own_home / "durable.db").write_text("this is no database, by any means")
    with pytest.raises(UsageError, match=r"durable\.db, cannot be used"):
        durable.Runner().launch()
    with pytest.raises(UsageError, match="cannot be read"):
        durable.runs()


# ---- killed and taken up

CALLS = (("look", 0), ("put", 1), ("send", 2), ("look", 3), ("put", 4), ("send", 5))


def _happened(outside: Outside) -> Callable[[ApprovalRequest], Any]:
    """A person who looks."""

    def answer(request: ApprovalRequest) -> Any:
        n = request.arguments["call"]["n"]
        done = (request.tool, n) in outside.effects
        return Decision("modify", arguments={"result": f"{request.tool} {n}"}) if done else True

    return answer


def test_killed_at_any_call_every_effect_is_there_once_and_the_record_is_whole(given: Any, own_home: Path) -> None:
    """A run for each point, all killed in one process and taken up by the next."""
    points = {f"{n}{where}": {(*CALLS[n], where)} for n in range(len(CALLS)) for where in ("before", "after")}
    outsides = {run_id: Outside(kill_at) for run_id, kill_at in points.items()}

    def work(run: Run) -> Any:
        tools = {one.name: one for one in outsides[run.run_id].tools()}

        @executing(*tools.values())
        def whole(run: Run) -> list[Any]:
            return [[run.call(tools[name], n=n) for name, n in CALLS], run.ledger.used["tool_calls"]]

        return whole(run)

    def person(request: ApprovalRequest) -> Any:
        outside = outsides[request.run_id]
        return outside.person(_happened(outside))(request)

    given("work", work, autonomy=AUTONOMY, budget=Budget(tool_calls=len(CALLS)))
    before = len(Killed.kills)
    with opened() as runner:
        for run_id in points:
            runner.start("work", {}, run_id=run_id)
        stopped("0before", before + len(points) - 1)
    with opened(person, at_once=len(points)) as runner:
        records = {run_id: runner.handle(run_id).result(timeout_s=60) for run_id in points}
    for run_id, record in records.items():
        outside, killed = outsides[run_id], CALLS[int(run_id[0])]
        assert record.state == "DONE", (run_id, record.error)
        assert record.output == {"value": [[f"{name} {n}" for name, n in CALLS], 6.0]}
        assert [s.name for s in record.steps if s.kind == "tool"] == [name for name, _ in CALLS]
        assert all(s.error is None for s in record.steps)
        effects = Counter(outside.effects)
        assert all(effects[call] == 1 for call in CALLS if call[0] == "send")
        assert len(set(outside.keys)) == 2  # one key for each call, however often it was made
        assert [one["outcome"] for one in record.effects] == ["done"] * 4
        assert len(outside.asked) == (killed[0] == "send")
        repeated = [s for s in record.steps if s.name == "repeat" and s.kind == "decision"]
        assert len(repeated) == (killed[0] == "put")
    assert Counter(line["run_id"] for line in logged(own_home)) == Counter([*points])
    assert {(status.state, status.restarts) for status in durable.runs()} == {("done", 1)}


def test_killed_again_and_again_within_one_call_each_doubt_is_a_question_of_its_own(given: Any) -> None:
    outside = Outside()
    outside.kill_at = {("send", 1, "before"), ("send", 1, "after"), ("put", 2, "after")}
    record = killed_and_resumed(outside, given, _happened(outside), ("look", 0), ("send", 1), ("put", 2))
    assert record.output == {"value": [["look 0", "send 1", "put 2"], 3.0]}
    assert outside.effects.count(("send", 1)) == 1
    first, second = outside.asked
    assert first.key != second.key
    assert first.reason == second.reason == IN_DOUBT
    assert first.arguments == {"call": {"n": 1, "usd": 0.0}, "result": None}
    assert [s.outputs["verdict"] for s in record.steps if s.kind == "approval"] == ["approve", "modify"]


def test_what_nobody_vouches_for_is_not_repeated_and_is_told(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(Run, "tell", lambda self, kind, text, **details: told.append(kind))
    outside = Outside()
    outside.kill_at = {("send", 1, "before")}
    record = killed_and_resumed(outside, given, False, ("look", 0), ("send", 1), ("look", 2))
    assert record.state == "DONE"
    assert record.output == {"value": [["look 0", [True, "error"], "look 2"], 3.0]}
    assert outside.effects == [("look", 0), ("look", 2)]
    assert [one["outcome"] for one in record.effects] == ["unknown"]
    assert told == ["unknown", "unknown"]  # that it is in doubt, and that it stays so


def test_a_failure_is_given_back_as_the_same_failure(given: Any) -> None:
    outside, tries = Outside(), []

    @tool
    def broken() -> str:
        """Fails."""
        tries.append(1)
        raise RuntimeError("no")

    look, _, _ = outside.tools()

    @executing(broken, look)
    def work(run: Run) -> list[Any]:
        with pytest.raises(ToolFailed) as caught:
            run.call(broken)
        run.call(look, n=1)
        return [str(caught.value), caught.value.fault, caught.value.unknown, run.failures]

    given("work", work)
    outside.kill_at = {("look", 1, "before")}
    record = taken_up("work")
    assert record.output == {"value": ["tool 'broken' failed (error): RuntimeError: no", "error", False, 1]}
    assert len(tries) == 1


def test_a_resumed_run_has_no_new_budget(given: Any) -> None:
    outside = Outside()
    outside.kill_at = {("look", 2, "after")}
    calls = [("look", n) for n in range(5)]
    record = killed_and_resumed(outside, given, nobody, *calls, budget=Budget(tool_calls=4))
    assert record.state == "FAILED"
    assert record.error is not None
    assert "4 used, 1 more" in record.error
    assert [n for _, n in outside.effects] == [0, 1, 2, 2, 3]


def test_time_that_was_spent_before_counts(given: Any) -> None:
    outside = Outside()
    look, _, _ = outside.tools()

    @tool
    def slow() -> str:
        """Takes its time."""
        time.sleep(0.6)
        return "there"

    @executing(slow, look)
    def work(run: Run) -> float:
        run.call(slow)
        run.call(look, n=1)
        return run.ledger.used["seconds"]

    given("work", work, budget=Budget(seconds=30))
    outside.kill_at = {("look", 1, "before")}
    record = taken_up("work")
    assert record.output is not None
    assert 0.6 <= record.output["value"] < 5
    [step] = [s for s in record.steps if s.name == "slow"]
    assert step.seconds >= 0.6
    assert record.seconds >= 0.6
    assert record.phases["execution"] >= 0.6


def test_calls_that_a_tool_makes_itself_belong_to_its_checkpoint(given: Any) -> None:
    outside = Outside()
    look, put, send = outside.tools()

    @tool
    def survey() -> list[str]:
        """Reads with the help of others."""
        run = current.current_run()
        assert run is not None
        return [run.call(look, n=10), run.call(put, n=11)]

    @executing(survey, look, put, send)
    def work(run: Run) -> list[Any]:
        return [run.call(survey), run.call(put, n=1), run.call(look, n=2), run.ledger.used["tool_calls"]]

    given("work", work)
    outside.kill_at = {("put", 1, "after"), ("look", 2, "before")}
    record = taken_up("work", 3)
    assert record.output == {"value": [["look 10", "put 11"], "put 1", "look 2", 5.0]}
    assert Counter(outside.effects) == {("look", 10): 1, ("put", 11): 1, ("put", 1): 2, ("look", 2): 1}
    assert len(set(outside.keys)) == 2
    assert record.tool_calls == 5


def test_a_write_inside_an_interrupted_tool_is_not_repeated_blindly(given: Any) -> None:
    outside = Outside()
    look, _, send = outside.tools()

    @tool
    def survey() -> str:
        """A read by its own account."""
        run = current.current_run()
        assert run is not None
        return str(run.call(send, n=1))

    @executing(survey, look, send)
    def work(run: Run) -> str:
        run.call(look, n=0)
        return str(run.call(survey))

    given("work", work)
    outside.kill_at = {("send", 1, "after")}
    record = taken_up("work", 2)
    assert outside.effects == [("look", 0), ("send", 1)]
    assert record.state == "FAILED"
    assert record.error is not None
    assert "whether it took effect is unknown" in record.error


def test_code_that_makes_other_calls_ends_the_run_with_both_named(given: Any, own_home: Path) -> None:
    outside = Outside()
    outside.kill_at = {("send", 2, "before")}
    look, put, send = outside.tools()

    def making(*calls: tuple[Tool[..., Any], int]) -> Callable[..., Any]:
        @executing(look, put, send)
        def work(run: Run) -> None:
            for one, n in calls:
                try:
                    run.call(one, n=n)
                except Exception:  # code that catches everything does not get past it
                    continue

        return work

    with opened() as runner:
        for name in ("other", "arguments", "fewer"):
            before = len(Killed.kills)
            outside.kill_at = {("send", 2, "before")}
            given(name, making((look, 0), (look, 1), (send, 2)))
            runner.start(name, {}, run_id=name)
            stopped(name, before)
    given("other", making((look, 0), (put, 1), (send, 2)))
    given("arguments", making((look, 0), (look, 7), (send, 2)))
    given("fewer", making((look, 0)))
    with opened() as runner:
        fewer = runner.handle("fewer").result(timeout_s=30)
        other = runner.handle("other").result(timeout_s=30)
        arguments = runner.handle("arguments").result(timeout_s=30)
    assert other.state == arguments.state == "FAILED"
    assert "has 'other/1 tool look' where the code makes 'other/1 tier put'" in str(other.error)
    assert "'arguments/1 tool look' where the code makes 'arguments/1 tool look with other" in str(arguments.error)
    assert "has 'fewer/1 tool look' where the code makes 'the end of the run'" in str(fewer.error)
    assert outside.effects == [("look", 0), ("look", 1)] * 3
    assert len(logged(own_home)) == 3


def test_text_that_is_no_unicode_comes_back_repaired(given: Any) -> None:
    outside = Outside()
    look, _, _ = outside.tools()

    @tool
    def odd() -> list[Any]:
        """Returns what databases do not take."""
        return ["lone \ud800 surrogate", "\x00", 2**70, float("inf")]

    @executing(odd, look)
    def work(run: Run) -> str:
        found = run.call(odd)
        run.call(look, n=1)
        return repr(found)

    given("work", work)
    outside.kill_at = {("look", 1, "before")}
    assert taken_up("work", 2).output == {"value": "['lone ? surrogate', '\\x00', 1180591620717411303424, None]"}


def test_a_stop_while_a_doubt_is_looked_into_ends_the_run(given: Any) -> None:
    outside = Outside()
    outside.kill_at = {("send", 1, "before")}

    def stop(request: ApprovalRequest) -> bool:
        raise Stopped("stopped by ada")

    record = killed_and_resumed(outside, given, stop, ("look", 0), ("send", 1), ("look", 2))
    assert (record.state, record.error) == ("FAILED", "Stopped: stopped by ada")
    assert outside.effects == [("look", 0)]


# ---- waiting for people


def test_a_wait_for_a_person_survives_the_process_and_asks_the_same(given: Any) -> None:
    outside, asked, answered = Outside(), [], threading.Event()

    def person(request: ApprovalRequest) -> bool:
        asked.append(request)
        answered.wait(60)
        return True

    _, _, send = outside.tools()

    @executing(send)
    def work(run: Run) -> Any:
        return run.call(send, n=1, usd=80.0)

    given("work", work, autonomy=AUTONOMY)
    for n in range(3):
        with opened(person) as runner:
            handle = runner.start("work", {}, run_id="r")
            while len(asked) <= n:
                time.sleep(0.01)
            if n == 2:
                answered.set()
                record = handle.result(timeout_s=30)
        # closing did not wait for the person
    assert record.state == "DONE"
    assert outside.effects == [("send", 1)]
    assert asked[0].key
    assert replace(asked[0], doing="") == replace(asked[1], doing="") == replace(asked[2], doing="")
    assert [s.kind for s in record.steps].count("approval") == 1


def test_a_desk_that_is_away_is_asked_again(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    outside, away = Outside(), [True]

    def person(request: ApprovalRequest) -> bool:
        if away and away.pop():
            raise ControlError("no database")
        return True

    _, _, send = outside.tools()
    given("work", executing(send)(lambda run: run.call(send, n=1, usd=80.0)), autonomy=AUTONOMY)
    monkeypatch.setattr("agentkit_tracking.durable.runner._AGAIN_S", 0.1)
    with opened(person) as runner:
        assert runner.start("work", {}).result(timeout_s=30).state == "DONE"
    assert outside.effects == [("send", 1)]


def test_the_desk_of_the_control_plane_is_asked_where_no_other_approver_is_given(
    given: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AGENTKIT_AUTHOR", "ada")
    outside = Outside()
    _, _, send = outside.tools()
    given("work", executing(send)(lambda run: run.call(send, n=1, usd=80.0)), autonomy=AUTONOMY)
    outside.kill_at = {("send", 1, "after")}
    before = len(Killed.kills)
    with durable.Runner(poll_s=0.05) as runner:
        runner.start("work", {}, run_id="r")
        desk = ControlPlane().desk
        desk.decide(_waiting_for(desk).id, "approve")
        stopped("r", before)
    with durable.Runner(poll_s=0.05) as runner:
        doubt = _waiting_for(desk)
        assert doubt.request.reason == IN_DOUBT
        durable_cli.runs()
        assert doubt.id in capsys.readouterr().out
        changed = {**doubt.request.arguments, "result": "sent, as the bank says"}
        desk.decide(doubt.id, "modify", "it is on the statement", changed)
        record = runner.handle("r").result(timeout_s=30)
    assert record.output == {"value": "sent, as the bank says"}
    assert outside.effects == [("send", 1)]


def _waiting_for(desk: Any) -> Any:
    end = time.monotonic() + 30
    while not (waiting := desk.waiting()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return waiting[0]


# ---- what goes wrong around it


def test_a_record_that_cannot_be_handed_over_now_is_handed_over_later(
    given: Any, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = Outside()
    look, _, _ = outside.tools()
    given("work", executing(look)(lambda run: run.call(look, n=1)))
    monkeypatch.setattr("agentkit_tracking.durable.runner._AGAIN_S", 0.1)
    own_home.mkdir()
    (own_home / "runs").write_text("in the way")
    with opened() as runner:
        handle = runner.start("work", {})
        with pytest.raises(TimeoutError, match=r"not over after 1 s"):
            handle.result(timeout_s=1)
        (own_home / "runs").unlink()
        assert handle.result(timeout_s=30).state == "DONE"
    assert outside.effects == [("look", 1)]
    assert len(logged(own_home)) == 1


def test_a_kill_between_the_run_log_and_its_checkpoint_leaves_one_line(
    given: Any, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = Outside()
    look, _, _ = outside.tools()
    given("work", executing(look)(lambda run: run.call(look, n=1)))

    def emit(record: RunRecord) -> None:
        runlog.write(record)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("agentkit.sinks.emit", emit)
        with opened() as runner:
            before = len(Killed.kills)
            runner.start("work", {}, run_id="r")
            stopped("r", before)
    with opened() as runner:
        assert runner.handle("r").result(timeout_s=30).state == "DONE"
    assert len(logged(own_home)) == 1


def test_a_journal_that_cannot_be_written_keeps_the_run_from_doing_more(
    given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = Outside()
    look, _, _ = outside.tools()

    @executing(look)
    def work(run: Run) -> None:
        for n in range(3):
            try:
                run.call(look, n=n)
            except Exception:
                continue

    given("work", work)
    monkeypatch.setattr("agentkit_tracking.durable.runner._AGAIN_S", 0.1)
    with opened() as runner:
        database = runner._dbos._sys_db
        whole, broken = database.record_operation_result, [True]

        def record(result: Any, **options: Any) -> None:
            if "tool look" in result["function_name"] and broken and broken.pop():
                raise OSError("disk full")
            whole(result, **options)

        monkeypatch.setattr(database, "record_operation_result", record)
        assert runner.start("work", {}).result(timeout_s=30).state == "DONE"
    assert [n for _, n in outside.effects] == [0, 0, 1, 2]


def test_a_run_that_takes_its_process_down_again_and_again_is_given_up_and_can_be_resumed(given: Any) -> None:
    outside = Outside()
    look, _, _ = outside.tools()
    given("work", executing(look)(lambda run: run.call(look, n=1)))
    outside.kill_at = {("look", 1, "before")}
    before = len(Killed.kills)
    with opened() as runner:
        runner.start("work", {}, run_id="r")
        stopped("r", before)
    with pytest.raises(UsageError, match="is interrupted; only one that was given up"):
        durable.resume("r")
    with closing(sqlite3.connect(current_home() / "durable.db")) as database, database:
        database.execute("UPDATE workflow_status SET recovery_attempts = 101")
    with opened() as runner:
        with pytest.raises(AgentkitError, match="MAX_RECOVERY_ATTEMPTS_EXCEEDED"):
            runner.handle("r").result(timeout_s=30)
        assert durable.status("r").state == "given up"
        durable.resume("r")
        assert runner.handle("r").result(timeout_s=30).state == "DONE"


def current_home() -> Path:
    return Path(os.environ["AGENTKIT_HOME"])


def test_work_that_this_process_does_not_know_is_left_to_those_that_do(given: Any) -> None:
    outside = Outside()
    look, _, _ = outside.tools()
    function = executing(look)(lambda run: run.call(look, n=1))
    given("work", function)
    outside.kill_at = {("look", 1, "before")}
    before = len(Killed.kills)
    with opened() as runner:
        runner.start("work", {}, run_id="r")
        stopped("r", before)
    works.forget("work")
    with opened():
        time.sleep(0.5)
        assert durable.status("r").state == "interrupted"
    given("work", function)
    assert taken_up("work", 1).state == "DONE"


def test_the_day_is_charged_once_however_often_a_run_is_taken_up() -> None:
    spent = Ledger(Budget(tool_calls=10))
    day = works.Day()
    day.add(spent)
    run = Ledger(Budget(), day)
    run.reserve(tool_calls=1)  # given back by the journal
    assert spent.used["tool_calls"] == 0
    day.caught_up()
    run.reserve(tool_calls=2)
    assert spent.used["tool_calls"] == 2
    assert run.used["tool_calls"] == 3
    assert day.share == (0.2, "tool_calls")
    with pytest.raises(BudgetExceeded):
        run.reserve(tool_calls=9)


def test_on_whose_behalf_a_run_acts_is_kept(given: Any) -> None:
    given("who", executing()(lambda run: [run.caller.user, run.caller.session]))
    with opened() as runner, acting_for("ada", "s1"):
        record = runner.start("who", {}).result(timeout_s=30)
    assert record.output == {"value": ["ada", "s1"]}
    assert record.session == "s1"


def test_without_dbos_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['dbos'] = None\n"
        "from agentkit_tracking import durable\n"
        "durable.work('x')(print)\n"
        "try: durable.Runner\n"
        "except Exception as e: print(type(e).__name__, e)\n"
        "assert not {'dspy', 'mlflow', 'sqlalchemy'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "UsageError durable runs need DBOS: pip install 'agentkit-hedgehog[durable]'\n", done.stderr


# ---- the command line


def test_the_commands_list_runs_and_go_on_with_them(given: Any, capsys: pytest.CaptureFixture[str]) -> None:
    durable_cli.runs()
    assert "nothing was run durably yet" in capsys.readouterr().out
    outside = Outside()
    look, _, _ = outside.tools()
    given("work", executing(look)(lambda run: run.call(look, n=1)))
    outside.kill_at = {("look", 1, "before")}
    before = len(Killed.kills)
    with opened() as runner:
        runner.start("work", {}, run_id="r")
        stopped("r", before)
    durable_cli.runs()
    assert "interrupted" in capsys.readouterr().out
    durable_cli.work(until_idle=True)
    durable_cli.runs("r")
    assert "done" in capsys.readouterr().out
    durable_cli.runs(unfinished=True)
    assert "nothing runs durably" in capsys.readouterr().out
    with pytest.raises(UsageError, match="`agentkit register` it first"):
        durable_cli.run_durably("notebook.py:system", {})
    with pytest.raises(UsageError, match="name the run"):
        durable_cli.runs(again=True)
    with pytest.raises(UsageError, match="there is no file"):
        durable_cli.work(module=["nowhere.py"])
    assert durable_cli.run_durably("work", {}).state == "DONE"
