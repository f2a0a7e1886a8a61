"""The gate: its verdicts rule by rule, and in simulation how often it promotes what it should not."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
from conftest import SOAK
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtr

from agentkit_pipelines import stats
from agentkit_pipelines.gate import RuleResult, Verdict, judge
from agentkit_pipelines.thresholds import Rule, Thresholds

ALPHA = 0.05
SIMULATIONS = 60_000 if SOAK else 6_000
MONTE_CARLO = 3.7 * math.sqrt(ALPHA * (1 - ALPHA) / SIMULATIONS)  # 1.04 points: 96 scenarios, 1 % false alarms in all
BOTH = {"cost", "latency"}


def frame(success: NDArray[np.bool_], **columns: object) -> pl.DataFrame:
    """Results of (cases, repeats) successes; other columns may be given in the same shape, as one value or flat."""
    cases, repeats = success.shape
    every = {
        "success": success.ravel(),
        "task_failure": False,
        "escalated": False,
        "cost_usd": 0.1,
        "latency_s": 1.0,
        "planning_s": 0.5,
        "confidence": 0.8,
        **{name: value.ravel() if isinstance(value, np.ndarray) else value for name, value in columns.items()},
    }
    rows = {
        "case_id": [f"case-{i:03}" for i in np.repeat(np.arange(cases), repeats)],
        "repeat": np.tile(np.arange(repeats), cases),
        "task_type": [("billing", "technical", "general")[i % 3] for i in np.repeat(np.arange(cases), repeats)],
    }
    return pl.DataFrame(rows).with_columns(
        pl.Series(name, value) if isinstance(value, np.ndarray | list) else pl.lit(value).alias(name)
        for name, value in every.items()
    )


def share(of: float, cases: int = 300, repeats: int = 1) -> NDArray[np.bool_]:
    """Successes of the first cases, failures of the others; spread over the task types."""
    return np.repeat((np.arange(cases) < round(of * cases))[:, None], repeats, axis=1)


def decide(
    results: pl.DataFrame,
    *rules: Rule,
    production: pl.DataFrame | None = None,
    exercised: set[str] = BOTH,
) -> Verdict:
    return judge(results, Thresholds(system="s", confidence=0.95, rules=rules), production, exercised)


def only(verdict: Verdict) -> RuleResult:
    (result,) = verdict.rules
    return result


# --- verdicts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "verdict", "text"),
    [
        (0.81, "pass", "success is 0.81, at least 0.77 with 95 % confidence; the rule asks for at least 0.75"),
        (0.77, "inconclusive", "success is 0.77, at least 0.728 with 95 % confidence; the rule asks for at least 0.75; "
         "about 1,269 cases like these would decide, there are 300"),
        (0.73, "inconclusive", "success is 0.73, at least 0.686 with 95 % confidence; the rule asks for at least 0.75; "
         "the estimate itself misses it, so more cases like these would not do"),
        (0.6, "fail", "success is 0.6, at least 0.553 with 95 % confidence; the rule asks for at least 0.75; "
         "missed even at best: at most 0.645 with 95 % confidence"),
    ],
)  # fmt: skip
def test_the_bound_decides_and_the_text_says_why(of: float, verdict: str, text: str) -> None:
    found = decide(frame(share(of)), Rule(metric="success", at_least=0.75))
    assert (found.verdict, only(found).status, only(found).text) == (verdict, verdict, text)


def test_a_rule_by_task_type_is_judged_for_each_and_one_broken_type_blocks() -> None:
    success = share(1)
    success[1::3] = share(0.3, 100)  # technical
    found = decide(
        frame(success), Rule(metric="success", at_least=0.7), Rule(metric="success", at_least=0.6, by="task_type")
    )
    assert [(r.group, r.status, r.cases) for r in found.rules] == [
        (None, "pass", 300),
        ("billing", "pass", 100),
        ("general", "pass", 100),
        ("technical", "fail", 100),
    ]
    assert found.verdict == "fail"
    assert found.rules[3].id == "success/at_least/0.6/by_task_type/technical"
    assert found.rules[3].text.startswith("success for technical is 0.3")


def test_a_warning_never_blocks() -> None:
    bad = Rule(metric="category", at_least=0.9, level="warn")
    results = frame(share(0.9), category=share(0.5))
    assert decide(results, bad, Rule(metric="success", at_least=0.8)).verdict == "pass"
    assert decide(results, bad).verdict == "inconclusive"
    assert only(decide(results, bad)).status == "fail"


def test_what_the_model_does_not_exercise_is_no_evidence() -> None:
    rules = [Rule(metric="cost_per_success_usd", at_most=0.28), Rule(metric="latency_s", quantile=0.95, at_most=2.5)]
    found = decide(frame(share(1)), *rules, exercised={"latency"})
    assert [r.status for r in found.rules] == ["not_exercised", "pass"]
    assert found.rules[0].text == "cost_per_success_usd was not tested: the model in use does not exercise cost"
    assert (found.rules[0].estimate, found.rules[0].bound) == (None, None)
    assert decide(frame(share(1)), *rules, exercised=set()).verdict == "inconclusive"
    assert decide(frame(share(1)), *rules, Rule(metric="success", at_least=0.8), exercised=set()).verdict == "pass"


def test_without_production_the_comparison_does_not_apply() -> None:
    rule = Rule(metric="success", margin=0.05, versus="production")
    found = decide(frame(share(0.9)), rule, Rule(metric="success", at_least=0.8))
    assert (found.verdict, found.rules[0].status) == ("pass", "not_applicable")
    assert "no other version in production" in found.rules[0].text
    assert decide(frame(share(0.9)), rule).verdict == "inconclusive"


def test_a_crashed_metric_fails_closed() -> None:
    crashed: list[bool | None] = [None, None, *[True] * 298]
    found = decide(frame(share(1), category=crashed), Rule(metric="category", at_least=0.7))
    assert (found.verdict, only(found).status) == ("inconclusive", "inconclusive")
    assert "crashed on 2 of 300 rows" in only(found).text
    lost = frame(share(1)).with_columns(success=pl.lit(None, dtype=pl.Boolean))
    cost = only(decide(lost, Rule(metric="cost_per_success_usd", at_most=0.2)))
    assert "crashed on 300 of 300 rows" in cost.text


def test_a_metric_that_crashed_in_production_fails_closed_too() -> None:
    old = frame(share(1), category=[None, *[True] * 299])
    rule = Rule(metric="category", margin=0.05, versus="production")
    found = only(decide(frame(share(1), category=True), rule, production=old))
    assert (found.status, "crashed on 1 of 300 rows" in found.text) == ("inconclusive", True)


@pytest.mark.parametrize(("lost", "status"), [(0, "pass"), (3, "pass"), (12, "inconclusive"), (45, "fail")])
def test_a_loss_against_production_is_judged_by_its_bound(lost: int, status: str) -> None:
    new = share(0.9)
    new[:lost] = False
    found = only(
        decide(frame(new), Rule(metric="success", margin=0.05, versus="production"), production=frame(share(0.9)))
    )
    assert (found.status, found.limit) == (status, -0.05)
    assert found.estimate == pytest.approx(-lost / 300)
    assert found.text.startswith("success minus that in production is")


def test_more_failures_than_production_break_their_margin() -> None:
    rule = Rule(metric="task_failure", margin=0.02, versus="production")
    old = frame(share(1))
    assert only(decide(old, rule, production=old)).status == "pass"
    assert only(decide(frame(share(1), task_failure=share(0.1)), rule, production=old)).status == "fail"


@pytest.mark.parametrize(
    ("rule", "bad"),
    [
        (Rule(metric="cost_per_success_usd", at_most=0.28), {"cost_usd": 0.29}),
        (Rule(metric="cost_usd", at_most=0.28), {"cost_usd": 0.29}),
        (Rule(metric="latency_s", quantile=0.95, at_most=2.5), {"latency_s": np.where(share(0.1), 3.0, 1.0)}),
        (Rule(metric="planning_s", quantile=0.95, at_most=1.2), {"planning_s": 1.3}),
        (Rule(metric="latency_s", margin=0.2, versus="production"), {"latency_s": 1.3}),
        (Rule(metric="task_failure", at_most=0.08), {"task_failure": share(0.15)}),
        (Rule(metric="overlap", at_least=0.8), {"overlap": 0.7}),
        (Rule(metric="overlap", margin=0.1, versus="production"), {"overlap": 0.7}),
        (Rule(metric="tokens", at_most=500), {"tokens": 501}),
    ],
    ids=lambda value: value.id if isinstance(value, Rule) else "",
)
def test_every_kind_of_rule_passes_the_good_and_refuses_the_bad(rule: Rule, bad: dict[str, object]) -> None:
    extra: dict[str, object] = {"overlap": 0.9, "tokens": 400}
    good = frame(share(1), **extra)
    worse = frame(share(1), **{**extra, **bad})
    assert decide(good, rule, production=good).verdict == "pass"
    assert decide(worse, rule, production=good).verdict == "fail"


def test_seconds_are_reported_beside_the_shares_that_decide() -> None:
    latency = np.where(share(0.01), 3.0, np.linspace(1, 2, 300)[:, None])
    found = only(decide(frame(share(1), latency_s=latency), Rule(metric="latency_s", quantile=0.95, at_most=2.5)))
    assert found.estimate == pytest.approx(1.96, abs=0.01)
    assert found.bound == pytest.approx(1.98, abs=0.01)
    assert (
        "p95 of latency_s is 1.96 s, at most 1.98 s with 95 % confidence; the rule asks for at most 2.5 s" in found.text
    )
    assert found.text.endswith("1 % of the rows exceed 2.5 s, at most 2.48 %, and 5 % may")


def test_cost_per_success_without_a_success_fails_in_words() -> None:
    found = only(decide(frame(share(0)), Rule(metric="cost_per_success_usd", at_most=0.28)))
    assert (found.status, found.estimate, found.bound) == ("fail", None, None)
    assert "is any value, at most any value" in found.text


def test_a_perfect_small_sample_does_not_prove_everything() -> None:
    found = only(decide(frame(share(1, cases=45, repeats=8)), Rule(metric="success", at_least=0.95)))
    assert (found.status, found.cases) == ("inconclusive", 45)
    assert found.cases_needed == 52
    assert only(decide(frame(share(1, cases=52)), Rule(metric="success", at_least=0.95))).status == "pass"


def test_holm_guards_the_claim_that_something_failed() -> None:
    """One type of three is low with p = 0.03: enough by itself, not among many."""
    success = share(1)
    success[0::3] = share(0.67, 100)  # billing
    rule = Rule(metric="success", at_least=0.75, by="task_type")
    rows = frame(success)
    alone = decide(rows.filter(pl.col("task_type") == "billing"), rule)
    among = decide(rows, rule)
    assert (alone.verdict, among.verdict) == ("fail", "inconclusive")
    assert alone.rules[0].text.split("; missed")[0] in among.rules[0].text


# --- form ----------------------------------------------------------------------------------------------------------


def everything() -> tuple[pl.DataFrame, pl.DataFrame, tuple[Rule, ...]]:
    rng = np.random.default_rng(11)
    shape = (300, 8)

    def results() -> pl.DataFrame:
        seconds = {
            name: rng.lognormal(-1, 0.4, shape) for name in ("latency_s", "planning_s", "execution_s", "reflection_s")
        }
        ease = rng.beta(6, 1, (300, 1))
        yes = {"category": rng.random(shape) < ease, "escalated": rng.random(shape) < 0.1}
        return frame(
            rng.random(shape) < ease,
            **seconds,
            **yes,
            cost_usd=rng.lognormal(-2, 0.5, shape),
            overlap=rng.random(shape),
        )

    rules = [
        *(
            Rule(metric=m, at_least=x, by=by)
            for m, x in (("success", 0.7), ("category", 0.6))
            for by in (None, "task_type")
        ),
        *(
            Rule(metric=m, quantile=0.95, at_most=1.2)
            for m in ("latency_s", "planning_s", "execution_s", "reflection_s")
        ),
        *(
            Rule(metric="success", margin=x, versus="production", by=by)
            for x in (0.05, 0.15)
            for by in (None, "task_type")
        ),
        *(Rule(metric="cost_per_success_usd", at_most=x) for x in (0.1, 0.28)),
        *(
            Rule(metric=m, at_most=x)
            for m, x in (("task_failure", 0.08), ("escalated", 0.2), ("cost_usd", 0.3), ("latency_s", 1))
        ),
        Rule(metric="overlap", at_least=0.4),
        Rule(metric="latency_s", margin=0.1, versus="production", level="warn"),
    ]
    return results(), results(), tuple(rules)


def test_a_verdict_survives_json_and_the_order_of_rows() -> None:
    new, old, rules = everything()
    found = decide(new, *rules, production=old)
    assert len(rules) == 20
    assert {r.status for r in found.rules} == {"pass", "fail", "inconclusive"}
    assert Verdict.model_validate_json(found.model_dump_json()) == found
    shuffled = decide(new.sample(fraction=1, shuffle=True, seed=1), *rules, production=old.reverse())
    assert shuffled == found


def with_nan(results: pl.DataFrame) -> pl.DataFrame:
    return results.with_columns(latency_s=pl.when(pl.col("repeat") == 0).then(math.nan).otherwise(1.0))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.head(0), "results: expected at least one row; found none"),
        (lambda x: pl.concat([x, x.head(3)]), "one row per case and repeat; found 3 of them again"),
        (with_nan, "expected finite numbers or null in latency_s; found 45 NaN or infinite"),
        (lambda x: x.drop("task_type"), "expected the columns task_type; found case_id"),
        (lambda x: x.drop("success"), "no column for the metric 'success'; there are case_id, repeat"),
        (lambda x: x.with_columns(success=pl.lit("yes")), "expected yes or no or numbers in success; found String"),
        (lambda x: x.with_columns(case_id=None), "expected a value in every row of case_id"),
    ],
)
def test_unusable_results_are_refused(spoil: Callable[[pl.DataFrame], pl.DataFrame], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        decide(spoil(frame(share(1, 45, 2))), Rule(metric="success", at_least=0.7))


def test_production_on_other_cases_is_refused_with_the_difference() -> None:
    new, old = frame(share(1, 45, 3)), frame(share(1, 44, 4))
    with pytest.raises(ValueError, match=r"44 missing in results and 3 missing in production"):
        decide(new, Rule(metric="success", at_least=0.7), production=old)
    same = new.with_columns(pl.col("repeat").cast(pl.Int8))
    assert decide(new, Rule(metric="success", at_least=0.7), production=same).verdict == "pass"


def test_a_rule_that_does_not_suit_its_metric_is_refused() -> None:
    results = frame(share(1), category=share(1))
    for rule in (Rule(metric="category", at_least=1.0), Rule(metric="category", quantile=0.9, at_most=0.5)):
        with pytest.raises(ValueError, match="category is yes or no"):
            decide(results, rule)
    with pytest.raises(ValueError, match="families out of cost, latency; found speed"):
        decide(results, Rule(metric="success", at_least=0.7), exercised={"speed"})


# --- simulations ---------------------------------------------------------------------------------------------------


# correlation between the repeats of a case, between its difficulty for the two versions, share of luck in common
WORLDS = {"even": (0, 0, 0), "varied": (0.3, 0.9, 0.5), "stubborn": (0.6, 0.95, 1), "broken": (0.3, 1, 1)}


def chances(
    rng: np.random.Generator, cases: int, success: float, loss: float, world: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Chances that a row is gained and lost, per simulation and case, of two versions that differ by `loss` in truth.

    Difficulty is beta-distributed between cases and correlated between the versions; rows may share their luck, as
    perturbations with common seeds do. In the world `broken` the new version differs only in cases it always fails.
    """
    shape = (SIMULATIONS, cases)
    correlation, likeness, luck = WORLDS[world]

    def ease(mean: float, normal: NDArray[np.float64]) -> NDArray[np.float64]:
        if not correlation or mean >= 1:
            return np.full(shape, mean)
        grid, size = np.linspace(1e-4, 1 - 1e-4, 2001), 1 / correlation - 1
        return np.asarray(np.interp(ndtr(normal), grid, betaincinv(mean * size, (1 - mean) * size, grid)))

    normal = rng.standard_normal(shape)
    other = likeness * normal + math.sqrt(1 - likeness**2) * rng.standard_normal(shape)
    old = ease(success, normal)
    new = old * (rng.random(shape) >= loss / success) if world == "broken" else ease(success - loss, other)
    gain = luck * np.maximum(new - old, 0) + (1 - luck) * new * (1 - old)
    return gain, luck * np.maximum(old - new, 0) + (1 - luck) * old * (1 - new)


