"""The run log of several machines on DuckLake: a real PostgreSQL, DuckDB's own extensions, folders killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from postgres import not_here, postgresql
from test_runlog import record

from agentkit.errors import UsageError
from agentkit.records import Step
from agentkit_tracking.runlog import RunLog
from agentkit_tracking.runlog.lake import Lake
from agentkit_tracking.runlog.segments import Segment

PYTHON = Path(sys.prefix) / "lake" / "bin" / "python"
JOB = Path(__file__).with_name("lake_job.py")
STEPS = [Step("model", "m", "PLANNING", 0.1, 0.2, model="m", tokens_in=3, usd=0.5)]


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not PYTHON.exists():
        not_here(f"needs DuckDB 1.5 with its extensions: `make lake` installs them into {PYTHON.parents[1]}")
    with postgresql() as address:
        place = tmp_path_factory.mktemp("lake")
        yield f"ducklake:{address.replace('+psycopg2', '')}?data_path={place}"


def job(lake: str, *arguments: object) -> subprocess.Popen[str]:
    env = {**os.environ, "AGENTKIT_LOG_URL": lake}
    command = [str(PYTHON), str(JOB), *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def done(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def ask(lake: str, folder: Path, query: str) -> Any:
    return done(job(lake, "ask", folder, query))


def test_machines_fold_into_one_lake_and_see_each_other(lake: str, tmp_path: Path) -> None:
    machines = [RunLog(tmp_path / name / "log") for name in "ab"]
    for log in machines:
        for i in range(20):
            log.append(record(f"{log.folder.parent.name}{i}", steps=STEPS, system="two"))
    a, b = machines
    count = "SELECT count(*) FROM outcomes WHERE system = 'two'"
    assert ask(lake, a.folder, count) == [[20]]  # its own, fresh
    folding = [job(lake, "fold", log.folder, "once") for log in machines]  # both at once
    assert [done(process) for process in folding] == [[61, None], [61, None]]
    a.append(record("fresh", system="two"))
    assert ask(lake, a.folder, count) == [[41]]
    assert ask(lake, b.folder, count) == [[40]]  # not folded yet
    assert done(job(lake, "fold", a.folder, "once")) == [2, None]
    assert ask(lake, b.folder, count) == [[41]]
    assert ask(lake, b.folder, "SELECT count(*), sum(usd) FROM steps WHERE system = 'two'") == [[40, 20.0]]
    assert done(job(lake, "fold", a.folder, "once")) == [0, None]


@pytest.mark.slow
def test_folders_that_are_killed_lose_and_double_nothing(lake: str, tmp_path: Path) -> None:
    kills = 60 if os.environ.get("AGENTKIT_SOAK") else 6
    chance = random.Random(5)
    logs = [RunLog(tmp_path / f"m{i}" / "log") for i in range(3)]
    writers = [Segment(log.segments, roll_bytes=200_000) for log in logs]
    # Two processes a machine: one of them has the lease.
    folders = [(log, job(lake, "fold", log.folder)) for log in logs for _ in range(2)]
    written = 0
    until = time.monotonic() + (240 if kills > 10 else 30)
    while kills > 0 and time.monotonic() < until:
        for writer in writers:
            writer.append([({"type": "kill", "name": f"{written + i}"}, {}) for i in range(100)])
            written += 100
        time.sleep(0.05)
        if chance.random() < 0.15:
            place = chance.randrange(len(folders))
            log, process = folders[place]
            process.send_signal(signal.SIGKILL)
            process.communicate()
            folders[place] = (log, job(lake, "fold", log.folder))
            kills -= 1
    for writer in writers:
        writer.close()
    said = []
    for _, process in folders:
        process.kill()
        said.append(process.communicate()[1])
    assert [s for s in said if s] == []
    query = "SELECT count(*), count(DISTINCT name) FROM events WHERE type = 'kill'"
    for log in logs:
        assert done(job(lake, "fold", log.folder, "once"))[1] is None
        assert list(log.segments.glob("*.jsonl")) == []
    assert ask(lake, logs[0].folder, query) == [[written, written]]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ducklake:postgresql://u@h/db", "without data_path"),
        ("ducklake:sqlite.db?data_path=/x", "found no address"),
        ("ducklake:mysql://u@h/db?data_path=/x", "found mysql address"),
    ],
)
def test_a_wrong_address_is_said(tmp_path: Path, url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Lake(tmp_path, url)


def test_without_the_extensions_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTKIT_LOG_URL", "ducklake:postgresql://ann:secret@h/db?data_path=/x")
    log = RunLog(tmp_path / "log")
    log.append(record("r1"))  # a writer needs no lake
    with pytest.raises(UsageError, match=r"install duckdb==1\.5\.5 duckdb-extension-ducklake==1\.5\.5"):
        log.runs()
    assert "secret" not in str(log.database)
