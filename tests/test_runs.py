"""A run: it moves by the table only, and its record tells everything that happened, in order and with its time."""

from __future__ import annotations

import json
import math
import threading
import time
from typing import Any

import pytest
from hedgehogs import Hedgehog, doing
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from test_states import ALLOWED

import agentkit as ak
from agentkit import Budget, Run, RunRecord, State
from agentkit.current import current_run
from agentkit.errors import IllegalTransition
from agentkit.jsonable import jsonable

STATES = st.sampled_from(list(State))


class Walk(RuleBasedStateMachine):
    """A run that is asked for random transitions."""

    def __init__(self) -> None:
        super().__init__()
        self.run = Run("walk", {}, budget=Budget())
        self.taken: list[tuple[str, str, str]] = []

    @rule(wish=STATES, reason=st.text(max_size=10))
    def go(self, wish: State, reason: str) -> None:
        source, steps = self.run.state, list(self.run.steps)
        if (source, wish) in ALLOWED:
            self.run.to(wish, reason)
            self.taken.append((source, wish, reason))
            assert self.run.state is wish
        else:
            with pytest.raises(IllegalTransition, match=f"from {source} to {wish}"):
                self.run.to(wish, reason)
            assert (self.run.state, self.run.steps) == (source, steps)

    @invariant()
    def every_transition_taken_is_recorded_with_its_reason(self) -> None:
        assert [(s.inputs, s.name, s.outputs) for s in self.run.steps] == self.taken
        assert {s.kind for s in self.run.steps} <= {"transition"}

    @invariant()
    def the_times_in_the_states_follow_each_other_without_a_gap(self) -> None:
        end = 0.0
        for step in self.run.steps:
            assert step.started == pytest.approx(end)
            assert step.seconds >= 0
            end = step.started + step.seconds


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


@given(wishes=st.lists(STATES, max_size=12))
@settings(max_examples=60, deadline=None)
def test_a_run_that_has_ended_stays_as_it_is(wishes: list[State]) -> None:
    run = Run("walk", {}, budget=Budget())
    for state in (State.PLANNING, State.EXECUTING, State.REFLECTING, State.DONE):
        run.to(state, "on the way")
    for wish in wishes:
        with pytest.raises(IllegalTransition):
            run.to(wish, "again")
    assert run.state is State.DONE
    assert len(run.steps) == 4


# --- time ----------------------------------------------------------------------------------------------------------


@ak.tool(permission="write", human_at={"usd": 50})
def pay(usd: float) -> str:
    """Pay something back."""
    time.sleep(0.02)
    return "paid"


class Slow(Hedgehog):
    """Takes 40 ms to plan, 20 to execute, 10 to reflect."""

    tools = (pay,)

    def plan(self, run: Run, text: str = "") -> None:
        time.sleep(0.04)

    def execute(self, run: Run, plan: Any, text: str = "") -> Any:
        return run.call(pay, usd=80)

    def reflect(self, run: Run, plan: Any, facts: Any, text: str = "") -> dict[str, Any]:
        time.sleep(0.01)
        return {"value": facts}


def test_phases_add_up_and_waiting_for_a_person_belongs_to_none() -> None:
    def approver(request: ak.ApprovalRequest) -> bool:
        time.sleep(0.3)
        return True

    with ak.approve_with(approver):
        record = ak.adopt(Slow()).run(text="x")
    assert record.state == "DONE", record.error
    for phase, least in (("planning", 0.04), ("execution", 0.02), ("reflection", 0.01)):
        assert record.phases[phase] >= least
    assert record.waited_s >= 0.3
    idle = sum(s.seconds for s in record.steps if s.kind == "transition" and s.inputs == "IDLE")
    assert sum(record.phases.values()) + record.waited_s + idle <= record.seconds


def test_a_phase_that_fails_is_timed_up_to_its_failure() -> None:
    def fail(run: Run) -> None:
        time.sleep(0.02)
        raise RuntimeError("broken")

    record = doing(fail).run()
    assert record.phases["execution"] >= 0.02
    assert record.phases["reflection"] == 0


# --- the record ----------------------------------------------------------------------------------------------------


def test_every_run_hands_over_exactly_one_record(records: list[RunRecord]) -> None:
    system = ak.adopt(Hedgehog())
    returned = [system.run(text="a"), system.run(text="b"), system(text="c").record]
    assert records == returned
    assert len({r.run_id for r in records}) == 3
    assert [(r.inputs, r.output, r.state) for r in records] == [({"text": t}, {"value": t}, "DONE") for t in "abc"]


def test_a_sink_that_cannot_keep_the_record_stops_the_caller() -> None:
    def full(record: RunRecord) -> None:
        raise OSError("disk full")

    with ak.add_sink(full), pytest.raises(OSError, match="disk full"):
        ak.adopt(Hedgehog()).run(text="x")
    assert ak.adopt(Hedgehog()).run(text="x").state == "DONE"


