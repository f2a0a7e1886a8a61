"""The limit that `agentkit budget suggest` gives covers 99 % of runs, with 95 % confidence: by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit.errors import UsageError
from agentkit_pipelines.budget_cli import round_up, suggest, tolerance_limit


@pytest.mark.parametrize("runs", [299, 1000])
def test_the_limit_covers_what_it_says_at_least_as_often_as_it_says(runs: int) -> None:
    rng = np.random.default_rng(0)
    covered = [np.exp(-tolerance_limit(rng.exponential(size=runs).tolist())[0]) <= 0.01 for _ in range(1000)]
    assert 0.93 <= np.mean(covered) <= 0.985  # order statistics come in steps: at least 0.95, up to 0.02 of chance


def test_with_too_few_runs_it_is_the_largest_and_says_so() -> None:
    assert tolerance_limit([3.0, 1.0]) == (3.0, False)
    assert tolerance_limit([float(i) for i in range(299)])[1]
    assert not tolerance_limit([float(i) for i in range(298)])[1]


@given(st.floats(1e-6, 1e9))
def test_rounding_never_lowers_and_adds_little(value: float) -> None:
    assert value * (1 - 1e-9) <= round_up(value) <= value * 1.11


@pytest.mark.parametrize("headroom", [float("inf"), float("nan"), 1e308, 0.5])
def test_headroom_that_is_no_factor_is_refused(headroom: float) -> None:
    with pytest.raises(UsageError, match="it is a number from 1 to 1,000,000"):
        suggest("visitor", headroom)
