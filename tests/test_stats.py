"""Bounds for repeated cases: their properties, published values, and how often they err in simulation."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.stats import binom, binomtest
from scipy.stats import t as student

from agentkit_pipelines import stats

ALPHA = 0.05
CONFIDENCE = 1 - ALPHA
SIMULATIONS = 10_000
MONTE_CARLO = 3 * math.sqrt(ALPHA * (1 - ALPHA) / SIMULATIONS)  # three standard errors, 0.65 points


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[int], int]:
    """Successes of each case, and the repeats that all cases have."""
    repeats = draw(st.integers(1, 8))
    return draw(st.lists(st.integers(0, repeats), min_size=1, max_size=40)), repeats


@st.composite
def pairs(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """Gains and losses of each case, and the repeats that all cases have."""
    repeats = draw(st.integers(1, 8))
    gained = draw(st.lists(st.integers(0, repeats), min_size=1, max_size=40))
    return gained, [draw(st.integers(0, repeats - gain)) for gain in gained], repeats


def bounds(evidence: stats.Evidence, confidence: float = CONFIDENCE) -> NDArray[np.float64]:
    return np.asarray([evidence.lower(confidence), evidence.upper(confidence)])


# --- proportions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("successes", "cases"), [(0, 45), (7, 45), (44, 45), (45, 45), (240, 300)])
def test_with_one_repeat_the_interval_is_wilsons(successes: int, cases: int) -> None:
    mine = stats.interval(stats.proportion([1] * successes + [0] * (cases - successes), 1), 0.9)
    reference = binomtest(successes, cases).proportion_ci(0.9, method="wilson")
    assert mine == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_repeats_that_all_agree_count_as_one() -> None:
    once, often = stats.proportion([1] * 30 + [0] * 15, 1), stats.proportion([8] * 30 + [0] * 15, 8)
    assert bounds(often) == pytest.approx(bounds(once))


def test_independent_repeats_count_almost_as_rows() -> None:
    sums = np.random.default_rng(1).binomial(8, 0.7, size=(200, 300))
    assert stats.proportion(sums, 8).effective_n.mean() == pytest.approx(2400, rel=0.1)


def test_unequal_numbers_of_repeats_are_at_least_kishs_number_of_cases() -> None:
    assert stats.proportion([0, 0, 0], [1, 1, 8]).effective_n == pytest.approx(100 / 66)


@pytest.mark.parametrize("repeats", [1, 8])
@pytest.mark.parametrize("cases", [1, 2, 45])
@pytest.mark.parametrize("share", [0, 1])
def test_bounds_are_never_degenerate(share: int, cases: int, repeats: int) -> None:
    low, high = bounds(stats.proportion([share * repeats] * cases, repeats))
    assert high - low == pytest.approx(2.7055 / (cases + 2.7055), abs=1e-4)


@given(clusters(), st.floats(0.55, 0.999))
def test_bounds_lie_in_the_unit_interval_around_the_estimate(data: tuple[list[int], int], confidence: float) -> None:
    found = stats.proportion(*data)
    low, high = bounds(found, confidence)
    assert -1e-12 <= low <= found.estimate + 1e-12
    assert found.estimate - 1e-12 <= high <= 1 + 1e-12


@given(clusters(), st.data())
def test_one_more_success_never_lowers_a_bound(data: tuple[list[int], int], draw: st.DataObject) -> None:
    sums, repeats = data
    case = draw.draw(st.integers(0, len(sums) - 1))
    more = [min(y + (i == case), repeats) for i, y in enumerate(sums)]
    assert (bounds(stats.proportion(more, repeats)) >= bounds(stats.proportion(sums, repeats)) - 1e-12).all()


@given(clusters(), st.randoms())
def test_the_order_of_rows_changes_nothing(data: tuple[list[int], int], random: Random) -> None:
    sums, repeats = data
    rows = [(case, int(r < y)) for case, y in enumerate(sums) for r in range(repeats)]
    shuffled = rows.copy()
    random.shuffle(shuffled)
    straight, mixed = (stats.per_case([v for _, v in x], [c for c, _ in x]) for x in (rows, shuffled))
    assert bounds(stats.proportion(*straight)) == pytest.approx(bounds(stats.proportion(*mixed)), abs=1e-12)


@given(clusters(), st.floats(0.51, 0.99), st.floats(0.001, 0.009))
def test_more_confidence_widens(data: tuple[list[int], int], confidence: float, more: float) -> None:
    found = stats.proportion(*data)
    narrow, wide = bounds(found, confidence), bounds(found, confidence + more)
    assert wide[0] <= narrow[0] + 1e-12
    assert wide[1] >= narrow[1] - 1e-12


@example(([1] * 20, 2), 2)  # every case as even as can be: copies look like many rows that agree
@given(clusters(), st.integers(2, 5))
def test_copies_of_repeats_never_narrow_a_bound(data: tuple[list[int], int], copies: int) -> None:
    sums, repeats = data
    copied = bounds(stats.proportion([y * copies for y in sums], repeats * copies))
    assert copied == pytest.approx(bounds(stats.proportion(sums, repeats)), abs=1e-12)


@given(clusters(), st.floats(0.55, 0.99))
def test_p_value_and_bound_agree(data: tuple[list[int], int], confidence: float) -> None:
    found = stats.proportion(*data)
    low, high = bounds(found, confidence)
    if low > 1e-9:
        assert found.p_above(float(low)) == pytest.approx(1 - confidence)
    if high < 1 - 1e-9:
        assert found.p_above(float(high)) == pytest.approx(confidence)


@pytest.mark.parametrize(
    ("sums", "counts"), [([], []), ([2], [1]), ([-1], [1]), ([0], [0]), ([math.nan], [1])], ids=str
)
def test_impossible_counts_are_refused(sums: list[float], counts: list[int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        stats.proportion(sums, counts)


def beta_binomial(
    rng: np.random.Generator, cases: int, repeats: int, share: float, correlation: float
) -> NDArray[np.int64]:
    """Successes per case when repeats of a case correlate: difficulty is beta-distributed between cases."""
    if not correlation:
        return rng.binomial(repeats, share, (SIMULATIONS, cases))
    size = 1 / correlation - 1
    return rng.binomial(repeats, rng.beta(share * size, (1 - share) * size, (SIMULATIONS, cases)))


@pytest.mark.parametrize(
    ("repeats", "correlation"), [(1, 0), (3, 0), (3, 0.3), (3, 0.7), (8, 0), (8, 0.1), (8, 0.3), (8, 0.7), (8, 0.95)]
)
@pytest.mark.parametrize("share", [0.55, 0.75, 0.92])
@pytest.mark.parametrize("cases", [45, 300])
def test_proportion_below_its_limit_clears_it_in_at_most_alpha(
    cases: int, share: float, repeats: int, correlation: float
) -> None:
    rng = np.random.default_rng([cases, int(share * 100), repeats, int(correlation * 100)])
    found = stats.proportion(beta_binomial(rng, cases, repeats, share, correlation), repeats)
    assert (found.p_above(share) <= ALPHA).mean() <= ALPHA + MONTE_CARLO


@pytest.mark.parametrize(("cases", "most"), [(45, 0.0725), (300, 0.068)])
def test_exact_error_of_the_bound_wavers_around_alpha(cases: int, most: float) -> None:
    """At the worst limit there is: counts are whole numbers, so the error of Wilson's bound jumps with the limit."""
    successes = np.arange(cases + 1)
    steps = np.array([float(stats.proportion([1] * x + [0] * (cases - x), 1).lower(CONFIDENCE)) for x in successes])
    errors = binom.sf(successes - 1, cases, steps)[steps > 0.5]
    assert ALPHA < errors.max() <= most


