"""One pass through a flow: every agent in a run of its own, in parallel where nothing forbids it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from agentkit.budget import Budget, Ledger
from agentkit.errors import BudgetExceeded, Stopped
from agentkit.runs import Run
from agentkit.states import State
from agentkit.threads import begin

if TYPE_CHECKING:
    from agentkit.blackboard import Blackboard
    from agentkit.flows import Edge
    from agentkit.orchestration import Orchestrator
    from agentkit.records import RunRecord

T = TypeVar("T")
Status = Literal["done", "failed", "skipped"]
_POLL_S = 0.5  # how soon a stop or the end of the time is noticed while agents work


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


class Pass:
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
            self._settle(replace(kept, reason="it has changed something outside and is not repeated"))
        elif (skipped := self._skipped(node)) is not None:
            self._settle(skipped)
        else:
            child = self.system.node_run(self.run, node, self._given(node), self.turn, of=self.flow.above[node])
            self.working[node] = child
            if self.workers == 1:
                self._work(child)  # on this thread, where a journal may keep what belongs to it
            else:
                begin(partial(self._work, child), f"agentkit-{node}")

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
        return {name: copied(value) for name, value in {**self.inputs, **found}.items() if name in names}


@dataclass(frozen=True)
class _Decision:
    taken: bool
    why: str = ""
    broken: bool = False  # not taken because something went wrong


def copied(value: T) -> T:
    """A copy of its own; a live object that cannot be copied (a connection, say) is shared."""
    try:
        return copy.deepcopy(value)
    except TypeError:
        return value
