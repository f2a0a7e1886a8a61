"""Runs a set of examples through a system, repeated under seeded perturbations, and scores every run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
import polars as pl

from agentkit.budget import Budget, Ledger
from agentkit.errors import BudgetExceeded, UsageError
from agentkit.examples import Example
from agentkit.mapping import default_workers, in_parallel
from agentkit.metrics import Metric
from agentkit.models import EMBEDDED
from agentkit.perturb import perturb
from agentkit.records import RunRecord
from agentkit.systems import System
from agentkit_pipelines import chaos as chaos_runs

FREE_REPEATS = 8  # of a model that costs nothing
PAID_REPEATS = 3
# Of the results, beside the system's own metrics.
RESULT_COLUMNS = frozenset(
    [
        "case_id",
        "repeat",
        "task_type",
        "run_id",
        "state",
        "route",
        "error",
        "task_failure",
        "escalated",
        "confidence",
        "cost_usd",
        "latency_s",
        "planning_s",
        "execution_s",
        "reflection_s",
        "tokens_in",
        "tokens_out",
        "model_calls",
        "tool_calls",
        "metric_errors",
        "output",
        "chaos_fault",
        "chaos_run_id",
        "chaos_failure",
        "chaos_escalated",
        "chaos_violation",
    ]
)
_SECONDS_PER_CALL = 1.0  # assumed of a provider's model when estimating minutes
_PROBES = 12
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Estimate:
    """What an evaluation would take; `usd` is None when no price is known."""

    runs: int
    calls: int
    tokens_in: int
    tokens_out: int
    usd: float | None
    minutes: float


def default_repeats(system: System) -> int:
    """8 for the free in-process model, 3 for a provider's."""
    return FREE_REPEATS if is_embedded(system) else PAID_REPEATS


def is_embedded(system: System) -> bool:
    """Whether every model a run may call is the in-process one."""
    return all(lm.model == EMBEDDED for lm in system.models())


def exercised(system: System, results: pl.DataFrame | None = None) -> frozenset[str]:
    """The rule families that the model gives real figures for.

    A free in-process model proves nothing of cost or latency; nor do `results` without a call that was seen, or cost.
    """
    if is_embedded(system):
        return frozenset()
    families = {"cost", "latency"}
    if results is not None:
        families -= {"cost"} if not results["cost_usd"].sum() else set()
        families -= {"latency"} if not results["model_calls"].sum() else set()
    return frozenset(families)


def spending_limit(max_usd: float | None) -> Ledger:
    """One purse for everything that is evaluated together."""
    return Ledger(Budget(None, None, None, None, max_usd, None))


def choose_repeats(system: System, examples: Sequence[Example], max_usd: float | None) -> int:
    """8 for the free model; for a paid one as many as the limit covers by the estimate, 1 to 8; 3 without a limit."""
    if is_embedded(system) or max_usd is None:
        return default_repeats(system)
    usd = estimate(system, examples, 1).usd
    return FREE_REPEATS if not usd else max(1, min(FREE_REPEATS, int(max_usd / usd)))


