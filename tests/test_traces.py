"""MLflow traces: one per run, its phases, calls and cost as people look for them; never in a run's way."""

from __future__ import annotations

import logging
from typing import Any, Literal, NamedTuple

import dspy
import pytest
from mlflow.entities import Trace
from pydantic import BaseModel
from releases import furnish

import agentkit as ak
from agentkit.records import RunRecord, Step
from agentkit_tracking import traces
from agentkit_tracking.home import connect, experiment_id
from agentkit_tracking.runlog import RunLog


class Decide(dspy.Signature):
    """Decide what a customer wants.

    - refund: money back, paid twice
    - answer: a question
    """

    ticket: str = dspy.InputField()
    action: Literal["refund", "answer"] = dspy.OutputField()


class Reply(BaseModel):
    action: str


@ak.tool(permission="write", human_at={"amount": 20.0})
def pay(amount: float) -> str:
    """Pay money back."""
    return f"paid {amount:.2f}"


class Refunds(ak.Agent):
    name = "refunds"
    result = Reply
    tools = (pay,)

    def __init__(self) -> None:
        super().__init__()
        self.decide = dspy.Predict(Decide)

    def plan(self, run: ak.Run, ticket: str, amount: float) -> Any:
        return self.decide(ticket=ticket).action

    def execute(self, run: ak.Run, plan: Any, ticket: str, amount: float) -> Any:
        return run.call(pay, amount=amount)

    def reflect(self, run: ak.Run, plan: Any, facts: Any, ticket: str, amount: float) -> Any:
        run.decide("action", plan, "as planned")
        return Reply(action=plan)


class Kept(NamedTuple):
    record: RunRecord
    trace: Trace

    @property
    def tree(self) -> dict[str, list[tuple[str, str]]]:
        """Span name to the (name, type) of its children, in order."""
        names = {span.span_id: span.name for span in self.trace.data.spans}
        found: dict[str, list[tuple[str, str]]] = {}
        for span in sorted(self.trace.data.spans, key=lambda s: s.start_time_ns):
            found.setdefault(names.get(span.parent_id, ""), []).append((span.name, span.span_type))
        return found


def priced() -> RunRecord:
    """A run whose model calls cost money, as a provider's do."""
    calls = [
        Step("model", "openai/x", "PLANNING", 0.1 * i, 0.05, model="openai/x", tokens_in=100, tokens_out=20, usd=0.25)
        for i in range(2)
    ]
    record = RunRecord(
        "priced", "shop", None, "run", "2026-11-20T10:00:00+00:00", 1.0, "DONE", None, {"ticket": "t"}, {"action": "answer"},
        None, [], {"planning": 1.0, "execution": 0.0, "reflection": 0.0}, 0.0, 2, 0, 200, 40, 0.5, calls,
    )  # fmt: skip
    traces.write(record)
    return record


def stored(system: str) -> list[Trace]:
    traces.flush()
    return list(connect().search_traces(locations=[experiment_id(system)]))


