"""Running a recorded run again: its calls are answered from the record, and no effect happens twice."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from agentkit.approvals import Decision
from agentkit.blackboard import BOARD
from agentkit.calls import Call
from agentkit.errors import ToolFailed
from agentkit.jsonable import canonical
from agentkit.records import RunRecord, Step

_TIER, _AGENT, _EDGE = "tier of ", "agent ", "edge "  # what the names of such decisions begin with
_ENDED = ("status", "missing", "turn")  # what counts of how an agent of an orchestration ended


class Stubbed:
    """Answers tool calls, tiers and approvals as a recorded run had them answered; use it with `agentkit.intercept`.

    A call the record does not have is made if it only reads, and fails if it would change something. Models are asked
    anew: their answers are what is compared.
    """

    def __init__(self, record: RunRecord) -> None:
        self._kept: defaultdict[tuple[str, str, bytes], list[Step]] = defaultdict(list)
        self._lock = threading.Lock()
        for number, step in enumerate(record.steps):
            if step.kind == "decision" and step.name.startswith(_TIER):
                tool = step.name.removeprefix(_TIER)
                self._kept["tier", tool, canonical(_asked(record.steps[number + 1 :], step.agent, tool))].append(step)
            else:
                self._kept[step.kind, step.name, canonical(step.inputs)].append(step)

    def call(self, call: Call, proceed: Callable[[], Any]) -> Any:
        """The recorded answer."""
        step = self._take(call)
        if call.kind == "approval":
            return _answer(step)
        if call.kind == "tier":
            # A production run is replayed as a draft, for which the policy would have decided otherwise.
            return proceed() if step is None else [step.outputs, step.inputs]
        if call.kind != "tool" or call.tool is None:
            return proceed()
        if step is not None and step.error is None:
            return step.outputs
        if step is not None:
            raise ToolFailed(call.name, "error", f"as recorded: {step.error}")
        if call.tool.permission == "read":
            return proceed()
        raise ToolFailed(call.name, "error", "the recorded run made no such call, and a replay changes nothing")

    def _take(self, call: Call) -> Step | None:
        """The first recorded one that is left of such calls, of the same agent's if it made any."""
        with self._lock:
            steps = self._kept.get((call.kind, call.name, canonical(call.arguments)), [])
            number = next((i for i, step in enumerate(steps) if step.agent == call.agent), 0)
            return steps.pop(number) if steps else None

    def attempt(self, call: Call, proceed: Callable[[], Any]) -> Any:
        """Attempts of what is really made are left alone."""
        return proceed()


def _asked(later: list[Step], agent: str | None, tool: str) -> Any:
    """The arguments that a tier was decided for: those of the question or call that came of it."""
    calls = (s for s in later if s.kind in ("approval", "tool") and (s.agent, s.name) == (agent, tool))
    return next((s.inputs for s in calls), None)


def _answer(step: Step | None) -> Any:
    if step is None:
        return asdict(Decision("reject", reason="not asked in the recorded run"))
    if isinstance(step.outputs, dict):
        return step.outputs
    return asdict(Decision("reject", reason=f"as recorded: {step.error}"))  # whoever was to ask could not


@dataclass(frozen=True)
class Difference:
    """The first step in which two runs differ; None where one of them had already ended.

    `number` counts from 1: that of the step in the record of the first run, or in the other's if only that has it.
    """

    number: int
    before: Step | None
    after: Step | None


@dataclass(frozen=True)
class _Numbered:
    number: int  # in the record, from 1
    place: int  # among the steps that are compared
    step: Step


def first_difference(before: RunRecord, after: RunRecord) -> Difference | None:
    """Where two runs part, by what they did; reasons, times, tokens and costs may differ.

    Each agent's steps are compared with its own: agents side by side come in any order.
    """
    left, right = _by_agent(before), _by_agent(after)
    found = [pair for agent in {**left, **right} if (pair := _parting(left.get(agent, []), right.get(agent, [])))]
    if not found:
        return None
    # Up to where they part, two runs have the same places.
    a, b = min(found, key=lambda pair: next(one.place for one in pair if one is not None))
    number = next(one.number for one in (a, b) if one is not None)
    return Difference(number, *(None if one is None else one.step for one in (a, b)))


def _parting(left: list[_Numbered], right: list[_Numbered]) -> tuple[_Numbered | None, _Numbered | None] | None:
    for a, b in zip_longest(left, right):
        if a is None or b is None or _essence(a.step) != _essence(b.step):
            return a, b
    return None


def _by_agent(record: RunRecord) -> dict[str | None, list[_Numbered]]:
    steps = [
        (n, s)
        for n, s in enumerate(record.steps, 1)
        if s.kind != "handoff" and (s.kind, s.name) != ("decision", "retry")  # an id, and chance
    ]
    found: dict[str | None, list[_Numbered]] = {}
    for place, (number, step) in enumerate(steps):
        found.setdefault(_agent_of(step), []).append(_Numbered(number, place, step))
    return found


def _agent_of(step: Step) -> str | None:
    """Whose step it is; an orchestration notes for its agents how they ended and which way led to them."""
    if step.kind == "decision":
        if step.name.startswith(_AGENT):
            return step.name.removeprefix(_AGENT)
        if step.name.startswith(_EDGE):
            return step.name.rpartition(" → ")[2]
    return step.agent


def _essence(step: Step) -> bytes:
    inputs, outputs = step.inputs, None if step.error else step.outputs
    if step.kind == "model" or step.kind == "decision":
        # A model's prompt differs wherever the release does, and reasons quote errors; what came of it is what counts.
        inputs = None
    if step.kind == "transition":
        outputs = None
    elif step.kind == "decision" and isinstance(outputs, dict):
        if step.name.startswith(_AGENT) and {*_ENDED} <= outputs.keys():
            outputs = {name: outputs[name] for name in _ENDED}
        elif step.name == BOARD:
            outputs = _written(outputs)
    return canonical([step.kind, step.name, step.agent, inputs, outputs, bool(step.error)])


def _written(board: dict[str, Any]) -> Any:
    """Who wrote what and was shown whose entries, without the order of agents side by side."""
    entries = [[e["author"], e["key"], e["value"]] for e in board.get("entries", [])]
    shown = [[s["author"], s["of"]] for s in board.get("snapshots", [])]
    return [sorted(rows, key=lambda row: str(row[0])) for rows in (entries, shown)]
