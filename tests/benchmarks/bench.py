"""Speed as ratios against a named peer in the same run, and the embedded model's quality on public data.

    make bench                      # speed, and quality on the repository's own tickets
    make bench DATA=../shared/data  # and on banking77 and hwu64, read from <DATA>/<set>/train.csv

Pairs are timed in turn (A B A B …) and the median ratio is shown: absolute times on small machines wander.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["AGENTKIT_HOME"] = tempfile.mkdtemp(prefix="agentkit-bench-")
os.environ["AGENTKIT_TRACES"] = "off"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "notebooks"))

import against_peers
import concurrency
import dspy
import durable
import forwarding
import guarding
import numpy as np
import operations_page
import polars as pl
import runlog
import warm_runner
from dspy.lm15 import Message, Response, TextPart, Usage
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.model_selection import StratifiedKFold

import agentkit as ak
from agentkit.models import MeteredLM, Price

console = Console()
rows: list[tuple[str, str, str, str]] = []


def note(what: str, ours: str, peer: str, aim: str = "") -> None:
    rows.append((what, ours, peer, aim))


class NoOp:
    """An engine that answers at once: what remains is overhead."""

    def complete(self, request: object) -> Response:
        text = "[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]"
        message = Message.assistant([TextPart(text)])
        usage = Usage(input_tokens=10, output_tokens=5, total_tokens=15)
        return Response(id=None, model="no-op", message=message, finish_reason="stop", usage=usage)

    def close(self) -> None: ...


def paired(a: Callable[[], object], b: Callable[[], object], rounds: int, inner: int) -> tuple[float, float, float]:
    """Median seconds of one call of a and of b, and the median of the ratios a/b."""
    times: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        spent = []
        for work in (a, b):
            start = time.perf_counter()
            for _ in range(inner):
                work()
            spent.append((time.perf_counter() - start) / inner)
        times.append((spent[0], spent[1]))
    times = times[1:]  # the first round warms up
    return (
        statistics.median(t[0] for t in times),
        statistics.median(t[1] for t in times),
        statistics.median(t[0] / t[1] for t in times),
    )


def call_overhead() -> None:
    """A whole governed run (states, budget, record, run log) with one model call against a bare Predict."""
    predict = dspy.Predict("question -> answer")
    bare = dspy.LM("embedded/no-op", engine=NoOp(), cache=False, num_retries=0)
    metered = MeteredLM("embedded/no-op", engine=NoOp(), cache=False, num_retries=0)
    metered.price = Price(input=1, output=1)
    system = ak.adopt(dspy.Predict("question -> answer"), name="bench")
    system._lm = ((system.model, id(system.weights)), metered)
    three = ak.adopt(Thrice(), name="bench_three")
    three._lm = ((three.model, id(three.weights)), metered)

    def plain() -> None:
        with dspy.context(lm=bare):
            predict(question="q")

    def plain_three() -> None:
        with dspy.context(lm=bare):
            for _ in range(3):
                predict(question="q")

    one = paired(lambda: system.run(question="q"), plain, rounds=25, inner=40)
    many = paired(lambda: three.run(question="q"), plain_three, rounds=25, inner=40)
    for what, (ours, peer, ratio) in (("a run with one model call", one), ("a run with three model calls", many)):
        note(what, f"{ours * 1e3:.3f} ms", f"bare dspy.Predict {peer * 1e3:.3f} ms", f"{ratio:.2f}×")
    ours, peer = (many[0] - one[0]) / 2, (many[1] - one[1]) / 2
    note(
        "each model call in a run",
        f"{ours * 1e3:.3f} ms",
        f"bare {peer * 1e3:.3f} ms",
        f"{ours / peer:.2f}× (aim ≤ 1.15×)",
    )


class Thrice(dspy.Module):
    """Three model calls in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.predict = dspy.Predict("question -> answer")

    def forward(self, question: str) -> dspy.Prediction:
        for _ in range(3):
            answer = self.predict(question=question)
        return answer


def process(command: list[str]) -> Callable[[], object]:
    return lambda: subprocess.run(command, check=True, capture_output=True)


def imports() -> None:
    """Whole processes, in turn."""
    for what, command, aim in (
        ("import agentkit", [sys.executable, "-c", "import agentkit"], "aim ≤ 0.3 s"),
        ("agentkit --help", [sys.executable, "-m", "agentkit_pipelines.cli", "--help"], "aim ≤ 0.5 s"),
    ):
        a, b, ratio = paired(process(command), process([sys.executable, "-c", "pass"]), rounds=7, inner=1)
        note(what, f"{a:.3f} s", f"bare python {b:.3f} s", f"{ratio:.1f}× ({aim})")


