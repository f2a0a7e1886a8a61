"""Several agents on one request: order, conditions, failures, limits, people, the blackboard and the verifier."""

from __future__ import annotations

import hashlib
import inspect
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import dspy
import pytest
from hedgehogs import Found, Hedgehog, doing, speaking
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from test_states import ALLOWED

import agentkit as ak
from agentkit import ApprovalRequest, Budget, Run, RunRecord
from agentkit.blackboard import Blackboard
from agentkit.calls import Call
from agentkit.errors import ModelError, PolicyRefused, SourceError, ToolFailed
from agentkit.flows import Edge, Join, sequence
from agentkit.orchestration import NothingFound, Orchestrator, Verdict, VerificationFailed
from agentkit.testing import Scripted

Work = Callable[..., Any]
PAID: list[tuple[str, float]] = []


@ak.tool(permission="write", human_at={"usd": 50}, writes_to="order_id")
def refund(order_id: str, usd: float) -> str:
    """Pay money back."""
    PAID.append((order_id, usd))
    return f"RF-{order_id}"


@ak.tool
def look_up(order_id: str) -> str:
    """Look up an order."""
    return f"order {order_id}"


@pytest.fixture(autouse=True)
def nothing_paid_yet() -> None:
    PAID.clear()


def node(name: str, work: Work | None = None, *tools: ak.Tool[..., Any], takes: str = "", may: str = "") -> ak.Agent:
    """An agent that does `work(run, **inputs)`; it needs the inputs `takes` and is given those of `may`, if they exist."""

    class Node(Hedgehog):
        def plan(self, run: Run, **inputs: Any) -> Any:
            return inputs

        def execute(self, run: Run, plan: Any, **inputs: Any) -> Any:
            return work(run, **plan) if work else name

        def reflect(self, run: Run, plan: Any, facts: Any, **inputs: Any) -> Any:
            return facts if isinstance(facts, BaseModel) else Found(value=facts)

    kind = inspect.Parameter.KEYWORD_ONLY
    needed = [inspect.Parameter(n, kind) for n in ("self", "run", *takes.split())]
    Node.plan.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*needed, *(inspect.Parameter(n, kind, default=None) for n in may.split())]
    )
    Node.name, Node.tools = name, tools
    return Node()


class Asks(Hedgehog):
    """Asks a model, and calls a tool."""

    tools = (look_up,)

    def __init__(self, name: str) -> None:
        super().__init__()
        self.ask = dspy.Predict("text -> answer")
        type(self).name = name

    def execute(self, run: Run, plan: Any, text: str = "") -> Any:
        run.call(look_up, order_id="A")
        return self.ask(text=text).answer


class Report(BaseModel):
    """Whatever was found."""

    found: dict[str, Any]
    missing: list[str] = []


def gather(run: Run, board: Blackboard) -> dict[str, Any]:
    """All that agents found, by their names."""
    latest = {entry.key: board.read(entry.key) for entry in board.entries}
    return {"found": {key: value["value"] for key, value in latest.items() if value and key != "checker"}}


def crew(*agents: ak.Agent, flow: Any = (), **options: Any) -> Orchestrator:
    options = {"result": Report, "compose": gather, **options}
    return Orchestrator("crew", agents, flow=flow, **options)


def fail(error: BaseException) -> Work:
    def work(run: Run, **inputs: Any) -> Any:
        raise error

    return work


def decisions(record: RunRecord) -> dict[str, Any]:
    return {s.name: s.outputs for s in record.steps if s.kind == "decision"}


def statuses(record: RunRecord) -> dict[str, str]:
    return {n.removeprefix("agent "): o["status"] for n, o in decisions(record).items() if n.startswith("agent ")}


@pytest.fixture
def records() -> Iterator[list[RunRecord]]:
    kept: list[RunRecord] = []
    with ak.add_sink(kept.append):
        yield kept


# --- order ---------------------------------------------------------------------------------------------------------


