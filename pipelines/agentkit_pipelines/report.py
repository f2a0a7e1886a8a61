"""What an evaluation says, as a frame of figures with 95 % intervals and as plots. Aggregates only, no case is shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from agentkit_pipelines import stats
from agentkit_pipelines.evaluation import RESULT_COLUMNS
from agentkit_pipelines.gate import RuleResult, Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIDENCE = 0.95
PHASES = ("planning_s", "execution_s", "reflection_s")
SYMBOL = {"pass": "✓", "fail": "✗", "inconclusive": "?", "not_applicable": "–", "not_exercised": "○"}


def metric_names(results: pl.DataFrame) -> list[str]:
    """The columns of the system's own metrics, success first."""
    return [c for c in results.columns if c not in RESULT_COLUMNS]


def summarise(results: pl.DataFrame) -> pl.DataFrame:
    """Figures of an evaluation.

    Returns:
        Rows metric, group (task type or null), estimate, low, high (two-sided 95 % interval, null where there is
        none), unit and cases. `spread` is the standard deviation of the success rate over repeats.
    """
    rows = [_share(results, "success")]
    types = results["task_type"].unique().sort().to_list()
    rows += [_share(results.filter(pl.col("task_type") == t), "success", t) for t in types]
    for name in metric_names(results)[1:]:
        if results[name].dtype == pl.Boolean:
            rows.append(_share(results, name))
        elif results[name].dtype.is_numeric():
            rows.append(_mean(results, name, ""))
    rows += [_share(results, "task_failure"), _share(results, "escalated")]
    rows.append(_cost_per_success(results))
    rows += [_quantile(results, c, q) for c in ("latency_s", *PHASES) for q in (0.5, 0.95)]
    rows += [_mean(results, c, unit) for c, unit in (("cost_usd", "USD"), ("tokens_in", ""), ("tokens_out", ""))]
    rows += _calibration(results)
    by_repeat = results.group_by("repeat").agg(pl.col("success").mean())["success"].to_numpy()
    spread = np.std(by_repeat, ddof=1) if len(by_repeat) > 1 else None
    rows.append(_row("spread", None, spread, None, None, "", results))
    schema = {"metric": pl.String, "group": pl.String, "estimate": pl.Float64, "low": pl.Float64, "high": pl.Float64}
    return pl.DataFrame(rows, schema_overrides=schema)


def _row(
    metric: str, group: str | None, estimate: Any, low: Any, high: Any, unit: str, results: pl.DataFrame
) -> dict[str, Any]:
    def number(x: Any) -> float | None:
        return None if x is None or not np.isfinite(x) else float(x)

    return {
        "metric": metric,
        "group": group,
        "estimate": number(estimate),
        "low": number(low),
        "high": number(high),
        "unit": unit,
        "cases": results["case_id"].n_unique(),
    }


def _known(results: pl.DataFrame, name: str) -> tuple[Any, Any]:
    known = results.filter(pl.col(name).is_not_null())
    return known[name].cast(pl.Float64).to_numpy(), known["case_id"].to_numpy()


def _interval(metric: str, group: str | None, evidence: Any, unit: str, results: pl.DataFrame) -> dict[str, Any]:
    low, high = stats.interval(evidence, CONFIDENCE)
    return _row(metric, group, evidence.estimate, low, high, unit, results)


def _share(results: pl.DataFrame, name: str, group: str | None = None) -> dict[str, Any]:
    values, cases = _known(results, name)
    if not len(values):
        return _row(name, group, None, None, None, "", results)
    return _interval(name, group, stats.proportion(*stats.per_case(values, cases)), "", results)


def _mean(results: pl.DataFrame, name: str, unit: str) -> dict[str, Any]:
    values, cases = _known(results, name)
    if not len(values):
        return _row(name, None, None, None, None, unit, results)
    return _interval(name, None, stats.mean(*stats.per_case(values, cases)), unit, results)


def _quantile(results: pl.DataFrame, name: str, level: float) -> dict[str, Any]:
    evidence = stats.quantile(results[name].to_numpy(), results["case_id"].to_numpy(), level)
    return _interval(f"{name.removesuffix('_s')}_p{level * 100:g}", None, evidence, "s", results)


def _cost_per_success(results: pl.DataFrame) -> dict[str, Any]:
    known = results.filter(pl.col("success").is_not_null())
    name = "cost_per_success"
    if not known["success"].sum():
        return _row(name, None, None, None, None, "USD", results)
    cases = known["case_id"].to_numpy()
    cost, counts = stats.per_case(known["cost_usd"].to_numpy(), cases)
    success, _ = stats.per_case(known["success"].cast(pl.Float64).to_numpy(), cases)
    return _interval(name, None, stats.ratio(cost, success, counts), "USD", results)


def _calibration(results: pl.DataFrame) -> list[dict[str, Any]]:
    known = results.filter(pl.col("confidence").is_not_null() & pl.col("success").is_not_null())
    if known.is_empty():
        return []
    found = stats.calibration(known["confidence"].to_numpy(), known["success"].cast(pl.Float64).to_numpy())
    return [
        _row("calibration_error", None, found.error, None, None, "", results),
        _row("brier_score", None, found.brier, None, None, "", results),
    ]


