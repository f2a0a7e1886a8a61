"""One consumer of the log: reads runs and feedback beyond its position, gives them to a target, keeps the position."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from agentkit.runs import REHEARSALS
from agentkit_tracking.forwarding.assembly import Assembler, LoggedFeedback, LoggedRun, feedback_of, fetch
from agentkit_tracking.forwarding.errors import Rejected, Unavailable
from agentkit_tracking.forwarding.reading import Reader, fetch_entries, fetch_events, fetch_outcomes
from agentkit_tracking.forwarding.state import State, StateFile
from agentkit_tracking.runlog import recall
from agentkit_tracking.runlog.recall import Recalled

if TYPE_CHECKING:
    from agentkit_tracking.runlog import RunLog

BATCH = 200  # runs given to a target at once
BATCH_BYTES = 4 << 20
TRIES = 3  # of what a target refuses, until it is left out
_WAIT_S = 24 * 3600.0  # feedback waits so long for its run to end
_LOOK_AGAIN_S = 15.0  # for the ends of runs that feedback waits for
_ENTRIES = 20_000  # read at most between two positions that are kept
_KNOWN = 50_000  # runs whose place is remembered

_log = logging.getLogger("agentkit.forwarding")


class Place(NamedTuple):
    """Where a run is shown: the run whose trace it is in."""

    root: str
    run: str


class Partial(NamedTuple):
    """These runs were taken, except for something in one of them or more; that is final."""

    run_ids: list[str]
    why: str


class Target(Protocol):
    """Where runs are forwarded to.

    `name` is that of the consumer's files, `address` what people read. Both methods raise `Unavailable` or `Rejected`, and
    take the same again without making a double. A target that takes some in part lists them in `in_part`.
    """

    name: str
    address: str

    def send(self, runs: list[LoggedRun]) -> None:
        """Take all runs or, rejecting them, perhaps some."""

    def attach(self, feedback: LoggedFeedback, place: Place) -> None:
        """Take what was said of a run that was sent."""

    def close(self) -> None:
        """Let go of connections; also after a fork, of those that are the parent's."""


@dataclass
class Forwarded:
    """What was done since the consumer began."""

    runs: int = 0
    feedback: int = 0
    refused: int = 0