def test_an_agent_is_given_what_earlier_ones_found() -> None:
    def shout(run: Run, first: Found, text: str) -> str:
        return f"{first.value} {text}".upper()

    record = crew(node("first"), node("second", shout, takes="first text"), flow=sequence("first", "second")).run(
        text="x"
    )
    assert record.output == {"found": {"first": "first", "second": "FIRST X"}, "missing": []}
    assert (record.route, record.state, record.degraded) == ("crew", "DONE", None)


def test_agents_without_an_edge_between_them_work_side_by_side() -> None:
    gate = threading.Barrier(3)
    agents = [node(n, lambda run: gate.wait(10) >= 0) for n in "abc"]
    assert crew(*agents).run().output == {"found": {"a": True, "b": True, "c": True}, "missing": []}


def test_no_more_agents_work_at_once_than_may() -> None:
    at_work, most = [0], [0]
    lock = threading.Lock()

    def work(run: Run) -> None:
        with lock:
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
        time.sleep(0.01)
        with lock:
            at_work[0] -= 1

    assert crew(*(node(n, work) for n in "abcdef"), workers=2).run().state == "DONE"
    assert most == [2]


def test_the_default_result_has_a_field_for_each_agent() -> None:
    class Both(BaseModel):
        a: Found | None
        b: Found | None
        missing: list[str]

    system = Orchestrator("crew", [node("a"), node("b", fail(OSError("down")))], result=Both)
    assert system.run().output == {"a": {"value": "a"}, "b": None, "missing": ["b"]}


def test_what_one_agent_does_to_its_inputs_reaches_no_other() -> None:
    def spoil(run: Run, first: Found, text: dict[str, Any]) -> Any:
        first.value.append("spoilt")
        text["spoilt"] = True
        return [first.value, text]

    agents = [node("first", lambda run: ["good"]), *(node(n, spoil, takes="first text") for n in "ab")]
    given: dict[str, Any] = {}
    record = crew(*agents, flow=[Edge("first", "a"), Edge("first", "b")], workers=1).run(text=given)
    assert (record.output or {})["found"]["b"] == [["good", "spoilt"], {"spoilt": True}]
    assert (record.output or {})["found"]["first"] == ["good"]
    assert given == {}


def test_a_live_object_among_the_inputs_is_shared() -> None:
    lock = threading.Lock()
    assert crew(node("a", lambda run, text: text is lock, takes="text")).run(text=lock).output == {
        "found": {"a": True},
        "missing": [],
    }


# --- conditions and joins ------------------------------------------------------------------------------------------


def long(board: Blackboard) -> bool:
    return bool(board.read("look")["value"] > 10)


def short(board: Blackboard) -> bool:
    return not long(board)


@pytest.mark.parametrize(("size", "taken"), [(20, "deep"), (5, "quick")])
def test_a_condition_decides_which_way_is_taken(size: int, taken: str) -> None:
    flow = [Edge("look", "deep", long), Edge("look", "quick", short), Edge("deep", "end"), Edge("quick", "end")]
    record = crew(node("look", lambda run: size), *map(node, ["deep", "quick", "end"]), flow=flow).run()
    assert record.output == {"found": {"look": size, taken: taken, "end": "end"}, "missing": []}
    assert record.degraded is None  # what a condition leaves out is not missing
    assert decisions(record)["edge look → deep"] is (taken == "deep")
    assert decisions(record)["edge look → quick"] is (taken == "quick")


def test_a_condition_that_breaks_keeps_one_agent_from_running() -> None:
    flow = [Edge("a", "b", lambda board: board.read("nothing")["there"]), Edge("a", "c")]
    record = crew(node("a"), node("b"), node("c"), flow=flow).run()
    assert (record.output or {})["missing"] == ["b"]
    assert "the condition failed with TypeError" in (record.degraded or "")


def test_a_condition_sees_what_its_source_knew_and_no_more() -> None:
    seen: list[set[str]] = []

    def look(board: Blackboard) -> bool:
        seen.append({entry.key for entry in board.entries})
        return True

    crew(*map(node, "abc"), flow=[Edge("a", "c", look), Edge("b", "c")], workers=1).run()
    assert seen == [{"a"}]


