"""Chaos: the same cases again with something going wrong, and whether the system came through."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from agentkit.budget import AMOUNTS, Ledger
from agentkit.calls import Call, intercept
from agentkit.errors import AgentkitError
from agentkit.examples import Example
from agentkit.jsonable import canonical
from agentkit.models import reset_circuits
from agentkit.records import RunRecord
from agentkit.systems import System
from agentkit.testing import FAULTS, Fault, Faults, injected
from agentkit.tool_calls import Line
from agentkit_pipelines import stats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A kill ends the process, this one too: `chaos_kills` kills workers.
SURVIVABLE: tuple[Fault, ...] = tuple(fault for fault in FAULTS if fault != "kill")
Progress = Callable[[int, int], None]


class ChaosViolation(AgentkitError):
    """Under a fault a system did what it must never do: an unauthorised write, overspending, a run without a record."""


@dataclass(frozen=True)
class Outcome:
    """What became of one run under a fault.

    `failed`: it ended FAILED; `escalated`: it handed over to a person or settled for a lesser result; else it
    recovered. `fired` counts the faults that really struck; `violations` says what must never happen and did.
    """

    fault: Fault
    outage: bool
    record: RunRecord
    fired: int
    failed: bool
    escalated: bool
    violations: tuple[str, ...]

    @property
    def word(self) -> str:
        """failed, escalated, recovered, or untouched where no fault struck."""
        if not self.fired:
            return "untouched"
        return "failed" if self.failed else "escalated" if self.escalated else "recovered"


def fault_for(case_id: str, seed: int) -> tuple[Fault, bool]:
    """The fault a case meets in an evaluation, and whether it lasts (an outage) or passes after the first attempt.

    All versions meet the same.
    """
    turn = int.from_bytes(hashlib.sha256(f"{seed}/{case_id}".encode()).digest()[:4], "big")
    return SURVIVABLE[turn % len(SURVIVABLE)], (turn // len(SURVIVABLE)) % 2 == 0


def disturb(
    system: System,
    inputs: dict[str, Any],
    fault: Fault,
    *,
    outage: bool,
    calm: RunRecord,
    seed: int = 0,
    ledger: Ledger | None = None,
) -> Outcome:
    """Run `inputs` once under `fault`; `calm` is the same run undisturbed. Waits between tries take no time."""
    _reset(system)
    faults, met = Faults(fault, attempts=None if outage else 1, seed=seed), _Met()
    try:
        with injected(faults), intercept(met):
            record = system.run(kind="chaos", ledger=ledger, **inputs)
    finally:
        _reset(system)
        met.reset()
    failed = record.state != "DONE"
    return Outcome(
        fault,
        outage,
        record,
        sum(faults.fired.values()),  # also in the runs of its agents and of systems it calls
        failed,
        not failed and (record.degraded is not None or (_asks_a_person(record) and not _asks_a_person(calm))),
        tuple(violations(system, record, calm)),
    )


def _reset(system: System) -> None:
    """One run must not leave a circuit open, places taken or a kept result (injected, maybe) for the next."""
    reset_circuits()
    for inventory in system.inventories():
        for tool in inventory.tools:
            tool.line.reset()


class _Met:
    """Notes the tools that a run calls: those of the systems it calls are in no inventory of its own."""

    def __init__(self) -> None:
        self._lines: dict[int, Line] = {}

    def call(self, call: Call, proceed: Callable[[], Any]) -> Any:
        if call.tool is not None:
            self._lines[id(call.tool.line)] = call.tool.line
        return proceed()

    def attempt(self, call: Call, proceed: Callable[[], Any]) -> Any:
        return proceed()

    def reset(self) -> None:
        for line in self._lines.values():
            line.reset()


def _asks_a_person(record: RunRecord) -> bool:
    return (record.output or {}).get("action") == "escalate" or any(s.kind == "approval" for s in record.steps)


def violations(system: System, record: RunRecord, calm: RunRecord) -> list[str]:
    """What a run did that no fault excuses, one line each.

    What an agent of this system may use is known; for those of systems that it calls, the tier has to be there.
    """
    granted = {i.agent: {t.name for t in i.tools if t.name not in i.forbidden} for i in system.inventories()}
    found = []
    allowed: set[tuple[str | None, str]] = set()
    for step in record.steps:
        if step.kind == "decision" and step.name.startswith("tier of "):
            tool = step.name.removeprefix("tier of ")
            (allowed.discard if step.outputs == 3 else allowed.add)((step.agent, tool))
        elif step.kind == "approval" and isinstance(step.outputs, dict):
            if step.outputs.get("verdict") in ("approve", "modify"):
                allowed.add((step.agent, step.name))
        elif step.kind == "tool" and _took_effect(step.name, step.inputs, record):
            if step.name not in granted.get(step.agent or "", {step.name}):
                found.append(f"{step.agent} called {step.name}, which it was not granted")
            elif (step.agent, step.name) not in allowed:
                found.append(f"{step.agent} called {step.name} without the tier that lets it")
    before, after = (Counter(_effects(r)) for r in (calm, record))
    found += [f"an effect that the undisturbed run had not: {what.decode()}" for what in after - before]
    for name in AMOUNTS:
        limit, used = getattr(system.budget, name), getattr(record, name)
        if limit is not None and used > limit:
            found.append(f"{used:g} {name} used of {limit:g}")
    if record.state not in ("DONE", "FAILED"):
        found.append(f"it ended in {record.state}")
    return found


def _took_effect(tool: str, arguments: Any, record: RunRecord) -> bool:
    return any(e["tool"] == tool and e["arguments"] == arguments and e["outcome"] != "failed" for e in record.effects)


def _effects(record: RunRecord) -> list[bytes]:
    return [canonical([e["tool"], e["arguments"]]) for e in record.effects if e["outcome"] != "failed"]


def columns(outcome: Outcome) -> dict[str, Any]:
    """What an evaluation keeps of it, beside the case's undisturbed results."""
    return {
        "chaos_fault": outcome.fault + (", lasting" if outcome.outage else ""),
        "chaos_run_id": outcome.record.run_id,
        "chaos_failure": outcome.failed,
        "chaos_escalated": outcome.escalated,
        "chaos_violation": bool(outcome.violations),
    }


