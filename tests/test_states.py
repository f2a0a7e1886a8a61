"""The transition table: which arrows there are, and what they promise."""

from __future__ import annotations

import re

from agentkit import State, diagram
from agentkit.states import PHASES, TRANSITIONS

ARROWS = """
IDLE           -> PLANNING, FAILED
PLANNING       -> EXECUTING, FAILED
EXECUTING      -> AWAITING_HUMAN, REFLECTING, FAILED
AWAITING_HUMAN -> EXECUTING, FAILED
REFLECTING     -> DONE, PLANNING, FAILED
DONE           ->
FAILED         ->
"""
ALLOWED = {
    (State(source.strip()), State(target))
    for source, targets in (line.split("->") for line in ARROWS.strip().splitlines())
    for target in re.findall(r"\w+", targets)
}


def test_the_table_has_these_arrows_and_no_others() -> None:
    assert {(source, target) for source, targets in TRANSITIONS.items() for target in targets} == ALLOWED
    assert set(TRANSITIONS) == set(State)


def test_every_state_can_be_reached_and_every_one_that_is_not_final_can_fail_and_can_still_succeed() -> None:
    def reachable(start: State) -> set[State]:
        seen, open_ = {start}, [start]
        while open_:
            here = open_.pop()
            new = {target for source, target in ALLOWED if source == here} - seen
            seen |= new
            open_ += new
        return seen

    assert reachable(State.IDLE) == set(State)
    for state in set(State) - {State.DONE, State.FAILED}:
        assert (state, State.FAILED) in ALLOWED
        assert State.DONE in reachable(state)


def test_a_person_is_waited_for_in_no_phase() -> None:
    assert set(PHASES) == {State.PLANNING, State.EXECUTING, State.REFLECTING}
    assert list(PHASES.values()) == ["planning", "execution", "reflection"]


def test_the_diagram_draws_each_arrow_once() -> None:
    lines = diagram().splitlines()
    assert lines[0] == "stateDiagram-v2"
    drawn = [tuple(line.split(" --> ")) for line in map(str.strip, lines[1:])]
    ends = [("[*]", "IDLE"), ("DONE", "[*]"), ("FAILED", "[*]")]
    assert sorted(drawn) == sorted([*ends, *((str(a), str(b)) for a, b in ALLOWED)])