def test_a_failed_run_tells_where_and_why_and_has_no_output(records: list[RunRecord]) -> None:
    def fail(run: Run) -> None:
        raise RuntimeError("broken pipe")

    record = doing(fail).run(text="x")
    assert (record.state, record.output, record.result) == ("FAILED", None, None)
    assert record.error == "RuntimeError: broken pipe"
    last = record.steps[-1]
    assert (last.inputs, last.name, last.outputs) == ("EXECUTING", "FAILED", "RuntimeError: broken pipe")
    assert records == [record]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_is_recorded_and_the_interrupt_goes_on(
    stop: type[BaseException], records: list[RunRecord]
) -> None:
    def interrupted(run: Run) -> None:
        raise stop

    system = doing(interrupted)
    for start in (system, system.run):
        with pytest.raises(stop):
            start(text="x")
    assert [r.state for r in records] == ["FAILED", "FAILED"]
    assert (records[0].error or "").startswith(stop.__name__)


def test_decisions_are_recorded_with_their_reasons_by_the_agent_that_took_them() -> None:
    record = doing(lambda run: run.decide("action", {"refund": True}, "the order is refundable")).run()
    step = next(s for s in record.steps if s.kind == "decision")
    assert (step.name, step.outputs, step.inputs) == ("action", {"refund": True}, "the order is refundable")
    assert (step.agent, step.state) == ("hedgehog", "EXECUTING")


def test_an_agent_whose_result_is_not_reached_by_the_table_fails() -> None:
    def skip_ahead(run: Run) -> None:
        run.to(State.DONE, "I say so")

    record = doing(skip_ahead).run()
    assert record.state == "FAILED"
    assert "no transition leads from EXECUTING to DONE" in (record.error or "")


def test_only_the_code_inside_a_run_sees_it() -> None:
    seen: list[Run | None] = []
    doing(lambda run: seen.append(current_run()) or seen.append(run)).run()
    assert seen[0] is seen[1]
    assert current_run() is None


class Odd:
    """No data, but it can say what it is."""

    def __str__(self) -> str:
        return "an odd thing"


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)
ODD = {
    "an object": (Odd(), "an odd thing"),
    "a set": ({1}, [1]),
    "bytes that are text": (b"abc", "abc"),
    "bytes that are none": (b"\xff", r"b'\xff'"),
    "a circle": (CIRCLE, "[[...]]"),
    "a key that is no text": ({"\ud800": 1}, r"{'\ud800': 1}"),
}


@pytest.mark.parametrize(("value", "kept"), ODD.values(), ids=ODD.keys())
def test_what_is_no_data_is_recorded_as_what_it_says_of_itself(value: Any, kept: Any) -> None:
    record = ak.adopt(lambda text: value, name="odd").run(text=value)
    assert (record.state, record.error) == ("DONE", None)
    assert (record.inputs, record.output) == ({"text": kept}, {"value": kept})
    assert record.result is value
    assert json.loads(record.to_json())["output"] == {"value": kept}


TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)  # surrogates, too
KEYS = st.text(max_size=20)
DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@given(inputs=st.dictionaries(KEYS, DATA, max_size=3), output=DATA)
@settings(max_examples=100, deadline=None)
def test_every_record_is_one_line_of_json(inputs: dict[str, Any], output: Any) -> None:
    run = Run("walk", inputs, budget=Budget())

    def work(run: Run) -> Any:
        for state in (State.PLANNING, State.EXECUTING, State.REFLECTING):
            run.to(state, "on the way")
        return output

    record, error = run.carry_out(work)
    assert error is None
    line = record.to_json()
    assert b"\n" not in line
    stored = json.loads(line)
    assert stored["run_id"] == record.run_id
    assert stored["inputs"].keys() == inputs.keys()
    assert "result" not in stored
    assert len(stored["steps"]) == 4


def test_a_live_object_in_the_result_keeps_no_record_from_being_written() -> None:
    record = ak.adopt(lambda text: {"lock": threading.Lock()}, name="odd").run(text="\ud800")
    assert "lock" in json.loads(record.to_json())["output"]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_has_no_word_for_is_null(number: float) -> None:
    record = ak.adopt(lambda text: {"n": [number]}, name="odd").run(text=number)
    stored = json.loads(record.to_json())
    assert (stored["inputs"], stored["output"]) == ({"text": None}, {"n": [None]})


@given(DATA)
@settings(max_examples=100, deadline=None)
def test_plain_data_is_recorded_unchanged(value: Any) -> None:
    assert repr(jsonable(value)) == repr(value)
