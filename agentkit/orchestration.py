"""Several agents on one request: a fixed flow of agents, in parallel where nothing forbids it, with a shared blackboard."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import asdict, dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any, Literal, TypeVar

import dspy
from pydantic import BaseModel, Field

from agentkit.agents import Agent
from agentkit.blackboard import BOARD, Blackboard
from agentkit.budget import Budget, Ledger
from agentkit.current import DSPY_SETTING
from agentkit.errors import AgentkitError, BudgetExceeded, SourceError, Stopped
from agentkit.flows import Edge, Flow, Join
from agentkit.records import RunRecord
from agentkit.runs import Run
from agentkit.sinks import emit
from agentkit.states import State
from agentkit.systems import System

T = TypeVar("T")
Status = Literal["done", "failed", "skipped"]
_WORKERS = 4
_POLL_S = 0.5  # how soon a stop or the end of the time is noticed while agents work
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


@dataclass(frozen=True)
class Outcome:
    """How an agent of a flow ended. `missing` says that its part would have been wanted: it failed, or what it waits for
    did; an agent that a condition leaves out is skipped, but not missing."""

    node: str
    status: Status
    reason: str = ""
    missing: bool = False
    result: Any = None
    record: RunRecord | None = None
    board: Blackboard | None = None  # what it knew and wrote

    @property
    def acted(self) -> bool:
        """Whether it may have changed something outside."""
        return self.record is not None and bool(self.record.effects)


# ---- runs of agents


class _Shared(Ledger):
    """The ledger of the whole as its agents see it: a limit met there ends the whole, not one agent."""

    def __init__(self, whole: Run) -> None:
        super().__init__(Budget.unlimited(), whole.ledger)
        self._whole = whole

    def reserve(self, **amounts: float) -> None:
        try:
            super().reserve(**amounts)
        except BudgetExceeded as e:
            self._whole.refuse(e)


class NodeRun(Run):
    """The run of one agent of an orchestration: a state machine and an inventory of its own, the budget of the whole.

    Its id, and so the keys of its calls, follow from the id of the whole.
    """

    def __init__(self, whole: Run, node: str, inputs: dict[str, Any], *, budget: Budget, of: Iterable[str], turn: int):
        super().__init__(
            f"{whole.system}.{node}",  # the name in the line of delegation
            inputs,
            budget=budget,
            release=whole.release,
            kind=whole.kind,
            approver=whole.approver,
            autonomy=whole.autonomy,
            stage=whole.stage,
            parent=whole,
            run_id=hashlib.sha256(f"{whole.run_id}/{node}/{turn}".encode()).hexdigest()[:32],
        )
        self.whole, self.node, self.over = whole, node, False
        self.system, self.route = whole.system, node  # who stops the system stops its agents
        self.ledger = Ledger(budget, _Shared(whole))
        self.interceptors = whole.interceptors
        self.asking = whole.asking  # one question at a time: waits for people do not add up
        assert whole.board is not None
        self.board = whole.board.view(node, of, self)

    def heed(self, tool: str | None = None, *, at_once: bool = False) -> None:
        """As of any run; and what has ended the whole ends its agents."""
        if self.over:
            raise Stopped("the orchestration this agent is part of has ended")
        super().heed(tool, at_once=at_once)

    def to(self, target: State, reason: str) -> None:
        """As of any run; while it waits for a person, so does the whole."""
        before = self.state
        super().to(target, reason)
        # Both happen within `asking`, so only one agent moves the whole at a time.
        if {before, target} == {State.EXECUTING, State.AWAITING_HUMAN} and self.whole.state is before:
            self.whole.to(target, f"{self.node}: {reason}")


# ---- the orchestrator


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
                outcomes = _Pass(self, run, inputs, turn, outcomes).fly()
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
        given = {name: _copied(v) for name, v in {**inputs, **found, "result": result}.items() if name in names}
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


class _Pass:
    """One pass through a flow."""

    def __init__(
        self, system: Orchestrator, run: Run, inputs: dict[str, Any], turn: int, before: Mapping[str, Outcome]
    ) -> None:
        self.system, self.flow, self.run, self.inputs, self.turn = system, system.flow, run, inputs, turn
        self.before = before
        self.outcomes: dict[str, Outcome] = {}
        self.working: dict[str, NodeRun] = {}
        self.finished: SimpleQueue[tuple[str, RunRecord | None, BaseException | None]] = SimpleQueue()
        self.workers = 1 if run.interceptors else system.workers

    def fly(self) -> dict[str, Outcome]:
        """Every agent to its end; how each ended, in the order of the flow."""
        waiting = list(self.flow.order)
        try:
            while waiting or self.working:
                for node in tuple(waiting):
                    decided = all(edge.source in self.outcomes for edge in self.flow.incoming[node])
                    if decided and len(self.working) < self.workers:
                        waiting.remove(node)
                        self._begin(node)
                if self.working:
                    self._end(*self._next())
        except BaseException:
            for child in self.working.values():  # threads cannot be ended, but no call of theirs is made any more
                child.over = True
                child.absorb()
            raise
        return {node: self.outcomes[node] for node in self.flow.order}

    def _begin(self, node: str) -> None:
        kept = self.before.get(node)
        if kept is not None and kept.acted:
            return self._settle(replace(kept, reason="it has changed something outside and is not repeated"))
        skipped = self._skipped(node)
        if skipped is not None:
            return self._settle(skipped)
        child = self.system.node_run(self.run, node, self._given(node), self.turn, of=self.flow.above[node])
        self.working[node] = child
        if self.workers == 1:
            return self._work(child)  # on this thread, where a journal may keep what belongs to it
        thread = threading.Thread(
            target=copy_context().run, args=(self._work, child), name=f"agentkit-{node}", daemon=True
        )
        return thread.start()

    def _work(self, child: NodeRun) -> None:
        try:
            self.finished.put((child.node, *self.system.carry_out(child)))
        except BaseException as e:  # the record could not be kept
            self.finished.put((child.node, None, e))

    def _next(self) -> tuple[str, RunRecord | None, BaseException | None]:
        while True:
            try:
                return self.finished.get(timeout=max(0.01, min(_POLL_S, self.run.ledger.seconds_left)))
            except Empty:
                if self.run.state is not State.AWAITING_HUMAN:  # a person's time is not the agents'
                    self.run.reserve()  # raises when the time is up, or somebody stops it

    def _end(self, node: str, record: RunRecord | None, error: BaseException | None) -> None:
        child = self.working[node]
        if record is None or not isinstance(error, Exception | None):
            raise error or AssertionError("no record")
        del self.working[node]
        child.absorb()
        self._back_from_waiting()
        if error is not None:
            outcome = Outcome(node, "failed", record.error or "", True, None, record, child.board)
        else:
            self.run.partial[node] = record.result
            outcome = Outcome(node, "done", "", False, record.result, record, child.board)
        self._settle(outcome)
        self.run.heed(at_once=True)  # what has ended the whole may have reached this agent first

    def _back_from_waiting(self) -> None:
        """An agent whose question failed leaves the whole waiting; unless another asks, it goes on."""
        if self.run.state is State.AWAITING_HUMAN and self.run.asking.acquire(blocking=False):
            try:
                self.run.to(State.EXECUTING, "nobody is asked any more")
            finally:
                self.run.asking.release()

    def _settle(self, outcome: Outcome) -> None:
        self.outcomes[outcome.node] = outcome
        self._write(outcome)
        told: dict[str, Any] = {"status": outcome.status, "missing": outcome.missing, "turn": self.turn}
        if (record := outcome.record) is not None and outcome.board and outcome.board.snapshot:
            told |= {"run_id": record.run_id, "seconds": record.seconds, "knew": outcome.board.snapshot.number}
            told |= {n: getattr(record, n) for n in ("model_calls", "tool_calls", "tokens_in", "tokens_out", "usd")}
        self.run.decide(f"agent {outcome.node}", told, outcome.reason or "brought back a result")

    def _write(self, outcome: Outcome) -> None:
        board = outcome.board or self.run.board
        assert board is not None
        if outcome.status == "done" and outcome.record is not None:
            board.write(outcome.node, outcome.record.output, outcome.node)
        elif outcome.node in board:
            board.write(outcome.node, None, outcome.node)  # what it found at the turn before does not count any more

    # ---- what an agent waits for

    def _skipped(self, node: str) -> Outcome | None:
        """The outcome of an agent that is not to run, or None."""
        decisions = {edge.source: self._taken(edge) for edge in self.flow.incoming[node]}
        taken = [decision.taken for decision in decisions.values()]
        enough = all if self.flow.joins[node] == "all" else any
        if taken and not enough(taken):
            no = [f"{source}: {d.why}" for source, d in decisions.items() if not d.taken]
            broken = any(d.broken for d in decisions.values())
            return Outcome(node, "skipped", "not taken from " + "; ".join(no), missing=broken)
        for name in sorted(self.system.agents[node].input_names()[1] & self.outcomes.keys()):
            if (other := self.outcomes[name]).status != "done":
                return Outcome(node, "skipped", f"needs the result of {name!r}, which is {other.status}", other.missing)
        return None

    def _taken(self, edge: Edge) -> _Decision:
        source = self.outcomes[edge.source]
        if source.status != "done":
            return _Decision(False, f"{source.status} ({source.reason})", source.missing)
        if edge.when is None:
            return _Decision(True)
        assert source.board is not None
        try:
            holds = bool(edge.when(source.board))
        except Exception as e:  # a condition that breaks keeps one agent from running, not the others
            decision = _Decision(False, f"the condition failed with {type(e).__name__}: {e}", broken=True)
        else:
            decision = _Decision(holds, "the condition holds" if holds else "the condition does not hold")
        self.run.decide(f"edge {edge.source} → {edge.target}", decision.taken, decision.why)
        return decision

    def _given(self, node: str) -> dict[str, Any]:
        """Copies: what an agent does to its inputs does not reach the others."""
        found = {o.node: o.result for o in self.outcomes.values() if o.status == "done"}
        names: Collection[str] = self.system.agents[node].input_names()[0]
        return {name: _copied(value) for name, value in {**self.inputs, **found}.items() if name in names}


@dataclass(frozen=True)
class _Decision:
    taken: bool
    why: str = ""
    broken: bool = False  # not taken because something went wrong


def _copied(value: T) -> T:
    """A copy of its own; a live object that cannot be copied (a connection, say) is shared."""
    try:
        return copy.deepcopy(value)
    except TypeError:
        return value