@pytest.mark.parametrize(("join", "status", "missing"), [("any", "done", ["a"]), ("all", "skipped", ["a", "c"])])
def test_a_join_waits_for_all_and_needs_one_or_all(join: Join, status: str, missing: list[str]) -> None:
    flow = [Edge("a", "c"), Edge("b", "c")]
    record = crew(node("a", fail(OSError("down"))), node("b"), node("c"), flow=flow, joins={"c": join}).run()
    assert (record.state, statuses(record)["c"]) == ("DONE", status)
    assert (record.output or {})["missing"] == missing


@pytest.mark.parametrize(("wish", "status"), [({"takes": "a"}, "skipped"), ({"may": "a"}, "done")])
def test_an_agent_that_needs_what_is_missing_is_skipped(wish: dict[str, str], status: str) -> None:
    agents = [node("a", fail(OSError("down"))), node("b"), node("c", lambda run, **inputs: inputs, **wish)]
    record = crew(*agents, flow=[Edge("a", "c"), Edge("b", "c")]).run()
    assert statuses(record)["c"] == status
    assert ("c" in (record.output or {})["missing"]) == (status == "skipped")


# --- failures ------------------------------------------------------------------------------------------------------


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


# --- limits --------------------------------------------------------------------------------------------------------


def spend(times: int) -> Work:
    return lambda run: [run.call(look_up, order_id=str(i)) for i in range(times)]


def test_the_budget_of_the_whole_ends_the_whole(records: list[RunRecord]) -> None:
    agents = [node(n, spend(3), look_up) for n in "ab"]
    record = crew(*agents, node("c"), flow=[Edge("a", "c"), Edge("b", "c")], budget=Budget(tool_calls=5)).run()
    assert (record.state, record.tool_calls) == ("FAILED", 5)
    assert (record.error or "").startswith("BudgetExceeded: budget of 5 tool_calls")
    assert "c" not in {r.route for r in records}


def test_once_the_whole_is_at_its_limit_no_agent_makes_another_call() -> None:
    refused, tried = threading.Event(), threading.Event()
    script = Scripted({"answer": "too late"})

    def spend_all(run: Run) -> None:
        try:
            spend(2)(run)
        finally:
            refused.set()
            tried.wait(10)

    class Late(Asks):
        def execute(self, run: Run, plan: Any, text: str = "") -> Any:
            refused.wait(10)
            try:
                return self.ask(text="is anybody there?").answer
            finally:
                tried.set()

    late = speaking(Late("late"), script)
    record = crew(node("a", spend_all, look_up), late, budget=Budget(tool_calls=1)).run()  # type: ignore[arg-type]
    assert ((record.error or "").partition(":")[0], script.prompts) == ("BudgetExceeded", [])


def test_an_agents_own_budget_ends_that_agent() -> None:
    agents = [node(n, spend(3), look_up) for n in "ab"]
    record = crew(*agents, budgets={"a": Budget(tool_calls=2)}, budget=Budget(tool_calls=5)).run()
    assert (record.state, (record.output or {})["missing"], record.tool_calls) == ("DONE", ["a"], 5)


def test_an_agents_own_budget_of_the_same_size_is_its_own() -> None:
    record = crew(
        node("a", spend(3), look_up), node("b"), budgets={"a": Budget(tool_calls=2)}, budget=Budget(tool_calls=2)
    ).run()
    assert (record.state, (record.output or {})["missing"]) == ("DONE", ["a"])


def test_a_budget_of_its_own_is_no_way_round_that_of_the_whole() -> None:
    record = crew(node("a", spend(9), look_up), budgets={"a": Budget.unlimited()}, budget=Budget(tool_calls=2)).run()
    assert (record.state, record.tool_calls) == ("FAILED", 2)


def test_a_system_that_an_agent_calls_spends_the_budget_of_the_whole() -> None:
    inner = doing(spend(3), look_up, name="inner")
    record = crew(node("a", lambda run: inner().value), node("b"), budget=Budget(tool_calls=2), workers=1).run()
    assert (record.error or "").startswith("BudgetExceeded: budget of 2 tool_calls")


