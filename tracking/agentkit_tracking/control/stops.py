"""Stops: signed, append-only entries that say what must not run, and what may run again.

A stop counts whoever wrote it: to forge one gains nothing that breaking the database would not. What ends a stop is believed
only from a trusted key, and names the stop that it ends: no old one can be used twice.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field
from sqlalchemy import select, text

from agentkit import clock
from agentkit.errors import TrustError, UsageError
from agentkit_tracking.control.database import ControlError, Database
from agentkit_tracking.control.tables import STOPS, insert_new
from agentkit_tracking.home import author
from agentkit_tracking.keys import Trust, load_trust, signing_key
from agentkit_tracking.statements import Digest, Statement, check, day, read, sign, signer

NO_RELEASE = "0" * 64  # what a statement about no release names as its digest
_RELEASE = re.compile(r"[0-9a-f]{12,64}")
_WHY_LENGTH = 500


@dataclass(frozen=True)
class Target:
    """What is stopped: everything that is all of what is named here."""

    system: str | None = None
    release: str | None = None  # the id, or how it begins
    agent: str | None = None
    tool: str | None = None

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `SYSTEM`, `release:ID` (or 12 and more hex digits), `agent:NAME`, `tool:NAME`, `SYSTEM/agent:NAME`,
        `SYSTEM/tool:NAME`.

        Raises:
            UsageError: it is none of these.
        """
        before, slash, last = text.rpartition("/")
        kind, colon, name = last.partition(":")
        if slash and not (colon and kind in ("agent", "tool")):
            raise UsageError(_HOW.format(text))
        if not colon:
            kind, name = ("release", last) if _RELEASE.fullmatch(last) else ("system", last)
        wrong = kind == "release" and not re.fullmatch(r"[0-9a-f]{6,64}", name)
        if kind not in ("system", "release", "agent", "tool") or not _is_name(name) or wrong:
            raise UsageError(_HOW.format(text))
        if slash and not _is_name(before):
            raise UsageError(_HOW.format(text))
        return cls(**{"system": before or None, kind: name})

    def __str__(self) -> str:
        parts = [self.system or "", *(f"{k}:{v}" for k in ("release", "agent", "tool") if (v := getattr(self, k)))]
        return "/".join(filter(None, parts))

    def covers(self, system: str, release: str | None, agent: str | None, tool: str | None) -> bool:
        """Whether a call of this system, release, agent and tool is meant."""
        return (
            self.system in (None, system)
            and (self.release is None or (release or "").startswith(self.release))
            and self.agent in (None, agent)
            and self.tool in (None, tool)
        )


def _is_name(name: str) -> bool:
    return bool(name) and name.isprintable() and not any(c in "/:" or c.isspace() for c in name) and len(name) <= 200


_HOW = (
    "{!r} is nothing that can be stopped; name a system (support_triage), a release (support_triage/3 or release:ID), "
    "an agent (agent:billing) or a tool (tool:issue_refund), the latter two also of one system "
    "(support_triage/tool:issue_refund)"
)


class StopEvent(Statement):
    """The signer stopped a target, or let it run again (`ends` holds the digests of the stops that are over)."""

    predicate_type: ClassVar[str] = "urn:agentkit:stop:v1"

    event: Literal["stopped", "resumed"]
    sequence: int = Field(ge=1)
    agent: str | None
    tool: str | None
    ends: tuple[Digest, ...]
    who: str = Field(max_length=200)
    why: str = Field(max_length=_WHY_LENGTH)

    @property
    def target(self) -> Target:
        """What it is about."""
        release = None if self.release == NO_RELEASE else self.release
        return Target(self.system or None, release, self.agent, self.tool)


@dataclass(frozen=True)
class Event:
    """An entry as it was found. `problem` says why its signature does not count here; "" where it does."""

    statement: StopEvent
    digest: Digest
    by: str
    problem: str = ""

    def __str__(self) -> str:
        said = self.statement
        why = f": {said.why}" if said.why else ""
        doubt = f" ({self.problem})" if self.problem else ""
        return f"{said.event} by {self.by} on {day(said.time)} UTC{why}{doubt}"


@dataclass(frozen=True)
class Stop:
    """A stop in force. `doubt` tells of an attempt to end it that does not count."""

    target: Target
    event: Event
    doubt: str = ""

    def __str__(self) -> str:
        doubt = f"; {self.doubt}" if self.doubt else ""
        return f"{self.target} was {self.event}{doubt}; `agentkit resume {self.target} --why …` lets it run again"