def evaluation_throughput() -> None:
    """Scored runs per second of the reference system, fitted, one thread."""
    import support_triage as st

    from agentkit_pipelines.evaluation import evaluate

    train, dev = (ak.read_examples(st.DATA / f"{n}.jsonl") for n in ("train", "dev"))
    system = st.system()
    system.use(ak.fit(system, [{**e.inputs, **e.expected} for e in train]))
    evaluate(system, dev[:20], repeats=1)
    start = time.perf_counter()
    results = evaluate(system, dev, repeats=3)
    ours = len(results) / (time.perf_counter() - start)
    metric = lambda example, prediction, trace=None: prediction.queue == example.queue  # noqa: E731
    peer = dspy.Evaluate(devset=[e.for_dspy() for e in dev] * 3, metric=metric, num_threads=1, display_progress=False)
    start = time.perf_counter()
    dspy.disable_logging()
    peer(system)
    theirs = len(dev) * 3 / (time.perf_counter() - start)
    note(
        "evaluation, runs per second",
        f"{ours:.0f}",
        f"dspy.Evaluate on the same system {theirs:.0f}",
        f"{ours / theirs:.2f}×",
    )
    success = results["success"].mean()
    note("support tickets: fitted on train, success on dev", f"{success:.3f}", "", "")


def intents(name: str, path: Path, label: str) -> None:
    """Five folds of a public intent set through `fit` and the engine: accuracy and calibration error."""
    from typing import Literal

    from agentkit_pipelines.stats import calibration

    frame = pl.read_csv(path)
    texts, labels = frame["text"].to_list(), frame[label].to_list()
    names = tuple(sorted(set(labels)))
    signature = dspy.Signature("text -> intent").with_updated_fields("intent", type_=Literal[names])
    predictor = dspy.Predict(signature)

    def score(train: list[int], test: list[int]) -> tuple[list[bool], list[float]]:
        from agentkit.embedded import EmbeddedEngine
        from agentkit.embedded.fit import _prompt_of

        weights = ak.fit(predictor, [{"text": texts[i], "intent": labels[i]} for i in train])
        task, _ = _prompt_of(predictor)
        p = EmbeddedEngine(weights).probabilities(task, task.outputs[0], [], [texts[i] for i in test])
        best = p.argmax(axis=1)
        return [names[b] == labels[i] for b, i in zip(best, test, strict=True)], p.max(axis=1).tolist()

    right: list[bool] = []
    sure: list[float] = []
    few: dict[int, list[bool]] = {5: [], 10: []}
    folds = list(StratifiedKFold(5, shuffle=True, random_state=0).split(texts, labels))
    for train, test in track(folds, description=f"{name}, five folds", console=Console(stderr=True)):
        ok, confidence = score(train.tolist(), test.tolist())
        right += ok
        sure += confidence
        for k in few:
            rng, seen, chosen = np.random.default_rng(0), {}, []
            for i in rng.permutation(train).tolist():
                if seen.setdefault(labels[i], 0) < k:
                    seen[labels[i]] += 1
                    chosen.append(i)
            few[k] += score(chosen, test.tolist())[0]
    error = float(calibration(np.array(sure), np.array(right, dtype=float)).error)
    aim = "aim ≥ 0.89, hoped 0.90" if name == "banking77" else ""
    note(
        f"{name}: accuracy fitted, {len(names)} intents", f"{np.mean(right):.4f}", f"calibration error {error:.3f}", aim
    )
    note(f"{name}: with 5 / 10 examples per class", f"{np.mean(few[5]):.3f} / {np.mean(few[10]):.3f}", "", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with banking77/train.csv and hwu64/train.csv")
    data = parser.parse_args().data
    against_peers.measure(note)
    call_overhead()
    imports()
    evaluation_throughput()
    concurrency.measure(note)
    durable.measure(note)
    forwarding.measure(note)
    warm_runner.measure(note)
    guarding.measure(note)
    runlog.measure(note)
    operations_page.measure(note)
    for name, label in (("banking77", "category"), ("hwu64", "intent")):
        path = data / name / "train.csv" if data else None
        if path is not None and path.is_file():
            intents(name, path, label)
        else:
            note(f"{name}: not measured", "", "", "give --data")
    table = Table("what", "ours", "beside it", "ratio or aim", title="agentkit benchmarks")
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
