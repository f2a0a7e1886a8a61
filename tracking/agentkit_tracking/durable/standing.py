"""Where durable runs stand, asked of the database; no runner has to be open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from dbos import DBOSClient, WorkflowStatus

from agentkit.errors import UsageError
from agentkit_tracking.durable.alive import Register
from agentkit_tracking.durable.database import (
    WORKFLOW,
    client_of,
    database_url,
    find,
    left_on,
    order_in,
    recorded,
    register_of,
    shown,
    sqlite_file,
)

_WORDS = {
    "ENQUEUED": "queued",
    "DELAYED": "queued",
    "CANCELLED": "cancelled",
    "ERROR": "given up",  # no record could be made
    "MAX_RECOVERY_ATTEMPTS_EXCEEDED": "given up",
}


@dataclass(frozen=True)
class RunStatus:
    """Where a durable run stands.

    `state` is queued, running, interrupted (its process is dead; the next runner takes it up), done, failed, cancelled or
    given up (it took its process down too often); `last` is its last checkpoint, or what ended it; `steps` counts its
    checkpoints; `restarts` how often it was taken up; `began` is UTC, ISO 8601.
    """

    run_id: str
    system: str
    release: str | None
    state: str
    began: str
    steps: int
    last: str
    restarts: int
    executor: str | None


def runs(url: str | None = None, *, limit: int = 50, unfinished: bool = False) -> list[RunStatus]:
    """The durable runs, newest first."""
    with _looking(url) as found:
        if found is None:
            return []
        client, register = found
        status = ["PENDING", "ENQUEUED", "DELAYED"] if unfinished else None
        rows = client.list_workflows(name=WORKFLOW, status=status, limit=limit, sort_desc=True)
        return [_status(client, row, register) for row in rows]


def status(run_id: str, url: str | None = None) -> RunStatus:
    """Where one run stands.

    Raises:
        UsageError: there is none of this id.
    """
    with _looking(url) as found:
        if found is None:
            raise UsageError(f"there is no durable run {run_id!r}: nothing was run durably yet")
        return _status(found[0], find(found[0], run_id), found[1])


def resume(run_id: str, url: str | None = None) -> None:
    """Put a run that was given up or cancelled back on its queue, with its journal.

    Raises:
        UsageError: there is none of this id, or it needs nobody's help.
    """
    with _looking(url) as found:
        where = status(run_id, url)
        if found is None or where.state not in ("given up", "cancelled"):
            raise UsageError(f"run {run_id} is {where.state}; only one that was given up or cancelled can be resumed")
        found[0].resume_workflow(run_id, queue_name=left_on(find(found[0], run_id)))


@contextmanager
def _looking(url: str | None) -> Iterator[tuple[DBOSClient, Register] | None]:
    """A client, and who is alive; None where there is no database yet."""
    from sqlalchemy.exc import SQLAlchemyError

    address = database_url(url)
    path = sqlite_file(address)
    if path is not None and not path.exists():
        yield None
        return
    register = register_of(address, "")
    try:
        client = client_of(address)
        try:
            yield client, register
        finally:
            client.destroy()
    except SQLAlchemyError as e:
        said = str(getattr(e, "orig", None) or e).splitlines()[0]
        raise UsageError(f"the database of durable runs, {shown(address)}, cannot be read: {said}") from e
    finally:
        register.close()


def _status(client: DBOSClient, row: WorkflowStatus, register: Register) -> RunStatus:
    order, names = order_in(row), recorded(client, row.workflow_id)
    last = names[-1] if names else ""
    if row.status == "SUCCESS" and row.output is not None:
        state = "done" if row.output["state"] == "DONE" else "failed"
        last = row.output["error"] or last
    elif row.status == "PENDING":
        state = "interrupted" if register.looks_dead(row.executor_id or "") else "running"
    else:
        state = _WORDS.get(row.status, row.status.lower())
        last = str(row.error) if row.error else last
    began = datetime.fromtimestamp((row.created_at or 0) / 1000, UTC).isoformat()
    restarts = max(0, (row.recovery_attempts or 1) - 1)
    return RunStatus(
        row.workflow_id, order.system, order.release, state, began, len(names), last, restarts, row.executor_id
    )
