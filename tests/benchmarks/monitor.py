"""How often the monitor cries wolf, and how soon it sees what is there: simulated traffic, an hourly look.

    python tests/benchmarks/monitor.py --streams 2000 --processes 2        # all tables, about half an hour of two cores
    python tests/benchmarks/monitor.py delays --streams 200

`false`: one measure at its whole alpha and without any floor, the strictest case; `drift`: failures whose level drifts beyond
the null; `service`: all measures together as they are by default; `delays`: planted regressions; `speed`: one look at a long log. A naive test beside it repeats a fixed-sample one
(two proportions; Welch's t on logarithms) at every look.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import polars as pl
import streams
from scipy.special import ndtr

from agentkit_pipelines import monitor, sequential
from agentkit_pipelines.monitor import Limits

LOOKS, MEASURES = 500, 9
ALPHA = 0.01
WIDE_FLOOR = Limits(alpha=ALPHA, rate=0.03)
NO_FLOOR = Limits(alpha=ALPHA, rate=0.0, ratio=1.0, mix=0.0)


def evidence(name: str, baseline: pl.DataFrame, stream: pl.DataFrame, limits: Limits) -> Any:
    """By block of the stream, of one measure; and the blocks."""
    (measure,) = monitor.measures([name])
    series = monitor.series_of(measure, *monitor.pair(baseline, stream, name), limits)
    each = np.stack([sequential.against(s.baseline, s.stream, s.floor).evidence for s in series])
    return series[0].stream.at, np.log(np.exp(each).mean(0))


def naive(name: str, baseline: pl.DataFrame, stream: pl.DataFrame) -> Any:
    """One-sided p-value at every block, of all runs until then against the baseline; and the blocks."""
    values = {False: lambda f: f[name].to_numpy(), True: lambda f: np.log(f[name].to_numpy())}[name != "failure"]
    then, now = values(baseline), values(stream)
    at, place = np.unique(stream["block"].to_numpy(), return_inverse=True)
    n, total, square = (np.cumsum(np.bincount(place, w)) for w in (np.ones(len(now)), now, now**2))
    if name == "failure":
        pooled = (total + then.sum()) / (n + len(then))
        spread = pooled * (1 - pooled) * (1 / n + 1 / len(then))
    else:
        spread = np.maximum(square / n - (total / n) ** 2, 0) / np.maximum(n - 1, 1) + then.var(ddof=1) / len(then)
    z = (total / n - then.mean()) / np.sqrt(np.maximum(spread, 1e-12))
    return at, np.where(n > 30, 1 - ndtr(z), 1.0)


# ---- false alarms


def quiet(job: tuple[str, int, int]) -> list[bool]:
    """Whether there was an alarm in one stream without a change: failures, costs; the naive test on each."""
    traffic, hours, seed = job
    rng = np.random.default_rng([seed, hours])
    made = streams.users(seed=seed) if traffic == "returning users" else streams.TRAFFIC[traffic]
    baseline, stream = made.runs(rng, 0, hours), made.runs(rng, hours, LOOKS).filter(pl.col("block") < hours + LOOKS)
    names = ("failure", "cost")
    found = [evidence(name, baseline, stream, NO_FLOOR)[1].max() >= -math.log(ALPHA) for name in names]
    return [*map(bool, found), *(bool(naive(name, baseline, stream)[1].min() < ALPHA) for name in names)]


def false_alarms(pool: Any, count: int) -> None:
    print(f"\nFalse alarms, {count:,} streams × {LOOKS} hourly looks, alpha {ALPHA:.0%} for one measure, no floor")
    print("| traffic | baseline, hours | failure | cost | naive: failure | naive: cost |\n|---|---|---|---|---|---|")
    for traffic in streams.TRAFFIC:
        for hours in (168, 12):
            rows = np.array(list(pool.map(quiet, [(traffic, hours, s) for s in range(count)], chunksize=20)))
            print(f"| {traffic} | {hours} | " + " | ".join(f"{100 * x:.2f} %" for x in rows.mean(0)) + " |", flush=True)


def drifted(job: tuple[str, int, int]) -> list[bool]:
    """Whether there was an alarm in one stream whose level drifts as the baseline's did, with each of the floors below."""
    drift, hours, seed = job
    rng, made = np.random.default_rng([seed, hours]), streams.drifting(*streams.DRIFTS[drift], seed)
    baseline, stream = made.runs(rng, 0, hours), made.runs(rng, hours, LOOKS)
    return [
        bool(evidence("failure", baseline, stream, limits)[1].max() >= math.log(number / ALPHA))
        for limits, number in ((Limits(alpha=ALPHA), MEASURES), (WIDE_FLOOR, MEASURES), (NO_FLOOR, 1))
    ]


