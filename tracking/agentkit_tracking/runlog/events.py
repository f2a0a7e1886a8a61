"""What the run log keeps of runs: records and steps as events, and back."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

from agentkit.errors import UsageError
from agentkit.jsonable import jsonable
from agentkit.records import RunRecord, Step
from agentkit.redaction import redact, without_secrets
from agentkit_tracking.runlog.segments import Event

PAYLOADS_ENV = "AGENTKIT_PAYLOADS"
# The columns that an event has, beside its place: name and DuckDB type. What an event does not say is null.
COLUMNS = {
    "logged_at": "TIMESTAMPTZ",
    "type": "VARCHAR",
    "run_id": "VARCHAR",
    "parent": "VARCHAR",
    "system": "VARCHAR",
    "release": "VARCHAR",
    "stage": "VARCHAR",
    "kind": "VARCHAR",
    "agent": "VARCHAR",
    "state": "VARCHAR",
    "step": "BIGINT",
    "name": "VARCHAR",
    "model": "VARCHAR",
    "result": "VARCHAR",
    "error_type": "VARCHAR",
    "started_at": "TIMESTAMPTZ",
    "started": "DOUBLE",
    "seconds": "DOUBLE",
    "tokens_in": "BIGINT",
    "tokens_out": "BIGINT",
    "usd": "DOUBLE",
    "cached": "BOOLEAN",
    "tries": "BIGINT",
    "route": "VARCHAR",
    "waited_s": "DOUBLE",
    "model_calls": "BIGINT",
    "tool_calls": "BIGINT",
    "planning_s": "DOUBLE",
    "execution_s": "DOUBLE",
    "reflection_s": "DOUBLE",
    "effects": "BIGINT",
    "failed_calls": "BIGINT",
    "approvals": "BIGINT",
    "refusals": "BIGINT",
    "is_degraded": "BOOLEAN",
    "budget_used": "DOUBLE",
    "rating": "DOUBLE",
}
STEPS = ("transition", "model", "tool", "approval", "decision", "handoff")
ESCALATED = "escalated"  # result of a run whose output's action is `escalate`
OTHER = "other"  # stands for a name that may be a person's words; these are private
# Names as code gives them, and those that agentkit makes of them.
_NAME = re.compile(r"(?:tier of |agent |edge )?[\w./:-]{1,64}(?: → [\w./:-]{1,64})?|not allowed")
_PHASES = ("planning", "execution", "reflection")
_TIER = "tier of "
_REFUSALS = frozenset(
    ("PermissionDenied", "PolicyRefused", "Stopped", "ConflictingWrite", "DelegationRefused", "BudgetExceeded")
)


def payloads() -> Callable[[Any], Any]:
    """What is done to what people wrote before it is kept: `AGENTKIT_PAYLOADS`, `redacted` (the default), `full` (all but
    secrets) or `none`.

    Raises:
        UsageError: the setting is none of these.
    """
    chosen = os.environ.get(PAYLOADS_ENV, "redacted")
    if chosen not in _PAYLOADS:
        raise UsageError(f"{PAYLOADS_ENV}={chosen!r}: use {', '.join(_PAYLOADS)}")
    return _PAYLOADS[chosen]


_PAYLOADS: dict[str, Callable[[Any], Any]] = {"redacted": redact, "full": without_secrets, "none": lambda _: {}}


def began(run: Any, keep: Callable[[Any], Any]) -> Event:
    """The event that a run (a record, or one under way) began."""
    private = keep({"inputs": jsonable(run.inputs)})
    return _of(run, "run", state="IDLE", started_at=run.started_at), _whose(run, private)


def stepped(run: Any, step: Step, number: int, keep: Callable[[Any], Any]) -> Event:
    """The event of one step of a run, whose place in the record is `number`."""
    event: dict[str, Any] = {
        "type": step.kind,
        "run_id": run.run_id,
        "system": run.system,
        "release": run.release,
        "stage": run.stage,
        "kind": run.kind,
        "agent": step.agent,
        "state": step.state,
        "step": number + 1,
        "name": step.name if _NAME.fullmatch(step.name) else OTHER,
        "started": step.started,
        "seconds": step.seconds,
    }
    if step.model is not None:
        event.update(model=step.model, tokens_in=step.tokens_in, tokens_out=step.tokens_out, usd=step.usd)
    elif step.usd:
        event["usd"] = step.usd
    if step.cached:
        event["cached"] = True
    if step.tries:
        event["tries"] = step.tries
    if step.error is not None:
        event["error_type"] = _error_type(step.error)
    if step.kind == "approval":
        event |= _answered(step)
    result = _result(step)
    if result is not None:
        event["result"] = result
    private = {
        name: value
        for name, value in (("inputs", step.inputs), ("outputs", step.outputs), ("error", step.error))
        if value is not None
    }
    if event["name"] == OTHER:
        private["name"] = step.name
    kept = keep(private) if private else private
    # Whole, whatever is done to text: who let a call be made is what an audit asks first. Private, as it is a person's name.
    return event, kept if step.decided_by is None else {**kept, "decided_by": step.decided_by}


def ended(record: RunRecord, keep: Callable[[Any], Any]) -> Event:
    """The event that a run ended: the record without its steps."""
    event = _of(
        record,
        "outcome",
        state=record.state,
        started_at=record.started_at,
        seconds=record.seconds,
        error_type=None if record.error is None else _error_type(record.error),
        result=ESCALATED if isinstance(record.output, dict) and record.output.get("action") == "escalate" else None,
        route=record.route if record.route is None or _NAME.fullmatch(record.route) else OTHER,
        waited_s=record.waited_s,
        model_calls=record.model_calls,
        tool_calls=record.tool_calls,
        tokens_in=record.tokens_in,
        tokens_out=record.tokens_out,
        usd=record.usd,
        effects=len(record.effects),
        failed_calls=sum(s.error is not None for s in record.steps if s.kind in ("model", "tool")),
        approvals=sum(s.kind == "approval" for s in record.steps),
        refusals=int(record.error is not None and _error_type(record.error) in _REFUSALS),
        is_degraded=record.degraded is not None,
        budget_used=record.budget_used,
        **{f"{phase}_s": record.phases[phase] for phase in _PHASES if phase in record.phases},
    )
    private = keep(
        {
            name: value
            for name, value in (
                ("inputs", record.inputs),
                ("route", record.route if event.get("route") == OTHER else None),
                ("output", record.output),
                ("error", record.error),
                ("effects", record.effects or None),
                ("degraded", record.degraded),
                ("partial", record.partial),
            )
            if value is not None
        }
    )
    return event, _whose(record, private)


def finished(record: RunRecord, known: set[int] | None, keep: Callable[[Any], Any]) -> list[Event]:
    """What has not been kept yet of a finished run: of one that has been kept as it happened, all but the steps `known`.

    Steps of runs that it called are kept with those runs.
    """
    steps = [
        stepped(record, step, number, keep)
        for number, step in enumerate(record.steps)
        if step.run is None and number not in (known or ())
    ]
    return [*([began(record, keep)] if known is None else []), *steps, ended(record, keep)]


def _of(run: Any, kind: str, **values: Any) -> dict[str, Any]:
    event = {
        "type": kind,
        "run_id": run.run_id,
        "parent": run.parent if isinstance(run, RunRecord) else run.parent and run.parent.run_id,
        "system": run.system,
        "release": run.release,
        "stage": run.stage,
        "kind": run.kind,
        **values,
    }
    return {name: value for name, value in event.items() if value is not None}


def _whose(run: Any, private: dict[str, Any]) -> dict[str, Any]:
    """With whom the run acts for: private, too, since it can be traced to a person."""
    caller = run if isinstance(run, RunRecord) else run.caller
    for name, value in (("user_hash", caller.user_hash), ("session", caller.session)):
        if value is not None:
            private[name] = value
    return private


def _error_type(error: str) -> str:
    """The class of an error from its text; where it names none, `error`: the text may be anybody's."""
    head, colon, _ = error.partition(":")
    is_class = colon and head.isidentifier() and head.isascii() and head[0].isupper() and len(head) <= 64
    return head if is_class else "error"


