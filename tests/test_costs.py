"""The cost model: what a task costs, a month, other prices; intervals that hold what they say."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from log_data import PRICES, make_log
from test_operations import MONDAY, approval, failed, run, tool
from typer.testing import CliRunner

from agentkit.errors import UsageError
from agentkit.records import Step
from agentkit.settings import Price, Settings
from agentkit_pipelines.cli import app
from agentkit_pipelines.costs_cli import prices_from
from agentkit_tracking import costs
from agentkit_tracking.operations import Filter
from agentkit_tracking.runlog import RunLog

MINI, BIG = "openai/gpt-4.1-mini", "openai/gpt-4.1"


def model(name: str, tokens_in: int, tokens_out: int, usd: float = 0.0, **values: Any) -> Step:
    return Step(
        "model", name, "PLANNING", 0.0, model=name, tokens_in=tokens_in, tokens_out=tokens_out, usd=usd, **values
    )


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    return RunLog(tmp_path / "log")


def drawn_from(log: RunLog, chosen: Filter | None = None, **options: Any) -> costs.Tasks:
    with log.connection() as opened:
        return costs.tasks(opened, chosen, **options)


def made_up(usd: Any, days: float = 30) -> costs.Tasks:
    """Tasks of one system with these costs, spread over some days."""
    values = np.asarray(usd, dtype=float)
    n = len(values)
    frame = pl.DataFrame(
        {
            "task": [f"{i:06}" for i in range(n)], "system": ["s"] * n, "kind": ["run"] * n, "is_pilot": [False] * n,
            "started_at": [MONDAY + timedelta(days=days * i / max(1, n - 1)) for i in range(n)], "usd": values,
            "tokens_in": [10] * n, "tokens_out": [1] * n, "tier": ["fast"] * n, "tools_usd": [0.0] * n,
        }
    )  # fmt: skip
    schema = {"task": pl.String, "model": pl.String, **dict.fromkeys(("tokens_in", "tokens_out", "usd"), pl.Float64)}
    return costs.Tasks(frame, pl.DataFrame(schema=schema), days=days)


def total_of(month: pl.DataFrame) -> dict[str, Any]:
    return month.row(by_predicate=pl.col("line") == "total", named=True)


# ---- tasks


def test_a_task_has_the_tokens_of_the_runs_it_called_and_the_tiers_of_their_models(log: RunLog) -> None:
    log.append(run("leaf", parent="part", steps=[model(MINI, 5, 1, 0.01)], usd=0.01))
    log.append(run("part", parent="whole", steps=[model(BIG, 7, 2, 0.2)], usd=0.21))
    log.append(run("whole", steps=[model(BIG, 100, 20, 0.3), model(BIG, 1, 1, cached=True)], usd=0.61))
    log.append(run("none", usd=0.0))
    settings = Settings(models={"fast": MINI, "strong": BIG})
    drawn = drawn_from(log, settings=settings)
    assert drawn.frame.select("task", "tier", "usd", "tools_usd").rows() == [
        ("none", "none", 0.0, 0.0),
        ("whole", "fast + strong", 0.61, pytest.approx(0.1)),
    ]
    assert drawn.use.select("task", "model", "tokens_in", "tokens_out").rows() == [
        ("whole", BIG, 107, 22),
        ("whole", MINI, 5, 1),
    ]
    assert drawn_from(log).frame["tier"].to_list() == ["none", f"{BIG} + {MINI}"]


def test_a_bounded_draw_stands_for_all_tasks(tmp_path: Path) -> None:
    log = make_log(tmp_path, runs=1500, days=10, seed=0)
    all_of_them, few = drawn_from(log), drawn_from(log, limit=300)
    assert 200 < few.frame.height < 400
    assert few.frame.height * few.scale == pytest.approx(all_of_them.frame.height)
    usual, estimate = (costs.month(d, by=[]).filter(pl.col("line") == "total") for d in (all_of_them, few))
    assert estimate["tasks"].item() == pytest.approx(usual["tasks"].item(), rel=0.05)
    assert estimate["low"].item() < usual["usd"].item() < estimate["high"].item()


def test_tokens_times_price_is_what_was_logged(tmp_path: Path) -> None:
    drawn = drawn_from(make_log(tmp_path, runs=300, days=10, seed=0))
    again = costs.repriced(drawn, PRICES)
    assert again.frame["usd"].to_numpy() == pytest.approx(drawn.frame["usd"].to_numpy())


def test_other_prices_change_what_they_name_and_nothing_else(log: RunLog) -> None:
    log.append(
        run("1", steps=[model(MINI, 1_000_000, 500_000, 1.2), model(BIG, 1_000_000, 0, 2.0)], usd=3.7)
    )  # 0.5: a tool
    log.append(run("2", steps=[model(BIG, 0, 1_000_000, 8.0)], usd=8.0))
    log.append(run("3", steps=[model("new/one", 1_000_000, 0, float("nan"))], usd=float("nan")))
    drawn = drawn_from(log)
    cheaper = costs.repriced(drawn, {BIG: Price(input=1, output=4)})
    assert cheaper.frame["usd"].to_list() == [pytest.approx(1.2 + 1.0 + 0.5), pytest.approx(4.0), None]
    known = costs.repriced(drawn, {"new/one": Price(input=3, output=0)})
    assert known.frame["usd"].to_list() == [pytest.approx(3.7), pytest.approx(8.0), pytest.approx(3.0)]
    assert costs.repriced(drawn, {}).frame["usd"].to_list() == drawn.frame["usd"].to_list()


def test_a_price_for_a_model_that_had_none_leaves_what_tools_cost(log: RunLog) -> None:
    paid = replace(tool(), usd=0.5)
    steps = [model(MINI, 1_000_000, 0, float("nan")), paid, paid, approval("approve"), tool()]
    log.append(run("part", parent="unknown", steps=[model(BIG, 1_000_000, 0, 2.0), paid], usd=2.5))
    log.append(run("unknown", steps=steps, usd=float("nan")))
    log.append(run("known", steps=[model(MINI, 1_000_000, 0, 0.1), paid, paid], usd=1.1))
    drawn = drawn_from(log)
    assert drawn.frame.select("task", "usd", "tools_usd").rows() == [("known", 1.1, 1.0), ("unknown", None, 1.5)]
    again = costs.repriced(drawn, {MINI: Price(input=1, output=0)})
    assert again.frame["usd"].to_list() == [pytest.approx(2.0), pytest.approx(1.0 + 2.0 + 1.5)]


def test_tokens_as_many_as_a_column_holds_are_summed(log: RunLog) -> None:
    log.append(run("1", tokens_in=2**62, steps=[model(MINI, 2**62, 1)] * 5))
    assert drawn_from(log).use["tokens_in"].item() == pytest.approx(5 * 2**62)


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=20),
    st.floats(0, 50),
    st.floats(0, 50),
)
def test_what_if_is_tokens_times_price(used: list[tuple[int, int]], price_in: float, price_out: float) -> None:
    drawn = made_up([1.0] * len(used))
    rows = {
        "task": drawn.frame["task"],
        "model": ["m"] * len(used),
        "tokens_in": [u[0] for u in used],
        "tokens_out": [u[1] for u in used],
    }
    drawn = costs.Tasks(drawn.frame, pl.DataFrame(rows).with_columns(usd=pl.lit(1.0)))
    found = costs.repriced(drawn, {"m": Price(input=price_in, output=price_out)}).frame["usd"].to_list()
    assert found == pytest.approx([(i * price_in + o * price_out) / 1e6 for i, o in used])


# ---- intervals


def test_the_interval_of_the_mean_holds_the_mean_although_costs_are_skewed() -> None:
    rng, inside = np.random.default_rng(0), 0
    truth = float(np.exp(0.5))  # of a lognormal with sigma 1
    for _ in range(300):
        row = costs.distribution(made_up(rng.lognormal(0, 1, 150))).row(0, named=True)
        inside += row["mean_low"] <= truth <= row["mean_high"]
    assert 0.91 <= inside / 300 <= 0.99


@pytest.mark.parametrize("n", [400, 1000])
def test_the_interval_of_the_99th_percentile_holds_it(n: int) -> None:
    rng, truth = np.random.default_rng(1), float(np.exp(2.3263478740408408))
    found = [costs.quantile_interval(rng.lognormal(0, 1, n), 0.99) for _ in range(1000)]
    inside = sum(low <= truth <= high for low, high in found if low is not None and high is not None)
    assert inside / 1000 >= 0.94


def test_too_few_tasks_leave_the_99th_percentile_open_at_the_top() -> None:
    assert costs.quantile_interval(range(367), 0.99)[1] is None
    assert costs.quantile_interval(range(368), 0.99)[1] == 367
    assert costs.quantile_interval([1.0], 0.99) == (1.0, None)


@pytest.mark.parametrize("tasks", [50, 5_000])
def test_the_interval_of_a_month_holds_months(tasks: int) -> None:
    rng, inside = np.random.default_rng(2), 0
    for _ in range(300):
        total = costs.month(made_up(rng.lognormal(-3, 0.8, 200)), tasks).filter(pl.col("line") == "total")
        inside += total["low"].item() <= rng.lognormal(-3, 0.8, tasks).sum() <= total["high"].item()
    assert 0.91 <= inside / 300 <= 0.99


def test_one_task_has_no_interval() -> None:
    for drawn in (made_up([0.3]), made_up([0.3, float("nan")])):
        row = costs.distribution(drawn).filter(pl.col("amount") == "usd").row(0, named=True)
        total = total_of(costs.month(drawn, 100))
        assert (row["mean"], row["mean_low"], row["mean_high"]) == (pytest.approx(0.3), None, None)
        assert (total["usd"], total["low"], total["high"]) == (pytest.approx(30), None, None)


def test_the_same_tasks_give_the_same_intervals() -> None:
    drawn = made_up(np.random.default_rng(0).lognormal(0, 1, 100))
    assert costs.month(drawn, 100).equals(costs.month(drawn, 100))
    assert costs.distribution(drawn).equals(costs.distribution(drawn))


# ---- a month


def test_hosting_and_monitoring_are_lines_of_their_own() -> None:
    found = {
        row["line"]: row
        for row in costs.month(made_up([0.1] * 50), 1000, hosting=200, monitoring=None).iter_rows(named=True)
    }
    assert (found["models and tools"]["usd"], found["hosting"]["usd"], found["monitoring"]["usd"]) == (
        pytest.approx(100),
        200,
        None,
    )
    assert (found["total"]["usd"], found["total"]["low"], found["total"]["high"]) == (pytest.approx(300),) * 3


def test_without_a_number_a_month_has_as_many_tasks_as_were_logged() -> None:
    total = costs.month(made_up([0.1] * 300, days=60)).filter(pl.col("line") == "total")
    assert total["tasks"].item() == pytest.approx(300 / 60 * 365.25 / 12)


def test_the_rate_of_a_month_is_that_of_the_time_asked_for_and_not_of_the_tasks(log: RunLog) -> None:
    """As far as the log covers it: its first run is 40 days old."""
    end = MONDAY + timedelta(days=40)
    log.append(run("first", system="another"))
    for i in range(10):
        log.append(run(f"burst{i}", end - timedelta(days=25, minutes=i), system="burst"))
    log.append(run("single", end - timedelta(hours=3), system="single"))

    def rate(system: str, days: int) -> float:
        drawn = drawn_from(log, Filter(system=system, since=end - timedelta(days=days), until=end))
        return float(total_of(costs.month(drawn))["tasks"])

    month = 365.25 / 12
    assert rate("burst", 30) == pytest.approx(10 * month / 30)
    assert rate("single", 30) == pytest.approx(month / 30)
    assert rate("burst", 90) == pytest.approx(10 * month / 40)
    whole = drawn_from(log, Filter(system="burst"))
    assert whole.days == pytest.approx(40, abs=0.2)  # to the last run, where no end is named
    single = drawn_from(log, Filter(system="single", since=end - timedelta(hours=4), until=end))
    assert single.days == 1  # of hours nobody can tell a month


def test_what_nobody_knows_the_cost_of_is_said() -> None:
    drawn = made_up([0.1, float("nan"), 0.3])
    assert costs.distribution(drawn).filter(pl.col("amount") == "usd").select("n", "unknown", "mean").rows() == [
        (2, 1, pytest.approx(0.2))
    ]
    total = costs.month(made_up([float("nan")] * 3), 10).filter(pl.col("line") == "total")
    assert (total["usd"].item(), total["low"].item()) == (None, None)


# ---- pilot and production


def test_the_pilot_stands_beside_production(log: RunLog) -> None:
    for i in range(10):
        log.append(run(f"e{i}", kind="evaluation", stage="draft", usd=0.1))
        log.append(run(f"d{i}", stage="draft", usd=0.3))
        log.append(run(f"p{i}", usd=0.5, at=MONDAY + timedelta(hours=i)))
    log.append(run("x", system="only_a_draft", stage="draft"))
    log.append(run("c", kind="chaos", usd=100.0))
    found = {row["system"]: row for row in costs.pilot_to_production(drawn_from(log)).iter_rows(named=True)}
    measured = found["s"]
    assert (measured["pilot_tasks"], measured["pilot_usd"], measured["production_usd"]) == (
        20,
        pytest.approx(0.2),
        pytest.approx(0.5),
    )
    assert measured["of_a_task"] == pytest.approx(2.5)
    assert measured["low"] < 2.5 < measured["high"]
    assert measured["in_all"] == pytest.approx(1.25)
    assert (measured["published_low"], measured["published_high"]) == (5, 10)
    assert found["only_a_draft"]["of_a_task"] is None


def test_what_production_costs_in_all_is_compared_over_the_same_time(log: RunLog) -> None:
    for i in range(30):
        log.append(run(f"e{i}", MONDAY + timedelta(seconds=i), kind="evaluation", stage="draft"))
    for i in range(90):
        log.append(run(f"p{i}", MONDAY + timedelta(hours=8 * i)))
    log.append(run("one pilot", system="t", stage="draft"))
    log.append(run("one task", system="t"))
    found = {row["system"]: row for row in costs.pilot_to_production(drawn_from(log)).iter_rows(named=True)}
    assert (found["s"]["of_a_task"], found["s"]["in_all"]) == (pytest.approx(1), pytest.approx(3))
    assert (found["t"]["of_a_task"], found["t"]["low"], found["t"]["high"]) == (pytest.approx(1), None, None)


def test_production_is_projected_where_there_is_any(log: RunLog) -> None:
    log.append(run("evaluated", kind="evaluation"))
    log.append(run("drafted", stage="draft"))
    drafts, stage = costs.projected(drawn_from(log))
    assert (stage, drafts.frame["task"].to_list()) == ("draft", ["drafted"])
    log.append(run("released"))
    drawn = drawn_from(log)
    found = {stage: costs.projected(drawn, stage) for stage in (None, "production", "draft", "all")}
    assert {stage: tasks.frame["task"].to_list() for stage, (tasks, _) in found.items()} == {
        None: ["released"],
        "production": ["released"],
        "draft": ["drafted"],
        "all": ["drafted", "released"],
    }
    assert found[None][1] == "production"


def test_published_figures_are_there_to_compare_with() -> None:
    assert costs.published().rows() == [
        ("support", 0.02, 0.15),
        ("review", 0.08, 0.4),
        ("research", 0.25, 1.2),
        ("development", 0.8, 4.0),
    ]


# ---- the command


@pytest.fixture
def own_log(own_home: Path) -> RunLog:
    return make_log(own_home / "log", runs=600, days=20, seed=0, end=datetime.now(UTC))


@pytest.mark.usefixtures("own_log")
def test_the_command_shows_tasks_a_month_other_prices_and_the_pilot() -> None:
    done = CliRunner().invoke(
        app, ["costs", "support_triage", "--tasks", "50000", "--price", f"{MINI}=0.8/3.2", "--hosting", "120"]
    )
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    for words in (
        "a task, last 30 days",
        "a month of 50,000 tasks",
        f"what if: {MINI} 0.8/3.2",
        "not given",
        "5 to 10",
        "published",
    ):
        assert words in said


@pytest.mark.usefixtures("own_log")
def test_a_price_of_a_model_that_nobody_used_is_wrong_use() -> None:
    done = CliRunner().invoke(app, ["costs", "--price", "openai/gpt-9=1/2"])
    assert isinstance(done.exception, UsageError)
    assert "no run used the model 'openai/gpt-9'" in str(done.exception)


@pytest.mark.parametrize(
    "text", ["m", "m=1", "m=1/2/3", "=1/2", "m=a/b", "m=-1/2", "m=nan/1", "m=inf/1", "m=1/1e308", ""]
)
def test_a_price_that_is_none_is_wrong_use(text: str) -> None:
    with pytest.raises(UsageError, match="MODEL=IN/OUT"):
        prices_from([text])


@pytest.mark.usefixtures("own_log")
def test_the_command_says_which_stage_it_counts() -> None:
    said = {
        stage: " ".join(CliRunner().invoke(app, ["costs", *(["--stage", stage] if stage else [])]).output.split())
        for stage in ("", "production", "draft", "all")
    }
    whole = {stage: re.search(r"Counted: ([\d,]+) tasks of (.*?)[(,]", text) for stage, text in said.items()}
    found = {stage: (int(match[1].replace(",", "")), match[2].strip()) for stage, match in whole.items() if match}
    assert found[""] == found["production"]
    assert found["production"][1] == "the stage production"
    assert found["production"][0] + found["draft"][0] == found["all"][0]
    assert "days, as far back as the log goes" in said[""]  # 20 of 30
    assert f"({found['draft'][0]:,} of another stage are left out: --stage all)" in said["production"]
    assert "left out" not in said["all"]


def test_a_stage_without_a_run_is_wrong_use(own_home: Path) -> None:
    RunLog(own_home / "log").append(run("1", datetime.now(UTC), stage="draft"))
    done = CliRunner().invoke(app, ["costs", "--stage", "production"])
    assert isinstance(done.exception, UsageError)
    assert "no finished run of the stage production" in str(done.exception)
    assert CliRunner().invoke(app, ["costs"]).exit_code == 0


@pytest.mark.parametrize("name", ["ollama/llama[/x]", "[red]m[/red]", "m:smile:", "m\\"])
def test_a_name_is_shown_as_it_is(own_home: Path, name: str) -> None:
    log = RunLog(own_home / "log")
    log.append(run("1", datetime.now(UTC), steps=[model(name, 10, 1, 0.1)], usd=0.1))
    done = CliRunner().invoke(app, ["costs", "--price", f"{name}=1/2"])
    assert done.exit_code == 0, done.output
    assert done.output.count(name) == 6  # three amounts, two months and a title
    assert f"what if: {name} 1/2" in done.output


@pytest.mark.parametrize(
    "options",
    [
        ["--days", "4000000"], ["--days", "0"], ["--tasks", "inf"], ["--tasks", "nan"], ["--hosting", "inf"],
        ["--hosting", "nan"], ["--monitoring", "1e300"], ["--stage", "pilot"],
    ],
)  # fmt: skip
@pytest.mark.usefixtures("own_log")
def test_numbers_that_are_none_are_wrong_use(options: list[str]) -> None:
    done = CliRunner().invoke(app, ["costs", *options])
    assert done.exit_code == 2
    assert f"Invalid value for '{options[0]}'" in done.output


def test_an_empty_log_has_nothing_to_project() -> None:
    done = CliRunner().invoke(app, ["costs"])
    assert isinstance(done.exception, UsageError)
    assert "no finished run in the last 30 days" in str(done.exception)


def test_a_failed_task_costs_too(log: RunLog) -> None:
    log.append(failed("1", "ModelError", usd=0.2))
    assert costs.distribution(drawn_from(log)).filter(pl.col("amount") == "usd")["mean"].item() == pytest.approx(0.2)