def drifts(pool: Any, count: int) -> None:
    print(f"\nAlarms where failures drift, {count:,} streams × {LOOKS} hourly looks, alpha {ALPHA:.0%}")
    print(
        "| level | baseline, hours | floor 1 point, one of nine measures | 3 points | none, alone |\n|---|---|---|---|---|"
    )
    for drift in streams.DRIFTS:
        for hours in (672, 168):
            rows = np.array(list(pool.map(drifted, [(drift, hours, s) for s in range(count)], chunksize=20)))
            print(f"| {drift} | {hours} | " + " | ".join(f"{100 * x:.1f} %" for x in rows.mean(0)) + " |", flush=True)


def service(rng: np.random.Generator, first: int, hours: int) -> pl.DataFrame:
    """All measures of a service, sessions of several runs, day and night."""
    at, who, factor = streams.sessions().shape(rng, np.arange(first, first + hours))
    n, wave = len(at), 1 + 0.3 * np.sin(2 * np.pi * at / 24)

    def rate(p: float) -> Any:
        return (rng.random(n) < p * factor).astype(float)

    columns = {"failure": 0.05, "escalation": 0.08, "refusal": 0.005, "lesser_result": 0.02, "not_accepted": 0.15}
    return pl.DataFrame({
        "block": at, "cluster": who, "is_session": np.ones(n, bool), **{name: rate(p) for name, p in columns.items()},
        "cost": rng.lognormal(-5, 1, n), "latency": wave * rng.lognormal(0.5, 0.6, n),
        "model_calls": 1.0 + rng.poisson(2, n), "route": rng.choice(["billing", "technical", "general"], n, p=[0.5, 0.3, 0.2]),
    })  # fmt: skip


def quiet_service(seed: int) -> list[bool]:
    rng = np.random.default_rng(seed)
    baseline, stream = service(rng, 0, 336), service(rng, 336, LOOKS)
    names = [m.name for m in monitor.MEASURES]
    strict = [evidence(name, baseline, stream, NO_FLOOR)[1].max() for name in names]
    threshold = math.log(MEASURES / ALPHA)
    rates = [n for n in names if n not in ("cost", "latency", "model_calls", "route")]
    by_naive = [naive("failure", *(f.select("block", failure=n) for f in (baseline, stream)))[1].min() for n in rates]
    by_naive += [naive(n, baseline, stream)[1].min() for n in ("cost", "latency")]
    return [max(strict) >= threshold, min(by_naive) < ALPHA, min(by_naive) < ALPHA / len(by_naive)]


def whole_service(pool: Any, count: int) -> None:
    rows = np.array(list(pool.map(quiet_service, range(count), chunksize=10)))
    shares = ", ".join(
        f"{w} {100 * x:.2f} %" for w, x in zip(("monitor", "naive", "naive with Bonferroni"), rows.mean(0), strict=True)
    )
    print(
        f"\nAny false alarm of nine measures without floors, {count:,} streams × {LOOKS} looks, alpha {ALPHA:.0%}: {shares}"
    )


# ---- delays

SIZES = {
    "failure 5 %": [("6 %", 0.06), ("8 %", 0.08), ("12 %", 0.12), ("20 %", 0.20)],
    "cost": [("× 1.05", 1.05), ("× 1.2", 1.2), ("× 1.5", 1.5), ("× 2", 2.0)],
    "latency": [("× 1.05", 1.05), ("× 1.2", 1.2), ("× 1.5", 1.5), ("× 2", 2.0)],
}
SPREAD = {"cost": 1.0, "latency": 0.5}  # of the logarithm


