"""The road of a tool call: inventory, arguments, the tool's own check, budget, tier, person, tries, fallback."""

from __future__ import annotations

import copy
import time
from asyncio import CancelledError
from dataclasses import asdict
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from agentkit.approvals import Decision, decide
from agentkit.autonomy import Situation, Tier
from agentkit.breaker import CircuitOpen
from agentkit.calls import Call, around, around_attempt
from agentkit.errors import AgentkitError, PermissionDenied, PolicyRefused, Refusal, ToolFailed, ToolFault, UsageError
from agentkit.jsonable import canonical, jsonable
from agentkit.states import State
from agentkit.tool_calls import FIRST_WAIT_S, Overdue, transient, within

if TYPE_CHECKING:
    from agentkit.errors import ConflictingWrite
    from agentkit.records import Step
    from agentkit.runs import Run
    from agentkit.tools import Inventory, Tool

    AnyTool = Tool[..., Any]
Values = dict[str, Any]


def call_tool(run: Run, tool: AnyTool, arguments: Values) -> Any:
    """See `Run.call`."""
    inventory = _permit(run, tool, arguments)
    run.heed(tool.name)
    values = _fitting(run, tool, arguments)
    write = _Write(run, tool) if tool.permission != "read" else None
    share = run.budget_used() if write else 0.0  # before this call
    _check(run, tool, values, write)
    cost = {"tool_calls": 1.0, "usd": tool.cost_usd}
    run.reserve(**cost)  # held while a person is asked; the first try uses it up
    # What stands around calls sees all of them: a journal that was not told of one could not be followed again.
    if not run.interceptors and (kept := tool.line.cached(values)) is not None:
        run.ledger.settle(cost, {"tool_calls": 1.0})
        run.note("tool", tool.name, inputs=jsonable(values), outputs=jsonable(kept[0]), cached=True, tries=1)
        return kept[0]
    try:
        tier, why = _tier(run, tool, values, write, share)
        if tier is Tier.WAIT:
            decision = _ask(run, tool, values, why)
            if not decision.granted:
                run.ledger.settle(cost, {})
                return _drop(write, values)
            if decision.verdict == "modify":
                _drop(write, values)
                values = _fitting(run, tool, decision.arguments or {})
            _check(run, tool, values, write)  # again: the world may have changed while the person thought
        run.heed(tool.name)  # somebody may have stopped it meanwhile
    except BaseException:
        run.ledger.settle(cost, {})
        _drop(write, values)
        raise
    try:
        result = _make(run, tool, values)
    except ToolFailed as e:
        if e.unknown:
            run.tell("unknown", str(e), tool=tool.name, arguments=jsonable(values))
        else:
            _drop(write, values)
        if tool.fallback is None or e.unknown:
            raise
        run.decide("fallback", tool.fallback.name, str(e))
        return call_tool(run, tool.fallback, values)
    if write:
        write.done(values)
    if tier is Tier.NOTIFY:
        text = f"{inventory.agent} called {tool.name}"
        run.tell("acted", text, tool=tool.name, arguments=jsonable(values), why=why)
    return result


class _Write:
    """What a write holds while it is made: the thing it writes to, and that this very call is being made."""

    def __init__(self, run: Run, tool: AnyTool) -> None:
        if run.state not in (
            State.EXECUTING,
            State.AWAITING_HUMAN,
        ):  # the latter: another thread of the run asks a person
            raise UsageError(
                f"tool {tool.name!r} changes something outside and was called in {run.state}; call it in `execute`"
            )
        self._run, self._tool = run, tool
        self._began = False
        self._who = "/".join((*run.chain, run.agent or ""))

    def claim(self, values: Values) -> ConflictingWrite | None:
        """Claim the thing written to; the error if it is another agent's."""
        thing = self._tool.writes_to
        return None if thing is None else self._run.claims.take(thing, values.get(thing), self._who)

    def is_new(self, values: Values) -> bool:
        """Whether this run and those around it make this call for the first time; from now on it counts as made."""
        self._began = self._run.claims.begin(self._tool.name, canonical(values))
        return self._began

    def done(self, values: Values) -> None:
        """It was made."""
        if self._tool.writes_to is not None:
            self._run.claims.keep(self._tool.writes_to, values.get(self._tool.writes_to))

    def undo(self, values: Values) -> None:
        """It was not made."""
        if self._began:  # else it is somebody else's
            self._run.claims.undo(self._tool.name, canonical(values))
        if self._tool.writes_to is not None:
            self._run.claims.give_back(self._tool.writes_to, values.get(self._tool.writes_to), self._who)