def as_metrics(summary: pl.DataFrame) -> dict[str, float]:
    """The summary as MLflow metrics: `success`, `success/refund`, `success.low`, …"""
    found = {}
    for row in summary.iter_rows(named=True):
        key = row["metric"] + (f"/{row['group']}" if row["group"] else "")
        for suffix, column in (("", "estimate"), (".low", "low"), (".high", "high")):
            if row[column] is not None:
                found[key + suffix] = row[column]
    return found


def success_by_case(results: pl.DataFrame, production: pl.DataFrame) -> pl.DataFrame:
    """Each case that both have, by id: `now` and `before`, its mean success over repeats; null where it is unknown."""
    now, before = (
        frame.group_by("case_id").agg(pl.col("success").mean().alias(name))
        for frame, name in ((results, "now"), (production, "before"))
    )
    return now.join(before, on="case_id").sort("case_id")


def changed_cases(results: pl.DataFrame, production: pl.DataFrame) -> dict[str, int]:
    """How many cases got better and worse than production, by their mean success over repeats."""
    both = success_by_case(results, production)
    return {
        "better": int((both["now"] > both["before"]).sum()),
        "worse": int((both["now"] < both["before"]).sum()),
        "same": int((both["now"] == both["before"]).sum()),
    }


def verdict_table(verdict: Verdict) -> pl.DataFrame:
    """One row per rule, for people."""
    return pl.DataFrame(
        [
            {
                "": SYMBOL[r.status],
                "rule": r.id,
                "status": r.status.replace("_", " "),
                "level": r.level,
                "what was found": r.text,
            }
            for r in verdict.rules
        ]
    )


def verdict_text(verdict: Verdict, attempts: int | None = None) -> str:
    """The verdict as headings and lists, which is all the Markdown that the MLflow UI shows."""
    lines = [f"### Gate: {verdict.verdict}"]
    if attempts is not None:
        lines.append(f"\nAttempt {attempts} of this system on this golden set.")
    for title, chosen in (
        ("Blocking", [r for r in verdict.rules if r.level == "block" and r.status in ("fail", "inconclusive")]),
        ("Passed", [r for r in verdict.rules if r.status == "pass"]),
        ("Warnings", [r for r in verdict.rules if r.level == "warn" and r.status in ("fail", "inconclusive")]),
        ("Not tested", [r for r in verdict.rules if r.status in ("not_applicable", "not_exercised")]),
    ):
        if chosen:
            lines += [f"\n#### {title}\n", *(_line(r) for r in chosen)]
    return "\n".join(lines) + "\n"


def _line(rule: RuleResult) -> str:
    return f"- {SYMBOL[rule.status]} {rule.text}"


# ---- plots


def plots(results: pl.DataFrame) -> dict[str, Figure]:
    """Figures by file name: success by task type, latency by phase, calibration."""
    figures = {"success": _plot_success(summarise(results)), "latency": _plot_latency(results)}
    if results["confidence"].is_not_null().any():
        figures["calibration"] = _plot_calibration(results)
    return figures


def _figure(title: str) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plot_success(summary: pl.DataFrame) -> Figure:
    rows = summary.filter(pl.col("metric") == "success")
    figure, axes = _figure("Success with 95 % interval")
    names = [g or "overall" for g in rows["group"]]
    estimate, low, high = (rows[c].to_numpy() for c in ("estimate", "low", "high"))
    axes.barh(names, estimate, color=["#2b5c8a"] + ["#7fa6c9"] * (len(names) - 1))
    errors = np.maximum([estimate - low, high - estimate], 0)  # at 0 and 1 rounding may turn them negative
    axes.errorbar(estimate, names, xerr=errors, fmt="none", ecolor="#222", capsize=3)
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    return figure


def _plot_latency(results: pl.DataFrame) -> Figure:
    figure, axes = _figure("Latency by phase, seconds (box: quartiles, whiskers: 5th and 95th percentile)")
    names = [*PHASES, "latency_s"]
    axes.boxplot(
        [results[n].to_numpy() for n in names], orientation="horizontal", whis=(5, 95), showfliers=False, widths=0.6
    )
    axes.set_yticks(range(1, len(names) + 1), [n.removesuffix("_s") for n in names])
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    return figure


def _plot_calibration(results: pl.DataFrame) -> Figure:
    known = results.filter(pl.col("confidence").is_not_null() & pl.col("success").is_not_null()).sort("confidence")
    figure, axes = _figure("Stated confidence against success (tenths of equal size)")
    bins = np.array_split(np.arange(len(known)), min(10, len(known)))
    stated = [float(known["confidence"].to_numpy()[b].mean()) for b in bins]
    happened = [float(known["success"].cast(pl.Float64).to_numpy()[b].mean()) for b in bins]
    axes.plot([0, 1], [0, 1], color="#999", linewidth=1)
    axes.plot(stated, happened, "o-", color="#2b5c8a")
    axes.set_xlabel("confidence")
    axes.set_ylabel("success")
    return figure


def save_plots(results: pl.DataFrame, folder: Path) -> list[Path]:
    """Write the plots as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in plots(results).items():
        figure.savefig(folder / f"{name}.png", dpi=110)
        paths.append(folder / f"{name}.png")
    return paths
