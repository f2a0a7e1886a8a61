"""Agents side by side and what is outside: writes that clash, one board, people who are asked one at a time."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from crews import PAID, Work, crew, node, nothing_paid_yet, refund  # noqa: F401
from test_states import ALLOWED

import agentkit as ak
from agentkit import ApprovalRequest, Budget, Run
from agentkit.blackboard import Blackboard

# --- writes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 4])
def test_two_agents_may_not_write_to_the_same_thing(workers: int) -> None:
    gate = threading.Barrier(2 if workers > 1 else 1)

    def pay(run: Run) -> Any:
        gate.wait(10)
        return run.call(refund, order_id="A", usd=1)

    record = crew(node("a", pay, refund), node("b", pay, refund), workers=workers).run()
    assert (len(PAID), len((record.output or {})["missing"])) == (1, 1)
    assert "ConflictingWrite" in (record.degraded or "")
    assert [e["outcome"] for e in record.effects] == ["done"]


def test_agents_may_write_to_different_things() -> None:
    agents = [node(n, lambda run, o=n: run.call(refund, order_id=o, usd=1), refund) for n in "abc"]  # type: ignore[misc]
    assert (crew(*agents).run().output or {})["missing"] == []
    assert sorted(PAID) == [("a", 1.0), ("b", 1.0), ("c", 1.0)]


@pytest.mark.parametrize("workers", [1, 4])
def test_two_agents_side_by_side_may_not_write_one_key_of_the_board(workers: int) -> None:
    def write(run: Run) -> str:
        assert run.board is not None
        run.board.write("plan", run.agent)
        return "written"

    record = crew(node("a", write), node("b", write), compose=lambda run, board: {"found": {}}, workers=workers).run()
    board = Blackboard.of_record(record)
    assert len([e for e in board.entries if e.key == "plan"]) == len((record.output or {})["missing"]) == 1


# --- people --------------------------------------------------------------------------------------------------------


def pay_much(order: str) -> Work:
    return lambda run: run.call(refund, order_id=order, usd=80)


def test_people_are_asked_one_question_at_a_time_and_waiting_is_nobodys_time() -> None:
    asking, requests = threading.Lock(), list[ApprovalRequest]()

    def approver(request: ApprovalRequest) -> bool:
        assert asking.acquire(blocking=False)
        time.sleep(2.5)  # longer than the whole may take
        requests.append(request)
        asking.release()
        return True

    agents = [node(n, pay_much(n), refund) for n in "abc"]
    with ak.approve_with(approver):
        record = crew(*agents, budget=Budget(seconds=2)).run()
    assert record.state == "DONE", record.error
    assert (len(PAID), {r.agent for r in requests}) == (3, {"a", "b", "c"})
    assert record.waited_s >= 7.5 > record.phases["execution"]
    moves = [(s.inputs, s.name) for s in record.steps if s.kind == "transition"]
    assert moves.count(("EXECUTING", "AWAITING_HUMAN")) == 3
    assert {*moves} <= ALLOWED


def test_an_approver_that_breaks_ends_one_agent() -> None:
    def approver(request: ApprovalRequest) -> bool:
        if request.agent == "a":
            raise OSError("the mail server is down")
        return True

    with ak.approve_with(approver):
        record = crew(node("a", pay_much("A"), refund), node("b", pay_much("B"), refund), workers=1).run()
    assert (record.state, (record.output or {})["missing"], PAID) == ("DONE", ["a"], [("B", 80.0)])
    with ak.approve_with(approver):
        record = crew(node("a", pay_much("A"), refund), node("b")).run()
    assert (record.state, (record.output or {})["missing"]) == ("DONE", ["a"])
    assert any("nobody could be asked: OSError" in str(s.outputs) for s in record.steps)