def promotions(cases: int, success: float, loss: float, world: str, margin: float) -> dict[int, float]:
    """How often a version with this true loss is promoted, by number of repeats."""
    rng = np.random.default_rng([cases, int(success * 100), int(loss * 100), len(world)])
    gain, lose = chances(rng, cases, success, loss, world)
    found = {}
    for repeats in (1, 3, 8):
        gained = rng.binomial(repeats, gain)
        lost = rng.binomial(repeats - gained, np.clip(lose / np.maximum(1 - gain, 1e-12), 0, 1))
        found[repeats] = float((stats.difference(gained, lost, repeats).p_above(-margin) <= ALPHA).mean())
    return found


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("success", [0.8, 0.96, 0.99, 1.0])
@pytest.mark.parametrize(("cases", "margin"), [(300, 0.05), (45, 0.15)])
def test_a_loss_of_the_margin_is_promoted_in_at_most_alpha(
    cases: int, margin: float, success: float, world: str
) -> None:
    assert max(promotions(cases, success, margin, world, margin).values()) <= ALPHA + MONTE_CARLO


@pytest.mark.parametrize(
    ("cases", "margin", "success", "world", "least"),
    [
        (300, 0.05, 0.8, "varied", {1: 0.65, 3: 0.95, 8: 0.99}),
        (300, 0.05, 0.96, "varied", {1: 0.97, 3: 0.99, 8: 0.99}),
        (300, 0.05, 0.96, "stubborn", {1: 0.99, 3: 0.99, 8: 0.99}),
        (45, 0.15, 0.8, "varied", {1: 0.72, 3: 0.95, 8: 0.99}),
        (45, 0.15, 0.96, "stubborn", {1: 0.98, 3: 0.99, 8: 0.99}),
    ],
)
def test_an_equal_version_is_mostly_promoted(
    cases: int, margin: float, success: float, world: str, least: dict[int, float]
) -> None:
    found = promotions(cases, success, 0.0, world, margin)
    assert {repeats: power >= least[repeats] for repeats, power in found.items()} == dict.fromkeys(least, True), found


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("success", [0.8, 1.0])
def test_a_loss_of_ten_points_is_refused(success: float, world: str) -> None:
    assert max(promotions(300, success, 0.10, world, 0.05).values()) <= 0.005


