"""What RUNLOG.md shows is run, and what it says of views is so."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import duckdb
import polars as pl
import pytest
from conftest import ROOT
from log_files import run, write

from agentkit_tracking.runlog import RunLog
from agentkit_tracking.runlog.retention import compact

TEXT = (ROOT / "tracking" / "RUNLOG.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


PLACES = {"segments": "segments/*.jsonl", "database": "log.duckdb", "archives": "archive/*/*.parquet"}


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunLog:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGENTKIT_HOME", ".agentkit")
    return RunLog()


@pytest.fixture
def log(empty: RunLog) -> RunLog:
    """Runs in an archive, in the database and in a segment."""
    write(empty, run("archived"), days=9)
    compact(empty, 5)
    write(empty, run("folded"))
    empty.fold()
    write(empty, run("fresh"))
    return empty


def execute(block: str) -> None:
    exec(compile(block, "RUNLOG.md", "exec", dont_inherit=True), {"__name__": "runlog"})  # noqa: S102


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run_and_find_something(log: RunLog, capfd: pytest.CaptureFixture[str], block: str) -> None:
    execute(block)
    shown = capfd.readouterr().out
    assert "agentkit_tracking" in block or "0.5" in shown or "1.0" in shown


def fresh(log: RunLog) -> None:
    write(log, run("fresh"))


def folded(log: RunLog) -> None:
    write(log, run("folded"))
    log.close()
    log.fold()


def archived(log: RunLog) -> None:
    write(log, run("archived"), days=9)
    log.close()
    compact(log, 5)


@pytest.mark.parametrize(
    ("make", "there"),
    [(fresh, {"segments"}), (folded, {"database"}), (archived, {"database", "archives"})],
)
@pytest.mark.parametrize("block", [block for block in BLOCKS if "agentkit_tracking" not in block])
def test_a_block_of_other_tools_reads_one_place_and_runs_while_that_is_there(
    empty: RunLog, make: Callable[[RunLog], None], there: set[str], block: str
) -> None:
    """When that is stands before the blocks; what follows "On" or "Plain …, on" says which place it is."""
    make(empty)
    assert {name for name, pattern in PLACES.items() if any(empty.folder.glob(pattern))} == there
    [place] = [name for name, pattern in PLACES.items() if f".agentkit/log/{pattern}" in block]
    assert re.search(rf"\b[Oo]n (the )?{place}\b[^\n]*\n\n```python\n{re.escape(block)}", TEXT)
    if place in there:
        execute(block)
    else:
        fails = pytest.raises((duckdb.IOException, OSError, pl.exceptions.PolarsError))
        with nullcontext() if "scan_ndjson" in block else fails:
            execute(block)


def test_every_column_of_a_view_is_named(log: RunLog) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| (.*) \|$", TEXT, re.M))
    named = {view: set(re.findall(r"`(\w+)`", columns)) for view, columns in rows.items() if view != "variable"}
    named["runs"] |= named["outcomes"] - {"outcomes"}
    named["events"] |= named["outcomes"] | named["steps"] | named["feedback"]
    for view in ("outcomes", "runs", "steps", "feedback", "events"):
        columns = set(log.sql(f"SELECT * FROM {view} LIMIT 0").columns)
        assert columns <= named[view], view