@pytest.mark.parametrize("share", [0.95, 0.98])
def test_proportion_near_one_errs_in_at_most_seven_percent(share: float) -> None:
    for cases, repeats, correlation in [(45, 1, 0), (45, 8, 0.7), (300, 1, 0), (300, 3, 0.3), (300, 8, 0.7)]:
        rng = np.random.default_rng([cases, int(share * 100), repeats])
        found = stats.proportion(beta_binomial(rng, cases, repeats, share, correlation), repeats)
        assert (found.p_above(share) <= ALPHA).mean() <= 0.07


def test_counting_rows_as_cases_would_err_far_more_often() -> None:
    """The simulation can tell: the same data without clusters errs in a quarter of the runs."""
    sums = beta_binomial(np.random.default_rng(2), 45, 8, 0.75, 0.7).sum(axis=1, keepdims=True)
    z = (sums[:, 0] / 360 - 0.75) / math.sqrt(0.75 * 0.25 / 360)
    assert (z > 1.645).mean() > 0.2


# --- paired differences --------------------------------------------------------------------------------------------


def tango_reference(gained: int, lost: int, rows: int, limit: float) -> float:
    """Tango's statistic with the likelihood maximised numerically instead of by his formula."""

    def minus_log_likelihood(q: float) -> float:
        return -(
            gained * math.log(q + limit) + lost * math.log(q) + (rows - gained - lost) * math.log(1 - 2 * q - limit)
        )

    q = minimize_scalar(minus_log_likelihood, bounds=(max(0, -limit), (1 - limit) / 2), method="bounded").x
    return (gained - lost - rows * limit) / math.sqrt(rows * (2 * q + limit * (1 - limit)))


