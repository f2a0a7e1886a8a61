"""`agentkit budget`: limits from what runs have really used."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from agentkit.errors import UsageError
from agentkit_pipelines import terminal

if TYPE_CHECKING:
    import polars as pl

budget_app = typer.Typer(help="Budgets of runs.", no_args_is_help=True)
AMOUNTS = ("model_calls", "tool_calls", "tokens_in", "tokens_out", "usd", "seconds")
LEAST_SECONDS = 10.0  # two repetitions of one failed call wait 3 s
MOST_HEADROOM = 1e6
COVERAGE, CONFIDENCE = 0.99, 0.95


def tolerance_limit(values: list[float]) -> tuple[float, bool]:
    """A value that 99 % of runs stay within, with 95 % confidence, and whether there are enough runs to say so.

    The one-sided nonparametric tolerance limit from order statistics (Wilks 1941, doi:10.1214/aoms/1177731788). With
    too few runs (fewer than 299) it is the largest value, which holds with less confidence.
    """
    from scipy.stats import binom

    n = len(values)
    # The r-th smallest is one if, with that confidence, fewer than r runs fall below the 99th percentile.
    rank = int(binom.ppf(CONFIDENCE, n, COVERAGE)) + 1
    ordered = sorted(values)
    return (ordered[-1], False) if rank > n else (ordered[rank - 1], True)


def round_up(value: float) -> float:
    """To two significant digits, so that the limit reads as one that somebody chose."""
    if value <= 0:
        return value
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return round(math.ceil(value / step - 1e-9) * step, 12)


@budget_app.command()
def suggest(
    system: Annotated[str, typer.Argument(help="name of the system, as in the run log")],
    headroom: Annotated[float, typer.Option(min=1.0, help="the limit is this many times what runs used")] = 1.5,
    days: Annotated[int, typer.Option(min=1, help="of the run log to look at")] = 30,
) -> None:
    """Suggest a Budget from the logged runs of a system that succeeded: what 99 % of them stay within, with headroom."""
    from rich.table import Table

    if not 1 <= headroom <= MOST_HEADROOM:  # NaN is in no range
        raise UsageError(f"--headroom is {headroom:g}; it is a number from 1 to {MOST_HEADROOM:,.0f}")
    runs = logged(system, days)
    table = Table(
        "limit", "median", "99 % stay within", "most", "suggested", title=f"{system}: {len(runs)} runs, {days} days"
    )
    parts = []
    for name in AMOUNTS:
        values = [v for v in runs[name].to_list() if v is not None and not math.isnan(v)]
        if not values:
            table.add_row(name, "unknown", "", "", "")
            continue
        limit, _ = tolerance_limit(values)
        ceiling = round_up(limit * headroom)
        if name == "seconds":
            ceiling = max(ceiling, LEAST_SECONDS)
        elif name != "usd":
            ceiling = math.ceil(ceiling)
        middle = sorted(values)[len(values) // 2]
        table.add_row(name, f"{middle:.6g}", f"{limit:.6g}", f"{max(values):.6g}", f"{ceiling:.6g}")
        if ceiling > 0:
            parts.append(f"{name}={ceiling:.12g}")
    out = terminal.console()
    out.print(table)
    out.print(f"budget=ak.Budget({', '.join(parts)})", markup=False, soft_wrap=True)
    if len(runs) < 299:
        out.print(
            f"[yellow]{len(runs)} runs are too few to say what 99 % stay within with 95 % confidence (299 are enough); the most used stands in[/yellow]"
        )


def logged(system: str, days: int) -> pl.DataFrame:
    """What the successful runs of the last days used; without the time a person took."""
    from agentkit_tracking.runlog import RunLog

    columns = ", ".join(name for name in AMOUNTS if name != "seconds")
    runs = RunLog().sql(
        f"SELECT {columns}, seconds - coalesce(waited_s, 0) AS seconds FROM runs WHERE system = ? AND state = 'DONE' AND parent IS NULL "
        "AND kind NOT IN ('replay', 'chaos') AND started_at >= now() - to_days(CAST(? AS INTEGER))",
        [system, days],
    )
    if runs.is_empty():
        raise UsageError(
            f"the run log has no successful run of {system!r} in the last {days} days; `agentkit log` lists runs"
        )
    return runs
