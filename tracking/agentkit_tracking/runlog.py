"""The run log: every process appends to a segment of its own; DuckDB reads them all at once.

Each finished run is one line of JSON, written by one `write` to a file that no other process has open. Nothing is
locked and readers disturb no writer. A last line torn by a kill is passed over by the reader.
"""

from __future__ import annotations

import errno
import glob
import math
import os
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from agentkit.errors import AgentkitError, UsageError
from agentkit.records import RunRecord, Step
from agentkit_tracking.home import home

if TYPE_CHECKING:
    import duckdb
    import polars as pl

_STEP = (
    "STRUCT(kind VARCHAR, name VARCHAR, state VARCHAR, started DOUBLE, seconds DOUBLE, agent VARCHAR, inputs JSON, "
    "outputs JSON, model VARCHAR, tokens_in BIGINT, tokens_out BIGINT, usd DOUBLE, error VARCHAR, cached BOOLEAN, tries BIGINT)[]"
)
_COLUMNS = {
    "run_id": "VARCHAR",
    "system": "VARCHAR",
    "release": "VARCHAR",
    "kind": "VARCHAR",
    "started_at": "TIMESTAMPTZ",
    "seconds": "DOUBLE",
    "state": "VARCHAR",
    "route": "VARCHAR",
    "inputs": "JSON",
    "output": "JSON",
    "error": "VARCHAR",
    "effects": "JSON",
    "phases": "STRUCT(planning DOUBLE, execution DOUBLE, reflection DOUBLE)",
    "waited_s": "DOUBLE",
    "model_calls": "BIGINT",
    "tool_calls": "BIGINT",
    "tokens_in": "BIGINT",
    "tokens_out": "BIGINT",
    "usd": "DOUBLE",
    "parent": "VARCHAR",
    "user_hash": "VARCHAR",
    "session": "VARCHAR",
    "stage": "VARCHAR",
    "degraded": "VARCHAR",
    "partial": "JSON",
    "steps": _STEP,
}

_JSON = tuple(name for name, kind in _COLUMNS.items() if kind == "JSON")


class RunLog:
    """Appends to and reads the run log in `folder` (default: `runs` in the home)."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or home() / "runs"
        self._lock = threading.Lock()
        self._segment: tuple[int, int] | None = None  # (process id, file descriptor)

    def append(self, record: RunRecord) -> None:
        """Write one record to this process's segment.

        Raises:
            AgentkitError: the folder cannot be written; earlier records are untouched.
        """
        line = record.to_json() + b"\n"
        with self._lock:
            try:
                written = os.write(fd := self._descriptor(), line)
                if written != len(line):
                    os.ftruncate(fd, os.fstat(fd).st_size - written)  # else the next line would be torn with this one
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as e:
                raise AgentkitError(
                    f"run {record.run_id} could not be written to the run log in {self.folder}: {e.strerror}; "
                    "free space or set AGENTKIT_HOME to a folder that can be written"
                ) from e

    def _descriptor(self) -> int:
        pid = os.getpid()
        if self._segment is None or self._segment[0] != pid:  # first use, or after a fork
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{pid}-{uuid.uuid4().hex[:12]}.jsonl"
            self._segment = (pid, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        return self._segment[1]

    def close(self) -> None:
        """Close this process's segment; the next append opens another."""
        with self._lock:
            if self._segment is not None and self._segment[0] == os.getpid():
                os.close(self._segment[1])
            self._segment = None

    # ---- reading

    def _connection(self) -> duckdb.DuckDBPyConnection:
        import duckdb

        connection = duckdb.connect()
        if any(self.folder.glob("*.jsonl")):
            columns = ", ".join(f"'{name}': '{kind}'" for name, kind in _COLUMNS.items())
            pattern = os.path.join(glob.escape(str(self.folder)), "*.jsonl").replace("'", "''")
            source = (
                f"SELECT * FROM read_json('{pattern}', format='newline_delimited', ignore_errors=true, "
                f"maximum_object_size=67108864, columns={{{columns}}}) WHERE run_id IS NOT NULL"
            )
        else:
            blanks = ", ".join(f"NULL::{kind} AS {name}" for name, kind in _COLUMNS.items())
            source = f"SELECT {blanks} WHERE false"
        connection.execute(f"CREATE VIEW runs AS {source}")
        connection.execute(
            "CREATE VIEW steps AS SELECT run_id, system, release, i AS step, s.* "
            "FROM (SELECT *, generate_subscripts(steps, 1) AS i, unnest(steps) AS s FROM runs)"
        )
        return connection

    def sql(self, query: str, parameters: list[Any] | None = None) -> pl.DataFrame:
        """Query the views `runs` (one row per run) and `steps` (one per step) with DuckDB SQL.

        Raises:
            UsageError: DuckDB refuses the query; its message is passed on.
        """
        import duckdb

        with self._connection() as connection:
            try:
                answer = connection.sql(query, params=parameters)
                if answer is None:
                    raise UsageError("the query is empty; ask e.g. SELECT route, count(*) FROM runs GROUP BY route")
                frame: pl.DataFrame = answer.pl()
            except duckdb.Error as e:
                raise UsageError(f"the run log cannot answer this query: {e}") from e
        return frame

    def runs(self, limit: int | None = None) -> pl.DataFrame:
        """Runs, newest first, without their steps."""
        tail = f" LIMIT {int(limit)}" if limit is not None else ""
        return self.sql(f"SELECT * EXCLUDE (steps) FROM runs ORDER BY started_at DESC{tail}")

    def steps(self, run_id: str) -> pl.DataFrame:
        """The steps of one run, in order."""
        return self.sql("SELECT * FROM steps WHERE run_id = ? ORDER BY step", [run_id])

    def find(self, run_id: str) -> RunRecord:
        """The run whose id begins with `run_id`, whole, without the live result.

        Raises:
            UsageError: none begins so, or several do.
        """
        found = self.sql("SELECT * FROM runs WHERE starts_with(run_id, ?) LIMIT 3", [run_id]).to_dicts()
        if len(found) != 1:
            several = ", ".join(row["run_id"] for row in found)
            raise UsageError(
                f"the run log in {self.folder} has no run {run_id!r}; `agentkit log` lists them"
                if not found
                else f"{run_id!r} begins several runs, among them {several}; give more of the id"
            )
        (row,) = found
        for name in _JSON:
            row[name] = None if row[name] is None else orjson.loads(row[name])
        steps = [
            {**step, **{n: None if step[n] is None else orjson.loads(step[n]) for n in ("inputs", "outputs")}}
            for step in row.pop("steps")
        ]
        row["started_at"] = row["started_at"].isoformat()
        # What cannot be read as a number was NaN: unknown.
        row["usd"] = math.nan if row["usd"] is None else row["usd"]
        return RunRecord(
            **row, steps=[Step(**{**step, "usd": math.nan if step["usd"] is None else step["usd"]}) for step in steps]
        )


_logs: dict[tuple[str | None, str], RunLog] = {}  # by what decides where the home is


def write(record: RunRecord) -> None:
    """The sink agentkit calls for every finished run (entry point `agentkit.sinks`)."""
    place = os.environ.get("AGENTKIT_HOME"), os.getcwd()
    log = _logs.get(place)
    if log is None:
        log = _logs.setdefault(place, RunLog())
    log.append(record)
