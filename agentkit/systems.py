"""A system: a router prompt and the agents behind it, run as one unit and released as one thing."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy

from agentkit.agents import Agent, parameters_of
from agentkit.autonomy import Autonomy
from agentkit.budget import Budget, DailyBudget, Ledger
from agentkit.callers import caller
from agentkit.control import control
from agentkit.current import DSPY_SETTING, current_run
from agentkit.errors import ModelError, SourceError, UsageError
from agentkit.models import MeteredLM, build_lm, metered
from agentkit.records import RunRecord
from agentkit.repair import repairing
from agentkit.runs import REHEARSALS, Run
from agentkit.sinks import emit
from agentkit.states import State
from agentkit.tools import Approver, Inventory, Tool

if TYPE_CHECKING:
    import polars as pl

    from agentkit.embedded import Weights
    from agentkit.metrics import Metric

_approver: ContextVar[Approver | None] = ContextVar("agentkit_approver", default=None)


@contextmanager
def approve_with(approver: Approver) -> Iterator[None]:
    """Ask `approver` wherever a tool's limit calls for a person; without one the answer is no."""
    token = _approver.set(approver)
    try:
        yield
    finally:
        _approver.reset(token)


class System(dspy.Module):  # type: ignore[misc]
    """Router, agents, model, budget and metrics of one job.

    It is a `dspy.Module`: optimisers, `named_predictors`, `dump_state` and `load_state` work on the whole.
    Calling it returns a `dspy.Prediction` with the result's fields plus `route` and `record`; `run` returns the
    record itself and never raises for what happens inside the run.

    Args:
        name: letters, digits and underscores; the name of the registered model.
        agents: the hedgehogs; with more than one, `router` must be given.
        router: a predictor whose first output field names the agent.
        model: tier or model string, see `agentkit.models`.
        budget: limits of one run; `daily` of all runs of a UTC day, in every process; `daily_per_user` of those of one
            user (`agentkit.acting_for`). Evaluations and replays are not charged to the day.
        autonomy: which calls an agent makes alone, which people are told of, and which wait for a person.
        fallback_agent: who takes a request that the router's model failed on; without one the run fails.
        success: the metric that means success of a run; `metrics` are the others, reported beside it.
        files: data files that belong to the release (knowledge base, fixtures).
    """

    def __init__(
        self,
        name: str,
        agents: Sequence[Agent],
        *,
        router: dspy.Predict | None = None,
        model: str = "fast",
        budget: Budget | None = None,
        daily: DailyBudget | None = None,
        daily_per_user: DailyBudget | None = None,
        autonomy: Autonomy | None = None,
        fallback_agent: str | None = None,
        success: Metric | None = None,
        metrics: Sequence[Metric] = (),
        files: Iterable[str | Path] = (),
    ) -> None:
        super().__init__()
        if not re.fullmatch(r"[A-Za-z]\w{0,63}", name):
            raise SourceError(f"system name {name!r}: use letters, digits and underscores, beginning with a letter")
        for agent in agents:
            agent.check()
        if not all(isinstance(limit, DailyBudget | None) for limit in (daily, daily_per_user)):
            raise SourceError(
                f"system {name!r}: give a day's limits as ak.DailyBudget; a Budget's defaults are a run's"
            )
        self.name = name
        self.router = router
        self.agents = {agent.name: agent for agent in agents}
        self.model, self.budget = model, budget or Budget()
        self.daily, self.daily_per_user, self.autonomy = daily, daily_per_user, autonomy or Autonomy()
        self.fallback_agent = fallback_agent
        self.success, self.metrics = success, tuple(metrics)
        self.files = tuple(Path(f) for f in files)
        self.weights: Weights | None = None
        self.release: str | None = None  # content hash, set by the loader
        self.stage = "draft"  # or "production": set by the loader
        self._lm: tuple[Any, MeteredLM] | None = None
        self._check_routing(len(agents))
        self._check_tools()
        self._meter()
        if taken := sorted({"kind", "ledger"} & {*self.input_names()[0]}):
            raise SourceError(f"system {name!r}: rename the input {taken[0]!r}; `run` has an option of that name")

    def _check_routing(self, count: int) -> None:
        if len(self.agents) != count:
            raise SourceError(f"system {self.name!r}: two agents share a name")
        if self.router is None:
            if count != 1:
                raise SourceError(f"system {self.name!r} has {count} agents but no router")
            return
        if self.fallback_agent not in (None, *self.agents):
            raise SourceError(f"system {self.name!r}: fallback_agent {self.fallback_agent!r} is none of its agents")
        if not isinstance(self.router, dspy.Predict):
            raise SourceError(f"the router must be a dspy.Predict, got {type(self.router).__name__}")
        field = self.router.signature.output_fields[self._route_field()].annotation
        labels = set(getattr(field, "__args__", ()))
        if labels != set(self.agents):
            raise SourceError(f"the router can answer {sorted(labels)!r}, but the agents are {sorted(self.agents)!r}")

    def _meter(self) -> None:
        """Put the meter between predictors and the models pinned to them, also those pinned since the last run."""
        for predictor in _predictors(self, set()):
            if predictor.lm is not None:
                predictor.lm = metered(predictor.lm)

    def _check_tools(self) -> None:
        tools = {id(tool): tool for agent in self.agents.values() for tool in agent.tools}
        names = [tool.name for tool in tools.values()]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise SourceError(f"system {self.name!r}: two different tools are called {twice[0]!r}; rename one")

    def _route_field(self) -> str:
        return str(next(iter(self.router.signature.output_fields)))  # type: ignore[union-attr]

    # ---- running

    @property
    def lm(self) -> MeteredLM:
        """The model calls go to, built once per model and weights."""
        key = (self.model, id(self.weights))
        if self._lm is None or self._lm[0] != key:
            self._lm = (key, build_lm(self.model, weights=self.weights))
        return self._lm[1]

    def models(self) -> tuple[Any, ...]:
        """Every model a run may call: those pinned to predictors, and the system's own where one is not pinned."""
        predictors = [p for _, p in self.named_predictors()]
        pinned = {id(p.lm): p.lm for p in predictors if p.lm is not None}
        own = () if predictors and all(p.lm is not None for p in predictors) else (self.lm,)
        return (*own, *pinned.values())

    def use(self, weights: Weights | None) -> System:
        """Attach fitted weights of the embedded model; they become part of the release."""
        self.weights = weights
        return self

    def input_names(self) -> tuple[tuple[str, ...], frozenset[str]]:
        """All input names, and the required ones."""
        pairs = [agent.input_names() for agent in self.agents.values()]
        asked = tuple(self.router.signature.input_fields) if self.router is not None else ()
        names = tuple(dict.fromkeys(n for every in (asked, *(every for every, _ in pairs)) for n in every))
        return names, frozenset(asked).union(*(required for _, required in pairs))

    def forward(self, **inputs: Any) -> dspy.Prediction:
        """Run once; an error inside the run is raised after it has been recorded."""
        record, error = self._run(inputs, kind="run")
        if error is not None:
            raise error
        return dspy.Prediction(**{**(record.output or {}), "route": record.route, "record": record})

    async def aforward(self, **inputs: Any) -> dspy.Prediction:
        """`forward` beside a running event loop."""
        return await asyncio.to_thread(type(self).forward, self, **inputs)

    def run(self, *, kind: str = "run", ledger: Ledger | None = None, **inputs: Any) -> RunRecord:
        """Run once and return the record, with `state` FAILED and the error in it if the run did not succeed.

        Args:
            kind: what the record is filed under (run, map, batch, evaluation).
            ledger: a shared budget that this run's use is charged to as well.
        """
        record, error = self._run(inputs, kind=kind, ledger=ledger)
        if error is not None and not isinstance(error, Exception):
            raise error  # KeyboardInterrupt, SystemExit
        return record

    def _run(
        self, inputs: dict[str, Any], kind: str, ledger: Ledger | None = None
    ) -> tuple[RunRecord, BaseException | None]:
        self.check_inputs(inputs)
        lm = self.lm  # built before the clock starts
        caller_run = current_run()
        if caller_run is not None:  # a part of that run, an evaluation say
            kind = caller_run.kind
        run = self.open_run(
            inputs,
            kind=kind,
            ledger=ledger,
            approver=_approver.get(),
            stage=caller_run.stage if caller_run is not None else self.stage,
            daily=self.ledgers_of_the_day(kind),
            parent=caller_run,  # whose budget it spends
        )
        with self.in_charge(run, lm):
            record, error = run.carry_out(lambda r: self.work(r, inputs))
        if caller_run is not None:
            run.absorb()
        emit(record)
        return record, error

    def open_run(self, inputs: dict[str, Any], **options: Any) -> Run:
        """A run of this system that has not begun; `options` as for `Run`."""
        return Run(self.name, inputs, budget=self.budget, release=self.release, autonomy=self.autonomy, **options)

    @contextmanager
    def in_charge(self, run: Run, lm: Any = None) -> Iterator[None]:
        """Calls of predictors inside belong to `run`: metered, on the system's model, with one repair."""
        self._meter()
        lm, adapter = lm or self.lm, repairing(dspy.settings.adapter)
        with dspy.context(lm=lm, adapter=adapter, **{DSPY_SETTING: run}):
            yield

    def ledgers_of_the_day(self, kind: str) -> tuple[Ledger, ...]:
        """What a run of this kind is charged to beside its own budget."""
        if kind in REHEARSALS or (self.daily is None and self.daily_per_user is None):
            return ()
        plane = control()
        if plane is None:
            raise UsageError(f"{self.name} has a daily budget, but nothing is installed that keeps one")
        return plane.ledgers(self.name, caller().user, self.daily, self.daily_per_user)

    def work(self, run: Run, inputs: dict[str, Any]) -> Any:
        """From IDLE to a result: route, then let the agent work."""
        run.to(State.PLANNING, "request received")
        agent = self._choose(run, inputs)
        run.route = agent.name
        return agent.carry_out(run, {k: v for k, v in inputs.items() if k in agent.input_names()[0]})

    def _choose(self, run: Run, inputs: dict[str, Any]) -> Agent:
        if self.router is None:
            return next(iter(self.agents.values()))
        try:
            answer = self.router(**{k: inputs[k] for k in self.router.signature.input_fields})
        except ModelError as e:
            if self.fallback_agent is None:
                raise
            run.degraded = str(e)
            run.decide("route", self.fallback_agent, f"the router's model failed: {e}")
            return self.agents[self.fallback_agent]
        run.routing, choice = answer, getattr(answer, self._route_field())
        run.decide("route", choice, f"router answered {dict(answer)!r}")
        return self.agents[choice]

    def check_inputs(self, inputs: dict[str, Any]) -> None:
        """Raise UsageError where an input is missing or unknown."""
        names, required = self.input_names()
        if missing := sorted(required - inputs.keys()):
            raise UsageError(f"{self.name} needs {sorted(required)!r}; missing: {missing!r}")
        if names and (extra := sorted(inputs.keys() - set(names))):
            raise UsageError(f"{self.name} takes {sorted(names)!r}; it has no input {extra[0]!r}")

    def map(self, frame: pl.DataFrame, **options: Any) -> pl.DataFrame:
        """Run every row of a frame; see `agentkit.mapping.map_frame` for columns and options."""
        from agentkit.mapping import map_frame

        return map_frame(self, frame, **options)

    # ---- what a release is made of

    def permissions(self) -> pl.DataFrame:
        """Who may call what: one row per tool, one column per agent.

        Cells: the permission, `forbidden`, or null (denied, as everything is that is not granted).
        """
        import polars as pl

        owners = self.inventories()
        tools = {tool.name: tool for inventory in owners for tool in inventory.tools}
        names = sorted({*tools, *(name for inventory in owners for name in inventory.forbidden)})

        def cell(inventory: Inventory, name: str) -> str | None:
            if name in inventory.forbidden:
                return "forbidden"
            return tools[name].permission if any(t.name == name for t in inventory.tools) else None

        columns = {inventory.agent: [cell(inventory, name) for name in names] for inventory in owners}
        return pl.DataFrame({"tool": names, **columns}, schema=dict.fromkeys(["tool", *columns], pl.String))

    def inventories(self) -> list[Inventory]:
        """What each agent may use."""
        return [agent.inventory() for agent in self.agents.values()]

    def prompts(self) -> dict[str, dict[str, Any]]:
        """Each predictor's prompt (instructions, fields, demonstrations) by a short dotted name."""
        return {short_name(name): p.dump_state() for name, p in self.named_predictors()}

    def spec(self) -> dict[str, Any]:
        """Everything that defines behaviour beside prompts, weights and source, as JSON-able data."""
        tools = {tool.name: tool.spec() for agent in self.agents.values() for tool in agent.tools}
        return {
            "name": self.name,
            "agents": {
                name: {
                    "class": type(agent).__name__,
                    "tools": [t.name for t in agent.tools],
                    "forbidden": sorted(agent.forbidden_tools),
                    "max_steps": agent.max_steps,
                    "result": agent.result.model_json_schema(),
                }
                for name, agent in self.agents.items()
            },
            "tools": tools,
            "budget": asdict(self.budget),
            "daily": self.daily and asdict(self.daily),
            "daily_per_user": self.daily_per_user and asdict(self.daily_per_user),
            "autonomy": self.autonomy.spec(),
            "fallback_agent": self.fallback_agent,
            "success": getattr(self.success, "__name__", None),
            "metrics": [getattr(m, "__name__", str(m)) for m in self.metrics],
        }


