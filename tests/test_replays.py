"""Replays change nothing outside, and the first step that differs is the one that does."""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import Any

import pytest
from hedgehogs import Found, Hedgehog, doing
from pydantic import BaseModel
from typer.testing import CliRunner

import agentkit as ak
from agentkit import Run, RunRecord
from agentkit.replays import Stubbed, first_difference
from agentkit.testing import FakeClock
from agentkit_pipelines.cli import app
from agentkit_tracking.runlog import RunLog

PAID: list[float] = []
LOOKED: list[str] = []


@pytest.fixture(autouse=True)
def nothing_yet() -> None:
    PAID.clear()
    LOOKED.clear()


@ak.tool
def look(place: str) -> dict[str, Any]:
    """Look at a place."""
    LOOKED.append(place)
    return {"place": place, "usd": 80.0}


@ak.tool(permission="write", human_at={"usd": 50})
def pay(usd: float) -> str:
    """Pay."""
    PAID.append(usd)
    return f"paid {usd}"


def visit(place: str, cut: float = 0.0) -> Any:
    def work(run: Run) -> Any:
        found = run.call(look, place=place)
        return run.call(pay, usd=found["usd"] - cut)

    return doing(work, look, pay, name="visitor")


def recorded(system: Any) -> RunRecord:
    with ak.approve_with(lambda request: ak.Decision("approve", by="ann")):
        record = system.run(text="x")
    assert record.state == "DONE"
    return RunLog().find(record.run_id)  # as it comes back from the log


def replayed(before: RunRecord, system: Any) -> RunRecord:
    with ak.intercept(Stubbed(before)):
        after: RunRecord = system.run(kind="replay", **before.inputs)
    return after


def test_a_replay_of_the_same_does_the_same_and_changes_nothing() -> None:
    before = recorded(visit("A"))
    after = replayed(before, visit("A"))
    assert first_difference(before, after) is None
    assert after.output == before.output == {"value": "paid 80.0"}
    assert (PAID, LOOKED) == ([80.0], ["A"])


def test_another_read_is_made_and_another_write_is_not() -> None:
    before = recorded(visit("A"))
    after = replayed(before, visit("B"))
    difference = first_difference(before, after)
    assert difference is not None
    assert (difference.before.name, difference.before.inputs) == ("look", {"place": "A"})  # type: ignore[union-attr]
    assert difference.after.inputs == {"place": "B"}  # type: ignore[union-attr]
    cheaper = replayed(before, visit("A", cut=70))
    assert cheaper.state == "FAILED"
    assert "a replay changes nothing" in str(cheaper.error)
    dearer = replayed(before, visit("A", cut=-5))  # nobody was asked about 85 dollars
    assert dearer.output == {"value": None}
    assert (PAID, LOOKED) == ([80.0], ["A", "B"])


def test_a_run_that_ends_earlier_differs_where_it_ended() -> None:
    before = recorded(visit("A"))
    after = replayed(before, doing(lambda run: run.call(look, place="A"), look, name="visitor"))
    difference = first_difference(before, after)
    assert difference is not None
    assert difference.before is not None
    assert difference.number == next(i for i, s in enumerate(before.steps, 1) if s.name == "tier of pay")


def found_by(record: RunRecord) -> RunRecord:
    return RunLog().find(record.run_id)


def team(waits: dict[str, float], prefix: str = "seen", workers: int = 4) -> ak.Orchestrator:
    class Result(BaseModel):
        east: Found | None
        west: Found | None

    def scout(name: str) -> ak.Agent:
        class Scout(Hedgehog):
            tools = (look, pay)

            def execute(self, run: Run, plan: Any, text: str = "") -> Any:
                time.sleep(waits.get(name, 0))
                found = run.call(look, place=f"{prefix} {name}")
                run.call(pay, usd=1.0)
                return [found, run.call(pay, usd=2.0 if name == "east" else 3.0)]

        Scout.name = name
        return Scout()

    flow = [ak.Edge("east", "after", when=lambda board: True), ak.Edge("west", "after", when=lambda board: True)]

    class After(Hedgehog):
        name = "after"

    return ak.Orchestrator("team", [scout("east"), scout("west"), After()], flow=flow, result=Result, workers=workers)


@pytest.mark.parametrize("slow", ["east", "west"])
def test_an_orchestration_is_compared_agent_by_agent(slow: str) -> None:
    with ak.approve_with(lambda request: ak.Decision("approve", by="ann")):  # the second pay of one dollar is a repeat
        before = found_by(team({slow: 0.2}).run(text="x"))
    assert before.state == "DONE", before.error
    paid = list(PAID)
    after = replayed(before, team({}))
    assert after.state == "DONE"
    assert first_difference(before, after) is None
    assert paid == PAID
    other = replayed(before, team({}, prefix="looked for"))
    difference = first_difference(before, other)
    assert difference is not None
    assert difference.before is not None
    assert difference.after is not None
    assert before.steps[difference.number - 1] == difference.before
    assert (difference.before.name, difference.before.agent) == ("look", "west" if slow == "east" else "east")
    assert difference.after.agent == difference.before.agent


