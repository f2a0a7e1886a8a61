"""The seam around every model and tool call: journals, replays and injected faults hook in here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from agentkit.runs import Run
    from agentkit.tools import Tool


Kind = Literal["model", "tool", "tier", "approval"]


@dataclass(frozen=True, slots=True)
class Call:
    """One call a run is about to make: of a model, of a tool, of the policy (`tier`) or of a person (`approval`).

    `number` counts the run's calls from 0 in the order in which they begin; `key` names the call for good: the same
    after a restart of a durable run, and what an idempotent tool is given as its `idempotency_key`.
    """

    kind: Kind
    name: str
    arguments: Any  # JSON-able: a tool's arguments by name; a model's messages and parameters
    number: int
    key: str
    agent: str | None
    run: Run
    tool: Tool[..., Any] | None = None


class Interceptor(Protocol):
    """Stands around calls: runs `proceed`, once or not at all, and returns what the call is to return.

    What goes through is JSON-able. A tool's failure goes through as `ToolFailed`; a `Refusal` ends the run.
    """

    def call(self, call: Call, proceed: Callable[[], Any]) -> Any:
        """Around a whole call, its retries and fallbacks included."""
        ...

    def attempt(self, call: Call, proceed: Callable[[], Any]) -> Any:
        """Around one attempt of a model or tool, inside time-out, retry and circuit breaker."""
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


def around(interceptors: tuple[Interceptor, ...], call: Call, proceed: Callable[[], Any]) -> Any:
    """`proceed()` with every interceptor's `call` around it."""
    for interceptor in reversed(interceptors):
        proceed = partial(interceptor.call, call, proceed)
    return proceed()


def around_attempt(interceptors: tuple[Interceptor, ...], call: Call, proceed: Callable[[], Any]) -> Any:
    """`proceed()` with every interceptor's `attempt` around it."""
    for interceptor in reversed(interceptors):
        proceed = partial(interceptor.attempt, call, proceed)
    return proceed()
