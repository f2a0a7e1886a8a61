"""What the journal of a run holds beyond the point where the run, taken up again, has ended: done before, so accounted for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentkit.autonomy import Tier
from agentkit.control import Notice, control
from agentkit.records import RunRecord, Step
from agentkit.runs import REHEARSALS
from agentkit_tracking.durable.entries import Entry, step_of, used_in

_IN_DOUBT = "the run ended before it was known whether this took effect; look, and put right what has to be"


def account_for(record: RunRecord, unread: Sequence[tuple[str, Entry]]) -> None:
    """Put the effects, steps and costs of checkpoints that were not given back into the record of the run.

    A write whose intent is there without its result is an effect in doubt: `unknown`, and people are told.

    Args:
        unread: name and content of these checkpoints, in order.
    """
    intent: dict[str, Any] | None = None
    for name, entry in unread:
        words = name.split(" ", 2)
        if "call" not in entry or len(words) < 3:
            continue
        kind, tool = words[1], words[2]
        if kind in ("tier", "approval"):
            intent = entry.get("intent") if _lets_it_be_made(kind, entry) else None
            if intent is not None and kind == "approval" and entry["result"].get("arguments"):
                intent = {**intent, "arguments": entry["result"]["arguments"]}
        elif kind == "tool":
            if intent is not None and intent["tool"] == tool:
                _add(record, intent, _outcome(entry))
                intent = None
            record.tool_calls += 1
        record.steps += [step_of(step) for step in entry["steps"]]
        used = used_in(entry)
        record.usd += used.get("usd", 0.0)
        for what in ("model_calls", "tool_calls", "tokens_in", "tokens_out"):
            setattr(record, what, getattr(record, what) + int(used.get(what, 0)))
    if intent is not None:
        _add(record, intent, "unknown")
        plane = control()
        if plane is not None and record.kind not in REHEARSALS:
            told = {"tool": intent["tool"], "arguments": intent["arguments"]}
            plane.notify(Notice("unknown", record.run_id, record.system, f"{intent['tool']}: {_IN_DOUBT}", told))


def _lets_it_be_made(kind: str, entry: Entry) -> bool:
    result = entry.get("result")
    if kind == "tier":
        return isinstance(result, list) and result[0] != Tier.WAIT
    return isinstance(result, dict) and result.get("verdict") in ("approve", "modify")


def _outcome(entry: Entry) -> str:
    raised = entry.get("raised")
    if raised is None:
        return "done"
    return "unknown" if raised["fields"].get("unknown") else "failed"


def _add(record: RunRecord, intent: dict[str, Any], outcome: str) -> None:
    effect = {"tool": intent["tool"], "arguments": intent["arguments"], "outcome": outcome}
    record.effects.append(effect)
    error = (
        None if outcome == "done" else f"ToolFailed: {_IN_DOUBT}" if outcome == "unknown" else "ToolFailed: it failed"
    )
    record.steps.append(
        Step("tool", intent["tool"], "EXECUTING", record.seconds, inputs=intent["arguments"], error=error, tries=1)
    )
