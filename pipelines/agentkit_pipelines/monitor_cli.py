"""`agentkit monitor`: has what is in production become worse?"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentkit.errors import UsageError
from agentkit_pipelines import terminal
from agentkit_pipelines.gate_cli import FAILED, INCONCLUSIVE, OK
from agentkit_pipelines.options import SystemName

if TYPE_CHECKING:
    from agentkit_pipelines.monitor import Report

_COLORS = {"degraded": "red", "recovered": "yellow", "ok": "green", "not watched": "dim"}


def monitor(
    system: SystemName,
    release: Annotated[str, typer.Option(help="release id, version number or `draft` [default: in production]")] = "",
    since: Annotated[str, typer.Option(help="ISO 8601, UTC; the same at every look [default: when it went live]")] = "",
    until: Annotated[str, typer.Option(help="ISO 8601, UTC [default: now]")] = "",
    baseline: Annotated[str, typer.Option(help="days before, as 28d, or a number of the release's first runs")] = "28d",
    baseline_release: Annotated[str, typer.Option(help="whose runs before [default: what it replaced]")] = "",
    measure: Annotated[list[str] | None, typer.Option(help="only this one; can be given again [default: all]")] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="of runs; can be given again [default: run, batch, map]")
    ] = None,
    block_minutes: Annotated[int, typer.Option(help="what a user does within is one observation")] = 60,
    alpha: Annotated[
        float, typer.Option(help="chance of any alarm, over all looks and measures, while none is worse than its floor")
    ] = 0.01,
    rate_floor: Annotated[
        float, typer.Option(help="a rate may be so much above the baseline's; give more where its level drifts")
    ] = 0.01,
    ratio_floor: Annotated[float, typer.Option(help="cost, latency, model calls may be so many times as large")] = 1.05,
    mix_floor: Annotated[float, typer.Option(help="a route's share may be so much off")] = 0.1,
    alert: Annotated[bool, typer.Option("--alert/--no-alert", help="tell of new alarms: run log and webhook")] = True,
    output: Annotated[Path | None, typer.Option(help="folder for the report [default: a new one in the home]")] = None,
) -> None:
    """Compare the runs of a release with those before it, in the monitor notebook. Run it as often as you like.

    Failures, escalations, refusals, lesser results, corrections, cost, latency, model calls, routes. Exit code 3 when
    something is worse than allowed (and did not recover since), 4 when there are too few runs to say anything, or `agentkit
    log prune` removed some of them.
    """
    from agentkit_pipelines import monitor as looks
    from agentkit_pipelines import monitor_alerts, monitor_window
    from agentkit_pipelines.notebook_runner import run_notebook
    from agentkit_tracking.home import home
    from agentkit_tracking.runlog import RunLog

    looks.Limits(alpha, rate_floor, ratio_floor, mix_floor)  # wrong use is said before a kernel starts
    looks.measures(measure or [])
    words: dict[str, Any] = {"release": release, "since": since, "until": until, "baseline": baseline}
    words |= {"baseline_release": baseline_release, "block_minutes": block_minutes}
    kinds = kind or list(monitor_window.KINDS)
    window = monitor_window.choose(RunLog(), system, **words, kinds=kinds)
    parameters = {**words, "system": system, "until": window.until.isoformat(), "kinds": ",".join(kinds)}
    parameters |= {"measures": ",".join(measure or []), "alpha": alpha, "alert": alert}
    parameters |= {"rate_floor": rate_floor, "ratio_floor": ratio_floor, "mix_floor": mix_floor}
    folder = output or home() / "monitor" / system / f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
    _writable(folder)
    with terminal.progress(f"monitor {system}"):
        executed = run_notebook("monitor", parameters, folder)
    report = looks.read((folder / "report.json").read_text(encoding="utf-8"))
    _show(report, executed)
    if alert and (amiss := monitor_alerts.deliver()):
        terminal.console().print(f"! {amiss}", style="yellow", markup=False, soft_wrap=True)
    raise typer.Exit(FAILED if report.degraded else INCONCLUSIVE if report.too_little else OK)


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UsageError(f"the report cannot be written to {folder}: {e.strerror}; give --output FOLDER") from None


def _show(report: Report, executed: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    from agentkit_pipelines import monitor_report

    out = terminal.console()
    out.print(str(report.window), markup=False)
    if report.too_little:
        out.print(
            f"[yellow]too little to go by[/yellow]: {report.too_little} · {terminal.short(executed)}", soft_wrap=True
        )
        return
    names = ("measure", "state", "what", "baseline", "now", "change", "evidence", "since")
    table = Table(*names)
    for row in monitor_report.table(report).iter_rows(named=True):
        cells = {name: escape(str(row[name])) for name in names}
        cells["state"] = f"[{_COLORS[row['state']]}]{row['state']}[/]"
        table.add_row(*cells.values(), style="bold" if row["state"] == "degraded" else None)
    out.print(table)
    for finding in report.findings:
        if finding.is_lost:
            out.print(f"! {monitor_report.sentence(finding)}", style="yellow", markup=False, soft_wrap=True)
    for finding in report.degraded:
        out.print(f"✗ {monitor_report.sentence(finding)}", style="red", markup=False, soft_wrap=True)
    verdict = "[red]degraded[/red]" if report.degraded else "[green]nothing degraded[/green]"
    alpha = f"false alarms in all at most {report.limits.alpha:g}"
    out.print(f"{verdict} · {alpha} · {terminal.short(executed)}", soft_wrap=True)
