"""The run log beside DuckDB, SQLite and OpenTelemetry, in one run; an event counts once the write has returned.

python runlog.py
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("AGENTKIT_TRACES", "off")

EVENT = {
    "type": "tool", "run_id": "ab" * 16, "system": "support_triage", "release": "cd" * 32, "stage": "production",
    "kind": "run", "agent": "billing", "state": "EXECUTING", "step": 7, "name": "order_status", "started": 0.123456,
    "seconds": 0.0123, "usd": 0.001, "tries": 1, "result": "done",
}  # fmt: skip
PRIVATE = {"inputs": {"order_id": "A-1001"}, "outputs": {"status": "shipped", "carrier": "DHL", "items": [1, 2, 3]}}


def rate(work: Callable[[int], object], count: int, per: int = 1, rounds: int = 3) -> float:
    """The best of the rounds, in events a second."""
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        for i in range(count // per):
            work(i)
        best = max(best, count / (time.perf_counter() - start))
    return best


def segment(folder: Path) -> Any:
    from agentkit_tracking.runlog.segments import Segment

    return Segment(folder, roll_bytes=1 << 40)


def writer(folder: str, count: str) -> None:
    """A process of its own: waits for the start, writes, prints its events a second."""
    own = segment(Path(folder))
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    for _ in range(int(count)):
        own.append([(EVENT, PRIVATE)])
    print(start, time.perf_counter(), flush=True)


def four_writers(folder: Path, count: int = 60_000) -> float:
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "writer", str(folder), str(count)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    start = time.perf_counter()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
    return 4 * count / (time.perf_counter() - start)


def duckdb_autocommit(folder: Path, count: int = 300) -> float:
    import duckdb

    with duckdb.connect(str(folder / "plain.duckdb")) as connection:
        connection.execute("CREATE TABLE e (event VARCHAR, private VARCHAR)")
        row = [json.dumps(EVENT), json.dumps(PRIVATE)]
        return rate(lambda _: connection.execute("INSERT INTO e VALUES (?, ?)", row), count)


def sqlite_wal(folder: Path, count: int = 5_000) -> float:
    with sqlite3.connect(folder / "plain.db", isolation_level=None) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("CREATE TABLE e (event TEXT, private TEXT)")
        row = [json.dumps(EVENT), json.dumps(PRIVATE)]
        return rate(lambda _: connection.execute("INSERT INTO e VALUES (?, ?)", row), count)


def synced(folder: Path, count: int = 300) -> tuple[float, float]:
    """Events a second that are on the disk each, and the same bytes written to a plain file."""
    own = segment(folder / "synced")
    size = len((folder / "synced" / f"{own.id}.jsonl").read_bytes())
    own.append([(EVENT, PRIVATE)])
    line = own.path.read_bytes()[size:]
    fd = os.open(folder / "raw", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def ours(_: int) -> None:
        own.append([(EVENT, PRIVATE)])
        own.sync()

    def raw(_: int) -> None:
        os.write(fd, line)
        os.fdatasync(fd)

    best = max(((rate(ours, count, rounds=1), rate(raw, count, rounds=1)) for _ in range(7)), key=lambda pair: pair[0])
    os.close(fd)
    return best


def span_costs(folder: Path, count: int = 5_000) -> tuple[float, float]:
    """Seconds that a caller spends on a step kept in the run log, and on a span of OpenTelemetry's batch processor."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    from agentkit.records import Step
    from agentkit_tracking.runlog import RunLog

    class Nowhere(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    class Run:
        run_id, parent, system, release, stage, kind = "ab" * 16, None, "support_triage", "cd" * 32, "production", "run"
        inputs: ClassVar[dict[str, Any]] = {}
        started_at = "2026-11-20T10:00:00+00:00"

        class caller:
            user_hash = session = None

    log, run = RunLog(folder / "spans"), Run()
    inputs, outputs = PRIVATE["inputs"], PRIVATE["outputs"]
    numbers = itertools.count()  # a step that is kept already is not written again

    def ours(_: int) -> None:
        step = Step("tool", "order_status", "EXECUTING", 0.1, 0.2, "billing", inputs, outputs, tries=1)
        log.progress(run, [(next(numbers), step)])

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(Nowhere(), max_queue_size=100_000))
    tracer = provider.get_tracer("bench")

    def theirs(_: int) -> None:
        with tracer.start_as_current_span("execute_tool order_status") as span:
            span.set_attribute("gen_ai.tool.name", "order_status")
            span.set_attribute("gen_ai.agent.name", "billing")
            span.set_attribute("state", "EXECUTING")
            span.set_attribute("gen_ai.tool.call.arguments", json.dumps(inputs))
            span.set_attribute("gen_ai.tool.call.result", json.dumps(outputs))

    costs = 1 / rate(ours, count), 1 / rate(theirs, count)
    provider.shutdown()
    return costs


