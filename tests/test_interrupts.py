"""An interrupt at any point of a run: what the log holds of it, it holds once; and a run that forks has one end."""

from __future__ import annotations

import dis
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import polars as pl
import pytest
from hedgehogs import doing
from log_files import run as record

import agentkit as ak
from agentkit import runs, sinks
from agentkit_tracking.runlog import RunLog, log, segments
from agentkit_tracking.runlog.status import status
from agentkit_tracking.runlog.verification import verify

# Where a run is handed over and written; what happens before changes nothing that outlives the run.
WATCHED = {module.__file__ for module in (runs, sinks, log, segments)}
OF_RUNS = ("to", "carry_out", "timed", "_over", "hand_over", "<listcomp>", "<genexpr>")


@ak.tool
def look(place: str) -> str:
    """Look somewhere."""
    return place


def work(run: ak.Run) -> Any:
    run.decide("way", "left", "it is shorter")
    return run.call(look, place="A")


@cache
def _releases(code: CodeType) -> frozenset[int]:
    """Where a `with` is left: CPython looks for signals nowhere between the body and `__exit__`, but traces a line there."""
    found = list(dis.get_instructions(code))
    exits = [
        place
        for place in range(len(found) - 2)
        if all(i.opname == "LOAD_CONST" and i.argval is None for i in found[place : place + 3])
    ]
    # With something to return, it is moved out of the way first.
    return frozenset(found[place - moved].offset for place in exits for moved in (0, found[place - 1].opname == "SWAP"))


@contextmanager
def interrupted(at: int) -> Iterator[list[int]]:
    """`KeyboardInterrupt` instead of the line that is executed as number `at`; counts the lines."""
    lines = [0]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if code.co_filename not in WATCHED or (code.co_filename == runs.__file__ and code.co_name not in OF_RUNS):
            return None
        if event == "line" and frame.f_lasti not in _releases(code):
            lines[0] += 1
            if lines[0] == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


def test_an_interrupt_at_any_line_leaves_no_step_twice_and_none_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTKIT_LOG_SYNC", "off")
    system = doing(work, look)
    assert system.run(text="x").state == "DONE"  # what is done once is done
    with interrupted(-1) as lines:
        system.run(text="x")
    stopped = 0
    for at in range(1, lines[0] + 1):
        try:
            with interrupted(at):  # in a context of its own: `reset` is a line, too, though no signal comes before it
                copy_context().run(system.run, text="x")
        except KeyboardInterrupt:
            stopped += 1
    assert stopped == lines[0]
    found = RunLog().sql(
        """SELECT run_id, count(*) FILTER (type = 'run') AS began, count(*) FILTER (type = 'outcome') AS ended,
            count(step) AS steps, count(DISTINCT step) AS places, max(step) AS last FROM events
        WHERE run_id IS NOT NULL GROUP BY run_id"""
    )
    assert found.height > lines[0] / 2  # those interrupted before they were to be kept are not there
    twice = found.filter((pl.col("began") != 1) | (pl.col("ended") > 1) | (pl.col("steps") != pl.col("places")))
    assert twice.is_empty(), twice
    ended = found.filter(pl.col("ended") == 1)
    assert ended.height > lines[0] / 2
    assert ended.filter(pl.col("steps") != pl.col("last")).is_empty()  # none is left out
    assert verify(RunLog()).is_whole


# ---- forks

FORKING = """
import os, sys, warnings
from hedgehogs import doing
from log_files import run as record
import agentkit as ak
from agentkit_tracking.runlog import RunLog

warnings.simplefilter("always")

@ak.tool
def look(place: str) -> str:
    "Look somewhere."
    return place

def work(run):
    run.call(look, place="before")
    read, write = os.pipe()
    child = os.fork()
    if (child == 0) == CHILD_LAST:  # waits until the other has ended
        os.close(write)
        os.read(read, 1)
    run.decide("went on", child == 0, "")
    if child == 0 and CALLS:
        run.call(look, place="after")
    return "child" if child == 0 else "parent"

record = doing(work, look).run(text="x", kind=KIND)
RunLog().close()
if (record.output or {}).get("value") == "parent" and not CHILD_LAST:
    os.wait()
print(record.state, record.output and record.output["value"], record.error, flush=True)
"""


def forked(*, child_last: bool = False, calls: bool = False, kind: str = "run") -> list[str]:
    """What both processes say of their ends, on stdout and stderr."""
    settings = f"CHILD_LAST, CALLS, KIND = {child_last}, {calls}, {kind!r}\n"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", settings + FORKING],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [*done.stdout.splitlines(), *(line for line in done.stderr.splitlines() if "RuntimeWarning" in line)]


# The second kind is written when it ends, not as it happens. A call of a tool would be in no log, so it is refused.
@pytest.mark.parametrize(
    ("kind", "child_last", "calls", "end"), [("run", False, False, "DONE"), ("evaluation", True, True, "FAILED")]
)
def test_a_run_that_forks_ends_once_in_the_process_that_began_it(
    kind: str, child_last: bool, calls: bool, end: str
) -> None:
    *ends, warning = forked(child_last=child_last, calls=calls, kind=kind)
    of_child, of_parent = ends[::-1] if child_last else ends
    assert of_parent == "DONE parent None"
    assert of_child.startswith("FAILED None Stopped: process " if calls else "DONE child None")
    assert f"that it ended here ({end}), is recorded nowhere" in warning
    log = RunLog()
    assert log.sql("SELECT state, kind FROM outcomes").rows() == [("DONE", kind)]
    assert log.sql("SELECT output->>'value' FROM runs").item() == "parent"
    steps = log.sql("SELECT count(*) AS steps, count(DISTINCT step) AS places, max(step) AS last FROM steps").row(0)
    assert len(set(steps)) == 1
    assert log.sql("SELECT outputs FROM steps WHERE name = 'went on'").rows() == [("false",)]
    assert log.sql("SELECT inputs->>'place' FROM steps WHERE kind = 'tool'").rows() == [("before",)]


POOL = """
import os
from hedgehogs import doing
inner = doing(lambda run: "found", name="inner")
def work(run):
    for _ in range(2):
        if (child := os.fork()) == 0:
            inner.run(text="of a child")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    return inner.run(text="of the parent").output
doing(work, name="outer").run(text="x")
"""


def test_runs_that_forked_processes_begin_are_runs_of_their_own() -> None:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", POOL], check=True, timeout=120, env={**os.environ, "PYTHONPATH": path})
    log = RunLog()
    assert log.sql("SELECT count(*), count(DISTINCT run_id) FROM outcomes WHERE system = 'inner'").row(0) == (3, 3)
    assert log.sql("SELECT count(*) FROM outcomes WHERE system = 'outer'").item() == 1


def test_runs_that_have_several_ends_are_said_by_status_and_verify() -> None:
    said = RunLog()
    for run_id in ("one", "forked", "forked"):  # as an earlier version left it
        said.append(record(run_id))
    said.fold()
    assert status(said).ended_twice == 1
    report = verify(said)
    assert report.is_whole
    assert "1 runs have several ends, which all count: their program forked inside them" in report.remarks
