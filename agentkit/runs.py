"""A run in progress: its state, its steps, and the gate every model and tool call passes."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter

from agentkit.budget import Budget, Ledger
from agentkit.errors import IllegalTransition, PermissionDenied, Refusal
from agentkit.records import RunRecord, Step
from agentkit.states import PHASES, TRANSITIONS, State
from agentkit.tools import ApprovalRequest, Approver, Inventory, Tool

_current: ContextVar[Run | None] = ContextVar("agentkit_run", default=None)
_JSONABLE = TypeAdapter(Any)
DSPY_SETTING = "agentkit_run"  # DSPy hands its settings, but no context variables, to the threads it starts


def current_run() -> Run | None:
    """The run this code is part of, or None.

    Threads that DSPy starts (`dspy.Parallel`) belong to their caller's run; others need `contextvars.copy_context()`.
    """
    run = _current.get()
    if run is None and (dspy := sys.modules.get("dspy")):
        run = dspy.settings.get(DSPY_SETTING)
    return run


def jsonable(value: Any) -> Any:
    """`value` as JSON-able data; objects pydantic does not know become their `str`.

    A value that is no data at all (circular, bytes that are no text) becomes its `repr`: no record is lost to it.
    """
    if value is None or isinstance(value, str | int | float | bool):
        return value
    try:
        return _JSONABLE.dump_python(value, mode="json", fallback=str, warnings=False)
    except ValueError:
        return repr(value)


class Run:
    """One request on its way through a system."""

    def __init__(
        self,
        system: str,
        inputs: dict[str, Any],
        *,
        budget: Budget,
        ledger: Ledger | None = None,
        release: str | None = None,
        kind: str = "run",
        approver: Approver | None = None,
    ) -> None:
        self.run_id = uuid.uuid4().hex
        self.system, self.inputs, self.release, self.kind = system, inputs, release, kind
        self.state = State.IDLE
        self.ledger = Ledger(budget, parent=ledger)
        self.route: str | None = None
        self.routing: Any = None  # the router's whole prediction, for agents that combine its confidence with theirs
        self.steps: list[Step] = []
        self.effects: list[dict[str, Any]] = []
        self._approver = approver
        self._inventory: Inventory | None = None
        self._refusal: Refusal | None = None
        self._started_at = datetime.now(UTC)
        self._t0 = self._entered = time.perf_counter()
        self._in_state: dict[State, float] = {}
        self._record: RunRecord | None = None

    # ---- states

    def to(self, target: State, reason: str) -> None:
        """Take one transition and record it.

        Raises:
            IllegalTransition: the table has no such arrow; the run stays where it is.
        """
        if target not in TRANSITIONS[self.state]:
            raise IllegalTransition(self.state, target)
        now = time.perf_counter()
        spent = now - self._entered
        self._in_state[self.state] = self._in_state.get(self.state, 0.0) + spent
        self._step("transition", target, started=self._entered, seconds=spent, inputs=str(self.state), outputs=reason)
        self.state, self._entered = target, now

    # ---- calls

    def call(self, tool: Tool[..., Any], /, **arguments: Any) -> Any:
        """Call a tool: inventory, then arguments, then budget, then a person where its limit asks for one.

        Returns:
            What the tool returns, or None when a person (or the lack of one) said no; the refusal is recorded.

        Raises:
            PermissionDenied, BudgetExceeded: the call was not made.
            UsageError: the arguments do not fit the tool's schema.
        """
        inventory = self._inventory
        if inventory is None or not inventory.permits(tool):
            agent, names = (inventory.agent, [t.name for t in inventory.tools]) if inventory else ("(none)", [])
            error = PermissionDenied(agent, tool.name, names)
            self._step("tool", tool.name, started=time.perf_counter(), inputs=jsonable(arguments), error=str(error))
            self._refusal = self._refusal or error
            raise error
        values = tool.validate(arguments)
        self._reserve(tool_calls=1)
        if (reason := tool.human_needed(values)) and not self._ask(inventory.agent, tool, values, reason):
            return None
        if tool.permission != "read":
            # Noted before it happens: an effect that fails half-way has still to be looked at.
            self.effects.append({"tool": tool.name, "arguments": jsonable(values)})
        with self._timed("tool", tool.name, inputs=jsonable(values)) as step:
            result = tool.invoke(values)
            step.outputs = jsonable(result)
        return result

    def _ask(self, agent: str, tool: Tool[..., Any], values: dict[str, Any], reason: str) -> bool:
        request = ApprovalRequest(self.run_id, agent, tool.name, values, reason)
        self.to(State.AWAITING_HUMAN, reason)
        with self._timed("approval", tool.name, inputs=jsonable(values)) as step:
            # Only the value True approves: a chatty approver that returns "no" must not.
            granted = self._approver is not None and self._approver(request) is True
            step.outputs = granted
        by = "approved" if granted else "rejected" if self._approver else "rejected: nobody was there to approve"
        self.to(State.EXECUTING, by)
        return granted

    def _reserve(self, **amounts: float) -> None:
        self._heed_refusal()
        try:
            self.ledger.reserve(**amounts)
        except Refusal as e:
            self._refusal = e
            raise

    def _heed_refusal(self) -> None:
        # Code around a call may catch everything (dspy.ReAct does); a refused run ends all the same.
        if self._refusal is not None:
            raise self._refusal

    @contextmanager
    def model_call(self, model: str, reserved: dict[str, float], inputs: Any = None) -> Iterator[Step]:
        """Reserve, time, record and settle one model call; the caller fills tokens and usd into the step."""
        self._reserve(**reserved)
        with self._timed("model", model, inputs=inputs) as step:
            step.model = model
            try:
                yield step
            finally:
                used = {"model_calls": 1, "tokens_in": step.tokens_in, "tokens_out": step.tokens_out, "usd": step.usd}
                self.ledger.settle(reserved, used)

    def decide(self, name: str, outcome: Any, reason: str) -> None:
        """Record a decision the agent's code took, with its reason."""
        self._step("decision", name, started=time.perf_counter(), inputs=reason, outputs=jsonable(outcome))

    # ---- running

    @contextmanager
    def acting_as(self, inventory: Inventory) -> Iterator[None]:
        """Give the code inside exactly this inventory."""
        before, self._inventory = self._inventory, inventory
        try:
            yield
        finally:
            self._inventory = before

    def carry_out(self, work: Callable[[Run], Any]) -> tuple[RunRecord, BaseException | None]:
        """Run `work` to DONE or FAILED.

        Returns:
            The record, and the exception that ended the run (None when DONE). KeyboardInterrupt and SystemExit
            end the run as FAILED, too, and are handed back for the caller to raise.
        """
        token, result, error = _current.set(self), None, None
        try:
            result = work(self)
            self._heed_refusal()
            self.to(State.DONE, "result is valid")
        except BaseException as e:
            error = e
            if self.state not in (State.DONE, State.FAILED):
                self.to(State.FAILED, f"{type(e).__name__}: {e}")
        finally:
            _current.reset(token)
        return self._finish(result, error), error

    def _finish(self, result: Any, error: BaseException | None) -> RunRecord:
        models = [s for s in self.steps if s.kind == "model"]
        output = jsonable(result) if error is None else None
        return RunRecord(
            run_id=self.run_id,
            system=self.system,
            release=self.release,
            kind=self.kind,
            started_at=self._started_at.isoformat(),
            seconds=time.perf_counter() - self._t0,
            state=str(self.state),
            route=self.route,
            inputs={name: jsonable(value) for name, value in self.inputs.items()},
            output=output if output is None or isinstance(output, dict) else {"value": output},
            error=None if error is None else f"{type(error).__name__}: {error}",
            effects=self.effects,
            phases={name: self._in_state.get(state, 0.0) for state, name in PHASES.items()},
            waited_s=self._in_state.get(State.AWAITING_HUMAN, 0.0),
            model_calls=len(models),
            tool_calls=sum(s.kind == "tool" for s in self.steps),
            tokens_in=sum(s.tokens_in for s in models),
            tokens_out=sum(s.tokens_out for s in models),
            usd=sum(s.usd for s in models),
            steps=self.steps,
            result=result if error is None else None,
        )

    @contextmanager
    def _timed(self, kind: Any, name: str, inputs: Any) -> Iterator[Step]:
        start = time.perf_counter()
        step = self._step(kind, name, started=start, inputs=inputs)
        try:
            yield step
        except BaseException as e:
            step.error = f"{type(e).__name__}: {e}"
            raise
        finally:
            step.seconds = time.perf_counter() - start

    def _step(self, kind: Any, name: str, *, started: float, **values: Any) -> Step:
        agent = self._inventory.agent if self._inventory else None
        step = Step(kind, str(name), str(self.state), started - self._t0, agent=agent, **values)
        self.steps.append(step)
        return step
