"""Several agents on one request: their order, conditions and joins, flows that cannot run, and any flow at all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import dspy
import pytest
from crews import crew, decisions, fail, gather, long, node, statuses
from hedgehogs import Found
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from agentkit import Budget, Run, RunRecord
from agentkit.blackboard import Blackboard
from agentkit.errors import SourceError
from agentkit.flows import Edge, Join, sequence
from agentkit.orchestration import Orchestrator

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


# --- flows that cannot run -----------------------------------------------------------------------------------------

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
