"""Which runs are looked at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from agentkit.errors import UsageError
from agentkit.runs import REHEARSALS

HOUR, DAY, WEEK = 3_600, 86_400, 604_800  # seconds
_MONDAY = -3 * DAY  # the first one before 1970, from which weeks are counted
_KINDS = ", ".join(f"'{kind}'" for kind in REHEARSALS)


@dataclass(frozen=True)
class Filter:
    """What is asked for; None does not filter.

    `release` is the whole id, or "" for drafts, which have none. `since` (included) and `until` (not included) compare with
    when a run began, of single calls with when they were logged; both need a time zone.
    """

    system: str | None = None
    release: str | None = None
    stage: Literal["draft", "production"] | None = None
    since: datetime | None = None
    until: datetime | None = None
    rehearsals: bool = False  # also evaluations, chaos runs and replays

    def __post_init__(self) -> None:
        for name in ("since", "until"):
            at = getattr(self, name)
            if at is not None and at.tzinfo is None:
                raise UsageError(f"Filter.{name} needs a time zone, got {at!r}; add e.g. tzinfo=UTC")

    def before(self) -> Filter | None:
        """The same for the time just before, as long; None where no beginning or no end is named."""
        if self.since is None or self.until is None:
            return None
        return replace(self, since=self.since - (self.until - self.since), until=self.since)

    def where(self, time: Literal["started_at", "logged_at"], *, kinds: bool = True) -> tuple[str, list[Any]]:
        """A condition of SQL, and its parameters; of feedback, which has no kind, with `kinds=False`."""
        conditions, values = ["true"], list[Any]()
        for column, value in (("system", self.system), ("stage", self.stage)):
            if value is not None:
                conditions.append(f"{column} = ?")
                values.append(value)
        if self.release == "":
            conditions.append("release IS NULL")
        elif self.release is not None:
            conditions.append("release = ?")
            values.append(self.release)
        for sign, at in ((">=", self.since), ("<", self.until)):
            if at is not None:
                conditions.append(f"{time} {sign} ?")
                values.append(at)
        if kinds and not self.rehearsals:
            conditions.append(f"coalesce(kind, 'run') NOT IN ({_KINDS})")
        return " AND ".join(conditions), values


def bucket_of(length: timedelta) -> int:
    """How many seconds a point of a chart stands for: an hour, a day or a week."""
    return HOUR if length <= timedelta(days=3) else DAY if length <= timedelta(days=120) else WEEK


def bucketed(time: str, seconds: int) -> str:
    """SQL for when the bucket of a time began (UTC); weeks begin on Monday."""
    first, size = (_MONDAY if seconds == WEEK else 0) * 1_000_000, seconds * 1_000_000
    return f"make_timestamptz((epoch_us({time}) - {first}) // {size} * {size} + {first})"
