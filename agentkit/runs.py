"""A run in progress: its state, its steps, and the gate every model and tool call passes."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, NoReturn

from agentkit import clock
from agentkit.approvals import ApprovalRequest, Approver, Decision
from agentkit.autonomy import Autonomy
from agentkit.blackboard import Blackboard, Claims
from agentkit.budget import Budget, Ledger
from agentkit.callers import caller
from agentkit.calls import Call, Kind, around, interceptors
from agentkit.control import Notice, control
from agentkit.current import CURRENT, OPEN
from agentkit.errors import BudgetExceeded, DelegationRefused, IllegalTransition, Refusal, Stopped
from agentkit.governed import call_tool
from agentkit.jsonable import jsonable
from agentkit.records import RunRecord, Step, StepKind
from agentkit.sinks import is_watched, progress
from agentkit.states import PHASES, TRANSITIONS, State
from agentkit.tool_calls import abandoned
from agentkit.tools import Inventory, Tool

REHEARSALS = ("evaluation", "chaos", "replay")  # kinds of run that concern nobody outside
MAX_STEPS = 10  # times a run may go from planning to executing
MAX_DEPTH = 4  # systems and agents that call each other, the first included
_LOOK_S = 0.05  # a model call looks for a stop this often at most, a tool call always
_STOP_POLL_S = 0.5  # a wait looks for a stop this often


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
        autonomy: Autonomy | None = None,
        stage: str = "draft",
        daily: tuple[Ledger, ...] = (),
        parent: Run | None = None,
        run_id: str | None = None,
    ) -> None:
        # That of a run called by another follows from it: a durable run that is taken up again finds its parts.
        self.run_id = run_id or (uuid.uuid4().hex if parent is None else parent.id_for(system))
        self.system, self.inputs, self.release, self.kind, self.stage = system, inputs, release, kind, stage
        self.caller = caller()
        self.state = State.IDLE
        self.parent = parent
        self.chain: tuple[str, ...] = _chain(parent, system)
        above = [one for one in (ledger, parent.ledger if parent else None) if one is not None]
        self.ledger: Ledger = Ledger(budget, *above, *daily)
        self.route: str | None = None
        self.routing: Any = None  # the router's whole prediction, for agents that combine its confidence with theirs
        self.confidence: float | None = None  # the agent's own, 0 to 1; below the policy's bar a person decides
        self.last_decision: Decision | None = None  # of the person asked last; a rejected call returns None
        self.max_steps: int = MAX_STEPS
        self.steps: list[Step] = []
        self.effects: list[dict[str, Any]] = []
        self.partial: dict[str, Any] = {}
        self.degraded: str | None = None
        self.interceptors = interceptors()
        self.claims: Claims = Claims() if parent is None else parent.claims
        self.board: Blackboard | None = None if parent is None else parent.board
        self.autonomy = autonomy or Autonomy()
        self._daily = daily
        self.approver = approver
        self.inventory: Inventory | None = None
        self._refusal: Refusal | None = None
        self.asking = threading.RLock()
        self._handing = threading.Lock()
        # How many steps were handed over without a gap, which ones beyond that, and which are not over yet.
        self._handed, self._handed_early, self._going_on = 0, set[int](), set[int]()
        self._is_begun = False
        self._is_watched = kind not in REHEARSALS and is_watched()
        self._numbers, self._children = itertools.count(), itertools.count()
        self._plans = self.failures = 0
        self._look_again = 0.0
        self._pid = os.getpid()  # whose run it is, whoever is forked inside it
        self._started_at = clock.utc()
        self._t0 = self._entered = time.perf_counter()
        self._in_state: dict[State, float] = {}

    @property
    def started_at(self) -> str:
        """When it began: UTC, ISO 8601."""
        return self._started_at.isoformat()

    # ---- states

    def to(self, target: State, reason: str) -> None:
        """Take one transition and record it.

        Raises:
            IllegalTransition: the table has no such arrow; the run stays where it is.
            BudgetExceeded: the plan has been made `max_steps` times already.
        """
        if target not in TRANSITIONS[self.state]:
            raise IllegalTransition(self.state, target)
        if self.state is State.PLANNING and target is State.EXECUTING:
            if self._plans >= self.max_steps:
                self.refuse(BudgetExceeded("plan steps", self.max_steps, self._plans, 1))
            self._plans += 1
        now = time.perf_counter()
        spent = now - self._entered
        self._in_state[self.state] = self._in_state.get(self.state, 0.0) + spent
        self._step("transition", target, started=self._entered, seconds=spent, inputs=str(self.state), outputs=reason)
        self.state, self._entered = target, now
        if target is State.AWAITING_HUMAN:
            self.hand_over()

    def degrade(self, error: Exception) -> None:
        """Go on to REFLECTING with a lesser result, because of `error`; the record says so."""
        self.degraded = f"{type(error).__name__}: {error}"
        if self.state is State.PLANNING:
            self.to(State.EXECUTING, "nothing can be planned")
        if self.state is State.EXECUTING:
            self.to(State.REFLECTING, "falls back on a lesser result")
        self.decide("recover", "a lesser result", self.degraded)

    # ---- calls

    def call(self, tool: Tool[..., Any], /, **arguments: Any) -> Any:
        """Call a tool: inventory, arguments, the tool's own check, budget, then the policy's tier, then the call.

        Returns:
            What the tool returns, or None when a person (or the lack of one) said no (see `last_decision`).

        Raises:
            Refusal: the call was not made, and the run will end.
            UsageError: the arguments do not fit the tool's schema.
            ToolFailed: the tool, and its fallback where it has one, did not do its work.
        """
        return call_tool(self, tool, arguments)

    def through(self, kind: Kind, name: str, arguments: Any, proceed: Callable[[], Any]) -> Any:
        """`proceed()` as a call of this run, within whatever stands around its calls."""
        if not self.interceptors:
            return proceed()
        return around(self.interceptors, self.next_call(kind, name, arguments), proceed)

    def next_call(self, kind: Kind, name: str, arguments: Any, tool: Tool[..., Any] | None = None) -> Call:
        """The next call of this run, numbered, with a key that a restart of the same run gives it again."""
        number = next(self._numbers)
        key = hashlib.sha256(f"{self.run_id}/{number}/{name}".encode()).hexdigest()[:32]
        given = jsonable(arguments) if self.interceptors else arguments
        return Call(kind, name, given, number, key, self.agent, self, tool)

    def model_call(self, model: str, reserved: dict[str, float], inputs: Any = None) -> AbstractContextManager[Step]:
        """Reserve, time, record and settle one model call; the caller fills tokens and usd into the step."""
        return _ModelCall(self, model, reserved, inputs)

    def id_for(self, part: str) -> str:
        """The id of the next run that this one calls; of each process that was forked inside it, another."""
        if os.getpid() != self._pid:
            return uuid.uuid4().hex
        return hashlib.sha256(f"{self.run_id}/{part}/{next(self._children)}".encode()).hexdigest()[:32]

    def skip_calls(self, count: int) -> None:
        """Number the next call `count` higher: so many were made by an earlier process."""
        for _ in range(count):
            next(self._numbers)

    def let_pass(self, seconds: float) -> None:
        """Count `seconds` that an earlier process spent in the present state."""
        self._t0 -= seconds
        self._entered -= seconds

    def decide(self, name: str, outcome: Any, reason: str) -> None:
        """Record a decision the agent's code took, with its reason."""
        self.note("decision", name, inputs=reason, outputs=jsonable(outcome))

    def doing(self) -> str:
        """What the agent is about, in two sentences for a person."""
        done = [s.name for s in self.steps if s.kind in ("tool", "decision") and s.error is None]
        asked = "; ".join(f"{name}: {value}" for name, value in self.inputs.items())
        so_far = ", ".join(dict.fromkeys(done)) or "nothing"
        return f"{self.agent or self.system} is working on {asked[:200]!r}. So far: {so_far}."

    def question(self, tool: str, arguments: Any, reason: str, key: str) -> ApprovalRequest:
        """What to ask a person about the call `key` of a tool."""
        return ApprovalRequest(
            self.run_id,
            self.agent or "",
            tool,
            jsonable(arguments),
            reason,
            system=self.system,
            release=self.release,
            doing=self.doing(),
            confidence=self.confidence,
            user=self.caller.user,
            key=key,
        )

    def tell(self, kind: str, text: str, **details: Any) -> None:
        """Tell people, through the control plane."""
        plane = control()
        if plane is not None and self.kind not in REHEARSALS:
            plane.notify(Notice(kind, self.run_id, self.system, text, details))

    def absorb(self) -> None:
        """Add what this run has done so far to its parent's record, whose totals then count it."""
        assert self.parent is not None
        later = self._t0 - self.parent._t0
        took = time.perf_counter() - self._t0
        self.parent._step("handoff", self.system, started=self._t0, seconds=took, outputs=self.run_id)
        self.parent.steps += [
            replace(
                step,
                started=step.started + later,
                agent=step.agent or self.route or self.system,
                run=step.run or self.run_id,
            )
            for step in tuple(self.steps)
            if step.kind not in ("transition", "handoff")  # those are of another state machine
        ]
        self.parent.effects += [dict(effect) for effect in self.effects]

    # ---- rules

    def heed(self, tool: str | None = None, *, at_once: bool = False) -> None:
        """Raise what forbids going on (with `tool`): an earlier refusal, a stop, a try that has been given up.

        A stop is noticed within `_LOOK_S`; before a tool, and `at_once`, without delay.
        """
        at_once = at_once or tool is not None
        if self.parent is not None:
            self.parent.heed(at_once=at_once)  # what ends the caller ends whom it called
        # Code around a call may catch everything (dspy.ReAct does); a refused run ends all the same.
        if self._refusal is not None:
            raise self._refusal
        if self.state in (State.DONE, State.FAILED):
            raise Stopped("this run is over")  # a thread it left behind
        if tool is not None and self._pid != os.getpid():
            self.refuse(
                Stopped(f"process {os.getpid()} was forked inside this run of process {self._pid}: it records nothing")
            )
        if abandoned():
            raise Stopped("the tool that wanted this has run out of time")  # the run itself goes on
        now = time.perf_counter()
        if not at_once and now < self._look_again:
            return
        self._look_again = now + _LOOK_S
        plane = control()
        if plane is not None and (why := plane.stopped(self.system, self.release, self.agent, tool)):
            self.refuse(Stopped(why))

    def sleep(self, seconds: float) -> None:
        """Wait, but not past a stop, and never past the run's time."""
        end = clock.monotonic() + seconds
        while (left := end - clock.monotonic()) > 0:
            self.reserve()
            clock.sleep(min(left, _STOP_POLL_S))

    def standing(self) -> tuple[float | None, int]:
        """The lowest confidence that it and those that called it state, and how many of their calls have failed."""
        if self.parent is None:
            return self.confidence, self.failures
        above, failures = self.parent.standing()
        stated = [c for c in (self.confidence, above) if c is not None]
        lowest = next((c for c in stated if not _is_share(c)), None)
        return (min(stated, default=None) if lowest is None else lowest), failures + self.failures

    def budget_used(self) -> float:
        """The largest used share of any limit, of the run, of whoever called it, or of the day."""
        above = 0.0 if self.parent is None else self.parent.budget_used()
        return max(above, *(ledger.share[0] for ledger in (self.ledger, *self._daily)))

    def reserve(self, **amounts: float) -> None:
        """Set amounts aside in the budget, unless something forbids going on; either refusal ends the run."""
        self.heed()
        try:
            self.ledger.reserve(**amounts)
        except Refusal as e:
            self.refuse(e)

    def refuse(self, error: Refusal) -> NoReturn:
        """End the run with `error`, whatever the code around catches."""
        self._refusal = self._refusal or error
        raise error

    # ---- running

    @contextmanager
    def acting_as(self, inventory: Inventory) -> Iterator[None]:
        """Give the code inside exactly this inventory."""
        before, self.inventory = self.inventory, inventory
        try:
            yield
        finally:
            self.inventory = before

    def carry_out(self, work: Callable[[Run], Any]) -> tuple[RunRecord, BaseException | None]:
        """Run `work` to DONE or FAILED.

        Returns:
            The record, and the exception that ended the run (None when DONE). KeyboardInterrupt and SystemExit
            end the run as FAILED, too, and are handed back for the caller to raise.
        """
        token, result, error = None, None, None
        try:
            token = CURRENT.set(self)  # within: an interrupt must not leave this run standing for all later ones
            OPEN.add(self)
            self.hand_over()
            self.heed()
            result = work(self)
            self.heed()
            self.to(State.DONE, "result is valid")
        except BaseException as e:
            # Whatever came of going on after a refusal, the refusal is why it ended.
            error = self._refusal if self._refusal is not None and isinstance(e, Exception) else e
            if self.state not in (State.DONE, State.FAILED):
                self.to(State.FAILED, f"{type(error).__name__}: {error}")
        finally:
            OPEN.discard(self)
            if token is not None:
                CURRENT.reset(token)
        return self._finish(result, error), error

    def _finish(self, result: Any, error: BaseException | None) -> RunRecord:
        models = [s for s in self.steps if s.kind == "model" and not s.cached]
        output = jsonable(result) if error is None else None
        return RunRecord(
            run_id=self.run_id,
            system=self.system,
            release=self.release,
            kind=self.kind,
            started_at=self.started_at,
            seconds=time.perf_counter() - self._t0,
            state=str(self.state),
            route=self.route,
            inputs={name: jsonable(value) for name, value in self.inputs.items()},
            output=output if output is None or isinstance(output, dict) else {"value": output},
            error=None if error is None else f"{type(error).__name__}: {error}",
            effects=self.effects,
            phases={name: self._in_state.get(state, 0.0) for state, name in PHASES.items()},
            parent=None if self.parent is None else self.parent.run_id,
            user_hash=self.caller.user_hash,
            session=self.caller.session,
            stage=self.stage,
            degraded=self.degraded,
            partial=None if error is None or not self.partial else jsonable(self.partial),
            budget_used=self.budget_used(),
            waited_s=self._in_state.get(State.AWAITING_HUMAN, 0.0),
            model_calls=len(models),
            tool_calls=sum(s.tries for s in self.steps),
            tokens_in=sum(s.tokens_in for s in models),
            tokens_out=sum(s.tokens_out for s in models),
            usd=sum(s.usd for s in models) + sum(s.usd for s in self.steps if s.kind == "tool"),
            steps=self.steps,
            result=result if error is None else None,
            pid=self._pid,
        )

    @contextmanager
    def timed(self, kind: StepKind, name: str, inputs: Any) -> Iterator[Step]:
        """Record what the code inside does as a step, with its duration and its error."""
        start = time.perf_counter()
        step = self._step(kind, name, started=start, inputs=inputs, goes_on=True)
        try:
            yield step
        except BaseException as e:
            step.error = f"{type(e).__name__}: {e}"
            raise
        finally:
            step.seconds = time.perf_counter() - start
            self._over(step)

    def note(self, kind: StepKind, name: str, **values: Any) -> Step:
        """Record a step that takes no time."""
        return self._step(kind, name, started=time.perf_counter(), **values)

    def _step(self, kind: Any, name: str, *, started: float, goes_on: bool = False, **values: Any) -> Step:
        step = Step(kind, str(name), str(self.state), started - self._t0, agent=self.agent, **values)
        if goes_on:
            self._going_on.add(id(step))
        self.steps.append(step)
        return step

    def _over(self, step: Step) -> None:
        self._going_on.discard(id(step))
        self.hand_over()

    def hand_over(self) -> None:
        """Hand what is over of this run to the sinks that keep runs as they happen: before an effect, and after each call."""
        if not self._is_watched or self._pid != os.getpid():
            return
        with self._handing:
            later = range(self._handed, len(self.steps))
            new = [
                (number, self.steps[number])
                for number in later
                if number not in self._handed_early and id(self.steps[number]) not in self._going_on
            ]
            if new or not self._is_begun:
                progress(self, new)
            self._is_begun = True
            self._handed_early.update(number for number, _ in new)
            while self._handed in self._handed_early:
                self._handed_early.remove(self._handed)
                self._handed += 1

    @property
    def agent(self) -> str | None:
        """The agent at work."""
        return self.inventory.agent if self.inventory else None


