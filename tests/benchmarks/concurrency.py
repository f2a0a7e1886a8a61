"""A thousand runs at once that wait for a model which takes 100 ms: throughput and memory, beside bare dspy.Predict.

    python concurrency.py governed|bare

prints seconds and the growth of the resident memory in MB; each in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RUNS, MODEL_S = 1000, 0.1


def resident_mb() -> float:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(kind: str) -> None:
    os.environ |= {"AGENTKIT_TRACES": "off", "AGENTKIT_HOME": tempfile.mkdtemp(prefix="agentkit-bench-")}
    import dspy

    import agentkit as ak
    from agentkit.models import MeteredLM, Price
    from agentkit.testing import Scripted

    class Slow(Scripted):
        def complete(self, request: object) -> object:
            time.sleep(MODEL_S)
            return super().complete(request)

    answers = [{"answer": "yes"}] * (2 * RUNS + 8)
    predict = dspy.Predict("question -> answer")
    if kind == "governed":
        lm = MeteredLM("embedded/slow", engine=Slow(*answers), cache=False, num_retries=0)
        lm.price = Price(input=1, output=1)
        system = ak.adopt(predict, name="bench")
        system._lm = ((system.model, id(system.weights)), lm)

        def one(i: int) -> None:
            assert system.run(question=f"{i}?").state == "DONE"
    else:
        bare = dspy.LM("embedded/slow", engine=Slow(*answers), cache=False, num_retries=0)

        def one(i: int) -> None:
            with dspy.context(lm=bare):
                assert predict(question=f"{i}?").answer == "yes"

    one(0)
    before = resident_mb()
    with ThreadPoolExecutor(RUNS) as pool:
        start = time.perf_counter()
        list(pool.map(one, range(RUNS)))
        print(time.perf_counter() - start, resident_mb() - before)


def measure(note: Callable[[str, str, str, str], None]) -> None:
    """One row: medians of three pairs, in turn."""
    found: dict[str, list[tuple[float, float]]] = {"governed": [], "bare": []}
    for _ in range(3):
        for kind, kept in found.items():
            command = [sys.executable, str(Path(__file__)), kind]
            seconds, mb = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            kept.append((float(seconds), float(mb)))
    (ours, ours_mb), (theirs, theirs_mb) = (sorted(kept)[1] for kept in found.values())
    note(
        f"{RUNS} runs at once, model of {MODEL_S * 1e3:.0f} ms",
        f"{RUNS / ours:.0f} runs/s, +{ours_mb:.0f} MB",
        f"bare dspy.Predict {RUNS / theirs:.0f} calls/s, +{theirs_mb:.0f} MB",
        f"{ours / theirs:.2f}× the time",
    )


if __name__ == "__main__":
    main(sys.argv[1])
