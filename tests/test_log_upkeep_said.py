"""What the commands of upkeep say of what they did."""

from __future__ import annotations

from pathlib import Path

from forwarded import Kept
from log_files import run, write
from typer.testing import CliRunner

from agentkit.callers import Caller
from agentkit_pipelines.cli import app
from agentkit_tracking import keys
from agentkit_tracking.forwarding.consumer import Consumer
from agentkit_tracking.runlog import RunLog


def test_an_erasure_says_what_it_took_out_of_callers(own_home: Path) -> None:
    log = RunLog()
    write(log, run("top"), run("anna", Caller("anna").user_hash, parent="top"))
    done = CliRunner().invoke(app, ["log", "erase", "anna", "--why", "asked", "--yes"])
    assert "private parts of 4 events of 1 runs and of 1 that called them, and 0 traces, are gone" in done.output
    assert "other machines" not in done.output


def test_a_prune_says_what_was_never_forwarded(own_home: Path) -> None:
    keys.create("Ada")
    log = RunLog()
    write(log, run("forwarded"), run("evaluated", kind="evaluation"), days=9)
    Consumer(log, Kept()).forward()
    write(log, run("late"), run("rehearsed", kind="evaluation"), days=9)
    write(log, run("recent"))

    def pruned(*arguments: str, answer: str | None = None) -> str:
        return CliRunner().invoke(app, ["log", "prune", "--older-than", "3", *arguments], input=answer).output

    told = "! kept has not got 1 of the runs that go, and never will once they are gone; first `agentkit forward kept`"
    asked = pruned(answer="n\n")
    assert asked.index(told) < asked.index("Remove everything logged before")
    Consumer(log, Kept()).forward()
    assert "has not got" not in pruned(answer="n\n")
    (log.folder / "consumers" / "kept.json").write_bytes(b"damaged")  # all is forwarded again
    assert "kept has not got 2 of the runs" in pruned("--yes")
    assert log.sql("SELECT run_id FROM runs")["run_id"].to_list() == ["recent"]


def test_a_prune_of_what_nobody_forwards_warns_of_nothing(own_home: Path) -> None:
    keys.create("Ada")
    write(RunLog(), run("old"), days=9)
    done = CliRunner().invoke(app, ["log", "prune", "--older-than", "3", "--yes"])
    assert "4 events of 1 day are gone" in done.output
    assert "forward" not in done.output
