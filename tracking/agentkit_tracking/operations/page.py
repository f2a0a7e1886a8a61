"""All figures of one look at the log."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import polars as pl

from agentkit_tracking.operations import figures, queries
from agentkit_tracking.operations.filters import Filter, bucket_of

if TYPE_CHECKING:
    import duckdb

SAMPLE = 400  # inputs that are compared with the golden set, or the time before


@dataclass(frozen=True)
class Page:
    """What the log said at one moment.

    A frame's columns are told by the function of its name in `figures` or `queries`. `bucket` is seconds of a point in time;
    frames over time have `at`, when it began; those by version `system` and `release` ("" for drafts).
    """

    chosen: Filter
    bucket: int
    runs: int  # finished
    unfinished: int
    headline: pl.DataFrame
    rates: pl.DataFrame
    rates_of_versions: pl.DataFrame
    costs: pl.DataFrame
    costs_of_versions: pl.DataFrame
    latency: pl.DataFrame
    latency_of_versions: pl.DataFrame
    tools: pl.DataFrame
    decisions: pl.DataFrame
    refusals: pl.DataFrame
    errors: pl.DataFrame
    budget: pl.DataFrame
    ratings: pl.DataFrame
    routes: pl.DataFrame
    sampled_system: str | None  # the one that was asked for, or the one with most runs
    sample: list[str]  # of its inputs, as JSON
    # The same of as long a time before, where the choice names one.
    sample_before: list[str]
    routes_before: dict[str, int]


def choices(connection: duckdb.DuckDBPyConnection) -> pl.DataFrame:
    """What can be filtered by: system, release ("" for drafts) and stage with `runs`, `first` and `last` beginning."""
    found: pl.DataFrame = connection.sql(
        """SELECT system, coalesce(release, '') AS release, stage, count(*) AS runs, min(started_at) AS first,
            max(started_at) AS last
        FROM outcomes WHERE parent IS NULL GROUP BY ALL ORDER BY system, first"""
    ).pl()
    return found


def look(connection: duckdb.DuckDBPyConnection, chosen: Filter | None = None, *, sample: int = SAMPLE) -> Page:
    """All figures at once, on one connection of the run log: none is newer than another.

    Args:
        sample: how many inputs to bring for a comparison with the golden set or the time before; 0 for none.
    """
    chosen = chosen or Filter()
    bucket = bucket_of(_length(connection, chosen))
    cells, told = queries.cells(connection, chosen, bucket), queries.told(connection, chosen, bucket)
    of_versions = queries.latency_of_versions(connection, chosen)
    runs = int(cells["runs"].sum())
    by_runs = cells.group_by("system").agg(pl.col("runs").sum()).sort("runs", "system", descending=[True, False])
    system = by_runs["system"][0] if runs else None
    of_system = int(by_runs["runs"][0]) if runs else 0
    before = chosen.before()
    cells_before = None if before is None else queries.cells(connection, before, bucket)
    routes_before = {} if cells_before is None else _routes(cells_before, system)
    return Page(
        chosen=chosen,
        bucket=bucket,
        runs=runs,
        unfinished=queries.unfinished(connection, chosen),
        headline=_headline(connection, chosen, _single(cells, told, of_versions), cells_before, bucket),
        rates=figures.rates(cells, told, ["at"]),
        rates_of_versions=figures.rates(cells, told, figures.VERSION),
        costs=figures.cost_per_success(cells, ["at"]),
        costs_of_versions=figures.cost_per_success(cells, figures.VERSION),
        latency=queries.latency(connection, chosen, bucket),
        latency_of_versions=of_versions,
        tools=figures.with_failures(queries.tools(connection, chosen)),
        decisions=queries.decisions(connection, chosen, bucket),
        refusals=figures.refusals(cells),
        errors=figures.errors(cells),
        budget=queries.budget(connection, chosen),
        ratings=figures.rating(told, ["at"]),
        routes=figures.routes(cells),
        sampled_system=system,
        sample=queries.inputs(connection, replace(chosen, system=system), of_system, sample)
        if system and sample
        else [],
        sample_before=queries.inputs(connection, replace(before, system=system), sum(routes_before.values()), sample)
        if before and system and sample
        else [],
        routes_before=routes_before,
    )


def _routes(cells: pl.DataFrame, system: str | None) -> dict[str, int]:
    """How often each route of a system was taken."""
    taken = figures.routes(cells).filter(pl.col("system") == system).group_by("route").agg(pl.col("runs").sum())
    return dict(taken.select("route", "runs").iter_rows())


def _length(connection: duckdb.DuckDBPyConnection, chosen: Filter) -> timedelta:
    if chosen.since is not None and chosen.until is not None:
        return chosen.until - chosen.since
    first, last = queries.span(connection, chosen)
    begin, end = chosen.since or first, chosen.until or last
    return timedelta(0) if begin is None or end is None else end - begin


_BEFORE = {"value": "before", "low": "before_low", "high": "before_high"}


def _headline(
    connection: duckdb.DuckDBPyConnection,
    chosen: Filter,
    now: pl.DataFrame,
    cells_before: pl.DataFrame | None,
    bucket: int,
) -> pl.DataFrame:
    """`figure`, its `value` with `low` and `high`, `n`; the same `before`, in as long a time before this one.

    `is_changed` where both have an interval and these do not overlap.
    """
    before = chosen.before()
    if before is None or cells_before is None:
        then = now.with_columns(pl.lit(None, pl.Float64).alias(name) for name in _BEFORE.values())
    else:
        told, latency = queries.told(connection, before, bucket), queries.latency_of_versions(connection, before)
        others = _single(cells_before, told, latency).select("figure", *_BEFORE).rename(_BEFORE)
        then = now.join(others, on="figure", how="left", maintain_order="left")
    apart = (pl.col("low") > pl.col("before_high")) | (pl.col("high") < pl.col("before_low"))
    return then.with_columns(apart.fill_null(False).alias("is_changed"))


def _single(cells: pl.DataFrame, told: pl.DataFrame, latency: pl.DataFrame) -> pl.DataFrame:
    names = ("figure", "value", "low", "high", "n")
    cost = figures.cost_per_success(cells)
    rows: list[dict[str, Any]] = [{"figure": "runs", "value": float(cells["runs"].sum()), "n": cells["runs"].sum()}]
    for row in cost.iter_rows(named=True):
        n = row["runs"] - row["unpriced"]
        rows.append({"figure": "cost per success", **{k: row[k] for k in ("value", "low", "high")}, "n": n})
        rows.append({"figure": "usd", "value": row["usd"], "n": n})
    for row in latency.filter(pl.col("system").is_null()).iter_rows(named=True):
        rows += [{"figure": q, "value": row[q], "n": row["n"]} for q in ("p50", "p95")]
    for row in figures.rating(told).iter_rows(named=True):
        rows.append({"figure": "rating", **{k: row[k] for k in ("value", "low", "high", "n")}})
    counted = pl.DataFrame(rows, schema=dict.fromkeys(names[:4], pl.Float64) | {"figure": pl.String, "n": pl.Int64})
    return pl.concat([counted.select(names), figures.rates(cells, told).select(names)])
