"""What can run durably: plain functions under a name, systems under a name, and releases by their id."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from agentkit import clock
from agentkit.approvals import Approver
from agentkit.autonomy import Autonomy
from agentkit.budget import Budget, Ledger
from agentkit.callers import acting_for, caller
from agentkit.errors import ReleaseError, SourceError, UsageError
from agentkit.jsonable import jsonable
from agentkit.records import RunRecord
from agentkit.runs import Run

if TYPE_CHECKING:
    from agentkit.systems import System

P = ParamSpec("P")
R = TypeVar("R")
AtEnd = Callable[[], None]  # called when the work is done; raises where a journal has more
RELEASES = "releases"  # the kind of work that any process can do that reaches the registry


@dataclass(frozen=True)
class Order:
    """What a durable run was started with, kept for as long as it takes; JSON-able.

    `work` is the name of the registered work, or None where `release` is run; `at` is UTC, ISO 8601.
    """

    work: str | None
    system: str
    release: str | None
    stage: str
    inputs: dict[str, Any]
    kind: str = "run"
    user: str | None = None
    session: str | None = None
    at: str = field(default_factory=lambda: clock.utc().isoformat())

    @property
    def worker(self) -> str:
        """Which processes can do it: those that have registered the work, or all."""
        return self.work or RELEASES


@dataclass(frozen=True)
class Plain:
    """A function that takes a run through its states itself: `function(run, **inputs)`."""

    name: str
    function: Callable[..., Any]
    budget: Budget
    autonomy: Autonomy | None

    def carry_out(
        self, order: Order, run_id: str, approver: Approver | None, day: Day, at_end: AtEnd
    ) -> tuple[RunRecord, BaseException | None]:
        """From IDLE to the record, and what ended the run."""
        run = Run(
            order.system,
            order.inputs,
            budget=self.budget,
            kind=order.kind,
            approver=approver,
            autonomy=self.autonomy,
            stage=order.stage,
            daily=(day,),
            run_id=run_id,
        )

        def work(run: Run) -> Any:
            found = self.function(run, **order.inputs)
            at_end()
            return found

        return run.carry_out(work)


@dataclass(frozen=True)
class Whole:
    """A system: a release, or a live one under its name."""

    system: System

    def carry_out(
        self, order: Order, run_id: str, approver: Approver | None, day: Day, at_end: AtEnd
    ) -> tuple[RunRecord, BaseException | None]:
        """As `System.run` does it, under the run id that is kept; the record is not emitted."""
        from agentkit.systems import approve_with

        system = self.system
        day.add(*system.ledgers_of_the_day(order.kind))
        run = system.open_run(
            order.inputs, kind=order.kind, approver=approver, stage=order.stage, daily=(day,), run_id=run_id
        )

        def work(run: Run) -> Any:
            system.check_inputs(order.inputs)
            found = system.work(run, order.inputs)
            at_end()
            return found

        # Systems that agents of this one call ask the same person.
        asking = approve_with(approver) if approver is not None else nullcontext()
        with asking, system.in_charge(run):
            return run.carry_out(work)


class Day(Ledger):
    """Stands between a run and the day's ledgers, which are shared and kept: what a journal gives back was charged to the
    day when it was done, and is passed on only from `caught_up` on.
    """

    def __init__(self) -> None:
        super().__init__(Budget.unlimited())
        self._ledgers: tuple[Ledger, ...] = ()
        self._is_live = False

    def add(self, *ledgers: Ledger) -> None:
        """Ledgers of the day to charge."""
        self._ledgers += ledgers
        if self._is_live:
            self._parents = self._ledgers

    def caught_up(self) -> None:
        """From now on everything is new."""
        self._is_live, self._parents = True, self._ledgers

    @property
    def share(self) -> tuple[float, str]:
        """The largest used share of any limit of the day."""
        return max((ledger.share for ledger in self._ledgers), default=(0.0, ""))

    @property
    def seconds_left(self) -> float:
        """Infinite: a day has no wall-time limit for one call."""
        return math.inf


_works: dict[str, Plain | Whole] = {}


def work(
    name: str, *, budget: Budget | None = None, autonomy: Autonomy | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make `function(run, **inputs)` durable work under a name, by which every process finds it again.

    The function takes the run through its states (`run.to`) and gives it its tools (`run.acting_as`). It is executed again
    from the top when a run is taken up: it may decide by its inputs and by what calls return, not by time or chance.

    Raises:
        UsageError: the name is taken.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        _register(name, Plain(name, function, budget or Budget(), autonomy))
        return function

    return register


def offer(system: System) -> System:
    """Make a live system durable work under its own name: for drafts, where a release is the better choice.

    Raises:
        UsageError: the name is taken.
    """
    _register(system.name, Whole(system))
    return system


def _register(name: str, found: Plain | Whole) -> None:
    if name == RELEASES or "/" in name:
        raise UsageError(f"work cannot be called {name!r}; choose another name, without '/'")
    if name in _works:
        raise UsageError(f"there is durable work called {name!r} already")
    _works[name] = found


def forget(name: str) -> None:
    """Take work out again; for tests."""
    _works.pop(name, None)


def workers() -> tuple[str, ...]:
    """The kinds of work this process can do."""
    return (*_works, RELEASES)


def order_of(what: Any, inputs: dict[str, Any], kind: str = "run") -> Order:
    """What is asked for: the name of work, a function or system registered as work, a release or a reference to one.

    A reference is resolved now: a run keeps the release it was started with.

    Raises:
        UsageError: it is none of these; ReleaseError: nothing is registered under the reference.
    """
    acting = caller()
    kept = {name: jsonable(value) for name, value in inputs.items()}
    name = _registered_name(what)
    if name is not None:
        return Order(name, name, None, "draft", kept, kind, acting.user, acting.session)
    release = getattr(what, "release", None)
    if isinstance(release, str):
        return Order(None, what.name, release, what.stage, kept, kind, acting.user, acting.session)
    if not isinstance(what, str):
        raise UsageError(
            f"{what!r} cannot run durably: no other process could find it again. Register a release of it, or make it "
            "known by name (`durable.work`, `durable.offer`)"
        )
    from agentkit_tracking import loading
    from agentkit_tracking.rules import is_production

    version = loading.resolve(what)
    stage = "production" if is_production(what.partition("@")[2]) else "draft"
    return Order(None, version.name, version.release_id, stage, kept, kind, acting.user, acting.session)


def _registered_name(what: Any) -> str | None:
    if isinstance(what, str):
        return what if what in _works else None
    return next(
        (n for n, w in _works.items() if what in (getattr(w, "function", None), getattr(w, "system", None))), None
    )


def carry_out(
    order: Order, run_id: str, approver: Approver | None, day: Day, at_end: AtEnd
) -> tuple[RunRecord, BaseException | None]:
    """Do what was ordered. What can never be done ends as a FAILED record.

    Raises:
        Exception: the release cannot be had just now; another time it may.
    """
    acting = acting_for(order.user, order.session) if order.user is not None else nullcontext()
    with acting:
        try:
            found = _works[order.work] if order.work is not None else Whole(_load(order))
        except (ReleaseError, SourceError) as e:
            error = e  # not to be had, ever

            def fail(run: Run) -> None:
                raise error

            run = Run(
                order.system,
                order.inputs,
                budget=Budget(),
                release=order.release,
                kind=order.kind,
                stage=order.stage,
                run_id=run_id,
            )
            return run.carry_out(fail)
        return found.carry_out(order, run_id, approver, day, at_end)


def _load(order: Order) -> System:
    """Exactly the release the run was started with, also when another is in production by now."""
    from agentkit_tracking import loading, registry

    assert order.release is not None
    version = registry.resolve(order.release)
    system = loading.load_folder(*loading.fetch_promoted(version))
    if system.release != order.release:
        raise ReleaseError(f"the run was started with release {order.release}, and {system.release} was found")
    system.stage = order.stage
    return system
