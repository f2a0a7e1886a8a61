"""Frames: one row out per row in, in order, whatever happens in between; and how work is spread over threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import dspy
import polars as pl
import pytest
from hedgehogs import doing
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import agentkit as ak
from agentkit import Budget, Run, RunRecord
from agentkit.errors import UsageError
from agentkit.mapping import default_workers, in_parallel

OWN = ["route", "state", "error", "cost_usd", "latency_s", "run_id"]


def shout(text: str, mark: str = "!") -> dict[str, Any]:
    if "bad" in text:
        raise ValueError(f"cannot shout {text!r}")
    return {"loud": text.upper() + mark, "length": len(text)}


def frame(*texts: str | None, **columns: Any) -> pl.DataFrame:
    return pl.DataFrame({"text": pl.Series(texts, dtype=pl.String), **columns})


# --- frames --------------------------------------------------------------------------------------------------------


class Loud(BaseModel):
    said: str


def test_an_agent_maps_and_runs_by_itself() -> None:
    class Shout(ak.Agent):
        name, result = "shout", Loud

        def plan(self, run: ak.Run, text: str) -> str:
            return text

        def execute(self, run: ak.Run, plan: str, text: str) -> str:
            return plan.upper()

        def reflect(self, run: ak.Run, plan: str, facts: str, text: str) -> Loud:
            return Loud(said=facts)

    assert Shout().run(text="a").output == {"said": "A"}
    assert Shout().map(pl.DataFrame({"text": ["a", "b"]}))["said"].to_list() == ["A", "B"]


def test_the_frame_comes_back_with_outputs_and_what_each_run_was_like() -> None:
    out = ak.adopt(shout).map(frame("a", "bb", id=[7, 8]))
    assert out.columns == ["text", "id", "loud", "length", *OWN]
    assert out.select("id", "loud", "length", "state").rows() == [(7, "A!", 1, "DONE"), (8, "BB!", 2, "DONE")]
    assert out["cost_usd"].to_list() == [0.0, 0.0]
    assert out["run_id"].n_unique() == 2
    assert out.schema["latency_s"] == pl.Float64


def test_failures_are_rows_and_the_others_go_on() -> None:
    out = ak.adopt(shout).map(frame("a", "bad", "c"))
    assert out.select("text", "loud", "state", "error").rows() == [
        ("a", "A!", "DONE", None),
        ("bad", None, "FAILED", "ValueError: cannot shout 'bad'"),
        ("c", "C!", "DONE", None),
    ]


@given(texts=st.lists(st.sampled_from(["a", "bb", "bad", "ccc"]), max_size=30), workers=st.sampled_from([1, 8]))
@settings(max_examples=20, deadline=None)
def test_there_is_one_row_per_row_in_the_same_order_at_any_number_of_workers(texts: list[str], workers: int) -> None:
    out = ak.adopt(shout).map(frame(*texts, id=list(range(len(texts)))), workers=workers, progress=False)
    assert out["id"].to_list() == list(range(len(texts)))
    assert out["state"].to_list() == ["FAILED" if t == "bad" else "DONE" for t in texts]
    if "loud" in out.columns:
        assert out["loud"].to_list() == [None if t == "bad" else f"{t.upper()}!" for t in texts]


def test_one_and_eight_workers_give_the_same_outputs() -> None:
    system = ak.adopt(dspy.Predict("text -> mood: Literal['angry', 'happy'], confidence: float, why"))
    rows = frame(*[f"{word} about parcel {i}" for i in range(20) for word in ("angry", "happy", "undecided")])
    one, eight = (system.map(rows, workers=n, progress=False).drop("run_id", "latency_s") for n in (1, 8))
    assert one.equals(eight)
    assert one["mood"].to_list()[:2] == ["angry", "happy"]


def test_the_model_decides_how_many_workers_are_used() -> None:
    assert default_workers(ak.adopt(shout)) == 1
    assert default_workers(ak.adopt(shout, model="ollama_chat/llama3")) == 8
    with pytest.raises(UsageError, match="workers must be at least 1, got 0"):
        ak.adopt(shout).map(frame("a"), workers=0)


def test_an_empty_frame_stays_empty() -> None:
    out = ak.adopt(shout).map(frame())
    assert (out.height, out.columns) == (0, ["text", *OWN])


def test_a_column_that_is_needed_and_missing_is_named_before_anything_runs() -> None:
    def never(text: str, customer: str) -> str:
        raise AssertionError("nothing runs")

    with pytest.raises(UsageError, match=r"needs the columns \['customer', 'text'\]; missing: \['customer'\]"):
        ak.adopt(never).map(frame("a"))


def test_columns_that_are_no_inputs_are_carried_along_unread() -> None:
    out = ak.adopt(shout).map(frame("a", other=[{"x": [1]}]))
    assert out["other"].to_list() == [{"x": [1]}]
    assert out["loud"].to_list() == ["A!"]


def test_a_null_stands_for_the_default_of_an_optional_input_and_for_none_in_a_required_one() -> None:
    out = ak.adopt(shout).map(frame("a", "b", None, mark=["?", None, None]))
    assert out["loud"].to_list() == ["A?", "B!", None]
    assert "'NoneType' is not iterable" in out["error"][2]


def test_names_that_are_taken_lose_nobody_their_column() -> None:
    def clash(text: str, state: str) -> dict[str, Any]:
        return {"text": text * 2, "state": state.lower(), "run_id": 1, "new": True}

    rows = frame("a", "b", state=["NY", "CA"], output_text=["old", "old"], error=["e", "f"])
    out = ak.adopt(clash).map(rows)
    assert out.to_dict(as_series=False) | dict.fromkeys(["latency_s", "run_id"]) == {
        "text": ["a", "b"],
        "input_state": ["NY", "CA"],
        "output_text": ["old", "old"],
        "input_error": ["e", "f"],
        "output_output_text": ["aa", "bb"],
        "output_state": ["ny", "ca"],
        "output_run_id": [1, 1],
        "new": [True, True],
        "route": ["clash", "clash"],
        "state": ["DONE", "DONE"],
        "error": [None, None],
        "cost_usd": [0.0, 0.0],
        "latency_s": None,
        "run_id": None,
    }


def test_a_mapped_frame_can_be_mapped_again() -> None:
    system = ak.adopt(shout)
    bad = system.map(frame("a", "bad")).filter(pl.col("state") == "FAILED")
    again = system.map(bad.with_columns(text=pl.lit("good")))
    assert again.select("text", "output_loud", "state", "input_state").rows() == [("good", "GOOD!", "DONE", "FAILED")]
    assert again["input_run_id"].to_list() == bad["run_id"].to_list()


def test_outputs_of_different_types_share_a_column() -> None:
    def mixed(text: str) -> dict[str, Any]:
        return {"a": {"v": 1, "deep": {"x": 1}, "many": [1]}, "b": {"v": "two", "deep": None, "many": []}}[text]

    out = ak.adopt(mixed).map(frame("a", "b"))
    assert out["v"].to_list() == ["1", "two"]
    assert out["deep"].to_list() == [{"x": 1}, None]
    assert out["many"].to_list() == [[1], []]


def test_runs_are_filed_as_map_and_share_a_ledger() -> None:
    kept: list[RunRecord] = []
    ledger = ak.Ledger(Budget(model_calls=2))
    with ak.add_sink(kept.append):
        out = ak.adopt(dspy.Predict("text -> long: bool")).map(frame("a", "b", "c"), ledger=ledger)
    assert {r.kind for r in kept} == {"map"}
    assert out["state"].to_list() == ["DONE", "DONE", "FAILED"]
    assert out["error"][2].startswith("BudgetExceeded: budget of 2 model_calls")


def test_an_approver_is_asked_from_every_worker() -> None:
    @ak.tool(permission="write", human_at={"usd": 50})
    def pay(usd: float) -> str:
        """Pay something back."""
        return "paid"

    system = doing(lambda run: run.call(pay, usd=80), pay)
    with ak.approve_with(lambda request: True):
        assert system.map(frame(*"abcdef"), workers=4)["value"].to_list() == ["paid"] * 6


def test_an_interrupt_stops_the_map() -> None:
    def interrupted(run: Run) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        doing(interrupted).map(frame("a", "b"), progress=False)


def test_progress_is_shown_on_stderr_when_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    ak.adopt(shout).map(frame("a", "b"), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "shout" in err
    ak.adopt(shout).map(frame("a", "b"), progress=False)
    assert capfd.readouterr() == ("", "")


# --- threads -------------------------------------------------------------------------------------------------------


def numbers(drawn: list[int], stop: int = 1_000_000) -> Iterator[int]:
    for i in range(stop):
        drawn.append(i)
        yield i


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_every_result_comes_with_the_index_of_its_item(workers: int) -> None:
    assert sorted(in_parallel(lambda x: x * x, range(100), workers)) == [(i, i * i) for i in range(100)]
    assert list(in_parallel(lambda x: x, [], workers)) == []


@pytest.mark.parametrize(("workers", "ahead"), [(1, 1), (2, 8), (4, 16)])
def test_a_generator_without_end_is_not_read_ahead(workers: int, ahead: int) -> None:
    drawn: list[int] = []
    results = in_parallel(lambda x: x, numbers(drawn), workers)
    for taken in range(1, 50):
        next(results)
        assert len(drawn) < taken + ahead + workers
    results.close()


@pytest.mark.parametrize("workers", [1, 4])
def test_closing_early_drops_what_has_not_begun(workers: int) -> None:
    drawn: list[int] = []
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.1)
        return item

    results = in_parallel(work, numbers(drawn), workers)
    next(results)
    results.close()
    count = len(begun)
    assert count <= 3 * workers
    time.sleep(0.2)
    assert len(begun) == count
    assert not [t for t in threading.enumerate() if t.name.startswith("agentkit_")]


@pytest.mark.parametrize("workers", [1, 4])
def test_what_the_work_raises_reaches_the_caller_and_ends_the_rest(workers: int) -> None:
    drawn: list[int] = []

    def work(item: int) -> int:
        if item == 5:
            raise LookupError("five")
        return item

    with pytest.raises(LookupError, match="five"):
        list(in_parallel(work, numbers(drawn), workers))
    assert len(drawn) < 50
    assert not [t for t in threading.enumerate() if t.name.startswith("agentkit_")]


def test_work_really_is_done_at_the_same_time() -> None:
    meeting = threading.Barrier(4, timeout=10)
    assert len(list(in_parallel(lambda x: meeting.wait(), range(8), workers=4))) == 8
