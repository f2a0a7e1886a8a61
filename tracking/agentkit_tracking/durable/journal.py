"""The journal of a durable run: each call is one checkpoint; a run that is taken up again is given back what it had done.

DBOS repeats the step that was interrupted. A write must not be repeated blindly, so each has an intent and a result: the
intent is the checkpoint of the decision that lets the call be made (its tier, or a person's approval), the result that of the
call. An intent without a result is an effect in doubt: an idempotent tool is called again with the same key, of any other
a person says what became of it. A row of its own for the intent would tell the same and cost a third commit per write.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import asdict
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from dbos import DBOS

from agentkit.approvals import Decision, decide
from agentkit.calls import Call
from agentkit.errors import Refusal, ToolFailed
from agentkit.jsonable import canonical, jsonable
from agentkit.records import RunRecord, Step
from agentkit.states import State
from agentkit.threads import begin
from agentkit_tracking.control.database import ControlError
from agentkit_tracking.durable.entries import Entry, packed, raise_again, step_of, storable, used_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agentkit.runs import Run

T = TypeVar("T")
RECORD = "record"  # the name of the last checkpoint
IN_DOUBT = (
    "it was interrupted, and whether it took effect is unknown. Look; then approve: it did not happen, do it now; "
    "modify `result`: it did happen, and this is what it returned; reject: leave it as it is"
)
_LOOK_S = 0.1  # how often a wait for a person looks whether this process is to end


class Suspended(BaseException):
    """This process lets go of the run, which stays as it is for whoever takes it up next; no agent's code catches it."""


class ReplayDiffers(Refusal):
    """A run was taken up by code that makes other calls than the journal holds.

    `recorded` and `found` name the call in the journal and the one the code makes in its place.
    """

    def __init__(self, recorded: str, found: str) -> None:
        super().__init__(
            f"the run cannot be taken up again: its journal has {recorded!r} where the code makes {found!r}. The code has "
            "changed since, or decides by something that is no call of the run (the time, chance, threads); start it anew"
        )
        self.recorded, self.found = recorded, found


class _Open:
    """The checkpoint being made: how many calls its own run has made inside it."""

    def __init__(self, run: Run | None) -> None:
        self.run, self.calls = run, 0


_open: ContextVar[_Open | None] = ContextVar("agentkit_checkpoint", default=None)


