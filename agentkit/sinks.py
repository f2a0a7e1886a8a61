"""Where finished run records go. `agentkit` only hands them over; the stores live in other packages.

A sink is any callable that takes a `RunRecord`. Sinks come from the entry-point group `agentkit.sinks` (the
tracking package registers the run log and the MLflow trace there) and from `add_sink`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.metadata import entry_points

from agentkit.records import RunRecord

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
    """Hand a finished record to every sink. A sink that raises stops the caller: an unrecorded run is a fault."""
    through = _through.get()
    if through is not None:
        through(record, _hand_over)
    else:
        _hand_over(record)


def _hand_over(record: RunRecord) -> None:
    for sink in (*_installed(), *_added):
        sink(record)


@contextmanager
def add_sink(sink: Sink) -> Iterator[None]:
    """Also send records to `sink` while the context is open."""
    _added.append(sink)
    try:
        yield
    finally:
        _added.remove(sink)