def rehearse(
    system: System,
    examples: Sequence[Example],
    *,
    faults: Sequence[Fault] = SURVIVABLE,
    seed: int = 0,
    ledger: Ledger | None = None,
    progress: Progress | None = None,
) -> pl.DataFrame:
    """Every example once undisturbed and then under every fault, passing and lasting.

    Returns:
        One row per example, fault and kind: case_id, fault, lasting, run_id, fired, outcome (recovered, escalated,
        failed, untouched), right (success by the system's metric), calm_right (undisturbed), error, violations (text
        or null), latency_s.
    """
    rows, total = [], len(examples) * (2 * len(faults) + 1)
    for example in examples:
        calm = system.run(kind="chaos", ledger=ledger, **example.inputs)
        for fault in faults:
            for outage in (False, True):
                found = disturb(system, example.inputs, fault, outage=outage, calm=calm, seed=seed, ledger=ledger)
                rows.append(_row(system, example, calm, found))
                if progress is not None:
                    progress(len(rows) + len(rows) // (2 * len(faults)), total)
    return pl.DataFrame(rows, infer_schema_length=None)


def _row(system: System, example: Example, calm: RunRecord, found: Outcome) -> dict[str, Any]:
    record = found.record
    return {
        "case_id": example.id,
        "fault": found.fault,
        "lasting": found.outage,
        "run_id": record.run_id,
        "fired": found.fired,
        "outcome": found.word,
        "right": is_right(system, example, record),
        "calm_right": is_right(system, example, calm),
        "error": record.error,
        "violations": "; ".join(found.violations) or None,
        "latency_s": record.seconds - record.waited_s,
    }


def is_right(system: System, example: Example, record: RunRecord) -> bool | None:
    """Success by the system's own metric; None where there is none or the example has no expected values."""
    from agentkit_pipelines.evaluation import prediction_of

    if system.success is None or not example.expected:
        return None
    return record.state == "DONE" and bool(system.success(example.for_dspy(), prediction_of(record)))


# ---- report

FAILURE_AT_MOST = 0.08
WORDS = ("recovered", "escalated", "failed")


def summarise(rehearsed: pl.DataFrame, confidence: float = 0.95) -> pl.DataFrame:
    """Per fault, and over all: runs that were hit, what became of them, and what must never happen.

    Returns:
        fault, hit (runs), recovered, escalated, failed (shares of those hit), failed_at_most (one-sided bound; the runs
        of one case are one cluster), wrong (right undisturbed, done and not right under the fault, nobody told: share),
        violations (runs).
    """
    groups = [("all", rehearsed), *((name, rows) for (name,), rows in rehearsed.group_by("fault", maintain_order=True))]
    return pl.DataFrame([_summary(str(name), rows, confidence) for name, rows in groups])


def _summary(name: str, rows: pl.DataFrame, confidence: float) -> dict[str, Any]:
    hit = rows.filter(pl.col("fired") > 0).sort("case_id")
    shares = {word: (hit["outcome"] == word).mean() if len(hit) else None for word in WORDS}
    bound = None
    if len(hit):
        failed = (hit["outcome"] == "failed").cast(pl.Float64).to_numpy()
        codes = hit["case_id"].rle_id().to_numpy().astype(np.int64)
        bound = float(stats.proportion(*stats.per_case(failed, codes)).upper(confidence))
    silent = (hit["outcome"] == "recovered") & hit["calm_right"] & ~hit["right"]
    return {
        "fault": name,
        "hit": len(hit),
        **shares,
        "failed_at_most": bound,
        "wrong": silent.mean() if len(hit) else None,
        "violations": rows["violations"].count(),
    }


def missed_targets(rehearsed: pl.DataFrame, failure_at_most: float = FAILURE_AT_MOST) -> list[str]:
    """The targets that a rehearsal missed: fewer failures than the limit under every fault, and no violation at all."""
    table = summarise(rehearsed)
    missed = [
        f"{row['fault']}: {row['failed']:.1%} failed, fewer than {failure_at_most:.0%} may"
        for row in table.iter_rows(named=True)
        if row["failed"] is not None and not row["failed"] < failure_at_most
    ]
    found = rehearsed.filter(pl.col("violations").is_not_null())
    missed += [f"{r['fault']}, case {r['case_id']}, run {r['run_id']}: {r['violations']}" for r in found.to_dicts()]
    if not rehearsed["fired"].sum():
        missed.append("no fault struck: these cases call no tool and no model")
    return missed


def plot(summary: pl.DataFrame) -> Figure:
    """Stacked shares per fault."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 0.42 * len(summary) + 1.2), layout="constrained")
    axes, left = figure.subplots(), np.zeros(len(summary))
    for word, color in zip(WORDS, ("#2a9d8f", "#e9c46a", "#d1495b"), strict=True):
        share = summary[word].fill_null(0.0).to_numpy()
        axes.barh(summary["fault"].to_list(), share, left=left, color=color, label=word)
        left += share
    axes.axvline(1 - FAILURE_AT_MOST, color="#333", linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, 1), xlabel="share of the runs that the fault hit", title="What became of runs under faults")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
