"""The seam around every model and tool call: journals, replays and injected faults hook in here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from agentkit.tools import Tool


@dataclass(frozen=True, slots=True)
class Call:
    """One call a run is about to make.

    `number` counts the run's calls from 0 in the order in which they begin; `key` names the call for good: the same
    after a restart of a durable run, and what an idempotent tool is given as its `idempotency_key`.
    """

    kind: Literal["model", "tool"]
    name: str
    arguments: Any  # JSON-able: a tool's arguments by name; a model's messages and parameters
    run_id: str
    number: int
    key: str
    agent: str | None = None
    tool: Tool[..., Any] | None = None


class Interceptor(Protocol):
    """Stands around calls: runs `proceed`, once or not at all, and returns what the call is to return."""

    def call(self, call: Call, proceed: Callable[[], Any]) -> Any:
        """Around a whole call, its retries and fallbacks included."""
        ...

    def attempt(self, call: Call, proceed: Callable[[], Any]) -> Any:
        """Around one attempt, inside time-out, retry and circuit breaker."""
        ...


_interceptors: ContextVar[tuple[Interceptor, ...]] = ContextVar("agentkit_interceptors", default=())


@contextmanager
def intercept(interceptor: Interceptor) -> Iterator[None]:
    """Put `interceptor` around the calls of every run that begins inside, within those already there."""
    token = _interceptors.set((*_interceptors.get(), interceptor))
    try:
        yield
    finally:
        _interceptors.reset(token)


def interceptors() -> tuple[Interceptor, ...]:
    """Those in force, outermost first."""
    return _interceptors.get()
