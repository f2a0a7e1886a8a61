"""What a task costs, by what was logged; what a month will cost, and what it would at other prices.

    drawn = costs.tasks(opened, Filter(system="support_triage"))
    counted, stage = costs.projected(drawn)                    # production, where there is any
    costs.distribution(counted)                                # mean, p50, p95, p99 of USD and tokens
    costs.month(counted, tasks=100_000)                        # with intervals
    costs.month(costs.repriced(counted, {"openai/gpt-4.1": Price(input=1, output=4)}), tasks=100_000)

A task is a run that no other run called, with all that it called. Intervals are 95 %, the same each time: the seed is fixed;
one task alone has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from agentkit.runs import REHEARSALS
from agentkit.settings import Price, Settings
from agentkit_tracking.operations.filters import Filter
from agentkit_tracking.operations.queries import span

if TYPE_CHECKING:
    import duckdb

Array = NDArray[np.float64]
Stage = Literal["production", "draft", "all"]
DAYS_OF_A_MONTH = 365.25 / 12
AMOUNTS = ("usd", "tokens_in", "tokens_out")
_MOST = 100_000  # tasks that are drawn: their 99th percentile is known to a per cent or two
_RESAMPLED, _DRAWS = 3_000, 2_000  # with more tasks than that a mean is normal enough
# USD of a task, mean and 99th percentile, as published for kinds of agents and quoted in the request for this model. For
# comparison only: nothing here is calculated from them.
PUBLISHED = {
    "support": (0.02, 0.15),
    "review": (0.08, 0.40),
    "research": (0.25, 1.20),
    "development": (0.80, 4.00),
}
PILOT_TO_PRODUCTION = (5.0, 10.0)  # what production is said to cost beside the pilot: "5 to 10 times"


@dataclass(frozen=True)
class Tasks:
    """Tasks drawn from the log.

    `frame` has a row a task: task, system, kind, is_pilot (a draft's, or an evaluation), tier (that of its models, `+` between
    several; `none` without a model), started_at, usd (null: unknown), tools_usd, tokens_in, tokens_out. `use` has a row a task and
    model: task, model, tokens_in, tokens_out, usd. Each drawn task stands for `scale` logged ones. They are all of `days`: the
    time that was asked for, as far as the log covers it (from its first run, of whatever system, to its last where no end was
    named); at least one.
    """

    frame: pl.DataFrame
    use: pl.DataFrame
    scale: float = 1.0
    days: float = 1.0

    @property
    def a_month(self) -> float:
        """How many tasks a month has at the rate of these days."""
        return self.frame.height * self.scale / self.days * DAYS_OF_A_MONTH


def tasks(
    connection: duckdb.DuckDBPyConnection,
    chosen: Filter | None = None,
    *,
    settings: Settings | None = None,
    limit: int = _MOST,
) -> Tasks:
    """Finished tasks of the log, at most about `limit`, drawn by their ids; evaluations come with them, as the pilot's.

    Args:
        settings: names the tiers; a model that none stands for is its own tier.
    """
    where, values = replace(chosen or Filter(), rehearsals=True).where("started_at")
    where += " AND coalesce(kind, 'run') NOT IN ('chaos', 'replay') AND parent IS NULL"
    found = connection.sql(f"SELECT count(*) AS n FROM outcomes WHERE {where}", params=values).pl()
    logged = int(found["n"][0])
    below = min(2**64 - 1, int(2**64 * limit / max(1, logged)))
    chosen_runs = f"FROM outcomes WHERE {where} AND hash(run_id) <= {below}::UBIGINT"
    frame = connection.sql(
        f"""SELECT run_id AS task, system, coalesce(kind, 'run') AS kind, {_PILOT} AS is_pilot, started_at, usd,
            tokens_in, tokens_out {chosen_runs} ORDER BY task""",
        params=values,
    ).pl()
    used = connection.sql(
        f"""WITH RECURSIVE part AS (
            SELECT run_id, run_id AS task {chosen_runs}
            UNION ALL SELECT o.run_id, part.task FROM outcomes o JOIN part ON o.parent = part.run_id)
        SELECT part.task, e.model, sum(e.tokens_in::DOUBLE) AS tokens_in, sum(e.tokens_out::DOUBLE) AS tokens_out,
            CASE WHEN count(e.usd) = count(*) THEN sum(e.usd) END AS usd
        FROM events e JOIN part USING (run_id)
        WHERE (e.type = 'model' AND e.model IS NOT NULL AND NOT coalesce(e.cached, false))
            OR (e.type = 'tool' AND e.usd IS NOT NULL)  -- its model is null
        GROUP BY ALL ORDER BY part.task, e.model""",
        params=values,
    ).pl()
    scale = logged / frame.height if frame.height else 1.0
    drawn = Tasks(frame, used.drop_nulls("model"), scale, _covered(connection, chosen or Filter()))
    return _labelled(drawn, used.filter(pl.col("model").is_null()), settings or Settings())


def _covered(connection: duckdb.DuckDBPyConnection, chosen: Filter) -> float:
    """Days of the time that was asked for, as far as the log covers it; at least one, as hours say little of a month."""
    first, last = span(connection, Filter(rehearsals=True))
    if first is None or last is None:
        return 1.0
    length = (chosen.until or last) - max(chosen.since or first, first)
    return max(1.0, length.total_seconds() / 86_400)


_PILOT = f"(stage IS DISTINCT FROM 'production' OR kind IN ({', '.join(repr(kind) for kind in REHEARSALS)}))"


def _labelled(drawn: Tasks, tools: pl.DataFrame, settings: Settings) -> Tasks:
    names: dict[str, str] = {}
    for tier, model in sorted(settings.models.items()):
        names[model] = f"{names[model]}/{tier}" if model in names else tier
    by_task = drawn.use.group_by("task").agg(
        pl.col("model").replace(names).unique().sort().str.join(" + ").alias("tier"),
        pl.col("usd").sum().alias("models_usd"),
    )
    frame = drawn.frame.join(by_task, on="task", how="left", maintain_order="left")
    frame = frame.join(tools.select("task", called_usd="usd"), on="task", how="left", maintain_order="left")
    # What is left of a known cost: models that were logged without a name are in it. Of an unknown one the calls of tools.
    left = (pl.col("usd") - pl.col("models_usd").fill_null(0)).round(12).clip(0)
    frame = frame.with_columns(
        pl.col("tier").fill_null("none"), pl.coalesce(left, "called_usd", pl.lit(0.0)).alias("tools_usd")
    )
    return replace(drawn, frame=frame.drop("models_usd", "called_usd"))


def only(drawn: Tasks, condition: pl.Expr) -> Tasks:
    """Those tasks whose row meets a condition."""
    frame = drawn.frame.filter(condition)
    return replace(drawn, frame=frame, use=drawn.use.join(frame.select("task"), on="task", how="semi"))


def work(drawn: Tasks) -> Tasks:
    """Without evaluations: what people or programs really asked for."""
    return only(drawn, ~pl.col("kind").is_in(REHEARSALS))


def projected(drawn: Tasks, stage: Stage | None = None) -> tuple[Tasks, Stage]:
    """The work of one stage, and which: by default production where there is any, else drafts. What drafts cost while they are
    tried out says little of a month in production."""
    asked_for = work(drawn)
    chosen = stage or ("draft" if asked_for.frame["is_pilot"].all() else "production")
    if chosen == "all":
        return asked_for, chosen
    return only(asked_for, pl.col("is_pilot") == (chosen == "draft")), chosen


def repriced(drawn: Tasks, prices: Mapping[str, Price]) -> Tasks:
    """The same tasks, had these models had these prices: tokens times price, where it stood what was logged.

    What tools cost, and models that are not named, stays. A discount that a provider gave (on cached prompts, say) goes.
    """
    known = pl.col("model").is_in(list(prices))
    rates = [pl.col("model").replace_strict({m: getattr(p, side) for m, p in prices.items()}, default=None, return_dtype=pl.Float64)
             for side in ("input", "output")]  # fmt: skip
    anew = (pl.col("tokens_in") * rates[0] + pl.col("tokens_out") * rates[1]) / 1e6
    use = drawn.use.with_columns(pl.when(known).then(anew).otherwise(pl.col("usd")).alias("usd"))
    sums = use.group_by("task").agg(
        pl.when(pl.col("usd").null_count() == 0).then(pl.col("usd").sum()).alias("models_usd")
    )
    frame = drawn.frame.join(sums, on="task", how="left", maintain_order="left")
    used = pl.col("task").is_in(use["task"].unique().implode())
    usd = pl.when(used).then(pl.col("models_usd") + pl.col("tools_usd")).otherwise(pl.col("usd"))
    return replace(drawn, frame=frame.with_columns(usd.alias("usd")).drop("models_usd"), use=use)


# ---- one task


def distribution(drawn: Tasks, by: Sequence[str] = ("system", "tier")) -> pl.DataFrame:
    """Mean (bootstrap-t interval from two tasks on), p50, p95, p99 (order statistics) of `usd`, `tokens_in`, `tokens_out` of a task.

    Columns: `by`, `amount`, `n`, `mean`, `mean_low`, `mean_high`, `p50`, `p95`, `p99`, `p99_low`, `p99_high` (null: too few
    tasks to say), `unknown` (tasks left out, since nobody knows what they cost).
    """
    rows = []
    for key, part in _groups(drawn.frame, by):
        for amount in AMOUNTS:
            values = _known(part, amount)
            n = len(values)
            row = {**key, "amount": amount, "n": n, "unknown": part.height - n}
            if n:
                low, high = _interval(_means(values, np.random.default_rng(0)), values)
                quantiles = {f"p{q}": _quantile(values, q / 100) for q in (50, 95, 99)}
                least, most = quantile_interval(values, 0.99)
                row |= {"mean": float(values.mean()), "mean_low": low, "mean_high": high, **quantiles}
                row |= {"p99_low": least, "p99_high": most}
            rows.append(row)
    figures = ("mean", "mean_low", "mean_high", "p50", "p95", "p99", "p99_low", "p99_high")
    schema = {**dict.fromkeys([*by, "amount"], pl.String), "n": pl.Int64, **dict.fromkeys(figures, pl.Float64)}
    return pl.DataFrame(rows, schema={**schema, "unknown": pl.Int64})


def quantile_interval(values: ArrayLike, level: float) -> tuple[float | None, float | None]:
    """95 % interval of a quantile between two order statistics, whatever the distribution; null where no value is far enough
    out (the upper end of a p99 takes 368 values)."""
    from scipy.stats import binom

    ordered = np.sort(np.asarray(values, dtype=float))
    n = len(ordered)
    first, last = int(binom.ppf(0.025, n, level)), int(binom.ppf(0.975, n, level)) + 1
    low = float(ordered[first - 1]) if first >= 1 else None
    return low, float(ordered[last - 1]) if last <= n else None


def _quantile(values: Array, level: float) -> float:
    return float(np.quantile(values, level, method="inverted_cdf"))


# ---- a month


def month(
    drawn: Tasks,
    tasks: float | None = None,
    *,
    hosting: float | None = None,
    monitoring: float | None = None,
    by: Sequence[str] = ("system", "tier"),
) -> pl.DataFrame:
    """USD of a month, line by line, and in all; `low` to `high` holds what such a month will cost in 95 of 100 cases.

    Null where the cost of fewer than two tasks is known. The interval knows that the mean of a task is an estimate and that tasks differ. It does not know of other customers, prices
    or prompts than those that were logged.

    Args:
        tasks: a month, in all, shared out as logged; default: as many as a month has at the rate of `drawn.days`.
        hosting, monitoring: USD a month, lines of their own; None is a line whose cost nobody has given.

    Returns:
        `line`, `by`, `tasks`, `usd`, `low`, `high`, `tokens_in`, `tokens_out`; the last line is `total`.
    """
    frame = drawn.frame
    rate = drawn.a_month if tasks is None else tasks
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    sums = np.zeros(_DRAWS)
    for key, part in _groups(frame, by):
        count = rate * part.height / frame.height
        values = _known(part, "usd")
        row: dict[str, Any] = {"line": "models and tools", **key, "tasks": count}
        row |= {name: count * float(_known(part, name).mean()) for name in AMOUNTS[1:]}
        if len(values):
            drawn_sums = _totals(values, count, rng)
            sums += drawn_sums
            low, high = _interval(drawn_sums, values)
            row |= {"usd": count * float(values.mean()), "low": low, "high": high}
        else:
            sums += np.nan
        rows.append(row)
    given = {"hosting": hosting, "monitoring": monitoring}
    fixed = sum(usd or 0.0 for usd in given.values())
    for line, usd in given.items():
        rows.append({"line": line, "usd": usd, "low": usd, "high": usd})
    total = [row.get("usd") for row in rows if row["line"] == "models and tools"]
    whole: dict[str, Any] = {"line": "total", "tasks": rate if frame.height else 0.0}
    if None not in total:
        counted = [row["low"] for row in rows if row["line"] == "models and tools"]
        low, high = (None, None) if None in counted else _middle(sums + fixed)
        whole |= {"usd": sum(usd for usd in total if usd is not None) + fixed, "low": low, "high": high}
    numbers = dict.fromkeys(("tasks", "usd", "low", "high", "tokens_in", "tokens_out"), pl.Float64)
    return pl.DataFrame([*rows, whole], schema={**dict.fromkeys(["line", *by], pl.String), **numbers})


def _totals(values: Array, count: float, rng: np.random.Generator) -> Array:
    """What `count` tasks cost together: draws that allow for the unknown mean and for the chance of these tasks."""
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return np.asarray(
        np.maximum(0.0, count * _means(values, rng) + np.sqrt(count) * spread * rng.standard_normal(_DRAWS))
    )


def _means(values: Array, rng: np.random.Generator) -> Array:
    """Draws of the true mean: the bootstrap-t distribution, which allows for skew (Hall 1988, Annals of Statistics 16:927)."""
    n, mean = len(values), float(values.mean())
    if n < 2 or float(values.std()) == 0:
        return np.full(_DRAWS, mean)
    error = float(values.std(ddof=1)) / np.sqrt(n)
    if n > _RESAMPLED:
        return np.asarray(mean + error * rng.standard_normal(_DRAWS))
    scores = np.empty(_DRAWS)
    for first in range(0, _DRAWS, 500):
        again = values[rng.integers(n, size=(500, n))]
        errors = again.std(axis=1, ddof=1) / np.sqrt(n)
        scores[first : first + 500] = (again.mean(axis=1) - mean) / np.where(errors > 0, errors, np.inf)
    return np.asarray(np.maximum(0.0, mean - error * scores))


def _interval(draws: Array, *of: Array) -> tuple[float, float] | tuple[None, None]:
    """None where a single value says nothing of how much they differ."""
    return (None, None) if min(len(values) for values in of) < 2 else _middle(draws)


def _middle(draws: Array) -> tuple[float, float]:
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


# ---- from the pilot to production


def pilot_to_production(drawn: Tasks) -> pl.DataFrame:
    """How many times as much production costs as the pilot (drafts and evaluations did): of a task, and in the same time.

    Columns: `system`, `pilot_tasks`, `pilot_usd` (of a task), `production_tasks`, `production_usd`, `of_a_task` with `low` and
    `high`, `in_all` (all tasks of each, over the same days), `published_low`, `published_high`. Null where a side has no task
    with a known cost, or cost nothing; the interval also where one has a single task.
    """
    rows = []
    for (system,), part in drawn.frame.group_by("system", maintain_order=True):
        halves = [part.filter(pl.col("is_pilot") == pilot) for pilot in (True, False)]
        sides, counts = [_known(half, "usd") for half in halves], [round(half.height * drawn.scale) for half in halves]
        means = [float(side.mean()) if len(side) else None for side in sides]
        row: dict[str, Any] = {"system": system, "pilot_tasks": counts[0], "production_tasks": counts[1]}
        row |= {"pilot_usd": means[0], "production_usd": means[1]}
        row |= dict(zip(("published_low", "published_high"), PILOT_TO_PRODUCTION, strict=True))
        if means[0] and means[1] is not None:
            rng = np.random.default_rng(0)
            ratios = _means(sides[1], rng) / np.maximum(_means(sides[0], rng), 1e-300)
            low, high = _interval(ratios, *sides)
            of_a_task = means[1] / means[0]
            in_all = of_a_task * halves[1].height / halves[0].height
            row |= {"of_a_task": of_a_task, "low": low, "high": high, "in_all": in_all}
        rows.append(row)
    numbers = (
        "pilot_usd",
        "production_usd",
        "of_a_task",
        "low",
        "high",
        "in_all",
        "published_low",
        "published_high",
    )
    schema: dict[str, Any] = {"system": pl.String, "pilot_tasks": pl.Int64, "production_tasks": pl.Int64}
    return pl.DataFrame(rows, schema={**schema, **dict.fromkeys(numbers, pl.Float64)}).sort("system")


def published() -> pl.DataFrame:
    """The published figures: `kind` of agent, `mean` and `p99` in USD of a task."""
    rows = [{"kind": kind, "mean": mean, "p99": p99} for kind, (mean, p99) in PUBLISHED.items()]
    return pl.DataFrame(rows)


def _groups(frame: pl.DataFrame, by: Sequence[str]) -> Iterator[tuple[dict[str, Any], pl.DataFrame]]:
    if not by:
        yield {}, frame
        return
    for key, part in frame.sort(list(by)).group_by(list(by), maintain_order=True):
        yield dict(zip(by, key, strict=True)), part


def _known(frame: pl.DataFrame, amount: str) -> Array:
    return frame[amount].drop_nulls().drop_nans().cast(pl.Float64).to_numpy()
