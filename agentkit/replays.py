"""Running a recorded run again: its calls are answered from the record, and no effect happens twice."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from agentkit.approvals import Decision
from agentkit.calls import Call
from agentkit.errors import ToolFailed
from agentkit.jsonable import canonical
from agentkit.records import RunRecord, Step


class Stubbed:
    """Answers tool calls and approvals as a recorded run had them answered; use it with `agentkit.intercept`.

    A call the record does not have is made if it only reads, and fails if it would change something. Models are asked
    anew: their answers are what is compared.
    """

    def __init__(self, record: RunRecord) -> None:
        self._kept: defaultdict[tuple[str, str, bytes], deque[Step]] = defaultdict(deque)
        for step in record.steps:
            self._kept[step.kind, step.name, canonical(step.inputs)].append(step)

    def call(self, call: Call, proceed: Callable[[], Any]) -> Any:
        """The recorded answer."""
        steps = self._kept.get((call.kind, call.name, canonical(call.arguments)))
        step = steps.popleft() if steps else None
        if call.kind == "approval":
            return asdict(Decision("reject", reason="not asked in the recorded run")) if step is None else step.outputs
        if call.kind != "tool" or call.tool is None:
            return proceed()
        if step is not None and step.error is None:
            return step.outputs
        if step is not None:
            raise ToolFailed(call.name, "error", f"as recorded: {step.error}")
        if call.tool.permission == "read":
            return proceed()
        raise ToolFailed(call.name, "error", "the recorded run made no such call, and a replay changes nothing")

    def attempt(self, call: Call, proceed: Callable[[], Any]) -> Any:
        """Attempts of what is really made are left alone."""
        return proceed()


@dataclass(frozen=True)
class Difference:
    """The first step in which two runs differ; None where one of them had already ended."""

    number: int  # from 1, of the steps that are compared
    before: Step | None
    after: Step | None


def first_difference(before: RunRecord, after: RunRecord) -> Difference | None:
    """Where two runs part, by what they did; times, tokens and costs may differ."""
    left, right = ([s for s in record.steps if s.name != "retry"] for record in (before, after))
    for number in range(max(len(left), len(right))):
        a, b = (steps[number] if number < len(steps) else None for steps in (left, right))
        if a is None or b is None or _essence(a) != _essence(b):
            return Difference(number + 1, a, b)
    return None


def _essence(step: Step) -> bytes:
    # A model's prompt differs wherever the release does; what it answered is what counts.
    inputs = None if step.kind == "model" else step.inputs
    outputs = None if step.error else step.outputs
    return canonical([step.kind, step.name, step.agent, inputs, outputs, bool(step.error)])
