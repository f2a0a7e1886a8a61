"""Small agents for the tests of the runtime, and a language model that reads its answers from a script."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import dspy
from dspy.lm15 import Message, Request, Response, TextPart, Usage
from pydantic import BaseModel

import agentkit as ak
from agentkit.models import MeteredLM, Price

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


class Script:
    """An engine for `dspy.LM` that gives the answers it was told to, in turn, and keeps the prompts it read."""

    def __init__(self, *answers: dict[str, str]) -> None:
        self.answers, self.prompts = list(answers), list[str]()

    def complete(self, request: Request) -> Response:
        self.prompts.append("\n".join([str(request.system), *(m.text or "" for m in request.messages)]))
        fields = self.answers[len(self.prompts) - 1] | {"completed": ""}
        text = "\n\n".join(f"[[ ## {name} ## ]]\n{value}" for name, value in fields.items())
        return Response(
            id=None,
            model="script/1",
            message=Message.assistant([TextPart(text)]),
            finish_reason="stop",
            usage=Usage(input_tokens=100, output_tokens=10, total_tokens=110),
        )

    def close(self) -> None:
        """Nothing to close; part of the engine protocol."""


def speaking(program: dspy.Module, script: Script) -> dspy.Module:
    """`program` with the script for its model, at a cent a call."""
    lm = MeteredLM("script/1", engine=script, cache=False)
    lm.price = Price(input=100, output=0)
    program.set_lm(lm)
    return program