def fold(folder: Path, count: int = 1_000_000) -> tuple[float, float]:
    """Rows a second of a fold, and of plain DuckDB reading the same lines into a table."""
    import duckdb

    from agentkit_tracking.runlog import RunLog

    ours, theirs = 0.0, 0.0
    for turn in range(2):
        log = RunLog(folder / f"fold{turn}")
        own = segment(log.segments)
        for i in range(0, count, 20):
            some = [
                {**EVENT, "run_id": f"{(i + j) // 8:032x}", "step": (i + j) % 8, "seconds": (i + j) % 97 / 7}
                for j in range(20)
            ]
            own.append([(event, PRIVATE) for event in some])
        own.close()
        with duckdb.connect(str(folder / f"fold{turn}.duckdb")) as connection:
            start = time.perf_counter()
            files = str(log.segments / "*.jsonl")
            connection.execute(f"CREATE TABLE e AS SELECT event.*, hash, salt, private FROM read_json('{files}')")
            theirs = max(theirs, count / (time.perf_counter() - start))
        start = time.perf_counter()
        folded = log.fold()
        assert folded is not None
        assert folded.events == count + 2
        ours = max(ours, count / (time.perf_counter() - start))
        shutil.rmtree(log.folder)
    return ours, theirs


def measure(note: Callable[[str, str, str, str], None]) -> None:
    """Add the rows of this benchmark."""
    folder = Path(tempfile.mkdtemp(prefix="agentkit-bench-log-", dir=os.environ.get("AGENTKIT_BENCH_DISK")))
    try:
        (folder / "one").mkdir()
        own = segment(folder / "one")
        single = rate(lambda _: own.append([(EVENT, PRIVATE)]), 60_000)
        group = [(EVENT, PRIVATE)] * 20
        grouped = rate(lambda _: own.append(group), 200_000, per=20)
        shutil.rmtree(folder / "one")
        four = four_writers(folder / "four")
        shutil.rmtree(folder / "four")
        duck, lite = duckdb_autocommit(folder), sqlite_wal(folder)
        note(
            "events/s, a write each",
            f"{single:,.0f}",
            f"SQLite WAL {lite:,.0f}",
            f"{single / lite:.1f}× (aim ≥ 60,000/s)",
        )
        note(
            "events/s, a write each",
            f"{single:,.0f}",
            f"DuckDB autocommit {duck:,.0f}",
            f"{single / duck:.0f}× (aim ≥ 50×)",
        )
        note(
            "events/s, 20 a write",
            f"{grouped:,.0f}",
            f"a write each {single:,.0f}",
            f"{grouped / single:.2f}× (aim ≥ 150,000/s)",
        )
        note("events/s of four processes", f"{four:,.0f}", f"of one {single:,.0f}", f"{four / single:.2f}×")
        ours, raw = synced(folder)
        note(
            "events/s, each on the disk",
            f"{ours:,.0f}",
            f"plain file {raw:,.0f}",
            f"{raw / ours:.2f}× the time (aim ≤ 1.3×)",
        )
        step, span = span_costs(folder)
        note(
            "a step, for its caller",
            f"{step * 1e6:.0f} µs",
            f"OpenTelemetry batch span {span * 1e6:.0f} µs",
            f"{step / span:.2f}× (aim ≤ 2×)",
        )
        rows, plain = fold(folder)
        note("fold, rows/s", f"{rows:,.0f}", f"DuckDB read_json {plain:,.0f}", f"{rows / plain:.2f}× (aim ≥ 150,000/s)")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["writer"]:
        writer(*sys.argv[2:])
    else:
        measure(lambda *row: print(" | ".join(row)))
