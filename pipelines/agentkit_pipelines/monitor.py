"""Whether a release has become worse than its baseline: measures of its runs, watched by the tests of `sequential.py`.

Nothing is remembered between looks: each computes all from the log, and comes to what a single look at the end would find.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl

from agentkit.errors import UsageError
from agentkit_pipelines import sequential
from agentkit_pipelines.monitor_window import FEWEST, Ask, Window, asking, before_runs, labels, own_runs
from agentkit_pipelines.sequential import Array, Blocks, Grouping, Series
from agentkit_tracking.runlog.reading import IS_ESCALATED

if TYPE_CHECKING:
    from agentkit_tracking.runlog import RunLog

QUANTILES = (0.5, 0.9, 0.99)  # of the baseline, that amounts are held against
_IN_TAIL = 20  # runs beyond a quantile, for it to be used
_RARE = 0.02  # share below which routes are one
State = Literal["ok", "degraded", "recovered", "not watched"]


@dataclass(frozen=True)
class Measure:
    """Something to watch: `value` is SQL on the event of a finished run.

    A rate is yes or no, and worse when it is more often; an amount is worse when it is larger; of a mix any change counts.
    """

    name: str
    kind: Literal["rate", "amount", "mix"]
    value: str
    unit: str = ""


LABELS = "not_accepted"
MEASURES = (
    Measure("failure", "rate", "state <> 'DONE'"),
    Measure("escalation", "rate", IS_ESCALATED),
    Measure("refusal", "rate", "coalesce(refusals, 0) > 0"),
    Measure("lesser_result", "rate", "coalesce(is_degraded, false)"),
    Measure(LABELS, "rate", "label <> 'accepted'"),
    Measure("cost", "amount", "usd", "USD"),
    Measure("latency", "amount", "greatest(seconds - coalesce(waited_s, 0), 0)", "s"),
    Measure("model_calls", "amount", "model_calls"),
    Measure("route", "mix", "coalesce(route, 'none')"),
)


@dataclass(frozen=True)
class Limits:
    """What counts as worse, and how often the monitor may be wrong.

    `alpha`: the chance of any false alarm, over all looks and measures, as long as the release lives. A rate may be `rate`
    above the baseline's (0.01: one point), an amount `ratio` times as large at its quantiles, a route's share `mix` off.
    """

    alpha: float = 0.01
    rate: float = 0.01
    ratio: float = 1.05
    mix: float = 0.1

    def __post_init__(self) -> None:
        for name, low, high in (("alpha", 1e-4, 0.2), ("rate", 0, 0.5), ("ratio", 1, 10), ("mix", 0, 0.9)):
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"{name} must lie between {low:g} and {high:g}, not {getattr(self, name):g}")


@dataclass(frozen=True)
class Alarm:
    """A measure was worse from about `onset` on, as was known at `at`; and no longer, as known at `recovered`."""

    onset: str  # ISO 8601
    at: str
    recovered: str | None


@dataclass(frozen=True)
class Finding:
    """One measure. `baseline`, `now`: since the onset, or since the release went live; the unit is in `what`.

    `effect` is their difference, of an amount their ratio, between `low` and `high` at level 1 - alpha at all times.
    `evidence` is the present e-value's logarithm to base ten; an alarm is raised when it reaches `needed`.
    """

    measure: str
    kind: str
    state: State
    what: str
    baseline: float | None = None
    now: float | None = None
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    evidence: float | None = None
    needed: float | None = None
    baseline_runs: int = 0
    runs: int = 0
    dispersion: float = 1.0
    alarms: tuple[Alarm, ...] = ()

    @property
    def is_degraded(self) -> bool:
        return self.state == "degraded"

    @property
    def is_lost(self) -> bool:
        """The baseline shows it, the runs since do not."""
        return self.state == "not watched" and self.baseline_runs >= FEWEST


@dataclass(frozen=True)
class Trace:
    """For the chart of a measure: its leading series and the evidence, by block."""

    times: list[datetime]
    series: Series
    evidence: Array


@dataclass(frozen=True)
class Report:
    """What a look found. `too_little` says why nothing can be said, where it cannot."""

    window: Window
    limits: Limits
    findings: tuple[Finding, ...]
    too_little: str = ""
    traces: dict[str, Trace] | None = None

    @property
    def degraded(self) -> list[Finding]:
        """The measures that are worse now."""
        return [f for f in self.findings if f.is_degraded]

    def to_json(self) -> str:
        """All but the traces."""
        values = {"window": asdict(self.window), "limits": asdict(self.limits), "too_little": self.too_little}
        return json.dumps({**values, "findings": [asdict(f) for f in self.findings]}, default=str, indent=1)


def read(text: str) -> Report:
    """What `to_json` wrote; the traces stay away."""
    values = json.loads(text)
    window = values["window"]
    for name in ("since", "until"):
        window[name] = datetime.fromisoformat(window[name])
    for name in ("before", "kinds"):
        window[name] = None if window[name] is None else tuple(window[name])
    found = [Finding(**{**f, "alarms": tuple(Alarm(**a) for a in f["alarms"])}) for f in values["findings"]]
    return Report(Window(**window), Limits(**values["limits"]), tuple(found), values["too_little"])


def measures(names: Sequence[str] = ()) -> tuple[Measure, ...]:
    """Those of these names; all without any. Raises UsageError for an unknown one."""
    known = {m.name: m for m in MEASURES}
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"there is no measure {unknown[0]!r}; there are {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names)) or MEASURES


def examine(log: RunLog, window: Window, limits: Limits | None = None, chosen: Sequence[Measure] = MEASURES) -> Report:
    """Look once: every measure against its baseline."""
    limits = limits or Limits()
    if window.gap:
        return _nothing(window, limits, window.gap, chosen)
    with asking(log) as ask:
        baseline, stream = _runs(ask, window, chosen)
        if len(baseline) < FEWEST:
            return _nothing(window, limits, f"the baseline has {len(baseline)} runs, {FEWEST} are needed", chosen)
        if stream.is_empty():
            block = f"block of {window.block_minutes} minutes"
            return _nothing(window, limits, f"no whole {block} with runs lies after the baseline", chosen)
        told = _labels(ask, window, stream["block"].min()) if any(m.name == LABELS for m in chosen) else None
    samples = {
        m.name: (m, *pair(*(told if told and m.name == LABELS else (baseline, stream)), m.name, window.blocks_a_day))
        for m in chosen
    }
    # Which are watched is settled by the baseline alone: the stream must have no say in how alpha is divided.
    watched = [m.name for m in chosen if len(samples[m.name][1].values) >= FEWEST]
    threshold = math.log(max(len(watched), 1) / limits.alpha)
    findings, traces = [], {}
    for measure in chosen:
        finding, trace = _look(*samples[measure.name], len(stream), window, limits, threshold)
        findings.append(finding)
        if trace is not None:
            traces[measure.name] = trace
    return Report(window, limits, tuple(findings), traces=traces)


def _nothing(window: Window, limits: Limits, why: str, chosen: Sequence[Measure]) -> Report:
    return Report(window, limits, tuple(Finding(m.name, m.kind, "not watched", why) for m in chosen), why)


# ---- samples


class Sample:
    """The runs of one sample for one measure, unknown values left out, and which of them are one observation.

    Runs of one session or user in one block are. Of a session only the first block of each day of its own counts: what it
    does next is no news of the release. Of a user likewise where users of the baseline were alike from block to block of a
    day; `daily` hands that from the baseline to the stream.
    """

    def __init__(self, runs: pl.DataFrame, name: str, blocks_a_day: int = 24, daily: bool | None = None) -> None:
        known = runs.filter(pl.col(name).is_not_null())
        self.daily = _alike(known, name, blocks_a_day) if daily is None else daily
        known = known.filter(_first_of_day(blocks_a_day) | (not self.daily and ~pl.col("is_session")))
        self.values: Any = known[name].to_numpy()
        self.block: Any = known["block"].to_numpy()
        self.grouping = Grouping(self.block, known["cluster"].to_numpy())

    def blocks(self, values: Any) -> Blocks:
        """One value per run, in [0, 1], as observations."""
        return self.grouping.blocks(values)


def pair(baseline: pl.DataFrame, stream: pl.DataFrame, name: str, blocks_a_day: int = 24) -> tuple[Sample, Sample]:
    """Both samples of a measure, from frames with `block`, `cluster`, `is_session` and the measure's own column."""
    then = Sample(baseline, name, blocks_a_day)
    return then, Sample(stream, name, blocks_a_day, then.daily)


