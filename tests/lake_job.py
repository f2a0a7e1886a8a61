"""Machines that have a lake, run with the Python that has DuckDB's extensions for it.

    python lake_job.py SOCKET

Each connection is one process of a machine: `{"folder": …, "environment": {…}, "do": ["erase", "anna"], "die": null}`. It is
forked from one that has imported everything, says its number, does what it is told, and says what came of it, a line of JSON each.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy  # noqa: F401
import polars  # noqa: F401
import pyarrow  # noqa: F401

from agentkit.errors import AgentkitError
from agentkit_tracking.runlog import RunLog, erasure, folding, heads, lake, lake_upkeep, retention, verification  # noqa: F401
from agentkit_tracking.runlog.database import transaction
from agentkit_tracking.runlog.lake import Lake
from agentkit_tracking.runlog.migrations import MIGRATIONS, ZSTD


class Machine:
    """What it can do; each method is an instruction."""

    def __init__(self, folder: Path, answers: TextIO) -> None:
        self.log, self.answers = RunLog(folder), answers

    def say(self, answer: Any) -> None:
        print(json.dumps(answer, default=str), file=self.answers, flush=True)

    def fold(self) -> Any:
        folded = self.log.fold()
        return [folded and folded.events, folded and folded.busy]

    def fold_slowly(self) -> Any:
        """Read what there is to fold, say so, and store it once the file `go` is there."""
        parsed = folding._parsed

        def slowly(batches: Any) -> Any:
            for batch in parsed(batches):
                if not (self.log.folder / "go").exists():
                    self.say("read")
                while not (self.log.folder / "go").exists():
                    time.sleep(0.01)
                yield batch

        folding._parsed = slowly
        return self.fold()

    def fold_for_ever(self) -> None:
        while True:
            self.fold()
            time.sleep(0.05)

    def ask(self, query: str) -> Any:
        return self.log.sql(query).rows()

    def try_each(self, *queries: str) -> Any:
        """What is said of each; null where it is answered."""
        said: list[str | None] = []
        for query in queries:
            try:
                self.log.sql(query)
                said.append(None)
            except AgentkitError as e:
                said.append(str(e))
        return said

    def verify(self) -> Any:
        report = verification.verify(self.log)
        return {"faults": list(map(str, report.faults)), "remarks": report.remarks, "events": report.events}

    def erase(self, user: str) -> Any:
        return asdict(erasure.erase_user(self.log, user, why="asked for it", by="Ada"))

    def compact(self) -> Any:
        return asdict(retention.compact(self.log, 0))

    def prune(self, days: int) -> Any:
        return asdict(retention.prune(self.log, days))

    def command(self, *arguments: str) -> Any:
        """What a command line prints, in the home of this machine."""
        from typer.testing import CliRunner

        from agentkit_pipelines.cli import app

        os.environ["AGENTKIT_HOME"] = str(self.log.folder.parent)
        done = CliRunner().invoke(app, arguments)
        return [done.exit_code, done.output]

    def change(self, statement: str) -> None:
        """SQL straight in the lake, as whoever has its address can."""
        assert isinstance(self.log.database, Lake)
        with self.log.database.writing() as connection:
            connection.execute(statement).fetchall()

    def hold(self, seconds: float) -> None:
        """Read for so long."""
        with self.log.connection() as connection:
            connection.execute("SELECT count(*) FROM events").fetchall()
            self.say("reading")
            time.sleep(seconds)

    def make_old(self, version: int, row: str) -> None:
        """A lake as it was at that version of the schema, with what the statement `row` puts there."""
        assert isinstance(self.log.database, Lake)
        with self.log.database._attached() as connection:
            for number in range(1, version + 1):
                with transaction(connection):
                    for statement in MIGRATIONS[number]:
                        connection.execute(statement.replace(ZSTD, ""))
                    connection.execute("INSERT INTO log.migrations VALUES (?, now())", [number])
            connection.execute(row)


def die_before(place: str, word: str) -> None:
    """Be killed where that function is called with an argument that has the word."""
    module_name, name = place.split(".")
    module = sys.modules[f"agentkit_tracking.runlog.{module_name}"]
    before: Callable[..., Any] = getattr(module, name)

    def dying(*arguments: Any, **named: Any) -> Any:
        if word in str(arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return before(*arguments, **named)

    setattr(module, name, dying)


def work(stream: TextIO) -> None:
    """Be one process of a machine."""
    asked = json.loads(stream.readline())
    os.environ.update(asked["environment"])
    folder = Path(asked["folder"])
    socket.gethostname = lambda: folder.parent.name
    machine = Machine(folder, stream)
    machine.say(os.getpid())
    if asked["die"]:
        die_before(*asked["die"])
    name, *arguments = asked["do"]
    try:
        machine.say(getattr(machine, name)(*arguments))
    except AgentkitError as e:
        machine.say({"error": type(e).__name__, "said": str(e)})
    except Exception:
        machine.say({"error": "crash", "said": traceback.format_exc()})
    machine.log.close()


def main(address: str) -> None:
    for name in ("ducklake", "postgres_scanner", "httpfs"):
        with lake._connected(name):
            pass
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                server.close()
                with connection, connection.makefile("rw") as stream:
                    work(stream)
                os._exit(0)
            connection.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
