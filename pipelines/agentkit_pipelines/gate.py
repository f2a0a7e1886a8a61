"""The gate: does the evidence clear the thresholds?

Three verdicts. `pass`: every blocking rule is proven at the stated confidence, each by itself and uncorrected; that is
an intersection-union test, so the chance to promote a version that breaks any rule stays at alpha (Berger 1982,
Technometrics 24:295). `fail`: the opposite of some blocking rule is proven, after Holm's correction, since here one
false alarm among many rules would do. `inconclusive`: neither; too few cases for the asked confidence.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from agentkit_pipelines import stats
from agentkit_pipelines.thresholds import COST_PER_SUCCESS, DOLLARS, LOWER_IS_BETTER, SECONDS, Level, Rule, Thresholds

Family = Literal["cost", "latency"]
Status = Literal["pass", "fail", "inconclusive", "not_applicable", "not_exercised"]
_KEYS = ("case_id", "repeat")


class RuleResult(BaseModel):
    """What became of one rule, or of one group of a rule with `by`.

    `estimate`, `bound` and `limit` have the metric's units; of a `versus` rule they are the new version's value minus
    that in production, and the limit is minus the margin when more is better. `bound` is the one-sided bound that must
    clear the limit. Estimate and bound are None where there is none, e.g. a cost per success without a success.
    `cases_needed`, set when inconclusive: how many cases would decide if the estimate stays; None when none would.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    metric: str
    group: str | None
    level: Level
    status: Status
    estimate: float | None = None
    bound: float | None = None
    limit: float
    cases: int
    cases_needed: int | None = None
    text: str


class Verdict(BaseModel):
    """The gate's verdict and what led to it, in the order of the thresholds file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    verdict: Literal["pass", "fail", "inconclusive"]
    rules: tuple[RuleResult, ...]


def judge(
    results: pl.DataFrame, thresholds: Thresholds, production: pl.DataFrame | None, exercised: Collection[str]
) -> Verdict:
    """Judge a version by its results, one row per case and repeat.

    Columns: case_id, repeat, task_type, success, task_failure, escalated, cost_usd (USD), latency_s, planning_s,
    execution_s, reflection_s (seconds), and one per further metric, yes or no or a number, null where the metric
    crashed. `production` are the results of the version in production on the same cases and repeats, or None.
    `exercised` are the families, of "cost" and "latency", that the model in use gives real figures for.

    Raises ValueError when results are empty, have a row twice, NaN or infinity, lack the column of a rule or hold text
    in it; when those of production do, or are not of the same cases and repeats; and when a family is unknown.
    """
    if unknown := set(exercised) - set(get_args(Family)):
        raise ValueError(
            f"expected exercised families out of {', '.join(get_args(Family))}; found {', '.join(sorted(unknown))}"
        )
    new = _Table(results, "results")
    old = None if production is None else _Table(production, "production")
    if old is not None:
        new.check_same_rows(old)
    findings = [
        _look(rule, group, new, old, thresholds.confidence, exercised)
        for rule in thresholds.rules
        for group in new.groups(rule)
    ]
    rules = tuple(_settle(findings, 1 - thresholds.confidence))
    return Verdict(verdict=_verdict(rules), rules=rules)


def _verdict(rules: Iterable[RuleResult]) -> Literal["pass", "fail", "inconclusive"]:
    statuses = {r.status for r in rules if r.level == "block"} - {"not_applicable", "not_exercised"}
    if "fail" in statuses:
        return "fail"
    return "pass" if statuses == {"pass"} else "inconclusive"


class _Table:
    """Results as arrays, sorted by case and repeat so that the order of rows cannot matter."""

    def __init__(self, frame: pl.DataFrame, name: str) -> None:
        self.name = name
        if lacking := [key for key in (*_KEYS, "task_type") if key not in frame.columns]:
            raise ValueError(f"{name}: expected the columns {', '.join(lacking)}; found {', '.join(frame.columns)}")
        if frame.is_empty():
            raise ValueError(f"{name}: expected at least one row; found none")
        if nulls := [key for key in (*_KEYS, "task_type") if frame[key].null_count()]:
            raise ValueError(f"{name}: expected a value in every row of {', '.join(nulls)}; found nulls")
        if twice := len(frame) - frame.select(_KEYS).n_unique():
            raise ValueError(f"{name}: expected one row per case and repeat; found {twice} of them again")
        for column in frame.select(pl.selectors.float()):
            if odd := int((~column.is_finite()).sum()):
                raise ValueError(
                    f"{name}: expected finite numbers or null in {column.name}; found {odd} NaN or infinite"
                )
        self.frame = frame.sort(_KEYS)

    @cached_property
    def cases(self) -> NDArray[np.int64]:
        return self.frame["case_id"].rle_id().to_numpy().astype(np.int64)

    def groups(self, rule: Rule) -> list[str | None]:
        return [None] if rule.by is None else self.frame[rule.by].cast(pl.String).unique().sort().to_list()

    def rows(self, rule: Rule, group: str | None) -> NDArray[np.bool_]:
        if group is None or rule.by is None:
            return np.ones(len(self.frame), dtype=bool)
        return (self.frame[rule.by].cast(pl.String) == group).to_numpy()

    def values(self, rule: Rule, metric: str) -> NDArray[np.float64]:
        """The column of a rule's metric as numbers, NaN where the metric crashed."""
        if metric not in self.frame.columns:
            raise ValueError(
                f"{self.name}: no column for the metric {metric!r}; there are {', '.join(self.frame.columns)}"
            )
        column = self.frame[metric]
        if not (column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null)):
            raise ValueError(f"{self.name}: expected yes or no or numbers in {metric}; found {column.dtype}")
        if column.dtype == pl.Boolean and (rule.quantile or not 0 < rule.limit[1] < 1) and rule.metric == metric:
            raise ValueError(
                f"the rule {rule.id} suits numbers; {metric} is yes or no: a limit between 0 and 1, no quantile"
            )
        return column.cast(pl.Float64).to_numpy()

    def check_same_rows(self, other: _Table) -> None:
        mine, theirs = self.frame.select(_KEYS), other.frame.select(_KEYS)
        if mine.dtypes == theirs.dtypes and mine.equals(theirs):
            return
        here, there = set(mine.iter_rows()), set(theirs.iter_rows())
        if here == there:  # other integer types
            return
        raise ValueError(
            "expected the same cases and repeats in results and production; "
            f"found {len(there - here)} missing in results and {len(here - there)} missing in production"
        )