def _drop(write: _Write | None, values: Values) -> None:
    if write is not None:
        write.undo(values)


def _permit(run: Run, tool: AnyTool, arguments: Values) -> Inventory:
    inventory = run.inventory
    if inventory is None or not inventory.permits(tool):
        agent, names = (inventory.agent, [t.name for t in inventory.tools]) if inventory else ("(none)", [])
        _deny(run, tool, arguments, PermissionDenied(agent, tool.name, names))
    return inventory


def _fitting(run: Run, tool: AnyTool, arguments: Values) -> Values:
    try:
        return tool.validate(arguments)
    except UsageError as e:
        run.note("tool", tool.name, inputs=jsonable(arguments), error=str(e))
        raise


def _check(run: Run, tool: AnyTool, values: Values, write: _Write | None) -> None:
    """The tool's own rule, and nobody else of this run at work on the same thing."""
    if tool.check is not None:
        # A copy: a rule looks at a call, it does not change it.
        reason = tool.check(MappingProxyType(copy.deepcopy(values)), run.caller.user)
        if reason is not None:
            _deny(run, tool, values, PolicyRefused(tool.name, reason))
    if write is not None and (conflict := write.claim(values)) is not None:
        _deny(run, tool, values, conflict)


def _deny(run: Run, tool: AnyTool, arguments: Values, error: Refusal) -> NoReturn:
    run.note("tool", tool.name, inputs=jsonable(arguments), error=str(error))
    run.refuse(error)


def _tier(run: Run, tool: AnyTool, values: Values, write: _Write | None, share: float) -> tuple[Tier, str]:
    """The tier, and why. What it was stays what it was when a durable run is taken up again."""
    changes = write is not None
    repeated = write is not None and not write.is_new(values) and not tool.idempotent
    confidence, failures = run.standing()

    def decide_now() -> list[Any]:
        tier, why = run.autonomy.decide(
            Situation(
                permission=tool.permission,
                criticality=tool.criticality,
                production=run.stage == "production",
                confidence=confidence,
                failures=failures,
                budget_used=share,
                over=tool.human_needed(values) if changes else None,
                repeated=repeated,
            )
        )
        return [int(tier), "; ".join(why)]

    if not changes:
        tier, why = decide_now()
        return Tier(tier), why
    tier, why = run.through("tier", tool.name, values, decide_now)
    run.decide(f"tier of {tool.name}", tier, why)
    return Tier(tier), why


def _ask(run: Run, tool: AnyTool, values: Values, reason: str) -> Decision:
    call = run.next_call("approval", tool.name, values, tool)
    request = run.question(tool.name, values, reason, call.key)
    with run.asking:  # one state machine: a second thread's question waits for the first's answer
        run.to(State.AWAITING_HUMAN, reason)
        began = time.perf_counter()
        try:
            with run.timed("approval", tool.name, inputs=jsonable(values)) as step:
                answer = around(run.interceptors, call, lambda: asdict(decide(run.approver, request)))
                decision = Decision(**answer)
                run.last_decision = decision
                step.decided_by = decision.by or None
                step.outputs = {name: value for name, value in answer.items() if value not in (None, "")}
        except Refusal as e:  # stopped meanwhile
            run.refuse(e)
        except Exception as e:
            run.to(State.EXECUTING, f"nobody could be asked: {type(e).__name__}: {e}")
            raise
        run.ledger.excuse(time.perf_counter() - began)  # a person's time is not the agent's
        run.to(State.EXECUTING, _in_words(decision))
    return decision


def _in_words(decision: Decision) -> str:
    word = {"approve": "approved", "modify": "approved with changes", "reject": "rejected"}[decision.verdict]
    by = f" by {decision.by}" if decision.by else ""
    return f"{word}{by}" + (f": {decision.reason}" if decision.reason else "")