@pytest.mark.parametrize(("gained", "lost", "rows"), [(3, 7, 45), (12, 20, 300), (9, 4, 60)])
@pytest.mark.parametrize("limit", [-0.15, -0.05, 0.02])
def test_with_one_repeat_the_difference_is_tangos(gained: int, lost: int, rows: int, limit: float) -> None:
    rest = rows - gained - lost
    found = stats.difference([1] * gained + [0] * (lost + rest), [0] * gained + [1] * lost + [0] * rest, 1)
    p = found.p_above(limit)
    expected = 0.5 * math.erfc(tango_reference(gained, lost, rows, limit) / math.sqrt(2))
    assert p == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("cases", [45, 300])
@pytest.mark.parametrize("repeats", [1, 3, 8])
def test_versions_that_never_differ_are_bounded_by_the_number_of_cases(cases: int, repeats: int) -> None:
    z2 = 1.6448536**2
    low, high = bounds(stats.difference([0] * cases, [0] * cases, repeats))
    assert (low, high) == pytest.approx((-z2 / (cases + z2), z2 / (cases + z2)), abs=1e-6)


@given(pairs(), st.floats(0.55, 0.99))
def test_difference_bounds_lie_around_the_estimate_and_agree_with_p(
    data: tuple[list[int], list[int], int], confidence: float
) -> None:
    found = stats.difference(*data)
    low, high = bounds(found, confidence)
    assert -1 <= low <= found.estimate + 1e-9
    assert found.estimate - 1e-9 <= high <= 1
    if low > -0.999:
        assert found.p_above(float(low)) == pytest.approx(1 - confidence, abs=1e-6)


@given(pairs(), st.data())
def test_one_more_gain_or_less_loss_never_lowers_the_difference(
    data: tuple[list[int], list[int], int], draw: st.DataObject
) -> None:
    gained, lost, repeats = data
    case = draw.draw(st.integers(0, len(gained) - 1))
    better_gained, better_lost = gained.copy(), lost.copy()
    if lost[case]:
        better_lost[case] -= 1
    elif gained[case] < repeats:
        better_gained[case] += 1
    better = bounds(stats.difference(better_gained, better_lost, repeats))
    assert (better >= bounds(stats.difference(gained, lost, repeats)) - 1e-9).all()


@example(([1] * 20, [1] * 20, 3), 2)
@given(pairs(), st.integers(2, 5))
def test_copies_of_repeats_never_narrow_a_difference(data: tuple[list[int], list[int], int], copies: int) -> None:
    gained, lost, repeats = data
    copied = stats.difference([g * copies for g in gained], [x * copies for x in lost], repeats * copies)
    assert bounds(copied) == pytest.approx(bounds(stats.difference(gained, lost, repeats)), abs=1e-9)


@given(pairs())
def test_swapping_versions_mirrors_the_difference(data: tuple[list[int], list[int], int]) -> None:
    gained, lost, repeats = data
    there, back = stats.difference(gained, lost, repeats), stats.difference(lost, gained, repeats)
    assert bounds(there) == pytest.approx(-bounds(back)[::-1], abs=1e-9)


def test_impossible_gains_are_refused() -> None:
    with pytest.raises(ValueError, match="gains and losses"):
        stats.difference([1], [1], 1)


# --- scores, means, ratios, quantiles ------------------------------------------------------------------------------


def test_scores_that_vary_little_have_a_narrow_bound_but_never_none() -> None:
    rng = np.random.default_rng(3)
    varied = stats.proportion(rng.uniform(0.8, 0.9, 300), 1, fractional=True)
    assert 0.835 < varied.lower(CONFIDENCE) < 0.85
    assert stats.proportion(np.full(300, 1.0), 1, fractional=True).lower(CONFIDENCE) == pytest.approx(300 / 302.7055)


def test_mean_of_symmetric_values_has_the_t_bound() -> None:
    values = np.array([1.0, 2, 3, 4, 5])
    found = stats.mean(values, 1)
    half = student.ppf(CONFIDENCE, 4) * values.std(ddof=1) / math.sqrt(5)
    assert bounds(found) == pytest.approx([3 - half, 3 + half])
    assert found.p_above(float(found.lower(CONFIDENCE))) == pytest.approx(ALPHA)


