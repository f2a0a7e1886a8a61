"""From events of the log to whole runs, those that they called inside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from agentkit.records import RunRecord, Step
from agentkit.runs import REHEARSALS
from agentkit_tracking.runlog.events import STEPS, step_of

_BUFFER = 64 << 20  # bytes of runs that have not ended yet; what falls out is fetched from the log when it ends
Json = bytes | str | None
Row = tuple[str, int, Json, Json]  # segment, number, event, private part
_UNREADABLE = (AttributeError, KeyError, TypeError, ValueError)  # an event that is not as this version writes them


class LoggedStep(NamedTuple):
    """A step with its number in the record, and in a word of a closed set how it ended."""

    number: int
    step: Step
    result: str | None
    error_type: str | None


@dataclass
class LoggedRun:
    """A finished run as the log has it, with the runs that it called; `record.steps` is empty, `steps` are its own."""

    record: RunRecord
    error_type: str | None
    steps: list[LoggedStep]
    children: list[LoggedRun] = field(default_factory=list)
    size: int = 0  # bytes of its events

    def whole(self) -> Iterator[LoggedRun]:
        """The run and all below it."""
        yield self
        for child in self.children:
            yield from child.whole()


@dataclass(frozen=True)
class LoggedFeedback:
    """What somebody said of a run; `id` is that of its event."""

    id: str
    run_id: str
    given_at: str
    source: str
    label: str | None
    rating: float | None
    comment: str | None
    by: str | None


@dataclass
class _Draft:
    """A run of which the end has not been read."""

    segment: str
    steps: list[tuple[dict[str, Any], Json]] = field(default_factory=list)
    size: int = 0


class Assembler:
    """Takes events in order and has finished runs ready.

    A run whose events lie in one segment is put together from what was read. For any other, taken up by another process or
    begun before this reader, there is only its id, in `partial`.
    """

    def __init__(self) -> None:
        self.ready: list[LoggedRun] = []
        self.partial: list[str] = []
        self.feedback: list[LoggedFeedback] = []
        self.broken: dict[str, str] = {}  # runs that cannot be read, and why
        self.ready_bytes = 0
        self._drafts: dict[str, _Draft] = {}
        self._ended: dict[str, LoggedRun] = {}  # called by another, which has not ended
        self._size = 0

    def add(self, segment: str, n: int, text: Json, private: Json) -> None:
        """Take one event."""
        event = _parsed(text)
        kind = event.get("type")
        if kind == "feedback":
            self.feedback.append(_feedback(f"{segment}-{n}", event, _parsed(private)))
        elif event.get("kind") in REHEARSALS:
            return
        elif kind == "run":
            self._drafts[event["run_id"]] = _Draft(segment)
        elif kind in STEPS:
            draft = self._drafts.get(event["run_id"])
            if draft is not None and draft.segment == segment:
                size = _size(text, private)
                draft.steps.append((event, private))
                draft.size += size
                self._make_room(size)
        elif kind == "outcome":
            self._end(segment, event, private)

    def _end(self, segment: str, event: dict[str, Any], private: Json) -> None:
        run_id = event["run_id"]
        draft = self._drafts.pop(run_id, None)
        run = None
        if draft is not None:
            self._size -= draft.size
            if draft.segment == segment:
                try:
                    run = _run(event, private, draft.steps, self._ended.get)
                except _UNREADABLE as e:
                    self.broken[run_id] = f"its events cannot be read: {e!r}"
                    return
        if run is None:
            if event.get("parent") is None:
                self.partial.append(run_id)
            return
        for below in run.whole():
            if self._ended.pop(below.record.run_id, None) is not None:
                self._size -= below.size
        if run.record.parent is None:
            self.ready.append(run)
            self.ready_bytes += sum(one.size for one in run.whole())
        else:
            self._ended[run_id] = run
            self._make_room(run.size)

    def _make_room(self, size: int) -> None:
        self._size += size
        while self._size > _BUFFER and (self._drafts or self._ended):
            # The oldest first; a run that ends without them is fetched.
            oldest = next(iter(self._drafts or self._ended))
            self._size -= self._drafts.pop(oldest).size if self._drafts else self._ended.pop(oldest).size

    def take(self) -> tuple[list[LoggedRun], list[str], list[LoggedFeedback], dict[str, str]]:
        """What is ready, the ids of what has to be fetched, feedback, and what is broken; each once."""
        taken = self.ready, self.partial, self.feedback, self.broken
        self.ready, self.partial, self.feedback, self.broken, self.ready_bytes = [], [], [], {}, 0
        return taken


def fetch(events: Callable[[list[str]], Sequence[Row]], run_ids: list[str]) -> tuple[list[LoggedRun], dict[str, str]]:
    """Whole runs by their ids, and why others cannot be read; those that are not in the log are left out.

    Args:
        events: what the log has of the runs with these ids.
    """
    broken: dict[str, str] = {}
    rows: dict[str, list[tuple[str, dict[str, Any], Json]]] = {}
    wanted = list(run_ids)
    while wanted:
        below = []
        for segment, _, text, private in events(wanted):
            event = _parsed(text)
            rows.setdefault(event["run_id"], []).append((segment, event, private))
            if event["type"] == "handoff" and event.get("result") not in rows:
                below.append(event.get("result"))
        wanted = [run_id for run_id in dict.fromkeys(below) if run_id and run_id not in rows]

    def build(run_id: str, above: tuple[str, ...] = ()) -> LoggedRun | None:
        found = rows.get(run_id, []) if run_id not in above else []
        outcomes = [(segment, event, private) for segment, event, private in found if event["type"] == "outcome"]
        if not outcomes:
            return None
        segment, event, private = outcomes[-1]
        steps: dict[int, tuple[dict[str, Any], Json]] = {}
        # What another process noted of it before it died comes first, so that the one that ended it has the last word.
        for _, step, hidden in sorted(found, key=lambda row: row[0] == segment):
            if step["type"] in STEPS:
                steps[step.get("step") or len(steps) + 1] = (step, hidden)
        ordered = [steps[number] for number in sorted(steps)]
        return _run(event, private, ordered, lambda child: build(child, (*above, run_id)), is_whole=False)

    runs = []
    for run_id in run_ids:
        try:
            run = build(run_id)
        except _UNREADABLE as e:
            broken[run_id] = f"its events cannot be read: {e!r}"
        else:
            runs += [] if run is None else [run]
    return runs, broken


def _run(
    event: dict[str, Any],
    private: Json,
    steps: Iterable[tuple[dict[str, Any], Json]],
    child_of: Callable[[str], LoggedRun | None],
    *,
    is_whole: bool = True,
) -> LoggedRun | None:
    """A run from its events; None where one that it called is not at hand, unless it need not be whole."""
    logged, children, size = [], [], _size(b"", private)
    for number, (step, hidden) in enumerate(steps, 1):
        logged.append(
            LoggedStep(
                step.get("step") or number, _step(step, _parsed(hidden)), step.get("result"), step.get("error_type")
            )
        )
        size += _size(b"", hidden) + 400
        if step["type"] == "handoff":
            child = child_of(str(step.get("result")))
            if child is not None:
                children.append(child)
            elif is_whole:
                return None
    return LoggedRun(_record(event, _parsed(private)), event.get("error_type"), logged, children, size)


def _step(event: dict[str, Any], private: dict[str, Any]) -> Step:
    row = {name: event.get(name) for name in ("name", "agent", "model", "tokens_in", "tokens_out", "cached", "tries")}
    usd = event.get("usd")
    row |= {"kind": event["type"], "state": event.get("state") or "", "usd": usd if event.get("model") else usd or 0.0}
    row |= {"started": event.get("started") or 0.0, "seconds": event.get("seconds") or 0.0}
    row |= {name: private.get(name) for name in ("inputs", "outputs", "error")}
    return step_of(row)


def _record(event: dict[str, Any], private: dict[str, Any]) -> RunRecord:
    number: dict[str, Any] = {
        name: event.get(name) or 0 for name in ("waited_s", "model_calls", "tool_calls", "tokens_in", "tokens_out")
    }
    phases = {name: event[f"{name}_s"] for name in ("planning", "execution", "reflection") if event.get(f"{name}_s")}
    usd = event.get("usd")
    return RunRecord(
        run_id=event["run_id"],
        system=event.get("system") or "",
        release=event.get("release"),
        kind=event.get("kind") or "run",
        started_at=event.get("started_at") or event["logged_at"],
        seconds=event.get("seconds") or 0.0,
        state=event.get("state") or "",
        route=event.get("route"),
        inputs=private.get("inputs") or {},
        output=private.get("output"),
        error=private.get("error") or event.get("error_type"),  # where the text was erased, its class is left
        effects=private.get("effects") or [],
        phases=phases,
        usd=math.nan if usd is None else usd,
        parent=event.get("parent"),
        user_hash=private.get("user_hash"),
        session=private.get("session"),
        stage=event.get("stage") or "draft",
        degraded=private.get("degraded"),
        partial=private.get("partial"),
        budget_used=event.get("budget_used"),
        **number,
    )


def _feedback(identity: str, event: dict[str, Any], private: dict[str, Any]) -> LoggedFeedback:
    return LoggedFeedback(
        identity,
        event["run_id"],
        event["logged_at"],
        event.get("name") or "user",
        event.get("result"),
        event.get("rating"),
        private.get("comment"),
        private.get("by"),
    )


def feedback_of(segment: str, n: int, text: Json, private: Json) -> LoggedFeedback:
    """Feedback from its event."""
    return _feedback(f"{segment}-{n}", _parsed(text), _parsed(private))


def _parsed(text: Json) -> dict[str, Any]:
    """What a piece of JSON says; nothing where it was erased or is no object."""
    try:
        value = orjson.loads(text) if text and text.strip() else None
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _size(text: Json, private: Json) -> int:
    return len(text or "") + len(private or "") + 200
