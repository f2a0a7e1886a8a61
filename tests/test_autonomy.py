"""Bounded autonomy: the tier of a call is read from a table, and rules only ever raise it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import agentkit as ak
from agentkit.autonomy import Criticality, Permission, Situation, Tier
from agentkit.errors import UsageError

CALM = Situation("write", "low")
situations = st.builds(
    Situation,
    permission=st.sampled_from(get_args(Permission)),
    criticality=st.sampled_from(get_args(Criticality)),
    production=st.booleans(),
    confidence=st.none() | st.floats(0, 1) | st.just(math.nan),
    failures=st.integers(0, 5),
    budget_used=st.floats(0, 2),
    over=st.none() | st.just("amount_usd is 80.00, and from 50.00 on a person decides"),
)

TABLE = """
            low medium high
read        1   1      2
write       1   2      3
execute     2   3      3
"""


@pytest.mark.parametrize("permission", get_args(Permission))
@pytest.mark.parametrize("column", range(3))
def test_without_a_reason_to_be_careful_the_table_decides(permission: Permission, column: int) -> None:
    criticality = get_args(Criticality)[column]
    (row,) = [line.split() for line in TABLE.splitlines() if line.startswith(permission)]
    tier, why = ak.Autonomy().decide(Situation(permission, criticality))
    assert tier == int(row[1 + column])
    assert why == (f"{permission} of {criticality} criticality",)


RAISED = {
    "production": ({"production": True}, Tier.NOTIFY, "it takes effect in production"),
    "confidence": ({"confidence": 0.69}, Tier.WAIT, "confidence is 0.69, below 0.7"),
    "no confidence at all": ({"confidence": math.nan}, Tier.WAIT, "confidence is nan, which is no number from 0 to 1"),
    "confidence in percent": ({"confidence": 95.0}, Tier.WAIT, "confidence is 95.0, which is no number from 0 to 1"),
    "endless confidence": ({"confidence": math.inf}, Tier.WAIT, "confidence is inf, which is no number from 0 to 1"),
    "confidence below 0": ({"confidence": -0.1}, Tier.WAIT, "confidence is -0.1, which is no number from 0 to 1"),
    "text": ({"confidence": "0.9"}, Tier.WAIT, "confidence is '0.9', which is no number from 0 to 1"),
    "an object": ({"confidence": [1]}, Tier.WAIT, "confidence is a list, which is no number from 0 to 1"),
    "a yes": ({"confidence": True}, Tier.WAIT, "confidence is True, which is no number from 0 to 1"),
    "failures": ({"failures": 2}, Tier.WAIT, "2 calls of this run have failed"),
    "budget": ({"budget_used": 0.8}, Tier.WAIT, "80% of a budget is used"),
    "amount": ({"over": "too much"}, Tier.WAIT, "too much"),
}


@pytest.mark.parametrize(("change", "tier", "why"), RAISED.values(), ids=RAISED.keys())
def test_each_rule_raises_a_write_to_its_tier_and_says_so(change: dict[str, object], tier: Tier, why: str) -> None:
    now = replace(CALM, **change)
    assert ak.Autonomy().decide(now) == (tier, (why,))
    assert ak.Autonomy().decide(replace(now, permission="read"))[0] is Tier.ACT


@pytest.mark.parametrize("change", [{"confidence": 0.7}, {"failures": 1}, {"budget_used": 0.799}, {"confidence": None}])
def test_short_of_its_limit_no_rule_applies(change: dict[str, object]) -> None:
    assert ak.Autonomy().decide(replace(CALM, **change))[0] is Tier.ACT


def test_all_reasons_of_the_highest_tier_are_named() -> None:
    now = replace(CALM, production=True, confidence=0.1, failures=3)
    tier, why = ak.Autonomy().decide(now)
    assert (tier, why) == (Tier.WAIT, ("confidence is 0.10, below 0.7", "3 calls of this run have failed"))


@given(now=situations)
def test_no_rule_ever_lowers_a_tier_and_worse_never_acts_more_freely(now: Situation) -> None:
    policy = ak.Autonomy()
    tier, why = policy.decide(now)
    assert tier >= policy.tiers[now.permission][now.criticality]
    assert why
    worse = [replace(now, production=True), replace(now, failures=now.failures + 1), replace(now, confidence=0.0)]
    worse += [replace(now, budget_used=now.budget_used + 1), replace(now, over="too much")]
    assert all(policy.decide(other)[0] >= tier for other in worse)


@given(now=situations)
def test_a_rule_that_is_off_is_off(now: Situation) -> None:
    off = ak.Autonomy(in_production=None, confidence_below=None, failures_from=None, budget_used_from=None)
    assert off.decide(replace(now, over=None))[0] == off.tiers[now.permission][now.criticality]


def test_the_policy_can_be_read_as_a_table_and_belongs_to_the_release() -> None:
    rows = ak.Autonomy(failures_from=None).rows()
    assert {"rule": "write, criticality medium", "tier": 2} in rows
    assert {"rule": "write or execute: confidence below 0.7", "tier": 3} in rows
    assert not any("failed" in str(row["rule"]) for row in rows)
    assert ak.Autonomy(confidence_below=0.5).spec()["confidence_below"] == 0.5
    assert ak.Autonomy().spec()["tiers"]["execute"] == {"low": 2, "medium": 3, "high": 3}  # type: ignore[index]


def test_a_rule_that_always_applies_is_in_the_table_too() -> None:
    policy = ak.Autonomy(failures_from=0, budget_used_from=0, confidence_below=0)
    assert policy.decide(CALM)[0] is Tier.WAIT
    rules = [row["rule"] for row in policy.rows() if row["tier"] == 3]
    for rule in ("0 failed calls", "budget used from 0", "confidence below 0"):
        assert f"write or execute: {rule}" in rules


ROW: dict[Criticality, int] = {"low": 1, "medium": 2, "high": 3}
WRONG = [
    ({"confidence_below": 70}, "confidence_below is a number from 0 to 1 or None, not 70"),
    ({"confidence_below": math.nan}, "confidence_below is a number from 0 to 1 or None, not nan"),
    ({"budget_used_from": "0.8"}, "budget_used_from is a number from 0 to 1 or None, not '0.8'"),
    ({"failures_from": -1}, "failures_from is a whole number from 0 or None, not -1"),
    ({"failures_from": 1.5}, "failures_from is a whole number from 0 or None, not 1.5"),
    ({"failures_from": True}, "failures_from is a whole number from 0 or None, not True"),
    ({"in_production": 4}, r"in_production is a tier \(1, 2 or 3\) or None, not 4"),
    ({"in_production": False}, r"in_production is a tier \(1, 2 or 3\) or None, not False"),
    ({"tiers": None}, "tiers is a mapping with exactly read, write, execute, not None"),
    ({"tiers": {}}, "tiers is a mapping with exactly read, write, execute, not with nothing"),
    ({"tiers": {"read": ROW, "write": ROW}}, "exactly read, write, execute, not with 'read', 'write'"),
    (
        {"tiers": {"read": ROW, "write": ROW, "execute": {"low": 1}}},
        r"tiers\['execute'\] is a mapping with exactly low",
    ),
    (
        {"tiers": {"read": ROW, "write": ROW, "execute": {**ROW, "high": 9}}},
        r"tiers\['execute'\]\['high'\] is a tier \(1, 2 or 3\), not 9",
    ),
]


@pytest.mark.parametrize(("settings", "told"), WRONG)
def test_a_policy_that_makes_no_sense_is_refused_at_once(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        ak.Autonomy(**settings)


def test_a_policy_of_plain_numbers_is_as_good_as_one_of_tiers() -> None:
    policy = ak.Autonomy(tiers={"read": ROW, "write": ROW, "execute": ROW}, in_production=1, confidence_below=1)
    assert policy.decide(Situation("write", "medium", production=True)) == (
        Tier.NOTIFY,
        ("write of medium criticality",),
    )
