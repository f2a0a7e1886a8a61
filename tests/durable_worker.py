"""The process that the kill tests kill: durable runs with effects in a real store outside, a SQLite file of its own.

    python durable_worker.py ACTION STORE RUN_ID …

ACTION is `steps` (ten calls: reads, writes that take a key, writes that do not), `asking` (the same, and a person is
asked twice on the way) or `serve` (works on the queue `shared` until it is killed). Imports neither dspy nor mlflow.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from agentkit.approvals import ApprovalRequest, Decision
from agentkit.autonomy import Autonomy
from agentkit.budget import Budget
from agentkit.errors import ToolFailed
from agentkit.runs import Run
from agentkit.states import State
from agentkit.tools import Inventory, tool
from agentkit_tracking import durable
from agentkit_tracking.durable.journal import IN_DOUBT

PAUSE_S = float(os.environ.get("WORKER_PAUSE_S", "0.05"))  # on either side of an effect: there a kill leaves a doubt
STEPS = 10


def store() -> Path:
    return Path(os.environ["WORKER_STORE"])


@contextmanager
def opened() -> Iterator[sqlite3.Connection]:
    """The store outside. A write is there for good when the block ends."""
    with closing(sqlite3.connect(store(), timeout=60)) as connection, connection:
        yield connection


def create() -> None:
    with opened() as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE IF NOT EXISTS keyed (key TEXT PRIMARY KEY, run TEXT, n INTEGER)")
        connection.execute("CREATE TABLE IF NOT EXISTS appended (run TEXT, n INTEGER, pid INTEGER)")
        connection.execute("CREATE TABLE IF NOT EXISTS calls (tool TEXT, run TEXT, n INTEGER)")
        connection.execute("CREATE TABLE IF NOT EXISTS asked (key TEXT, run TEXT, n INTEGER, doubt INTEGER)")
        connection.execute("CREATE TABLE IF NOT EXISTS answers (run TEXT, n INTEGER)")


@tool
def look(run: str, n: int) -> int:
    """How many rows the store has of a run."""
    time.sleep(PAUSE_S)
    with opened() as connection:
        connection.execute("INSERT INTO calls VALUES ('look', ?, ?)", (run, n))
        (count,) = connection.execute("SELECT count(*) FROM appended WHERE run = ?", (run,)).fetchone()
    return int(count)


@tool(permission="write", criticality="low", idempotent=True)
def put(run: str, n: int, idempotency_key: str) -> str:
    """A write that the store makes once per key, however often it is told to."""
    time.sleep(PAUSE_S)
    with opened() as connection:
        connection.execute("INSERT INTO calls VALUES ('put', ?, ?)", (run, n))
        connection.execute("INSERT OR IGNORE INTO keyed VALUES (?, ?, ?)", (idempotency_key, run, n))
    time.sleep(PAUSE_S)
    return f"put {n}"


@tool(permission="write", criticality="low", human_at={"usd": 50})
def send(run: str, n: int, usd: float = 0.0) -> str:
    """A write that happens as often as it is called."""
    time.sleep(PAUSE_S)
    with opened() as connection:
        connection.execute("INSERT INTO appended VALUES (?, ?, ?)", (run, n, os.getpid()))
    time.sleep(PAUSE_S)
    return f"sent {n}"


TOOLS = (look, put, send)
BUDGET = Budget(tool_calls=STEPS)  # exactly what the ten calls need: one charged twice would end the run
AUTONOMY = Autonomy(budget_used_from=None, failures_from=None)


def ten_steps(run: Run, *, ask: bool) -> dict[str, Any]:
    """Ten calls, and what the budget has of them; a write that nobody can vouch for is passed over."""
    run.to(State.PLANNING, "asked")
    run.to(State.EXECUTING, "ten steps")
    found: list[Any] = []
    with run.acting_as(Inventory("worker", TOOLS)):
        for n in range(STEPS):
            chosen = TOOLS[n % 3]
            extra = {"usd": 80.0} if ask and n in (2, 8) else {}
            try:
                found.append(run.call(chosen, run=run.run_id, n=n, **extra))
            except ToolFailed as e:
                found.append(f"unknown: {e.unknown}")
    run.to(State.REFLECTING, "done")
    return {"found": found, "used": run.ledger.used["tool_calls"]}


@durable.work("steps", budget=BUDGET, autonomy=AUTONOMY)
def steps(run: Run) -> dict[str, Any]:
    return ten_steps(run, ask=False)


@durable.work("asking", budget=BUDGET, autonomy=AUTONOMY)
def asking(run: Run) -> dict[str, Any]:
    return ten_steps(run, ask=True)


def person(request: ApprovalRequest) -> bool | Decision:
    """Somebody who looks into the store where a call is in doubt, and answers other questions once the test says so."""
    doubt = request.reason == IN_DOUBT
    call = request.arguments["call"] if doubt else request.arguments
    with opened() as connection:
        connection.execute("INSERT INTO asked VALUES (?, ?, ?, ?)", (request.key, request.run_id, call["n"], doubt))
    if not doubt:
        while not _answered(request.run_id, call["n"]):
            time.sleep(0.02)
        return True
    if os.environ.get("WORKER_PERSON") == "absent":
        return False
    with opened() as connection:
        where = (request.run_id, call["n"])
        (happened,) = connection.execute("SELECT count(*) FROM appended WHERE run = ? AND n = ?", where).fetchone()
    return Decision("modify", arguments={"result": f"sent {call['n']}"}) if happened else True


def _answered(run: str, n: int) -> bool:
    with opened() as connection:
        return connection.execute("SELECT 1 FROM answers WHERE run = ? AND n = ?", (run, n)).fetchone() is not None


def questions() -> int:
    """How often a person was asked."""
    with opened() as connection:
        return int(connection.execute("SELECT count(*) FROM asked").fetchone()[0])


def main(action: str, *run_ids: str) -> None:
    create()
    queues = ("shared",) if action == "serve" else ()
    with durable.Runner(queues=queues, approver=person, poll_s=0.1) as runner:
        print("open", flush=True)
        if action == "serve":
            runner.wait(300)
            return
        for handle in [runner.start(action, {}, run_id=run_id) for run_id in run_ids]:
            record = handle.result(timeout_s=120)
            print(record.run_id, record.state, record.error, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
    # Not duckdb: a record that a killed process may have handed over is looked for in the log.
    assert not {"dspy", "mlflow", "litellm"} & sys.modules.keys()
