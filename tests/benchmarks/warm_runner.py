"""A promotion from a warm runner beside the bare evaluation by papermill's command line, in turn.

What is promoted is a version of its own each time: evaluated in a warm kernel, compared with production, judged,
signed, logged to MLflow and put into production. What is beside it only executes the notebook on the same cases.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from releases import CASES, COLOURS

ROUNDS = 3
ONE_PER_WORD = [case for case in CASES if case[0].endswith(" there")]
GOLDEN, THRESHOLDS = Path("golden.jsonl"), Path("colours.yaml")


def measure(note: Callable[[str, str, str, str], None]) -> None:
    """One row: promotion from a warm runner, papermill from the command line, the median of the ratios."""
    with tempfile.TemporaryDirectory(prefix="agentkit-bench-") as folder, contextlib.chdir(folder):
        _write_project()
        times = [(_promote_warm(i), _evaluate_cold(i)) for i in range(ROUNDS + 1)][1:]
    ours, peer, ratio = (statistics.median(x) for x in zip(*((a, b, a / b) for a, b in times), strict=True))
    what = f"a promotion from a warm runner, {len(ONE_PER_WORD)} cases"
    note(what, f"{ours:.2f} s", f"papermill evaluate.ipynb {peer:.2f} s", f"{ratio:.2f}× (aim ≤ 0.25×)")


def _write_project() -> None:
    from agentkit.examples import Example, write_examples

    Path("pyproject.toml").write_text("")
    THRESHOLDS.write_text("system: colours\nconfidence: 0.95\nrules:\n  - {metric: success, at_least: 0.75}\n")
    examples = [
        Example(id=f"{i:02}", inputs={"text": text}, expected={"label": label}, task_type="t")
        for i, (text, label) in enumerate(ONE_PER_WORD)
    ]
    write_examples(GOLDEN, examples)


def _promote_warm(number: int) -> float:
    """Seconds from the wish to the new production."""
    from agentkit_pipelines import promotion
    from agentkit_pipelines.evidence import Plan
    from agentkit_pipelines.warm_kernels import WarmKernels
    from agentkit_tracking import registry

    Path("colours.py").write_text(f"{COLOURS}\n# version {number}\n")
    version = registry.register_file("colours.py")
    with WarmKernels():
        _wait_until_idle()
        start = time.perf_counter()
        done = promotion.promote(Plan(version, GOLDEN, THRESHOLDS, repeats=1))
        seconds = time.perf_counter() - start
    assert done.verdict is not None
    assert done.verdict.verdict == "pass"
    return seconds


def _evaluate_cold(number: int) -> float:
    """Seconds of papermill's command line on the version that was just promoted."""
    from agentkit_pipelines.notebook_runner import NOTEBOOKS
    from agentkit_tracking import registry

    folder, _ = registry.fetch_version(registry.resolve("colours"))
    given = {"version": folder, "golden": GOLDEN, "thresholds": THRESHOLDS, "output": ".", "repeats": 1}
    command = [sys.executable, "-m", "papermill", str(NOTEBOOKS / "evaluate.ipynb"), f"cold-{number}.ipynb"]
    command += ["--no-progress-bar", *(x for name, value in given.items() for x in ("-p", name, str(value)))]
    start = time.perf_counter()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def _wait_until_idle() -> None:
    """Until the kernel has imported everything, so that what is measured is not waiting for it."""
    (kernel,) = psutil.Process().children()
    while kernel.cpu_times().user < 1 or kernel.cpu_percent(1.0) > 5:
        pass