@given(st.lists(st.floats(0, 100), min_size=2, max_size=30), st.floats(0.6, 0.99))
def test_mean_bounds_and_p_value_agree(values: list[float], confidence: float) -> None:
    found = stats.mean(values, 1)
    low, high = bounds(found, confidence)
    assert low <= high
    if found.error > 1e-6:
        assert found.p_above(float(low)) == pytest.approx(1 - confidence, abs=1e-4)


def test_mean_of_one_case_is_unbounded_and_of_equal_cases_certain() -> None:
    one, equal = stats.mean([3.0], [2]), stats.mean([0.1] * 9, 1)
    assert bounds(one).tolist() == [-math.inf, math.inf]
    assert one.p_above(0) == 0.5
    assert bounds(equal) == pytest.approx([0.1, 0.1])
    assert equal.p_above(0.05) == 0


@pytest.mark.parametrize(
    ("cases", "sigma", "most"), [(300, 0.5, 0.055), (45, 0.5, 0.06), (300, 1.0, 0.07), (45, 1.0, 0.10)]
)
def test_mean_of_long_tailed_values_errs_little(cases: int, sigma: float, most: float) -> None:
    rng = np.random.default_rng(4)
    values = rng.lognormal(0, sigma, (SIMULATIONS, cases))
    truth = math.exp(sigma**2 / 2)
    assert (stats.mean(values, 1).p_above(truth) >= CONFIDENCE).mean() <= most + MONTE_CARLO


def test_cost_per_success_is_total_cost_over_successes_within_its_bounds() -> None:
    rng = np.random.default_rng(5)
    costs, wins = rng.uniform(0.1, 0.3, 60), rng.binomial(3, 0.8, 60)
    found = stats.ratio(costs, wins, 3)
    assert found.estimate == pytest.approx(costs.sum() / wins.sum())
    low, high = bounds(found)
    assert low < found.estimate < high
    assert [found.p_above(float(low)), found.p_above(float(high))] == pytest.approx([ALPHA, CONFIDENCE])


def test_cost_per_success_without_success_has_no_upper_bound() -> None:
    found = stats.ratio([1.0] * 20, [0] * 20, 1)
    assert math.isinf(found.estimate)
    assert math.isinf(found.upper(CONFIDENCE))
    assert found.p_above(1.0) < ALPHA
    assert math.isinf(stats.ratio([1.0] * 3, [1, 0, 0], 1).upper(CONFIDENCE))


def test_cost_per_success_stays_honest_when_every_case_succeeds() -> None:
    """45 of 45 prove a success rate of about 0.93, so a constant cost is not proven to be below cost / 0.95."""
    found = stats.ratio([1.0] * 45, [1] * 45, 1)
    assert 1 / 0.95 < found.upper(CONFIDENCE) < 1 / 0.85
    assert bounds(stats.ratio([0.0] * 45, [1] * 45, 1)) == pytest.approx([0, 0], abs=1e-9)


@pytest.mark.parametrize("share", [0.6, 0.85, 0.97, 0.995])
@pytest.mark.parametrize(("cases", "repeats"), [(45, 1), (45, 8), (300, 3)])
@pytest.mark.parametrize("sigma", [0.3, 0.6])
def test_cost_per_success_at_its_limit_is_promoted_in_at_most_alpha(
    share: float, cases: int, repeats: int, sigma: float
) -> None:
    rng = np.random.default_rng([cases, repeats, int(share * 1000)])
    simulations = 4_000
    ease = rng.beta(share * 7 / 3, (1 - share) * 7 / 3, (simulations, cases))  # correlation 0.3
    wins = rng.binomial(repeats, ease)
    costs = repeats * np.exp(sigma * rng.standard_normal((simulations, cases)) - (ease - share) / 2)
    limit = float(costs.mean() / (repeats * share))
    promoted = (stats.ratio(costs, wins, repeats).p_above(limit) >= CONFIDENCE).mean()
    assert promoted <= ALPHA + 4 * math.sqrt(ALPHA * (1 - ALPHA) / simulations)


