"""Durable runs in processes that are killed with SIGKILL at random times; effects in a real store outside."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import SOAK
from durable_runs import opened
from postgres import postgresql

pytest.importorskip("dbos")

import durable_worker as worker

from agentkit.records import RunRecord
from agentkit_tracking import durable
from agentkit_tracking.runlog import RunLog

WORKER = Path(__file__).with_name("durable_worker.py")


def logged(home: Path) -> list[dict[str, Any]]:
    return RunLog(home / "log").sql("SELECT * FROM outcomes").to_dicts()


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store of the worker processes."""
    path = tmp_path / "outside.db"
    monkeypatch.setenv("WORKER_STORE", str(path))
    worker.create()
    return path


def rows(query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    with worker.opened() as connection:
        return connection.execute(query, parameters).fetchall()


@contextmanager
def process(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "error", str(WORKER), *arguments]
    started = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def uninterrupted(*arguments: str, **environment: str) -> str:
    with process(*arguments, **environment) as started:
        said, problem = started.communicate(timeout=240)
        assert started.returncode == 0, problem
        # People are told of effects in doubt, in the log as well.
        assert not [line for line in problem.splitlines() if line and not line.startswith("unknown steps, run")]
        return said


def killed_until_done(action: str, kills: int, span_s: float, dice: random.Random, **environment: str) -> list[str]:
    """Run after run, two at a time, killed at random times; returns the ids of the runs.

    Every other time counts from the start of the process, the others from when it has opened the runner: importing takes
    as long as a run does.
    """
    ids: list[str] = []
    while kills > 0:
        pair = [f"{action}{len(ids)}", f"{action}{len(ids) + 1}"]
        ids += pair
        for turn in range(12):
            if kills <= 0:
                break
            with process(action, *pair, **environment) as started:
                if turn % 2:
                    assert started.stdout is not None
                    assert started.stdout.readline() == "open\n"
                try:
                    started.wait(dice.uniform(0, span_s / 2 if turn % 2 else span_s))
                    assert started.returncode == 0, started.communicate()[1]
                    break  # it was faster
                except subprocess.TimeoutExpired:
                    started.send_signal(signal.SIGKILL)
                    kills -= 1
        uninterrupted(action, *pair, **environment)
    return ids


def records_of(ids: list[str]) -> dict[str, RunRecord]:
    with opened() as runner:
        return {run_id: runner.handle(run_id).result(timeout_s=30) for run_id in ids}


def check_runs(ids: list[str], home: Path, *, absent: bool = False) -> Counter[str]:
    """Every run is there and whole, every effect once or flagged; returns what was counted."""
    found: Counter[str] = Counter(runs=len(ids))
    assert Counter(line["run_id"] for line in logged(home)) == Counter(ids)  # each in the run log, once
    for run_id, record in records_of(ids).items():
        assert record.state == "DONE", (run_id, record.error)
        tools = [s for s in record.steps if s.kind == "tool"]
        assert [s.name for s in tools] == [worker.TOOLS[n % 3].name for n in range(worker.STEPS)]
        assert record.output is not None
        assert record.output["used"] == worker.STEPS
        assert rows("SELECT n FROM keyed WHERE run = ? ORDER BY n", run_id) == [(1,), (4,), (7,)]
        sent = Counter(n for (n,) in rows("SELECT n FROM appended WHERE run = ?", run_id))
        for n in (2, 5, 8):
            if record.output["found"][n] == "unknown: True":
                assert absent
                assert sent[n] <= 1
                found["left unknown"] += 1
            else:
                assert sent[n] == 1, (run_id, n, sent)
    found["in doubt, asked"] = len(rows("SELECT DISTINCT key FROM asked WHERE doubt"))
    found["keyed writes repeated"] = rows("SELECT (SELECT count(*) FROM calls WHERE tool = 'put')")[0][0] - 3 * len(ids)
    return found


@pytest.mark.slow
@pytest.mark.timeout(7200 if SOAK else 600)
@pytest.mark.parametrize(
    ("person", "kills"), [("looks", 200 if SOAK else 16), ("absent", 70 if SOAK else 8)], ids=["looks", "absent"]
)
def test_killed_at_random_every_effect_is_made_once_or_flagged(
    outside: Path, own_home: Path, person: str, kills: int, record_property: Any
) -> None:
    began = time.monotonic()
    uninterrupted("steps", "warm", WORKER_PERSON=person)
    span = time.monotonic() - began
    ids = killed_until_done("steps", kills, span, random.Random(person), WORKER_PERSON=person)
    found = check_runs(["warm", *ids], own_home, absent=person == "absent")
    print(f"{kills} kills, {dict(found)}")
    record_property("kills", kills)


@pytest.mark.slow
@pytest.mark.timeout(3600 if SOAK else 600)
def test_killed_while_people_are_asked_nothing_is_lost(outside: Path, own_home: Path) -> None:
    kills, dice = (60 if SOAK else 8), random.Random(7)
    ids: list[str] = []
    while kills > 0:
        run_id = f"asking{len(ids)}"
        ids.append(run_id)
        for n in (2, 8):
            questions = "SELECT count(*) FROM asked WHERE run = ? AND n = ? AND NOT doubt"
            for _ in range(2):
                with process("asking", run_id) as started:
                    seen = rows(questions, run_id, n)
                    while rows(questions, run_id, n) == seen:  # it asks, whatever came before
                        assert started.poll() is None, started.communicate()
                        time.sleep(0.01)
                    time.sleep(dice.uniform(0, 0.2))
                    started.send_signal(signal.SIGKILL)
                    kills -= 1
            assert len(rows("SELECT DISTINCT key FROM asked WHERE run = ? AND n = ? AND NOT doubt", run_id, n)) == 1
            with worker.opened() as connection:
                connection.execute("INSERT INTO answers VALUES (?, ?)", (run_id, n))
        assert f"{run_id} DONE" in uninterrupted("asking", run_id)
    found = check_runs(ids, own_home)
    print(dict(found))


def test_a_process_ends_although_a_run_waits(outside: Path, own_home: Path) -> None:
    code = (
        "import durable_worker as w, time, sys\n"
        "from agentkit_tracking import durable\n"
        "with durable.Runner(approver=w.person) as r:\n"
        "    r.start('asking', {}, run_id='r')\n"
        "    while not w.questions(): time.sleep(0.05)\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=WORKER.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 90
    status = durable.status("r")
    assert (status.state, status.last) == ("interrupted", "asking/3 tier send")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_of_two_workers_on_postgresql_one_finishes_what_the_other_has_left(
    outside: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with postgresql() as url:
        monkeypatch.setenv("AGENTKIT_DURABLE", url)
        ids = [f"r{n}" for n in range(12)]
        with process("serve", WORKER_PAUSE_S="0.3") as first, process("serve", WORKER_PAUSE_S="0.3") as second:
            assert first.stdout is not None
            assert second.stdout is not None
            assert (first.stdout.readline(), second.stdout.readline()) == ("open\n", "open\n")
            with opened(take_up=False) as runner:
                handles = [runner.start("steps", {}, run_id=run_id, queue="shared") for run_id in ids]
                while len({pid for (pid,) in rows("SELECT DISTINCT pid FROM appended")}) < 2:
                    assert first.poll() is None
                    assert second.poll() is None
                    time.sleep(0.05)
                first.send_signal(signal.SIGKILL)
                for handle in handles:
                    assert handle.result(timeout_s=180).state == "DONE"
        found = check_runs(ids, own_home)
        assert {status.state for status in durable.runs()} == {"done"}
        assert any(status.restarts for status in durable.runs())
        print(dict(found))
