"""The fault that ends a process: durable runs of a release in a worker that is killed and started again.

python -m agentkit_pipelines.chaos_kills FOLDER    # the worker; FOLDER/order.json says what to run
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from agentkit.errors import AgentkitError, UsageError
from agentkit.examples import Example
from agentkit.records import RunRecord
from agentkit.systems import System
from agentkit_pipelines import chaos

ORDER, DATABASE, DONE, LOG = "order.json", "durable.db", "done.txt", "worker.log"
_READY = "ready"
_BETWEEN_S = (0.05, 2.5)  # from the first run's begin to the kill


def rehearse(
    system: System, examples: Sequence[Example], kills: int, folder: Path, *, seed: int = 0
) -> tuple[pl.DataFrame, int]:
    """Run the examples as durable runs while the worker is killed (SIGKILL) at random times, then let it finish.

    Needs the extra `durable` and a registered release. A run that was under way at a kill counts as hit.

    Returns:
        Rows as of `chaos.rehearse`, fault `kill`; and how many kills there were: fewer than asked for where the worker was
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
    hit, made = _killed(folder, list(ids.values()), kills, random.Random(seed))
    return pl.DataFrame([_row(system, e, calm[e.id], ids[e.id], hit) for e in examples], infer_schema_length=None), made


def _killed(folder: Path, ids: Sequence[str], kills: int, rng: random.Random) -> tuple[list[str], int]:
    """Which runs were under way at a kill, and how many kills there were."""
    hit: list[str] = []
    for made in range(kills):
        worker = _started(folder)
        time.sleep(rng.uniform(*_BETWEEN_S))
        if worker.poll() is not None:
            _check(worker, folder)
            return hit, made
        worker.kill()
        worker.wait()
        hit += _under_way(folder, ids)
    worker = _started(folder)
    _check(worker, folder)
    return hit, kills


def _check(worker: subprocess.Popen[str], folder: Path) -> None:
    if worker.wait() != 0:
        raise AgentkitError(f"the worker of the durable runs failed; see {folder / LOG}")


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
    """A worker whose first run has begun, or which is done."""
    with open(folder / LOG, "a", encoding="utf-8") as log:
        command = [sys.executable, "-m", __name__, str(folder)]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert worker.stdout is not None
    if worker.stdout.readline().strip() != _READY and worker.wait() != 0:
        raise AgentkitError(f"the worker of the durable runs did not start; see {folder / LOG}")
    return worker


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
    done = set((folder / DONE).read_text().split())
    with durable.Runner(f"sqlite:///{folder / DATABASE}", approver=lambda request: False) as runner:
        for case in order["cases"]:
            if case["run_id"] in done:
                continue
            handle = runner.start(order["release"], case["inputs"], run_id=case["run_id"], kind="chaos")
            print(_READY, flush=True)
            handle.result()
            with open(folder / DONE, "a") as file:
                file.write(f"{case['run_id']}\n")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