def estimate(system: System, examples: Sequence[Example], repeats: int, workers: int | None = None) -> Estimate:
    """Calls, tokens, USD and minutes of an evaluation, found without a paid call.

    A dozen examples run with the embedded model in place of every other: same workflow, same prompts. What real
    answers weigh is unknown, so tokens out are those of the stand-in; several models are priced at the dearest.

    Raises:
        UsageError: the embedded model cannot stand in for this system.
    """
    sample = list(examples[:: max(1, len(examples) // _PROBES)])[:_PROBES]
    models, runs, twin = system.models(), len(examples) * repeats, _with_stand_in(system)
    records = [twin.run(kind="evaluation", **example.inputs) for example in sample]
    if all(r.state != "DONE" for r in records):
        raise UsageError(
            f"no estimate without a paid call: the embedded model cannot stand in here ({records[0].error}); try "
            "--repeats 1 on a small set with --max-usd"
        )
    scale = runs / len(sample)
    tokens = sum(r.tokens_in for r in records) * scale, sum(r.tokens_out for r in records) * scale
    calls = sum(r.model_calls for r in records) * scale
    if is_embedded(system):
        minutes = sum(r.seconds for r in records) * scale / 60
    else:
        minutes = calls * _SECONDS_PER_CALL / (workers or default_workers(system)) / 60
    prices = [getattr(lm, "price", None) for lm in models]
    usd = None if None in prices else max(price.usd(*tokens) for price in prices if price is not None)
    return Estimate(runs, round(calls), round(tokens[0]), round(tokens[1]), usd, minutes)


def _with_stand_in(system: System) -> System:
    """A copy of the system whose every call goes to the embedded model."""
    twin: System = system.deepcopy()
    twin.model = EMBEDDED
    for _, predictor in twin.named_predictors():
        predictor.lm = None
    return twin


def evaluate(
    system: System,
    examples: Sequence[Example],
    *,
    repeats: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    max_usd: float | None = None,
    ledger: Ledger | None = None,
    chaos: bool = False,
    progress: Progress | None = None,
) -> pl.DataFrame:
    """Run every example `repeats` times and score each run.

    Repeat 0 uses the inputs as they are; the others are perturbed by (seed, case, repeat), alike for every version,
    so that versions can be compared pairwise. No cache is used. `progress(done, total)` is called after each run.
    With `chaos` every case runs once more, under an injected fault (`chaos.fault_for`); all its rows tell the outcome.
    `max_usd` limits this evaluation; a `ledger` from `spending_limit` limits several together, and takes its place.

    Returns:
        One row per case and repeat, sorted: case_id, repeat, task_type, run_id, state, route, error, success,
        task_failure (the run ended FAILED: an error or invalid output), escalated (a person was asked or the output's
        `action` is escalate), confidence, cost_usd (USD), latency_s (without waiting for people), planning_s,
        execution_s, reflection_s (seconds), tokens_in, tokens_out, model_calls, tool_calls, one column per metric
        (null where it crashed; false or 0 where the run failed), metric_errors (text) and output (JSON text); with
        chaos also those of `chaos.columns`.

    Raises:
        UsageError: nothing to evaluate, or the system names no success metric.
        BudgetExceeded: `max_usd` was reached; nothing further is spent, what was done is in the run log.
        ChaosViolation: under a fault it did what it must never do.
    """
    if not examples:
        raise UsageError("there are no examples to evaluate")
    if system.success is None:
        raise UsageError(f"{system.name} names no success metric; give System(…, success=metric)")
    if any(not e.expected for e in examples):
        unlabelled = [e.id for e in examples if not e.expected]
        raise UsageError(f"{len(unlabelled)} examples have no expected values yet, e.g. {unlabelled[0]!r}; label them")
    ledger = ledger or spending_limit(max_usd)
    max_usd = ledger.budget.usd
    if max_usd is not None and (unpriced := [m.model for m in system.models() if getattr(m, "price", None) is None]):
        raise UsageError(f"a USD limit is set but no price is known for {unpriced[0]}; add it to [prices]")
    repeats = repeats or default_repeats(system)
    jobs = [(example, repeat) for repeat in range(repeats) for example in examples]
    disturbed: dict[str, dict[str, Any]] = {}

    def work(job: tuple[Example, int]) -> dict[str, Any]:
        example, repeat = job
        inputs = perturb(example.inputs, case_id=example.id, repeat=repeat, seed=seed)
        record = system.run(kind="evaluation", ledger=ledger, **inputs)
        if max_usd is not None and (record.error or "").startswith(f"BudgetExceeded: budget of {max_usd:g} usd"):
            raise BudgetExceeded("usd", max_usd, ledger.used["usd"], 0.0)
        if chaos and repeat == 0:  # further repeats would cost as much again and say little more
            disturbed[example.id] = _under_a_fault(system, example, seed, record, ledger)
        return {
            "case_id": example.id,
            "repeat": repeat,
            "task_type": example.task_type,
            **_score(system, example, record),
            **disturbed.get(example.id, {}),
        }

    rows = []
    for i, (_, row) in enumerate(in_parallel(work, jobs, 1 if chaos else workers or default_workers(system)), 1):
        rows.append(row)
        if progress is not None:
            progress(i, len(jobs))
    return _frame(rows, metrics_of(system))


def _under_a_fault(system: System, example: Example, seed: int, calm: RunRecord, ledger: Ledger) -> dict[str, Any]:
    fault, outage = chaos_runs.fault_for(example.id, seed)
    found = chaos_runs.disturb(system, example.inputs, fault, outage=outage, calm=calm, seed=seed, ledger=ledger)
    if found.violations:
        raise chaos_runs.ChaosViolation(f"run {found.record.run_id} under {fault!r}: {'; '.join(found.violations)}")
    return chaos_runs.columns(found)


def metrics_of(system: System) -> dict[str, Metric]:
    """The system's metrics by name, success first.

    Raises:
        UsageError: two share a name, or one has the name of a column of the results.
    """
    named = [(getattr(m, "__name__", type(m).__name__), m) for m in system.metrics]
    names = [name for name, _ in named]
    if len(set(names)) < len(names) or "success" in names:
        raise UsageError(f"metric names must differ and not be `success`: {names}; pass name=… to the ready ones")
    if taken := sorted(RESULT_COLUMNS & set(names)):
        raise UsageError(f"a metric cannot be called {taken[0]!r}, the results have a column of that name; pass name=…")
    assert system.success is not None
    return {"success": system.success, **dict(named)}


def _score(system: System, example: Example, record: RunRecord) -> dict[str, Any]:
    failed = record.state != "DONE"
    expected, errors, scores = example.for_dspy(), [], {}
    prediction = None if failed else prediction_of(record)
    for name, metric in metrics_of(system).items():
        try:
            scores[name] = None if failed else _plain(metric(expected, prediction))
        except Exception as e:
            scores[name] = None
            errors.append(f"{name}: {type(e).__name__}: {e}")
    output = record.output or {}
    confidence = output.get("confidence")
    return {
        "run_id": record.run_id,
        "state": record.state,
        "route": record.route,
        "error": record.error,
        "task_failure": failed,
        "escalated": output.get("action") == "escalate" or any(s.kind == "approval" for s in record.steps),
        # What is no probability is no confidence.
        "confidence": float(confidence) if isinstance(confidence, int | float) and 0 <= confidence <= 1 else None,
        "cost_usd": record.usd,
        "latency_s": record.seconds - record.waited_s,
        **{f"{phase}_s": record.phases[phase] for phase in ("planning", "execution", "reflection")},
        "tokens_in": record.tokens_in,
        "tokens_out": record.tokens_out,
        "model_calls": record.model_calls,
        "tool_calls": record.tool_calls,
        **scores,
        "metric_errors": "; ".join(errors) or None,
        "output": json.dumps(output, ensure_ascii=False).encode("utf-8", "replace").decode(),
    }


def prediction_of(record: RunRecord) -> dspy.Prediction:
    """A finished run as metrics see it."""
    fields = {k: v for k, v in (record.output or {}).items() if k not in ("route", "record")}
    return dspy.Prediction(**fields, route=record.route, record=record)


def _plain(value: Any) -> bool | float | str:
    """A metric's value as bool, float or str; numpy scalars are taken as what they hold."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    raise TypeError(f"a metric returns bool, float or str, got {value!r}")


def _frame(rows: list[dict[str, Any]], metrics: dict[str, Metric]) -> pl.DataFrame:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    failed = columns["task_failure"]
    for name in metrics:
        if name == "success":
            columns[name] = [bool(v) if v in (0.0, 1.0) else v for v in columns[name]]
        kinds = {type(v) for v in columns[name] if v is not None}
        if kinds == {bool, float}:  # `return False` early and a score later
            columns[name], kinds = [None if v is None else float(v) for v in columns[name]], {float}
        if len(kinds) > 1:
            raise UsageError(f"metric {name!r} returned values of different kinds: {sorted(k.__name__ for k in kinds)}")
        kind = kinds.pop() if kinds else bool
        if name == "success" and kind is not bool:
            raise UsageError(f"the success metric must return True or False, it returned {kind.__name__}")
        # A failed run got nothing right; only a crash of the metric itself leaves a null.
        blank = {bool: False, float: 0.0, str: "(run failed)"}[kind]
        columns[name] = [blank if f else v for v, f in zip(columns[name], failed, strict=True)]
    text = dict.fromkeys(
        ("case_id", "task_type", "run_id", "state", "route", "error", "metric_errors", "output"), pl.String
    )
    frame = pl.DataFrame(
        columns, schema_overrides=text | {"confidence": pl.Float64, "cost_usd": pl.Float64}, strict=False
    )
    if frame["cost_usd"].is_nan().any():
        raise UsageError(
            "what some calls cost is unknown: either no price is known for the model (add it under [prices] of "
            "agentkit.toml), or the provider reports no token usage"
        )
    return frame.sort("case_id", "repeat")
