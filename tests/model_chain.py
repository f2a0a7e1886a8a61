"""For the tests of one model call on its way: two providers on loopback, a program that asks them, what was recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dspy
import pytest
from provider import FAST, Provider, Reply

import agentkit as ak
from agentkit.budget import Budget
from agentkit.records import RunRecord, Step

TICKET = "I was charged twice for one order."
FREE = Budget.unlimited()
DOWN = Reply(status=500, headers=FAST)
OTHER = "openai/loopback-2"


@pytest.fixture
def second(project: Path) -> Iterator[Callable[..., Provider]]:
    """A second provider that answers when the first, at `first`, does not."""
    with ExitStack() as stack:

        def start(first: Provider, *script: Reply, **options: object) -> Provider:
            provider = stack.enter_context(Provider(*script))
            more = [
                "[fallbacks]",
                f'fast = ["{OTHER}"]',
                f'[options."{OTHER}"]',
                f'api_base = "{provider.url}"',
                'api_key = "other-key"',
                f'[prices."{OTHER}"]',
                "input = 10\noutput = 20",
            ]
            (project / "agentkit.toml").write_text(first.settings(more="\n".join(more), **options))
            return provider

        yield start


def triage(budget: Budget | None = None, **options: Any) -> ak.System:
    return ak.adopt(dspy.Predict("ticket -> label"), name="triage", budget=budget, **options)


def calls(record: RunRecord) -> list[Step]:
    return [s for s in record.steps if s.kind == "model"]


def decisions(record: RunRecord) -> list[tuple[str, Any, Any]]:
    return [(s.name, s.outputs, s.inputs) for s in record.steps if s.kind == "decision"]
