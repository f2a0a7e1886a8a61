"""For the tests of the road of a tool call: tools that fail, check and write, and a control plane in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hedgehogs import doing

import agentkit as ak
from agentkit import Budget, RunRecord
from agentkit import control as control_module
from agentkit.budget import Ledger
from agentkit.control import Notice
from agentkit.testing import FakeClock

CALLS: list[Any] = []


@pytest.fixture(autouse=True)
def nothing_called() -> None:
    CALLS.clear()


@pytest.fixture
def now() -> Iterator[FakeClock]:
    with FakeClock() as clock:
        yield clock


def flaky(failures: int, error: Exception, **options: Any) -> ak.Tool[..., Any]:
    """A tool that fails so often before it works."""

    @ak.tool(**options)
    def fetch(place: str) -> str:
        """Fetch from a place."""
        CALLS.append(place)
        if len(CALLS) <= failures:
            raise error
        return f"from {place}"

    return fetch


def using(tool: ak.Tool[..., Any], *others: ak.Tool[..., Any], **options: Any) -> RunRecord:
    arguments = options.pop("arguments", {"place": "A"})
    return doing(lambda run: run.call(tool, **arguments), tool, *others, **options).run()


def decisions(record: RunRecord, name: str) -> list[Any]:
    return [(s.outputs, s.inputs) for s in record.steps if s.kind == "decision" and s.name == name]


def own_order(arguments: Any, user: str | None) -> str | None:
    """Orders belong to their user."""
    return None if arguments["order_id"] == f"order of {user}" else f"{arguments['order_id']!r} is not {user!r}'s"


@ak.tool(permission="write", criticality="low", check=own_order, writes_to="order_id")
def cancel(order_id: str) -> str:
    """Cancel an order."""
    CALLS.append(order_id)
    return "cancelled"


@ak.tool(permission="execute", criticality="high")
def wipe(disk: str) -> str:
    """Wipe a disk."""
    CALLS.append(disk)
    return "wiped"


class Plane:
    """A control plane in memory."""

    def __init__(self) -> None:
        self.stop: Callable[..., str | None] = lambda *_: None
        self.told: list[Notice] = []

    def stopped(self, *what: Any) -> str | None:
        return self.stop(*what)

    def ledgers(self, system: str, user: str | None, *budgets: Budget | None) -> tuple[Ledger, ...]:
        return ()

    def notify(self, notice: Notice) -> None:
        self.told.append(notice)


@pytest.fixture
def plane(monkeypatch: pytest.MonkeyPatch) -> Plane:
    found = Plane()
    for module in ("agentkit.runs", "agentkit.systems"):
        monkeypatch.setattr(f"{module}.control", lambda: found)
    assert control_module.Control is not None
    return found
