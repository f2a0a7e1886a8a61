"""How figures, verdicts and runs look in a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl
    from rich.console import Console

    from agentkit.records import RunRecord
    from agentkit_pipelines.notebook_runner import Progress
    from agentkit_pipelines.recording import Evaluation


def console() -> Console:
    """As wide as the terminal; 120 columns where there is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """A rich bar on stderr; yields the callback (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show_summary(done: Evaluation) -> None:
    """Figures of an evaluation with their intervals."""
    from rich.table import Table

    from agentkit_pipelines import report

    table = Table(
        "metric", "estimate", "95 % interval", title=f"{done.version} on {done.results['case_id'].n_unique()} cases"
    )
    for row in report.summarise(done.results).iter_rows(named=True):
        name = row["metric"] + (f" · {row['group']}" if row["group"] else "")
        table.add_row(name, figure(row["estimate"], row["unit"]), _interval(row["low"], row["high"]))
    out = console()
    out.print(table)
    out.print(f"executed notebook, results and plots: {short(done.folder)}")


def _interval(low: float | None, high: float | None) -> str:
    """Too few cases leave a side open, as that of a 95th percentile."""
    if low is None and high is None:
        return ""
    return f"{'−∞' if low is None else f'{low:.3g}'} – {'∞' if high is None else f'{high:.3g}'}"


def figure(value: float | None, unit: str) -> str:
    """A number with three digits and its unit."""
    return "–" if value is None else f"{value:.3g} {unit}".strip()


def short(path: Path) -> str:
    """The path from here, where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def show_verdict(done: Evaluation) -> None:
    """The gate's table and its verdict."""
    from rich.markup import escape
    from rich.table import Table

    from agentkit_pipelines.report import SYMBOL

    assert done.verdict is not None
    colors = {"pass": "green", "fail": "red", "inconclusive": "yellow"}
    table = Table("", "what was found", title=f"gate for {done.version}", show_lines=False)
    for rule in done.verdict.rules:
        if rule.status in ("not_exercised", "not_applicable") and rule.group is not None:
            continue
        color = colors.get(rule.status, "dim") if rule.level == "block" or rule.status == "pass" else "yellow"
        table.add_row(
            f"[{color}]{SYMBOL[rule.status]}[/{color}]",
            escape(rule.text) + (" (warning only)" if rule.level == "warn" else ""),
        )
    out = console()
    out.print(table)
    word = {"pass": "PASS", "fail": "FAIL: nothing moved", "inconclusive": "INCONCLUSIVE: nothing moved"}[
        done.verdict.verdict
    ]
    against = f" against {done.production}" if done.production else ""
    color = colors[done.verdict.verdict]
    out.print(
        f"[bold {color}]{word}[/bold {color}] · {done.version}{against} · attempt {done.attempts} on this golden set"
    )
    out.print(
        f"[dim]✓ proven  ✗ missed  ? undecided  ○ not exercised by this model  – not applicable · {short(done.folder)}[/dim]"
    )


def show_chaos(summary: pl.DataFrame, version: str) -> None:
    """What became of the runs under each fault."""
    from rich.table import Table

    words = ("recovered", "escalated", "failed", "failed_at_most", "wrong")
    table = Table(
        "fault",
        "runs hit",
        "recovered",
        "escalated",
        "failed",
        "at most, 95 %",
        "wrong, unsaid",
        "violations",
        title=f"chaos: {version}",
    )
    for row in summary.iter_rows(named=True):
        shares = ["–" if row[word] is None else f"{row[word]:.1%}" for word in words]
        table.add_row(
            row["fault"],
            str(row["hit"]),
            *shares,
            str(row["violations"]),
            style="bold" if row["fault"] == "all" else None,
        )
    console().print(table)


def show_run(record: RunRecord) -> None:
    """A run's steps, output, cost and trace."""
    from rich.markup import escape
    from rich.table import Table

    out = console()
    table = Table(
        "at, s", "state", "step", "result", title=f"{record.system} · release {(record.release or 'draft')[:12]}"
    )
    for step in record.steps:
        result = step.error or (step.inputs if step.kind == "decision" else step.outputs)
        what = f"→ {step.name}" if step.kind == "transition" else f"{step.kind} {step.name}"
        # A transition is taken when the state it leaves has lasted its time.
        at = step.started + (step.seconds if step.kind == "transition" else 0)
        table.add_row(f"{at:.3f}", step.state, escape(what), clip(result))
    out.print(table)
    for name, value in (record.output or {}).items():
        out.print(f"[bold]{escape(name)}[/bold]: {escape(str(value))}")
    if record.error:
        out.print(f"[red]{record.state}: {escape(record.error)}[/red]")
    phases = ", ".join(f"{k} {v:.3f} s" for k, v in record.phases.items())
    out.print(
        f"route [bold]{record.route}[/bold] · {record.state} · USD {record.usd:.6f} · {record.model_calls} model calls, "
        f"{record.tokens_in} + {record.tokens_out} tokens · {record.seconds:.3f} s ({phases})"
    )
    out.print(f"run {record.run_id} · {_trace_of(record)}", soft_wrap=True)


def _trace_of(record: RunRecord) -> str:
    from agentkit_tracking import traces
    from agentkit_tracking.forwarding.background import wanted

    if "mlflow" not in wanted():
        return "no trace: AGENTKIT_TRACES does not ask for one"
    if not traces.flush():
        return "its trace follows once MLflow takes it"
    return f"trace {traces.link(record.system, traces.trace_id(record.run_id))}"


def clip(value: Any) -> str:
    """One line of at most 90 characters, safe to print."""
    from rich.markup import escape

    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return escape(text if len(text) <= 90 else text[:87] + "…")
