"""The verifier: what it refuses does not leave, and the agents may try again without repeating what was done."""

from __future__ import annotations

import pytest
from crews import NO, PAID, YES, Report, crew, decisions, look_up, node, nothing_paid_yet, refund, verifier  # noqa: F401
from hedgehogs import Found

from agentkit import Budget, Run, RunRecord
from agentkit.blackboard import Blackboard
from agentkit.orchestration import Verdict, VerificationFailed


def test_a_verified_result_leaves_and_the_verdict_is_recorded(records: list[RunRecord]) -> None:
    record = crew(node("a"), verifier=verifier(YES)).run()
    assert (record.state, record.output) == ("DONE", {"found": {"a": "a"}, "missing": []})
    step = next(s for s in record.steps if s.name == "verify")
    assert (step.outputs, step.inputs, step.state) == (
        {"ok": True, "reason": "it is sound"},
        "checker: it is sound",
        "REFLECTING",
    )
    assert [r.route for r in records] == ["a", "checker", "crew"]
    assert (record.partial, record.error) == (None, None)


def test_the_verifier_is_given_result_inputs_and_what_the_agents_found() -> None:
    def look(result: Report, a: Found, text: str) -> Verdict:
        return Verdict(ok=result.found == {"a": "a"} and a.value == "a", reason=text)

    record = crew(node("a"), verifier=verifier(look, takes="result a text")).run(text="asked")
    assert (record.state, decisions(record)["verify"]) == ("DONE", {"ok": True, "reason": "asked"})


def test_what_the_verifier_refuses_does_not_leave() -> None:
    record = crew(node("a"), verifier=verifier(NO)).run()
    assert (record.state, record.output, record.result) == ("FAILED", None, None)
    assert record.error == "VerificationFailed: the result was not verified: no source is named"
    assert (record.partial or {})["unverified"] == {"found": {"a": "a"}, "missing": []}
    assert decisions(record)["verify"] == {"ok": False, "reason": "no source is named"}
    with pytest.raises(VerificationFailed) as e:
        crew(node("a"), verifier=verifier(NO))()
    assert (e.value.reason, e.value.result.found) == ("no source is named", {"a": "a"})


def test_a_verifier_that_crashes_is_no_yes() -> None:
    record = crew(node("a"), verifier=verifier(OSError("down"), YES), retries=1).run()
    assert record.error == "VerificationFailed: the result was not verified: the verifier failed: OSError: down"
    assert (record.partial or {})["unverified"]


def test_a_verifier_cannot_change_the_result() -> None:
    def forge(result: Report) -> Verdict:
        result.found["a"] = "forged"
        return YES

    assert (crew(node("a"), verifier=verifier(forge)).run().output or {})["found"] == {"a": "a"}


def test_the_agents_may_try_again_and_know_why() -> None:
    def again(run: Run) -> str:
        assert run.board is not None
        verdict = run.board.read("checker")
        return "first" if verdict is None else f"now without: {verdict['reason']}"

    record = crew(node("a", again), verifier=verifier(NO, YES), retries=1).run()
    assert (record.output or {})["found"]["a"] == "now without: no source is named"
    path = [s.name for s in record.steps if s.kind == "transition"]
    assert path == ["PLANNING", "EXECUTING", "REFLECTING", "PLANNING", "EXECUTING", "REFLECTING", "DONE"]
    assert [s.outputs["ok"] for s in record.steps if s.name == "verify"] == [False, True]
    assert len([e for e in Blackboard.of_record(record).entries if e.key == "a"]) == 2


def test_they_try_again_as_often_as_they_may() -> None:
    record = crew(node("a"), verifier=verifier(NO, NO, YES), retries=1).run()
    assert record.error == "VerificationFailed: the result was not verified: no source is named"


def test_who_has_changed_something_outside_is_not_repeated() -> None:
    agents = [node("payer", lambda run: run.call(refund, order_id="A", usd=1), refund), node("talker")]
    record = crew(*agents, verifier=verifier(NO, YES), retries=1).run()
    assert (record.state, PAID, len(record.effects)) == ("DONE", [("A", 1.0)], 1)
    assert (record.output or {})["found"] == {"payer": "RF-A", "talker": "talker"}
    kept = [s.inputs for s in record.steps if s.name == "agent payer"]
    assert kept[-1] == "it has changed something outside and is not repeated"


def test_what_was_found_at_the_turn_before_does_not_count() -> None:
    calls: list[int] = []

    def once(run: Run) -> str:
        calls.append(1)
        if len(calls) > 1:
            raise OSError("down")
        return "old"

    record = crew(node("a", once), node("b"), verifier=verifier(NO, YES), retries=1).run()
    assert record.output == {"found": {"b": "b"}, "missing": ["a"]}


def test_a_verifier_that_spends_the_last_of_the_budget_ends_the_whole() -> None:
    def spend_all(result: Report) -> Verdict:
        for _ in range(5):
            look_up(order_id="A")
        return YES

    checker = verifier(spend_all)
    type(checker).tools = (look_up,)
    record = crew(node("a"), verifier=checker, budget=Budget(tool_calls=3)).run()
    assert (record.error or "").startswith("BudgetExceeded")