def test_a_system_that_an_agent_calls_may_spend_its_own_budget_and_fail_alone() -> None:
    inner = doing(spend(3), look_up, name="inner", budget=Budget(tool_calls=1))
    record = crew(node("a", lambda run: inner().value), node("b")).run()
    assert (record.state, (record.output or {})["missing"]) == ("DONE", ["a"])


def test_how_much_of_the_whole_is_spent_decides_whether_a_person_is_asked() -> None:
    def pay(run: Run, **inputs: Any) -> Any:
        return run.call(refund, order_id="A", usd=1)

    agents = [node("a", spend(8), look_up), node("b", pay, refund)]
    record = crew(*agents, flow=sequence("a", "b"), budget=Budget(tool_calls=10)).run()
    assert (record.output or {})["found"] == {"a": [f"order {i}" for i in range(8)], "b": None}
    assert [s.name for s in record.steps if s.kind == "approval"] == ["refund"]


def test_the_time_of_the_whole_ends_an_agent_that_hangs() -> None:
    go_on, called = threading.Event(), list[str]()

    def hang(run: Run) -> None:
        go_on.wait(30)
        try:
            run.call(refund, order_id="A", usd=1)
        except Exception as e:
            called.append(type(e).__name__)

    began = time.perf_counter()
    record = crew(node("a", hang, refund), node("b"), budget=Budget(seconds=0.3)).run()
    assert time.perf_counter() - began < 5
    assert (record.error or "").startswith("BudgetExceeded: budget of 0.3 seconds")
    assert (record.partial or {})["b"] == {"value": "b"}
    left = [t for t in threading.enumerate() if t.name == "agentkit-a"]
    go_on.set()
    left[0].join(10)
    assert (called, PAID) == (["Stopped"], [])


class Plane:
    """A control plane that has stopped something."""

    def __init__(self, **what: str) -> None:
        self.what = what

    def stopped(self, system: str, release: str | None, agent: str | None, tool: str | None) -> str | None:
        now = {"system": system, "agent": agent, "tool": tool}
        return "stopped by ann" if self.what and all(now[k] == v for k, v in self.what.items()) else None

    def notify(self, notice: Any) -> None:
        pass


def test_who_stops_an_agent_stops_that_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    plane = Plane(system="crew", agent="a")
    monkeypatch.setattr("agentkit.runs.control", lambda: plane)
    record = crew(node("a", spend(1), look_up), node("b", spend(1), look_up)).run()
    assert (record.state, (record.output or {})["missing"]) == ("DONE", ["a"])


def test_who_stops_the_system_stops_all_its_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    plane = Plane()
    monkeypatch.setattr("agentkit.runs.control", lambda: plane)

    def stop(run: Run) -> Any:
        plane.what = {"system": "crew"}
        return run.call(look_up, order_id="A")

    record = crew(node("a", stop, look_up), node("b"), flow=sequence("a", "b")).run()
    assert (record.state, record.error, record.tool_calls) == ("FAILED", "Stopped: stopped by ann", 0)
    assert "b" not in statuses(record)


# --- delegation ----------------------------------------------------------------------------------------------------


def test_work_that_goes_in_a_circle_is_refused(records: list[RunRecord]) -> None:
    there: list[ak.System] = []
    a = doing(lambda run: there[1]().value, name="a")
    b = doing(lambda run: there[0]().value, name="b")
    there += [a, b]
    record = a.run()
    assert record.error == "DelegationRefused: work goes in a circle: a → b → a"
    assert [(r.system, r.state) for r in records] == [("b", "FAILED"), ("a", "FAILED")]


def test_an_agent_that_calls_its_own_orchestrator_fails_alone() -> None:
    there: list[ak.System] = []
    there.append(crew(node("a", lambda run: there[0]().found), node("b")))
    record = there[0].run()
    assert (record.state, (record.output or {})["missing"]) == ("DONE", ["a"])
    assert "work goes in a circle: crew → crew.a → crew" in (record.degraded or "")


