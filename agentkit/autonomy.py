"""How far an agent may go alone: a table from permission and criticality to a tier, and rules that raise the tier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

Permission = Literal["read", "write", "execute"]
Criticality = Literal["low", "medium", "high"]


class Tier(IntEnum):
    """What happens before and after a call."""

    ACT = 1
    NOTIFY = 2  # acts, and people are told
    WAIT = 3  # a person decides first


_TIERS: dict[Permission, dict[Criticality, Tier]] = {
    "read": {"low": Tier.ACT, "medium": Tier.ACT, "high": Tier.NOTIFY},
    "write": {"low": Tier.ACT, "medium": Tier.NOTIFY, "high": Tier.WAIT},
    "execute": {"low": Tier.NOTIFY, "medium": Tier.WAIT, "high": Tier.WAIT},
}


@dataclass(frozen=True)
class Situation:
    """What the policy looks at when a tool is about to be called."""

    permission: Permission
    criticality: Criticality
    production: bool = False  # the release in force, working on the real world
    confidence: float | None = None  # as the agent states it, 0 to 1; None: it states none
    failures: int = 0  # calls of this run that have failed so far
    budget_used: float = 0.0  # largest used share of any limit of the run or the day
    over: str | None = None  # which amount meets the tool's limit, in words
    repeated: bool = False  # this run has made the same call before, and it is not idempotent


@dataclass(frozen=True)
class Autonomy:
    """The policy of a system; part of its release, readable with `rows()`.

    `tiers` gives the tier by permission and criticality. Each further rule raises a call that changes something (write
    or execute) to at least its tier; `None` turns the rule off. Reads are never raised.
    """

    tiers: Mapping[Permission, Mapping[Criticality, int]] = field(default_factory=lambda: _TIERS)
    in_production: int | None = Tier.NOTIFY
    confidence_below: float | None = 0.7
    failures_from: int | None = 2
    budget_used_from: float | None = 0.8

    def decide(self, now: Situation) -> tuple[Tier, tuple[str, ...]]:
        """The tier, and the rules that raised it to where it is, in words."""
        tier = Tier(self.tiers[now.permission][now.criticality])
        why: tuple[str, ...] = (f"{now.permission} of {now.criticality} criticality",)
        if now.permission == "read":
            return tier, why
        for least, reason in self._raised(now):
            if least > tier:
                tier, why = least, (reason,)
            elif least == tier:
                why = (*why, reason)
        return tier, why

    def _raised(self, now: Situation) -> Iterator[tuple[Tier, str]]:
        if self.in_production is not None and now.production:
            yield Tier(self.in_production), "it takes effect in production"
        bar, sure = self.confidence_below, now.confidence
        # `not >=` rather than `<`: a confidence of NaN is none at all.
        if bar is not None and sure is not None and not sure >= bar:
            yield Tier.WAIT, f"confidence is {sure:.2f}, below {bar:g}"
        if self.failures_from is not None and now.failures >= self.failures_from:
            yield Tier.WAIT, f"{now.failures} calls of this run have failed"
        if self.budget_used_from is not None and now.budget_used >= self.budget_used_from:
            yield Tier.WAIT, f"{now.budget_used:.0%} of a budget is used"
        if now.over is not None:
            yield Tier.WAIT, now.over
        if now.repeated:
            yield Tier.WAIT, "this run has done exactly that already"

    def rows(self) -> list[dict[str, str | int]]:
        """The whole policy as a table: one row for each condition, with its tier."""
        base: list[dict[str, str | int]] = [
            {"rule": f"{permission}, criticality {criticality}", "tier": int(tier)}
            for permission, row in self.tiers.items()
            for criticality, tier in row.items()
        ]
        rules = [
            ("takes effect in production", self.in_production),
            (f"confidence below {self.confidence_below}", self.confidence_below and Tier.WAIT),
            (f"{self.failures_from} failed calls", self.failures_from and Tier.WAIT),
            (f"budget used from {self.budget_used_from}", self.budget_used_from and Tier.WAIT),
            ("an amount at or over the tool's limit", Tier.WAIT),
            ("the same call of a tool that is not idempotent, again", Tier.WAIT),
        ]
        return base + [{"rule": f"write or execute: {rule}", "tier": int(tier)} for rule, tier in rules if tier]

    def spec(self) -> dict[str, object]:
        """The policy as JSON-able data, for the release."""
        tiers = {p: {c: int(t) for c, t in row.items()} for p, row in self.tiers.items()}
        rest = ("in_production", "confidence_below", "failures_from", "budget_used_from")
        return {"tiers": tiers, **{name: getattr(self, name) for name in rest}}
