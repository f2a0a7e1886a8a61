"""A provider's price and delay, from HTTP through an evaluation to the gate: every cost and latency rule can refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import polars as pl
import pytest
from provider import Reply, Request, Serve, answer, prompt
from pydantic import BaseModel

import agentkit as ak
from agentkit.errors import BudgetExceeded
from agentkit.examples import Example
from agentkit_pipelines.evaluation import estimate, evaluate, exercised
from agentkit_pipelines.gate import Verdict, judge
from agentkit_pipelines.thresholds import Rule, Thresholds

CASES = [
    Example(
        id=f"case-{i:02}",
        inputs={"ticket": f"Order {1000 + i} was charged twice on my card."},
        expected={"label": "billing"},
        task_type="refund",
    )
    for i in range(60)
]
BOTH = frozenset({"cost", "latency"})
A_FIFTH = [case.inputs["ticket"] for case in CASES[::5]]
PHASES = {"planning_s": "label", "execution_s": "facts", "reflection_s": "reply"}


def triage() -> ak.System:
    return ak.adopt(dspy.Predict("ticket -> label"), name="triage", success=ak.metrics.exact("label"))


class Assignment(BaseModel):
    label: str
    reply: str


class Phased(ak.Agent):
    """Asks the model once in every phase."""

    name, result = "phased", Assignment

    def __init__(self) -> None:
        super().__init__()
        self.read = dspy.Predict("ticket -> label")
        self.look = dspy.Predict("ticket, label -> facts")
        self.write = dspy.Predict("ticket, facts -> reply")

    def plan(self, run: ak.Run, ticket: str) -> str:
        return str(self.read(ticket=ticket).label)

    def execute(self, run: ak.Run, plan: str, ticket: str) -> str:
        return str(self.look(ticket=ticket, label=plan).facts)

    def reflect(self, run: ak.Run, plan: str, facts: str, ticket: str) -> Assignment:
        return Assignment(label=plan, reply=self.write(ticket=ticket, facts=facts).reply)


def phased() -> ak.System:
    return ak.adopt(Phased(), success=ak.metrics.exact("label"))


def asked_for(request: Request) -> str:
    """The output field of a request to the phased agent."""
    return prompt(request).rpartition("starting with the field `[[ ## ")[2].partition(" ##")[0]


def of_a_fifth(request: Request) -> bool:
    return any(ticket in prompt(request) for ticket in A_FIFTH)


def results_of(system: ak.System, workers: int = 20) -> pl.DataFrame:
    return evaluate(system, CASES, repeats=1, workers=workers)


def decide(results: pl.DataFrame, *rules: Rule, exercised: frozenset[str] = BOTH) -> Verdict:
    return judge(results, Thresholds(system="triage", confidence=0.95, rules=rules), None, exercised)


def statuses(verdict: Verdict) -> dict[str, str]:
    return {rule.metric: rule.status for rule in verdict.rules}


ALL_FIELDS = answer(label="billing", facts="two payments", reply="We look into it.")
PER_RUN = Rule(metric="cost_usd", at_most=0.28)
PER_SUCCESS = Rule(metric="cost_per_success_usd", at_most=0.28)
FAILURES = Rule(metric="task_failure", at_most=0.08)


def p95(metric: str, at_most: float) -> Rule:
    return Rule(metric=metric, quantile=0.95, at_most=at_most)


# ---- cost


@pytest.mark.parametrize("rule", [PER_RUN, PER_SUCCESS])
@pytest.mark.parametrize(("usd", "expected"), [(0.20, "pass"), (0.30, "fail")])
def test_a_cost_rule_refuses_a_dear_model_and_passes_a_cheap_one(
    serve: Serve, rule: Rule, usd: float, expected: str
) -> None:
    serve(Reply(tokens_in=900, tokens_out=100), price=(usd * 1000, usd * 1000))
    results = results_of(triage())
    assert results["cost_usd"].to_list() == pytest.approx([usd] * 60)
    verdict = decide(results, rule)
    assert (verdict.verdict, *statuses(verdict).values()) == (expected, expected)


def test_cost_per_success_refuses_a_cheap_model_that_is_often_wrong(serve: Serve) -> None:
    def often_wrong(request: Request) -> str:
        return answer(label="billing" if of_a_fifth(request) else "technical")

    serve(Reply(text=often_wrong, tokens_in=1000, tokens_out=0), price=(100, 100))
    verdict = decide(results_of(triage()), PER_RUN, PER_SUCCESS)  # 0.10 USD a run, 0.50 a success
    assert statuses(verdict) == {"cost_usd": "pass", "cost_per_success_usd": "fail"}
    assert verdict.verdict == "fail"


# ---- latency


def test_every_latency_rule_refuses_a_slow_model_and_passes_when_it_is_met(serve: Serve) -> None:
    serve(Reply(text=ALL_FIELDS, delay=0.03))
    results = results_of(phased())
    for metric in ("latency_s", *PHASES):
        for at_most, expected in ((0.02, "fail"), (10, "pass")):
            for rule in (p95(metric, at_most), Rule(metric=metric, at_most=at_most)):
                verdict = decide(results, rule)
                assert (verdict.verdict, *statuses(verdict).values()) == (expected, expected), rule.id


@pytest.mark.parametrize("slow", PHASES)
def test_a_phase_rule_refuses_the_phase_that_is_slow_and_no_other(serve: Serve, slow: str) -> None:
    def delay(request: Request) -> float:
        return 2 if asked_for(request) == PHASES[slow] and of_a_fifth(request) else 0

    serve(Reply(text=ALL_FIELDS, delay=delay))
    verdict = decide(results_of(phased()), *(p95(metric, 1.8) for metric in PHASES))
    assert verdict.verdict == "fail"
    assert [metric for metric, status in statuses(verdict).items() if status == "fail"] == [slow]


def test_a_p95_rule_refuses_a_slow_fifth_that_the_mean_hides(serve: Serve) -> None:
    serve(Reply(delay=lambda request: 2 if of_a_fifth(request) else 0))
    results = results_of(triage())
    assert decide(results, Rule(metric="latency_s", at_most=1.8)).verdict == "pass"
    assert decide(results, p95("latency_s", 1.8)).verdict == "fail"


def test_a_retry_is_part_of_the_latency_the_user_sees(serve: Serve) -> None:
    serve(*[Reply(status=429, headers={"Retry-After": "2"})] * 12, Reply())
    results = results_of(triage())
    assert results["task_failure"].sum() == 0
    assert (results["latency_s"] >= 2).sum() == 12
    assert (results["model_calls"] == 2).sum() == 12
    assert decide(results, p95("latency_s", 1.8)).verdict == "fail"


# ---- failures


@pytest.mark.parametrize(
    ("script", "timeout"),
    [
        ((Reply(text=lambda request: "I cannot say." if of_a_fifth(request) else answer(label="billing")),), 60),
        ((*[Reply(status=500)] * 12, Reply()), 60),
        ((*[Reply(body=b"<html>")] * 12, Reply()), 60),
        ((*[Reply(delay=8)] * 12, Reply()), 4),  # well above what twenty first calls at once take on a busy machine
    ],
    ids=["invalid output", "server error", "malformed body", "time-out"],
)
def test_the_failure_rule_refuses_when_a_fifth_fails(serve: Serve, script: tuple[Reply, ...], timeout: float) -> None:
    serve(*script, num_retries=0, timeout=timeout)
    results = results_of(triage())
    assert results["task_failure"].sum() == 12, results["error"].value_counts().to_dicts()
    assert results["success"].sum() == 48
    assert decide(results, FAILURES).verdict == "fail"


# ---- all of it


def test_a_good_version_passes_every_rule_at_once(serve: Serve) -> None:
    serve(Reply(text=ALL_FIELDS, delay=0.005))
    system = phased()
    rules = [Rule(metric="success", at_least=0.75), FAILURES, Rule(metric="cost_per_success_usd", at_most=0.5)]
    rules += [p95(metric, 10) for metric in ("latency_s", *PHASES)]
    verdict = decide(results_of(system), *rules, exercised=exercised(system))
    assert set(statuses(verdict).values()) == {"pass"}
    assert verdict.verdict == "pass"


def test_a_providers_model_exercises_cost_and_latency_and_the_embedded_one_neither(serve: Serve, project: Path) -> None:
    serve()
    assert exercised(triage()) == BOTH
    (project / "agentkit.toml").unlink()
    embedded = triage()
    assert exercised(embedded) == frozenset()
    verdict = decide(results_of(embedded, workers=1), PER_RUN, p95("latency_s", 10), exercised=exercised(embedded))
    assert set(statuses(verdict).values()) == {"not_exercised"}
    assert verdict.verdict == "inconclusive"


# ---- what an evaluation may spend


def test_max_usd_stops_the_evaluation_before_the_limit_is_passed(serve: Serve) -> None:
    provider = serve(Reply(tokens_out=10, delay=0.01), price=(0, 1000), max_tokens=10)  # 0.01 USD a call
    with pytest.raises(BudgetExceeded) as caught:
        evaluate(triage(), CASES, repeats=3, max_usd=0.205)
    assert (caught.value.limit, caught.value.allowed) == ("usd", 0.205)
    assert len(provider.requests) == 20


def test_max_usd_holds_when_answers_are_shorter_than_reserved(serve: Serve) -> None:
    provider = serve(Reply(tokens_out=10, delay=0.01), price=(0, 1000))  # 0.01 USD a call, 1 USD reserved
    with pytest.raises(BudgetExceeded):
        evaluate(triage(), CASES, repeats=3, max_usd=1.205)
    assert 0 < len(provider.requests) * 0.01 <= 1.205


def test_max_usd_without_a_known_price_is_refused_before_anything_is_sent(serve: Serve) -> None:
    provider = serve(price=None)
    with pytest.raises(ak.AgentkitError, match="a USD limit is set but no price is known"):
        evaluate(triage(), CASES[:9], repeats=1, max_usd=1)
    assert not provider.requests


def test_an_evaluation_with_an_unknown_price_has_no_cost_to_show(serve: Serve) -> None:
    serve(price=None)
    with pytest.raises(ak.AgentkitError, match="no price is known for the model"):
        evaluate(triage(), CASES[:9], repeats=1)


def test_a_model_pinned_by_the_program_is_what_counts(serve: Serve) -> None:
    provider = serve(price=(1, 1))
    predictor = dspy.Predict("ticket -> label")
    predictor.lm = ak.build_lm("fast")
    system = ak.adopt(predictor, name="pinned", model="embedded/default", success=lambda example, prediction: True)
    assert exercised(system) == {"cost", "latency"}
    assert estimate(system, CASES, repeats=1).usd > 0
    assert not provider.requests


def test_a_model_pinned_inside_an_agent_is_metered_and_its_budget_holds(serve: Serve) -> None:
    provider = serve(Reply(text=ALL_FIELDS), price=(1, 1))

    class Pinned(ak.Agent):
        name, result = "pinned", dict

        def __init__(self) -> None:
            super().__init__()
            self.deep = [dspy.Predict("ticket -> label")]
            self.deep[0].lm = dspy.LM(ak.build_lm("fast").model, api_base="http://127.0.0.1:9", api_key="k")

        def plan(self, run: ak.Run, ticket: str) -> str:
            return str(self.deep[0](ticket=ticket).label)

        def execute(self, run: ak.Run, plan: str, ticket: str) -> str:
            return plan

        def reflect(self, run: ak.Run, plan: str, facts: str, ticket: str) -> dict[str, str]:
            return {"label": facts}

    record = ak.System("pinned", [Pinned()], budget=ak.Budget(model_calls=0)).run(ticket="a")
    assert record.state == "FAILED"
    assert "budget of 0 model_calls" in (record.error or "")
    assert not provider.requests


def test_no_estimate_where_the_embedded_model_cannot_stand_in(serve: Serve) -> None:
    provider = serve(price=(1, 1))
    system = ak.adopt(dspy.Predict("ticket -> data: dict[str, int]"), name="d", success=lambda e, p: True)
    with pytest.raises(ak.AgentkitError, match="cannot stand in"):
        estimate(system, CASES, repeats=1)
    assert not provider.requests


@pytest.mark.parametrize("make", [triage, phased])
def test_an_estimate_spends_nothing_and_is_within_a_factor_of_two(serve: Serve, make: Any) -> None:
    provider = serve(Reply(text=ALL_FIELDS, tokens_in=None, tokens_out=0), price=(1, 0))
    expected = estimate(make(), CASES, repeats=2)
    assert not provider.requests
    results = evaluate(make(), CASES, repeats=2)
    assert expected.runs == len(results) == 120
    assert 0.5 <= expected.calls / len(provider.requests) <= 2
    assert 0.5 <= expected.tokens_in / results["tokens_in"].sum() <= 2
    assert expected.usd is not None
    assert 0.5 <= expected.usd / results["cost_usd"].sum() <= 2
