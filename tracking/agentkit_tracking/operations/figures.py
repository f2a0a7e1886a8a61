"""Figures from counted runs: pure functions from one small frame to another."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from agentkit_tracking.operations.intervals import fieller, mean, wilson

VERSION = ("system", "release")
_DONE = pl.col("state") == "DONE"
_HITS: dict[str, tuple[pl.Expr, pl.Expr]] = {
    # Of which runs (second) how many (first).
    "success": (_DONE, pl.lit(True)),
    "failure": (~_DONE & ~pl.col("is_refused"), pl.lit(True)),
    "refusal": (pl.col("is_refused"), pl.lit(True)),
    "degraded": (_DONE & pl.col("is_degraded"), _DONE),
    "recovery": (_DONE, pl.col("has_failed_calls") & ~pl.col("is_refused")),
    "escalation": (pl.col("is_escalated"), pl.lit(True)),
}
# Where the error of a run says that a rule held: what kind of rule.
RULES = {
    "PermissionDenied": "policy",
    "PolicyRefused": "policy",
    "ConflictingWrite": "policy",
    "DelegationRefused": "policy",
    "BudgetExceeded": "limit",
    "Stopped": "stop",
}


def rates(cells: pl.DataFrame, told: pl.DataFrame, by: Sequence[str] = ()) -> pl.DataFrame:
    """`figure`, `value` with `low` and `high` (Wilson, 95 %), `hits` of `n`; sorted by `by`.

    - success: ended DONE. failure: ended otherwise, and not by a refusal. refusal: ended by a policy, a limit or a stop.
      These three are all finished runs.
    - degraded: of successes, those with a lesser result.
    - recovery: of runs in which a call failed and that were not refused, those that ended DONE all the same.
    - escalation: handed to a person, as the monitor counts it: an approval was asked, or the output's action is `escalate`.
    - completion, the goal where no label says so: DONE, not handed to a person, and nobody said that it was corrected,
      rejected, reopened or escalated. Silence counts as consent: it is an upper estimate.
    - acceptance: of runs that somebody labelled, those with no label but `accepted`.
    - satisfaction: of ratings, those of 4 or 5.
    """
    parts = [
        _counted(cells, by, name, pl.col("runs").filter(hit & whole).sum(), pl.col("runs").filter(whole).sum())
        for name, (hit, whole) in _HITS.items()
    ]
    runs, alone = pl.col("runs"), ~pl.col("is_escalated")
    keys = list(by) or ["_"]
    of_all = cells.group_by(list(by) or pl.lit(1).alias("_")).agg(
        runs.sum().alias("n"), runs.filter(_DONE & alone).sum().alias("alone")
    )
    said = told.group_by(list(by) or pl.lit(1).alias("_")).agg(
        runs.filter(pl.col("is_done") & alone & pl.col("is_labelled") & ~pl.col("is_accepted")).sum().alias("undone"),
    )
    both = of_all.join(said, on=keys, how="left", nulls_equal=True).with_columns(pl.col("undone").fill_null(0))
    parts.append(_counted(both, by, "completion", (pl.col("alone") - pl.col("undone")).sum(), pl.col("n").sum()))
    labelled = pl.col("is_labelled")
    parts += [
        _counted(
            told, by, "acceptance", runs.filter(labelled & pl.col("is_accepted")).sum(), runs.filter(labelled).sum()
        ),
        _counted(told, by, "satisfaction", pl.col("satisfied").sum(), pl.col("ratings").sum()),
    ]
    found = (
        pl.concat([part for part in parts if part.height], how="vertical") if any(p.height for p in parts) else parts[0]
    )
    return found.sort([*by, "figure"], nulls_last=True)


def _counted(frame: pl.DataFrame, by: Sequence[str], name: str, hits: pl.Expr, n: pl.Expr) -> pl.DataFrame:
    wanted = [hits.cast(pl.Int64).alias("hits"), n.cast(pl.Int64).alias("n")]
    found = frame.group_by(list(by)).agg(*wanted) if by else frame.select(*wanted)
    found = found.filter(pl.col("n") > 0)
    bounds = [wilson(row[0], row[1]) for row in found.select("hits", "n").iter_rows()]
    return found.select(
        *by,
        pl.lit(name).alias("figure"),
        (pl.col("hits") / pl.col("n")).alias("value"),
        pl.Series("low", [b[0] for b in bounds], dtype=pl.Float64),
        pl.Series("high", [b[1] for b in bounds], dtype=pl.Float64),
        "hits",
        "n",
    )


def cost_per_success(cells: pl.DataFrame, by: Sequence[str] = ()) -> pl.DataFrame:
    """`value`: USD of all runs, those that failed included, over the number that succeeded; `low`, `high` by Fieller, 95 %.

    Runs whose cost nobody knows (`unpriced`) are in neither. Null where none succeeded. `usd` is what all `runs` cost,
    `per_run` that over those with a price.
    """
    # A cell is of one state; of one with unpriced runs the rest stand for successes as they are: counts are exact.
    priced = pl.col("priced")
    sums = [
        pl.col("runs").sum().alias("runs"),
        priced.sum().alias("priced"),
        priced.filter(_DONE).sum().alias("successes"),
        pl.col("usd").sum(),
        pl.col("usd_squares").sum(),
        pl.col("usd").filter(_DONE).sum().alias("usd_of_successes"),
    ]
    found = cells.group_by(list(by)).agg(*sums) if by else cells.select(*sums)
    found = found.filter(pl.col("runs") > 0)
    bounds = [
        fieller(*row)
        for row in found.select("usd", "usd_squares", "usd_of_successes", "successes", "priced").iter_rows()
    ]
    return found.select(
        *by,
        pl.when(pl.col("successes") > 0).then(pl.col("usd") / pl.col("successes")).alias("value"),
        pl.Series("low", [b[0] for b in bounds], dtype=pl.Float64),
        pl.Series("high", [b[1] for b in bounds], dtype=pl.Float64),
        pl.when(priced > 0).then(pl.col("usd")).alias("usd"),
        pl.when(priced > 0).then(pl.col("usd") / priced).alias("per_run"),
        "runs",
        "successes",
        (pl.col("runs") - priced).alias("unpriced"),
    ).sort(list(by) or "runs", nulls_last=True)


def with_failures(tools: pl.DataFrame) -> pl.DataFrame:
    """Tools with the share of their calls that failed: `value`, `low`, `high` (Wilson, 95 %); null where none was made."""
    bounds = [wilson(failed, calls) for failed, calls in tools.select("failed", "calls").iter_rows()]
    return tools.with_columns(
        pl.when(pl.col("calls") > 0).then(pl.col("failed") / pl.col("calls")).alias("value"),
        pl.Series("low", [b[0] for b in bounds], dtype=pl.Float64),
        pl.Series("high", [b[1] for b in bounds], dtype=pl.Float64),
    )


def rating(told: pl.DataFrame, by: Sequence[str] = ()) -> pl.DataFrame:
    """Mean of the ratings (1 to 5): `value`, `low`, `high` (t interval, 95 %), `n` ratings."""
    sums = [pl.col("rating").sum(), pl.col("squares").sum(), pl.col("ratings").sum().alias("n")]
    found = told.group_by(list(by)).agg(*sums) if by else told.select(*sums)
    found = found.filter(pl.col("n") > 0)
    bounds = [mean(*row) for row in found.select("rating", "squares", "n").iter_rows()]
    return found.select(
        *by,
        (pl.col("rating") / pl.col("n")).alias("value"),
        pl.Series("low", [b[0] for b in bounds], dtype=pl.Float64).clip(1, 5),
        pl.Series("high", [b[1] for b in bounds], dtype=pl.Float64).clip(1, 5),
        "n",
    ).sort(list(by) or "n", nulls_last=True)


def refusals(cells: pl.DataFrame) -> pl.DataFrame:
    """Runs that a rule ended, by bucket (`at`), `rule` (policy, limit, stop) and error: `runs`."""
    rule = pl.col("error_type").replace_strict(RULES, default="other", return_dtype=pl.String)
    return (
        cells.filter(pl.col("is_refused"))
        .group_by("at", rule.alias("rule"), pl.col("error_type").alias("error"))
        .agg(pl.col("runs").sum())
        .sort("at", "rule", "error")
    )


def errors(cells: pl.DataFrame) -> pl.DataFrame:
    """Runs that failed and were not refused, by system and `error` (its class), most first: `runs`."""
    return (
        cells.filter(~_DONE & ~pl.col("is_refused"))
        .group_by("system", pl.col("error_type").fill_null("unknown").alias("error"))
        .agg(pl.col("runs").sum())
        .sort("runs", "system", "error", descending=[True, False, False])
    )


def routes(cells: pl.DataFrame) -> pl.DataFrame:
    """Runs by system, bucket (`at`) and route; runs that ended before they had one are left out."""
    return (
        cells.filter(pl.col("route").is_not_null())
        .group_by("system", "at", "route")
        .agg(pl.col("runs").sum())
        .sort("system", "at", "route")
    )
