"""What the commands of upkeep say of what they did."""

from __future__ import annotations

from pathlib import Path

from log_files import run, write
from typer.testing import CliRunner

from agentkit.callers import Caller
from agentkit_pipelines.cli import app
from agentkit_tracking.runlog import RunLog


def test_an_erasure_says_what_it_took_out_of_callers(own_home: Path) -> None:
    log = RunLog()
    write(log, run("top"), run("anna", Caller("anna").user_hash, parent="top"))
    done = CliRunner().invoke(app, ["log", "erase", "anna", "--why", "asked", "--yes"])
    assert "private parts of 4 events of 1 runs and of 1 that called them, and 0 traces, are gone" in done.output
    assert "other machines" not in done.output
