"""An evaluation as a comment on a pull request: verdict, changed cases, cost. GitHub-flavoured Markdown.

Ids, rules and names are written by whoever opened the pull request, and posted under the name of a bot: they are shown
as what they are, never read as Markdown or HTML. The texts of cases are not shown at all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl

from agentkit_pipelines import report
from agentkit_pipelines.gate import RuleResult, Status, Verdict
from agentkit_pipelines.recording import PRODUCTION_RESULTS, Evaluation

IDS_SHOWN = 20
ROWS_SHOWN = 25  # of a table; a comment on GitHub holds 65,536 characters
_MEANING = {
    "pass": "every blocking rule is proven met",
    "fail": "a blocking rule is proven broken",
    "inconclusive": "no blocking rule is proven broken, but not every one is proven met",
}
_UNTESTED: dict[Status, str] = {
    "not_exercised": "not exercised by the model in use",
    "not_applicable": "not compared, since there is no other version in production",
}
_COSTS = {
    "cost_usd": "USD per run",
    "cost_per_success": "USD per success",
    "tokens_in": "tokens in per run",
    "tokens_out": "tokens out per run",
}
_Figures = dict[tuple[str, str | None], dict[str, Any]]


def write(done: Evaluation, path: Path) -> None:
    """Write the report of an evaluation that was judged."""
    assert done.verdict is not None
    kept = done.folder / PRODUCTION_RESULTS
    text = render(
        done.verdict,
        done.results,
        pl.read_parquet(kept) if done.production and kept.is_file() else None,
        version=f"{done.version}, release {done.version.release_id[:12]}",
        against=f"{done.production}, release {done.production.release_id[:12]}" if done.production else None,
        attempts=done.attempts,
        exercised=done.evidence["exercised"],
    )
    path.write_text(text, encoding="utf-8")


def render(
    verdict: Verdict,
    results: pl.DataFrame,
    production: pl.DataFrame | None,
    *,
    version: str,
    against: str | None,
    attempts: int,
    exercised: Collection[str],
) -> str:
    """The report: what the gate says, figures, changed cases and costs beside production's; differences are new minus
    production.

    Args:
        results: one row per case and repeat, columns as `evaluation.evaluate` returns them.
        production: the same of the version in production, on the same cases and repeats; None if there is none.
        version, against: the two versions as people know them, with their release ids.
        attempts: how often the system was evaluated on this golden set, this time included.
        exercised: the families, of "cost" and "latency", that the model in use gives real figures for.
    """
    now = _figures(results)
    before = None if production is None else _figures(production)
    compared = f" against {_code(against)}" if against is not None and production is not None else ""
    cases, repeats = results["case_id"].n_unique(), results["repeat"].n_unique()
    parts = [
        f"### {report.SYMBOL[verdict.verdict]} Gate: {verdict.verdict}",
        f"{_code(version)}{compared}: {_MEANING[verdict.verdict]}. {cases:,} cases × {repeats} repeats, attempt "
        f"{attempts} of this system on this golden set.",
        *_rules(verdict),
        "#### Figures",
        _qualities(results, now, before, exercised),
        "#### Changed cases",
        _changes(results, production),
        "#### Cost",
        *_costs(now, before, exercised),
    ]
    return "\n\n".join(parts) + "\n"


def _rules(verdict: Verdict) -> Iterator[str]:
    for title, level in (("Blocking rules that are not passed", "block"), ("Warnings", "warn")):
        if missed := [r for r in verdict.rules if r.level == level and r.status in ("fail", "inconclusive")]:
            # What is proven broken comes first, in case not all are shown.
            missed.sort(key=lambda r: r.status != "fail")
            yield f"#### {title}"
            yield _table(("", "rule", "what was found"), map(_rule, missed))
    blocking = [r for r in verdict.rules if r.level == "block"]
    lines = [
        f"- {report.SYMBOL['pass']} {sum(r.status == 'pass' for r in blocking)} of {len(blocking)} blocking rules passed"
    ]
    for status, reason in _UNTESTED.items():
        if untested := [r.id for r in blocking if r.status == status]:
            lines.append(f"- {report.SYMBOL[status]} {len(untested)} {reason}: {_codes(untested)}")
    yield "\n".join(lines)


def _rule(rule: RuleResult) -> tuple[str, str, str]:
    return report.SYMBOL[rule.status], _code(rule.id), _plain(rule.text)


# ---- figures


def _figures(results: pl.DataFrame) -> _Figures:
    return {(row["metric"], row["group"]): row for row in report.summarise(results).iter_rows(named=True)}


def _qualities(results: pl.DataFrame, now: _Figures, before: _Figures | None, exercised: Collection[str]) -> str:
    """A table of what is no cost: figures with intervals, beside production's."""
    shown = {*report.metric_names(results), "task_failure", "escalated"}
    shown |= {"latency_p50", "latency_p95"} if "latency" in exercised else set()
    rows = []
    for key in sorted((key for key in now if key[0] in shown), key=lambda key: key[1] is not None):
        row = now[key]
        unit = row["unit"]
        cells = [_name(*key), _number(row["estimate"], unit), _interval(row["low"], row["high"])]
        if before is not None:
            old = before[key]["estimate"] if key in before else None
            cells += [_number(old, unit), _difference(row["estimate"], old)]
        rows.append(cells)
    return _table(("figure", "this version", "95 % interval", *(("production", "difference") if before else ())), rows)


