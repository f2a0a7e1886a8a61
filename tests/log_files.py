"""For the tests of the run log's upkeep: logs of past days, and what lies in each of its places as rows to change."""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from agentkit.records import RunRecord, Step
from agentkit_tracking.runlog import RunLog, events
from agentkit_tracking.runlog.segments import START, Finding, lines

Row = dict[str, Any]
Edit = Callable[[list[Row]], None]


def ago(days: float) -> datetime:
    """This time of the day, so many days ago."""
    return datetime.now(UTC) - timedelta(days=days)


def write(log: RunLog, *records: RunRecord, days: float = 0) -> None:
    """Append runs as if that many days ago, not before what was appended last."""
    stamp = ago(days).isoformat(timespec="microseconds")
    for one in records:
        new = events.finished(one, None, events.payloads())
        log.write([({**event, "logged_at": stamp}, private) for event, private in new], sync=False)


def run(run_id: str, user_hash: str | None = None, **values: Any) -> RunRecord:
    """A run of two steps with something private in each."""
    steps = [
        Step("model", "m", "PLANNING", 0.0, 0.1, None, f"secret of {run_id}", ["answer"], "m", 5, 1, 0.5),
        Step("transition", "DONE", "PLANNING", 0.1),
    ]
    fields: dict[str, Any] = {
        "run_id": run_id, "system": "s", "release": None, "kind": "run", "started_at": "2026-11-20T10:00:00+00:00",
        "seconds": 1.5, "state": "DONE", "route": "billing", "inputs": {"text": f"secret of {run_id}"}, "output": {},
        "error": None, "effects": [], "phases": {}, "waited_s": 0.0, "model_calls": 1, "tool_calls": 0, "tokens_in": 5,
        "tokens_out": 1, "usd": 0.5, "steps": steps, "user_hash": user_hash,
    }  # fmt: skip
    return RunRecord(**{**fields, **values})


_made: dict[str, Path] = {}


def as_made_once(home: Path, name: str, make: Callable[[], object]) -> None:
    """Have `make` fill a home, and close what it wrote; for whoever asks for the same `name` later, copy what it made."""
    if name in _made:
        shutil.copytree(_made[name], home, dirs_exist_ok=True)
        return
    make()
    _made[name] = Path(tempfile.mkdtemp(prefix="agentkit-log-"))
    atexit.register(shutil.rmtree, _made[name], ignore_errors=True)
    shutil.copytree(home, _made[name], dirs_exist_ok=True)


# ---- each place as rows: the event's text and what belongs to it; in tables also its columns


def edit_file(path: Path, edit: Edit) -> None:
    """Change the lines of a segment file; lengths and checksums are made to fit."""
    rows = []
    for line in lines(path.read_bytes()):
        assert not isinstance(line, Finding)
        rows.append(
            {"n": line.n, "event": line.event.decode(), "private": line.private.decode(), "salt": line.salt.decode(),
             "hash": line.digest.decode()}
        )  # fmt: skip
    edit(rows)
    content = b""
    for row in rows:
        rest = '"hash":"{hash}","salt":"{salt}","event":{event},"private":{private}}}'.format(**row).encode()
        content += b'{"len":%9d,"crc":"%08x",%b\n' % (len(rest), zlib.crc32(rest), rest)
    path.write_bytes(content)


def edit_database(log: RunLog, edit: Edit, segment: str | None = None) -> None:
    """Change the rows of the table `events`, of one segment or of all."""
    with duckdb.connect(str(log.database.path)) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        mine = "segment = ?" if segment else "? IS NULL"
        table = connection.sql(
            f"SELECT * FROM events WHERE {mine} ORDER BY segment, n", params=[segment]
        ).to_arrow_table()
        rows = table.to_pylist()
        edit(rows)
        connection.execute(f"DELETE FROM events WHERE {mine}", [segment])
        changed = pa.Table.from_pylist(rows, table.schema)
        connection.register("changed", changed)
        connection.execute("INSERT INTO events BY NAME SELECT * FROM changed")


def edit_archive(log: RunLog, file: Path, edit: Edit) -> None:
    """Change the rows of a Parquet file; the database is told its new SHA-256, as a careful attacker does."""
    table = pq.ParquetFile(file).read()
    rows = table.to_pylist()
    edit(rows)
    schema = pa.schema([field.with_nullable(True) for field in table.schema])
    pq.write_table(pa.Table.from_pylist(rows, schema), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    change(log, "UPDATE archives SET sha256 = ? WHERE file = ?", digest, str(file.relative_to(log.folder)))


def change(log: RunLog, statement: str, *parameters: Any) -> None:
    """SQL straight in the database file."""
    with duckdb.connect(str(log.database.path)) as connection:
        connection.execute(statement, list(parameters) or None)


def rehash(rows: list[Row]) -> None:
    """Recompute numbers and hashes from the first row on, as who forges does."""
    before = START
    for n, row in enumerate(rows):
        row["n"] = n
        before = hashlib.sha256((before + row["event"]).encode()).hexdigest()
        row["hash"] = before


def in_process(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Python in a process of its own, which sees the test helpers."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