def test_quantile_bound_is_an_order_statistic_that_exceedance_proves() -> None:
    rng = np.random.default_rng(6)
    values, cases = rng.exponential(size=900), np.repeat(np.arange(300), 3)
    found = stats.quantile(values, cases, 0.95)
    low, high = bounds(found)
    assert low < found.estimate < high
    assert {float(low), float(found.estimate), float(high)} <= set(values)
    assert found.over(float(high)).upper(CONFIDENCE) <= 0.05 < found.over(float(high) - 1e-9).upper(CONFIDENCE)
    assert np.sort(values)[854] == found.estimate  # the 855th of 900


def test_quantile_of_few_cases_has_no_bound() -> None:
    few = stats.quantile(np.arange(50.0), np.arange(50), 0.95)
    assert bounds(few)[1] == math.inf
    assert few.p_above(1e9) < CONFIDENCE
    assert stats.quantile(np.arange(60.0), np.arange(60), 0.95).upper(CONFIDENCE) == 59


@pytest.mark.parametrize(("cases", "spread"), [(300, 0.0), (300, 1.0), (100, 0.5)])
def test_quantile_at_its_limit_clears_it_in_at_most_alpha(cases: int, spread: float) -> None:
    rng = np.random.default_rng(7)
    runs, ids = 1_500, np.repeat(np.arange(cases), 3)
    logs = spread * rng.standard_normal((runs, cases, 1)) + rng.standard_normal((runs, cases, 3))
    limit = 1.6448536 * math.sqrt(1 + spread**2)
    clears = [stats.quantile(x.ravel(), ids, 0.95).p_above(limit) >= CONFIDENCE for x in logs]
    assert np.mean(clears) <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)


# --- multiplicity, sample size, calibration ------------------------------------------------------------------------


def test_holm_gives_the_textbook_values() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([]).size == 0


@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_never_lowers_a_p_value_nor_swaps_two(p_values: list[float]) -> None:
    adjusted = stats.holm(p_values)
    assert (adjusted >= p_values).all()
    assert (np.diff(adjusted[np.argsort(p_values)]) >= 0).all()


@pytest.mark.parametrize("limit", [0.72, 0.7, 0.65])
def test_that_many_cases_decide_and_fewer_do_not(limit: float) -> None:
    now = np.array([3, 3, 3, 0, 1, 3, 3, 3, 0, 3] * 2)
    found = stats.proportion(now, 3)
    assert found.lower(CONFIDENCE) < limit < found.estimate
    needed = stats.cases_needed(found, float(found.p_above(limit)), CONFIDENCE)
    assert needed is not None
    repeated = [np.tile(now, round(needed / 20 * factor)) for factor in (1.1, 0.8)]
    assert [stats.proportion(x, 3).lower(CONFIDENCE) >= limit for x in repeated] == [True, False]


def test_no_number_of_cases_decides_for_an_estimate_on_the_wrong_side() -> None:
    found = stats.proportion([1] * 7 + [0] * 3, 1)
    assert stats.cases_needed(found, float(found.p_above(0.7)), CONFIDENCE) is None
    assert stats.cases_needed(found, float(found.p_above(0.8)), CONFIDENCE) is None


def test_calibration_of_a_worked_example() -> None:
    found = stats.calibration([0.9] * 10 + [0.6] * 10, [1] * 8 + [0] * 2 + [1] * 6 + [0] * 4, bins=2)
    assert found.error == pytest.approx(0.05)
    assert found.brier == pytest.approx((8 * 0.01 + 2 * 0.81 + 6 * 0.16 + 4 * 0.36) / 20)


def test_calibration_is_small_for_honest_confidences_and_large_for_boastful_ones() -> None:
    rng = np.random.default_rng(8)
    stated = rng.uniform(0.3, 1, 5_000)
    right = rng.random(5_000) < stated
    assert stats.calibration(stated, right).error < 0.03
    assert stats.calibration(np.full(5_000, 0.99), right).error == pytest.approx(0.99 - right.mean())


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.5, 0.9]), st.booleans()), min_size=1, max_size=50), st.randoms())
def test_calibration_does_not_depend_on_the_order_of_ties(rows: list[tuple[float, bool]], random: Random) -> None:
    shuffled = rows.copy()
    random.shuffle(shuffled)
    first, second = (stats.calibration([c for c, _ in x], [y for _, y in x]) for x in (rows, shuffled))
    assert (first.error, first.brier) == pytest.approx((second.error, second.brier))


@pytest.mark.parametrize(("stated", "right"), [([], []), ([0.5], [1, 0]), ([1.5], [1]), ([math.nan], [1])], ids=str)
def test_calibration_refuses_what_is_no_probability(stated: list[float], right: list[float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        stats.calibration(stated, right)