def _answered(step: Step) -> dict[str, Any]:
    """Of an approval, when it was asked and, only where a person is named who answered, how long that took.

    So that a person did is told without the name, and stays told when that is erased.
    """
    said = step.outputs if isinstance(step.outputs, dict) else {}
    found: dict[str, Any] = {} if step.decided_by is None else {"waited_s": step.seconds}
    try:
        asked, answered = (datetime.fromisoformat(said[name]) for name in ("asked_at", "at"))
        waited = (answered - asked).total_seconds()
    except (KeyError, TypeError, ValueError):  # an approver may write anything there
        return found
    # Whoever decides elsewhere has another clock.
    return {"started_at": asked.isoformat(), **{name: max(0.0, waited) for name in found}}


def _result(step: Step) -> str | None:
    """In a word how it ended, of a closed set of words."""
    if step.kind == "approval":
        verdict = step.outputs.get("verdict") if isinstance(step.outputs, dict) else None
        return str(verdict) if verdict in ("approve", "reject", "modify") else None
    if step.kind == "decision" and step.name.startswith(_TIER):
        return str(step.outputs)
    if step.kind == "decision" and step.name == "route":
        return str(step.outputs) if _NAME.fullmatch(str(step.outputs)) else OTHER
    if step.kind == "handoff":
        return str(step.outputs)  # the run that the work was handed to
    if step.kind in ("model", "tool"):
        return "failed" if step.error is not None else "done"
    return None


# ---- back


def step_of(row: dict[str, Any]) -> Step:
    """A step from a row of the view `steps`, JSON parsed."""
    names = ("name", "state", "started", "seconds", "agent", "inputs", "outputs", "model", "error")
    return Step(
        row["kind"],
        **{name: row[name] for name in names},
        tokens_in=row["tokens_in"] or 0,
        tokens_out=row["tokens_out"] or 0,
        usd=math.nan if row["usd"] is None else row["usd"],  # what cannot be read as a number was NaN: unknown
        cached=bool(row["cached"]),
        tries=row["tries"] or 0,
        decided_by=row.get("decided_by"),
    )
