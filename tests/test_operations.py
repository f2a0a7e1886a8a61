"""The figures of the operations page: as counted by hand, by an oracle, and calibrated where they are statistics."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from conftest import SOAK
from hypothesis import given, settings
from hypothesis import strategies as st
from log_data import END, Regression, fill, make_log, release
from polars.testing import assert_frame_equal
from scipy.stats import binomtest

import agentkit as ak
from agentkit.errors import UsageError
from agentkit.examples import Example
from agentkit.records import RunRecord, Step
from agentkit_tracking import operations
from agentkit_tracking.operations import Filter, Page, drift, figures, queries
from agentkit_tracking.operations.filters import DAY, HOUR, WEEK, bucket_of
from agentkit_tracking.operations.intervals import fieller, mean, wilson
from agentkit_tracking.runlog import RunLog, events, feedback

MONDAY = datetime(2026, 11, 16, tzinfo=UTC)


def run(run_id: str, at: datetime = MONDAY, **values: Any) -> RunRecord:
    fields: dict[str, Any] = {
        "run_id": run_id, "system": "s", "release": "r1", "kind": "run", "started_at": at.isoformat(), "seconds": 2.0,
        "state": "DONE", "route": "a", "inputs": {"text": "hello"}, "output": {}, "error": None, "effects": [],
        "phases": {"planning": 0.5, "execution": 1.0, "reflection": 0.5}, "waited_s": 0.0, "model_calls": 1, "tool_calls": 0,
        "tokens_in": 10, "tokens_out": 2, "usd": 0.01, "stage": "production", "budget_used": 0.1,
    }  # fmt: skip
    return RunRecord(**{**fields, **values})


def failed(run_id: str, error: str, **values: Any) -> RunRecord:
    return run(run_id, state="FAILED", error=f"{error}: no", output=None, **values)


def tool(error: str | None = None, tries: int = 1, seconds: float = 0.1) -> Step:
    return Step("tool", "look_up", "EXECUTING", 0.0, seconds, "a", {}, error=error, tries=tries)


def approval(verdict: str | None, seconds: float = 60.0, by: str | None = "ada") -> Step:
    said = verdict and {"verdict": verdict, **({"by": by} if by else {})}
    return Step("approval", "pay", "AWAITING_HUMAN", 0.0, seconds, "a", {}, said, decided_by=by if verdict else None)


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    return RunLog(tmp_path / "log")


def look(log: RunLog, chosen: Filter | None = None) -> Page:
    with log.connection() as opened:
        return operations.look(opened, chosen)


def by_figure(frame: pl.DataFrame) -> dict[str, tuple[int, int]]:
    return {row["figure"]: (row["hits"], row["n"]) for row in frame.iter_rows(named=True)}


# ---- by hand


def test_rates_are_as_counted_by_hand(log: RunLog) -> None:
    broken = "ToolFailed: no"
    for record in (
        run("1"),
        run("2", steps=[tool(broken)]),  # recovered
        failed("3", "ToolFailed", steps=[tool(broken), tool(broken)]),
        failed("4", "PolicyRefused", steps=[tool("not permitted", tries=0)]),
        run("5", steps=[approval("approve")]),
        run("6", degraded="ToolFailed: no", steps=[tool(broken)]),
        failed("7", "ModelError"),
        run("8"),
        run("9", output={"action": "escalate"}),
        run("replied", output={"action": "reply"}),
    ):
        log.append(record)
    feedback.give(log, "1", "accepted", rating=5)
    feedback.give(log, "2", "corrected", rating=2)
    feedback.give(log, "5", "escalated")  # it was asked already
    feedback.give(log, "8", "escalated", rating=4)  # afterwards: the agent had not handed it over
    page = look(log)
    assert by_figure(figures.rates(*_cells(log))) == {
        "success": (7, 10), "failure": (2, 10), "refusal": (1, 10), "degraded": (1, 7), "recovery": (2, 3),
        "escalation": (2, 10), "completion": (3, 10), "acceptance": (1, 4), "satisfaction": (2, 3),
    }  # fmt: skip
    assert page.refusals.select("rule", "error", "runs").rows() == [("policy", "PolicyRefused", 1)]
    assert page.errors.rows() == [("s", "ModelError", 1), ("s", "ToolFailed", 1)]
    assert page.tools.select("tool", "calls", "failed", "not_made", "tries").rows() == [("look_up", 4, 4, 1, 4)]
    assert page.ratings.select("value", "n").rows() == [(pytest.approx(11 / 3), 3)]
    assert (page.runs, page.unfinished) == (10, 0)


def _cells(log: RunLog) -> tuple[pl.DataFrame, pl.DataFrame]:
    with log.connection() as opened:
        return queries.cells(opened, Filter(), DAY), queries.told(opened, Filter(), DAY)


def test_a_success_costs_what_all_runs_cost(log: RunLog) -> None:
    log.append(run("1", usd=0.1))
    log.append(run("2", usd=0.2, release="r2"))
    log.append(failed("3", "ModelError", usd=0.3))
    log.append(run("4", usd=float("nan")))  # nobody knows: neither its cost nor its success counts
    log.append(failed("5", "ModelError", usd=0.5, release="r3"))
    page = look(log)
    columns = ("usd", "runs", "successes", "unpriced")
    assert page.costs["value"].item() == pytest.approx(1.1 / 2)
    assert page.costs.select(columns).rows() == [(pytest.approx(1.1), 5, 2, 1)]
    versions = page.costs_of_versions.select("release", "value", "successes")
    assert versions.rows() == [("r1", pytest.approx(0.4), 1), ("r2", pytest.approx(0.2), 1), ("r3", None, 0)]


def test_a_run_that_another_called_is_part_of_it(log: RunLog) -> None:
    log.append(run("part", parent="whole", usd=0.1, steps=[tool()]))
    log.append(run("whole", usd=0.3))
    page = look(log)
    assert (page.runs, page.costs["usd"].item()) == (1, pytest.approx(0.3))
    assert page.tools["calls"].sum() == 1  # calls of tools are counted wherever they were made


@pytest.mark.parametrize("folded", [False, True], ids=["fresh", "folded"])
def test_fresh_and_folded_events_give_the_same_page(tmp_path: Path, folded: bool) -> None:
    log = make_log(tmp_path, runs=200, days=5, seed=3)
    before = look(log)
    if folded:
        log.close()
        log.fold()
    after = look(log)
    for name in ("headline", "rates", "costs_of_versions", "latency", "tools", "decisions", "budget", "routes"):
        assert_frame_equal(getattr(before, name), getattr(after, name))
    assert sorted(before.sample) == sorted(after.sample)


def test_latency_is_exact_and_without_the_time_of_people(log: RunLog) -> None:
    seconds = np.random.default_rng(0).lognormal(0, 1, 101)
    for i, s in enumerate(seconds):
        phases = {"planning": s / 2, "execution": s / 4}
        log.append(run(str(i), seconds=float(s) + 100, waited_s=100.0, phases=phases))
    page = look(log)
    rows = {row["phase"]: row for row in page.latency.iter_rows(named=True)}
    assert (rows["total"]["p50"], rows["total"]["p95"]) == pytest.approx(np.quantile(seconds, [0.5, 0.95]))
    assert rows["planning"]["p95"] == pytest.approx(np.quantile(seconds / 2, 0.95))
    assert (rows["reflection"]["p50"], rows["reflection"]["n"]) == (None, 0)  # no run had one
    assert page.latency_of_versions["p95"].to_list() == pytest.approx([np.quantile(seconds, 0.95)] * 2)


def test_a_phase_counts_the_runs_that_reached_it(log: RunLog) -> None:
    log.append(run("0"))
    for i in range(1, 10):
        log.append(failed(str(i), "ModelError", phases={"planning": 0.5}))
    found = dict(look(log).latency.select("phase", "n").rows())
    assert found == {"planning": 10, "execution": 1, "reflection": 1, "total": 10}


def test_what_is_said_of_a_called_run_counts_for_the_one_that_began_it(log: RunLog) -> None:
    log.append(run("leaf", system="helper", parent="part"))
    log.append(run("part", system="helper", parent="whole"))
    log.append(run("whole"))
    log.append(run("other"))
    feedback.give(log, "leaf", "corrected", rating=1)
    feedback.give(log, "whole", rating=4)
    page = look(log)
    found = by_figure(figures.rates(*_cells(log)))
    assert (found["acceptance"], found["completion"], found["satisfaction"]) == ((0, 1), (1, 2), (1, 2))
    assert page.ratings.select("value", "n").rows() == [(2.5, 2)]
    assert look(log, Filter(system="s")).ratings["n"].to_list() == [2]
    assert look(log, Filter(system="helper")).ratings.is_empty()  # none of its runs is counted there


def test_of_each_run_and_author_the_last_word_counts(log: RunLog) -> None:
    for run_id in ("1", "2", "3"):
        log.append(run(run_id))
    for rating in (5, 3, 1, 1, 1):
        feedback.give(log, "1", "rejected", rating=rating, by="ada")
    feedback.give(log, "1", rating=3, by="bob")
    feedback.give(log, "2", rating=5, by="ada")
    feedback.give(log, "2", comment="no rating", by="ada")
    feedback.give(log, "2", "corrected", by="ada")
    feedback.give(log, "2", "accepted", by="ada")
    feedback.give(log, "3", "accepted", by="ada")
    feedback.give(log, "3", "reopened", by="bob")
    assert look(log).ratings.select("value", "n").rows() == [(3.0, 3)]
    assert by_figure(figures.rates(*_cells(log)))["acceptance"] == (1, 3)


def test_numbers_as_large_as_a_column_holds_are_no_end_of_the_page(log: RunLog) -> None:
    for i in range(5):
        log.append(run(str(i), tokens_in=2**62, tokens_out=2**62, steps=[tool(tries=2**62)]))
    page = look(log)
    assert page.runs == 5
    assert page.tools["tries"].item() == 2**63 - 1


def test_decisions_of_people_and_of_nobody(log: RunLog) -> None:
    asked = [("approve", 10.0, "ada"), ("approve", 0.02, "bob"), ("reject", 86_400.0, None), (None, 5.0, None)]
    for i, (verdict, seconds, by) in enumerate(asked):
        log.append(run(str(i), steps=[approval(verdict, seconds, by)]))
    every = look(log).decisions.filter(pl.col("at").is_null())
    assert every.select("verdict", "asked", "p50").rows() == [
        ("approve", 2, 5.01),  # however fast: a person is named
        ("nobody", 1, 86_400.0),  # however late
        ("none", 1, 5.0),
    ]


def test_budgets_are_counted_in_steps_of_five_per_cent(log: RunLog) -> None:
    for i, used in enumerate((0.0, 0.049, 0.05, 0.999, 1.0, 1.7, None)):
        log.append(run(str(i), budget_used=used))
    assert look(log).budget.select("used", "runs").rows() == [(0.0, 2), (0.05, 1), (0.95, 1), (1.0, 2)]


# ---- what is looked at


def test_a_filter_leaves_out_what_does_not_meet_it(log: RunLog) -> None:
    log.append(run("1"))
    log.append(run("2", release=None, stage="draft"))
    log.append(run("3", system="t", release="r2", at=MONDAY + timedelta(days=1)))
    log.append(run("4", kind="evaluation", stage="draft"))
    log.append(run("5", kind="batch"))
    found = {
        name: look(log, chosen).runs
        for name, chosen in {
            "all": Filter(),
            "system": Filter(system="s"),
            "release": Filter(release="r1"),
            "draft": Filter(release=""),
            "stage": Filter(stage="draft"),
            "since": Filter(since=MONDAY + timedelta(hours=1)),
            "until": Filter(until=MONDAY),
            "rehearsals": Filter(rehearsals=True),
            "nothing": Filter(system="nobody's"),
        }.items()
    }  # fmt: skip
    assert found == {
        "all": 4,
        "system": 3,
        "release": 2,
        "draft": 1,
        "stage": 1,
        "since": 1,
        "until": 0,
        "rehearsals": 5,
        "nothing": 0,
    }


def test_a_time_without_a_zone_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Filter\.since needs a time zone"):
        Filter(since=datetime(2026, 11, 1))


def test_a_headline_stands_beside_the_time_before(log: RunLog) -> None:
    log.append(run("before", MONDAY - timedelta(hours=1), usd=0.5))
    log.append(run("now", MONDAY + timedelta(hours=1), usd=0.2))
    log.append(run("long ago", MONDAY - timedelta(days=3)))
    page = look(log, Filter(since=MONDAY, until=MONDAY + timedelta(days=1)))
    rows = {row["figure"]: (row["value"], row["before"]) for row in page.headline.iter_rows(named=True)}
    assert (rows["runs"], rows["cost per success"]) == ((1.0, 1.0), (0.2, 0.5))
    assert look(log).headline["before"].null_count() == look(log).headline.height


def test_points_in_time_are_hours_days_or_weeks_that_begin_on_monday(log: RunLog) -> None:
    lengths = {timedelta(0): HOUR, timedelta(days=3): HOUR, timedelta(days=30): DAY, timedelta(days=365): WEEK}
    assert {length: bucket_of(length) for length in lengths} == lengths
    for day in range(-400, 1, 40):
        log.append(run(str(day), MONDAY + timedelta(days=day)))
    weeks = look(log).costs["at"]
    assert set(weeks.dt.weekday().to_list()) == {1}
    assert set(weeks.dt.hour().to_list()) == {0}


def test_an_empty_log_is_a_page_without_rows(log: RunLog) -> None:
    page = look(log)
    assert (page.runs, page.unfinished, page.sampled_system, page.sample) == (0, 0, None, [])
    frames = {f.name: getattr(page, f.name) for f in fields(page) if isinstance(getattr(page, f.name), pl.DataFrame)}
    assert {name for name, frame in frames.items() if frame.height} <= {"headline", "latency_of_versions"}
    assert page.headline.select("figure", "value").rows() == [("runs", 0.0), ("p50", None), ("p95", None)]
    with log.connection() as opened:
        assert operations.choices(opened).is_empty()


def test_runs_under_way_are_not_counted_as_any_outcome(log: RunLog) -> None:
    log.append(run("1"))
    log.progress(run("2"), [(0, tool())])
    page = look(log)
    assert (page.runs, page.unfinished, page.rates.filter(pl.col("figure") == "success")["n"].item()) == (1, 1, 1)


def test_a_run_whose_beginning_was_pruned_is_not_less_than_none_under_way(log: RunLog) -> None:
    log.append(run("1"))
    log.progress(run("2"), [(0, tool())])
    for i in range(7):
        ended, private = events.ended(run(f"late{i}"), events.payloads())
        log.write([(ended, private)])
    page = look(log)
    assert (page.runs, page.unfinished) == (8, 1)


def test_text_of_anybody_is_a_value_and_no_sql(log: RunLog) -> None:
    log.append(run("1", system="'; DROP VIEW outcomes; --", release="'"))
    assert look(log, Filter(system="'; DROP VIEW outcomes; --", release="'")).runs == 1


# ---- against an oracle

_SPECS = st.fixed_dictionaries(
    {
        "state": st.sampled_from(["DONE", "DONE", "FAILED"]),
        "usd": st.one_of(st.floats(0, 10), st.just(float("nan"))),
        "broken": st.booleans(),
        "asked": st.booleans(),
        "action": st.sampled_from([None, "reply", "escalate"]),
        "label": st.sampled_from([None, "accepted", "reopened", "escalated"]),
        "release": st.sampled_from(["r1", "r2", None]),
    }
)


@settings(max_examples=15, deadline=None)
@given(specs=st.lists(_SPECS, min_size=1, max_size=12))
def test_figures_agree_with_plain_counting(specs: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = RunLog(Path(folder))
        for i, spec in enumerate(specs):
            steps = [
                *([tool("ToolFailed: no")] if spec["broken"] else []),
                *([approval("approve")] if spec["asked"] else []),
            ]
            made = run if spec["state"] == "DONE" else lambda run_id, **values: failed(run_id, "ModelError", **values)
            values = {"output": {"action": spec["action"]}} if spec["state"] == "DONE" else {}
            log.append(made(f"{i:02}", usd=spec["usd"], release=spec["release"], steps=steps, **values))
            if spec["label"]:
                feedback.give(log, f"{i:02}", spec["label"])
        page = look(log)
        found = by_figure(figures.rates(*_cells(log)))
        log.close()
    done = [s for s in specs if s["state"] == "DONE"]
    broken = [s for s in specs if s["broken"]]
    assert found["success"] == (len(done), len(specs))
    assert found.get("recovery", (0, 0)) == (sum(s["state"] == "DONE" for s in broken), len(broken))
    handed = [s for s in specs if s["asked"] or (s in done and s["action"] == "escalate")]
    assert found["escalation"] == (len(handed), len(specs))
    untouched = [s for s in done if s not in handed and s["label"] in (None, "accepted")]
    assert found["completion"] == (len(untouched), len(specs))
    for key, row in ((r["release"], r) for r in page.costs_of_versions.iter_rows(named=True)):
        own = [s for s in specs if (s["release"] or "") == key and s["usd"] == s["usd"]]
        wins = sum(s["state"] == "DONE" for s in own)
        total = sum(s["usd"] for s in own)
        assert row["successes"] == wins
        assert row["value"] == (pytest.approx(total / wins) if wins else None)
        if row["low"] is not None:
            assert row["low"] <= row["value"] * (1 + 1e-9)
            assert row["value"] <= row["high"] * (1 + 1e-9)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_wilson_interval_is_scipys(counts: tuple[int, int]) -> None:
    interval = binomtest(*counts).proportion_ci(0.95, method="wilson")
    assert wilson(*counts) == pytest.approx((interval.low, interval.high), abs=1e-9)


def test_no_interval_where_nothing_can_be_said() -> None:
    assert wilson(0, 0) == (None, None)
    assert mean(3.0, 9.0, 1) == (None, None)
    assert fieller(1.0, 1.0, 0.0, 0, 5) == (None, None)
    assert fieller(3.0, 5.0, 1.0, 1, 50) == (None, None)  # one success in fifty: it may cost anything


def test_the_interval_of_cost_per_success_covers_the_truth() -> None:
    rng, inside = np.random.default_rng(0), 0
    for _ in range(1000):
        cost, done = rng.lognormal(-4, 0.7, 300), rng.random(300) < 0.8
        low, high = fieller(cost.sum(), (cost**2).sum(), cost[done].sum(), done.sum(), 300)
        assert low is not None
        assert high is not None
        inside += low <= np.exp(-4 + 0.7**2 / 2) / 0.8 <= high
    assert 0.93 <= inside / 1000 <= 0.97


# ---- drift


def _routes(*counts: dict[str, int]) -> pl.DataFrame:
    rows = [(MONDAY + timedelta(days=i), route, n) for i, day in enumerate(counts) for route, n in day.items()]
    schema = {"at": pl.Datetime("us", "UTC"), "route": pl.String, "runs": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def test_routes_drift_only_where_they_do() -> None:
    found = operations.route_drift(_routes({"a": 52, "b": 48}, {"a": 90, "b": 10}, {"new": 80}), {"a": 100, "b": 100})
    assert found["is_drift"].to_list() == [False, True, True]
    assert found["distance"].to_list()[2] == pytest.approx(1.0)
    assert operations.route_drift(_routes(), {"a": 1}).is_empty()


def test_routes_without_drift_are_called_drift_in_five_of_a_hundred_looks() -> None:
    rng, called, p = np.random.default_rng(1), 0, []
    for _ in range(200):
        days = [dict(zip("abc", rng.multinomial(60, [0.5, 0.3, 0.2]).tolist(), strict=True)) for _ in range(3)]
        golden = dict(zip("abc", rng.multinomial(100, [0.5, 0.3, 0.2]).tolist(), strict=True))
        found = operations.route_drift(_routes(*days), golden)
        called += bool(found["is_drift"].any())
        p += found["p"].to_list()
    assert called / 200 <= 0.09
    assert 0.02 <= np.mean(np.array(p) <= 0.05) <= 0.08


@pytest.fixture
def fewer_shuffles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "SHUFFLES", 199)


def _texts(rng: np.random.Generator, words: str, n: int) -> list[dict[str, Any]]:
    return [{"text": " ".join(rng.choice(words.split(), 8)), "amount": float(rng.normal())} for _ in range(n)]


@pytest.mark.usefixtures("fewer_shuffles")
def test_inputs_without_drift_are_called_drift_as_rarely_as_said() -> None:
    rng, words, small = np.random.default_rng(2), "refund order late parcel invoice login reset broken card app", 0
    p: list[float] = []
    for i in range(60):
        found = operations.input_drift(_texts(rng, words, 40), _texts(rng, words, 40), seed=i)
        p += found["p"].to_list()
        small += bool(found["is_drift"].any())
    assert small / 60 <= 0.15
    assert np.mean(np.array(p) <= 0.05) <= 0.09
    assert 0.4 <= np.mean(p) <= 0.6


def test_inputs_in_other_words_of_other_length_or_size_are_drift() -> None:
    rng = np.random.default_rng(3)
    golden = _texts(rng, "refund order late parcel invoice", 60)
    live = [
        {"text": row["text"] + " and a few words more", "amount": row["amount"] + 2}
        for row in _texts(rng, "Heizung kaputt Rechnung bitte", 60)
    ]
    found = {row["feature"]: row for row in operations.input_drift(live, golden).iter_rows(named=True)}
    assert set(found) == {"text: wording", "text: length", "amount: value"}
    assert all(row["is_drift"] and row["auc"] > 0.8 for row in found.values())


def test_inputs_that_cannot_be_compared_have_no_row() -> None:
    assert operations.input_drift([{"a": "x"}] * 20, [{"b": "x"}] * 20).is_empty()
    assert operations.input_drift([], [{"a": "x"}]).is_empty()
    assert operations.input_drift([{"a": "same"}] * 20, [{"a": "same"}] * 20).is_empty()


@pytest.mark.usefixtures("fewer_shuffles")
def test_the_wording_of_blank_texts_is_left_out_and_said(log: RunLog) -> None:
    for i in range(40):
        day, text = MONDAY + timedelta(days=i % 2), " " * (1 + i % 3)
        log.append(run(str(i), day, inputs={"text": text, "note": f"{text}note {i % 5}"}))
    page = look(log, Filter(since=MONDAY + timedelta(days=1), until=MONDAY + timedelta(days=2)))
    found = operations.drift_of(page, [], events.payloads())
    assert found.inputs is not None
    assert set(found.inputs["feature"]) == {"text: length", "note: wording", "note: length"}
    assert found.blank == ("text",)


def test_without_a_golden_set_that_fits_a_time_is_compared_with_the_one_before(tmp_path: Path) -> None:
    planted = [Regression(what, 0.9, after=0.5, system="support_triage") for what in ("routes", "inputs")]  # type: ignore[arg-type]
    log = make_log(tmp_path, runs=1500, days=20, seed=2, regressions=planted)
    half = END - timedelta(days=10)
    golden = [Example(id="1", inputs={"another": "input"}, expected={"route": "billing"}, task_type="t")]
    found = {}
    for system in ("support_triage", "contract_review"):
        page = look(log, Filter(system=system, since=half, until=END))
        found[system] = operations.drift_of(page, golden, events.payloads())
        assert found[system].against == "before"
        assert "has none of the inputs" in found[system].why_not_golden
        assert sum(page.routes_before.values()) == look(log, Filter(system=system, until=half)).routes["runs"].sum()
        assert found[system].live > 100
        assert found[system].others > 100
    assert all(found["support_triage"].routes["is_drift"].tail(5))
    assert found["support_triage"].inputs["is_drift"].any()
    assert not found["contract_review"].routes["is_drift"].any()
    assert not found["contract_review"].inputs["is_drift"].any()
    everything = look(log, Filter(system="support_triage"))
    assert operations.drift_of(everything, [], events.payloads()) == operations.Drift(None)  # nothing is before it


def test_a_golden_set_that_fits_is_what_a_time_is_compared_with(tmp_path: Path) -> None:
    log = make_log(tmp_path, runs=600, days=20, seed=2)
    page = look(log, Filter(system="support_triage", since=END - timedelta(days=10), until=END))
    golden = [
        Example(
            id=str(i),
            inputs=json.loads(text),
            expected={"route": ("billing", "technical", "general")[i % 3]},
            task_type="t",
        )
        for i, text in enumerate(page.sample[:90])
    ]
    found = operations.drift_of(page, golden, events.payloads())
    assert (found.against, found.why_not_golden, found.others) == ("golden", "", 90)
    assert found.routes is not None
    assert not found.routes["is_drift"].any()


def test_expected_routes_are_found_in_the_golden_set() -> None:
    golden = ak.read_examples(Path(__file__).resolve().parents[1] / "data" / "support" / "golden.jsonl")
    assert operations.routes_expected(golden, ["billing", "technical"]) == {
        "billing": 100,
        "technical": 100,
        "general": 100,
    }
    assert operations.routes_expected(golden, ["elsewhere"]) is None
    assert operations.routes_expected([], ["a"]) is None


# ---- the notebook


def test_the_notebook_shows_systems_of_any_name_blank_inputs_and_every_time_in_utc(own_home: Path) -> None:
    import operations as notebook

    log = RunLog(own_home / "log")
    for i in range(6):  # of 50 days: the half that is shown is compared with the other
        at, inputs = datetime.now(UTC) - timedelta(days=10 * i, hours=1), {"text": " " * (i + 1)}
        log.append(run(str(i), at, system=("all", "other")[i % 2], inputs=inputs))
    shown, found = notebook.app.run()
    assert found["page"].runs == 3
    assert set(found["system"].options.values()) == {"all", "other", None}
    assert found["system"].value is None
    page = (
        "".join(output.text for output in shown if hasattr(output, "text")).replace("&#92;", "").replace("&quot;", '"')
    )
    times = page.count('"format": "%a %d %b %H:%M"')
    assert times > 0
    assert page.count('"format": "%a %d %b %H:%M", "formatType": "utc"') == times
    assert "Routes: Jensen" in page  # that chart is among them
    assert "Not compared: the wording of text" in page


# ---- large logs


def test_the_sample_of_inputs_is_bounded_and_the_same_each_time(tmp_path: Path) -> None:
    log = make_log(tmp_path, runs=1500, days=5, seed=0)
    with log.connection() as opened:
        drawn = [queries.inputs(opened, Filter(system="support_triage"), 850, 100) for _ in range(2)]
    assert sorted(drawn[0]) == sorted(drawn[1])
    assert 70 <= len(drawn[0]) <= 100
    assert "ticket" in json.loads(drawn[0][0])


@pytest.mark.parametrize("what", ["failures", "latency", "cost", "approvals", "routes"])
def test_a_planted_regression_shows_on_the_page(tmp_path: Path, what: Any) -> None:
    factor = 0.6 if what == "routes" else 4.0
    log = make_log(
        tmp_path, runs=1200, days=20, seed=1, regressions=[Regression(what, factor, after=0.5, system="support_triage")]
    )
    half = END - timedelta(days=10)
    page = look(log, Filter(system="support_triage", since=half, until=END))
    row = {r["figure"]: r for r in page.headline.iter_rows(named=True)}
    if what == "routes":
        golden = {"billing": 100, "technical": 100, "general": 100}
        assert operations.route_drift(page.routes, golden)["is_drift"].any()
    else:
        changed = {"failures": "failure", "latency": "p95", "cost": "cost per success", "approvals": "escalation"}[what]
        assert row[changed]["value"] > 1.5 * row[changed]["before"]
        assert row[changed]["is_changed"] == (changed != "p95")  # which has no interval


def test_a_filled_database_reads_as_a_log(tmp_path: Path) -> None:
    log = fill(tmp_path / "log", runs=5_000, days=60)
    page = look(log)
    whole = log.sql("SELECT count(*) AS runs, sum(usd) AS usd FROM outcomes WHERE kind IN ('run', 'batch')")
    assert (page.runs, page.costs["usd"].sum()) == (whole["runs"].item(), pytest.approx(whole["usd"].item()))
    assert page.unfinished == 0
    assert set(page.costs_of_versions["release"]) == {
        release(s, v) for s in page.routes["system"].unique() for v in (1, 2, 3)
    }


@pytest.mark.slow
@pytest.mark.skipif(not SOAK, reason="a minute and 500 MB; `make soak` does it")
def test_ten_million_events_are_answered_within_a_second_of_two_processors(tmp_path: Path) -> None:
    log = fill(tmp_path / "log", runs=1_000_000)
    with log.connection() as opened:
        operations.look(opened)
        started = time.process_time()
        assert operations.look(opened).runs > 900_000
        assert time.process_time() - started < 2.0
