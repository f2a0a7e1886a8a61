"""What a call has to pass: the tool's own check, claims, tiers, people, and what they may change."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from governed import CALLS, Plane, cancel, decisions, flaky, nothing_called, own_order, plane, using  # noqa: F401
from hedgehogs import doing

import agentkit as ak
from agentkit import Budget, Decision, Run
from agentkit.errors import PolicyRefused, ToolFailed

# ---- checks and claims


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


def test_a_check_looks_and_does_not_change() -> None:
    def meddling(arguments: Any, user: str | None) -> None:
        arguments["place"] = "B"

    tool = flaky(0, ValueError(), check=meddling)
    assert "does not support item assignment" in str(using(tool).error)
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


# ---- tiers


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
