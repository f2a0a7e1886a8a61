"""Forwarding by real processes: a burst, kills at any moment, forks, the end of a process, several at once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SOAK
from forwarded import SPANS, keep, own_log, spans_in_database, traces_of
from releases import furnish

from agentkit_tracking import traces
from agentkit_tracking.runlog import RunLog

pytestmark = [pytest.mark.slow]
HERE = Path(__file__).parent


@pytest.fixture
def log(own_home: Path) -> Iterator[RunLog]:
    furnish(own_home)
    with own_log() as log:
        yield log


def started(script: str, **environment: str) -> subprocess.Popen[str]:
    """A process of its own that can import the tests' helpers."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "PYTHONPATH": str(HERE), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(script: str, **environment: str) -> str:
    process = started(script, **environment)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    assert "Traceback" not in err, err[-3000:]
    return out


def check_whole(home: Path, ids: list[str]) -> None:
    """Each run has one trace with all its spans."""
    assert spans_in_database(home / "mlflow.db") == {traces.trace_id(run_id): SPANS for run_id in ids}


def test_a_burst_loses_nothing(log: RunLog, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4,000 runs as fast as they come; of so many MLflow's own queue dropped three in four."""
    from agentkit_tracking.forwarding import background

    monkeypatch.setenv("AGENTKIT_TRACES", "on")
    background.start(log)
    ids = keep(log, 4000)
    assert traces.flush(200)
    check_whole(own_home, ids)


FORWARD = """
import time
from agentkit_tracking.forwarding import consumer
from agentkit_tracking.forwarding.mlflow_target import MlflowTarget
from agentkit_tracking.home import open_stores
from agentkit_tracking.runlog import RunLog
from agentkit_tracking.runlog.database import lease

consumer.BATCH = 20
target = MlflowTarget()
open_stores(target._uri, target._registry, target._folder)
log = RunLog()
with lease(log.folder / "consumers", target.name) as mine:
    assert mine
    print("ready", flush=True)
    one = consumer.Consumer(log, target)
    while True:
        one.forward()
        if not one.has_news():
            break
print("done", flush=True)
"""


def test_kills_at_any_moment_leave_one_whole_trace_a_run(log: RunLog, own_home: Path) -> None:
    ids = keep(log, 1500 if SOAK else 400)
    log.close()
    dice = random.Random(7)
    for _ in range(40 if SOAK else 4):
        process = started(FORWARD)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1][-2000:]
        time.sleep(dice.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    at_last = spans_in_database(own_home / "mlflow.db")
    assert set(at_last.values()) <= {SPANS}, "a trace is there whole or not at all"
    assert finished(FORWARD) == "ready\ndone\n"
    check_whole(own_home, ids)


RUNS = """
import os, sys
from forwarded import keep
from agentkit_tracking import traces
from agentkit_tracking.runlog import own
from agentkit_tracking.forwarding import background

def run(count):
    background.start(own())
    print(*keep(own(), count), flush=True)
"""


def test_what_is_left_at_the_end_of_a_process_is_forwarded(log: RunLog, own_home: Path) -> None:
    ids = finished(RUNS + "run(300)", AGENTKIT_TRACES="on").split()
    check_whole(own_home, ids)


def test_what_a_killed_process_left_is_forwarded_by_the_next(log: RunLog, own_home: Path) -> None:
    killed = started(RUNS + "run(300)\nos.kill(os.getpid(), 9)", AGENTKIT_TRACES="on")
    first = killed.communicate(timeout=100)[0].split()
    assert killed.returncode == -9
    assert len(first) == 300
    second = finished(RUNS + "run(10)", AGENTKIT_TRACES="on").split()
    check_whole(own_home, [*first, *second])


def test_a_fork_forwards_for_itself(log: RunLog, own_home: Path) -> None:
    """The child, too, has a thread; parent's thread, lease and connections are not used by it."""
    script = RUNS + (
        "run(50)\n"
        "assert traces.flush(100)\n"
        "run(50)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    assert background._running == {}\n"
        "    run(50)\n"
        "    ok = traces.flush(100)\n"
        "    os._exit(0 if ok else 1)\n"
        "run(50)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "run(50)\n"
        "assert traces.flush(100)\n"
    )
    ids = finished(script, AGENTKIT_TRACES="on").split()
    assert len(ids) == 250
    check_whole(own_home, ids)


def test_a_lease_that_was_held_at_a_fork_ends_with_its_holder(log: RunLog) -> None:
    script = (
        "import os, time\n"
        "from contextlib import ExitStack\n"
        "from forwarded import Kept\n"
        "from agentkit_tracking.forwarding import background\n"
        "from agentkit_tracking.runlog import own\n"
        "from agentkit_tracking.runlog.database import lease\n"
        "target = Kept()\n"
        "background.target_class = lambda name: lambda: target\n"
        "(one,) = background.start(own())\n"
        "held = one._held.enter_context(lease(own().folder / 'consumers', 'x'))\n"
        "assert held\n"
        "read, write = os.pipe()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os.close(write)\n"
        "    os.read(read, 1)\n"
        "    os._exit(0)\n"
        "one._held.close()\n"
        "for _ in range(200):\n"  # until the child has come to run
        "    with lease(own().folder / 'consumers', 'x') as mine:\n"
        "        if mine:\n"
        "            break\n"
        "    time.sleep(0.05)\n"
        "assert mine, 'the child still holds it'\n"
        "os.write(write, b'.')\n"
        "os.waitpid(child, 0)\n"
    )
    finished(script, AGENTKIT_TRACES="on")


def test_processes_side_by_side_make_one_trace_a_run(log: RunLog, own_home: Path) -> None:
    processes = [started(RUNS + "run(150)", AGENTKIT_TRACES="on") for _ in range(3)]
    ids: list[str] = []
    for process in processes:
        out, err = process.communicate(timeout=250)
        assert process.returncode == 0, err[-2000:]
        ids += out.split()
    finished(RUNS + "assert traces.flush(100)", AGENTKIT_TRACES="on")  # what the others left, if anything
    check_whole(own_home, ids)
    assert len(traces_of(include_spans=False)) == 450