def _name(metric: str, group: str | None) -> str:
    return _code(metric) + (f" · {_code(group)}" if group is not None else "")


def _costs(now: _Figures, before: _Figures | None, exercised: Collection[str]) -> Iterator[str]:
    spent = [side["cost_usd", None]["estimate"] for side in (now, before) if side is not None]
    is_free = "cost" not in exercised and not any(spent)
    rows = []
    for metric, name in _COSTS.items():
        if is_free and "USD" in name:
            continue
        cells, new = [name], now[metric, None]["estimate"]
        cells.append(_number(new))
        if before is not None:
            old = before[metric, None]["estimate"]
            share = f" ({new / old - 1:+.1%})" if new and old and new != old else ""
            cells += [_number(old), _difference(new, old) + share]
        rows.append(cells)
    yield _table(("cost", "this version", *(("production", "difference") if before else ())), rows)
    if is_free:
        yield "No USD to compare: a free in-process model does not exercise cost."


def _interval(low: float | None, high: float | None) -> str:
    """Too few cases leave a side open, as that of a 95th percentile."""
    if low is None and high is None:
        return "–"
    return f"{'−∞' if low is None else _number(low)} to {'∞' if high is None else _number(high)}"


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "–"
    # Three digits; no exponents, which nobody reads dollars in.
    digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{Decimal(f'{value:.3g}'):f}"
    return f"{digits} {unit}".rstrip()


def _difference(now: float | None, before: float | None) -> str:
    """New minus production."""
    if now is None or before is None:
        return "–"
    sign = "+" if now > before else "−" if now < before else ""
    return sign + _number(abs(now - before))


# ---- cases


def _changes(results: pl.DataFrame, production: pl.DataFrame | None) -> str:
    if production is None:
        return "Nothing to compare with: there is no other version in production."
    both = report.success_by_case(results, production).with_columns(change=pl.col("now") - pl.col("before"))
    counts = report.changed_cases(results, production)
    lines = [
        f"By mean success over the repeats: {counts['better']:,} better, {counts['worse']:,} worse, "
        f"{counts['same']:,} the same."
    ]
    if unknown := len(both) - sum(counts.values()):
        lines[0] += f" {unknown:,} unknown: the success metric crashed."
    for word, changed in (("worse", both.filter(pl.col("change") < 0)), ("better", both.filter(pl.col("change") > 0))):
        if len(changed):  # the largest change first
            ids = changed.sort(pl.col("change").abs(), "case_id", descending=[True, False])["case_id"]
            lines.append(f"- {word}: {_codes(ids.to_list())}")
    return "\n".join(lines)


# ---- Markdown


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of finished cells; only their pipes are left to escape."""
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in [head, *rows]]
    lines.insert(1, "|" + "---|" * len(head))
    if (more := len(lines) - 2 - ROWS_SHOWN) > 0:
        lines[-more:] = ["", f"… and {more:,} more; all are in the MLflow run."]
    return "\n".join(lines)


def _codes(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - IDS_SHOWN:,} more" if len(texts) > IDS_SHOWN else ""
    return ", ".join(map(_code, texts[:IDS_SHOWN])) + more


def _code(text: str) -> str:
    """A code span, inside which nothing has a meaning; its fence is longer than any run of backticks in the text."""
    text = _one_line(text, 80)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if "`" in text or not text else ""
    return f"{fence}{space}{text}{space}{fence}"


def _plain(text: str) -> str:
    """A sentence without markup, links, formulas or emoji; nobody is mentioned and no issue is referred to."""
    text = re.sub(r"([\\`*_~\[\]<>&$!]|:(?=\S)|(?<=www)\.)", r"\\\1", _one_line(text, 400), flags=re.IGNORECASE)
    return re.sub(r"([@#])(?=\w)", "\\1\N{WORD JOINER}", text)


def _one_line(text: str, limit: int) -> str:
    """Printable characters in one line: no control characters, none that turn the direction of writing."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"