def _first_of_day(blocks: int) -> pl.Expr:
    day = (pl.col("block") - pl.col("block").min().over("cluster")) // blocks
    return pl.col("block") == pl.col("block").min().over("cluster", day)


def _alike(runs: pl.DataFrame, name: str, blocks_a_day: int) -> bool:
    """Whether what one user does in two blocks of a day is alike, by more than one standard error of the mean product."""
    value = pl.col(name) == pl.col(name).mode().min() if runs[name].dtype == pl.String else pl.col(name).rank()
    one = runs.filter(~pl.col("is_session")).select("cluster", "block", x=value.cast(pl.Float64))
    one = one.group_by("cluster", "block").agg(pl.col("x").mean()).with_columns(pl.col("x") - pl.col("x").mean())
    day = one.group_by("cluster", pl.col("block") // blocks_a_day).agg(
        sum=pl.col("x").sum(), square=(pl.col("x") ** 2).sum(), fourth=(pl.col("x") ** 4).sum()
    )
    products = float((day["sum"] ** 2 - day["square"]).sum())
    return products > math.sqrt(2 * max(float((day["square"] ** 2 - day["fourth"]).sum()), 0.0)) and products > 1e-9


def _runs(ask: Ask, window: Window, chosen: Sequence[Measure]) -> tuple[pl.DataFrame, pl.DataFrame]:
    values = ", ".join(f"{_typed(m)} AS {m.name}" for m in chosen if m.name != LABELS)
    columns = (
        f"epoch_us(logged_at) // {window.block_us} AS block, hash(coalesce(session, user_hash, run_id)) AS cluster, "
        "session IS NOT NULL AS is_session" + (f", {values}" if values else "")
    )
    own = own_runs(ask, window, columns)
    if not window.first_runs:
        return before_runs(ask, window, columns), own
    sizes = own.group_by("block").len().sort("block").with_columns(pl.col("len").cum_sum())
    enough = sizes.filter(pl.col("len") >= window.first_runs)["block"]
    if enough.is_empty():
        return own, own.clear()
    return own.filter(pl.col("block") <= enough[0]), own.filter(pl.col("block") > enough[0])