def _make(run: Run, tool: AnyTool, values: Values) -> Any:
    """Make the call, within whatever stands around it."""
    call = run.next_call("tool", tool.name, values, tool)
    effect: Values | None = None
    if tool.permission != "read":
        # Noted before it happens: an effect that fails half-way has still to be looked at.
        effect = {"tool": tool.name, "arguments": jsonable(values), "outcome": "unknown"}
        run.effects.append(effect)
        run.hand_over()  # what led to it is kept before it happens
    with run.timed("tool", tool.name, inputs=jsonable(values)) as step:
        try:
            if run.interceptors:
                found = around(run.interceptors, call, lambda: jsonable(_tries(run, tool, call, values, step)))
                result = tool.validate_result(found)
            else:
                result = _tries(run, tool, call, values, step)
        except ToolFailed as e:
            run.failures += 1
            if effect is not None and not e.unknown:
                effect["outcome"] = "failed"
            raise
        except Refusal as e:
            if effect is not None and isinstance(e, PolicyRefused):  # by the tool itself, which sent nothing
                effect["outcome"] = "failed"
            run.refuse(e)
        step.outputs = jsonable(result)
    if effect is not None:
        effect["outcome"] = "done"
    tool.line.keep(values, result)
    return result


def _tries(run: Run, tool: AnyTool, call: Call, values: Values, step: Step) -> Any:
    """Try until it works, as often as the tool may be tried; only what may be repeated is."""
    most = tool.tries if tool.idempotent else 1
    for tried in range(1, most + 1):
        try:
            attempt = partial(_try, run, tool, call, values, step, first=tried == 1)
            return tool.line.breaker.call(attempt, counts=_is_fault)
        except CircuitOpen as e:
            raise ToolFailed(tool.name, "circuit open", str(e), attempts=tried) from e
        except Exception as e:
            wait = FIRST_WAIT_S * 2 ** (tried - 1)
            again = transient(e) or (isinstance(e, ToolFailed) and e.fault == "malformed")
            if not again or tried == most or wait >= run.ledger.seconds_left:
                if isinstance(e, AgentkitError) and not isinstance(e, UsageError):
                    raise
                raise _failed(tool, e, tried) from e
            run.decide("retry", tool.name, f"{type(e).__name__}: {e}; next try in {wait:g} s")
            run.sleep(wait)
    raise AssertionError("unreachable")


def _failed(tool: AnyTool, error: Exception, tried: int) -> ToolFailed:
    fault: ToolFault = "timeout" if isinstance(error, Overdue | TimeoutError) else "error"
    unknown = tool.permission != "read" and transient(error)
    return ToolFailed(tool.name, fault, f"{type(error).__name__}: {error}", attempts=tried, unknown=unknown)


def _is_fault(error: BaseException) -> bool:
    """Whether an error says that the tool is in trouble, and not that it was asked for the wrong thing or stopped."""
    return transient(error) or (isinstance(error, ToolFailed) and error.fault == "malformed")


def _try(run: Run, tool: AnyTool, call: Call, values: Values, step: Step, *, first: bool) -> Any:
    if tool.line.rate is not None and (wait := tool.line.rate.wait_s()):
        run.sleep(wait)
    run.heed(tool.name)
    if not first:
        run.reserve(tool_calls=1.0, usd=tool.cost_usd)
    step.tries, step.usd = step.tries + 1, step.usd + tool.cost_usd

    def work() -> Any:
        try:
            return around_attempt(run.interceptors, call, lambda: tool.invoke(values, key=call.key))
        except (SystemExit, CancelledError) as e:  # a tool ends its own work, not the run's process
            raise RuntimeError(f"{type(e).__name__}: {e}") from e

    left = run.ledger.seconds_left
    if tool.timeout_s is None:
        return tool.validate_result(work())
    try:
        return tool.validate_result(within(min(tool.timeout_s, left), work))
    except Overdue:
        if left < tool.timeout_s:
            run.reserve()  # raises: the run's own time is up, which is a refusal
        raise