class Stops:
    """The stops in a control database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._seen = 0  # entries are only ever added: fewer than before means that some were taken away
        self._judged: dict[str, Event] = {}
        self._judged_by: Trust | None = None
        self._lock = threading.Lock()

    def in_force(self) -> tuple[Stop, ...]:
        """What is stopped now.

        Raises:
            ControlError: the entries cannot be read, or some are missing.
        """
        return tuple(_in_force(self.history()))

    def history(self) -> list[Event]:
        """Every entry, oldest first.

        Raises:
            ControlError: the entries cannot be read, or some are missing.
        """
        with self._database.reading() as connection:
            rows = [tuple(r) for r in connection.execute(select(STOPS).order_by(STOPS.c.sequence))]
        with self._lock:
            found = [self._judge(sequence, envelope) for sequence, envelope in rows]
            if [n for n, _ in rows] != list(range(1, len(rows) + 1)) or len(rows) < self._seen:
                raise ControlError(
                    f"entries are missing from the stops in {self._database}: something may run that was stopped; stop it "
                    "again in a new control database, or restore this one"
                )
            self._seen = len(rows)
        return found

    def stop(self, target: Target, why: str = "") -> Event:
        """Stop a target: everywhere within `HOLDS_WITHIN_S`.

        Raises:
            ControlError, UsageError: it could not be written, or there is no key to sign with.
        """
        return self._append("stopped", target, why)

    def resume(self, target: Target, why: str) -> Event:
        """Let a target run again; other stops that cover it stay.

        Raises:
            UsageError: it is not stopped, or no reason is given.
        """
        if not why.strip():
            raise UsageError("say why it may run again (--why)")
        return self._append("resumed", target, why)

    def _append(self, event: Literal["stopped", "resumed"], target: Target, why: str) -> Event:
        key = signing_key()
        with self._database.writing() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("LOCK TABLE stops IN EXCLUSIVE MODE"))
            rows = [tuple(r) for r in connection.execute(select(STOPS).order_by(STOPS.c.sequence))]
            entries = [self._judge(n, envelope) for n, envelope in rows]
            ends = [s.event.digest for s in _in_force(entries) if s.target == target]
            if event == "resumed" and not ends:
                others = ", ".join(sorted({str(s.target) for s in _in_force(entries)})) or "nothing"
                raise UsageError(f"{target} is not stopped; stopped: {others}")
            statement = StopEvent(
                system=target.system or "",
                release=target.release or NO_RELEASE,
                time=clock.utc(),
                signer=signer(key),
                event=event,
                sequence=max((n for n, _ in rows), default=0) + 1,
                agent=target.agent,
                tool=target.tool,
                ends=tuple(ends) if event == "resumed" else (),
                who=author()[:200],
                why=" ".join(why.split())[:_WHY_LENGTH],
            )
            envelope = sign(statement, key)
            if not insert_new(connection, STOPS, sequence=statement.sequence, envelope=envelope):
                raise ControlError("somebody else changed the stops at the same moment; try again")
        return self._judge(statement.sequence, envelope)

    def _judge(self, sequence: int, envelope: str) -> Event:
        trust = load_trust()
        if trust is not self._judged_by:
            self._judged, self._judged_by = {}, trust
        if envelope not in self._judged:
            self._judged[envelope] = _judge(envelope, trust)
        found = self._judged[envelope]
        if found.statement.sequence != sequence:
            raise ControlError(f"entry {sequence} of the stops in {self._database} was put there from elsewhere")
        return found


def _judge(envelope: str, trust: Trust) -> Event:
    try:
        signed = read(envelope, StopEvent)
    except TrustError as e:
        raise ControlError(f"an entry of the stops cannot be read ({e}); restore the control database") from e
    try:
        owner = check(signed, trust).owner
    except TrustError as e:
        return Event(signed.statement, signed.digest, f"{signed.statement.who}?", str(e))
    return Event(signed.statement, signed.digest, named(signed.statement.who, owner))


def named(who: str, owner: str) -> str:
    """Who did it: the login, and whose key signed where that says more."""
    return who if who == owner else f"{who} (key of {owner})"


def _in_force(entries: list[Event]) -> Iterator[Stop]:
    over: set[Digest] = set()
    doubted: dict[Digest, str] = {}
    for entry in entries:
        for ended in entry.statement.ends:
            if entry.problem:
                doubted[ended] = f"{entry.by} resumed it, which does not count: {entry.problem}"
            else:
                over.add(ended)
    for entry in entries:
        said = entry.statement
        if said.event == "stopped" and entry.digest not in over:
            yield Stop(said.target, entry, doubted.get(entry.digest, ""))