@pytest.mark.parametrize(
    ("cases", "margin", "verdict"), [(300, 0.05, "pass"), (45, 0.15, "pass"), (45, 0.05, "inconclusive")]
)
@pytest.mark.parametrize("repeats", [1, 3, 8])
def test_when_both_always_succeed_the_number_of_cases_decides(
    cases: int, margin: float, verdict: str, repeats: int
) -> None:
    perfect = frame(share(1, cases, repeats))
    found = decide(perfect, Rule(metric="success", margin=margin, versus="production"), production=perfect)
    assert found.verdict == verdict
    assert only(found).cases_needed == (None if verdict == "pass" else 52)


def test_the_gate_decides_as_the_simulated_statistics_do() -> None:
    rng = np.random.default_rng(12)
    rule = Rule(metric="success", margin=0.05, versus="production")
    statuses = []
    for _ in range(60):
        ease = rng.beta(4, 1, (300, 1))
        old, new = rng.random((300, 3)) < ease, rng.random((300, 3)) < ease - 0.03
        found = only(decide(frame(new), rule, production=frame(old)))
        reference = stats.difference((new & ~old).sum(1), (old & ~new).sum(1), 3)
        assert (found.status == "pass") == (reference.lower(0.95) >= -0.05)
        assert found.bound == pytest.approx(float(reference.lower(0.95)))
        statuses.append(found.status)
    assert {"pass", "inconclusive"} <= set(statuses)


def test_many_rules_at_their_limits_seldom_lead_to_a_false_claim_of_failure() -> None:
    """Without Holm the three task types would be said to have failed in about 14 % of the runs."""
    rng = np.random.default_rng(13)
    rule = Rule(metric="success", at_least=0.75, by="task_type")
    runs = 400
    failed = [decide(frame(rng.random((300, 1)) < 0.75), rule).verdict == "fail" for _ in range(runs)]
    assert np.mean(failed) <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)
