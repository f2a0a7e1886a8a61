"""Reproduces the figures of the support-triage system that the notebook, the thresholds and the card state.

    python tests/benchmarks/support.py

Five folds of the training tickets, fitted to four and measured on the fifth: the split system (two repeats for the
thresholds, one for the comparison), the single-agent baseline, and the learning curve. About four minutes.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ["AGENTKIT_HOME"] = tempfile.mkdtemp(prefix="agentkit-bench-")
os.environ["AGENTKIT_TRACES"] = "off"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "notebooks"))

import numpy as np
import polars as pl
import support_triage as st
from rich.console import Console
from rich.progress import track

import agentkit as ak
from agentkit.examples import Example
from agentkit_pipelines import evaluation, report

console = Console()


def folds(examples: list[Example], k: int = 5) -> list[tuple[list[Example], list[Example]]]:
    """(fit, held back) pairs by a seeded permutation."""
    parts = np.array_split(np.random.default_rng(0).permutation(len(examples)), k)
    return [([examples[j] for p in parts if p is not part for j in p], [examples[j] for j in part]) for part in parts]


def measured(system: ak.System, examples: list[Example], repeats: int, title: str) -> pl.DataFrame:
    """Results of every example, held back once."""
    found = []
    for fit, held_back in track(folds(examples), description=title):
        system.use(ak.fit(system, [{**e.inputs, **e.expected} for e in fit]))
        found.append(evaluation.evaluate(system, held_back, repeats=repeats))
    return pl.concat(found)


def show(results: pl.DataFrame, title: str) -> None:
    wanted = ["success", "queue", "action", "category", "calibration_error", "tokens_in"]
    console.print(f"\n{title}: {results['model_calls'].mean():.1f} model calls, {_could_pay(results):.0%} could pay")
    for row in report.summarise(results).filter(pl.col("metric").is_in(wanted)).iter_rows(named=True):
        low = "" if row["low"] is None else f" ({row['low']:.3f} to {row['high']:.3f})"
        console.print(f"  {row['metric']} {row['group'] or ''}: {row['estimate']:.3f}{low}")


def _could_pay(results: pl.DataFrame) -> float:
    return float(results["route"].is_in(["billing", "solo"]).cast(pl.Float64).to_numpy().mean())


def main() -> None:
    train = ak.read_examples(st.DATA / "train.jsonl")
    split = st.tuned(st.system())
    show(measured(split, train, 2, "thresholds"), "router and three agents, two repeats")
    show(measured(split, train, 1, "split"), "router and three agents")
    show(measured(st.baseline(), train, 1, "solo"), "one agent")
    order = np.random.default_rng(1).permutation(len(train))
    held_back = [train[i] for i in order[:400]]
    for size in (400, 800, 1228):
        split.use(ak.fit(split, [{**train[i].inputs, **train[i].expected} for i in order[400 : 400 + size]]))
        success = evaluation.evaluate(split, held_back, repeats=1)["success"].mean()
        console.print(f"fitted to {size} tickets: success {success:.3f} on 400 held back")


if __name__ == "__main__":
    main()
