"""The schema of the control database, as numbered steps: a store runs those it lacks, blank or old."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, TableClause, column, inspect, select, table, text
from sqlalchemy.exc import IntegrityError

from agentkit.errors import AgentkitError

APPROVALS = table(
    "approvals",
    *map(column, ("id", "run_id", "call_key", "request", "created_at", "expires_at", "status", "decision")),
)
REFUSED = table("refused_decisions", *map(column, ("approval_id", "sha256", "at", "decision", "problem")))
STOPS = table("stops", *map(column, ("sequence", "envelope")))
USE = table("budget_use", *map(column, ("scope", "day", "model_calls", "tool_calls", "tokens_in", "tokens_out", "usd")))
NOTICES = table(
    "notices", *map(column, ("id", "created_at", "body", "attempts", "claimed_until", "delivered_at", "problem"))
)
_STEPS = table("control_schema", column("step"))


def _first(connection: Connection) -> None:
    """Approvals, stops, daily budgets, notices. Times are text, UTC, ISO 8601 to the microsecond."""
    for statement in (
        # `request` is JSON of what was asked; `call_key` the SHA-256 of the call's key within the run.
        "CREATE TABLE approvals (id VARCHAR(16) PRIMARY KEY, run_id VARCHAR(64) NOT NULL, call_key VARCHAR(64) NOT NULL, "
        "request TEXT NOT NULL, created_at VARCHAR(32) NOT NULL, "
        "expires_at VARCHAR(32) NOT NULL, status VARCHAR(16) NOT NULL, decision TEXT, UNIQUE (run_id, call_key))",
        "CREATE INDEX approvals_open ON approvals (status, expires_at)",
        "CREATE TABLE refused_decisions (approval_id VARCHAR(16) NOT NULL, sha256 VARCHAR(64) NOT NULL, "
        "at VARCHAR(32) NOT NULL, decision TEXT, problem TEXT NOT NULL, PRIMARY KEY (approval_id, sha256))",
        "CREATE TABLE stops (sequence INTEGER PRIMARY KEY, envelope TEXT NOT NULL)",
        "CREATE TABLE budget_use (scope VARCHAR(200) NOT NULL, day VARCHAR(10) NOT NULL, "
        "model_calls DOUBLE PRECISION NOT NULL, tool_calls DOUBLE PRECISION NOT NULL, "
        "tokens_in DOUBLE PRECISION NOT NULL, tokens_out DOUBLE PRECISION NOT NULL, usd DOUBLE PRECISION NOT NULL, "
        "PRIMARY KEY (scope, day))",
        "CREATE TABLE notices (id VARCHAR(64) PRIMARY KEY, created_at VARCHAR(32) NOT NULL, body TEXT NOT NULL, "
        "attempts INTEGER NOT NULL, claimed_until VARCHAR(32), delivered_at VARCHAR(32), problem TEXT)",
        "CREATE INDEX notices_open ON notices (delivered_at, created_at)",
    ):
        connection.execute(text(statement))


MIGRATIONS: tuple[Callable[[Connection], None], ...] = (_first,)


def migrate(connection: Connection) -> None:
    """Take the steps that the store lacks, within the transaction at hand.

    Raises:
        AgentkitError: a newer agentkit has taken steps that this one does not know.
    """
    if connection.dialect.name == "postgresql":  # creators queue here; SQLite's hold the file's lock already
        connection.execute(text("SELECT pg_advisory_xact_lock(7074103402164318061)"))
    if not inspect(connection).has_table("control_schema"):
        connection.execute(text("CREATE TABLE control_schema (step INTEGER PRIMARY KEY)"))
    taken = {row.step for row in connection.execute(select(_STEPS.c.step))}
    if taken - set(range(1, len(MIGRATIONS) + 1)):
        raise AgentkitError(
            f"the control database is of schema {max(taken)}, this agentkit knows {len(MIGRATIONS)}; upgrade agentkit"
        )
    for number, step in enumerate(MIGRATIONS, start=1):
        if number not in taken:
            step(connection)
            connection.execute(_STEPS.insert().values(step=number))


def insert_new(connection: Connection, into: TableClause, **values: Any) -> bool:
    """Insert a row within the transaction; False where one of its keys is taken."""
    try:
        with connection.begin_nested():
            connection.execute(into.insert().values(**values))
    except IntegrityError:
        return False
    return True
