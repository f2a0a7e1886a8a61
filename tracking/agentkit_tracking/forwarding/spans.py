"""A run as a tree of spans, before any target's own words: the run, its phases, and in them what it did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from agentkit.records import Step
from agentkit_tracking.forwarding.assembly import LoggedRun, LoggedStep
from agentkit_tracking.forwarding.ids import span_id

SpanKind = Literal["run", "phase", "model", "tool", "approval", "decision"]
_FINAL = ("DONE", "FAILED")


@dataclass(slots=True)
class Span:
    """One span; times are nanoseconds since 1970. `run` is the run that it is, or in which it is."""

    id: str
    parent: str | None
    kind: SpanKind
    name: str
    start: int
    end: int
    run: LoggedRun
    step: Step | None = None
    result: str | None = None  # in a word of a closed set
    error: str | None = None  # as the log has it, which may hold what people wrote
    error_type: str | None = None  # its class

    @property
    def is_error(self) -> bool:
        """Whether what it stands for failed."""
        return self.error is not None or self.error_type is not None


def spans(run: LoggedRun) -> list[Span]:
    """The spans of a run and of those that it called, parents first."""
    return list(_of_run(run, None, None, run.record.system))


def _of_run(run: LoggedRun, parent: str | None, at: int | None, name: str) -> Iterator[Span]:
    record = run.record
    start = _nanoseconds(record.started_at) if at is None else at
    end = start + round(record.seconds * 1e9)
    failed = record.state != "DONE"
    error = record.error or (record.state if failed else None)
    root = Span(span_id(record.run_id), parent, "run", name, start, end, run, error=error if failed else None)
    root.error_type = (run.error_type or record.state) if failed else None
    yield root
    children = {child.record.run_id: child for child in run.children}
    phase: Span | None = None
    inside: list[Span] = []
    for logged in run.steps:
        step = logged.step
        if step.kind == "transition":
            moment = min(start + round((step.started + step.seconds) * 1e9), end)
            if phase is not None:
                yield _ended(phase, moment, step)
            yield from inside
            inside = []
            phase = None
            if step.name not in _FINAL:
                phase = Span(span_id(record.run_id, logged.number), root.id, "phase", step.name, moment, end, run)
            continue
        above = phase.id if phase is not None else root.id
        child = children.get(str(step.outputs)) if step.kind == "handoff" else None
        if child is not None:
            inside += _of_run(
                child, above, start + round(step.started * 1e9), child.record.route or child.record.system
            )
        elif step.kind != "handoff":
            inside.append(_of_step(run, logged, above, start))
    if phase is not None:
        yield phase
    yield from inside


def _ended(phase: Span, moment: int, transition: Step) -> Span:
    phase.end = max(moment, phase.start)
    if transition.name == "FAILED":
        phase.error_type = "FAILED"
        phase.error = transition.outputs if isinstance(transition.outputs, str) else "FAILED"
    return phase


def _of_step(run: LoggedRun, logged: LoggedStep, parent: str, zero: int) -> Span:
    step = logged.step
    start = zero + round(step.started * 1e9)
    error_type = logged.error_type or ("error" if step.error is not None else None)
    return Span(
        span_id(run.record.run_id, logged.number),
        parent,
        step.kind,  # type: ignore[arg-type]
        step.name,
        start,
        start + round(step.seconds * 1e9),
        run,
        step,
        logged.result,
        step.error or error_type,
        error_type,
    )


def _nanoseconds(moment: str) -> int:
    at = datetime.fromisoformat(moment)
    return int(at.timestamp()) * 1_000_000_000 + at.microsecond * 1000
