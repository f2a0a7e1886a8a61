"""What durability costs: calls that are journaled beside raw DBOS steps, in turn, in one workflow on one database."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS, WARM = 200, 20


def measure(note: Callable[[str, str, str, str], None]) -> None:
    """Rows: a model call, a read and a write through the journal; a write is two checkpoints, its tier and its result."""
    from dbos import DBOS

    from agentkit.autonomy import Autonomy
    from agentkit.budget import Budget
    from agentkit.runs import Run
    from agentkit.states import State
    from agentkit.tools import Inventory, tool
    from agentkit_tracking import durable
    from agentkit_tracking.durable import works

    @tool
    def look(n: int) -> dict[str, int]:
        """Reads."""
        return {"n": n}

    @tool(permission="write", criticality="low")
    def send(n: int) -> dict[str, int]:
        """Writes."""
        return {"n": n}

    answer = {"outputs": ["yes"], "usage": {"prompt_tokens": 100, "completion_tokens": 5}}
    asked = {"model": "m", "messages": [{"role": "user", "content": "text " * 200}], "parameters": {"temperature": 0.0}}
    times: dict[str, list[tuple[float, float]]] = {}

    def compare(what: str, ours: Callable[[int], Any], raw: Callable[[int], Any]) -> None:
        pairs = [(_seconds(ours, n), _seconds(raw, n)) for n in range(WARM + ROUNDS)]
        times[what] = pairs[WARM:]

    def step(call: Callable[[], Any]) -> None:
        DBOS.run_step({"name": "raw"}, call)

    def work(run: Run) -> None:
        run.to(State.PLANNING, "asked")
        run.to(State.EXECUTING, "planned")
        assert isinstance(run.interceptors[0], durable.Journal)
        plain = Run("plain", {}, budget=Budget.unlimited(), autonomy=run.autonomy)
        plain.interceptors = ()  # the same calls, so that only the journal differs
        inventory = Inventory("worker", (look, send))
        with run.acting_as(inventory), plain.acting_as(inventory):
            compare(
                "a model call",
                lambda n: run.through("model", "m", asked, lambda: answer),
                lambda n: step(lambda: answer),
            )
            compare("a read", lambda n: run.call(look, n=n), lambda n: step(lambda: plain.call(look, n=n)))
            compare(
                "a write, intent and result",
                lambda n: run.call(send, n=n),
                lambda n: (step(lambda: {"tier": 1}), step(lambda: plain.call(send, n=n))),
            )
        run.to(State.REFLECTING, "done")

    before = os.environ["AGENTKIT_HOME"]
    os.environ["AGENTKIT_HOME"] = tempfile.mkdtemp(prefix="agentkit-bench-")
    durable.work("bench", budget=Budget.unlimited(), autonomy=Autonomy(failures_from=None))(work)
    try:
        with durable.Runner(take_up=False, approver=lambda request: False) as runner:
            record = runner.start("bench", {}).result(timeout_s=600)
            assert record.state == "DONE", record.error
    finally:
        works.forget("bench")
        os.environ["AGENTKIT_HOME"] = before
    for what, pairs in times.items():
        ours, raw, ratio = (statistics.median(x) for x in zip(*((a, b, a / b) for a, b in pairs), strict=True))
        peer = f"raw DBOS step{'s, two,' if 'write' in what else ''} around the same {raw * 1e3:.1f} ms"
        note(f"durable run: {what}", f"{ours * 1e3:.1f} ms", peer, f"{ratio:.2f}× (aim ≤ 1.2×)")


def _seconds(work: Callable[[int], object], n: int) -> float:
    start = time.perf_counter()
    work(n)
    return time.perf_counter() - start


if __name__ == "__main__":
    os.environ.setdefault("AGENTKIT_HOME", str(Path(tempfile.mkdtemp())))
    os.environ["AGENTKIT_TRACES"] = "off"
    measure(lambda *row: print(*row, sep=" | "))