def delayed(job: tuple[str, float, int, float, int, float]) -> list[float]:
    """Runs and looks from the onset to the alarm; of the monitor and of the naive test. Infinite where there was none."""
    what, size, onset, floors, seed, per_hour = job
    rng, name = np.random.default_rng([seed, onset]), what.split()[0]
    made = streams.independent(per_hour)
    options: dict[str, Any] = {"failures": size} if name == "failure" else {}
    baseline, stream = made.runs(rng, 0, 672), made.runs(rng, 672, onset + LOOKS, onset=onset, **options)
    if name != "failure":
        late = (stream["block"] >= 672 + onset).to_numpy()
        spread = SPREAD[name]
        baseline = baseline.with_columns(pl.Series(name, rng.lognormal(0, spread, len(baseline))))
        drawn = rng.lognormal(0, spread, len(stream)) * np.where(late, size, 1.0)
        stream = stream.with_columns(pl.Series(name, drawn))
    limits = Limits(alpha=ALPHA) if floors else NO_FLOOR
    found: list[float] = []
    for at, hit in (
        (lambda at, e: (at, e >= math.log(MEASURES / ALPHA)))(*evidence(name, baseline, stream, limits)),
        (lambda at, p: (at, p < ALPHA))(*naive(name, baseline, stream)),
    ):
        hit = hit & (at >= 672 + onset)
        if not hit.any():
            found += [math.inf, math.inf]
            continue
        alarm = int(at[np.argmax(hit)])
        runs = len(stream.filter((pl.col("block") >= 672 + onset) & (pl.col("block") <= alarm)))
        found += [runs, alarm - 672 - onset + 1]
    return found


def delays(pool: Any, count: int) -> None:
    print(
        f"\nDelay in runs (looks): median, 90th percentile; {count} streams of 20 runs an hour, nine measures watched, alpha "
        f"{ALPHA:.0%}, baseline 672 hours; – : not within {LOOKS} looks\n"
    )
    print(
        "| planted | floor | at the start | | after 250 hours | | naive, after 250 hours |\n|---|---|---|---|---|---|---|"
    )
    for what, sizes in SIZES.items():
        for nth, (label, size) in enumerate(sizes):
            for floors in (1.0, 0.0) if nth < 2 else (1.0,):
                _row(pool, count, f"{what} {label}", (what, size), floors)
    for nth, floors in ((0, 0.0), (1, 1.0)):
        label, size = SIZES["failure 5 %"][nth]
        _row(pool, count // 3, f"failure 5 % {label}, 200 runs an hour", ("failure 5 %", size), floors, 200.0)


def _row(pool: Any, count: int, label: str, planted: tuple[str, float], floors: float, per_hour: float = 20.0) -> None:
    cells = []
    for onset in (0, 250):
        jobs = [(*planted, onset, floors, seed, per_hour) for seed in range(count)]
        rows = np.array(list(pool.map(delayed, jobs, chunksize=5)))
        cells += [_both(rows, q) for q in (0.5, 0.9)]
    naively = _both(rows[:, 2:], 0.5)
    print(f"| {label} | {'default' if floors else 'none'} | {' | '.join(cells)} | {naively} |", flush=True)


def _both(rows: Any, share: float) -> str:
    runs, looks = (np.quantile(rows[:, i], share, method="higher") for i in (0, 1))
    return f"{runs:,.0f} ({looks:.0f})" if math.isfinite(runs) else "–"


# ---- speed


def speed(runs: int) -> None:
    from log_data import END, fill

    from agentkit_pipelines import monitor_window

    with tempfile.TemporaryDirectory() as folder:
        os.environ["AGENTKIT_HOME"] = folder
        log = fill(Path(folder) / "log", runs=runs)
        began = time.perf_counter()
        window = monitor_window.choose(log, "support_triage", until=END.isoformat())
        chosen = time.perf_counter()
        report = monitor.examine(log, window)
        done = time.perf_counter()
    seen = max(f.runs + f.baseline_runs for f in report.findings)
    print(
        f"\n{runs:,} runs in the log, {seen:,} of them compared: window {chosen - began:.1f} s, look {done - chosen:.1f} s"
    )


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["false", "drift", "service", "delays", "speed"])
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--runs", type=int, default=1_000_000, help="of the log for `speed`")
    given = parser.parse_args(arguments)
    with ProcessPoolExecutor(given.processes) as pool:
        if "false" in given.what:
            false_alarms(pool, given.streams)
        if "drift" in given.what:
            drifts(pool, given.streams)
        if "service" in given.what:
            whole_service(pool, given.streams)
        if "delays" in given.what:
            delays(pool, min(given.streams, 300))
    if "speed" in given.what:
        speed(given.runs)


if __name__ == "__main__":
    main()
