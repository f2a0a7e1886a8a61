"""The scans of the log: each reads it once and brings back sums, never runs."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from agentkit_tracking.operations.filters import Filter, bucketed

if TYPE_CHECKING:
    import duckdb
    import polars as pl

_MOST = 2**63 - 1  # a BIGINT: a sum of what is wrongly logged may be more
_WHOSE = "system, coalesce(release, '') AS release, stage"


def cells(connection: duckdb.DuckDBPyConnection, chosen: Filter, bucket: int) -> pl.DataFrame:
    """Finished runs counted: `runs`, how many of them with known cost (`priced`), what these cost (`usd`, `usd_squares`).

    By `at` (when the bucket began), system, release, stage, route, state, error_type, and whether a call failed, it was handed
    to a person, a refusal ended it, the result was a lesser one.
    """
    where, values = chosen.where("started_at")
    return _frame(
        connection,
        f"""SELECT {bucketed("started_at", bucket)} AS "at", {_WHOSE}, route, state, error_type,
            coalesce(failed_calls, 0) > 0 AS has_failed_calls, is_escalated,
            coalesce(refusals, 0) > 0 AS is_refused, coalesce(is_degraded, false) AS is_degraded,
            count(*) AS runs, count(usd) AS priced, coalesce(sum(usd), 0.0) AS usd,
            coalesce(sum(usd * usd), 0.0) AS usd_squares
        FROM outcomes WHERE parent IS NULL AND {where} GROUP BY ALL""",
        values,
    )


_PHASES = {
    "planning": "planning_s",
    "execution": "execution_s",
    "reflection": "reflection_s",
    "total": "seconds - coalesce(waited_s, 0)",
}
_QUANTILES = ", ".join(
    f"quantile_cont({seconds}, [0.5, 0.95]) AS {phase}, count({seconds}) AS n_{phase}"
    for phase, seconds in _PHASES.items()
)


def latency(connection: duckdb.DuckDBPyConnection, chosen: Filter, bucket: int) -> pl.DataFrame:
    """Seconds of each phase by bucket (`at`): `phase` (total: without waiting for people), `p50`, `p95`, `n` runs that had it; exact."""
    where, values = chosen.where("started_at")
    wide = _frame(
        connection,
        f"""SELECT {bucketed("started_at", bucket)} AS "at", {_QUANTILES}
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
                pl.col(f"n_{phase}").alias("n"),
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
            count(*) FILTER (coalesce(tries, 0) = 0) AS not_made,
            least(coalesce(sum(tries), 0), {_MOST})::BIGINT AS tries,
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
    """Runs that somebody said something of, whenever that was: `runs`, and `ratings` with their sums.

    By when the run began (`at`), system, release, stage, and whether it is done, was handed to a person, has a label, has none
    but `accepted`. `satisfied` are ratings of 4 or 5. Of each run and author (where the name was erased: source) the last label
    and the last rating count; what is said of a run that another called is said of the one that began it.
    """
    where, values = chosen.where("started_at")
    since, first = (
        ("true", []) if chosen.since is None else ("given_at >= ?", [chosen.since])
    )  # not before its run began
    return _frame(
        connection,
        f"""WITH RECURSIVE said AS (
            SELECT run_id, arg_max(label, given_at) AS label, arg_max(rating, given_at) AS rating
            FROM feedback WHERE {since} GROUP BY run_id, coalesce("by", source)),
        called AS MATERIALIZED (SELECT run_id, parent FROM outcomes WHERE parent IS NOT NULL),
        above AS (
            SELECT run_id, parent AS root FROM called WHERE run_id IN (SELECT run_id FROM said)
            UNION SELECT above.run_id, called.parent FROM above JOIN called ON called.run_id = root),
        of_roots AS (
            SELECT coalesce(root, run_id) AS root, count(label) > 0 AS is_labelled,
                coalesce(bool_and(label = 'accepted'), false) AS is_accepted, count(rating) AS ratings,
                sum(rating) AS rating, sum(rating * rating) AS squares, count(*) FILTER (rating >= 4) AS satisfied
            FROM said LEFT JOIN above USING (run_id) GROUP BY ALL)
        SELECT {bucketed("started_at", bucket)} AS "at", {_WHOSE}, state = 'DONE' AS is_done, is_escalated, is_labelled,
            is_accepted, count(*) AS runs, sum(ratings)::BIGINT AS ratings, coalesce(sum(rating), 0.0) AS rating,
            coalesce(sum(squares), 0.0) AS squares, sum(satisfied)::BIGINT AS satisfied
        FROM outcomes JOIN of_roots ON run_id = root WHERE parent IS NULL AND {where} GROUP BY ALL""",
        [*first, *values],
    )


def unfinished(connection: duckdb.DuckDBPyConnection, chosen: Filter) -> int:
    """Runs that began and are not over: under way, or broken off with their process (`agentkit log` tells which)."""
    where, values = chosen.where("started_at")
    # Not the difference of two counts: of a run whose beginning was pruned the end may be there. Ids are compared by their
    # hashes, in three quarters of the time; two of a million runs share one in 40 million logs.
    found = _frame(
        connection,
        f"""SELECT count(*) AS n FROM (SELECT hash(run_id) AS id FROM events WHERE type = 'run' AND parent IS NULL AND {where})
        ANTI JOIN (SELECT hash(run_id) AS id FROM outcomes WHERE parent IS NULL AND {where}) USING (id)""",
        [*values, *values],
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
