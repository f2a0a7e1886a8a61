"""Evaluating: the verdict and the hashes are given outside the kernel, which executes the release's own source."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from evidence import Store, without_kernel
from tampering import store  # noqa: F401

from agentkit.errors import TrustError, UsageError
from agentkit.examples import sha256_of
from agentkit_tracking import registry


@pytest.mark.parametrize("forged", ["verdict", "settings"])
def test_what_a_kernel_says_of_its_results_is_judged_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, forged: str
) -> None:
    """It executes the release's own source, which can write what it likes; the verdict and the hashes are ours."""
    from agentkit_pipelines import evidence

    with without_kernel(), monkeypatch.context() as patch:  # undone in this order
        ran = evidence.run_notebook

        def cheated(name: str, parameters: Any, output: Path, *rest: Any) -> Path:
            notebook = ran(name, parameters, output, *rest)
            (output / "thresholds.yaml").write_text("system: colours\n")
            if forged == "verdict":
                text = (output / "verdict.json").read_text()
                (output / "verdict.json").write_text(text.replace('"verdict": "pass"', '"verdict": "fail"'))
            else:
                told = json.loads((output / "settings.json").read_text())
                told |= {"golden_sha256": "0" * 64, "thresholds_sha256": "0" * 64, "release": "0" * 64}
                (output / "settings.json").write_text(json.dumps(told))
            return notebook

        patch.setattr(evidence, "run_notebook", cheated)
        plan = evidence.Plan(registry.resolve("colours/3"), store.golden, store.thresholds, repeats=1)
        if forged == "verdict":
            with pytest.raises(TrustError, match="the verdict that the kernel left is not what its results give"):
                evidence.evaluate(plan)
            return
        said = evidence.evaluate(plan).evidence
    assert (said["golden_sha256"], said["thresholds_sha256"]) == (sha256_of(store.golden), sha256_of(store.thresholds))
    assert said["release"] == registry.resolve("colours/3").release_id


def _drop(output: Path) -> None:
    """With this and a verdict to match, rules `versus: production` would not apply."""
    (output / "production.parquet").unlink()


def _invent(output: Path) -> None:
    shutil.copy(output / "results.parquet", output / "production.parquet")


def _of_one(name: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[[Path], None]:
    return lambda output: change(pl.read_parquet(output / name)).write_parquet(output / name)


def _of_both(change: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[[Path], None]:
    return lambda output: [_of_one(f"{name}.parquet", change)(output) for name in ("results", "production")] and None


def _say_two_repeats(output: Path) -> None:
    told = json.loads((output / "settings.json").read_text())
    (output / "settings.json").write_text(json.dumps({**told, "repeats": 2}))


def _renamed(results: pl.DataFrame) -> pl.DataFrame:
    return results.with_columns(case_id=pl.when(pl.col("case_id") == "00").then(pl.lit("x")).otherwise("case_id"))


TAMPERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "production left out": (_drop, "left out the results of production"),
    "a case left out": (_of_both(lambda r: r.slice(1)), "results.parquet has not one row .*: 1 missing, 0 too many"),
    "a case twice": (_of_both(lambda r: r.vstack(r[:1])), "results.parquet has not one row .*: 0 missing, 1 too many"),
    "a case invented": (_of_both(_renamed), "results.parquet has not one row .*: 1 missing, 1 too many"),
    "another task type": (
        _of_both(lambda r: r.with_columns(task_type=pl.lit("easy"))), "results.parquet has not one row"
    ),
    "a case of production left out": (
        _of_one("production.parquet", lambda r: r.slice(1)), "production.parquet has not one row .*: 1 missing, 0 too"
    ),
    "a case of production twice": (
        _of_one("production.parquet", lambda r: r.vstack(r[:1])), "production.parquet has not one row .*: 0 missing, 1 too"
    ),
    "other repeats": (_say_two_repeats, "says 2 repeats, asked for were 1"),
}  # fmt: skip


@pytest.mark.parametrize("how", TAMPERED)
def test_what_a_kernel_left_must_be_the_whole_comparison(store: Store, how: str) -> None:
    """Whatever it judged itself: each verdict agrees with what it left."""
    tamper, said = TAMPERED[how]
    with pytest.raises(TrustError, match=said):
        _evaluated_by_a_cheat(store, "colours/3", tamper)


def test_a_kernel_cannot_make_up_a_production_to_compare_with(store: Store) -> None:
    with pytest.raises(TrustError, match="made up the results of production"):
        _evaluated_by_a_cheat(store, "colours/2", _invent)  # which is in production itself


def test_thresholds_that_change_while_they_are_taken_up_are_not_judged_by(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is judged by is the file that is kept and hashed."""
    from agentkit_pipelines import evidence

    class Hasty:
        """Writes a lower bar before it copies."""

        @staticmethod
        def copy(source: Path, target: Path) -> Path:
            if source == store.thresholds:
                source.write_text(source.read_text().replace("0.75", "0.01"))
            return Path(shutil.copy(source, target))

    with without_kernel(), monkeypatch.context() as patch:
        patch.setattr(evidence, "shutil", Hasty)
        with pytest.raises(UsageError, match=r"colours\.yaml changed while colours/3 was evaluated"):
            evidence.evaluate(evidence.Plan(registry.resolve("colours/3"), store.golden, store.thresholds, repeats=1))


def test_other_repeats_than_production_had_compare_with_production_anew(store: Store) -> None:
    from agentkit_pipelines import evidence

    with without_kernel():
        done = evidence.evaluate(evidence.Plan(registry.resolve("colours/3"), store.golden, store.thresholds))
    assert done.evidence["repeats"] == 8
    assert done.verdict is not None


def _evaluated_by_a_cheat(store: Store, reference: str, tamper: Callable[[Path], None]) -> None:
    """Evaluate by a kernel that changes what it leaves, and whose verdict says what that gives."""
    from agentkit_pipelines import evidence
    from agentkit_pipelines.gate import judge
    from agentkit_pipelines.thresholds import load_thresholds

    with without_kernel(), pytest.MonkeyPatch.context() as patch:
        ran = evidence.run_notebook

        def cheated(name: str, parameters: Any, output: Path, *rest: Any) -> Path:
            notebook = ran(name, parameters, output, *rest)
            tamper(output)
            with contextlib.suppress(ValueError):  # the gate itself would not take it
                before = output / "production.parquet"
                verdict = judge(
                    pl.read_parquet(output / "results.parquet"),
                    load_thresholds(output / "thresholds.yaml"),
                    pl.read_parquet(before) if before.exists() else None,
                    (),
                )
                (output / "verdict.json").write_text(verdict.model_dump_json())
            return notebook

        patch.setattr(evidence, "run_notebook", cheated)
        evidence.evaluate(evidence.Plan(registry.resolve(reference), store.golden, store.thresholds, repeats=1))