class Journal:
    """Makes every call of one run, and of the runs it calls, a checkpoint; an `agentkit.calls.Interceptor`.

    Calls are known again by their order: a durable run makes one at a time, or begins them in the same order each time.

    Args:
        recorded: names of the checkpoints that are there, in order. To be built inside the workflow.
        closing: set when this process is to end.
        caught_up: called once, when nothing recorded is left.
    """

    def __init__(self, recorded: Sequence[str], closing: threading.Event, caught_up: Callable[[], None]) -> None:
        self._recorded = deque(recorded)
        self._read = 0  # how many of the recorded checkpoints were given back
        self.unread: int | None = None  # the place of the first that the run has ended without
        self._closing, self._caught_up = closing, caught_up
        # Whether the next thing done may have been done before: not once a checkpoint was made by this process.
        self.may_repeat = bool(recorded)
        self._workflow = copy_context()  # DBOS knows its workflow by a context variable; DSPy's threads have none
        self._turn = threading.Lock()
        self._ended: BaseException | None = None
        self._took: list[tuple[Step, float]] = []
        self._renamed: set[str] = set()  # runs whose id is not what it was, nor then the keys of their calls
        if not recorded:
            caught_up()

    # ---- checkpoints

    def step(self, name: str, work: Callable[[], Entry], run: Run | None = None) -> tuple[Entry, bool]:
        """The result of `work`, JSON-able, and whether it was done now; `work` raises no `Exception`.

        Raises:
            ReplayDiffers: the journal has another checkpoint in this place.
            Suspended: the process is to end, or the database does not take the checkpoint.
        """
        context, live = copy_context(), False

        def make() -> Entry:
            nonlocal live
            live = True
            context.run(_open.set, _Open(run))
            return context.run(work)

        if self._closing.is_set():
            self._ended = self._ended or Suspended("this process is to end")
        if self._ended is not None:
            raise self._ended
        with self._turn:
            self._match(name)
            place = self._workflow.copy().run(DBOS.reserve_step)
        try:
            entry: Entry = self._workflow.copy().run(lambda: place.run({"name": name}, make))
        except Exception as e:  # of the database: what was done could not be noted, so nothing more may be done
            self._ended = Suspended(f"the journal cannot be written: {e}")
            raise self._ended from e
        except BaseException as e:  # DBOS's own: another process has taken the run over, or it was cancelled
            self._ended = e
            raise
        if live:
            self.may_repeat = False
        elif not self._recorded:
            self._caught_up()
        return entry, live

    def _match(self, name: str) -> None:
        if not self._recorded:
            return
        expected = self._recorded[0]
        if expected != name:
            self._part(expected, name)
        self._recorded.popleft()
        self._read += 1

    def _part(self, recorded: str, found: str) -> NoReturn:
        """The journal is of no more use: the code makes another call than it holds."""
        self._burn()
        raise ReplayDiffers(recorded, found)

    def _burn(self) -> None:
        """Leave what is recorded as it is; what is done from now on (the record of the failed run) comes after it."""
        if self.unread is None:
            self.unread = self._read
        for _ in self._recorded:
            self._workflow.copy().run(DBOS.reserve_step)
        self._recorded.clear()

    # ---- calls

    def call(self, call: Call, proceed: Callable[[], Any]) -> Any:
        """The call as a checkpoint, or what the journal has of it."""
        if (outer := _open.get()) is not None:
            return self._inside(outer, call, proceed)
        if self._ended is not None:
            raise self._ended
        try:
            answer = self._doubt(call)
            raised: list[BaseException] = []
            entry, live = self.step(_name(call), lambda: self._made(call, proceed, answer, raised), call.run)
            if entry["call"] != _digest(call):
                self.unread = self._read - 1
                self._part(_name(call), f"{_name(call)} with other arguments")
        except ReplayDiffers as e:
            call.run.refuse(e)
        if raised:
            raise raised[0]
        if not live:
            self._give_back(call, entry)
        if "raised" in entry:
            raise_again(call.run, entry["raised"])
        return entry["result"]

    def attempt(self, call: Call, proceed: Callable[[], Any]) -> Any:
        """The attempt; the whole call is what is kept."""
        return proceed()

    def at_end(self) -> None:
        """To be called where the work is done.

        Raises:
            ReplayDiffers: the journal has more calls.
        """
        if self._recorded and self._recorded[0] != RECORD:
            raise ReplayDiffers(self._recorded[0], "the end of the run")

    def finish(self) -> None:
        """Put the durations of calls that were given back into their steps. Raises what ended the journal, if anything."""
        for step, seconds in self._took:
            step.seconds += seconds
        if self._ended is not None:
            raise self._ended
        if self._recorded and self._recorded[0] != RECORD:  # the run failed where it did not before
            self._burn()

    def _made(
        self, call: Call, proceed: Callable[[], Any], answer: Decision | None, raised: list[BaseException]
    ) -> Entry:
        """Make the call; what it returned or raised, and what it did to the run."""
        run, began = call.run, time.perf_counter()
        steps, used, failures = len(run.steps), run.ledger.used, run.failures
        entry: Entry = {"call": _digest(call), "key": call.key}
        if call.kind in ("tier", "approval"):
            entry["intent"] = {"tool": call.name, "arguments": call.arguments}
        is_write = call.kind == "tool" and call.tool is not None and call.tool.permission != "read"
        if is_write and self.may_repeat and answer is None:
            run.decide("repeat", call.name, "it was interrupted, and is called again with the same key")
        try:
            entry["result"] = self._result(call, proceed, answer)
        except (Exception, SystemExit) as e:
            raised.append(e)
            entry["raised"] = packed(e)
        inside = _open.get()
        now = run.ledger.used
        entry |= {
            "steps": [jsonable(asdict(step)) for step in run.steps[steps:]],
            "used": {name: now[name] - used[name] for name in used if name != "seconds" and now[name] != used[name]},
            "failures": run.failures - failures,
            "calls": inside.calls if inside else 0,
            "seconds": time.perf_counter() - began,
        }
        return storable(entry)

    def _result(self, call: Call, proceed: Callable[[], Any], answer: Decision | None) -> Any:
        if call.kind == "approval":
            return self._waiting(proceed)
        if answer is None or answer.verdict == "approve":
            return proceed()
        if answer.verdict == "modify":
            return (answer.arguments or {}).get("result")
        said = f": {answer.reason}" if answer.reason else ""
        raise ToolFailed(call.name, "error", f"it was interrupted and is not repeated{said}", unknown=True)

    def _give_back(self, call: Call, entry: Entry) -> None:
        """Leave the run as the call left it: steps, budget, numbers of calls, time."""
        run, seconds = call.run, entry["seconds"]
        if entry["key"] != call.key:
            self._renamed.add(run.run_id)
        around = next((s for s in reversed(run.steps) if (s.kind, s.name) == (call.kind, call.name)), None)
        if around is not None and call.kind in ("tool", "approval"):
            self._took.append((around, seconds))
            if call.tool is not None and call.kind == "tool":  # the first try is reserved, and charged, outside of this
                inside = sum(step["tries"] for step in entry["steps"])  # of calls that the tool made itself
                around.tries = 1 + int(used_in(entry).get("tool_calls", 0)) - inside
                around.usd = call.tool.cost_usd * around.tries
        _let_pass(run, seconds)
        if call.kind != "approval":
            run.ledger.excuse(-seconds)
        run.steps += [step_of(step) for step in entry["steps"]]
        run.ledger.settle({}, used_in(entry))
        run.failures += entry["failures"]
        run.skip_calls(entry["calls"])

    def keep(self, record: RunRecord, emit: Callable[[], Entry]) -> None:
        """Hand over the record of a run that this one called, once; one called by a tool is part of its checkpoint."""
        if _open.get() is not None:
            emit()
        elif self._ended is None:
            self.step(f"record of {record.system}", emit)

    # ---- effects in doubt

    def _inside(self, outer: _Open, call: Call, proceed: Callable[[], Any]) -> Any:
        """A call made by a tool while it is itself called: part of the tool's checkpoint."""
        if outer.run is call.run:
            outer.calls += 1
        if self.may_repeat and self._is_unrepeatable(call):
            failed = ToolFailed(call.name, "error", "the tool that calls it was interrupted", unknown=True)
            call.run.tell("unknown", str(failed), tool=call.name, arguments=call.arguments)
            raise failed
        return proceed()

    def _doubt(self, call: Call) -> Decision | None:
        """What a person says of a write that may have happened already; None where there is no doubt.

        Several times, if the call that a person asked for is interrupted in its turn.
        """
        answer: Decision | None = None
        if not self._is_unrepeatable(call):
            return None
        for asked in count():
            name = f"{_name(call)}, in doubt"
            is_answered = bool(self._recorded) and self._recorded[0] == name
            if not is_answered and (self._recorded or not self.may_repeat):
                break
            with self._asking(call) as step:
                found, live = self.step(name, partial(self._asked, call, f"{call.key}.{asked}"))
                if not live:
                    self._took.append((step, found["seconds"]))
                    _let_pass(call.run, found["seconds"])
                if "raised" in found:
                    raise_again(call.run, found["raised"])
                answer = Decision(**found["result"])
                step.decided_by = answer.by or None
                step.outputs = {n: value for n, value in found["result"].items() if value not in (None, "")}
        return answer

    def _is_unrepeatable(self, call: Call) -> bool:
        if call.kind != "tool" or call.tool is None:
            return False
        return not call.tool.idempotent or (call.tool.permission != "read" and call.run.run_id in self._renamed)

    @contextmanager
    def _asking(self, call: Call) -> Iterator[Step]:
        run, began = call.run, time.perf_counter()
        with run.asking:
            waits = run.state is State.EXECUTING
            if waits:
                run.to(State.AWAITING_HUMAN, "whether a call took effect is unknown")
            with run.timed("approval", call.name, inputs=call.arguments) as step:
                yield step
            run.ledger.excuse(time.perf_counter() - began)
            if waits:
                run.to(State.EXECUTING, "a person has looked")

    def _asked(self, call: Call, key: str) -> Entry:
        run, began = call.run, time.perf_counter()
        run.tell("unknown", f"{call.name}: {IN_DOUBT}", tool=call.name, arguments=call.arguments, key=call.key)
        request = run.question(call.name, {"call": call.arguments, "result": None}, IN_DOUBT, key)
        entry: Entry = {}
        try:
            entry["result"] = self._waiting(lambda: asdict(decide(run.approver, request)))
        except Exception as e:  # a stop, say
            entry["raised"] = packed(e)
        return storable({**entry, "seconds": time.perf_counter() - began})

    def _waiting(self, work: Callable[[], T]) -> T:
        """`work()`, which may take days, on a thread that does not keep the process from ending.

        Raises:
            Suspended: the process is to end, or nobody can be asked now; the same will be asked again.
        """
        done = begin(work, "agentkit-approval")
        while not futures.wait([done], _LOOK_S).done:
            if self._closing.is_set():
                raise Suspended("this process is to end")
        try:
            return done.result()
        except (ControlError, OSError) as e:
            raise Suspended(f"nobody can be asked now: {e}") from e


def _let_pass(run: Run | None, seconds: float) -> None:
    """Put the beginning of the run, and of those that called it, and of the states they are in so much earlier."""
    while run is not None:
        run.let_pass(seconds)
        run = run.parent


def _name(call: Call) -> str:
    return f"{call.run.system}/{call.number} {call.kind} {call.name}"


def _digest(call: Call) -> str:
    return hashlib.sha256(canonical(call.arguments)).hexdigest()
