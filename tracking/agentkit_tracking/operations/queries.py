"""The scans of the log: each reads it once and brings back sums, never runs."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from agentkit_tracking.operations.filters import Filter, bucketed

if TYPE_CHECKING:
    import duckdb
    import polars as pl

_WHOSE = "system, coalesce(release, '') AS release, stage"


def cells(connection: duckdb.DuckDBPyConnection, chosen: Filter, bucket: int) -> pl.DataFrame:
    """Finished runs counted: `runs`, how many of them with known cost (`priced`), what these cost (`usd`, `usd_squares`), tokens.

    By `at` (when the bucket began), system, release, stage, route, state, error_type, and whether a call failed, a person was
    asked, a refusal ended it, the result was a lesser one.
    """
    where, values = chosen.where("started_at")
    return _frame(
        connection,
        f"""SELECT {bucketed("started_at", bucket)} AS "at", {_WHOSE}, route, state, error_type,
            coalesce(failed_calls, 0) > 0 AS has_failed_calls, coalesce(approvals, 0) > 0 AS is_asked,
            coalesce(refusals, 0) > 0 AS is_refused, coalesce(is_degraded, false) AS is_degraded,
            count(*) AS runs, count(usd) AS priced, coalesce(sum(usd), 0.0) AS usd,
            coalesce(sum(usd * usd), 0.0) AS usd_squares, sum(tokens_in)::BIGINT AS tokens_in,
            sum(tokens_out)::BIGINT AS tokens_out
        FROM outcomes WHERE parent IS NULL AND {where} GROUP BY ALL""",
        values,
    )


_PHASES = ("planning", "execution", "reflection", "total")
_QUANTILES = ", ".join(
    f"quantile_cont({column}, [0.5, 0.95]) AS {phase}"
    for phase, column in zip(
        _PHASES, ("planning_s", "execution_s", "reflection_s", "seconds - coalesce(waited_s, 0)"), strict=True
    )
)


def latency(connection: duckdb.DuckDBPyConnection, chosen: Filter, bucket: int) -> pl.DataFrame:
    """Seconds of each phase by bucket (`at`): `phase` (total: without waiting for people), `p50`, `p95`, `n`; exact."""
    where, values = chosen.where("started_at")
    wide = _frame(
        connection,
        f"""SELECT {bucketed("started_at", bucket)} AS "at", count(*) AS n, {_QUANTILES}
        FROM outcomes WHERE parent IS NULL AND {where} GROUP BY ALL""",
        values,
    )
    return _long(wide)


def latency_of_versions(connection: duckdb.DuckDBPyConnection, chosen: Filter) -> pl.DataFrame:
    """Seconds of runs, without waiting for people, by system and release: `p50`, `p95`, `n`; of all where these are null."""
    where, values = chosen.where("started_at")
    return _frame(
        connection,
        f"""SELECT system, release, n, q[1] AS p50, q[2] AS p95
        FROM (SELECT system, release, count(*) AS n, quantile_cont(seconds, [0.5, 0.95]) AS q
        FROM (SELECT {_WHOSE}, seconds - coalesce(waited_s, 0) AS seconds FROM outcomes WHERE parent IS NULL AND {where})
        GROUP BY GROUPING SETS ((system, release), ())) ORDER BY ALL NULLS LAST""",
        values,
    )


def _long(wide: pl.DataFrame) -> pl.DataFrame:
    import polars as pl

    return pl.concat(
        [
            wide.select(
                "at",
                "n",
                pl.lit(phase).alias("phase"),
                pl.col(phase).list.get(0, null_on_oob=True).alias("p50"),
                pl.col(phase).list.get(1, null_on_oob=True).alias("p95"),
            )
            for phase in _PHASES
        ]
    ).sort("at", "phase")


def budget(connection: duckdb.DuckDBPyConnection, chosen: Filter) -> pl.DataFrame:
    """How much of their budget runs used: `used` (lower end of a step of 5 %; 1.0 is the whole) by system, with `runs`."""
    where, values = chosen.where("started_at")
    return _frame(
        connection,
        f"""SELECT system, least(20, greatest(0, floor(budget_used * 20 + 1e-9)))::INT / 20 AS used, count(*) AS runs
        FROM outcomes WHERE parent IS NULL AND budget_used IS NOT NULL AND {where} GROUP BY ALL ORDER BY ALL""",
        values,
    )


def tools(connection: duckdb.DuckDBPyConnection, chosen: Filter) -> pl.DataFrame:
    """Calls of tools by system and tool, those in runs that another called counted with the system that made them.

    `calls` were made (repetitions are in `tries`), `failed` of them ended in an error, `not_made` were refused or had wrong
    arguments; `p50`, `p95` are seconds of a call; `usd` is what they cost.
    """
    where, values = chosen.where("logged_at")
    return _frame(
        connection,
        f"""SELECT system, tool, calls, failed, not_made, tries, q[1] AS p50, q[2] AS p95, usd
        FROM (SELECT system, name AS tool, count(*) FILTER (tries > 0) AS calls,
            count(*) FILTER (tries > 0 AND result = 'failed') AS failed,
            count(*) FILTER (coalesce(tries, 0) = 0) AS not_made, coalesce(sum(tries), 0)::BIGINT AS tries,
            quantile_cont(seconds, [0.5, 0.95]) FILTER (tries > 0) AS q, coalesce(sum(usd), 0.0) AS usd
            FROM events WHERE type = 'tool' AND {where} GROUP BY ALL)
        ORDER BY calls DESC, system, tool""",
        values,
    )


# Of an approval: a person is named who answered. Events of earlier versions tell it by the name alone.
_PERSON = "(waited_s IS NOT NULL OR started_at IS NULL AND (private->'outputs'->>'by') IS NOT NULL)"


def decisions(connection: duckdb.DuckDBPyConnection, chosen: Filter, bucket: int) -> pl.DataFrame:
    """What people were asked: `verdict` (approve, modify, reject), `asked`, seconds from question to answer `p50`, `p95`.

    By bucket (`at`), and of all where that is null. Where no person is named who answered (nobody was there or answered in time,
    or code did), the verdict is `nobody`; where there is no answer (the run was stopped), `none`.
    """
    where, values = chosen.where("logged_at")
    return _frame(
        connection,
        f"""SELECT "at", verdict, count(*) AS asked, quantile_cont(seconds, 0.5) AS p50, quantile_cont(seconds, 0.95) AS p95
        FROM (SELECT {bucketed("logged_at", bucket)} AS "at", coalesce(waited_s, seconds) AS seconds,
            CASE WHEN result IS NULL THEN 'none' WHEN {_PERSON} THEN result ELSE 'nobody' END AS verdict
            FROM events WHERE type = 'approval' AND {where})
        GROUP BY GROUPING SETS (("at", verdict), (verdict)) ORDER BY "at" NULLS LAST, verdict""",
        values,
    )


def told(connection: duckdb.DuckDBPyConnection, chosen: Filter, bucket: int) -> pl.DataFrame:
    """Runs that somebody said something of, whenever that was: `runs`, `labelled` ones and `ratings`, with their sums.

    By when the run began (`at`), system, release, stage, and whether it is done, a person was asked, all labels are `accepted`
    (`is_accepted`), one is `escalated`. `satisfied` are ratings of 4 or 5.
    """
    where, values = chosen.where("started_at")
    since, first = (
        ("true", []) if chosen.since is None else ("given_at >= ?", [chosen.since])
    )  # not before its run began
    return _frame(
        connection,
        f"""WITH said AS (
            SELECT run_id, count(label) > 0 AS is_labelled, coalesce(bool_and(label = 'accepted'), false) AS is_accepted,
                coalesce(bool_or(label = 'escalated'), false) AS is_escalated, count(rating) AS ratings,
                sum(rating) AS rating, sum(rating * rating) AS squares, count(*) FILTER (rating >= 4) AS satisfied
            FROM feedback WHERE {since} GROUP BY run_id)
        SELECT {bucketed("started_at", bucket)} AS "at", {_WHOSE}, state = 'DONE' AS is_done,
            coalesce(approvals, 0) > 0 AS is_asked, is_labelled, is_accepted, is_escalated, count(*) AS runs,
            sum(ratings)::BIGINT AS ratings, coalesce(sum(rating), 0.0) AS rating, coalesce(sum(squares), 0.0) AS squares,
            sum(satisfied)::BIGINT AS satisfied
        FROM outcomes JOIN said USING (run_id) WHERE parent IS NULL AND {where} GROUP BY ALL""",
        [*first, *values],
    )


def unfinished(connection: duckdb.DuckDBPyConnection, chosen: Filter) -> int:
    """Runs that began and are not over: under way, or broken off with their process (`agentkit log` tells which)."""
    where, values = chosen.where("started_at")
    found = _frame(
        connection,
        "SELECT count(*) FILTER (type = 'run') - count(*) FILTER (type = 'outcome') AS n FROM events "
        f"WHERE type IN ('run', 'outcome') AND parent IS NULL AND {where}",
        values,
    )
    return int(found["n"][0])


def span(connection: duckdb.DuckDBPyConnection, chosen: Filter) -> tuple[datetime | None, datetime | None]:
    """When the first and the last of the finished runs began."""
    where, values = chosen.where("started_at")
    found = _frame(
        connection,
        f"SELECT min(started_at) AS first, max(started_at) AS last FROM outcomes WHERE parent IS NULL AND {where}",
        values,
    )
    return found["first"][0], found["last"][0]


def inputs(connection: duckdb.DuckDBPyConnection, chosen: Filter, runs: int, limit: int) -> list[str]:
    """Inputs of about `limit` of the `runs` runs, drawn by their ids (the same ones each time), as JSON.

    What was erased, or never kept, is missing.
    """
    where, values = chosen.where("started_at")
    below = min(2**64 - 1, int(2**64 * 1.3 * limit / max(runs, 1)))
    drawn = _frame(
        connection,
        f"""SELECT private->'inputs' AS inputs FROM events WHERE type = 'outcome' AND parent IS NULL
            AND hash(run_id) <= {below}::UBIGINT AND {where} LIMIT {int(limit)}""",
        values,
    )
    return drawn["inputs"].drop_nulls().to_list()


def _frame(connection: duckdb.DuckDBPyConnection, query: str, values: list[Any]) -> pl.DataFrame:
    frame: pl.DataFrame = connection.sql(query, params=values).pl()
    return frame
