"""Several agents on one request: a fixed flow of agents, in parallel where nothing forbids it, with a shared blackboard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import dspy
from pydantic import BaseModel, Field

from agentkit.agents import Agent
from agentkit.blackboard import BOARD, Blackboard
from agentkit.budget import Budget
from agentkit.current import DSPY_SETTING
from agentkit.errors import AgentkitError, SourceError
from agentkit.flow_runs import NodeRun, Outcome, Pass, Status, copied
from agentkit.flows import Edge, Flow, Join
from agentkit.records import RunRecord
from agentkit.runs import Run
from agentkit.sinks import emit
from agentkit.states import State
from agentkit.systems import System

__all__ = ["NodeRun", "NothingFound", "Orchestrator", "Outcome", "Status", "Verdict", "VerificationFailed"]

_WORKERS = 4
_MOST_RETRIES = 3


class VerificationFailed(AgentkitError):
    """The verifier said no to the result, or could not be asked; `result` is what it was shown."""

    def __init__(self, reason: str, result: Any) -> None:
        super().__init__(f"the result was not verified: {reason}")
        self.reason, self.result = reason, result


class NothingFound(AgentkitError):
    """None of the agents of a flow brought anything back; `outcomes` says why, by agent."""

    def __init__(self, outcomes: Mapping[str, Outcome]) -> None:
        why = "; ".join(f"{o.node}: {o.reason}" for o in outcomes.values())
        super().__init__(f"no agent brought anything back; {why}")
        self.outcomes = dict(outcomes)


class Verdict(BaseModel):
    """What a verifier finds; an agent that verifies has this result, or one with the same two fields."""

    ok: bool
    reason: str = Field(min_length=1)


class Orchestrator(System):
    """A system whose agents all work on one request, in the order of a flow.

    An agent takes the inputs that its `plan` names, and by the name of an earlier agent that agent's result; one that
    needs the result of an agent that brought none is skipped. All share `run.board`. Each works in a run of its own,
    whose record names this one as its parent; its calls and effects stand in this one's record, too.

    What goes wrong in an agent, a refusal included, ends that agent's run: the others go on, and the result says what is
    missing (`missing: list[str]`, if the result's type has such a field, is filled in; the record has it always). The
    whole ends where its budget is spent, an operator stops it, or no agent brings anything back.

    Under an interceptor (a journal of a durable run, injected faults) the agents work one after the other, so that their
    calls come in the same order each time.

    Args:
        flow: the edges; agents without incoming edges begin at once, side by side.
        result: the type of the result.
        compose: makes the result from run and board; default: a field for each agent by its name, None where it is missing.
        joins: `all` for agents that need all their incoming edges taken, see `Flow`.
        verifier: an agent whose result has `ok: bool` and `reason: str`; it is given the result (by the name `result`), the
            inputs and the agents' results, and nothing leaves that it has not agreed to.
        retries: how often the agents may try again after the verifier's no (0 to 3). They find its verdict on the board
            under its name. An agent that has changed something outside is not repeated.
        budgets: limits of single agents, within those of the whole.
        workers: agents at work at the same time, at most.
        options: as for `System`.

    Raises:
        SourceError: the flow goes in a circle, names an agent that is not there, or an agent takes the result of one that
            does not come before it.
    """

    def __init__(
        self,
        name: str,
        agents: Sequence[Agent],
        *,
        flow: Iterable[Edge] = (),
        result: type[BaseModel],
        compose: Callable[[Run, Blackboard], Any] | None = None,
        joins: Mapping[str, Join] | None = None,
        verifier: Agent | None = None,
        retries: int = 0,
        budgets: Mapping[str, Budget] | None = None,
        workers: int = _WORKERS,
        **options: Any,
    ) -> None:
        self.result, self.retries, self.workers = result, retries, workers
        self.budgets = dict(budgets or {})
        self.verifier = verifier.name if verifier else None
        self.flow = Flow([agent.name for agent in agents], flow, joins or {})
        self._compose = compose
        super().__init__(name, [*agents, *([verifier] if verifier else ())], **options)
        self._check_orchestration(verifier)

    def _check_routing(self, count: int) -> None:
        if len(self.agents) != count:
            raise SourceError(f"orchestrator {self.name!r}: two agents share a name")
        if self.router is not None or self.fallback_agent is not None:
            raise SourceError(f"orchestrator {self.name!r}: its flow takes the place of a router")
        if not self.flow.order:
            raise SourceError(f"orchestrator {self.name!r} has no agents")

    def _check_orchestration(self, verifier: Agent | None) -> None:
        for node in self.flow.order:
            taken = {*self.agents[node].input_names()[0]} & {*self.flow.order}
            if early := sorted(taken - self.flow.above[node]):
                raise SourceError(f"agent {node!r} takes the result of {early[0]!r}, which does not come before it")
        if unknown := sorted(self.budgets.keys() - self.agents.keys()):
            raise SourceError(f"orchestrator {self.name!r}: there is no agent {unknown[0]!r} to give a budget to")
        if not 0 <= self.retries <= _MOST_RETRIES or self.workers < 1:
            raise SourceError(f"orchestrator {self.name!r}: retries must be 0 to {_MOST_RETRIES}, workers at least 1")
        fields = verifier.result.model_fields if verifier else {}
        if verifier and not ("reason" in fields and "ok" in fields and fields["ok"].annotation is bool):
            raise SourceError(f"the verifier {verifier.name!r} needs a result with `ok: bool` and `reason: str`")

    def input_names(self) -> tuple[tuple[str, ...], frozenset[str]]:
        """All inputs of the agents, and those that some agent cannot do without; results of other agents are none."""
        pairs = [(node, *agent.input_names()) for node, agent in self.agents.items()]
        own = {*self.flow.order, "result"} if self.verifier else {*self.flow.order}
        names = dict.fromkeys(n for _, every, _ in pairs for n in every if n not in own)
        return tuple(names), frozenset(n for _, _, required in pairs for n in required if n not in own)

    def compose(self, run: Run, board: Blackboard) -> Any:
        """The result from what the agents found; may be overridden in place of the argument of the same name."""
        if self._compose is not None:
            return self._compose(run, board)
        return {node: board.read(node) for node in self.flow.order if node in self.result.model_fields}

    # ---- running

    def work(self, run: Run, inputs: dict[str, Any]) -> Any:
        """From IDLE to a verified result."""
        run.route = self.name
        run.board = board = Blackboard(agents=self.agents)
        run.to(State.PLANNING, "request received")
        outcomes: dict[str, Outcome] = {}
        try:
            for turn in range(self.retries + 1):
                run.to(State.EXECUTING, "the flow is fixed")
                outcomes = Pass(self, run, inputs, turn, outcomes).fly()
                run.to(State.REFLECTING, "every agent is done, failed or skipped")
                result = self._result(run, board, outcomes)
                verdict = self._verify(run, result, inputs, outcomes, turn)
                if verdict is None or verdict.ok:
                    return result
                if turn < self.retries:
                    run.to(State.PLANNING, f"not verified: {verdict.reason}")
            raise VerificationFailed(verdict.reason, result)
        finally:
            run.decide(BOARD, board.data(), "what was known, by whom and when")

    def _result(self, run: Run, board: Blackboard, outcomes: dict[str, Outcome]) -> BaseModel:
        if not any(o.status == "done" for o in outcomes.values()):
            raise NothingFound(outcomes)
        missing = [o for o in outcomes.values() if o.missing]
        lesser = [f"{o.node} has {o.record.degraded}" for o in outcomes.values() if o.record and o.record.degraded]
        run.degraded = "; ".join([*(f"{o.node} is missing ({o.reason})" for o in missing), *lesser]) or None
        run.decide("missing", [o.node for o in missing], run.degraded or "every part is there")
        found = self.compose(run, board)
        data = found.model_dump(warnings=False) if isinstance(found, BaseModel) else found
        if "missing" in self.result.model_fields and isinstance(data, Mapping):
            data = {**data, "missing": [o.node for o in missing]}  # it is a fact, not the composer's opinion
        return self.result.model_validate(data, by_alias=True, by_name=True)

    def _verify(
        self, run: Run, result: BaseModel, inputs: dict[str, Any], outcomes: dict[str, Outcome], turn: int
    ) -> Any:
        if self.verifier is None:
            return None
        run.partial["unverified"] = result
        names = self.agents[self.verifier].input_names()[0]
        found = {o.node: o.result for o in outcomes.values() if o.status == "done"}
        given = {name: copied(v) for name, v in {**inputs, **found, "result": result}.items() if name in names}
        child = self.node_run(run, self.verifier, given, turn, of=self.agents.keys())
        record, error = self.carry_out(child)
        child.absorb()
        run.heed()
        if error is not None:
            if not isinstance(error, Exception):
                raise error
            run.decide("verify", None, f"the verifier failed: {record.error}")
            raise VerificationFailed(f"the verifier failed: {record.error}", result) from error
        assert child.board is not None
        child.board.write(self.verifier, record.output)
        run.decide("verify", record.output, f"{self.verifier}: {record.result.reason}")
        return record.result

    def node_run(self, run: Run, node: str, given: dict[str, Any], turn: int, of: Iterable[str]) -> NodeRun:
        """The run in which an agent is to work."""
        budget = self.budgets.get(node, Budget.unlimited())
        shown = {*of, *filter(None, [self.verifier])}
        return NodeRun(run, node, given, budget=budget, of=shown, turn=turn)

    def carry_out(self, child: NodeRun) -> tuple[RunRecord, BaseException | None]:
        """Let an agent work in its run, and hand on the record."""

        def work(run: Run) -> BaseModel:
            run.to(State.PLANNING, f"its turn in {self.name}")
            return self.agents[child.node].carry_out(run, child.inputs)

        with dspy.context(**{DSPY_SETTING: child}):
            record, error = child.carry_out(work)
        emit(record)
        return record, error

    def spec(self) -> dict[str, Any]:
        """As of any system, with the flow."""
        return {
            **super().spec(),
            "flow": self.flow.spec(),
            "result": self.result.model_json_schema(),
            "compose": getattr(self._compose, "__name__", None),
            "verifier": self.verifier,
            "retries": self.retries,
            "budgets": {node: asdict(budget) for node, budget in self.budgets.items()},
        }
