"""An agent that fails: it ends alone, what rests on it is skipped, and the record says what is missing."""

from __future__ import annotations

from typing import Any

import pytest
from crews import PAID, Work, crew, decisions, fail, node, nothing_paid_yet, refund, statuses  # noqa: F401
from hedgehogs import Found, Hedgehog
from pydantic import BaseModel

import agentkit as ak
from agentkit import Run, RunRecord
from agentkit.errors import ModelError, PolicyRefused, ToolFailed
from agentkit.flows import Edge, sequence
from agentkit.orchestration import NothingFound, Orchestrator, Verdict


def not_mine(run: Run) -> Any:
    return run.call(refund, order_id="A", usd=1)


FAILURES: dict[str, tuple[Work, str]] = {
    "an error": (fail(RuntimeError("broken")), "RuntimeError: broken"),
    "a tool": (fail(ToolFailed("search", "timeout", "no answer")), "ToolFailed: tool 'search' failed (timeout)"),
    "a model": (fail(ModelError("no key")), "ModelError: no key"),
    "an invalid result": (lambda run: Verdict(ok=True, reason="no Found"), "ValidationError: 1 validation error"),
    "a denied tool": (not_mine, "PermissionDenied: agent 'bad' may not use tool 'refund'"),
    "a refusal": (fail(PolicyRefused("pay", "not today")), "PolicyRefused"),
}


@pytest.mark.parametrize(("work", "error"), FAILURES.values(), ids=FAILURES.keys())
def test_what_goes_wrong_in_an_agent_ends_that_agent_alone(work: Work, error: str, records: list[RunRecord]) -> None:
    agents = [node("bad", work), node("good"), node("after"), node("end")]
    flow = [Edge("bad", "after"), Edge("good", "end"), Edge("after", "end")]
    record = crew(*agents, flow=flow).run()
    assert (record.state, record.output) == (
        "DONE",
        {"found": {"good": "good", "end": "end"}, "missing": ["bad", "after"]},
    )
    assert statuses(record) == {"bad": "failed", "good": "done", "after": "skipped", "end": "done"}
    assert f"bad is missing ({error}" in (record.degraded or "")
    assert decisions(record)["missing"] == ["bad", "after"]
    assert {r.route: r.state for r in records} == {"bad": "FAILED", "good": "DONE", "end": "DONE", "crew": "DONE"}
    assert PAID == []


def test_a_result_that_has_to_be_whole_fails_where_something_is_missing() -> None:
    class Whole(BaseModel):
        a: Found
        b: Found

    record = Orchestrator("crew", [node("a"), node("b", fail(OSError("down")))], result=Whole).run()
    assert (record.state, (record.error or "").partition(":")[0]) == ("FAILED", "ValidationError")
    assert (record.partial or {})["a"] == {"value": "a"}


def test_where_nothing_is_found_the_run_fails() -> None:
    record = crew(node("a", fail(OSError("down"))), node("b"), flow=sequence("a", "b")).run()
    assert (
        record.error
        == "NothingFound: no agent brought anything back; a: OSError: down; b: not taken from a: failed (OSError: down)"
    )
    with pytest.raises(NothingFound):
        crew(node("a", fail(OSError("down"))))()


def test_an_agent_that_falls_back_on_less_is_told_of() -> None:
    class Lesser(Hedgehog):
        name = "lesser"

        def execute(self, run: Run, plan: Any, text: str = "") -> Any:
            raise ToolFailed("search", "error", "down")

        def recover(self, run: Run, error: Any, **inputs: Any) -> Any:
            return Found(value="a guess")

    record = crew(Lesser()).run(text="x")
    assert record.output == {"found": {"lesser": "a guess"}, "missing": []}
    assert (record.degraded or "").startswith("lesser has ToolFailed: tool 'search' failed")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_ends_the_whole(stop: type[BaseException], records: list[RunRecord]) -> None:
    with pytest.raises(stop):
        crew(node("a", fail(stop())), node("b")).run()
    assert records[-1].state == "FAILED"


def test_a_record_that_cannot_be_kept_stops_the_caller() -> None:
    def full(record: RunRecord) -> None:
        raise OSError("disk full")

    with ak.add_sink(full), pytest.raises(OSError, match="disk full"):
        crew(node("a")).run()
