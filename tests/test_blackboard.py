"""The blackboard: nothing is lost or changed, everybody knows what they were shown, and two writers never both win."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hedgehogs import doing
from hypothesis import given, settings
from hypothesis import strategies as st
from test_runs import DATA

from agentkit import Budget, Run
from agentkit.blackboard import Blackboard, Claims
from agentkit.errors import ConflictingWrite, UsageError
from agentkit.jsonable import jsonable
from agentkit.testing import FakeClock


def together(*works: Callable[[], Any]) -> None:
    """Run everything on threads of its own, from the same moment on."""
    gate = threading.Barrier(len(works))

    def begin(work: Callable[[], Any]) -> None:
        gate.wait(10)
        work()

    threads = [threading.Thread(target=begin, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


# --- entries -------------------------------------------------------------------------------------------------------


def test_an_entry_tells_what_who_and_when() -> None:
    board = Blackboard()
    with FakeClock(datetime(2026, 1, 2, tzinfo=UTC)) as now:
        first = board.write("city", {"name": "Bonn"}, "search")
        now.tick(1)
        second = board.write("city", None, "check")
    assert (first.number, first.key, first.value, first.author) == (1, "city", {"name": "Bonn"}, "search")
    assert (second.number, second.at) == (2, "2026-01-02T00:00:01+00:00")
    assert board.entries == (first, second)
    assert board.read("city", "default") is None
    assert ("city" in board, "land" in board, board.read("land", "default")) == (True, False, "default")


def test_what_is_written_cannot_be_changed() -> None:
    board = Blackboard()
    value = {"names": ["Bonn"]}
    entry = board.write("city", value, "search")
    value["names"].append("Ulm")
    board.read("city")["names"].append("Kiel")
    assert board.read("city") == {"names": ["Bonn"]}
    with pytest.raises(AttributeError):
        entry.key = "land"  # type: ignore[misc]


@given(DATA)
@settings(max_examples=100)
def test_any_data_comes_back_as_it_went_in(value: Any) -> None:
    board = Blackboard()
    board.write("x", value, "a")
    assert board.read("x") == jsonable(value)
    again = Blackboard.of_data(json.loads(json.dumps(board.data())))
    assert again.entries == board.entries


def test_the_author_must_be_named_and_in_a_view_is_its_agent() -> None:
    board = Blackboard()
    with pytest.raises(UsageError, match="name the author"):
        board.write("x", 1)
    view = board.view("a")
    assert view.write("x", 1).author == "a"
    with pytest.raises(UsageError, match="author must be 'a', got 'b'"):
        view.write("x", 1, "b")


def test_the_step_says_how_far_the_authors_run_was() -> None:
    run = Run("walk", {}, budget=Budget())
    board = Blackboard().view("a", run=run)
    run.decide("first", 1, "because")
    run.decide("second", 2, "because")
    assert board.write("x", 1).step == 2


# --- views ---------------------------------------------------------------------------------------------------------


def test_an_agent_knows_what_it_was_shown_and_what_it_wrote() -> None:
    board = Blackboard()
    board.write("a", 1, "a")
    board.write("b", 2, "b")
    view = board.view("c", of=["a"])
    board.write("a", 3, "a")  # too late for c
    view.write("c", 4)
    assert [entry.value for entry in view.entries] == [1, 4]
    assert (view.read("a"), view.read("b"), board.read("a")) == (1, None, 3)
    assert board.known_to("c") == view.entries
    assert board.known_to("nobody") == ()


def test_the_board_can_be_read_as_it_was() -> None:
    board = Blackboard()
    for value in (1, 2, 3):
        board.write("x", value, "a")
    past = board.as_of(2)
    assert (past.read("x"), len(past.entries), board.as_of(0).entries) == (2, 2, ())
    with pytest.raises(UsageError, match="as it was"):
        past.write("x", 4, "a")


def test_a_board_of_data_knows_who_knew_what() -> None:
    board = Blackboard()
    board.write("a", 1, "a")
    board.view("b", of=["a"]).write("b", 2)
    board.write("a", 3, "a")
    again = Blackboard.of_data(json.loads(json.dumps(board.data())))
    assert again.known_to("b") == board.known_to("b") == board.entries[:2]


def test_a_run_without_a_board_says_so() -> None:
    with pytest.raises(UsageError, match="had no blackboard"):
        Blackboard.of_record(doing(lambda run: None).run())


# --- conflicts -----------------------------------------------------------------------------------------------------


def test_who_does_not_know_the_last_entry_may_not_write_over_it() -> None:
    board = Blackboard()
    left, right = board.view("left"), board.view("right")
    left.write("plan", "A")
    with pytest.raises(ConflictingWrite, match=r"'right' may not write 'plan'.*entry 1 by 'left' is there.*knows none"):
        right.write("plan", "B")
    left.write("plan", "C")  # its own
    board.view("next", of=["left"]).write("plan", "D")
    assert [entry.value for entry in board.entries] == ["A", "C", "D"]
    with pytest.raises(ConflictingWrite, match="knows entry 1"):
        board.write("plan", "E", "late", seen=1)


def test_the_key_of_an_agent_is_its_own() -> None:
    board = Blackboard(agents=["search"])
    with pytest.raises(ConflictingWrite, match="that agent's own"):
        board.view("parse", of=["search"]).write("search", "forged")
    board.view("search").write("search", "found")
    assert board.read("search") == "found"


def test_a_conflict_ends_the_run_whose_view_it_is() -> None:
    board = Blackboard()
    board.write("plan", "A", "left")

    def work(run: Run) -> str:
        run.board = board.view("right", run=run)
        try:
            run.board.write("plan", "B")
        except ConflictingWrite:
            return "never mind"
        return "written"

    record = doing(work).run()
    assert (record.state, board.read("plan")) == ("FAILED", "A")
    assert (record.error or "").startswith("ConflictingWrite")


@given(writers=st.integers(2, 5), rounds=st.integers(1, 5))
@settings(max_examples=20)
def test_no_update_is_lost_between_threads(writers: int, rounds: int) -> None:
    board = Blackboard()

    def count(author: str) -> None:
        for _ in range(rounds):
            while True:
                last = board.latest("n")
                try:
                    board.write("n", (last.value if last else 0) + 1, author, seen=last.number if last else 0)
                except ConflictingWrite:
                    continue
                break

    together(*(lambda name=f"w{i}": count(name) for i in range(writers)))  # type: ignore[misc]
    assert [entry.value for entry in board.entries] == list(range(1, writers * rounds + 1))
    assert [entry.number for entry in board.entries] == list(range(1, writers * rounds + 1))


@given(writers=st.integers(2, 5), keys=st.integers(1, 3))
@settings(max_examples=20)
def test_of_agents_side_by_side_exactly_one_writes_a_key(writers: int, keys: int) -> None:
    board = Blackboard()
    views = [board.view(f"w{i}") for i in range(writers)]
    refused: list[tuple[str, str]] = []

    def write(view: Blackboard, name: str) -> None:
        for key in map(str, range(keys)):
            try:
                view.write(key, name)
            except ConflictingWrite:
                refused.append((name, key))

    together(*(lambda v=view, n=f"w{i}": write(v, n) for i, view in enumerate(views)))  # type: ignore[misc]
    assert sorted(entry.key for entry in board.entries) == sorted(map(str, range(keys)))
    assert len(refused) == (writers - 1) * keys


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from("xy"), st.integers(), st.none() | st.integers(0, 6)),
        max_size=12,
    )
)
@settings(max_examples=200)
def test_a_write_succeeds_exactly_if_its_author_knows_the_last_entry(
    writes: list[tuple[str, str, int, int | None]],
) -> None:
    board, model = Blackboard(), dict[str, int]()
    number = 0
    for author, key, value, seen in writes:
        if seen is None or seen == model.get(key, 0):
            number += 1
            assert board.write(key, value, author, seen=seen).number == number
            model[key] = number
        else:
            with pytest.raises(ConflictingWrite):
                board.write(key, value, author, seen=seen)
    assert [entry.number for entry in board.entries] == list(range(1, number + 1))


@pytest.mark.parametrize("turn", range(20))
def test_of_agents_side_by_side_exactly_one_claims_a_thing(turn: int) -> None:
    claims, errors = Claims(), list[Any]()
    together(*(lambda n=name: errors.append(claims.take("order_id", "A", n)) for name in "abcd"))  # type: ignore[misc]
    assert sum(error is None for error in errors) == 1
    assert claims.take("order_id", "B", "a") is None