class Consumer:
    """Forwards to one target; for whoever has the lease of its name.

    Args:
        rest: called after each batch with the seconds that it took; where agents run, it gives way to them.
    """

    def __init__(self, log: RunLog, target: Target, rest: Callable[[float], None] = lambda seconds: None) -> None:
        self.log, self.target, self.done = log, target, Forwarded()
        self.file = StateFile(log.folder, target.name, target.address)
        self._rest = rest
        self._places: dict[str, Place | None] = {}
        self._looked = self._again_at = 0.0
        self._unsettled: dict[str, Rejected] = {}  # while it is in doubt whether the target takes anything
        self._in_part: list[Partial] = getattr(target, "in_part", [])
        self._begin()

    def _begin(self) -> None:
        self._recalls = recall.count(self.log.folder)
        self.state: State = self.file.load()
        self._reader = Reader(self.log, dict(self.state.marks), everywhere=self.state.everywhere)
        self._assembler = Assembler()

    def resume(self) -> None:
        """Begin at the position that is kept, if another consumer has moved it meanwhile."""
        if not self.file.is_mine():
            self._begin()

    def has_news(self) -> bool:
        """Whether there may be something to do; cheap."""
        now = time.monotonic()
        late = bool(self.state.waiting) and now - self._looked > _LOOK_AGAIN_S
        return late or (self.is_owing and now >= self._again_at) or self._reader.has_news()

    @property
    def is_owing(self) -> bool:
        """Whether something that the target did not take is to be tried again."""
        return bool(self.state.again)

    def look_again(self) -> None:
        """Have the next `forward` look at once whether runs that feedback waits for have ended."""
        self._looked = -math.inf

    def forward(self) -> None:
        """Forward all that the log has by now.

        Raises:
            Unavailable: the target did not take it; the position is where it was, and nothing is lost.
        """
        while True:
            try:
                return self._forward()
            except Recalled:  # what was read may hold what is erased by now
                self._begin()
            except BaseException:
                self._begin()
                raise

    def _forward(self) -> None:
        self._unsettled = {}
        self._in_part.clear()
        entries, waiting = 0, len(self.state.waiting)
        for entry in self._reader.read():
            self._assembler.add(entry.segment, entry.n, entry.event, entry.private)
            entries += 1
            ready = len(self._assembler.ready) + len(self._assembler.partial)
            if ready >= BATCH or self._assembler.ready_bytes >= BATCH_BYTES or entries >= _ENTRIES:
                self._batch()
                entries = 0
        again = list(self.state.again) if time.monotonic() >= self._again_at else []
        for first in range(0, len(again), BATCH):
            self._batch(again[first : first + BATCH])
        self._batch()
        if len(self.state.waiting) > waiting:  # the run may have come after what was said of it
            self.look_again()
            self._batch()
        if self._unsettled:
            raise self._takes_nothing()

    def _batch(self, again: Iterable[str] = ()) -> None:
        began = time.perf_counter()
        runs, partial, feedback, broken = self._assembler.take()
        marks = dict(self._reader.marks)
        missing = list(dict.fromkeys([*partial, *again]))
        if missing:
            fetched, unreadable = fetch(lambda ids: fetch_events(self.log, ids), missing)
            runs += fetched
            broken |= unreadable
            for gone in set(again) - {run.record.run_id for run in fetched}:
                self.state.again.pop(gone, None)
        runs = list({run.record.run_id: run for run in runs}.values())
        rejected = {run_id: Rejected(why, is_certain=True) for run_id, why in broken.items()}
        if runs or rejected:
            self._settle(runs, rejected | (self._send(runs) if runs else {}))
        self._attach(feedback)
        self.state.marks = marks
        if not self._unsettled:  # else the position stays before them
            self.file.save(self.state)
        if runs or feedback:
            self._rest(time.perf_counter() - began)

    # ---- runs

    def _send(self, runs: list[LoggedRun]) -> dict[str, Rejected]:
        """Those that were not taken; all others were, whatever stood beside them."""
        try:
            with recall.giving(self.log.folder, self._recalls):
                self.target.send(runs)
        except Rejected as e:
            if len(runs) == 1:
                return {runs[0].record.run_id: e}
            half = len(runs) // 2
            return self._send(runs[:half]) | self._send(runs[half:])
        return {}

    def _settle(self, runs: list[LoggedRun], rejected: dict[str, Rejected]) -> None:
        """Count what was taken, and the tries of what was not.

        A target that takes nothing may be at fault itself: what it rejects counts only once it takes something beside or after
        that, or has done so at an earlier try. Until then up to a batch of it is passed over, and the position stays.
        """
        for run_ids, why in self._in_part:
            if len(run_ids) == 1:
                rejected[run_ids[0]] = Rejected(why, is_certain=True)
            else:
                self._refuse({"run_ids": run_ids}, why)
        self._in_part.clear()
        taken = [run for run in runs if run.record.run_id not in rejected]
        for run in taken:
            run_id = run.record.run_id
            self.state.again.pop(run_id, None)
            self.done.runs += 1
            for below in run.whole():
                self._remember(below.record.run_id, Place(run_id, below.record.run_id))
        self._unsettled |= rejected
        if not taken and (doubtful := self._doubtful()):
            if len(doubtful) >= BATCH:
                raise self._takes_nothing()
            return
        for run_id, no in self._unsettled.items():
            tries = TRIES if no.is_certain else self.state.again.get(run_id, 0) + 1
            if tries < TRIES:
                self.state.again[run_id] = tries
                self._again_at = time.monotonic() + 2.0 * tries
            else:
                self.state.again.pop(run_id, None)
                self._refuse({"run_id": run_id}, str(no))
        self._unsettled = {}

    def _doubtful(self) -> list[Rejected]:
        """Of what is not settled that which may be the target's fault."""
        return [no for run_id, no in self._unsettled.items() if not no.is_certain and run_id not in self.state.again]

    def _takes_nothing(self) -> Unavailable:
        return Unavailable(f"it takes nothing: {self._doubtful()[0]}")

    def _refuse(self, what: dict[str, Any], why: str) -> None:
        self.done.refused += 1
        self.file.refuse({**what, "why": why, "at": datetime.now(UTC).isoformat()})
        of = " ".join(
            f"part of {len(value)} runs" if isinstance(value, list) else f"{name} {value}"
            for name, value in what.items()
        )
        _log.warning(
            "%s is not forwarded to %s (noted in %s): %s", of, self.target.address, self.file.refused_path, why
        )

    # ---- feedback

    def _attach(self, new: list[LoggedFeedback]) -> None:
        waiting = []
        if self.state.waiting and time.monotonic() - self._looked > _LOOK_AGAIN_S:
            self._looked = time.monotonic()
            entries = fetch_entries(self.log, list(self.state.waiting))
            waiting = [feedback_of(entry.segment, entry.n, entry.event, entry.private) for entry in entries]
        given = [*new, *waiting]
        if not given:
            return
        self._find_places({one.run_id for one in given})
        for one in given:
            place = self._places.get(one.run_id)
            try:
                if one.run_id not in self._places:
                    raise Rejected("the run has not ended")
                if place is not None:
                    with recall.giving(self.log.folder, self._recalls):
                        self.target.attach(one, place)
                    self.done.feedback += 1
                self.state.waiting.pop(one.id, None)
            except Rejected as e:
                since = self.state.waiting.setdefault(one.id, time.time())
                if time.time() - since > _WAIT_S:
                    self.state.waiting.pop(one.id)
                    self._refuse({"feedback": one.id, "run_id": one.run_id}, str(e))

    def _find_places(self, run_ids: set[str]) -> None:
        """Whose trace shows each run: its own or that of whatever called it first; none where it was a rehearsal."""
        ways = {run_id: run_id for run_id in run_ids if run_id not in self._places}
        while ways:
            outcomes = fetch_outcomes(self.log, list(set(ways.values())))
            further = {}
            for run_id, above in ways.items():
                parent, kind = outcomes.get(above, (None, None))
                if kind is None:
                    continue  # under way
                if kind in REHEARSALS:
                    self._remember(run_id, None)
                elif parent is None:
                    self._remember(run_id, Place(above, run_id))
                else:
                    further[run_id] = parent
            ways = further

    def _remember(self, run_id: str, place: Place | None) -> None:
        while len(self._places) >= _KNOWN:
            self._places.pop(next(iter(self._places)))
        self._places[run_id] = place