def test_work_that_is_handed_on_too_deep_is_refused() -> None:
    deep = doing(lambda run: "the end", name="s5")
    for i in (4, 3, 2, 1):
        deep = doing(lambda run, inner=deep: inner().value, name=f"s{i}")  # type: ignore[misc]
    assert deep.run().error == "DelegationRefused: work is handed on more than 4 deep: s1 → s2 → s3 → s4 → s5"


def test_orchestrators_nest_as_deep_as_delegation_goes() -> None:
    inner = Orchestrator("inner", [node("x")], result=Report, compose=gather)
    record = crew(node("a", lambda run: inner().found)).run()
    assert record.output == {"found": {"a": {"x": "x"}}, "missing": []}
    third = doing(lambda run: inner().found, name="third")
    record = crew(node("a", lambda run: third().value)).run()
    assert "more than 4 deep: crew → crew.a → third → inner → inner.x" in (record.error or "")


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
        time.sleep(0.4)  # longer than the whole may take
        requests.append(request)
        asking.release()
        return True

    agents = [node(n, pay_much(n), refund) for n in "abc"]
    with ak.approve_with(approver):
        record = crew(*agents, budget=Budget(seconds=0.3)).run()
    assert record.state == "DONE", record.error
    assert (len(PAID), {r.agent for r in requests}) == (3, {"a", "b", "c"})
    assert record.waited_s >= 1.2 > record.phases["execution"]
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


# --- the record ----------------------------------------------------------------------------------------------------


class Left(Asks):
    pass


class Right(Asks):
    pass


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


# --- the verifier --------------------------------------------------------------------------------------------------


def verifier(*verdicts: Any, takes: str = "result") -> ak.Agent:
    """Answers so, one after the other."""
    left = list(verdicts)

    def check(run: Run, **inputs: Any) -> Any:
        verdict = left.pop(0)
        if isinstance(verdict, Exception):
            raise verdict
        return verdict(**inputs) if callable(verdict) else verdict

    agent = node("checker", check, takes=takes)
    type(agent).result = Verdict
    return agent


YES, NO = Verdict(ok=True, reason="it is sound"), Verdict(ok=False, reason="no source is named")


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


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "a circle": ({"flow": [*sequence("a", "b", "c"), Edge("c", "a")]}, "the flow goes in a circle: a → b → c → a"),
    "a circle of one": ({"flow": [Edge("a", "a")]}, "circle: a → a"),
    "an unknown agent": ({"flow": [Edge("a", "x")]}, r"names 'x', which is none of the agents \['a', 'b', 'c'\]"),
    "an edge twice": ({"flow": [Edge("a", "b"), Edge("a", "b", long)]}, "two edges of the flow"),
    "an unknown join": ({"joins": {"a": "most"}}, "'any' or 'all', not 'most'"),
    "a join of nobody": ({"joins": {"x": "all"}}, "names 'x'"),
    "a budget of nobody": ({"budgets": {"x": Budget()}}, "no agent 'x'"),
    "too many retries": ({"retries": 9}, "retries must be 0 to 3"),
    "no workers": ({"workers": 0}, "workers at least 1"),
    "a verifier with no verdict": ({"verifier": node("checker")}, "`ok: bool` and `reason: str`"),
    "a verifier of an agent's name": ({"verifier": node("a")}, "two agents share a name"),
    "a router": ({"router": dspy.Predict("text -> to")}, "its flow takes the place of a router"),
}


@pytest.mark.parametrize(("options", "message"), UNFIT.values(), ids=UNFIT.keys())
def test_a_flow_that_cannot_run_is_refused_when_it_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        crew(*map(node, "abc"), **options)


def test_an_agent_cannot_take_what_does_not_come_before_it() -> None:
    agents = [node("a"), node("b", takes="a")]
    with pytest.raises(SourceError, match="agent 'b' takes the result of 'a', which does not come before it"):
        crew(*agents)
    assert crew(*agents, node("c"), flow=[Edge("a", "c"), Edge("c", "b")], compose=gather).flow.order == ("a", "c", "b")
    with pytest.raises(SourceError, match="has no agents"):
        crew()


# --- any flow ------------------------------------------------------------------------------------------------------

