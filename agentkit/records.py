"""What is kept of a run: plain values, written once, read by the run log, MLflow and the evaluation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import orjson

StepKind = Literal["transition", "model", "tool", "approval", "decision", "handoff"]


@dataclass(slots=True)
class Step:
    """One thing a run did.

    `name` is the target state, predictor, tool or decision; times are seconds, `started` counted from the start
    of the run; `usd` is what the step cost by the price table; `cached` says that it was answered from memory.
    Of a tool `tries` counts the attempts, the repeated ones included, and `usd` is what they cost. A handoff's `outputs` is
    the id of the run that the work went to; its steps follow, with that id as their `run`. `decided_by` is who answered an
    approval, as the approver names them; None where code did, or nobody.
    """

    kind: StepKind
    name: str
    state: str
    started: float
    seconds: float = 0.0
    agent: str | None = None
    inputs: Any = None
    outputs: Any = None
    model: str | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float = 0.0
    error: str | None = None
    cached: bool = False
    tries: int = 0  # of a tool
    run: str | None = None  # the run that this one called, where it is a step of that
    decided_by: str | None = None


@dataclass(slots=True)
class RunRecord:
    """One finished run, traceable to the exact release that made it.

    `output` is the result as JSON-able data (None unless `state` is DONE); `release` is the content hash of the
    release, or None for an unregistered draft; `effects` lists the write and execute tools that really ran, in
    order, each with its `outcome` (done, failed, or unknown: it may have happened); `phases` maps planning, execution
    and reflection to seconds; `waited_s` is time spent on a person; `degraded` says what failed where the agent fell
    back on a lesser result; `partial` is what a failed run had found by then; `parent` is the run that called this
    one; `user_hash` stands for whoever it acted for; `budget_used` is the largest share of any limit that was used; `pid` is
    the process that began it, where that made this record.
    """

    run_id: str
    system: str
    release: str | None
    kind: str  # run | map | batch | evaluation
    started_at: str  # UTC, ISO 8601
    seconds: float
    state: str
    route: str | None
    inputs: dict[str, Any]
    output: dict[str, Any] | None
    error: str | None
    effects: list[dict[str, Any]]
    phases: dict[str, float]
    waited_s: float
    model_calls: int
    tool_calls: int
    tokens_in: int
    tokens_out: int
    usd: float
    steps: list[Step] = field(default_factory=list)
    parent: str | None = None
    user_hash: str | None = None
    session: str | None = None
    stage: str = "draft"
    degraded: str | None = None
    partial: dict[str, Any] | None = None
    budget_used: float | None = None
    result: Any = field(default=None, compare=False)  # the typed object; not stored
    pid: int | None = field(default=None, compare=False)  # not stored

    def to_json(self) -> bytes:
        """The record as one line of JSON, without the live `result` and the `pid`; text that is no valid Unicode is repaired."""
        try:
            return orjson.dumps(self._stored(), default=str)
        except orjson.JSONEncodeError:
            # A lone surrogate or an integer past 64 bits must not lose the audit record.
            return orjson.dumps(_encodable(self._stored()), default=str)

    def _stored(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__ if name not in ("result", "pid")}


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 63:
        return str(value)
    if isinstance(value, dict):
        return {_encodable(str(k)): _encodable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(v) for v in value]
    if isinstance(value, Step):
        return _encodable(asdict(value))
    return value
