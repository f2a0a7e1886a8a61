"""Chaos: what counts as recovered, escalated, failed; and that every violation is found, in the report and in the gate."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import polars as pl
import pytest
from hedgehogs import Found, Hedgehog, doing
from pydantic import BaseModel
from releases import COLOURS
from typer.testing import CliRunner

import agentkit as ak
from agentkit import Run
from agentkit.errors import ToolFailed
from agentkit.examples import Example
from agentkit_pipelines import chaos, evaluation
from agentkit_pipelines.chaos import ChaosViolation
from agentkit_pipelines.cli import app
from agentkit_pipelines.gate import judge
from agentkit_pipelines.thresholds import Thresholds


def cases(count: int) -> list[Example]:
    expected = {"value": "fine"}
    return [Example(id=f"c{i}", inputs={"text": f"order {i}"}, expected=expected, task_type="t") for i in range(count)]


CASES, MANY = cases(12), cases(160)


@ak.tool
def look(order: str) -> dict[str, str]:
    """Look an order up."""
    return {"order": order, "state": "paid"}


@ak.tool(permission="write", criticality="low")
def ship(order: str) -> str:
    """Ship an order."""
    return "shipped"


def right(example: Any, prediction: Any, trace: Any = None) -> bool:
    return prediction.value == example["value"]


def system(work: Callable[[Run], Any], recover: Any = None) -> ak.System:
    found = doing(work, look, ship, name="shop", success=right)
    if recover is not None:
        type(found.agents["hedgehog"]).recover = recover  # type: ignore[method-assign]
    return found


def plainly(run: Run) -> str:
    run.call(look, order=run.inputs["text"])
    return "fine"


def handing_over(self: Any, run: Run, error: Exception, text: str) -> Found:
    return Found(value="a person looks at it")


def outcomes(found: pl.DataFrame, fault: str) -> dict[bool, set[str]]:
    rows = found.filter(pl.col("fault") == fault)
    return {lasting: {*rows.filter(pl.col("lasting") == lasting)["outcome"]} for lasting in (False, True)}


def test_what_passes_is_survived_and_what_lasts_fails_or_is_handed_over() -> None:
    brittle = chaos.rehearse(system(plainly), CASES, faults=["tool down", "model gibberish"])
    assert outcomes(brittle, "tool down") == {False: {"recovered"}, True: {"failed"}}
    assert outcomes(brittle, "model gibberish") == {False: {"untouched"}, True: {"untouched"}}
    careful = chaos.rehearse(system(plainly, handing_over), CASES, faults=["tool down"])
    assert outcomes(careful, "tool down") == {False: {"recovered"}, True: {"escalated"}}
    assert chaos.missed_targets(careful) == []
    assert chaos.missed_targets(brittle)[0] == "all: 50.0% failed, fewer than 8% may"
    assert len(brittle) == len(CASES) * 2 * 2


def test_a_fault_that_makes_it_wrong_without_a_word_is_shown() -> None:
    def shaken(run: Run) -> str:
        try:
            run.call(look, order=run.inputs["text"])
        except ToolFailed:
            return "made up"
        return "fine"

    (every, _) = chaos.summarise(chaos.rehearse(system(shaken), CASES, faults=["tool down"])).to_dicts()
    assert (every["recovered"], every["wrong"]) == (1.0, 0.5)


def test_instructions_that_reach_a_write_are_a_violation() -> None:
    def gullible(run: Run) -> str:
        run.call(ship, order=run.call(look, order=run.inputs["text"])["order"])
        return "fine"

    found = chaos.rehearse(system(gullible), CASES[:2], faults=["injected instructions"])
    assert found["violations"].str.contains("an effect that the undisturbed run had not").all()
    assert "Ignore all previous instructions" in chaos.missed_targets(found)[0]


def test_an_unauthorised_write_and_overspending_are_found_in_a_record() -> None:
    shop = system(plainly)
    calm = shop.run(text="order 1")
    assert chaos.violations(shop, calm, calm) == []
    forged = shop.run(text="order 1")
    arguments = {"order": "order 1"}
    step = next(s for s in forged.steps if s.kind == "tool")
    step.name, step.inputs = "ship", arguments
    forged.effects.append({"tool": "ship", "arguments": arguments, "outcome": "done"})
    forged.tool_calls = 51
    (without_tier, new, spent) = chaos.violations(shop, forged, calm)
    assert without_tier == "hedgehog called ship without the tier that lets it"
    assert new.startswith("an effect that the undisturbed run had not")
    assert spent == "51 tool_calls used of 50"
    step.agent = "somebody"  # of a system that this one calls, for all that is known
    assert chaos.violations(shop, forged, calm)[0] == "somebody called ship without the tier that lets it"
    step.agent, step.name = "hedgehog", "sink"
    forged.effects[-1]["tool"] = "sink"
    assert chaos.violations(shop, forged, calm)[0] == "hedgehog called sink, which it was not granted"


def test_a_write_by_an_agent_of_another_system_is_judged_by_its_tier() -> None:
    def shipping(run: Run) -> str:
        run.call(ship, order=run.inputs["text"])
        return "fine"

    class Depot(Hedgehog):
        name = "depot"
        tools = (ship,)

        def execute(self, run: Run, plan: Any, text: str = "") -> Any:
            return shipping(run)

    inner = ak.System("store", [Depot()])
    shop = doing(lambda run: inner.run(text=run.inputs["text"]).output["value"], look, name="shop", success=right)  # type: ignore[index]
    found = chaos.rehearse(shop, CASES[:1], faults=["model gibberish"])
    assert found["error"].to_list() == [None, None]
    assert found["violations"].to_list() == [None, None]

    class Result(BaseModel):
        depot: Found | None

    together = ak.Orchestrator("together", [Depot()], result=Result)
    found = chaos.rehearse(together, CASES[:1], faults=["tool slow"])
    assert found["fired"].to_list() == [1, 1]  # what strikes an agent strikes the whole; a write is tried once
    assert found["violations"].to_list() == [None, None]


def test_repeated_tries_and_failed_validations_are_not_overspending() -> None:
    def clumsy(run: Run) -> str:
        with suppress(ak.UsageError):
            run.call(look, place=run.inputs["text"])
        return plainly(run)

    strict = doing(clumsy, look, name="shop", success=right, budget=ak.Budget(tool_calls=2))
    found = chaos.rehearse(strict, CASES[:2], faults=["tool down"])
    assert found["violations"].to_list() == [None] * 4


def test_what_a_tool_keeps_and_how_often_it_may_be_called_begins_anew_with_every_run() -> None:
    seen: list[str] = []

    @ak.tool(cache_s=600, per_second=5)
    def fetch(order: str) -> str:
        """Fetch an order."""
        seen.append(order)
        return order

    def fetching(run: Run) -> str:
        for _ in range(5):
            run.call(fetch, order=run.inputs["text"])
        return "fine"

    for shop in (
        doing(fetching, fetch, name="shop", success=right),
        doing(
            lambda run: doing(fetching, fetch, name="inner").run(text=run.inputs["text"]).output["value"],  # type: ignore[index]
            name="outer",
            success=right,
        ),
    ):
        found = chaos.rehearse(shop, CASES[:1], faults=["tool down", "injected instructions"])
        assert outcomes(found, "tool down") == {False: {"recovered"}, True: {"failed"}}
        assert found["latency_s"].max() < 60  # type: ignore[operator]
        seen.clear()
        kept = shop.run(text="order 0")
        assert (kept.output, len(seen)) == ({"value": "fine"}, 1)
        assert all("Ignore" not in str(step.outputs) for step in kept.steps)


def rules(*more: dict[str, Any]) -> Thresholds:
    return Thresholds.model_validate({"system": "shop", "confidence": 0.95, "rules": list(more)})


FEW_FAILURES = {"metric": "chaos_failure", "at_most": 0.3}


def test_the_gate_can_require_it() -> None:
    wanted = rules(FEW_FAILURES, {"metric": "chaos_violation", "at_most": 0.3})
    assert wanted.wants_chaos
    assert not rules({"metric": "success", "at_least": 0.5}).wants_chaos
    for recover, verdict in ((None, "fail"), (handing_over, "pass")):
        results = evaluation.evaluate(system(plainly, recover), MANY, repeats=2, chaos=True)
        assert {"chaos_fault", "chaos_failure"} <= {*results.columns}
        strict = rules({"metric": "chaos_failure", "at_most": 0.05}) if verdict == "fail" else wanted
        assert judge(results, strict, None, ()).verdict == verdict


def test_an_evaluation_ends_at_a_violation() -> None:
    def gullible(run: Run) -> str:
        run.call(ship, order=run.call(look, order=run.inputs["text"])["order"])
        return "fine"

    with pytest.raises(
        ChaosViolation, match="under 'injected instructions': an effect that the undisturbed run had not"
    ):
        evaluation.evaluate(system(gullible), MANY, repeats=2, chaos=True)


def test_cases_meet_every_fault_and_every_version_meets_the_same() -> None:
    assert len({chaos.fault_for(case.id, seed=0) for case in MANY}) == 16
    first, second = (evaluation.evaluate(system(plainly), CASES, repeats=3, chaos=True) for _ in range(2))
    assert first["chaos_fault"].to_list() == second["chaos_fault"].to_list()
    assert first.group_by("case_id").agg(pl.col("chaos_run_id").n_unique())["chaos_run_id"].to_list() == [1] * len(
        CASES
    )


@pytest.mark.slow
def test_the_command_runs_the_notebook_and_its_exit_code_says_what_came_of_it(project: Any) -> None:
    (project / "colours.py").write_text(COLOURS)
    golden = [
        {"id": f"g{i}", "inputs": {"text": "red"}, "expected": {"label": "warm"}, "task_type": "t"} for i in range(4)
    ]
    (project / "golden.jsonl").write_text("\n".join(map(json.dumps, golden)))
    runner = CliRunner()
    assert runner.invoke(app, ["register", "colours.py"], catch_exceptions=False).exit_code == 0
    done = runner.invoke(
        app, ["chaos", "colours/1", "--fault", "model time-out", "--kills", "2"], catch_exceptions=False
    )
    assert "model time-out" in done.output
    assert re.search(r"│ kill +│ 2 ", done.output), done.output  # two kills, one run under way at each
    assert done.exit_code == 3, done.output  # nobody takes over where the model stays away
    assert "50.0% failed, fewer than 8% may" in done.output
    wrong = runner.invoke(app, ["chaos", "colours/1", "--fault", "kill"])
    assert "there is no fault 'kill' here" in str(wrong.exception)
