"""Where finished run records go. `agentkit` only hands them over; the stores live in other packages.

A sink is any callable that takes a `RunRecord`. Sinks come from the entry-point group `agentkit.sinks` (the
tracking package registers the run log and the MLflow trace there) and from `add_sink`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import entry_points

from agentkit.records import RunRecord

Sink = Callable[[RunRecord], None]
_added: list[Sink] = []


@cache
def _installed() -> tuple[Sink, ...]:
    return tuple(point.load() for point in entry_points(group="agentkit.sinks"))


def emit(record: RunRecord) -> None:
    """Hand a finished record to every sink. A sink that raises stops the caller: an unrecorded run is a fault."""
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
