"""Small agents for the tests of the runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import dspy
from pydantic import BaseModel

import agentkit as ak
from agentkit.models import MeteredLM, Price
from agentkit.testing import Scripted as Script

Work = Callable[[ak.Run], Any]


class Found(BaseModel):
    """What a hedgehog brings back."""

    value: Any


class Hedgehog(ak.Agent):
    """Brings back its input; the tests' agents are variations of it."""

    name = "hedgehog"
    result: ClassVar[type[BaseModel]] = Found

    def plan(self, run: ak.Run, text: str = "") -> Any:
        return text

    def execute(self, run: ak.Run, plan: Any, text: str = "") -> Any:
        return plan

    def reflect(self, run: ak.Run, plan: Any, facts: Any, text: str = "") -> Any:
        return Found(value=facts)


def doing(work: Work, *tools: ak.Tool[..., Any], name: str = "worker", **options: Any) -> ak.System:
    """A system of one hedgehog that does `work` in EXECUTING and brings back what it returns."""

    class Worker(Hedgehog):
        def execute(self, run: ak.Run, plan: Any, text: str = "") -> Any:
            return work(run)

    Worker.tools = tools
    return ak.System(name, [Worker()], **options)


def speaking(program: dspy.Module, script: Script) -> dspy.Module:
    """`program` with the script for its model, at a cent a call."""
    lm = MeteredLM("script/1", engine=script, cache=False)
    lm.price = Price(input=100, output=0)
    program.set_lm(lm)
    return program
