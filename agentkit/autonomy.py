"""How far an agent may go alone: a table from permission and criticality to a tier, and rules that raise the tier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from numbers import Real
from typing import Any, Literal, get_args

from agentkit.errors import UsageError

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
    or execute) to at least its tier; `None` turns the rule off. Reads are never raised. A stated confidence that is no
    number from 0 to 1 counts as not sure.

    Raises:
        UsageError: a tier is not 1 to 3 or missing, or a rule's limit is not of its range.
    """

    tiers: Mapping[Permission, Mapping[Criticality, int]] = field(default_factory=lambda: _TIERS)
    in_production: int | None = Tier.NOTIFY
    confidence_below: float | None = 0.7
    failures_from: int | None = 2
    budget_used_from: float | None = 0.8

    def __post_init__(self) -> None:
        _check_tiers(self.tiers)
        if self.in_production is not None and not _is_tier(self.in_production):
            raise _wrong("in_production", "a tier (1, 2 or 3) or None", self.in_production)
        for name in ("confidence_below", "budget_used_from"):
            if (limit := getattr(self, name)) is not None and _share(limit) is None:
                raise _wrong(name, "a number from 0 to 1 or None", limit)
        failures = self.failures_from
        if failures is not None and not (type(failures) is int and failures >= 0):
            raise _wrong("failures_from", "a whole number from 0 or None", failures)

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
        if (bar := self.confidence_below) is not None and now.confidence is not None:
            sure = _share(now.confidence)
            if sure is None:
                yield Tier.WAIT, f"confidence is {_said(now.confidence)}, which is no number from 0 to 1"
            elif sure < bar:
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
            (f"confidence below {self.confidence_below}", self.confidence_below),
            (f"{self.failures_from} failed calls", self.failures_from),
            (f"budget used from {self.budget_used_from}", self.budget_used_from),
            ("an amount at or over the tool's limit", Tier.WAIT),
            ("the same call of a tool that is not idempotent, again", Tier.WAIT),
        ]
        tiers = [self.in_production, *(Tier.WAIT for _ in rules[1:])]
        return base + [
            {"rule": f"write or execute: {rule}", "tier": int(tier)}
            for (rule, limit), tier in zip(rules, tiers, strict=True)
            if limit is not None and tier is not None
        ]

    def spec(self) -> dict[str, object]:
        """The policy as JSON-able data, for the release."""
        tiers = {p: {c: int(t) for c, t in row.items()} for p, row in self.tiers.items()}
        rest = ("in_production", "confidence_below", "failures_from", "budget_used_from")
        return {"tiers": tiers, **{name: getattr(self, name) for name in rest}}


def _check_tiers(tiers: Any) -> None:
    for permission, row in _table("tiers", tiers, get_args(Permission)):
        for criticality, tier in _table(f"tiers[{permission!r}]", row, get_args(Criticality)):
            if not _is_tier(tier):
                raise _wrong(f"tiers[{permission!r}][{criticality!r}]", "a tier (1, 2 or 3)", tier)


def _table(name: str, table: Any, keys: tuple[str, ...]) -> list[tuple[str, Any]]:
    expected = f"a mapping with exactly {', '.join(keys)}"
    if not isinstance(table, Mapping):
        raise _wrong(name, expected, table)
    if set(table) != set(keys):
        raise UsageError(f"Autonomy: {name} is {expected}, not with {', '.join(map(_said, table)) or 'nothing'}")
    return list(table.items())


def _is_tier(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in list(Tier)


def _share(value: Any) -> float | None:
    """A number from 0 to 1; None for anything else."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value <= 1 else None


def _wrong(name: str, expected: str, found: object) -> UsageError:
    return UsageError(f"Autonomy: {name} is {expected}, not {_said(found)}")


def _said(value: object) -> str:
    """A number or a short text as it is; of other data only the type."""
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else f"{value[:40]}…")
    plain = value is None or isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 64)
    return str(value) if plain else f"a {type(value).__name__}"
