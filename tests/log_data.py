"""Run logs of invented systems, as large as a test wants: made through the writer, or at once by SQL.

Three systems run for some weeks: releases follow each other, the first days are a pilot (`draft`), a part are evaluations, some
ask a person, people say what they think. What goes wrong from when on is planted with `Regression`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from agentkit.records import RunRecord, Step
from agentkit.settings import Price
from agentkit_tracking.runlog import RunLog, events

ROOT = Path(__file__).resolve().parents[1]
END = datetime(2026, 11, 20, 12, tzinfo=UTC)  # of every log that names no other
PRICES = {
    "openai/gpt-4.1-mini": Price(input=0.4, output=1.6),
    "openai/gpt-4.1": Price(input=2, output=8),
    "anthropic/claude-sonnet-4-5": Price(input=3, output=15),
}
# What can go wrong; `factor` multiplies the rate, the cost or the seconds (of "routes" and "inputs": the share affected).
What = Literal[
    "failures", "tool_failures", "latency", "cost", "refusals", "approvals", "decision_time", "ratings", "corrections",
    "routes", "inputs", "loops", "volume",
]  # fmt: skip


@dataclass(frozen=True)
class Regression:
    """From `after` (share of the log's time that has passed) on, `what` changes by `factor`; of one system or of all.

    >>> make_log(folder, runs=2000, days=14, seed=0, regressions=[Regression("latency", 3, after=0.8)])
    """

    what: What
    factor: float = 3.0
    after: float = 0.5
    system: str | None = None
    until: float = 1.0


@dataclass(frozen=True)
class Kind:
    """One invented system."""

    name: str
    routes: dict[str, float]
    tools: tuple[str, ...]
    model: str
    tokens_in: float  # median of a call
    tokens_out: float
    calls: int  # of the model, at the median
    failures: float = 0.02
    approvals: float = 0.05
    share: float = 1.0  # of all runs
    releases: int = 3


SYSTEMS = (
    Kind(
        "support_triage",
        {"billing": 0.34, "technical": 0.33, "general": 0.33},
        ("search_knowledge_base", "lookup_order", "issue_refund"),
        "openai/gpt-4.1-mini", 900, 120, 3, 0.02, 0.06, 0.6,
    ),
    Kind("contract_review", {"legal": 0.6, "finance": 0.4}, ("find_clause", "redline"), "openai/gpt-4.1",
         4_000, 600, 3, 0.03, 0.12, 0.25),
    Kind("market_research", {"web": 0.8, "library": 0.2}, ("search_web", "read_page"), "anthropic/claude-sonnet-4-5",
         6_000, 900, 4, 0.05, 0.0, 0.15),
)  # fmt: skip
_ERRORS = ("ModelError", "ToolFailed", "UsageError", "ValidationError")
_REFUSALS = ("PermissionDenied", "PolicyRefused", "BudgetExceeded")
_OTHER_TEXTS = (
    "Il mio pacco non è mai arrivato e nessuno risponde al telefono, vorrei sapere dove si trova adesso.",
    "Meine Heizung lässt sich seit dem Update nicht mehr einschalten, bitte melden Sie sich heute noch.",
    "Je voudrais annuler mon abonnement annuel et recevoir une facture corrigée pour ma comptabilité.",
)


def make_log(
    folder: Path,
    *,
    runs: int,
    days: float,
    seed: int,
    end: datetime | None = None,
    regressions: Iterable[Regression] = (),
    systems: tuple[Kind, ...] = SYSTEMS,
) -> RunLog:
    """A log in `folder` with that many runs over the `days` before `end`, appended event by event as runs append them.

    Every event carries the time at which it would have been logged; a run that would end later is under way. The same arguments make the same log. It is not folded.
    """
    log = RunLog(folder)
    end = end or END
    rng = np.random.default_rng(seed)
    planted = tuple(regressions)
    place = np.sort(_places(rng, runs, days, planted))
    chosen = rng.choice(len(systems), runs, p=np.array([s.share for s in systems]) / sum(s.share for s in systems))
    later: list[tuple[datetime, Any]] = []
    for number in range(runs):
        made = _Run(systems[chosen[number]], float(place[number]), number, seed, end, days, planted, rng)
        record, ended = made.record()
        new = events.finished(record, None, events.payloads())
        if ended > end:  # it is still under way
            log.write(_at(new[:1], made.began), sync=False)
            continue
        log.write(_at(new, ended), sync=False)
        later += made.feedback(record, ended)
    for at, event in sorted(later, key=lambda one: one[0]):
        if at <= end:
            log.write(_at([event], at), sync=False)
    return log


def _places(rng: np.random.Generator, runs: int, days: float, planted: tuple[Regression, ...]) -> Any:
    """When runs begin, as shares of the whole time: more by day than by night."""
    at = rng.random(runs * 6)
    hour = (at * days * 24) % 24
    weight = 0.3 + 0.7 * np.exp(-(((hour - 13) / 5) ** 2))
    for r in planted:
        if r.what == "volume":
            weight = np.where((at >= r.after) & (at <= r.until), weight * r.factor, weight)
    return rng.choice(at, runs, replace=False, p=weight / weight.sum())


def _at(new: list[Any], at: datetime) -> list[Any]:
    stamp = at.isoformat(timespec="microseconds")
    return [({**event, "logged_at": stamp}, private) for event, private in new]


class _Run:
    """One run of an invented system."""

    def __init__(
        self, kind: Kind, place: float, number: int, seed: int, end: datetime, days: float, planted: Any, rng: Any
    ) -> None:
        self.kind, self.place, self.rng = kind, place, rng
        self.began = end - timedelta(days=days) + timedelta(days=days) * place
        self.run_id = hashlib.sha256(f"{seed}/{number}".encode()).hexdigest()[:32]
        self.planted = [r for r in planted if r.system in (None, kind.name) and r.after <= place <= r.until]

    def times(self, what: What) -> float:
        return math.prod([r.factor for r in self.planted if r.what == what])

    def share(self, what: What) -> float:
        return min(1.0, sum(r.factor for r in self.planted if r.what == what))

    def happens(self, rate: float) -> bool:
        return bool(self.rng.random() < min(rate, 0.98))

    def record(self) -> tuple[RunRecord, datetime]:
        kind, rng = self.kind, self.rng
        pilot = self.place < 0.15
        purpose = "evaluation" if self.happens(0.25 if pilot else 0.03) else "batch" if self.happens(0.1) else "run"
        version = min(kind.releases, 1 + int(self.place * kind.releases))
        if version > 1 and self.place * kind.releases % 1 < 0.2 and self.happens(0.5):
            version -= 1  # rolled out little by little
        names = list(kind.routes)
        route = names[0] if self.happens(self.share("routes")) else str(rng.choice(names, p=list(kind.routes.values())))
        slow, dear = self.times("latency"), self.times("cost") * (1.0 - 0.12 * (version - 1))
        steps = [Step("transition", "PLANNING", "IDLE", 0.0, 0.001)]
        clock, plan_s, do_s, waited = 0.001, 0.0, 0.0, 0.0
        refusal = str(rng.choice(_REFUSALS)) if self.happens(0.004 * self.times("refusals")) else None
        error = str(rng.choice(_ERRORS)) if self.happens(kind.failures * self.times("failures")) else None
        for n in range(1 + rng.poisson(kind.calls - 1)):
            state = "PLANNING" if n < 2 else "REFLECTING"
            tokens = [int(rng.lognormal(math.log(t * dear), 0.5)) for t in (kind.tokens_in, kind.tokens_out)]
            took = float(rng.lognormal(math.log(0.6 * slow), 0.6))
            agent = None if n == 0 else route
            steps.append(
                Step("model", kind.model, state, clock, took, agent, None, ["…"], kind.model, *tokens,
                     usd=PRICES[kind.model].usd(*tokens))
            )  # fmt: skip
            clock, plan_s = clock + took, plan_s + took
            if n == 0:
                steps.append(Step("decision", "route", "PLANNING", clock, agent=None, inputs="…", outputs=route))
        failed = 0
        repeats = int(8 * self.times("loops")) if any(r.what == "loops" for r in self.planted) else 1
        for tool in kind.tools[: 1 + int(rng.integers(len(kind.tools)))]:
            for again in range(repeats if tool == kind.tools[0] else 1):
                broken = self.happens(0.03 * self.times("tool_failures"))
                took = float(rng.lognormal(math.log(0.15 * slow), 0.7))
                steps.append(
                    Step("tool", tool, "EXECUTING", clock, took, route, {"query": f"{again}"}, None if broken else "…",
                         error="ToolFailed: timeout" if broken else None, tries=3 if broken else 1)
                )  # fmt: skip
                clock, do_s, failed = clock + took, do_s + took, failed + broken
        if self.happens(kind.approvals * self.times("approvals")):
            waited = float(rng.lognormal(math.log(240 * self.times("decision_time")), 1.1))
            verdict = str(rng.choice(["approve", "modify", "reject"], p=[0.75, 0.1, 0.15]))
            steps.append(
                Step("approval", kind.tools[-1], "AWAITING_HUMAN", clock, waited, route, {"amount_usd": 75},
                     {"verdict": verdict, "by": "ada"}, decided_by="ada")
            )  # fmt: skip
            clock += waited
        if failed and error is None and self.happens(0.15):
            error = "ToolFailed"
        ended = "DONE" if error is None and refusal is None else "FAILED"
        steps.append(Step("transition", ended, "REFLECTING", clock))
        models = [s for s in steps if s.kind == "model"]
        return RunRecord(
            run_id=self.run_id, system=kind.name, release=release(kind.name, version), kind=purpose,
            started_at=self.began.isoformat(), seconds=clock, state=ended, route=route, inputs=self.inputs(),
            output={"reply": "…"} if ended == "DONE" else None,
            error=f"{refusal or error}: planted" if ended == "FAILED" else None, effects=[],
            phases={"planning": plan_s, "execution": do_s, "reflection": 0.1 * plan_s}, waited_s=waited,
            model_calls=len(models), tool_calls=sum(s.tries for s in steps), tokens_in=sum(s.tokens_in for s in models),
            tokens_out=sum(s.tokens_out for s in models), usd=sum(s.usd for s in models), steps=steps,
            stage="draft" if pilot or purpose == "evaluation" else "production",
            user_hash=f"u{int(rng.integers(200)):03}",
            degraded="ToolFailed: a lesser result" if failed and ended == "DONE" and self.happens(0.3) else None,
            budget_used=min(1.0, float(rng.lognormal(math.log(0.2 * dear), 0.5))),
        ), self.began + timedelta(seconds=clock)  # fmt: skip

    def inputs(self) -> dict[str, Any]:
        if self.happens(self.share("inputs")):
            return {"ticket": str(self.rng.choice(_OTHER_TEXTS)), "customer_id": "C-0001"}
        if self.kind.name == "support_triage":
            texts = tickets()
            return {
                "ticket": texts[int(self.rng.integers(len(texts)))],
                "customer_id": f"C-{int(self.rng.integers(200)):04}",
            }
        return {"question": f"Question {int(self.rng.integers(1000))} about {self.kind.name}"}

    def feedback(self, record: RunRecord, ended: datetime) -> list[tuple[datetime, Any]]:
        """What people say of it, hours later: of a tenth of the runs."""
        if record.kind == "evaluation" or not self.happens(0.1):
            return []
        bad = record.state == "FAILED" or self.happens(0.12 * self.times("corrections"))
        label = str(self.rng.choice(["corrected", "rejected", "reopened", "escalated"])) if bad else "accepted"
        rating = float(np.clip(round(self.rng.normal((2.2 if bad else 4.3) / self.times("ratings"), 0.8)), 1, 5))
        event = {
            "type": "feedback", "run_id": record.run_id, "system": record.system, "release": record.release,
            "stage": record.stage, "name": "user", "result": label, "rating": rating if self.happens(0.7) else None,
        }  # fmt: skip
        return [
            (
                ended + timedelta(hours=float(self.rng.exponential(8))),
                ({k: v for k, v in event.items() if v is not None}, {"by": "ada"}),
            )
        ]


def release(system: str, version: int) -> str:
    """The id of an invented release, as long as real ones."""
    return hashlib.sha256(f"{system}/{version}".encode()).hexdigest()


@cache
def tickets() -> list[str]:
    """Tickets as customers write them, from the training set."""
    path = ROOT / "data" / "support" / "train.jsonl"
    return [json.loads(line)["inputs"]["ticket"] for line in path.read_text(encoding="utf-8").splitlines()]


# ---- millions of events

_KINDS = (
    "(CASE WHEN i % 20 < 12 THEN 'support_triage' WHEN i % 20 < 17 THEN 'contract_review' ELSE 'market_research' END)"
)
_FILL = f"""
INSERT INTO log.events ({{columns}})
WITH drawn AS (
    -- One row a run; r1 … r6 are uniform and do not depend on the order in which threads come.
    SELECT i, i / {{runs}} AS place, {_KINDS} AS system,
        hash({{seed}} * 10000000000 + i * 8 + 1) / 18446744073709551616.0 AS r1, hash({{seed}} * 10000000000 + i * 8 + 2) / 18446744073709551616.0 AS r2,
        hash({{seed}} * 10000000000 + i * 8 + 3) / 18446744073709551616.0 AS r3, hash({{seed}} * 10000000000 + i * 8 + 4) / 18446744073709551616.0 AS r4,
        hash({{seed}} * 10000000000 + i * 8 + 5) / 18446744073709551616.0 AS r5, hash({{seed}} * 10000000000 + i * 8 + 6) / 18446744073709551616.0 AS r6,
    FROM range({{first}}, {{last}}) AS t(i)
), runs AS (
    SELECT *, md5('{{seed}}/' || i) AS run_id, {{begin}} + to_microseconds((place * {{span_us}})::BIGINT) AS began,
        CASE WHEN r1 < 0.04 THEN 'FAILED' ELSE 'DONE' END AS ended,
        CASE WHEN place < 0.15 THEN 'draft' ELSE 'production' END AS phase,
        CASE WHEN r2 < 0.05 THEN 'evaluation' WHEN r2 < 0.15 THEN 'batch' ELSE 'run' END AS purpose,
        sha256(system || '/' || least(3, 1 + floor(place * 3))::INT) AS version,
        CASE WHEN r3 < 0.34 THEN 'billing' WHEN r3 < 0.67 THEN 'technical' ELSE 'general' END AS went,
        exp(sqrt(-2 * ln(greatest(r4, 1e-12))) * cos(2 * pi() * r5) * 0.5) AS size,
        CASE system WHEN 'support_triage' THEN 'openai/gpt-4.1-mini' WHEN 'contract_review' THEN 'openai/gpt-4.1'
            ELSE 'anthropic/claude-sonnet-4-5' END AS lm,
        CASE system WHEN 'support_triage' THEN 900 WHEN 'contract_review' THEN 4000 ELSE 6000 END AS tokens,
        CASE system WHEN 'support_triage' THEN 0.4 WHEN 'contract_review' THEN 2 ELSE 3 END AS price,
        r6 < 0.06 AS asks, r6 > 0.9 AS tells, r6 > 0.6 AND r6 < 0.68 AS stumbles
    FROM drawn
), happened AS (
    SELECT *, unnest(list_filter(['run', 'transition', 'model', 'decision', 'model', 'transition', 'tool', 'tool', 'approval',
        'transition', 'outcome', 'feedback'], lambda x: (x <> 'approval' OR asks) AND (x <> 'feedback' OR tells))) AS type,
        unnest(range(1, 11 + asks::INT + tells::INT)) AS place_in_run
    FROM runs
)
SELECT 'filled' AS segment, row_number() OVER () + {{n}} AS n, began + to_milliseconds(place_in_run * 400) AS logged_at, type, run_id,
    NULL AS parent, system, version AS release, phase AS stage,
    CASE WHEN type <> 'feedback' THEN purpose END AS kind,
    CASE WHEN type IN ('model', 'tool', 'approval') THEN went END AS agent,
    CASE WHEN type = 'outcome' THEN ended WHEN type = 'tool' THEN 'EXECUTING' ELSE 'PLANNING' END AS state,
    CASE WHEN type NOT IN ('run', 'outcome', 'feedback') THEN place_in_run END AS step,
    CASE type WHEN 'model' THEN lm WHEN 'decision' THEN 'route' WHEN 'feedback' THEN 'user' WHEN 'approval' THEN 'issue_refund'
        WHEN 'tool' THEN CASE WHEN place_in_run % 2 = 0 THEN 'search' ELSE 'look_up' END WHEN 'transition' THEN 'EXECUTING'
        END AS name,
    CASE WHEN type = 'model' THEN lm END AS model,
    CASE type WHEN 'tool' THEN CASE WHEN stumbles AND place_in_run % 2 = 0 THEN 'failed' ELSE 'done' END WHEN 'model' THEN 'done'
        WHEN 'decision' THEN went WHEN 'approval' THEN CASE WHEN r3 < 0.8 THEN 'approve' ELSE 'reject' END
        WHEN 'feedback' THEN CASE WHEN r3 < 0.85 THEN 'accepted' WHEN r3 < 0.9 THEN 'corrected' WHEN r3 < 0.95 THEN 'reopened'
        ELSE 'escalated' END END AS result,
    CASE WHEN type = 'outcome' AND r1 < 0.04 THEN CASE WHEN r1 < 0.005 THEN 'PolicyRefused' WHEN r1 < 0.008 THEN 'BudgetExceeded'
        ELSE 'ToolFailed' END END AS error_type,
    CASE WHEN type IN ('run', 'outcome') THEN began END AS started_at,
    CASE WHEN type IN ('model', 'tool', 'approval') THEN place_in_run * 0.4 END AS started,
    CASE type WHEN 'model' THEN 0.6 * size WHEN 'tool' THEN 0.15 * size WHEN 'approval' THEN 240 * size * size
        WHEN 'outcome' THEN 1.5 * size + CASE WHEN asks THEN 240 * size * size ELSE 0 END END AS seconds,
    CASE type WHEN 'model' THEN (tokens * size)::BIGINT WHEN 'outcome' THEN 2 * (tokens * size)::BIGINT END AS tokens_in,
    CASE type WHEN 'model' THEN (tokens * size)::BIGINT // 8 WHEN 'outcome' THEN 2 * ((tokens * size)::BIGINT // 8) END AS tokens_out,
    CASE type WHEN 'model' THEN tokens * size * price * 1.5 / 1e6 WHEN 'outcome' THEN 2 * tokens * size * price * 1.5 / 1e6
        END AS usd,
    NULL AS cached, CASE WHEN type = 'tool' THEN 1 END AS tries, CASE WHEN type = 'outcome' THEN went END AS route,
    CASE type WHEN 'approval' THEN 240 * size * size WHEN 'outcome' THEN CASE WHEN asks THEN 240 * size * size ELSE 0 END END AS waited_s,
    CASE WHEN type = 'outcome' THEN 2 END AS model_calls, CASE WHEN type = 'outcome' THEN 2 END AS tool_calls,
    CASE WHEN type = 'outcome' THEN 1.2 * size END AS planning_s, CASE WHEN type = 'outcome' THEN 0.3 * size END AS execution_s,
    CASE WHEN type = 'outcome' THEN 0.1 * size END AS reflection_s, CASE WHEN type = 'outcome' THEN 0 END AS effects,
    CASE WHEN type = 'outcome' THEN stumbles::INT END AS failed_calls, CASE WHEN type = 'outcome' THEN asks::INT END AS approvals,
    CASE WHEN type = 'outcome' THEN (r1 < 0.008)::INT END AS refusals, CASE WHEN type = 'outcome' THEN r1 > 0.99 END AS is_degraded,
    CASE WHEN type = 'outcome' THEN least(1.0, 0.2 * size) END AS budget_used,
    CASE WHEN type = 'feedback' THEN 1 + floor(r4 * 5) END AS rating, 'u' || (i % 5000) AS user_hash, NULL AS session, NULL AS event,
    CASE WHEN type IN ('run', 'outcome') THEN '{{{{"inputs":{{{{"ticket":"I was charged twice for order ORD-' || i ||
        ', please pay one of them back to the card I paid with. My last message was not answered.","customer_id":"C-0001"}}}}}}}}'
        WHEN type = 'tool' THEN '{{{{"inputs":{{{{"query":"order ' || i || '"}}}}}}}}' END AS private,
    NULL AS salt, NULL AS hash
FROM happened
"""


def fill(folder: Path, *, runs: int, days: float = 90, seed: int = 0, end: datetime | None = None) -> RunLog:
    """A log with that many runs, about ten events each, written straight into the database: a million runs a minute."""
    log = RunLog(folder)
    end = end or END
    columns = "segment, n, " + ", ".join(events.COLUMNS) + ", user_hash, session, event, private, salt, hash"
    step = 200_000
    with log.database.writing() as connection:
        for first in range(0, runs, step):
            connection.execute(
                _FILL.format(
                    columns=columns, runs=runs, first=first, last=min(runs, first + step), seed=seed, n=first * 12,
                    begin=f"TIMESTAMPTZ '{(end - timedelta(days=days)).isoformat()}'", span_us=int(days * 86_400e6),
                )
            )  # fmt: skip
    return log
