"""What the agents of one run share: what they found out, and who writes to which thing outside."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentkit import clock
from agentkit.errors import ConflictingWrite, UsageError
from agentkit.jsonable import jsonable

if TYPE_CHECKING:
    from agentkit.records import RunRecord
    from agentkit.runs import Run

BOARD = "blackboard"  # the name of the step that keeps a board in the record of its run


class Claims:
    """What the agents of a run tree write: to which thing, and which calls have been made already.

    The first to write to a thing keeps it until the run is over.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: dict[tuple[str, str], str] = {}
        self._written: set[tuple[str, str]] = set()
        self._made: set[tuple[str, bytes]] = set()

    def begin(self, tool: str, arguments: bytes) -> bool:
        """Note that this very call is being made; False if it was noted before, by whichever agent."""
        with self._lock:
            new = (tool, arguments) not in self._made
            self._made.add((tool, arguments))
        return new

    def undo(self, tool: str, arguments: bytes) -> None:
        """The call was not made after all."""
        with self._lock:
            self._made.discard((tool, arguments))

    def keep(self, kind: str, value: Any) -> None:
        """The thing has been written to."""
        with self._lock:
            self._written.add((kind, repr(value)))

    def give_back(self, kind: str, value: Any, agent: str) -> None:
        """Free a thing that `agent` has claimed and not written to."""
        with self._lock:
            key = (kind, repr(value))
            if key not in self._written and self._owners.get(key) == agent:
                del self._owners[key]

    def take(self, kind: str, value: Any, agent: str) -> ConflictingWrite | None:
        """Claim the thing `value` of a kind (`order_id`, say) for `agent`; the error if it is another's."""
        with self._lock:
            owner = self._owners.setdefault((kind, repr(value)), agent)
        if owner == agent:
            return None
        return ConflictingWrite(f"agent {agent!r} may not write to {kind} {value!r}: {owner!r} of this run already has")


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing somebody wrote on a blackboard.

    `number` counts from 1; `text` is the value as JSON; `step` is how many steps the author's run had recorded by then;
    `at` is UTC, ISO 8601.
    """

    number: int
    key: str
    text: str
    author: str
    step: int
    at: str

    @property
    def value(self) -> Any:
        """The value, a fresh copy each time: a reader cannot change what was written."""
        return json.loads(self.text)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What an agent was shown when it began: what the authors `of` had written up to entry `number`."""

    author: str
    number: int
    of: frozenset[str]

    def shows(self, entry: Entry) -> bool:
        """Whether the agent knows an entry: from the snapshot, or because it wrote it."""
        return entry.author == self.author or (entry.number <= self.number and entry.author in self.of)


