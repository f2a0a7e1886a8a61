"""The operations page and the cost model over ten million events (about a million runs) in the run log's database.

python tests/benchmarks/operations_page.py [--runs 1000000] [--folder FOLDER]     # a folder is kept, and used again
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from log_data import END, fill
from rich.console import Console
from rich.table import Table

from agentkit_tracking import costs, operations
from agentkit_tracking.operations import Filter, queries
from agentkit_tracking.operations.filters import DAY
from agentkit_tracking.runlog import RunLog

ROUNDS = 5


def measure(note: Callable[..., None], runs: int = 1_000_000, folder: Path | None = None) -> None:
    """Median milliseconds: waited, and of the processor (all threads), which a busy machine changes less."""
    with tempfile.TemporaryDirectory() as scratch:
        place = folder or Path(scratch)
        log = RunLog(place) if (place / "log.duckdb").exists() else fill(place, runs=runs)
        started = time.perf_counter()
        with log.connection() as opened:
            note("open the log", f"{(time.perf_counter() - started) * 1e3:.0f} ms", "")
            whole, month = Filter(), Filter(since=END - timedelta(days=30), until=END)
            events = opened.sql("SELECT count(*) AS n FROM events").pl()["n"].item()
            size = f"{events / 1e6:.1f} M events"
            for name, aim, work in (
                (f"operations page, {size}, 90 days", "aim ≤ 1 s", lambda: operations.look(opened, whole)),
                ("  30 days and the 30 before", "", lambda: operations.look(opened, month)),
                ("  what can be chosen", "", lambda: operations.choices(opened)),
                ("  cells (rates and costs)", "", lambda: queries.cells(opened, whole, DAY)),
                ("  what people said", "", lambda: queries.told(opened, whole, DAY)),
                ("  latency over time", "", lambda: queries.latency(opened, whole, DAY)),
                ("  latency of versions", "", lambda: queries.latency_of_versions(opened, whole)),
                ("  tools", "", lambda: queries.tools(opened, whole)),
                ("  decisions", "", lambda: queries.decisions(opened, whole, DAY)),
                ("  budgets", "", lambda: queries.budget(opened, whole)),
                ("  unfinished", "", lambda: queries.unfinished(opened, whole)),
                ("  sample of inputs", "", lambda: queries.inputs(opened, whole, runs, 400)),
                ("cost model: 100,000 tasks", "", lambda: costs.tasks(opened)),
            ):
                waited, used = timed(work)
                note(name, f"{waited:.0f} ms", f"processor {used:.0f} ms", aim)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Median milliseconds of one call, by the clock and of the processor, after one to warm up."""
    work()
    spent = []
    for _ in range(ROUNDS):
        clock, processor = time.perf_counter(), time.process_time()
        work()
        spent.append((time.perf_counter() - clock, time.process_time() - processor))
    return statistics.median(s[0] for s in spent) * 1e3, statistics.median(s[1] for s in spent) * 1e3


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    table = Table("what", "waited", "", "aim")
    measure(lambda *cells: table.add_row(*cells), given.runs, given.folder)
    Console().print(table)