@dataclass(frozen=True, slots=True)
class _Finding:
    """A rule, or one group of it, with its evidence; without evidence, status and reason say why."""

    rule: Rule
    group: str | None
    cases: int
    confidence: float
    evidence: stats.Evidence | None
    status: Status = "inconclusive"
    reason: str = ""

    @property
    def above(self) -> bool:
        """Whether the truth must lie above the limit, not below it."""
        form, _ = self.rule.limit
        return form == "at_least" or (form == "margin" and self.rule.metric not in LOWER_IS_BETTER)

    @property
    def limit(self) -> float:
        form, number = self.rule.limit
        return -number if form == "margin" and self.above else number

    def p_pass(self, evidence: stats.Evidence) -> float:
        p = float(evidence.p_above(self.limit))
        return p if self.above else 1 - p

    def bound(self, evidence: stats.Evidence, *, opposite: bool = False) -> float:
        """The bound that must clear the limit, or the opposite one."""
        side = evidence.lower if self.above is not opposite else evidence.upper
        return float(side(self.confidence))


def _look(
    rule: Rule, group: str | None, new: _Table, old: _Table | None, confidence: float, exercised: Collection[str]
) -> _Finding:
    rows = new.rows(rule, group)
    metrics = ("cost_usd", "success") if rule.metric == COST_PER_SUCCESS else (rule.metric,)
    columns = [new.values(rule, metric)[rows] for metric in metrics]
    if rule.versus and old is not None:
        columns.append(old.values(rule, rule.metric)[rows])
    codes = new.cases[rows]
    untestable = _untestable(rule, columns, old, exercised)
    evidence = None if untestable else _evidence(rule, columns, codes)
    status, reason = untestable or ("inconclusive", "")
    return _Finding(rule, group, len(np.unique(codes)), confidence, evidence, status, reason)


def _untestable(
    rule: Rule, columns: list[NDArray[np.float64]], old: _Table | None, exercised: Collection[str]
) -> tuple[Status, str] | None:
    family = "cost" if rule.metric in DOLLARS else "latency" if rule.metric in SECONDS else None
    if family and family not in exercised:
        return "not_exercised", f"was not tested: the model in use does not exercise {family}"
    if rule.versus and old is None:
        return "not_applicable", "was not compared: there is no other version in production"
    crashed = int(np.isnan(sum(columns)).sum())
    if crashed:
        return (
            "inconclusive",
            f"is unknown: it crashed on {crashed} of {len(columns[0])} rows; mend it and evaluate again",
        )
    return None