def _predictors(owner: Any, seen: set[int]) -> Iterator[Any]:
    """All predictors below, at every run: `named_predictors` would walk the growing histories of calls, too."""
    seen.add(id(owner))
    for name, value in vars(owner).items():
        if name in ("history", "callbacks"):
            continue
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        for item in items:
            if isinstance(item, dspy.Predict):
                yield item
            elif isinstance(item, dspy.Module) and id(item) not in seen:
                yield from _predictors(item, seen)


def short_name(name: str) -> str:
    """A predictor's path as people write it: `agents['billing'].classify` becomes `billing.classify`."""
    return re.sub(r"agents\['(\w+)'\]", r"\1", name).removeprefix("program.")


class Adopted(System):
    """An existing `dspy.Module` or plain callable as a system, unrewritten: it runs in EXECUTING as one step."""

    def __init__(self, program: Callable[..., Any], *, tools: Sequence[Tool[..., Any]] = (), **options: Any) -> None:
        name = options.pop("name", None) or getattr(program, "__name__", None) or type(program).__name__
        self.program, self.tools = program, tuple(tools)
        super().__init__(re.sub(r"\W", "_", str(name)), (), **options)

    def input_names(self) -> tuple[tuple[str, ...], frozenset[str]]:
        """Read from the program's own parameters; a lone predictor's from its signature."""
        lone = self.program.predict if isinstance(self.program, dspy.ChainOfThought) else self.program
        if isinstance(lone, dspy.Predict):
            fields = tuple(lone.signature.input_fields)
            return fields, frozenset(fields)
        if isinstance(self.program, dspy.Module):
            return parameters_of(type(self.program).forward, skip=1)
        return parameters_of(self.program)

    def _check_routing(self, count: int) -> None:
        pass  # a program routes for itself

    def inventories(self) -> list[Inventory]:
        """What the program may use."""
        return [Inventory(self.name, self.tools)]

    def work(self, run: Run, inputs: dict[str, Any]) -> Any:
        """Call the program; what it returns is the result, None is not one."""
        run.to(State.PLANNING, "request received")
        run.route = type(self.program).__name__ if isinstance(self.program, dspy.Module) else self.name
        run.to(State.EXECUTING, "adopted program plans for itself")
        with run.acting_as(*self.inventories()):
            answer = self.program(**inputs)
        run.to(State.REFLECTING, "program returned")
        if answer is None:
            raise UsageError("the adopted program returned None; it must return a Prediction, a mapping or a value")
        return answer.toDict() if isinstance(answer, dspy.Prediction) else answer

    def spec(self) -> dict[str, Any]:
        """As of any system, with the program's name in place of agents."""
        name = getattr(self.program, "__qualname__", type(self.program).__qualname__)
        return {**super().spec(), "program": name, "tools": {tool.name: tool.spec() for tool in self.tools}}


def adopt(program: Callable[..., Any], **options: Any) -> System:
    """Make any `dspy.Module` or callable a system that can be run, evaluated, gated and promoted.

    Args:
        program: called with the inputs as keyword arguments; may return a `dspy.Prediction`, a mapping, a pydantic
            model or a value (which becomes the output `value`). Its model is the system's, as everywhere, whatever
            `dspy.configure` says; one that a predictor has pinned (`predictor.lm`) stays.
        options: `tools`, the inventory of `ak.tool`s that the program may call (none by default); and as for `System`: name, model, budget, success, metrics, files.
    """
    if isinstance(program, System):
        return program
    if isinstance(program, Agent):
        return System(options.pop("name", program.name), [program], **options)
    if not callable(program):
        raise SourceError(f"cannot adopt {program!r}: it is neither a dspy.Module nor callable")
    called = getattr(type(program), "forward", None) if isinstance(program, dspy.Module) else program
    if called is None or inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(type(program).__call__):
        name = getattr(program, "__qualname__", type(program).__qualname__)
        raise SourceError(f"cannot adopt {name}: it is asynchronous only; give it a plain `forward` or function")
    return Adopted(program, **options)
