"""The helpers for tests of agents: the script, the clock, the faults."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from hedgehogs import doing
from hypothesis import given, settings
from hypothesis import strategies as st

import agentkit as ak
from agentkit import clock
from agentkit.errors import ToolFailed, UsageError
from agentkit.testing import FAULTS, INJECTION, FakeClock, Fault, Faults, Killed, injected, scripted
from agentkit.tool_calls import Line


@ak.tool
def look(place: str) -> list[dict[str, str]]:
    """Look at a place."""
    return [{"id": place, "text": "rain"}]


@ak.tool(permission="write", criticality="low")
def pay(usd: float) -> str:
    """Pay."""
    return "paid"


@pytest.fixture(autouse=True)
def closed_circuits() -> None:
    look.line.breaker.reset()
    pay.line.breaker.reset()


def looking() -> ak.System:
    return doing(lambda run: run.call(look, place="A"), look)


def test_a_script_answers_in_turn_and_costs_what_it_says() -> None:
    system = ak.adopt(dspy.Predict("question -> answer"), name="scripted")
    lm = scripted({"answer": "yes"}, {"answer": "no"}, usd_per_call=0.5)
    system.program.lm = lm
    assert [system.run(question="?").output["answer"] for _ in range(2)] == ["yes", "no"]  # type: ignore[index]
    assert len(lm.engine.prompts) == 2
    third = system.run(question="?")
    assert "the script has 2 answers, and the model was called once more" in str(third.error)
    fresh = ak.adopt(dspy.Predict("question -> answer"), name="scripted")
    fresh.program.lm = scripted({"answer": "yes"}, usd_per_call=0.5)
    assert fresh.run(question="?").usd == pytest.approx(0.5)


def test_a_fake_clock_jumps_instead_of_waiting_and_gives_the_real_one_back() -> None:
    with FakeClock() as now:
        before = clock.utc()
        clock.sleep(3600)
        now.tick(60)
        assert clock.monotonic() == 3660
        assert (clock.utc() - before).total_seconds() == 3660
    assert type(clock.use(clock.Clock())) is clock.Clock


def test_a_rate_limit_lives_through_a_change_of_clocks_and_can_begin_anew() -> None:
    line = Line(per_second=5, cache_s=60)
    with FakeClock() as now:
        assert [line.rate.wait_s() for _ in range(6)] == [0, 0, 0, 0, 0, pytest.approx(0.2)]  # type: ignore[union-attr]
        now.tick(1.2)
        assert line.rate.wait_s() == 0  # type: ignore[union-attr]
        line.keep({"a": 1}, "kept")
        assert line.cached({"a": 1}) == ("kept",)
        line.breaker.failures = 1
        with pytest.raises(OSError, match="down"):
            line.breaker.call(fails)
        assert line.breaker.is_open
        line.reset()
        assert not line.breaker.is_open
        assert line.cached({"a": 1}) is None
        assert [line.rate.wait_s() for _ in range(5)] == [0] * 5  # type: ignore[union-attr]


def fails() -> None:
    raise OSError("down")


SHOWN: dict[Fault, str] = {
    "tool down": "ConnectionError: injected fault: the tool is down",
    "tool slow": "Overdue: injected fault: no answer within 30 s",
    "malformed result": "malformed",
    "wrong type": "malformed",
}


@pytest.mark.parametrize("fault", SHOWN)
def test_a_fault_of_a_tool_looks_like_the_real_thing(fault: Fault) -> None:
    with injected(Faults(fault)) as faults:
        record = looking().run()
    assert SHOWN[fault] in str(record.error)
    assert faults.fired[record.run_id] == 3  # each of the three tries
    assert clock.monotonic() > 0


@pytest.mark.parametrize("fault", SHOWN)
def test_a_fault_that_passes_is_survived(fault: Fault) -> None:
    with injected(Faults(fault, attempts=1)) as faults:
        record = looking().run()
    assert (record.state, sum(faults.fired.values())) == ("DONE", 1)


def test_instructions_are_added_to_every_text_of_a_result() -> None:
    with injected(Faults("injected instructions")):
        record = looking().run()
    assert record.output == {"value": [{"id": f"A\n{INJECTION}", "text": f"rain\n{INJECTION}"}]}


@pytest.mark.parametrize("fault", ["model gibberish", "model time-out", "rate limit"])
def test_a_fault_of_a_model_ends_a_run_that_does_not_recover(fault: Fault) -> None:
    system = ak.adopt(dspy.Predict("question -> answer: int"), name="asking")
    with injected(Faults(fault)) as faults:
        record = system.run(question="how many?")
    assert record.state == "FAILED"
    assert sum(faults.fired.values()) >= 1


def test_a_kill_is_no_error_that_anything_catches() -> None:
    def careful(run: ak.Run) -> str:
        try:
            run.call(pay, usd=1)
        except Exception:
            return "caught"
        return "paid"

    system = doing(careful, pay)
    with pytest.raises(Killed), injected(Faults("kill")):
        system.run()


def test_a_write_may_take_effect_although_its_answer_is_lost() -> None:
    paid: list[float] = []

    @ak.tool(permission="write", criticality="low")
    def wire(usd: float) -> str:
        """Wire."""
        paid.append(usd)
        return "wired"

    for effect in (False, True):
        with injected(Faults("tool down", effect=effect)):
            record = doing(lambda run: run.call(wire, usd=1), wire).run()
        assert [e["outcome"] for e in record.effects] == ["unknown"]
    assert paid == [1.0]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), rate=st.floats(0, 1), texts=st.lists(st.text(max_size=5), max_size=8))
def test_the_same_seed_strikes_the_same_calls(seed: int, rate: float, texts: list[str]) -> None:
    def struck() -> list[bool]:
        found = []
        for text in texts:
            look.line.breaker.reset()
            with injected(Faults("tool down", rate=rate, seed=seed)) as faults:
                record = looking().run(text=text)
            found.append(bool(faults.fired[record.run_id]))
        return found

    assert struck() == struck()


def test_faults_keep_to_their_rate_and_to_the_tools_they_are_for() -> None:
    def many(run: ak.Run) -> Any:
        failed = 0
        for i in range(400):
            look.line.breaker.reset()
            try:
                run.call(look, place=str(i))
            except ToolFailed:
                failed += 1
        return failed

    budget = ak.Budget.unlimited()
    with injected(Faults("wrong type", rate=0.3, attempts=1)) as faults:
        doing(many, look, budget=budget).run()
    assert 90 <= sum(faults.fired.values()) <= 150
    with injected(Faults("tool down", tools=["pay"])):
        assert doing(many, look, budget=budget).run().output == {"value": 0}


def test_wrong_settings_are_refused() -> None:
    assert len(set(FAULTS)) == 9
    with pytest.raises(UsageError, match="there is no fault 'earthquake'"):
        Faults("earthquake")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="rate must be from 0 to 1"):
        Faults("tool down", rate=2)
