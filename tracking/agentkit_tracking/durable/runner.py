"""The process that carries runs out: DBOS launched on a database, runs started, those of dead processes taken up."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from types import TracebackType
from typing import Any

from dbos import DBOS, DBOSClient, DBOSConfig, SetWorkflowID, WorkflowStatus
from dbos import DBOSPortableJSONSerializer as PortableJSON

from agentkit import clock, sinks
from agentkit.approvals import Approver
from agentkit.calls import intercept
from agentkit.errors import AgentkitError, UsageError
from agentkit.records import RunRecord
from agentkit_tracking.durable import works
from agentkit_tracking.durable.alive import Register
from agentkit_tracking.durable.database import (
    QUEUE,
    WORKFLOW,
    checkpoints,
    client_of,
    create,
    database_url,
    find,
    left_on,
    order_in,
    queue_of,
    record_of,
    recorded,
    register_of,
    shown,
    stored,
)
from agentkit_tracking.durable.entries import Entry
from agentkit_tracking.durable.journal import RECORD, Journal, Suspended
from agentkit_tracking.durable.unread import account_for
from agentkit_tracking.durable.works import Day, Order

# Of the journal's form: runs begun with another are left to processes that know it. It does not change with any code of the
# user's: what a run may be taken up with is decided by its release and by the journal itself.
VERSION = "agentkit-journal-1"
RESTARTS = 100  # a run that takes its process down with it this often is given up
_RESULT_S = 0.5  # between two looks for a result at most; the first come faster
_TAKE_UP_S = 2.0  # how often runs of dead processes are looked for
# Until a run is tried again that was let go of (no registry, a full disk); doubled each time.
_AGAIN_S, _AGAIN_AT_MOST_S = 10.0, 600.0
_log = logging.getLogger("agentkit.durable")


class Handle:
    """A durable run, here or elsewhere."""

    def __init__(self, run_id: str, client: DBOSClient) -> None:
        self.run_id, self._client = run_id, client

    def result(self, timeout_s: float | None = None) -> RunRecord:
        """Wait for the record. Its `result` (the typed object) is None: what came through the database is data.

        Raises:
            TimeoutError: there is none yet after `timeout_s`.
            AgentkitError: the run was given up or cancelled.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        pause = 0.02
        while True:
            found = find(self._client, self.run_id)
            if found.status == "SUCCESS":
                return record_of(found.output)
            if found.status not in ("PENDING", "ENQUEUED", "DELAYED"):
                raise AgentkitError(f"run {self.run_id} ended without a record: {found.status} ({found.error})")
            if end is not None and time.monotonic() >= end:
                raise TimeoutError(f"run {self.run_id} is not over after {timeout_s:g} s")
            time.sleep(pause)
            pause = min(_RESULT_S, pause * 1.5)


