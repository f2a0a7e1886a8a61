"""Durable runs that are killed at any point and taken up: what is given back, what is asked, what is not repeated."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from durable_runs import (  # noqa: F401
    AUTONOMY,
    Killed,
    Outside,
    executing,
    given,
    killed_and_resumed,
    logged,
    nobody,
    opened,
    stopped,
    taken_up,
)

from agentkit import current
from agentkit.approvals import ApprovalRequest, Decision
from agentkit.budget import Budget, Ledger
from agentkit.errors import BudgetExceeded, Stopped, ToolFailed
from agentkit.runs import Run
from agentkit.tools import Tool, tool
from agentkit_tracking import durable
from agentkit_tracking.durable import works
from agentkit_tracking.durable.journal import IN_DOUBT

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