@ak.tool(permission="write", criticality="low")
def note(usd: float) -> str:
    """Note a payment."""
    PAID.append(usd)
    return "noted"


def test_a_production_run_is_replayed_with_the_tiers_it_had() -> None:
    def work(run: Run) -> Any:
        return [run.call(note, usd=usd) for usd in (5.0, 5.0, 80.0)]

    system = doing(work, note, name="payer")
    system.stage = "production"
    with ak.approve_with(lambda request: ak.Decision("approve", by="ann")):
        before = found_by(system.run(text="x"))
    tiers = [s.outputs for s in before.steps if s.name == "tier of note"]
    draft = doing(work, note, name="payer")
    assert tiers == [2, 3, 2]
    assert [s.outputs for s in draft.run(text="x").steps if s.name == "tier of note"] == [1, 3, 1]
    PAID.clear()
    after = replayed(before, draft)
    assert [s.outputs for s in after.steps if s.name == "tier of note"] == tiers
    assert first_difference(before, after) is None
    assert PAID == []


def test_a_run_whose_approver_failed_is_replayed_as_rejected() -> None:
    def away(request: Any) -> Any:
        raise RuntimeError("the desk is closed")

    with ak.approve_with(away):
        before = found_by(visit("A").run(text="x"))
    assert before.state == "FAILED"
    said: list[str] = []

    def work(run: Run) -> Any:
        paid = run.call(pay, usd=run.call(look, place="A")["usd"])
        said.append(run.last_decision.reason)  # type: ignore[union-attr]
        return paid

    after = replayed(before, doing(work, look, pay, name="visitor"))
    assert (after.output, said) == ({"value": None}, ["as recorded: RuntimeError: the desk is closed"])
    assert PAID == []
    difference = first_difference(before, after)
    assert difference is not None
    assert difference.before.kind == "approval"  # type: ignore[union-attr]


def test_what_failed_fails_again_and_retries_do_not_count() -> None:
    @ak.tool
    def probe(place: str) -> str:
        """Probe."""
        raise OSError("nobody is there")

    def work(run: Run) -> Any:
        run.decide("where", "A", f"it is {time.perf_counter()}")
        return run.call(probe, place="A")

    system = doing(work, probe, name="prober")
    with FakeClock():
        before = found_by(system.run(text="x"))
    assert before.state == "FAILED"
    assert [s.name for s in before.steps if s.kind == "decision"] == ["where", "retry", "retry"]
    assert first_difference(before, replayed(before, system)) is None
    longer = replayed(before, doing(lambda run: run.decide("where", "B", ""), probe, name="prober"))
    assert first_difference(before, longer).before.name == "where"  # type: ignore[union-attr]


def test_the_log_gives_back_what_was_recorded() -> None:
    with ak.acting_for("ann", session="s"):
        record = visit("A").run(text="x")
    found = RunLog().find(record.run_id[:12])
    kept, given = (json.loads(r.to_json()) for r in (found, record))
    moments = [datetime.fromisoformat(r.pop("started_at")) for r in (kept, given)]
    assert moments[0] == moments[1]
    assert kept == given
    with pytest.raises(ak.AgentkitError, match="has no run 'zzz'"):
        RunLog().find("zzz")
    visit("A").run(text="x")
    with pytest.raises(ak.AgentkitError, match="begins several runs"):
        RunLog().find("")


def test_explain_shows_why_and_what_it_cost_and_no_address(tmp_path: Any) -> None:
    def work(run: Run) -> Any:
        run.decide("refund", "no", "the window has closed")
        return [run.call(look, place="A"), run.call(pay, usd=80.0), run.call(pay, usd=1.0)]

    record = doing(work, look, pay, name="visitor").run(text="write to ann@example.com")
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["explain", record.run_id[:10], "--html", str(page)])
    assert done.exit_code == 0, done.output
    for text in (done.output, page.read_text()):
        assert "ann@example.com" not in text
        for said in (
            "[e-mail]",
            "the window has closed",
            "nobody was there to approve",
            "USD 0.000000",
            "draft, not registered",
        ):
            assert said in text.replace("\n", " "), said
    assert "from 50.00 on a" in done.output


def test_budget_suggest_covers_what_runs_used(capsys: pytest.CaptureFixture[str]) -> None:
    system = visit("A", cut=79)
    for _ in range(3):
        system.run(text="x")
    done = CliRunner().invoke(app, ["budget", "suggest", "visitor", "--headroom", "2"])
    assert done.exit_code == 0, done.output
    assert "budget=ak.Budget(tool_calls=4, seconds=10)" in done.output
    assert "3 runs are too few" in done.output
    with pytest.raises(ak.AgentkitError, match="no successful run of 'nobody'"):
        CliRunner().invoke(app, ["budget", "suggest", "nobody"], catch_exceptions=False)
