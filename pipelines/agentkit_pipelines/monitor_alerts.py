"""Alerts of the monitor: each onset is told once, as an event of the run log and as a notice to people (log, webhook)."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

from agentkit.errors import AgentkitError
from agentkit_pipelines.monitor import LABELS, MEASURES, Alarm, Finding, Report
from agentkit_pipelines.monitor_report import sentence
from agentkit_pipelines.monitor_window import Window, asking, own_runs

if TYPE_CHECKING:
    from agentkit_tracking.runlog import RunLog

_EXAMPLES = 3
_SENDING_S = 15.0  # a kernel ends after this; what is not sent by then, the next look sends


def tell(log: RunLog, report: Report) -> list[str]:
    """Tell of every alarm that no event tells of yet; returns the sentences.

    The notice comes first: after a crash in between it comes twice rather than never. `deliver` sends what is left.
    """
    from agentkit_tracking.control import ControlPlane
    from agentkit_tracking.home import file_lock

    with file_lock(log.folder / "alerts.lock"):
        news = _untold(log, report)
        if not news:
            return []
        plane, written = ControlPlane(), []
        for finding, alarm, runs in news:
            text = sentence(finding, alarm)
            plane.notify(_notice(report.window, finding, alarm, text, runs))
            written.append(_event(report.window, finding, alarm, text, runs))
        log.write(written)
        log.close()
        plane.outbox.flush(_SENDING_S)
    return [private["text"] for _, private in written]


def deliver() -> str:
    """Try once to send what notices are left, of this look or an earlier one; returns what is amiss, or nothing."""
    from agentkit_tracking.control import ControlPlane
    from agentkit_tracking.control.notices import URL_ENV, Webhook

    try:
        if Webhook.configured() is None:
            return ""
        outbox = ControlPlane().outbox
        outbox.deliver()
        left = outbox.undelivered()
    except AgentkitError as e:  # the verdict stands all the same
        return str(e)
    if not left:
        return ""
    what = "1 notice is" if left == 1 else f"{left} notices are"
    return f"{what} undelivered: the receiver that {URL_ENV} names did not answer 2xx; each look tries again, for three days"


def _untold(log: RunLog, report: Report) -> list[tuple[Finding, Alarm, list[str]]]:
    window = report.window
    with asking(log) as ask:
        events = ask(
            "SELECT name, started_at FROM events WHERE type = 'alert' AND system = ? AND release IS NOT DISTINCT FROM ? "
            # Alerts of versions that did not keep it count for every comparison.
            "AND stage IS NOT DISTINCT FROM ? AND coalesce(private->>'comparison', ?) = ?",
            [window.system, window.release, window.stage, window.comparison, window.comparison],
        )
        told = [(str(name), at) for name, at in events.iter_rows()]
        return [
            (finding, alarm, _examples(ask, window, finding, alarm))
            for finding in report.findings
            for alarm in finding.alarms
            if not any(name == finding.measure and _within(alarm, at) for name, at in told)
        ]


def _within(alarm: Alarm, at: datetime) -> bool:
    """An alarm told with other settings, a little earlier or later, is the same."""
    begin, end = datetime.fromisoformat(alarm.onset), alarm.recovered
    return begin <= at and (end is None or at <= datetime.fromisoformat(end))


def _examples(ask: Any, window: Window, finding: Finding, alarm: Alarm) -> list[str]:
    """Some of the runs that made it so."""
    measure = next(m for m in MEASURES if m.name == finding.measure)
    if measure.kind == "mix" or measure.name == LABELS:
        return []
    which = f" AND ({measure.value})" if measure.kind == "rate" else f" AND ({measure.value}) IS NOT NULL"
    order = "logged_at DESC" if measure.kind == "rate" else f"{measure.value} DESC"
    between = f" AND logged_at >= TIMESTAMPTZ '{alarm.onset}' AND logged_at < TIMESTAMPTZ '{alarm.at}'"
    found = own_runs(ask, window, "run_id", f"{which}{between} ORDER BY {order} LIMIT {_EXAMPLES}")
    return [str(run) for run in found["run_id"]]


def _notice(window: Window, finding: Finding, alarm: Alarm, text: str, runs: list[str]) -> Any:
    from agentkit.control import Notice

    figures = {k: v for k, v in asdict(finding).items() if k != "alarms"}
    details = {**figures, **asdict(alarm), "release": window.release, "runs": runs, "compared": str(window)}
    return Notice("degraded", runs[0] if runs else "", window.system, text, details)


def _event(
    window: Window, finding: Finding, alarm: Alarm, text: str, runs: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    event = {
        "type": "alert",
        "system": window.system,
        "release": window.release,
        "stage": window.stage,
        "name": finding.measure,
        "result": "degraded",
        "started_at": alarm.at,
    }
    private = {"text": text, "onset": alarm.onset, "runs": runs, "comparison": window.comparison}
    return {name: value for name, value in event.items() if value is not None}, private
