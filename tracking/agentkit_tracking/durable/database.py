"""Where durable runs are kept: DBOS's own tables in a SQLite file in the home, or on PostgreSQL."""

from __future__ import annotations

import math
import os
import sqlite3
from pathlib import Path
from typing import Any, cast

import orjson
from dbos import DBOSClient, WorkflowStatus
from dbos import DBOSPortableJSONSerializer as PortableJSON  # the default is pickle, which executes what it reads
from dbos._serialization import DefaultSerializer

from agentkit.errors import UsageError
from agentkit.records import RunRecord
from agentkit_tracking.durable.alive import Files, Register, Sessions
from agentkit_tracking.durable.entries import step_of
from agentkit_tracking.durable.works import Order
from agentkit_tracking.home import file_lock, home

URL_ENV = "AGENTKIT_DURABLE"
WORKFLOW = "agentkit.run"  # the one kind of workflow there is
QUEUE = "default"  # where runs that were started without a queue wait once their process is dead
_SQLITE = "sqlite:///"


def _refuse_pickle(text: str) -> Any:
    """Each row names its own format, so the choice of ours alone would leave it to whoever can write the database."""
    raise ValueError(
        "this row of the database of durable runs is a pickle, which agentkit never writes: it is not read"
    )


DefaultSerializer.deserialize = staticmethod(_refuse_pickle)  # type: ignore[method-assign, assignment]


def database_url(given: str | None = None) -> str:
    """The address of the database of durable runs, for psycopg where it is PostgreSQL."""
    url = given or os.environ.get(URL_ENV) or f"sqlite:///{home() / 'durable.db'}"
    if url.startswith("sqlite:///") and len(url) > len("sqlite:///"):
        return f"sqlite:///{Path(url.removeprefix('sqlite:///')).absolute()}"
    if url.startswith(("postgresql:", "postgresql+", "postgres:")):
        return f"postgresql+psycopg:{url.partition(':')[2]}"
    raise UsageError(f"durable runs are kept in sqlite:///PATH or postgresql://…, not in {shown(url)!r}")


def shown(url: str) -> str:
    """An address without its password."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url.partition(":")[0]


def register_of(url: str, executor: str) -> Register:
    """Who is alive among those that use a database."""
    path = sqlite_file(url)
    return Sessions(url, executor) if path is None else Files(path.with_name(f"{path.name}.executors"), executor)


def sqlite_file(url: str) -> Path | None:
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


def create(url: str) -> None:
    """A SQLite file gets a write-ahead log, which stays: a checkpoint costs a third, and readers wait for nobody."""
    path = sqlite_file(url)
    if path is None or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(path.with_name(f".{path.name}.lock")):
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.close()


def client_of(url: str) -> DBOSClient:
    """A client that reads and steers runs, and carries out none. A server that does not answer is an error at once."""
    return DBOSClient(
        system_database_url=url, serializer=PortableJSON(), application_name="agentkit", retry_connection_errors=False
    )


def queue_of(queue: str, worker: str) -> str:
    """One for each kind of work: a process listens to what it can do."""
    return f"{queue}/{worker}"


def left_on(found: WorkflowStatus) -> str:
    """The queue from which a run is taken up."""
    name = found.queue_name or ""
    return name if "/" in name else queue_of(QUEUE, order_in(found).worker)


def order_in(found: WorkflowStatus) -> Order:
    assert found.input is not None
    return Order(**found.input["args"][0])


def find(client: DBOSClient, run_id: str) -> WorkflowStatus:
    found = client.list_workflows(workflow_ids=[run_id], name=WORKFLOW)
    if not found:
        raise UsageError(f"there is no durable run {run_id!r}; see `agentkit runs`")
    return found[0]


def checkpoints(client: DBOSClient, run_id: str, first: int) -> list[tuple[str, dict[str, Any]]]:
    """Name and content of a run's checkpoints from a place on."""
    steps = client.list_workflow_steps(run_id)[first:]
    return [(step["function_name"], step["output"]) for step in steps if isinstance(step["output"], dict)]


def recorded(client: DBOSClient, run_id: str) -> list[str]:
    """The names of a run's checkpoints, in order."""
    return [step["function_name"] for step in client.list_workflow_steps(run_id, load_output=False)]


def stored(record: RunRecord) -> dict[str, Any]:
    """A record as data; `record_of` is the counterpart."""
    return cast("dict[str, Any]", orjson.loads(record.to_json()))


def record_of(data: Any) -> RunRecord:
    """The record of what `stored` has made."""
    usd = math.nan if data["usd"] is None else data["usd"]  # unknown: JSON has no NaN
    return RunRecord(**{**data, "usd": usd, "steps": [step_of(step) for step in data["steps"]]})
