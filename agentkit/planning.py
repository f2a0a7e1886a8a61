"""Agents whose next step a model chooses, among the steps that are allowed."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import dspy

from agentkit.agents import Agent
from agentkit.errors import PolicyRefused, SourceError, ToolFailed, UsageError
from agentkit.jsonable import jsonable
from agentkit.runs import Run
from agentkit.states import State
from agentkit.tools import Tool

START, FINISH = "start", "finish"  # steps that are no tools
_ONLY = "no other step is allowed"  # nothing to ask a model about
_ENDED = (("failed", "error"), ("was rejected", "rejected"))
_ASKED = ("tools", "so_far", "allowed_steps", "rounds_left", "why", "step", "arguments", "confidence")
_REPORTED = ("facts", "not_done")
_TOLD = ("name", "description", "permission", "arguments")  # what of a tool's spec the model is told
Fact = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """The next step; `confidence` is the model's, from 0 to 1, None where it has not been asked yet."""

    step: str
    arguments: dict[str, Any]
    why: str
    confidence: float | None


class Planner(Agent):
    """Base class of agents that plan by model: choose a step, take it, look again, until the model finishes.

    Each round is PLANNING, EXECUTING, REFLECTING; `max_steps` counts the rounds, the one that finishes included. What a
    tool answers, its failure, arguments that do not fit and a person's no go back to the model as data. A refusal ends
    the run. So does the second choice of a step that is not allowed; the first is told to the model.

    A tool that a person said no to, or whose effect is in doubt and must not happen twice, is closed for the rest of the
    run. Where the type of the result has a field `rejected: list[str]`, it is filled in with the tools that people
    rejected, whatever the model says.

    Subclasses set `goal` (the instruction), `tools`, `result`, and may set `inputs` (names) and `allowed`: by step, what
    may follow it; `start` stands for the beginning, `finish` for the end; after a step that is not named, anything may.
    A failed step is not one that has been taken. They may write `fill`, which gives the arguments of a step in place of
    the model, and `reflect`, which makes the result in place of the predictor `conclude`.
    """

    goal: ClassVar[str] = ""
    inputs: ClassVar[tuple[str, ...]] = ("request",)
    allowed: ClassVar[Mapping[str, Collection[str]]] = {}
    shown: ClassVar[int] = 8_000  # characters of what happened so far that the model is shown; the newest are kept

    def __init__(self) -> None:
        super().__init__()
        self.choose = dspy.Predict(self._choosing())
        if type(self).reflect is Planner.reflect:
            self.conclude = dspy.Predict(self._concluding())

    # ---- the phases

    def plan(self, run: Run, **inputs: Any) -> Choice:
        """PLANNING: the model's next step, which is allowed."""
        so_far: list[Fact] = run.partial["so_far"]
        while True:
            steps = self.open_steps(so_far)
            if len(steps) == 1 and (steps == [FINISH] or not self._model_fills()):
                run.decide("step", {"step": steps[0]}, _ONLY)
                return Choice(steps[0], {}, _ONLY, run.confidence)
            choice = self._ask(run, so_far, steps, inputs)
            if choice.step in steps:
                return choice
            why = f"not allowed here; allowed: {', '.join(steps)}"
            if any(fact.get("not_allowed") for fact in so_far):
                run.refuse(PolicyRefused(choice.step, why))
            run.decide("not allowed", choice.step, why)
            so_far.append({"step": choice.step, "error": why, "not_allowed": True})

    def execute(self, run: Run, plan: Choice, **inputs: Any) -> Fact:
        """EXECUTING: take the step; what came of it, as the model will read it."""
        tool = self._tool(plan.step)
        fact: Fact = {"step": tool.name}
        try:
            given = plan.arguments if self._model_fills() else self.fill(run, tool.name, **inputs)
            fact["arguments"] = jsonable(given)
            tool.validate(given)
        except UsageError as e:
            return fact | {"error": str(e)}
        before = len(run.steps)
        try:
            found = run.call(tool, **given)
        except ToolFailed as e:
            doubt = e.unknown and not tool.idempotent
            return fact | {"error": str(e)} | ({"closed": "whether it took effect is unknown"} if doubt else {})
        said = _approval(run, before)
        if found is None and said.get("verdict") == "reject":
            return fact | {"rejected": said.get("reason") or "a person said no", "closed": "a person said no"}
        if said.get("verdict") == "modify":
            fact |= {"arguments": said.get("arguments"), "changed": "a person changed the arguments"}
        return fact | {"result": jsonable(found)}

    def reflect(self, run: Run, plan: Choice, facts: list[Fact], **inputs: Any) -> Any:
        """REFLECTING, in the end: the result, from everything that happened."""
        rejected = [fact for fact in facts if "rejected" in fact]
        not_done = clipped(rejected, self.shown) if rejected else "nothing"
        found = self.conclude(**_texts(inputs), facts=clipped(facts, self.shown), not_done=not_done)
        return found.toDict()

    def fill(self, run: Run, step: str, **inputs: Any) -> dict[str, Any]:
        """The arguments of a step, by code; where a subclass writes it, the model only chooses steps."""
        raise NotImplementedError(
            f"{type(self).__name__}.fill gives no arguments for {step!r}; where it is written, it gives those of every step"
        )

    def open_steps(self, so_far: list[Fact]) -> list[str]:
        """The steps that are allowed next, `finish` alone if no other is."""
        taken = [fact["step"] for fact in so_far if "result" in fact]
        closed = {fact["step"] for fact in so_far if "closed" in fact}
        after = self.allowed.get(taken[-1] if taken else START)
        return [step for step in self.steps() if (after is None or step in after) and step not in closed] or [FINISH]

    def _phases(self, run: Run, inputs: dict[str, Any]) -> Any:
        so_far: list[Fact] = run.partial.setdefault("so_far", [])
        while True:
            choice = self.plan(run, **inputs)
            run.to(State.EXECUTING, f"{choice.step}: {choice.why}")
            if choice.step == FINISH:
                run.to(State.REFLECTING, "nothing more is to be done")
                return self._with_facts(self.reflect(run, choice, so_far, **inputs), so_far)
            so_far.append(self.execute(run, choice, **inputs))
            run.to(State.REFLECTING, f"{choice.step} {_outcome(so_far[-1])}")
            run.to(State.PLANNING, "the model chooses again")

    def _with_facts(self, found: Any, so_far: list[Fact]) -> Any:
        if "rejected" not in self.result.model_fields:
            return found
        data = found if isinstance(found, dict) else found.model_dump(warnings=False)
        return {**data, "rejected": list(dict.fromkeys(fact["step"] for fact in so_far if "rejected" in fact))}

    # ---- the model

    def _ask(self, run: Run, so_far: list[Fact], steps: list[str], inputs: dict[str, Any]) -> Choice:
        more = {"tools": self._catalogue(steps)} if self._model_fills() else {}
        answer = self.choose(
            **_texts(inputs),
            **more,
            so_far=clipped(so_far, self.shown),
            allowed_steps=steps,
            rounds_left=run.max_steps
            - sum(s.name == State.EXECUTING and s.inputs == State.PLANNING for s in run.steps),
        )
        confidence = answer.confidence if isinstance(answer.confidence, int | float) else 0.0
        # A confidence that is none (95, NaN) is no confidence: what it stands for goes to a person.
        run.confidence = float(confidence) if math.isfinite(confidence) and 0 <= confidence <= 1 else 0.0
        choice = Choice(answer.step, dict(getattr(answer, "arguments", None) or {}), answer.why, run.confidence)
        run.decide("step", {"step": choice.step, "confidence": choice.confidence}, choice.why)
        return choice

    def _choosing(self) -> Any:
        described = "\n".join(f"- {tool.name}: {tool.description.splitlines()[0]}" for tool in self.tools)
        fields: dict[str, Any] = {name: (str, dspy.InputField()) for name in self.inputs}
        if self._model_fills():
            fields["tools"] = (str, dspy.InputField(desc="name, description and parameters of each, as JSON lines"))
        fields |= {
            "so_far": (str, dspy.InputField(desc="the steps taken and what came of them, oldest first, as JSON lines")),
            "allowed_steps": (list[str], dspy.InputField()),
            "rounds_left": (int, dspy.InputField(desc="how many more steps may be taken, the finish included")),
            "why": (str, dspy.OutputField(desc="one sentence: why this step is next")),
            "step": (Literal[self.steps()], dspy.OutputField(desc="one of the allowed steps")),
        }
        if self._model_fills():
            fields["arguments"] = (dict[str, Any], dspy.OutputField(desc="for the tool, by name; {} to finish"))
        fields["confidence"] = (float, dspy.OutputField(desc="probability that the step is right", ge=0, le=1))
        text = f"{self.goal}\n\nChoose the next step:\n{described}\n- {FINISH}: nothing more is needed, or can be done"
        return dspy.Signature(fields, text.strip())

    def _concluding(self) -> Any:
        fields: dict[str, Any] = {name: (str, dspy.InputField()) for name in self.inputs}
        fields["facts"] = (str, dspy.InputField(desc="the steps taken and what came of them, as JSON lines"))
        fields["not_done"] = (str, dspy.InputField(desc="what a person rejected: it has not been done"))
        for name, field in self.result.model_fields.items():
            if name != "rejected":
                fields[name] = (field.annotation, dspy.OutputField(desc=field.description or name))
        return dspy.Signature(
            fields, f"{self.goal}\n\nReport what was found and done; claim nothing that was not.".strip()
        )

    def _model_fills(self) -> bool:
        return type(self).fill is Planner.fill

    def _catalogue(self, steps: Collection[str]) -> str:
        specs = [tool.spec() for tool in self.tools if tool.name in steps]
        return "\n".join(_json({name: spec[name] for name in _TOLD}) for spec in specs) or "none"

    # ---- what it is

    @classmethod
    def input_names(cls) -> tuple[tuple[str, ...], frozenset[str]]:
        """All input names; each is required."""
        return tuple(cls.inputs), frozenset(cls.inputs)

    @classmethod
    def steps(cls) -> tuple[str, ...]:
        """The names of all steps."""
        return (*(tool.name for tool in cls.tools), FINISH)

    def check(self) -> None:
        """Raise SourceError where the class is incomplete."""
        super().check()
        names, fields = {*self.steps()}, {*self.result.model_fields}
        if twice := sorted(({*self.inputs} & {*_ASKED, *_REPORTED, *fields}) | (fields & {*_REPORTED})):
            raise SourceError(
                f"agent {self.name!r}: rename {twice[0]!r}; two fields of its prompts would have that name"
            )
        if taken := sorted({START, FINISH} & {tool.name for tool in self.tools}):
            raise SourceError(f"agent {self.name!r}: rename the tool {taken[0]!r}; it is the name of a step already")
        if unknown := sorted({*self.allowed, *(s for after in self.allowed.values() for s in after)} - names - {START}):
            raise SourceError(f"agent {self.name!r}: `allowed` names {unknown[0]!r}, which is none of its steps")

    def _tool(self, name: str) -> Tool[..., Any]:
        return next(tool for tool in self.tools if tool.name == name)


