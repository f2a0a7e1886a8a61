"""The monitor's statistics: exact where they can be, and how often they err in simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import polars as pl
import pytest
import streams
from conftest import SOAK
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom, binomtest, norm

from agentkit_pipelines import monitor, sequential
from agentkit_pipelines.monitor import Limits
from agentkit_pipelines.sequential import Blocks, Grouping, Series

ALPHA = 0.05
STREAMS, LOOKS = (2_000, 500) if SOAK else (60, 150)
NO_FLOOR = Limits(alpha=ALPHA, rate=0.0, ratio=1.0, mix=0.0)


def hours(values: list[list[float]]) -> Blocks:
    """Every value an observation of its own; a list per hour."""
    at = np.repeat(np.arange(len(values)), [len(v) for v in values])
    return Grouping(at, np.arange(len(at))).blocks(np.concatenate([*map(np.asarray, values)]))


def flips(rate: float, count: int, per_hour: int, seed: int) -> Blocks:
    rng = np.random.default_rng(seed)
    return hours([list((rng.random(per_hour) < rate).astype(float)) for _ in range(count)])


# ---- observations


def test_runs_of_one_cluster_in_one_block_are_one_observation() -> None:
    grouping = Grouping([5, 5, 5, 5, 7, 7], [1, 1, 1, 2, 1, 3])
    found = grouping.blocks([1, 1, 0, 0, 1, np.nan])
    assert found.at.tolist() == [5, 7]
    assert found.sizes == pytest.approx([2, 1])
    assert found.sums == pytest.approx([2 / 3, 1])
    assert np.bincount([0, 0, 0, 0, 1, 1], grouping.weights) == pytest.approx([2, 2])


def test_blocks_in_which_nothing_is_known_are_left_out() -> None:
    assert Grouping([1, 2, 3], [1, 1, 1]).blocks([1.0, np.nan, 0.0]).at.tolist() == [1, 3]
    assert not len(Grouping([], []).blocks([]).at)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_the_grid_keeps_every_mean(values: list[float]) -> None:
    found = Grouping(np.zeros(len(values)), np.arange(len(values))).blocks(values)
    assert found.sums.sum() == pytest.approx(sum(values), abs=1e-9)
    assert (found.counts >= 0).all()


# ---- validity, exactly


def test_weights_of_all_beginnings_sum_to_one() -> None:
    given_ = sequential.weights(100_000)
    assert 0.7 < given_.sum() < 1
    assert (np.diff(given_[1:]) < 0).all()
    left = 0.7 * math.log(30) / math.log(100_030)
    assert given_.sum() + left == pytest.approx(1)


@pytest.mark.parametrize("limit", [0.02, 0.3, 0.9])
def test_no_bet_gains_on_average_under_the_null(limit: float) -> None:
    """All 2^10 outcomes of five hours with two observations: the expected wealth stays one."""
    wealth = np.zeros(5)
    for outcome in itertools.product([0.0, 1.0], repeat=10):
        chance = float(np.prod([limit if x else 1 - limit for x in outcome]))
        stream = hours([list(outcome[i : i + 2]) for i in range(0, 10, 2)])
        wealth += chance * np.exp(sequential.below(limit, stream, 1.0).evidence)
    assert wealth == pytest.approx(np.ones(5))


@pytest.mark.parametrize(("k", "n"), [(0, 40), (2, 40), (20, 40)])
def test_an_alarm_is_at_most_as_likely_as_asked_whatever_the_baseline_happened_to_be(k: int, n: int) -> None:
    """The expected evidence over baselines of n and streams of 8 observations, exactly, at every true rate."""
    for rate in (max(k, 1) / n, 0.1, 0.5):
        expected = 0.0
        for hits in range(n + 1):
            reference = sequential.reference(hours([[1.0] * hits + [0.0] * (n - hits)]))
            for later in range(9):
                stream = hours([[1.0] * later + [0.0] * (8 - later)])
                evidence = sequential.against(reference, stream).evidence[-1]
                expected += binom.pmf(hits, n, rate) * binom.pmf(later, 8, rate) * math.exp(evidence)
        assert expected <= 1


def test_the_calibrator_is_one() -> None:
    z = np.linspace(-12, 16, 200_001)
    assert np.trapezoid(np.exp(sequential._calibrated(z)) * norm.pdf(z), z) == pytest.approx(1, abs=1e-6)


def test_the_law_of_an_order_statistic_is_that_of_the_edges() -> None:
    """How likely a new value exceeds the 90th of 100 is Beta(11, 90) for every distribution: the edges are its quantiles."""
    reference = sequential.reference(hours([[1.0] * 10 + [0.0] * 90]))
    assert reference.edges[:21:4] == pytest.approx(beta(11, 90).ppf(norm.cdf(range(6))))


def test_a_baseline_without_surprises_is_clopper_and_pearsons() -> None:
    reference = sequential.reference(hours([[1.0] * 7 + [0.0] * 93]))
    exact = binomtest(7, 100).proportion_ci(0.95)
    assert reference.interval(0.05) == pytest.approx((exact.low, exact.high))
    assert sequential.reference(hours([[0.0] * 50])).interval(0.05)[0] == 0
    with pytest.raises(ValueError, match="found none"):
        sequential.reference(hours([[]]))


def test_nothing_can_be_worse_than_always() -> None:
    reference = sequential.reference(hours([[1.0] * 300]))
    assert (sequential.against(reference, hours([[1.0] * 500] * 5), 0.01).evidence < 0).all()


# ---- looks


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=6), min_size=2, max_size=12), st.data()
)
def test_a_verdict_does_not_depend_on_when_somebody_looked(values: list[list[float]], data: st.DataObject) -> None:
    reference, stream = sequential.reference(flips(0.05, 10, 20, seed=0)), hours(values)
    cut = data.draw(st.integers(1, len(values) - 1))
    early, late = (sequential.against(reference, s, 0.01) for s in (stream.until(cut), stream))
    assert early.evidence == pytest.approx(late.evidence[:cut])
    threshold = math.log(20)
    before, after = (sequential.watch([Series("x", reference, s)], threshold)[0] for s in (stream.until(cut), stream))
    assert [(e.onset, e.alarm) for e in before] == [(e.onset, e.alarm) for e in after if e.alarm < cut]


def test_an_alarm_says_since_when_and_ends_when_it_is_over() -> None:
    parts = [flips(0.05, 100, 20, 1), flips(0.3, 30, 20, 2), flips(0.05, 100, 20, 3), flips(0.3, 20, 20, 4)]
    stream = Blocks(np.arange(250), np.vstack([p.counts for p in parts]))
    episodes, evidence = sequential.watch(
        [Series("x", sequential.reference(flips(0.05, 300, 20, 0)), stream, 0.01)], math.log(900)
    )
    first, second = episodes
    assert abs(first.onset - 100) <= 2
    assert 100 < first.alarm <= 110
    assert first.recovered is not None
    assert 130 < first.recovered <= 145
    assert abs(second.onset - 230) <= 2
    assert second.recovered is None
    assert evidence[-1] > math.log(900)


def test_a_hundred_failures_of_one_user_within_an_hour_are_one() -> None:
    reference = sequential.reference(flips(0.05, 300, 20, seed=0))
    at, ones = np.zeros(100), np.ones(100)
    of_one, of_many = (Grouping(at, who).blocks(ones) for who in (np.zeros(100), np.arange(100)))
    assert sequential.against(reference, of_one).evidence[0] < math.log(20)
    assert sequential.against(reference, of_many).evidence[0] > math.log(900)


def test_what_hours_have_in_common_is_seen_in_the_baseline() -> None:
    assert sequential.reference(flips(0.05, 300, 20, seed=0)).dispersion < 1.3
    wave = [
        list((np.random.default_rng(h).random(50) < 0.2 + 0.15 * math.sin(h / 4)).astype(float)) for h in range(300)
    ]
    assert sequential.reference(hours(wave)).dispersion > 3


def test_a_level_that_drifts_from_week_to_week_shows_in_four_weeks() -> None:
    def level(week: int) -> float:
        return 0.03 if week % 2 else 0.07

    rng = np.random.default_rng(0)
    baseline = hours([list((rng.random(20) < level(h // 168)).astype(float)) for h in range(672)])
    # An hour has 20 observations; the variance of a week's sum is that within, and that of its level.
    within, between = 3360 * 0.05 * 0.95, (3360 * 0.02) ** 2
    assert sequential.reference(baseline).dispersion == pytest.approx(4 / 3 * (within + between) / within, rel=0.3)


def test_most_baselines_without_surprises_are_taken_as_such() -> None:
    found = [sequential.reference(flips(0.05, 672, 20, seed)).dispersion for seed in range(60)]
    assert np.median(found) == 1
    assert np.quantile(found, 0.9) < 2


@pytest.mark.parametrize("drift", list(streams.DRIFTS)[1:])
def test_a_level_that_drifts_within_days_is_seldom_an_alarm(drift: str) -> None:
    """Nothing promises it, and without dispersion a fifth of these were alarms."""
    wrong = 0
    for seed in range(30):
        rng, made = np.random.default_rng(seed), streams.drifting(*streams.DRIFTS[drift], seed)
        baseline, stream = made.runs(rng, 0, 672), made.runs(rng, 672, 300)
        wrong += strongest("failure", baseline, stream) >= -math.log(ALPHA)
    assert wrong <= binom.ppf(0.95, 30, ALPHA)


# ---- confidence sequences


def test_a_confidence_sequence_holds_at_all_times_together() -> None:
    rng, missed = np.random.default_rng(0), 0
    for _ in range(400):
        sums, sizes = np.cumsum(rng.random(400) < 0.1), np.arange(1, 401)
        low, high = sequential.confidence_sequence(sums, sizes, ALPHA)
        missed += bool(((low > 0.1) | (high < 0.1)).any())
        assert (low <= sums / sizes + 1e-9).all()
        assert (high >= sums / sizes - 1e-9).all()
    assert missed <= 400 * ALPHA


def test_a_quantile_lies_between_its_ranks_at_all_times() -> None:
    rng, missed, true = np.random.default_rng(0), 0, 10 ** (1 / 1.1) - 1
    for _ in range(200):
        values = rng.pareto(1.1, 300)
        for n in range(20, 301, 20):
            ordered, shares = np.sort(values[:n]), sequential.quantile_ranks(0.9, n, ALPHA)
            low, high = (math.ceil(share * n - 1e-9) - 1 for share in shares)
            if (low >= 0 and true < ordered[low]) or (high < n and true > ordered[high]):
                missed += 1
                break
    assert missed <= 200 * ALPHA


# ---- simulation


def strongest(name: str, baseline: pl.DataFrame, stream: pl.DataFrame) -> float:
    (measure,) = monitor.measures([name])
    series = monitor.series_of(measure, *monitor.pair(baseline, stream, name), NO_FLOOR)
    each = np.stack([sequential.against(s.baseline, s.stream, s.floor).evidence for s in series])
    return float(np.log(np.exp(each).mean(0)).max())


@pytest.mark.parametrize("traffic", streams.TRAFFIC)
@pytest.mark.parametrize("baseline_hours", [168, 12])
def test_false_alarms_stay_below_alpha(traffic: str, baseline_hours: int) -> None:
    wrong = 0
    for seed in range(STREAMS if baseline_hours > 12 or SOAK else STREAMS // 2):
        rng = np.random.default_rng([seed, baseline_hours])
        made = streams.users(seed=seed) if traffic == "returning users" else streams.TRAFFIC[traffic]
        baseline, stream = made.runs(rng, 0, baseline_hours), made.runs(rng, baseline_hours, LOOKS)
        name = "cost" if traffic == "heavy-tailed costs" else "failure"
        wrong += strongest(name, baseline, stream) >= -math.log(ALPHA)
    assert wrong <= binom.ppf(0.999, STREAMS, ALPHA)


@pytest.mark.parametrize(("failures", "within"), [(0.12, 80), (0.2, 20), (1.0, 1)])
@pytest.mark.parametrize("onset", [0, 100])
def test_what_was_planted_is_found_soon(failures: float, within: int, onset: int) -> None:
    rng, made = np.random.default_rng(int(100 * failures)), streams.independent()
    baseline, stream = made.runs(rng, 0, 336), made.runs(rng, 336, 250, failures=failures, onset=onset)
    (measure,) = monitor.measures(["failure"])
    episodes, _ = sequential.watch(
        monitor.series_of(measure, *monitor.pair(baseline, stream, "failure"), Limits()), math.log(9 / 0.01)
    )
    assert abs(episodes[0].onset - onset) <= 0.3 * within + 1
    assert 0 <= episodes[0].alarm - onset < within
