"""What RUNLOG.md shows is run, and what it says of views is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT
from log_files import run, write

from agentkit_tracking.runlog import RunLog
from agentkit_tracking.runlog.retention import compact

TEXT = (ROOT / "tracking" / "RUNLOG.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunLog:
    """Runs in an archive, in the database and in a segment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGENTKIT_HOME", ".agentkit")
    log = RunLog()
    write(log, run("archived"), days=9)
    compact(log, 5)
    write(log, run("folded"))
    log.fold()
    write(log, run("fresh"))
    return log


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run_and_find_something(log: RunLog, capfd: pytest.CaptureFixture[str], block: str) -> None:
    exec(compile(block, "RUNLOG.md", "exec", dont_inherit=True), {"__name__": "runlog"})  # noqa: S102
    shown = capfd.readouterr().out
    assert "agentkit_tracking" in block or "0.5" in shown or "1.0" in shown


def test_every_column_of_a_view_is_named(log: RunLog) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| (.*) \|$", TEXT, re.M))
    named = {view: set(re.findall(r"`(\w+)`", columns)) for view, columns in rows.items() if view != "variable"}
    named["runs"] |= named["outcomes"] - {"outcomes"}
    named["events"] |= named["outcomes"] | named["steps"] | named["feedback"]
    for view in ("outcomes", "runs", "steps", "feedback", "events"):
        columns = set(log.sql(f"SELECT * FROM {view} LIMIT 0").columns)
        assert columns <= named[view], view