class Runner:
    """Carries durable runs out in this process, as long as it is open. One at a time per process.

    On opening, and every two seconds, it takes up the runs whose process has died. Closing lets go of the runs under way,
    those that wait for a person included: the next runner goes on with them where they are.

    Args:
        url: of the database: `sqlite:///PATH` or `postgresql://…`; default: `AGENTKIT_DURABLE`, or `durable.db` in the home.
        queues: queues this process works on.
        take_up: whether to go on with runs of dead processes.
        approver: asked where a person has to decide; default: the approvals desk of the control plane.
        at_once: at most so many runs of a queue at once here, those that wait for a person included.
        poll_s: seconds between two looks at a queue.
        grace_s: on closing, seconds to wait for calls that are being made; what is not done by then is in doubt.

    Raises:
        UsageError: a runner is open already; DBOS is not installed; the database cannot be used.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        queues: Sequence[str] = (),
        take_up: bool = True,
        approver: Approver | None = None,
        at_once: int = 8,
        poll_s: float = 0.25,
        grace_s: float = 30.0,
    ) -> None:
        self.url = database_url(url)
        self.queues, self._take_up = tuple(queues), take_up
        self._approver = approver
        self._at_once, self._poll_s, self._grace_s = at_once, poll_s, grace_s
        self.executor = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._closing = threading.Event()
        self._under_way = 0
        self._changed = threading.Condition()
        self._let_go: dict[str, float] = {}  # run: when to try again, monotonic seconds
        self._failed: Counter[str] = Counter()
        self._register: Register = register_of(self.url, self.executor)

    # ---- open and close

    def __enter__(self) -> Runner:
        return self.launch()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def launch(self) -> Runner:
        """Open it; `close` belongs to it."""
        global _current
        with _one_at_a_time:
            if _current is not None:
                raise UsageError("a durable runner is open in this process; use that one, or close it")
            _current = self
        try:
            self._launch()
        except BaseException as e:
            self.close()
            if isinstance(e, Exception) and not isinstance(e, AgentkitError):
                said = (str(e).strip() or type(e).__name__).splitlines()[0]
                raise UsageError(f"the database of durable runs, {shown(self.url)}, cannot be used: {said}") from e
            raise
        return self

    def _launch(self) -> None:
        create(self.url)
        self._register.keep()
        serves = [*self.queues, *([QUEUE] if self._take_up else [])]
        listened = [queue_of(queue, worker) for queue in dict.fromkeys(serves) for worker in works.workers()]
        self._dbos = DBOS(
            config=DBOSConfig(
                name="agentkit",
                system_database_url=self.url,
                serializer=PortableJSON(),
                application_version=VERSION,
                executor_id=self.executor,
                log_level="ERROR",
                enable_otlp=False,
            )
        )
        DBOS.listen_queues(listened)
        DBOS.launch()
        self._client = client_of(self.url)
        for queue in listened:
            self._client.register_queue(
                queue,
                worker_concurrency=self._at_once,
                polling_interval_sec=self._poll_s,
            )
        self._look()
        self._looker = threading.Thread(target=self._keep_looking, name="agentkit-durable", daemon=True)
        self._looker.start()

    def close(self) -> None:
        """Let go of all runs and of the database; the process can end."""
        global _current
        self._closing.set()
        with self._changed:
            self._changed.wait_for(lambda: self._under_way == 0, self._grace_s)
        if (looker := getattr(self, "_looker", None)) is not None:
            looker.join()
        # A run that a queue hands out at this moment stays with this process, which is dead then; DBOS calls it an error.
        logging.getLogger("dbos").setLevel(logging.CRITICAL)
        DBOS.destroy()
        if (client := getattr(self, "_client", None)) is not None:
            client.destroy()
        self._register.close()
        with _one_at_a_time:
            if _current is self:
                _current = None

    def wait(self, seconds: float | None = None) -> None:
        """Sleep while this process works."""
        self._closing.wait(seconds)

    # ---- start

    def start(
        self,
        what: Any,
        inputs: dict[str, Any],
        *,
        run_id: str | None = None,
        queue: str | None = None,
        kind: str = "run",
    ) -> Handle:
        """Start a run: here and now, or on a queue for any process that works on it.

        Args:
            what: the name of work, a function or system registered as work, a released system, or a reference to a release,
                which is resolved now.
            run_id: starting the same id twice is starting once.

        Raises:
            UsageError: it cannot run durably, or the id is taken by another run.
        """
        order = works.order_of(what, inputs, kind)
        run_id = run_id or uuid.uuid4().hex
        with SetWorkflowID(run_id):
            if queue is None:
                DBOS.start_workflow(_workflow, asdict(order))
            else:
                name = queue_of(queue, order.worker)
                self._client.register_queue(
                    name,
                    worker_concurrency=self._at_once,
                    polling_interval_sec=self._poll_s,
                    on_conflict="never_update",
                )
                DBOS.enqueue_workflow(name, _workflow, asdict(order))
        kept = order_in(find(self._client, run_id))
        same = ("work", "system", "release", "inputs", "kind", "user", "session")
        if any(getattr(kept, name) != getattr(order, name) for name in same):
            raise UsageError(f"run {run_id} is there already, and does something else; choose another id")
        return Handle(run_id, self._client)

    def handle(self, run_id: str) -> Handle:
        """A handle on a run that was started before.

        Raises:
            UsageError: there is none of this id.
        """
        find(self._client, run_id)
        return Handle(run_id, self._client)

    # ---- taking up

    def _keep_looking(self) -> None:
        while not self._closing.wait(_TAKE_UP_S):
            try:
                self._look()
            except Exception as e:  # the database is away; the next look may find it
                _log.warning("runs of dead processes could not be looked for: %s", e)

    def _look(self) -> None:
        self._register.keep()
        now = time.monotonic()
        for run_id in [one for one, due in self._let_go.items() if due <= now]:
            del self._let_go[run_id]
            self._put_back(find(self._client, run_id))
        if not self._take_up:
            return
        pending = self._client.list_workflows(status="PENDING", name=WORKFLOW, app_version=VERSION, load_output=False)
        dead = self._register.dead({one.executor_id for one in pending if one.executor_id})
        able = works.workers()
        for one in pending:
            if one.executor_id in dead and order_in(one).worker in able and self._put_back(one):
                _log.info("run %s is taken up from %s", one.workflow_id, one.executor_id)
        left = {one.executor_id for one in pending if order_in(one).worker not in able}
        for executor in dead - left:
            self._register.forget(executor)

    def _put_back(self, found: WorkflowStatus) -> bool:
        """Put a run that nobody works on back on its queue; False where another process was faster."""
        # Not `resume_workflow`: that would take a run from a process that has taken it up a moment ago, and forget restarts.
        return self._dbos._sys_db.reenqueue_for_recovery(found.workflow_id, [found.executor_id or ""], left_on(found))

    # ---- one run

    def carry_out(self, run_id: str, order: Order) -> dict[str, Any]:
        """The workflow: from the beginning, with what the journal holds given back. Raises no `Exception`: what goes wrong
        here is not the run's doing, and it is tried again.
        """
        with self._changed:
            self._under_way += 1
        try:
            return self._carried_out(run_id, order)
        except (Exception, Suspended) as e:
            if self._closing.is_set():
                raise Suspended(str(e)) from e
            self._failed[run_id] += 1
            wait = min(_AGAIN_S * 2 ** (self._failed[run_id] - 1), _AGAIN_AT_MOST_S)
            self._let_go[run_id] = time.monotonic() + wait
            _log.warning("run %s cannot go on now and is tried again in %g s: %s", run_id, wait, e)
            raise Suspended(str(e)) from e
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify_all()

    def _carried_out(self, run_id: str, order: Order) -> dict[str, Any]:
        day = Day()
        journal = Journal(recorded(self._client, run_id), self._closing, day.caught_up)
        began, _ = journal.step("begin", lambda: {"at": clock.utc().isoformat()})

        def keep(part: RunRecord, hand_over: Callable[[RunRecord], None]) -> None:
            journal.keep(part, partial(_emit, part, journal.may_repeat, hand_over))

        with intercept(journal), sinks.emitting_through(keep):
            record, _ = works.carry_out(order, run_id, self._approver or _desk, day, journal.at_end)
        journal.finish()
        if journal.unread is not None:
            account_for(record, checkpoints(self._client, run_id, journal.unread))
        record.started_at = began["at"]
        journal.step(RECORD, partial(_emit, record, journal.may_repeat, sinks.emit))
        return stored(record)


_current: Runner | None = None
_one_at_a_time = threading.Lock()


@DBOS.workflow(name=WORKFLOW, max_recovery_attempts=RESTARTS)
def _workflow(order: dict[str, Any]) -> dict[str, Any]:
    runner, run_id = _current, DBOS.workflow_id
    if runner is None or run_id is None:
        raise Suspended("no runner is open")
    return runner.carry_out(run_id, Order(**order))


def _emit(record: RunRecord, may_repeat: bool, hand_over: Callable[[RunRecord], None]) -> Entry:
    """Hand the record to the sinks, unless a process that died in this place had done so.

    The run log is asked, which comes first among the sinks; one that runs on another machine may have it there.
    """
    if may_repeat and _is_in_run_log(record):
        return {}
    try:
        hand_over(record)
    except Exception as e:
        raise Suspended(f"the record could not be handed over: {e}") from e
    return {}


def _is_in_run_log(record: RunRecord) -> bool:
    from agentkit_tracking.runlog import own

    return own().has_outcome(record.run_id)


def _desk(request: Any) -> Any:
    from agentkit_tracking.control.approvals import desk_approver

    return desk_approver()(request)
