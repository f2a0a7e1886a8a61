"""Durable runs that wait for people: a question outlives the process, and the desk that is away is asked again."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from durable_runs import AUTONOMY, Killed, Outside, executing, given, opened, stopped  # noqa: F401

from agentkit.approvals import ApprovalRequest
from agentkit.runs import Run
from agentkit_pipelines import durable_cli
from agentkit_tracking import durable
from agentkit_tracking.control import ControlPlane
from agentkit_tracking.control.database import ControlError
from agentkit_tracking.durable.journal import IN_DOUBT


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
    assert [s.decided_by for s in record.steps if s.kind == "approval"] == ["ada", "ada"]


def _waiting_for(desk: Any) -> Any:
    end = time.monotonic() + 30
    while not (waiting := desk.waiting()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return waiting[0]
