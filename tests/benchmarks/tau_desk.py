"""What the desks of the replay share: records in memory, tools with the rules of a policy, and one agent that calls."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import orjson
import polars as pl
from pydantic import BaseModel

import agentkit as ak
from agentkit.errors import PermissionDenied, Refusal, ToolFailed, UsageError
from agentkit.tools import ToolOptions

Record = dict[str, Any]
Values = Mapping[str, Any]
Breach = tuple[str, str]  # the paragraph of the policy, and in words what about the call is against it
Breaches = Iterator[Breach]
Kind = Literal["done", "refused", "denied", "misfit", "rejected", "tool error", "not reached"]


# ---- records


class Store:
    """Tables of JSON records. A record is read from its text on first use, so a reset costs nothing."""

    def __init__(self, texts: Mapping[str, Mapping[str, str]]) -> None:
        self._texts = texts
        self._live: dict[str, dict[str, Record]] = {}
        self.reset()

    def reset(self) -> None:
        """Back to what the files say."""
        self._live = {table: {} for table in self._texts}

    def get(self, table: str, key: Any) -> Record | None:
        """The live record, or None where there is none."""
        live = self._live[table]
        if key not in live:
            if not isinstance(key, str) or key not in self._texts[table]:
                return None
            live[key] = orjson.loads(self._texts[table][key])
        return live[key]

    def put(self, table: str, key: str, record: Record) -> None:
        self._live[table][key] = record

    @property
    def tables(self) -> frozenset[str]:
        """Names of the tables."""
        return frozenset(self._texts)

    def keys(self, table: str) -> list[str]:
        return [*self._texts[table], *(k for k in self._live[table] if k not in self._texts[table])]

    @cached_property
    def _as_filed(self) -> dict[tuple[str, str], bytes]:
        return {}

    def _filed(self, table: str, key: str) -> bytes | None:
        if (table, key) not in self._as_filed:
            text = self._texts[table].get(key)
            self._as_filed[table, key] = b"" if text is None else _canonical(orjson.loads(text))
        return self._as_filed[table, key]

    def snapshot(self) -> dict[str, dict[str, Record]]:
        """The state now, for `restore`."""
        return copy.deepcopy(self._live)

    def restore(self, snapshot: Mapping[str, Mapping[str, Record]]) -> None:
        """Back to a snapshot, which stays as it is."""
        self._live = copy.deepcopy({table: dict(rows) for table, rows in snapshot.items()})

    def digest(self) -> str:
        """A hash of everything that differs from the files: equal digests mean equal databases."""
        found = hashlib.sha256()
        for table in sorted(self._live):
            for key in sorted(self._live[table]):
                if (now := _canonical(self._live[table][key])) != self._filed(table, key):
                    found.update(f"{table}/{key}:".encode() + now)
        return found.hexdigest()


def _canonical(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def texts_of(*files: Path) -> dict[str, dict[str, str]]:
    """Tables from files of (id, record) rows; `retail_users.parquet` is the table `users`."""
    frames = {file.stem.split("_")[-1]: pl.read_parquet(file) for file in files}
    return {name: dict(zip(frame["id"], frame["record"], strict=True)) for name, frame in frames.items()}


# ---- tools


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema in which every object takes only its named properties, those inside lists as well."""
    found = {key: closed(value) if isinstance(value, dict) else value for key, value in schema.items()}
    if schema.get("type") == "object":
        found.setdefault("additionalProperties", False)
    return found


class Desk:
    """The tools of one policy over one store. A subclass writes the tool functions and, as `check_<tool>`, the rules.

    A rule yields the paragraph of the policy with what is against it. Tool functions refuse only what the service
    behind them would (an unknown id, a sum that does not add up): that is the tool's error, and the agent may mend it.
    """

    name: ClassVar[str]
    options: ClassVar[dict[str, ToolOptions]]  # of the tools that are not plain reads
    owner_of: ClassVar[dict[str, tuple[str, str]]] = {}  # argument that names a record: its table, the owner's field

    def __init__(self, store: Store, schemas: Sequence[dict[str, Any]]) -> None:
        self.store = store
        functions = [s["function"] for s in schemas]
        self.tools = {f["name"]: self._tool(f, governed=True) for f in functions}
        bare = {f["name"]: self._tool(f, governed=False) for f in functions}
        self.system = _system(self.name, self.tools.values())
        self.reader = _system(f"{self.name}_reader", [t for t in self.tools.values() if t.permission == "read"])
        self.reader.agents["clerk"].known = tuple(self.tools.values())  # it tries what it may not
        self.bare = _system(f"{self.name}_bare", bare.values())

    def _tool(self, function: dict[str, Any], *, governed: bool) -> ak.Tool[..., Any]:
        name = function["name"]
        options: ToolOptions = {"timeout_s": None, "tries": 1}  # in memory: no try of a call can hang
        if governed:
            options |= self.options_of(name)
            if rules := self.rules_of(name):
                options["check"] = _first_breach(name, rules)
        schema = closed(function["parameters"])
        return ak.Tool.from_schema(name, function["description"], schema, self.function_of(name), **options)

    def function_of(self, name: str) -> Callable[..., Any]:
        """What a tool does."""
        function: Callable[..., Any] = getattr(self, name)
        return function

    def rules_of(self, name: str) -> Callable[[Values, str | None], Breaches] | None:
        """The rules of a tool, or None."""
        return getattr(self, f"check_{name}", None)

    def options_of(self, name: str) -> ToolOptions:
        """Permission, criticality and so on; a plain read has none."""
        return self.options.get(name, {})

    def writes(self) -> list[str]:
        """Names of the tools that change something."""
        return [name for name, tool in self.tools.items() if tool.permission != "read"]


