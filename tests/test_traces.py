"""MLflow traces: one per run, its phases, calls, cost and feedback as people look for them; written as MLflow writes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import dspy
import pytest
from crews import crew, node, nothing_paid_yet, refund  # noqa: F401
from forwarded import keep, made, own_log, traces_of
from mlflow.entities import Trace
from pydantic import BaseModel
from releases import furnish
from typer.testing import CliRunner

import agentkit as ak
from agentkit.records import RunRecord, Step
from agentkit_pipelines.cli import app
from agentkit_tracking import traces
from agentkit_tracking.forwarding import mlflow_bulk
from agentkit_tracking.forwarding.consumer import Consumer
from agentkit_tracking.forwarding.mlflow_target import MlflowTarget
from agentkit_tracking.home import connect, experiment_id, tracking_uri
from agentkit_tracking.runlog import RunLog, feedback, own


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
    record = made(steps=calls, model_calls=2, tokens_in=200, tokens_out=40, usd=0.5)
    own().append(record)
    return record


AWKWARD = "emoji 🙂\n{{ braces }} <b>html</b> " + "x" * 200_000


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Kept]]:
    """Runs of all kinds and their traces."""
    home = furnish(tmp_path_factory.mktemp("traces"))
    with pytest.MonkeyPatch.context() as patch, own_log():
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
        with ak.acting_for("ann@example.com", "chat-17"):
            records["released"] = shop.run(ticket="a question", amount=5.0)
        said = records["plain"].run_id
        feedback.give(own(), said, "corrected", rating=4, comment="nearly", by="bob")
        feedback.give(own(), said, comment="thanks", by="ann", source="reviewer")
        assert traces.flush()
        found = traces_of()
        yield {name: Kept(r, found[r.run_id]) for name, r in records.items() if r.run_id in found}
        own().close()


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
    assert (spans["pay"].inputs, spans["pay"].outputs) == ({"amount": 5.0}, "paid 5.00")
    said = "[[ ## action ## ]]\nrefund\n\n[[ ## completed ## ]]"
    assert spans["embedded/default"].outputs == {"choices": [{"message": {"role": "assistant", "content": said}}]}
    assert (root.end_time_ns - root.start_time_ns) / 1e9 == pytest.approx(record.seconds, abs=1e-3)
    assert all(root.start_time_ns <= s.start_time_ns <= s.end_time_ns <= root.end_time_ns for s in trace.data.spans)


def test_a_wait_for_a_person_is_a_phase_of_its_own(kept: dict[str, Kept]) -> None:
    tree = kept["waited"].tree
    assert [name for name, _ in tree["shop"]] == ["PLANNING", "EXECUTING", "AWAITING_HUMAN", "EXECUTING", "REFLECTING"]
    assert tree["AWAITING_HUMAN"] == [("approval of pay", "GUARDRAIL")]


def test_tags_say_run_release_stage_state_route_and_cost(kept: dict[str, Kept]) -> None:
    record, trace = kept["released"]
    assert {k: v for k, v in trace.info.tags.items() if k.startswith("agentkit.")} == {
        "agentkit.run_id": record.run_id, "agentkit.release": "a" * 64, "agentkit.stage": "draft",
        "agentkit.state": "DONE", "agentkit.route": "refunds", "agentkit.usd": "0.000000",
    }  # fmt: skip
    assert trace.info.tags["mlflow.traceName"] == "shop"
    assert kept["plain"].trace.info.tags["agentkit.release"] == "draft"


def test_user_and_session_stand_where_mlflow_shows_them(kept: dict[str, Kept]) -> None:
    record, trace = kept["released"]
    assert trace.info.trace_metadata["mlflow.trace.session"] == "chat-17"
    assert trace.info.trace_metadata["mlflow.trace.user"] == record.user_hash


def test_a_trace_and_its_run_name_each_other(kept: dict[str, Kept]) -> None:
    for record, trace in kept.values():
        assert trace.info.trace_id == traces.trace_id(record.run_id)
        assert trace.info.tags["agentkit.run_id"] == record.run_id


def test_feedback_is_attached(kept: dict[str, Kept]) -> None:
    found = kept["plain"].trace.info.assessments
    assert {(a.name, a.value, a.rationale, a.source.source_id) for a in found} == {
        ("feedback", "corrected", "nearly", "bob"), ("rating", 4.0, "nearly", "bob"), ("comment", "thanks", None, "ann"),
    }  # fmt: skip
    assert {a.source.source_type for a in found} == {"HUMAN"}
    assert kept["failed"].trace.info.assessments == []


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
    assert trace.data.spans[0].outputs == {"error": record.error, "partial": {"plan": "refund"}}


def test_a_refused_call_is_in_the_trace_with_its_reason(kept: dict[str, Kept]) -> None:
    [call] = [span for span in kept["refused"].trace.data.spans if span.span_type == "TOOL"]
    assert (call.status.status_code, call.outputs["error"][:38]) == ("ERROR", "agent 'refunds' may not use tool 'pay'")


def test_awkward_text_makes_a_trace_too(kept: dict[str, Kept]) -> None:
    assert kept["awkward"].trace.data.spans[0].inputs["ticket"] == AWKWARD


def test_evaluation_runs_make_none(kept: dict[str, Kept]) -> None:
    assert "evaluation" not in kept


# --- what is written past MLflow's own functions ----------------------------------------------------------------------


def everything(trace: Trace) -> dict[str, Any]:
    found: dict[str, Any] = trace.to_dict()
    found["info"]["assessments"] = sorted(found["info"].get("assessments", []), key=str)
    return found


@pytest.fixture
def log(own_home: Path) -> Iterator[RunLog]:
    furnish(own_home)
    with own_log() as log:
        yield log


def forward(log: RunLog) -> Consumer:
    consumer = Consumer(log, MlflowTarget())
    consumer.forward()
    return consumer


def test_rows_written_in_bulk_are_those_that_mlflow_writes(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = made()
    odd = made(
        run_id="not hex", usd=float("nan"), release=None, session=None, user_hash=None, inputs={"text": "ü🙂" * 2000},
        output=None, error="ValueError: no", state="FAILED", tokens_in=0,
    )  # fmt: skip
    tools = [replace(step, usd=0.5) if step.kind == "tool" else step for step in made().steps]
    for record in (plain, odd, made(steps=tools), made(steps=[])):
        log.append(record)
    forward(log)
    bulk = {run_id: everything(trace) for run_id, trace in traces_of().items()}
    connect().delete_traces(experiment_id("shop"), trace_ids=[traces.trace_id(run_id) for run_id in bulk])
    assert traces_of() == {}
    monkeypatch.setattr(mlflow_bulk, "can_write", lambda store: False)
    Consumer(log, MlflowTarget()).file.forget()
    forward(log)
    assert {run_id: everything(trace) for run_id, trace in traces_of().items()} == bulk


def test_the_tables_are_as_the_bulk_writer_knows_them(log: RunLog) -> None:
    from mlflow.tracing.client import TracingClient

    connect()
    assert mlflow_bulk.can_write(TracingClient(tracking_uri()).store)


def test_a_column_that_is_new_means_mlflows_own_way(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracing.client import TracingClient

    connect()
    monkeypatch.setitem(mlflow_bulk._COLUMNS, "spans", "trace_id span_id content")
    assert not mlflow_bulk.can_write(TracingClient(tracking_uri()).store)


def test_what_is_forwarded_again_changes_nothing(log: RunLog) -> None:
    ids = keep(log, 5)
    feedback.give(log, ids[0], "accepted", by="bob")
    forward(log)
    before = {run_id: everything(trace) for run_id, trace in traces_of().items()}
    consumer = Consumer(log, MlflowTarget())
    consumer.file.forget()
    assert forward(log).done.runs == 5
    assert {run_id: everything(trace) for run_id, trace in traces_of().items()} == before


def test_traces_are_rebuilt_from_the_log(log: RunLog) -> None:
    ids = keep(log, 5)
    feedback.give(log, ids[0], "accepted", by="bob")
    forward(log)
    connect().delete_traces(experiment_id("shop"), trace_ids=[traces.trace_id(run_id) for run_id in ids[:3]])
    assert len(traces_of()) == 2
    log.close()
    done = CliRunner().invoke(app, ["forward", "mlflow", "--rebuild"])
    assert (done.exit_code, "5 runs, 1 feedback" in done.output) == (0, True), done.output
    found = traces_of()
    assert found.keys() == set(ids)
    assert [a.value for a in found[ids[0]].info.assessments] == ["accepted"]


def test_parts_are_spans_of_the_whole_and_feedback_on_them_is_theirs(log: RunLog) -> None:
    record = crew(node("payer", lambda run: run.call(refund, order_id="A", usd=1), refund)).run(text="x")
    (part,) = [step.outputs for step in record.steps if step.kind == "handoff"]
    feedback.give(log, part, "rejected", by="bob")
    forward(log)
    (trace,) = traces_of("crew").values()
    agents = {span.name: span.span_id for span in trace.data.spans if span.span_type == "AGENT"}
    assert agents.keys() == {"crew", "payer"}
    (said,) = trace.info.assessments
    assert (said.value, said.span_id) == ("rejected", agents["payer"])


def test_a_deleted_experiment_refuses_its_runs_only(log: RunLog, caplog: pytest.LogCaptureFixture) -> None:
    connect().delete_experiment(experiment_id("gone"))
    keep(log, 2, system="gone")
    kept_ids = keep(log, 2)
    consumer = forward(log)
    while consumer.is_owing:
        consumer._again_at = 0.0
        consumer.forward()
    assert traces_of().keys() == set(kept_ids)
    assert consumer.done.refused == 2
    assert "is deleted; restore it" in consumer.file.refused_path.read_text()
