"""`agentkit costs`: what tasks cost, what a month will, and what it would at other prices."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentkit.errors import UsageError
from agentkit_pipelines import terminal

if TYPE_CHECKING:
    import polars as pl
    from rich.table import Table

    from agentkit.settings import Price


def costs(
    system: Annotated[str | None, typer.Argument(help="name of the system [default: all]")] = None,
    days: Annotated[int, typer.Option(min=1, help="of the run log to look at")] = 30,
    tasks: Annotated[float | None, typer.Option(min=1, help="a month [default: as many as logged]")] = None,
    price: Annotated[
        list[str] | None, typer.Option(help="what if: MODEL=IN/OUT, USD per million tokens; may be repeated")
    ] = None,
    hosting: Annotated[float | None, typer.Option(min=0, help="USD a month")] = None,
    monitoring: Annotated[float | None, typer.Option(min=0, help="USD a month")] = None,
) -> None:
    """What a task costs (mean, p99), what a month will, the pilot beside production, from logged runs; 95 % intervals."""
    from agentkit.settings import load_settings
    from agentkit_tracking import costs as model
    from agentkit_tracking.operations import Filter
    from agentkit_tracking.runlog import RunLog

    prices = prices_from(price or [])
    since = datetime.now(UTC) - timedelta(days=days)
    with RunLog().connection() as opened:
        drawn = model.tasks(opened, Filter(system=system, since=since), settings=load_settings())
    if not drawn.frame.height:
        whose = f" of {system!r}" if system else ""
        raise UsageError(f"the run log has no finished run{whose} in the last {days} days; `agentkit log` lists runs")
    unknown = sorted(prices.keys() - set(drawn.use["model"].to_list()))
    if unknown:
        used = ", ".join(drawn.use["model"].unique().sort().to_list()) or "none"
        raise UsageError(f"no run used the model {unknown[0]!r} of --price; these were used: {used}")
    asked_for = model.work(drawn)
    if asked_for.frame.height:
        _show_tasks(model.distribution(asked_for), model.published(), days)
        now = model.month(asked_for, tasks, hosting=hosting, monitoring=monitoring)
        _show_month(now, "a month at this rate" if tasks is None else f"a month of {tasks:,.0f} tasks")
        if prices:
            again = model.repriced(asked_for, prices)
            title = "what if: " + ", ".join(f"{name} {p.input:g}/{p.output:g}" for name, p in prices.items())
            _show_month(model.month(again, tasks, hosting=hosting, monitoring=monitoring), title)
    _show_pilot(model.pilot_to_production(drawn))


def prices_from(given: Sequence[str]) -> dict[str, Price]:
    """Prices as people type them, `MODEL=IN/OUT` in USD per million tokens.

    Raises:
        UsageError: one is not of this form.
    """
    from agentkit.settings import Price

    prices = {}
    for text in given:
        model, _, amounts = text.rpartition("=")
        try:
            sent, received = (float(amount) for amount in amounts.split("/"))
            prices[model] = Price(input=sent, output=received)
        except ValueError:
            model = ""
        if not model:
            raise UsageError(f"--price is MODEL=IN/OUT in USD per million tokens, as openai/gpt-4.1=2/8; got {text!r}")
    return prices


def _show_tasks(found: pl.DataFrame, published: pl.DataFrame, days: int) -> None:
    columns = ("system", "tier", "amount", "tasks", "mean (95 %)", "p50", "p95", "p99 (95 %)")
    table = _table(columns, f"a task, last {days} days")
    for row in found.iter_rows(named=True):
        mean, p99 = (_with_range(row, name) for name in ("mean", "p99"))
        n = f"{row['n']:,}" + (f" ({row['unknown']:,} without a price)" if row["unknown"] else "")
        table.add_row(row["system"], row["tier"], row["amount"], n, mean, _number(row["p50"]), _number(row["p95"]), p99)
    for row in published.iter_rows(named=True):
        table.add_row(
            "published", row["kind"], "usd", "", _number(row["mean"]), "", "", _number(row["p99"]), style="dim"
        )
    terminal.console().print(table)


def _show_month(found: pl.DataFrame, title: str) -> None:
    table = _table(("line", "system", "tier", "tasks", "USD", "95 %", "million tokens in", "out"), title)
    for row in found.iter_rows(named=True):
        tokens = ["" if row[name] is None else f"{row[name] / 1e6:,.3g}" for name in ("tokens_in", "tokens_out")]
        fixed = row["line"] in ("hosting", "monitoring")
        usd = "not given" if fixed and row["usd"] is None else _number(row["usd"])
        span = "" if fixed else _range(row["low"], row["high"])
        count = "" if row["tasks"] is None else f"{row['tasks']:,.0f}"
        style = "bold" if row["line"] == "total" else None
        table.add_row(row["line"], row["system"] or "", row["tier"] or "", count, usd, span, *tokens, style=style)
    terminal.console().print(table)


def _show_pilot(found: pl.DataFrame) -> None:
    columns = (
        "system",
        "pilot tasks",
        "USD each",
        "production tasks",
        "USD each",
        "× a task",
        "95 %",
        "× a month",
        "published",
    )
    table = _table(columns, "from the pilot (drafts and evaluations) to production")
    for row in found.iter_rows(named=True):
        table.add_row(
            row["system"],
            f"{row['pilot_tasks']:,}",
            _number(row["pilot_usd"]),
            f"{row['production_tasks']:,}",
            _number(row["production_usd"]),
            _number(row["of_a_task"]),
            _range(row["low"], row["high"]),
            _number(row["of_a_month"]),
            f"{row['published_low']:g} to {row['published_high']:g}",
        )
    terminal.console().print(table)


def _table(columns: Sequence[str], title: str) -> Table:
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold")  # a name that is cut off names nothing
    return table


def _with_range(row: dict[str, Any], name: str) -> str:
    span = _range(row[f"{name}_low"], row[f"{name}_high"])
    return _number(row[name]) + (f" ({span})" if span else "")


def _number(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None and high is None else f"{_number(low)} – {'∞' if high is None else _number(high)}"