@dataclass(slots=True)
class _Log:
    """What a board and all views of it share."""

    entries: list[Entry] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Blackboard:
    """What agents tell each other: append-only, each entry with author, step and time; safe to share between threads.

    A board shows everything. A `view` shows one agent what it was given when it began and what it wrote itself: what an
    agent works from does not depend on how fast the agents beside it are, and can be told afterwards (`known_to`).

    Args:
        agents: names that are keys of their own: only the agent of that name writes there.
    """

    def __init__(self, agents: Collection[str] = ()) -> None:
        self._log = _Log()
        self._agents = frozenset(agents)
        self._upto: int | None = None
        self._snapshot: Snapshot | None = None
        self._run: Run | None = None

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What this board shows, in the order in which it was written."""
        return tuple(entry for entry in tuple(self._log.entries) if self._shows(entry))

    def latest(self, key: str) -> Entry | None:
        """The last entry of a key, or None."""
        return next((entry for entry in reversed(self.entries) if entry.key == key), None)

    def read(self, key: str, default: Any = None) -> Any:
        """The value of a key's last entry."""
        entry = self.latest(key)
        return default if entry is None else entry.value

    def __contains__(self, key: str) -> bool:
        return self.latest(key) is not None

    def write(self, key: str, value: Any, author: str | None = None, *, seen: int | None = None) -> Entry:
        """Append an entry; `value` is kept as JSON-able data.

        Args:
            author: in a view, its agent.
            seen: number of the key's last entry that the author knows, 0 for none; default: what this board shows.

        Raises:
            ConflictingWrite: the key has an entry that the author does not know, or belongs to an agent; ends the run of
                the agent whose view this is.
        """
        if self._upto is not None:
            raise UsageError("this is a board as it was; write on the board itself")
        who = self._snapshot.author if self._snapshot else author
        if who is None or author not in (None, who):
            raise UsageError(f"author must be {who!r}, got {author!r}" if who else "name the author")
        text = json.dumps(jsonable(value))
        step = len(self._run.steps) if self._run else 0
        with self._log.lock:
            conflict = self._conflict(key, who, seen)
            if conflict is None:
                entry = Entry(len(self._log.entries) + 1, key, text, who, step, clock.utc().isoformat())
                self._log.entries.append(entry)
                return entry
        if self._run is not None:
            self._run.refuse(conflict)
        raise conflict

    def _conflict(self, key: str, author: str, seen: int | None) -> ConflictingWrite | None:
        if key in self._agents and key != author:
            return ConflictingWrite(f"{author!r} may not write {key!r} on the blackboard: it is that agent's own")
        last = next((entry for entry in reversed(self._log.entries) if entry.key == key), None)
        known = self.latest(key)
        seen = (known.number if known else 0) if seen is None else seen
        if seen == (last.number if last else 0):
            return None
        there = f"entry {last.number} by {last.author!r} is there" if last else "nothing is there"
        knows = f"entry {seen}" if seen else "none"
        return ConflictingWrite(f"{author!r} may not write {key!r} on the blackboard: {there}, and it knows {knows}")

    # ---- who knew what

    def view(self, author: str, of: Iterable[str] = (), run: Run | None = None) -> Blackboard:
        """The board for an agent that begins now: it is shown what the authors `of` have written so far.

        Args:
            run: the agent's run; a conflict ends it.
        """
        with self._log.lock:
            snapshot = Snapshot(author, len(self._log.entries), frozenset(of))
            self._log.snapshots.append(snapshot)
        return self._showing(snapshot=snapshot, run=run)

    def as_of(self, number: int) -> Blackboard:
        """The board as it was when entry `number` had been written; only to be read."""
        return self._showing(upto=number)

    @property
    def snapshot(self) -> Snapshot | None:
        """Of a view: what its agent was shown."""
        return self._snapshot

    def known_to(self, author: str) -> tuple[Entry, ...]:
        """What an agent knew in the end: what it was shown when it (last) began, and what it wrote."""
        snapshots = [s for s in tuple(self._log.snapshots) if s.author == author]
        last = snapshots[-1] if snapshots else Snapshot(author, 0, frozenset())
        return tuple(entry for entry in self.entries if last.shows(entry))

    def _showing(
        self, *, snapshot: Snapshot | None = None, run: Run | None = None, upto: int | None = None
    ) -> Blackboard:
        board = Blackboard(self._agents)
        board._log, board._snapshot, board._run, board._upto = self._log, snapshot, run, upto
        return board

    def _shows(self, entry: Entry) -> bool:
        if self._upto is not None:
            return entry.number <= self._upto
        return self._snapshot is None or self._snapshot.shows(entry)

    # ---- in records

    def data(self) -> dict[str, Any]:
        """The whole board as JSON-able data."""
        names = ("number", "key", "author", "step", "at")
        return {
            "entries": [{**{n: getattr(e, n) for n in names}, "value": e.value} for e in tuple(self._log.entries)],
            "snapshots": [
                {"author": s.author, "number": s.number, "of": sorted(s.of)} for s in tuple(self._log.snapshots)
            ],
        }

    @classmethod
    def of_data(cls, data: dict[str, Any]) -> Blackboard:
        """The counterpart of `data`."""
        board = cls()
        for row in data["entries"]:
            rest = {name: value for name, value in row.items() if name != "value"}
            board._log.entries.append(Entry(text=json.dumps(row["value"]), **rest))
        for row in data["snapshots"]:
            board._log.snapshots.append(Snapshot(row["author"], row["number"], frozenset(row["of"])))
        return board

    @classmethod
    def of_record(cls, record: RunRecord) -> Blackboard:
        """The board of a finished run, to be read again.

        Raises:
            UsageError: the run had none.
        """
        for step in record.steps:
            if step.kind == "decision" and step.name == BOARD:
                return cls.of_data(step.outputs)
        raise UsageError(f"run {record.run_id} of {record.system} had no blackboard")