def clipped(facts: list[Fact], most: int) -> str:
    """Facts as JSON lines of at most about `most` characters: long ones are cut, then the oldest are left out.

    What is closed is never left out: the model must not take a no for a yes.
    """
    lines = [(fact, _line(fact, most // 4)) for fact in facts]
    size, left_out = sum(len(line) for _, line in lines), 0
    kept = []
    for fact, line in lines:
        if size > most and "closed" not in fact:
            size, left_out = size - len(line), left_out + 1
        else:
            kept.append(line)
    first = [f"({left_out} older steps are left out)"] if left_out else []
    return "\n".join([*first, *kept]) or "nothing yet"


def _line(fact: Fact, most: int) -> str:
    line = _json(fact)
    if len(line) <= most:
        return line
    return _json({k: v if len(_json(v)) <= most // 4 else f"{_json(v)[: most // 4]} … (cut)" for k, v in fact.items()})


def _json(value: Any) -> str:
    return json.dumps(jsonable(value), ensure_ascii=False)


def _texts(inputs: Mapping[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else _json(value) for name, value in inputs.items()}


def _outcome(fact: Fact) -> str:
    return next((f"{word}: {fact[key]}" for word, key in _ENDED if key in fact), "is done")


def _approval(run: Run, since: int) -> dict[str, Any]:
    """What the last person asked since a step said; {} if nobody was."""
    answers = [s.outputs for s in run.steps[since:] if s.kind == "approval" and isinstance(s.outputs, dict)]
    return answers[-1] if answers else {}
