"""`agentkit costs`: what tasks cost, what a month will, and what it would at other prices."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agentkit.errors import UsageError
from agentkit_pipelines import terminal

if TYPE_CHECKING:
    import polars as pl
    from rich.table import Table

    from agentkit.settings import Price
    from agentkit_tracking.costs import Tasks

_CENTURY = 36_525  # days; dates end at the year 1
_MOST = 1e12  # tasks or USD a month
_DEAREST = 1e6  # USD per million tokens


def costs(
    system: Annotated[str | None, typer.Argument(help="name of the system [default: all]")] = None,
    days: Annotated[int, typer.Option(min=1, max=_CENTURY, help="of the run log to look at")] = 30,
    stage: Annotated[
        Literal["production", "draft", "all"] | None,
        typer.Option(help="whose runs to count [default: production where there is any, else draft]"),
    ] = None,
    tasks: Annotated[
        float | None,
        typer.Option(min=1, max=_MOST, help="a month [default: at the rate of these days]"),
    ] = None,
    price: Annotated[
        list[str] | None, typer.Option(help="what if: MODEL=IN/OUT, USD per million tokens; may be repeated")
    ] = None,
    hosting: Annotated[float | None, typer.Option(min=0, max=_MOST, help="USD a month")] = None,
    monitoring: Annotated[float | None, typer.Option(min=0, max=_MOST, help="USD a month")] = None,
) -> None:
    """What a task costs (mean, p99), what a month will, the pilot beside production, from logged runs; 95 % intervals."""
    from agentkit.settings import load_settings
    from agentkit_tracking import costs as model
    from agentkit_tracking.operations import Filter
    from agentkit_tracking.runlog import RunLog

    prices = prices_from(price or [])
    now = datetime.now(UTC)
    with RunLog().connection() as opened:
        chosen = Filter(system=system, since=now - timedelta(days=days), until=now)
        drawn = model.tasks(opened, chosen, settings=load_settings())
    whose = f" of {system!r}" if system else ""
    if not drawn.frame.height:
        raise UsageError(f"the run log has no finished run{whose} in the last {days} days; `agentkit log` lists runs")
    counted, which = model.projected(drawn, stage)
    if stage and not counted.frame.height:
        raise UsageError(
            f"the run log has no finished run{whose} of the stage {stage} in the last {days} days, evaluations aside; "
            "leave --stage out to count what there is"
        )
    of = counted if counted.frame.height else drawn
    unknown = sorted(prices.keys() - set(of.use["model"].to_list()))
    if unknown:
        used = ", ".join(of.use["model"].unique().sort().to_list()) or "none"
        raise UsageError(f"no run used the model {unknown[0]!r} of --price; these were used: {used}")
    if counted.frame.height:
        terminal.console().print(_counted(counted, model.work(drawn), which, days), markup=False)
        _show_tasks(model.distribution(counted), model.published(), days)
        month = model.month(counted, tasks, hosting=hosting, monitoring=monitoring)
        _show_month(month, "a month at this rate" if tasks is None else f"a month of {tasks:,.0f} tasks")
        if prices:
            again = model.repriced(counted, prices)
            title = "what if: " + ", ".join(f"{name} {p.input:g}/{p.output:g}" for name, p in prices.items())
            _show_month(model.month(again, tasks, hosting=hosting, monitoring=monitoring), title)
    _show_pilot(model.pilot_to_production(drawn))


def _counted(counted: Tasks, asked_for: Tasks, stage: str, days: int) -> str:
    """Which tasks the figures are of, and what their rate is a rate of."""
    n, others = (round(height * counted.scale) for height in (counted.frame.height, asked_for.frame.height))
    said = f"Counted: {n:,} task{'s' * (n != 1)} of {'all stages' if stage == 'all' else f'the stage {stage}'}"
    if others > n:
        said += f" ({others - n:,} of another stage are left out: --stage all)"
    younger = counted.days < 0.99 * days
    return f"{said}, in {counted.days:.3g} day{'s' * (counted.days != 1)}" + (
        ", as far back as the log goes." if younger else "."
    )


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
        if not model or max(sent, received) > _DEAREST:
            raise UsageError(
                "--price is MODEL=IN/OUT in USD per million tokens, each from 0 to a million, as openai/gpt-4.1=2/8; "
                f"got {text!r}"
            )
    return prices


def _show_tasks(found: pl.DataFrame, published: pl.DataFrame, days: int) -> None:
    from rich.text import Text

    columns = ("system", "tier", "amount", "tasks", "mean (95 %)", "p50", "p95", "p99 (95 %)")
    table = _table(columns, f"a task, last {days} days")
    for row in found.iter_rows(named=True):
        mean, p99 = (_with_range(row, name) for name in ("mean", "p99"))
        n = f"{row['n']:,}" + (f" ({row['unknown']:,} without a price)" if row["unknown"] else "")
        named = Text(row["system"]), Text(row["tier"])
        table.add_row(*named, row["amount"], n, mean, _number(row["p50"]), _number(row["p95"]), p99)
    for row in published.iter_rows(named=True):
        table.add_row(
            "published", row["kind"], "usd", "", _number(row["mean"]), "", "", _number(row["p99"]), style="dim"
        )
    terminal.console().print(table)


def _show_month(found: pl.DataFrame, title: str) -> None:
    from rich.text import Text

    table = _table(("line", "system", "tier", "tasks", "USD", "95 %", "million tokens in", "out"), title)
    for row in found.iter_rows(named=True):
        tokens = ["" if row[name] is None else f"{row[name] / 1e6:,.3g}" for name in ("tokens_in", "tokens_out")]
        fixed = row["line"] in ("hosting", "monitoring")
        usd = "not given" if fixed and row["usd"] is None else _number(row["usd"])
        span = "" if fixed else _range(row["low"], row["high"])
        count = "" if row["tasks"] is None else f"{row['tasks']:,.0f}"
        style = "bold" if row["line"] == "total" else None
        named = Text(row["system"] or ""), Text(row["tier"] or "")
        table.add_row(row["line"], *named, count, usd, span, *tokens, style=style)
    terminal.console().print(table)


def _show_pilot(found: pl.DataFrame) -> None:
    from rich.text import Text

    columns = (
        "system",
        "pilot tasks",
        "USD each",
        "production tasks",
        "USD each",
        "× a task",
        "95 %",
        "× in all",
        "published",
    )
    table = _table(columns, "from the pilot (drafts and evaluations) to production")
    for row in found.iter_rows(named=True):
        table.add_row(
            Text(row["system"]),
            f"{row['pilot_tasks']:,}",
            _number(row["pilot_usd"]),
            f"{row['production_tasks']:,}",
            _number(row["production_usd"]),
            _number(row["of_a_task"]),
            _range(row["low"], row["high"]),
            _number(row["in_all"]),
            f"{row['published_low']:g} to {row['published_high']:g}",
        )
    terminal.console().print(table)


def _table(columns: Sequence[str], title: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    # Names are anybody's: as texts they are shown as they are, brackets and all.
    table = Table(title=Text(title, style="italic"))
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
