"""Where finished run records go. `agentkit` only hands them over; the stores live in other packages.

A sink is any callable that takes a `RunRecord`. One that has a method `progress(run, steps)` is also given runs as they happen:
when they begin, after each call and before each effect, the steps that are new, with their places in the record. Sinks come from the entry-point group `agentkit.sinks` (the
tracking package registers the run log and the MLflow trace there) and from `add_sink`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from agentkit.records import RunRecord, Step

if TYPE_CHECKING:
    from agentkit.runs import Run

Sink = Callable[[RunRecord], None]
_added: list[Sink] = []
_through: ContextVar[Callable[[RunRecord, Sink], None] | None] = ContextVar("agentkit_emitting", default=None)


@contextmanager
def emitting_through(through: Callable[[RunRecord, Sink], None]) -> Iterator[None]:
    """Records that come up inside go to `through(record, emit)`, which hands them over once: a durable run's journal."""
    token = _through.set(through)
    try:
        yield
    finally:
        _through.reset(token)


@cache
def _installed() -> tuple[Sink, ...]:
    return tuple(point.load() for point in entry_points(group="agentkit.sinks"))


def emit(record: RunRecord) -> None:
    """Hand a finished record to every sink. A sink that raises stops the caller: an unrecorded run is a fault.

    A run is of the process that began it. One that was forked inside a run and comes to its end, too, hands nothing over, and
    a warning says so: a run has one end.
    """
    if record.pid not in (None, os.getpid()):
        warnings.warn(
            f"run {record.run_id} of {record.system} is of process {record.pid}, from which this one ({os.getpid()}) was forked: "
            f"what this one did of it since, and that it ended here ({record.state}), is recorded nowhere",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    through = _through.get()
    if through is not None:
        through(record, _hand_over)
    else:
        _hand_over(record)


def _hand_over(record: RunRecord) -> None:
    for sink in (*_installed(), *_added):
        sink(record)


def is_watched() -> bool:
    """Whether a run is to be handed over as it happens; a durable one has its journal for that."""
    return _through.get() is None and any(hasattr(sink, "progress") for sink in (*_installed(), *_added))


def progress(run: Run, steps: Sequence[tuple[int, Step]]) -> None:
    """Hand what is new of a run to every sink that wants it. One that raises stops the run."""
    for sink in (*_installed(), *_added):
        if hasattr(sink, "progress"):
            sink.progress(run, steps)


@contextmanager
def add_sink(sink: Sink) -> Iterator[None]:
    """Also send records to `sink` while the context is open."""
    _added.append(sink)
    try:
        yield
    finally:
        _added.remove(sink)