class _ModelCall:
    """`Run.model_call`; a class, since two nested generators would cost a tenth of what DSPy takes for a call."""

    __slots__ = ("_inputs", "_model", "_reserved", "_run", "_start", "_step")

    def __init__(self, run: Run, model: str, reserved: dict[str, float], inputs: Any) -> None:
        self._run, self._model, self._reserved, self._inputs = run, model, reserved, inputs

    def __enter__(self) -> Step:
        run = self._run
        run.reserve(**self._reserved)
        self._start = time.perf_counter()
        self._step = run._step(
            "model", self._model, started=self._start, inputs=self._inputs, model=self._model, goes_on=True
        )
        return self._step

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        step, run = self._step, self._run
        if error is not None:
            step.error = f"{type(error).__name__}: {error}"
        used = {"model_calls": 1, "tokens_in": step.tokens_in, "tokens_out": step.tokens_out, "usd": step.usd}
        if (error is None and not step.tokens_in) or (error is not None and _may_be_charged(error)):
            # The provider did not count (no prompt has no tokens), or counts an answer that never came: what was set aside
            # stays so.
            used = {name: 1 if name == "model_calls" else math.nan for name in used}
        run.ledger.settle(self._reserved, used)
        step.seconds = time.perf_counter() - self._start
        run._over(step)


def _may_be_charged(error: BaseException) -> bool:
    from agentkit.model_errors import may_be_charged

    return may_be_charged(error)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def _chain(parent: Run | None, system: str) -> tuple[str, ...]:
    """Who called whom, down to this run; refuses circles and too deep a line."""
    if parent is None:
        return (system,)
    line = " → ".join((*parent.chain, system))
    if system in parent.chain:
        parent.refuse(DelegationRefused(f"work goes in a circle: {line}"))
    if len(parent.chain) >= MAX_DEPTH:
        parent.refuse(DelegationRefused(f"work is handed on more than {MAX_DEPTH} deep: {line}"))
    return (*parent.chain, system)
