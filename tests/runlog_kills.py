"""A storm of SIGKILL over one run log: 16 writers, folders and readers, each a process, killed and replaced at random.

    python runlog_kills.py FOLDER KILLS SEED

Writers note what was acknowledged in files of their own; at the end everything noted must be in the log, once.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from agentkit_tracking.runlog import RunLog

WRITERS, FOLDERS, READERS = 16, 2, 2


def write(folder: Path, name: str) -> None:
    """Append groups of one to five events, and note them once they are acknowledged."""
    log, chance = RunLog(folder / "log"), random.Random(name)
    noted = os.open(folder / "noted" / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    i = 0
    while True:
        size = chance.randint(1, 5)
        ids = [f"{name}-{i + j}" for j in range(size)]
        i += size
        log.write([({"type": "x", "name": one}, {"inputs": "é" * chance.randint(0, 300)}) for one in ids], sync=False)
        os.write(noted, "".join(f"{one}\n" for one in ids).encode())
        if chance.random() < 0.02:
            log.close()  # then another segment
        time.sleep(chance.random() * 0.004)


def fold(folder: Path, name: str) -> None:
    """Fold whenever nobody else does."""
    log = RunLog(folder / "log")
    while True:
        log.fold()
        time.sleep(0.02)


def read(folder: Path, name: str) -> None:
    """Count; what was there once stays."""
    log, before = RunLog(folder / "log"), 0
    while True:
        found, distinct = log.sql("SELECT count(*), count(DISTINCT name) FROM events WHERE type = 'x'").row(0)
        assert found == distinct >= before, f"{found} events, {distinct} different ones, {before} before"
        before = found
        time.sleep(0.02)


def start(folder: Path, work: Callable[[Path, str], None], name: str) -> int:
    """A process that works until it is killed; an error is noted."""
    if (pid := os.fork()) != 0:
        return pid
    try:
        work(folder, name)
    except BaseException:
        (folder / "errors" / name).write_text(traceback.format_exc())
    os._exit(1)


def storm(folder: Path, kills: int, seed: int) -> None:
    """Kill `kills` processes, then all."""
    for part in ("noted", "errors"):
        (folder / part).mkdir(parents=True)
    chance = random.Random(seed)
    jobs = [write] * WRITERS + [fold] * FOLDERS + [read] * READERS
    running = [start(folder, job, f"{job.__name__}-{i}-0") for i, job in enumerate(jobs)]
    for kill in range(1, kills + 1):
        time.sleep(chance.random() * 0.1)
        # A folder is hit as often as all writers together.
        place = chance.choices(range(len(jobs)), [1] * WRITERS + [6] * FOLDERS + [2] * READERS)[0]
        os.kill(running[place], signal.SIGKILL)
        os.waitpid(running[place], 0)
        running[place] = start(folder, jobs[place], f"{jobs[place].__name__}-{place}-{kill}")
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    storm(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