def _typed(measure: Measure) -> str:
    return measure.value if measure.kind == "mix" else f"({measure.value})::DOUBLE"


def _labels(ask: Ask, window: Window, first: Any) -> tuple[pl.DataFrame, pl.DataFrame]:
    columns = (
        f"epoch_us(given_at) // {window.block_us} AS block, hash(who) AS cluster, false AS is_session, "
        f"({measures([LABELS])[0].value})::DOUBLE AS {LABELS}"
    )
    own = labels(ask, window, columns, own=True)
    if window.first_runs:
        return own.filter(pl.col("block") < first), own.filter(pl.col("block") >= first)
    return labels(ask, window, columns, own=False), own


# ---- one measure


def series_of(measure: Measure, baseline: Sample, stream: Sample, limits: Limits) -> list[Series]:
    """What is watched of a measure; its evidence is the mean over these."""
    if measure.kind == "rate":
        reference = sequential.reference(baseline.blocks(baseline.values))
        return [Series(measure.name, reference, stream.blocks(stream.values), limits.rate)]
    if measure.kind == "mix":
        return _routes(baseline, stream, limits.mix)
    found, ordered = [], np.sort(baseline.values)
    for level in QUANTILES:
        if len(ordered) * (1 - level) < _IN_TAIL and level != QUANTILES[0]:
            continue
        edge = float(ordered[math.ceil(level * len(ordered)) - 1])
        reference = sequential.reference(baseline.blocks(baseline.values > edge))
        found.append(Series(f"p{100 * level:g}", reference, stream.blocks(stream.values > edge * limits.ratio)))
    return found


def _routes(baseline: Sample, stream: Sample, floor: float) -> list[Series]:
    names, counts = np.unique(baseline.values.astype(str), return_counts=True)
    common = names[counts >= _RARE * counts.sum()]
    found = []
    for name in [*common, None]:
        then, now = (
            (s.values == name) if name is not None else ~np.isin(s.values.astype(str), common)
            for s in (baseline, stream)
        )
        for sign, word in ((1, "to"), (-1, "not to")):
            if sign < 0 and then.mean() <= floor:
                continue  # it cannot lose as much
            reference = sequential.reference(baseline.blocks(then if sign > 0 else ~then))
            label = f"{word} {name if name is not None else 'other routes'}"
            found.append(Series(label, reference, stream.blocks(now if sign > 0 else ~now), floor))
    return found


