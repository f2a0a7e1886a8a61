"""The fault that ends a process: durable runs of a release in a worker that is killed and started again.

python -m agentkit_pipelines.chaos_kills FOLDER    # the worker; FOLDER/order.json says what to run
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from agentkit.errors import AgentkitError, UsageError
from agentkit.examples import Example
from agentkit.records import RunRecord
from agentkit.systems import System
from agentkit_pipelines import chaos

ORDER, DATABASE, DONE, LOG = "order.json", "durable.db", "done.txt", "worker.log"
_LONGEST_S = 60.0  # from a run's begin to the kill


def rehearse(
    system: System, examples: Sequence[Example], kills: int, folder: Path, *, seed: int = 0
) -> tuple[pl.DataFrame, int]:
    """Run the examples as durable runs while the worker is killed (SIGKILL) within runs, then let it finish.

    Needs the extra `durable` and a registered release. Which run, and when within the time it took without a fault, is
    random. A run that was under way at a kill counts as hit.

    Returns:
        Rows as of `chaos.rehearse`, fault `kill`; and how many kills hit a run: fewer than asked for where the worker was
        done before.

    Raises:
        UsageError: the system is a draft, which a worker could not load. AgentkitError: the worker ended with an error.
    """
    if system.release is None:
        raise UsageError("a draft cannot be killed and taken up again; register it first")
    calm = {example.id: system.run(kind="chaos", **example.inputs) for example in examples}
    ids = {example.id: uuid.uuid4().hex for example in examples}
    cases = [{"run_id": ids[example.id], "inputs": example.inputs} for example in examples]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ORDER).write_text(json.dumps({"release": system.release, "cases": cases}), encoding="utf-8")
    (folder / DONE).write_text("")
    lasts = {ids[name]: min(record.seconds - record.waited_s, _LONGEST_S) for name, record in calm.items()}
    hit, made = _killed(folder, lasts, kills, random.Random(seed))
    return pl.DataFrame([_row(system, e, calm[e.id], ids[e.id], hit) for e in examples], infer_schema_length=None), made


def _killed(folder: Path, lasts: Mapping[str, float], kills: int, rng: random.Random) -> tuple[list[str], int]:
    """Which runs were under way at a kill, and how many kills hit one; `lasts` has the seconds a run takes."""
    hit: list[str] = []
    made = 0
    while made < kills and (left := [run_id for run_id in lasts if run_id not in _done(folder)]):
        fresh = [run_id for run_id in left if run_id not in hit] or left
        # Early enough to leave a run for every kill to come; a kill that falls between two runs is made again.
        victim = fresh[rng.randrange(max(1, len(fresh) - (kills - made) + 1))]
        worker = _started(folder)
        begun = _begun(worker, victim)
        if begun:
            time.sleep(rng.uniform(0, lasts[victim]))
            worker.kill()
        _check(worker, folder, killed=begun)
        if found := _under_way(folder, list(lasts)):
            hit += found
            made += 1
    _check(_started(folder), folder)
    return hit, made


def _check(worker: subprocess.Popen[str], folder: Path, *, killed: bool = False) -> None:
    worker.communicate()
    if worker.returncode and not (killed and worker.returncode == -signal.SIGKILL):
        raise AgentkitError(f"the worker of the durable runs failed; see {folder / LOG}")


def _done(folder: Path) -> set[str]:
    return set((folder / DONE).read_text(encoding="utf-8").split())


def _under_way(folder: Path, ids: Sequence[str]) -> list[str]:
    """The runs that a worker which is dead had begun and not ended."""
    from agentkit_tracking.durable.database import WORKFLOW, client_of, database_url

    client = client_of(database_url(f"sqlite:///{folder / DATABASE}"))
    try:
        found = client.list_workflows(workflow_ids=list(ids), status="PENDING", name=WORKFLOW, load_output=False)
    finally:
        client.destroy()
    return [one.workflow_id for one in found]


def _started(folder: Path) -> subprocess.Popen[str]:
    with open(folder / LOG, "a", encoding="utf-8") as log:
        command = [sys.executable, "-m", __name__, str(folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)


def _begun(worker: subprocess.Popen[str], run_id: str) -> bool:
    """Wait until the worker begins this run; false if it ended before."""
    assert worker.stdout is not None
    return any(line.strip() == run_id for line in worker.stdout)


def _row(system: System, example: Example, calm: RunRecord, run_id: str, hit: Sequence[str]) -> dict[str, Any]:
    record, problems = _kept(run_id)
    if record is None:
        lost = {"outcome": "failed", "right": False, "error": "no record", "latency_s": None}
        return _common(system, example, calm, run_id, hit) | lost | {"violations": "; ".join(problems)}
    problems += chaos.violations(system, record, calm)
    in_doubt = any(effect["outcome"] == "unknown" for effect in record.effects)
    failed = record.state != "DONE"
    word = "untouched" if run_id not in hit else "escalated" if in_doubt else "failed" if failed else "recovered"
    return _common(system, example, calm, run_id, hit) | {
        "outcome": word,
        "right": chaos.is_right(system, example, record),
        "error": record.error,
        "latency_s": record.seconds - record.waited_s,
        "violations": "; ".join(problems) or None,
    }


def _common(system: System, example: Example, calm: RunRecord, run_id: str, hit: Sequence[str]) -> dict[str, Any]:
    return {
        "case_id": example.id,
        "fault": "kill",
        "lasting": False,
        "run_id": run_id,
        "fired": hit.count(run_id),
        "calm_right": chaos.is_right(system, example, calm),
    }


def _kept(run_id: str) -> tuple[RunRecord | None, list[str]]:
    """The record of a run, and what is wrong with how it was kept."""
    from agentkit_tracking.runlog import RunLog

    log = RunLog()
    count = int(log.sql("SELECT count(*) AS n FROM outcomes WHERE run_id = ?", [run_id])["n"][0])
    if count == 0:
        return None, ["the run was lost: it has no record"]
    if count > 1:
        return None, [f"the run has {count} records"]
    return log.find(run_id), []


def work(folder: Path) -> None:
    """The worker: every run of the order to its end, whatever an earlier worker has left of it."""
    from agentkit_tracking import durable

    order = json.loads((folder / ORDER).read_text(encoding="utf-8"))
    done = _done(folder)
    with durable.Runner(f"sqlite:///{folder / DATABASE}", approver=lambda request: False) as runner:
        for case in order["cases"]:
            if case["run_id"] in done:
                continue
            handle = runner.start(order["release"], case["inputs"], run_id=case["run_id"], kind="chaos")
            print(case["run_id"], flush=True)
            handle.result()
            with open(folder / DONE, "a") as file:
                file.write(f"{case['run_id']}\n")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