def _evidence(rule: Rule, columns: list[NDArray[np.float64]], codes: NDArray[np.int64]) -> stats.Evidence:
    sums, counts = stats.per_case(columns[0], codes)
    if rule.metric == COST_PER_SUCCESS:
        return stats.ratio(sums, stats.per_case(columns[1], codes)[0], counts)
    if rule.quantile is not None:
        return stats.quantile(columns[0], codes, rule.quantile)
    gap = columns[0] - columns[1] if rule.versus else columns[0]
    if not _is_share(rule, columns):
        return stats.mean(stats.per_case(gap, codes)[0], counts)
    fractional = any((column % 1 != 0).any() for column in columns)
    if not rule.versus:
        return stats.proportion(sums, counts, fractional=fractional)
    gained, lost = (stats.per_case(np.maximum(side, 0), codes)[0] for side in (gap, -gap))
    return stats.difference(gained, lost, counts, fractional=fractional)


def _is_share(rule: Rule, columns: list[NDArray[np.float64]]) -> bool:
    """Yes or no, or a score in [0, 1]: these have bounds that hold even when all rows are alike; other means do not."""
    if rule.metric in SECONDS | DOLLARS or rule.limit[1] >= 1 or rule.limit[1] <= 0:
        return False
    return all(((column >= 0) & (column <= 1)).all() for column in columns)


def _settle(findings: list[_Finding], alpha: float) -> list[RuleResult]:
    p_pass = [f.p_pass(f.evidence) if f.evidence else math.nan for f in findings]
    p_fail = np.ones(len(findings))
    for level in get_args(Level):
        tested = [i for i, f in enumerate(findings) if f.evidence and f.rule.level == level]
        p_fail[tested] = stats.holm([1 - p_pass[i] for i in tested])
    return [
        _result(f, "pass" if p <= alpha else "fail" if q <= alpha else f.status, p)
        for f, p, q in zip(findings, p_pass, p_fail, strict=True)
    ]


def _result(finding: _Finding, status: Status, p_pass: float) -> RuleResult:
    rule, group, evidence = finding.rule, finding.group, finding.evidence
    subject = (f"p{rule.quantile * 100:g} of " if rule.quantile else "") + rule.metric
    subject += f" for {group}" if group else ""
    estimate = bound = math.inf
    needed: int | None = None
    text = f"{subject} {finding.reason}"
    if evidence is not None:
        if status == "inconclusive":
            needed = stats.cases_needed(evidence, p_pass, finding.confidence)
        estimate, bound = float(evidence.estimate), finding.bound(evidence)
        text = "; ".join([*_figures(finding, evidence, subject, estimate, bound), *_advice(finding, status, needed)])
    return RuleResult(
        id=rule.id if group is None else f"{rule.id}/{group}",
        metric=rule.metric,
        group=group,
        level=rule.level,
        status=status,
        estimate=estimate if math.isfinite(estimate) else None,
        bound=bound if math.isfinite(bound) else None,
        limit=finding.limit,
        cases=finding.cases,
        cases_needed=needed,
        text=text,
    )


def _figures(finding: _Finding, evidence: stats.Evidence, subject: str, estimate: float, bound: float) -> Iterator[str]:
    rule, limit = finding.rule, finding.limit
    digits = next((d for d in range(3, 9) if f"{bound:.{d}g}" != f"{limit:.{d}g}"), 9)

    def show(number: float) -> str:
        unit = " s" if rule.metric in SECONDS else " USD" if rule.metric in DOLLARS else ""
        return f"{number:.{digits}g}{unit}" if math.isfinite(number) else "any value"

    side = "at least" if finding.above else "at most"
    subject += " minus that in production" if rule.versus else ""
    yield f"{subject} is {show(estimate)}, {side} {show(bound)} with {finding.confidence * 100:g} % confidence"
    yield f"the rule asks for {side} {show(limit)}"
    if isinstance(evidence, stats.Quantile):
        over = evidence.over(limit)
        shares = [float(over.estimate), float(over.upper(finding.confidence)), 1 - evidence.level]
        is_over, at_most, may = (f"{share * 100:.3g} %" for share in shares)
        yield f"{is_over} of the rows exceed {show(limit)}, at most {at_most}, and {may} may"


def _advice(finding: _Finding, status: Status, needed: int | None) -> Iterator[str]:
    if status == "fail" and finding.evidence is not None:
        opposite = finding.bound(finding.evidence, opposite=True)
        side = "at most" if finding.above else "at least"
        yield f"missed even at best: {side} {opposite:.3g} with {finding.confidence * 100:g} % confidence"
    elif status == "inconclusive" and needed is not None:
        yield f"about {needed:,} cases like these would decide, there are {finding.cases:,}"
    elif status == "inconclusive":
        yield "the estimate itself misses it, so more cases like these would not do"
