"""What the record of several agents says, the order of their calls under a journal, and an orchestrator as a system."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from typing import Any

import dspy
import pytest
from crews import (  # noqa: F401
    PAID,
    YES,
    Asks,
    crew,
    decisions,
    long,
    look_up,
    node,
    nothing_paid_yet,
    refund,
    spend,
    verifier,
)
from hedgehogs import speaking

import agentkit as ak
from agentkit import Budget, Run, RunRecord
from agentkit.blackboard import Blackboard
from agentkit.calls import Call
from agentkit.flows import Edge
from agentkit.testing import Scripted


class Left(Asks):
    pass


class Right(Asks):
    pass


# --- the record ----------------------------------------------------------------------------------------------------


def test_the_record_of_the_whole_counts_what_its_agents_did(records: list[RunRecord]) -> None:
    agents = [
        speaking(kind(name), Scripted({"answer": name}))  # type: ignore[misc]
        for kind, name in ((Left, "left"), (Right, "right"))
    ]
    record = crew(*agents, node("payer", lambda run: run.call(refund, order_id="A", usd=1), refund)).run(text="x")
    assert (record.model_calls, record.tool_calls, record.tokens_in, record.tokens_out) == (2, 3, 200, 20)
    assert record.usd == pytest.approx(0.02)
    assert [e["tool"] for e in record.effects] == ["refund"]
    assert {s.agent for s in record.steps if s.kind == "model"} == {"left", "right"}
    assert all(0 <= s.started <= record.seconds for s in record.steps)
    *parts, whole = records
    assert whole is record
    assert {(r.route, r.parent, r.system, r.model_calls) for r in parts} == {
        (name, record.run_id, "crew", calls) for name, calls in (("left", 1), ("right", 1), ("payer", 0))
    }
    assert {decisions(record)[f"agent {r.route}"]["run_id"] for r in parts} == {r.run_id for r in parts}
    assert json.loads(record.to_json())["state"] == "DONE"


def test_code_in_threads_that_dspy_starts_belongs_to_its_agent() -> None:
    def work(run: Run) -> Any:
        return dspy.Parallel(num_threads=2, disable_progress_bar=True)([(refund, {"order_id": "A", "usd": 1})] * 2)

    record = crew(node("a", work, look_up), node("b", lambda run: run.call(refund, order_id="B", usd=1), refund)).run()
    assert ((record.output or {})["missing"], PAID) == (["a"], [("B", 1.0)])


def test_what_each_agent_knew_can_be_told_afterwards() -> None:
    def note(run: Run, **inputs: Any) -> list[str]:
        assert run.board is not None
        run.board.write(f"note of {run.agent}", 1)
        return [entry.key for entry in run.board.entries]

    flow = [Edge("a", "c"), Edge("b", "d"), Edge("c", "e"), Edge("d", "e")]
    record = crew(*(node(n, note) for n in "abcde"), flow=flow).run()
    board = Blackboard.of_data(json.loads(record.to_json())["steps"][-2]["outputs"])
    knew = {name: [entry.key for entry in board.known_to(name)] for name in "abcde"}
    assert {name: sorted(board.read(name)["value"]) for name in "abcde"} == {
        name: sorted(key for key in keys if key != name) for name, keys in knew.items()
    }
    assert sorted(knew["c"]) == ["a", "c", "note of a", "note of c"]
    assert len(knew["e"]) == 10
    assert [entry.number for entry in board.entries] == [*range(1, 11)]
    assert all(entry.at and entry.step for entry in board.entries)


# --- durable runs --------------------------------------------------------------------------------------------------


class Journal:
    """Keeps the key of each call, in order."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, str, int, str]] = []

    def call(self, call: Call, proceed: Callable[[], Any]) -> Any:
        self.kept.append((call.run.route or "", call.name, call.number, call.key))
        assert threading.current_thread() is threading.main_thread()
        return proceed()

    def attempt(self, call: Call, proceed: Callable[[], Any]) -> Any:
        return proceed()


def test_under_a_journal_calls_come_in_the_same_order_with_the_same_keys() -> None:
    system = crew(*(node(n, spend(2), look_up) for n in "abc"))

    def once() -> list[tuple[str, str, int, str]]:
        journal = Journal()
        with ak.intercept(journal):
            run = Run("crew", {}, budget=Budget(), run_id="r1")
        _, error = run.carry_out(lambda r: system.work(r, {}))
        assert error is None
        return journal.kept

    first = once()
    assert [(n, i) for n, _, i, _ in first] == [(n, i) for n in "abc" for i in (0, 1)]
    child = hashlib.sha256(b"r1/a/0").hexdigest()[:32]
    assert first[0][3] == hashlib.sha256(f"{child}/0/look_up".encode()).hexdigest()[:32]
    assert once() == first


# --- as a system ---------------------------------------------------------------------------------------------------


def test_it_is_a_system_like_any_other() -> None:
    agents = [Left("left"), Right("right")]
    system = crew(*agents, flow=[Edge("left", "right", long)], verifier=verifier(YES), budgets={"left": Budget(usd=1)})
    spec = json.loads(json.dumps(system.spec()))
    assert spec["flow"] == {
        "edges": [{"source": "left", "target": "right", "when": "long"}],
        "joins": {"left": "any", "right": "any"},
    }
    assert (spec["verifier"], spec["compose"], spec["retries"], spec["budgets"]["left"]["usd"]) == (
        "checker",
        "gather",
        0,
        1,
    )
    assert [*spec["agents"]] == ["left", "right", "checker"]
    assert list(system.prompts()) == ["left.ask", "right.ask"]
    assert system.input_names() == (("text",), frozenset())
    assert system.permissions().columns == ["tool", "left", "right", "checker"]
    system.load_state(json.loads(json.dumps(system.dump_state())))
    copy = system.deepcopy()
    copy.agents["left"].ask.demos = [dspy.Example(text="x", answer="y")]
    assert system.agents["left"].ask.demos == []


def test_an_evaluation_and_an_optimiser_see_the_agents_calls() -> None:
    system = crew(Left("left"), Right("right"))
    cases = [dspy.Example(text=t).with_inputs("text") for t in ("one", "two")]

    def right(example: Any, prediction: Any, trace: Any = None) -> bool:
        return not prediction.missing

    evaluate = dspy.Evaluate(devset=cases, metric=right, num_threads=2, display_progress=False)
    assert evaluate(system).score == 100
    with dspy.context(lm=ak.build_lm("fast")):
        compiled = dspy.BootstrapFewShot(metric=right, max_bootstrapped_demos=1).compile(system, trainset=cases)
    assert [len(p.demos) > 0 for p in compiled.predictors()] == [True, True]


def test_frames_run_through_it() -> None:
    import polars as pl

    found = crew(node("a", lambda run, text: text, takes="text")).map(pl.DataFrame({"text": ["x", "y"]}), workers=2)
    assert [row["a"] for row in found["found"]] == ["x", "y"]
