"""What a look of the monitor found: sentences, a table, charts."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from agentkit_pipelines import sequential
from agentkit_pipelines.monitor import Alarm, Finding, Report, Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POINTS = 48  # of a chart at most
_BAD, _GOOD, _BASE, _INK = "#d1495b", "#2a9d8f", "#8d99ae", "#333"


def sentence(finding: Finding, alarm: Alarm | None = None) -> str:
    """What is worse, by how much, since when; of an `alarm` that is over, only when it was."""
    if alarm is not None and alarm.recovered is not None:
        return (
            f"{finding.measure} was worse from about {_when(alarm.onset)} and had recovered by {_when(alarm.recovered)}"
        )
    if finding.state == "not watched":
        return f"{finding.measure} is not watched: {finding.what}"
    last = finding.alarms[-1] if finding.alarms else None
    begin = f" since about {_when(last.onset)}" if last is not None and last.recovered is None else ""
    return (
        f"{finding.measure}: {finding.what} {figure(finding, finding.now)}{begin}, baseline {figure(finding, finding.baseline)} "
        f"({effect(finding)})" + (f"; known since {_when(last.at)}" if last is not None and begin else "")
    )


def figure(finding: Finding, value: float | None) -> str:
    """A value of a measure: a share in percent, an amount as it is."""
    if value is None:
        return "–"
    return f"{value:.3g}" if finding.kind == "amount" else f"{100 * value:.1f} %"


def effect(finding: Finding) -> str:
    """Difference in points or ratio, with its interval."""
    if finding.effect is None:
        return "–"
    if finding.kind == "amount":
        low, high = (f"{x:.2f}" if x is not None else "∞" for x in (finding.low, finding.high))
        return f"× {finding.effect:.2f}, {low} to {high}"
    low, high = (f"{100 * (x or 0.0):+.1f}" for x in (finding.low, finding.high))
    return f"{100 * finding.effect:+.1f} points, {low} to {high}"


def _when(moment: str) -> str:
    return f"{datetime.fromisoformat(moment):%Y-%m-%d %H:%M}"


def table(report: Report) -> pl.DataFrame:
    """One row a measure: state, what is compared, baseline, now, change with its interval, evidence, since when, runs."""
    rows = []
    for f in report.findings:
        last = f.alarms[-1] if f.alarms else None
        rows.append(
            {
                "measure": f.measure,
                "state": f.state,
                "what": f.what,
                "baseline": figure(f, f.baseline),
                "now": figure(f, f.now),
                "change": effect(f),
                "evidence": "–" if f.evidence is None else f"{f.evidence:.1f} of {f.needed:.1f}",
                "since": _when(last.onset) if last is not None else "–",
                "runs": f"{f.runs:,} / {f.baseline_runs:,}",
            }
        )
    return pl.DataFrame(rows)


def plot(report: Report) -> Figure:
    """For each measure: its share over time with the confidence sequence of the mean, and the evidence beside it."""
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    from matplotlib.figure import Figure

    traces = report.traces or {}
    figure = Figure(figsize=(11, 2.1 * max(len(traces), 1) + 0.4), layout="constrained")
    axes = figure.subplots(max(len(traces), 1), 2, squeeze=False, gridspec_kw={"width_ratios": [3, 2]})
    found = {f.measure: f for f in report.findings}
    for (name, trace), (left, right) in zip(traces.items(), axes, strict=False):
        _plot_shares(left, found[name], trace, report)
        _plot_evidence(right, found[name], trace)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_locator(dates := AutoDateLocator(maxticks=7))
        axis.xaxis.set_major_formatter(ConciseDateFormatter(dates))
    return figure


def _plot_shares(axes: Any, finding: Finding, trace: Trace, report: Report) -> None:
    stream, base = trace.series.stream, trace.series.baseline
    end = np.unique(np.linspace(0, len(stream.at), min(_POINTS, len(stream.at)) + 1).astype(int))[1:]
    sums, sizes = (
        np.concatenate([[0.0], np.cumsum(x)])[np.concatenate([[0], end])] for x in (stream.sums, stream.sizes)
    )
    times = [trace.times[i - 1] for i in end]
    low, high = sequential.confidence_sequence(
        sums[1:] / base.dispersion, sizes[1:] / base.dispersion, report.limits.alpha
    )
    color = _BAD if finding.is_degraded else _GOOD
    axes.fill_between(times, 100 * low, 100 * high, color=color, alpha=0.18, linewidth=0)
    axes.plot(
        times, 100 * sums[1:] / sizes[1:], color=color, linewidth=1, label="mean so far, with its confidence sequence"
    )
    axes.plot(times, 100 * np.diff(sums) / np.diff(sizes), ".", color=_INK, markersize=3, label="at that time")
    bounds = base.interval(report.limits.alpha)
    axes.axhspan(100 * bounds[0], 100 * bounds[1], color=_BASE, alpha=0.3, linewidth=0, label="baseline")
    axes.axhline(100 * min(base.rate + trace.series.floor, 1), color=_BASE, linewidth=0.8, linestyle=":")
    _mark(axes, finding)
    what = f"over the baseline's {trace.series.name}" if finding.kind == "amount" else trace.series.name
    axes.set_ylabel("% of runs", fontsize=7)
    top = max(float(np.quantile(high, 0.5)), bounds[1], float(np.max(np.diff(sums) / np.diff(sizes)))) * 115
    axes.set_ylim(0, min(max(top, 1), 105))
    axes.set_title(finding.measure if what == finding.measure else f"{finding.measure}: {what}", fontsize=8, loc="left")


def _plot_evidence(axes: Any, finding: Finding, trace: Trace) -> None:
    axes.plot(trace.times, trace.evidence, color=_BAD if finding.is_degraded else _GOOD, linewidth=1)
    axes.axhline(finding.needed, color=_INK, linewidth=0.8, linestyle=":")
    _mark(axes, finding)
    axes.set_title("evidence, log10 of the e-value", fontsize=8, loc="left")


def _mark(axes: Any, finding: Finding) -> None:
    for alarm in finding.alarms:
        axes.axvline(datetime.fromisoformat(alarm.onset), color=_BAD, linewidth=0.8, linestyle="--")
        axes.axvline(datetime.fromisoformat(alarm.at), color=_BAD, linewidth=1)
        if alarm.recovered is not None:
            axes.axvline(datetime.fromisoformat(alarm.recovered), color=_GOOD, linewidth=1)
