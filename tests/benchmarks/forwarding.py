"""What it costs to bring runs to MLflow: from the run log in bulk, beside MLflow's own logging, on one SQLite file each.

    python tests/benchmarks/forwarding.py

Every way writes the same runs (a root, three phases, a model call, a tool call, two decisions: 8 spans) in a process of its own.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
RUNS, FEW, BURST = 2_000, 40, 1_000
AGENT, ROUNDS = 4_000, 5


def measure(note: Callable[[str, str, str, str], None]) -> None:
    """Rows: traces per second, what arrives of a burst, and what the agents notice."""
    ours, arrived, _ = _worker("forward", RUNS)
    public, _, _ = _worker("log_spans", RUNS // 10)
    sync, _, _ = _worker("sync", FEW)
    queued, came, handed = _worker("async", BURST)
    note(
        "traces forwarded to MLflow, a second",
        f"{ours:.0f} ({arrived:.0f} of {RUNS:,} arrived)",
        f"mlflow sync {sync:.1f}",
        f"{ours / sync:.0f}× (aim ≥ 5×)",
    )
    note(
        "the same through MLflow's log_spans, as to a server",
        f"{public:.0f}",
        f"mlflow sync {sync:.1f}",
        f"{public / sync:.1f}×",
    )
    note(
        f"a burst of {BURST:,} runs",
        f"{RUNS:,} of {RUNS:,} arrive",
        f"mlflow async {came:.0f}, {queued:.1f} a second",
        f"handed over in {handed:.2f} ms each",
    )
    on, off, ratio = _worker("agent", AGENT)
    note(
        "runs a second of a fast agent, forwarded beside it", f"{on:.0f}", f"without traces {off:.0f}", f"{ratio:.2f}×"
    )


def _worker(way: str, count: int) -> tuple[float, float, float]:
    """Traces per second, how many arrived, and milliseconds that each took where it was made."""
    environment = {
        **os.environ,
        "AGENTKIT_HOME": tempfile.mkdtemp(prefix="agentkit-bench-"),
        "AGENTKIT_TRACES": "off",
        "AGENTKIT_LOG_SYNC": "off",
        "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "true" if way == "async" else "false",
        "PYTHONPATH": os.pathsep.join((str(TESTS), os.environ.get("PYTHONPATH", ""))),
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-W", "ignore", __file__, way, str(count)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    speed, arrived, each = done.stdout.splitlines()[-1].split()
    return float(speed), float(arrived), float(each)


# ---- in the worker


def forward(count: int, *, publicly: bool = False) -> tuple[float, float]:
    """From the log, all at once."""
    from forwarded import keep

    from agentkit_tracking.forwarding import mlflow_bulk
    from agentkit_tracking.forwarding.consumer import Consumer
    from agentkit_tracking.forwarding.mlflow_target import MlflowTarget
    from agentkit_tracking.runlog import own

    if publicly:
        mlflow_bulk.can_write = lambda store: False  # type: ignore[assignment]
    keep(own(), 1)
    Consumer(own(), MlflowTarget()).forward()  # imports, and makes the database
    keep(own(), count)
    consumer = Consumer(own(), MlflowTarget())
    start = time.perf_counter()
    consumer.forward()
    return time.perf_counter() - start, 0.0


def mlflow_itself(count: int) -> tuple[float, float]:
    """With MLflow's functions, where the run ends; for its queue, until that is empty."""
    import mlflow
    from forwarded import made

    from agentkit_tracking.home import connect, experiment_id

    connect()
    experiment = experiment_id("shop")
    records = [made() for _ in range(count)]
    _log(made(), experiment)
    mlflow.flush_trace_async_logging()
    start = time.perf_counter()
    for record in records:
        _log(record, experiment)
    handed = time.perf_counter() - start
    mlflow.flush_trace_async_logging()
    return time.perf_counter() - start, handed


def _log(record: Any, experiment: str) -> None:
    import mlflow

    tags = {f"agentkit.{n}": str(getattr(record, n)) for n in ("run_id", "release", "stage", "state", "route", "usd")}
    root = mlflow.start_span_no_context(
        record.system, span_type="AGENT", inputs=record.inputs, experiment_id=experiment, tags=tags,
        metadata={"mlflow.trace.session": record.session, "mlflow.trace.user": record.user_hash},
    )  # fmt: skip
    phase = None
    for step in record.steps:
        if step.kind == "transition":
            if phase is not None:
                phase.end()
            phase = (
                None
                if step.name == "DONE"
                else mlflow.start_span_no_context(step.name, parent_span=root, span_type="CHAIN")
            )
            continue
        kind = {"model": "CHAT_MODEL", "tool": "TOOL"}.get(step.kind, "CHAIN")
        span = mlflow.start_span_no_context(step.name, parent_span=phase, span_type=kind, inputs=step.inputs)
        if step.model:
            usage = {"input_tokens": step.tokens_in, "output_tokens": step.tokens_out, "total_tokens": 120}
            span.set_attributes(
                {
                    "mlflow.chat.tokenUsage": usage,
                    "mlflow.llm.model": step.model,
                    "mlflow.llm.cost": {"total_cost": step.usd},
                }
            )
        span.end(outputs=step.outputs)
    root.end(outputs=record.output)


def agent(count: int) -> tuple[float, float, float]:
    """Runs a second of an agent that does next to nothing, with its runs forwarded meanwhile and without, in turn."""
    import agentkit as ak
    from agentkit_tracking import traces

    def shout(text: str) -> dict[str, str]:
        """Upper case."""
        return {"text": text.upper()}

    system = ak.adopt(shout, name="shop")
    speeds: dict[str, list[float]] = {"on": [], "off": []}
    for n in range(ROUNDS + 1):
        for way, found in speeds.items():
            os.environ["AGENTKIT_TRACES"] = way
            start = time.perf_counter()
            for _ in range(count if n else 20):
                system.run(text="x")
            found.append(count / (time.perf_counter() - start))
            os.environ["AGENTKIT_TRACES"] = "on"
            assert traces.flush(300)
    on, off = speeds["on"][1:], speeds["off"][1:]
    return statistics.median(on), statistics.median(off), statistics.median(a / b for a, b in zip(on, off, strict=True))


def _arrived() -> int:
    from forwarded import spans_in_database

    from agentkit_tracking.home import home

    database = home() / "mlflow.db"
    return len(spans_in_database(database)) - 1 if database.exists() else 0


def main(way: str, count: int) -> None:
    if way == "agent":
        print(*agent(count))
        return
    ways: dict[str, Callable[[int], tuple[float, float]]] = {
        "forward": forward,
        "log_spans": lambda n: forward(n, publicly=True),
        "sync": mlflow_itself,
        "async": mlflow_itself,
    }
    seconds, handed = ways[way](count)
    arrived = _arrived()
    print(arrived / seconds, arrived, handed / count * 1e3)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1], int(sys.argv[2]))
    else:
        measure(lambda *row: print(*row, sep=" | "))
