"""A hedgehog agent: one narrow job, typed in and out, its workflow split into the phases of the state machine."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import dspy
from pydantic import BaseModel

from agentkit.errors import ModelError, SourceError, ToolFailed
from agentkit.runs import MAX_STEPS, Run
from agentkit.states import State
from agentkit.tools import Inventory, Tool

if TYPE_CHECKING:
    import polars as pl

    from agentkit.records import RunRecord
    from agentkit.systems import System


class Agent(dspy.Module):  # type: ignore[misc]
    """Base class of agents. Subclasses set `name`, `result` and `tools` and write the three phases.

    Predictors are attributes, as in any `dspy.Module`, so DSPy's optimisers and JSON state apply unchanged.
    """

    name: ClassVar[str] = ""
    result: ClassVar[type[BaseModel]]
    tools: ClassVar[tuple[Tool[..., Any], ...]] = ()
    forbidden_tools: ClassVar[tuple[str, ...]] = ()  # names of tools it may never call, whoever grants them
    max_steps: ClassVar[int] = MAX_STEPS  # times it may go from planning to executing

    def plan(self, run: Run, **inputs: Any) -> Any:
        """PLANNING: understand the request; returns whatever `execute` needs."""
        raise NotImplementedError(f"{type(self).__name__}.plan is not written")

    def execute(self, run: Run, plan: Any, **inputs: Any) -> Any:
        """EXECUTING: call tools (`run.call(tool, …)`); returns what was found and done."""
        raise NotImplementedError(f"{type(self).__name__}.execute is not written")

    def reflect(self, run: Run, plan: Any, facts: Any, **inputs: Any) -> BaseModel:
        """REFLECTING: check and compose the typed result."""
        raise NotImplementedError(f"{type(self).__name__}.reflect is not written")

    def recover(self, run: Run, error: ToolFailed | ModelError, **inputs: Any) -> BaseModel | None:
        """A lesser result where a tool or model failed for good (hand over to a person, say); None: the run fails.

        Never asked about a refusal: a denied call or a spent budget ends the run.
        """
        return None

    def carry_out(self, run: Run, inputs: dict[str, Any]) -> BaseModel:
        """Take the run from PLANNING to a validated result.

        Raises:
            pydantic.ValidationError: the result does not fit its declared type.
        """
        run.max_steps = self.max_steps
        with run.acting_as(self.inventory()):
            try:
                found = self._phases(run, inputs)
            except (ToolFailed, ModelError) as e:
                lesser = self.recover(run, e, **inputs)
                if lesser is None:
                    raise
                run.degrade(e)
                found = lesser
            data = found.model_dump(warnings=False) if isinstance(found, BaseModel) else found
            return self.result.model_validate(data, by_alias=True, by_name=True)

    def _phases(self, run: Run, inputs: dict[str, Any]) -> BaseModel:
        plan = self.plan(run, **inputs)
        run.partial["plan"] = plan
        run.to(State.EXECUTING, "plan is made")
        facts = self.execute(run, plan, **inputs)
        run.partial["facts"] = facts
        run.to(State.REFLECTING, "tools are done")
        return self.reflect(run, plan, facts, **inputs)

    def inventory(self) -> Inventory:
        """What this agent may use."""
        return Inventory(self.name, tuple(self.tools), frozenset(self.forbidden_tools))

    def run(self, **inputs: Any) -> RunRecord:
        """Run this agent by itself, as a system of one; see `System.run`."""
        return self._alone().run(**inputs)

    def map(self, frame: pl.DataFrame, **options: Any) -> pl.DataFrame:
        """Run every row of a frame through this agent by itself; see `agentkit.mapping.map_frame`."""
        return self._alone().map(frame, **options)

    def _alone(self) -> System:
        from agentkit.systems import adopt  # systems are made of agents, so they import this module

        return adopt(self)

    @classmethod
    def input_names(cls) -> tuple[tuple[str, ...], frozenset[str]]:
        """All input names, and those without a default, read from the parameters of `plan` after `run`."""
        return parameters_of(cls.plan, skip=2)

    def check(self) -> None:
        """Raise SourceError where the class is incomplete."""
        for what in ("name", "result"):
            if not getattr(self, what, None):
                raise SourceError(f"agent class {type(self).__name__} sets no `{what}`")
        for phase in ("plan", "execute", "reflect"):
            if getattr(type(self), phase) is getattr(Agent, phase):
                raise SourceError(f"agent class {type(self).__name__} does not write the phase `{phase}`")
        for what in ("tools", "forbidden_tools"):
            if not isinstance(getattr(self, what), list | tuple):
                raise SourceError(f"agent {self.name!r}: `{what}` must be a tuple; is a comma missing in ({what},)?")
        if wrong := [tool for tool in self.tools if not isinstance(tool, Tool)]:
            raise SourceError(f"agent {self.name!r}: {wrong[0]!r} is no tool; put @ak.tool before the function")
        names = {tool.name for tool in self.tools}
        if both := sorted(names & set(self.forbidden_tools)):
            raise SourceError(f"agent {self.name!r}: {both[0]!r} is among its tools and forbidden to it")
        for tool in self.tools:
            if tool.fallback is not None and tool.fallback not in self.tools:
                raise SourceError(
                    f"agent {self.name!r}: {tool.name!r} falls back on {tool.fallback.name!r}, which is not among its tools"
                )


@lru_cache(maxsize=512)
def parameters_of(function: Callable[..., Any], skip: int = 0) -> tuple[tuple[str, ...], frozenset[str]]:
    """Names a function takes by keyword, and those it cannot do without; ((), ()) if it takes anything."""
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return tuple(p.name for p in named), frozenset(p.name for p in named if p.default is p.empty)