def _unknown(measure: Measure, runs: int) -> str:
    if measure.name == LABELS:
        return f"{runs:,} runs, none with a label yet"
    mend = "; add the price of its models to agentkit.toml" if measure.name == "cost" else ""
    return f"{runs:,} runs, none with a known {measure.name}{mend}"


def _look(
    measure: Measure, baseline: Sample, stream: Sample, runs: int, window: Window, limits: Limits, threshold: float
) -> tuple[Finding, Trace | None]:
    counts: dict[str, Any] = {"baseline_runs": len(baseline.values), "runs": len(stream.values)}
    if len(baseline.values) < FEWEST or not len(stream.values):
        why = (
            _unknown(measure, runs) if len(baseline.values) >= FEWEST else f"fewer than {FEWEST} known in the baseline"
        )
        return Finding(measure.name, measure.kind, "not watched", why, **counts), None
    series = series_of(measure, baseline, stream, limits)
    episodes, evidence = sequential.watch(series, threshold)
    last = episodes[-1] if episodes else None
    is_open = last is not None and last.recovered is None
    leading = last.series if last is not None else _strongest(series)
    start = last.onset if last is not None and is_open else 0
    at = series[0].stream.at
    alarms = tuple(
        Alarm(
            window.time(int(at[e.onset])).isoformat(),
            window.time(int(at[e.alarm]) + 1).isoformat(),
            None if e.recovered is None else window.time(int(at[e.recovered]) + 1).isoformat(),
        )
        for e in episodes
    )
    figures = _amounts if measure.kind == "amount" else _shares
    state: State = "degraded" if is_open else "recovered" if episodes else "ok"
    finding = Finding(
        measure.name,
        measure.kind,
        state,
        evidence=float(evidence[-1]) / math.log(10),
        needed=threshold / math.log(10),
        dispersion=series[leading].baseline.dispersion,
        alarms=alarms,
        **counts,
        **figures(measure, series[leading], baseline, stream, start, limits.alpha),
    )
    return finding, Trace([window.time(int(b)) for b in at], series[leading], evidence / math.log(10))


def _strongest(series: Sequence[Series]) -> int:
    return int(np.argmax([sequential.against(s.baseline, s.stream, s.floor).evidence[-1] for s in series]))


def _shares(
    measure: Measure, series: Series, baseline: Sample, stream: Sample, start: int, alpha: float
) -> dict[str, Any]:
    now = series.stream.since(start)
    share, phi = sequential.weights(start + 1)[-1], series.baseline.dispersion
    k, n = float(now.sums.sum()), float(now.sizes.sum())
    low, high = sequential.confidence_sequence(k / phi, n / phi, alpha * share / 2)
    then = series.baseline.interval(alpha / 2)
    return {
        "what": f"share of runs: {series.name}" if measure.kind == "mix" else "share of runs",
        "baseline": series.baseline.rate,
        "now": k / n,
        "effect": k / n - series.baseline.rate,
        "low": float(low) - then[1],
        "high": float(high) - then[0],
    }


def _amounts(
    measure: Measure, series: Series, baseline: Sample, stream: Sample, start: int, alpha: float
) -> dict[str, Any]:
    level, phi = float(series.name[1:]) / 100, series.baseline.dispersion
    share = sequential.weights(start + 1)[-1]
    first = series.stream.at[start]
    now = np.sort(stream.values[stream.block >= first])
    size = float(series.stream.since(start).sizes.sum())
    then = np.sort(baseline.values)
    before = _quantile(then, level), _bounds(then, level, series.baseline.observations / phi, alpha / 2)
    after = _quantile(now, level), _bounds(now, level, size / phi, alpha * share / 2)
    return {
        "what": f"{series.name}{f' in {measure.unit}' if measure.unit else ''}",
        "baseline": before[0],
        "now": after[0],
        "effect": _ratio(after[0], before[0]),
        "low": _ratio(after[1][0], before[1][1]),
        "high": _ratio(after[1][1], before[1][0]),
    }


def _quantile(ordered: Any, share: float) -> float:
    return float(ordered[min(max(math.ceil(share * len(ordered)) - 1, 0), len(ordered) - 1)])


def _bounds(ordered: Any, level: float, size: float, alpha: float) -> tuple[float, float]:
    low, high = sequential.quantile_ranks(level, size, alpha)
    return (_quantile(ordered, low) if low > 0 else 0.0), (_quantile(ordered, high) if high <= 1 else math.inf)


def _ratio(a: float, b: float) -> float | None:
    return a / b if b > 0 and math.isfinite(a / b) else None