AWKWARD = "emoji 🙂\n{{ braces }} <b>html</b> " + "x" * 200_000


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kept]:
    """Runs of all kinds and their traces; together, since MLflow takes two seconds to empty its queue."""
    home = furnish(tmp_path_factory.mktemp("traces"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTKIT_HOME", str(home))
        patch.setenv("AGENTKIT_TRACES", "on")
        shop, bare = ak.System("shop", [Refunds()]), ak.System("shop", [Refunds()])
        bare.agents["refunds"].tools = ()
        records = {
            "plain": shop.run(ticket="I paid twice, money back", amount=5.0),
            "failed": shop.run(ticket="money back", amount="not a number"),
            "refused": bare.run(ticket="money back", amount=1.0),
            "awkward": shop.run(ticket=AWKWARD, amount=1.0),
            "evaluation": shop.run(kind="evaluation", ticket="a question", amount=1.0),
            "priced": priced(),
        }
        with ak.approve_with(lambda request: True):
            records["waited"] = shop.run(ticket="I paid twice", amount=30.0)
        shop.release = "a" * 64
        records["released"] = shop.run(ticket="a question", amount=5.0)
        patch.setenv("AGENTKIT_TRACES", "off")
        records["off"] = shop.run(ticket="a question", amount=1.0)
        found = {trace.info.tags["agentkit.run_id"]: trace for trace in stored("shop")}
        assert len(found) == len(stored("shop")), "two traces of one run"
    return {name: Kept(r, found[r.run_id]) for name, r in records.items() if r.run_id in found}


def test_a_run_is_one_trace_with_its_phases_and_the_calls_in_them(kept: dict[str, Kept]) -> None:
    record, trace = kept["plain"]
    assert kept["plain"].tree == {
        "": [("shop", "AGENT")],
        "shop": [("PLANNING", "CHAIN"), ("EXECUTING", "CHAIN"), ("REFLECTING", "CHAIN")],
        "PLANNING": [("embedded/default", "CHAT_MODEL")],
        "EXECUTING": [("tier of pay", "CHAIN"), ("pay", "TOOL")],
        "REFLECTING": [("action", "CHAIN")],
    }
    root, spans = trace.data.spans[0], {span.name: span for span in trace.data.spans}
    assert (trace.info.state, root.inputs, root.outputs) == ("OK", record.inputs, record.output)
    assert (spans["pay"].inputs, spans["pay"].outputs) == ({"inputs": {"amount": 5.0}}, "paid 5.00")
    assert (root.end_time_ns - root.start_time_ns) / 1e9 == pytest.approx(record.seconds, abs=1e-3)
    assert all(root.start_time_ns <= s.start_time_ns <= s.end_time_ns <= root.end_time_ns for s in trace.data.spans)


def test_a_wait_for_a_person_is_a_phase_of_its_own(kept: dict[str, Kept]) -> None:
    tree = kept["waited"].tree
    assert [name for name, _ in tree["shop"]] == ["PLANNING", "EXECUTING", "AWAITING_HUMAN", "EXECUTING", "REFLECTING"]
    assert tree["AWAITING_HUMAN"] == [("pay", "TOOL")]


def test_tags_say_run_release_state_route_and_cost(kept: dict[str, Kept]) -> None:
    record, trace = kept["released"]
    assert {k: v for k, v in trace.info.tags.items() if k.startswith("agentkit.")} == {
        "agentkit.run_id": record.run_id, "agentkit.release": "a" * 64, "agentkit.state": "DONE",
        "agentkit.route": "refunds", "agentkit.usd": "0.000000",
    }  # fmt: skip
    assert kept["plain"].trace.info.tags["agentkit.release"] == "draft"


def test_tokens_and_cost_are_summed_up_over_the_model_calls(kept: dict[str, Kept]) -> None:
    info = kept["priced"].trace.info
    assert info.token_usage == {"input_tokens": 200, "output_tokens": 40, "total_tokens": 240}
    assert info.cost["total_cost"] == pytest.approx(0.5)
    assert info.tags["agentkit.usd"] == "0.500000"


def test_a_failed_run_is_an_error_trace_that_shows_where(kept: dict[str, Kept]) -> None:
    record, trace = kept["failed"]
    states = {span.name: span.status.status_code for span in trace.data.spans}
    assert trace.info.state == "ERROR"
    assert states == {"shop": "ERROR", "PLANNING": "OK", "embedded/default": "OK", "EXECUTING": "ERROR", "pay": "ERROR"}
    assert trace.data.spans[0].outputs == {"error": record.error}


def test_a_refused_call_is_in_the_trace_with_its_reason(kept: dict[str, Kept]) -> None:
    [call] = [span for span in kept["refused"].trace.data.spans if span.span_type == "TOOL"]
    assert (call.status.status_code, call.outputs[:38]) == ("ERROR", "agent 'refunds' may not use tool 'pay'")


def test_awkward_text_makes_a_trace_too(kept: dict[str, Kept]) -> None:
    assert kept["awkward"].trace.data.spans[0].inputs["ticket"] == AWKWARD


def test_evaluation_runs_and_runs_with_traces_off_make_none(kept: dict[str, Kept]) -> None:
    assert {"evaluation", "off"} & kept.keys() == set()


def test_a_store_that_fails_costs_a_warning_and_the_trace_but_not_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AGENTKIT_TRACES", "on")
    monkeypatch.setattr(traces, "_paused_until", 0.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    shop = ak.System("shop", [Refunds()])
    with caplog.at_level(logging.WARNING, "agentkit_tracking.traces"):
        records = [shop.run(ticket="a question", amount=1.0) for _ in range(3)]
    assert [r.state for r in records] == ["DONE"] * 3
    [warning] = [r.message for r in caplog.records if r.name == "agentkit_tracking.traces"]  # once, not per run
    assert f"run {records[0].run_id} has no trace" in warning
    assert "does not answer" in warning
    assert len(RunLog().runs()) == 3