def _first_breach(
    name: str, rules: Callable[[Values, str | None], Breaches]
) -> Callable[[Values, str | None], str | None]:
    """The rules as the `check` of a tool."""

    def check(values: Values, user: str | None) -> str | None:
        return next((f"{reason} [{paragraph}]" for paragraph, reason in rules(values, user)), None)

    check.__name__ = f"check_{name}"  # a release names it
    return check


# ---- calls and what became of them


@dataclass(frozen=True)
class Asked:
    """A call as somebody wants it made; `confirmed`: the user has said yes to it."""

    name: str
    values: dict[str, Any]
    confirmed: bool = True


@dataclass
class Outcome:
    """What became of a call; `tier` is None where the call did not get as far as the policy of tiers."""

    call: Asked
    kind: Kind = "not reached"
    result: Any = None
    reason: str = ""
    tier: int | None = None
    people: int = 0  # times somebody was asked

    @property
    def stopped(self) -> bool:
        """Whether agentkit stopped it, rather than the tool itself."""
        return self.kind in ("refused", "denied", "misfit", "rejected")


class Made(BaseModel):
    """How many of the calls were gone through."""

    calls: int


class Clerk(ak.Agent):
    """Makes the calls it is given, in order; the failures of tools do not stop it, refusals do."""

    name, result = "clerk", Made

    def plan(self, run: ak.Run, outcomes: Any) -> Any:
        return outcomes.value

    def execute(self, run: ak.Run, plan: list[Outcome], outcomes: Any) -> int:
        for outcome in plan:
            _make(run, {t.name: t for t in self.known}, outcome)
        return len(plan)

    def reflect(self, run: ak.Run, plan: Any, facts: int, outcomes: Any) -> Made:
        return Made(calls=facts)

    known: tuple[ak.Tool[..., Any], ...] = ()  # what it tries to call, its inventory or not


def _system(name: str, tools: Any) -> ak.System:
    class Own(Clerk):
        """A clerk with this desk's inventory."""

    Own.tools = Own.known = tuple(tools)
    return ak.System(name, [Own()])


def _make(run: ak.Run, tools: Mapping[str, ak.Tool[..., Any]], outcome: Outcome) -> None:
    before = len(run.steps)
    try:
        outcome.result = run.call(tools[outcome.call.name], **outcome.call.values)
        outcome.kind = "done"
    except ToolFailed as e:
        outcome.kind, outcome.reason = "tool error", e.message
    except Refusal as e:
        outcome.kind, outcome.reason = "denied" if isinstance(e, PermissionDenied) else "refused", str(e)
        raise
    except UsageError as e:
        outcome.kind, outcome.reason = "misfit", str(e)
        raise
    finally:
        _read_steps(outcome, run.steps[before:])


def _read_steps(outcome: Outcome, steps: list[Any]) -> None:
    """Tier and people as the record has them. A read's tier is not recorded: it is 1 where nobody was asked."""
    tiers = [s.outputs for s in steps if s.kind == "decision" and s.name.startswith("tier of")]
    approvals = [s.outputs for s in steps if s.kind == "approval"]
    made = any(s.kind == "tool" and s.error is None for s in steps)
    outcome.tier = tiers[-1] if tiers else 1 if outcome.kind == "done" and not approvals else None
    outcome.people = len(approvals)
    if outcome.kind == "done" and not made:  # a rejected call and a tool that returns None look alike to the caller
        outcome.kind, outcome.reason = "rejected", "a person said no"


@dataclass
class Person:
    """A scripted approver: says yes to what the user has confirmed, and keeps what was asked."""

    outcomes: Sequence[Outcome] = ()
    asked: list[ak.ApprovalRequest] = field(default_factory=list)
    answer: Callable[[ak.ApprovalRequest], Any] | None = None

    def __call__(self, request: ak.ApprovalRequest) -> Any:
        self.asked.append(request)
        if self.answer is not None:
            return self.answer(request)
        now = next(o for o in self.outcomes if o.kind == "not reached")
        return now.call.confirmed


class Held:
    """Live outcomes as an input of a run; the record keeps only how many."""

    def __init__(self, value: list[Outcome]) -> None:
        self.value = value

    def __str__(self) -> str:
        return f"{len(self.value)} calls"


def run_once(
    system: ak.System, user: str | None, calls: Sequence[Asked], person: Person | None = None
) -> tuple[list[Outcome], ak.RunRecord]:
    """The calls in one run on behalf of `user`, up to the first that is refused."""
    outcomes = [Outcome(call) for call in calls]
    person = person or Person()
    person.outcomes = outcomes
    with ak.approve_with(person):
        if user is None:
            return outcomes, system.run(outcomes=Held(outcomes))
        with ak.acting_for(user):
            return outcomes, system.run(outcomes=Held(outcomes))


def play(desk: Desk, user: str | None, calls: Sequence[Asked]) -> tuple[list[Outcome], int]:
    """All calls, and the number of runs it took: a refusal ends a run, and the next call begins another.

    What was stopped is then done outside the rules, so that each later call meets the database it met in the data.
    """
    done: list[Outcome] = []
    runs = 0
    while len(done) < len(calls):
        outcomes, record = run_once(desk.system, user, calls[len(done) :])
        runs += 1
        reached = [o for o in outcomes if o.kind != "not reached"]
        if not reached:
            raise RuntimeError(f"a run made no call: {record.error}")
        for o in reached[-1:]:
            if o.stopped:
                run_once(desk.bare, user, [o.call])
        done += reached
    return done, runs


def closest(paragraph: str) -> str:
    """The paragraph a reason ends with."""
    return paragraph.rsplit("[", 1)[-1].rstrip("]") if "[" in paragraph else paragraph


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