NAMES = "abcdef"
WHEN: dict[str, Callable[[Blackboard], bool] | None] = {
    "always": None,
    "yes": lambda board: True,
    "no": lambda board: False,
    "breaks": lambda board: bool(1 / 0),
}


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    """Agents, some of which fail; edges from earlier to later ones; joins."""
    names = list(NAMES[: draw(st.integers(1, len(NAMES)))])
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    return {
        "names": draw(st.permutations(names)),
        "failing": draw(st.sets(st.sampled_from(names), max_size=2)),
        "edges": {pair: draw(st.sampled_from([*WHEN, "always", "always"])) for pair in chosen},
        "joins": {n: draw(st.sampled_from(["any", "all"])) for n in names},
        "pauses": {n: draw(st.sampled_from([0, 0, 0.002])) for n in names},
        "workers": draw(st.integers(1, 4)),
    }


def expected(plan: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    """Status and whether it is missing, by the rules as they are documented."""
    ends: dict[str, tuple[str, bool]] = {}
    for name in sorted(plan["names"]):
        incoming = [(ends[a], when) for (a, b), when in plan["edges"].items() if b == name]
        taken = [end[0] == "done" and when in ("always", "yes") for end, when in incoming]
        broken = [end[1] or (end[0] == "done" and when == "breaks") for end, when in incoming]
        runs = not taken or (all(taken) if plan["joins"][name] == "all" else any(taken))
        failing = name in plan["failing"]
        ends[name] = (("failed", True) if failing else ("done", False)) if runs else ("skipped", any(broken))
    return ends


def carry_out(plan: dict[str, Any]) -> tuple[RunRecord, list[tuple[str, str]]]:
    log: list[tuple[str, str]] = []

    def work(run: Run) -> list[str]:
        assert run.agent is not None
        assert run.board is not None
        log.append(("begins", run.agent))
        time.sleep(plan["pauses"][run.agent])
        known = sorted({entry.author for entry in run.board.entries})
        log.append(("ends", run.agent))
        if run.agent in plan["failing"]:
            raise OSError("down")
        return known

    flow = [Edge(a, b, WHEN[when]) for (a, b), when in plan["edges"].items()]
    agents = [node(name, work) for name in plan["names"]]
    system = crew(*agents, flow=flow, joins=plan["joins"], workers=plan["workers"], budget=Budget(seconds=30))
    return system.run(), log


@pytest.mark.timeout(240)
@given(plans())
@settings(max_examples=100)
def test_every_flow_comes_to_the_same_end_each_time(plan: dict[str, Any]) -> None:
    record, log = carry_out(plan)
    ends = expected(plan)
    told = [s.name.removeprefix("agent ") for s in record.steps if s.name.startswith("agent ")]
    assert sorted(told) == sorted(plan["names"])  # exactly one end each
    assert statuses(record) == {name: status for name, (status, _) in ends.items()}
    done = {name for name, (status, _) in ends.items() if status == "done"}
    missing = {name for name, (_, is_missing) in ends.items() if is_missing}
    assert record.state == ("DONE" if done else "FAILED")
    if done:
        assert {*(record.output or {})["missing"]} == missing
    ran = {name for name, (status, _) in ends.items() if status != "skipped"}
    assert sorted(log) == sorted((what, name) for name in ran for what in ("begins", "ends"))
    for a, b in plan["edges"]:
        if a in ran and b in ran:
            assert log.index(("ends", a)) < log.index(("begins", b))
    board = Blackboard.of_record(record)
    assert [entry.number for entry in board.entries] == [*range(1, len(done) + 1)]
    assert sorted(entry.key for entry in board.entries) == sorted(done)
    if done:
        again, _ = carry_out(plan)
        assert (again.output, statuses(again)) == (record.output, statuses(record))


def test_no_thread_is_left_behind() -> None:
    before = {*threading.enumerate()}
    crew(*map(node, "abc")).run()
    deadline = time.monotonic() + 5
    while any(t.name.startswith("agentkit-") for t in {*threading.enumerate()} - before):
        assert time.monotonic() < deadline
