"""Scoring a set: what a row says, what metrics may return, and what is never taken for what it is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import agentkit as ak
from agentkit.errors import UsageError
from agentkit.examples import Example
from agentkit_pipelines import report, terminal
from agentkit_pipelines.evaluation import choose_repeats, evaluate, exercised
from agentkit_pipelines.gate import judge
from agentkit_pipelines.thresholds import Rule, Thresholds

CASES = [
    Example(id=f"c{i:02d}", inputs={"text": f"please tell me about number {i} now"}, expected={"n": i}, task_type="t")
    for i in range(20)
]


def system(success: Any = lambda example, prediction: True, metrics: Any = (), answer: Any = None) -> ak.System:
    """An adopted function that answers with the first number of the text, or with `answer`."""

    def program(text: str) -> dict[str, Any]:
        if "number 3 " in text:
            raise ValueError("three is too much")
        return answer or {"n": int(next(w for w in text.split() if w.isdigit()))}

    return ak.adopt(program, name="numbers", success=success, metrics=metrics)


def named(name: str, metric: Any) -> Any:
    metric.__name__ = name
    return metric


def test_each_case_has_a_row_per_repeat_and_a_failed_run_is_a_row_that_got_nothing_right():
    rows = evaluate(system(metrics=[named("score", lambda e, p: 0.5)]), CASES, repeats=3)
    assert rows.select("case_id", "repeat").n_unique() == len(rows) == 60
    failed = rows.filter(rows["case_id"] == "c03")
    assert failed["state"].to_list() == ["FAILED"] * 3
    assert failed["task_failure"].all()
    assert failed["success"].to_list() == [False] * 3
    assert failed["score"].to_list() == [0.0] * 3
    assert failed["error"][0] == "ValueError: three is too much"


def test_perturbed_inputs_are_the_same_for_every_version():
    seen: dict[str, list[Any]] = {"a": [], "b": []}
    for name, texts in seen.items():

        def note(text: str, texts: list[Any] = texts) -> str:
            texts.append(text)
            return text

        evaluate(ak.adopt(note, name=name, success=lambda e, p: True), CASES, repeats=3)
    assert seen["a"] == seen["b"]
    assert seen["a"][:20] == [c.inputs["text"] for c in CASES]
    assert seen["a"][20:40] != seen["a"][:20]


def test_a_metric_that_crashes_is_reported_and_never_a_zero():
    def shaky(example: Any, prediction: Any) -> float:
        return 1 / (prediction.n - 5)

    rows = evaluate(system(metrics=[shaky]), CASES, repeats=1)
    crashed = rows.filter(rows["case_id"] == "c05")
    assert crashed["shaky"].to_list() == [None]
    assert crashed["metric_errors"].to_list() == ["shaky: ZeroDivisionError: division by zero"]
    rule = Rule(metric="shaky", at_least=-1000.0)
    verdict = judge(rows, Thresholds(system="numbers", confidence=0.95, rules=(rule,)), None, set())
    assert verdict.verdict == "inconclusive"
    assert "crashed on 1 of 20 rows" in verdict.rules[0].text


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([1, 0, 1], [True, False, True]),
        ([np.bool_(True), np.False_, 1.0], [True, False, True]),
    ],
)
def test_success_may_be_said_as_one_and_zero(values, kept):
    rows = evaluate(system(lambda e, p: values[p.n]), CASES[:3], repeats=1)
    assert rows["success"].to_list() == kept


def test_a_metric_may_return_false_early_and_a_score_later():
    rows = evaluate(system(metrics=[named("mixed", lambda e, p: False if p.n == 0 else 0.7)]), CASES[:3], repeats=1)
    assert rows["mixed"].to_list() == [0.0, 0.7, 0.7]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (system(None), "names no success metric"),
        (system(lambda e, p: 0.7), "must return True or False"),
        (system(metrics=[named("kinds", lambda e, p: "yes" if p.n else 1.0)]), "different kinds"),
        (system(metrics=[named("cost_usd", lambda e, p: 0.0)]), "cannot be called 'cost_usd'"),
        (system(metrics=[named("a", lambda e, p: True), named("a", lambda e, p: True)]), "must differ"),
    ],
)
def test_what_cannot_be_scored_is_said(made, said):
    with pytest.raises(UsageError, match=said):
        evaluate(made, CASES[:3], repeats=1)


@pytest.mark.parametrize("stated", [85, -0.1, 1.0000001, float("nan"), "high", None, True])
def test_a_confidence_that_is_no_probability_is_none(stated):
    rows = evaluate(system(answer={"n": 1, "confidence": stated}), CASES[:2], repeats=1)
    expected = 1.0 if stated is True else None
    assert rows["confidence"].to_list() == [expected] * 2
    assert len(report.summarise(rows))


def test_text_that_is_no_unicode_costs_no_evaluation(tmp_path):
    rows = evaluate(system(answer={"n": 1, "text": "a\ud800b"}), CASES[:2], repeats=1)
    rows.write_parquet(tmp_path / "rows.parquet")
    assert rows["success"].all()


def test_unlabelled_cases_are_refused():
    case = Example(id="x", inputs={"text": "a"}, expected={}, task_type="t")
    with pytest.raises(UsageError, match="1 examples have no expected values yet"):
        evaluate(system(), [case], repeats=1)


def test_the_free_model_gets_eight_repeats_and_exercises_neither_cost_nor_latency():
    assert choose_repeats(system(), CASES, None) == 8
    assert exercised(system()) == frozenset()


@pytest.mark.parametrize("cases", [1, 20])
def test_a_summary_of_few_cases_is_shown_with_open_intervals(cases, capsys):
    class Done:
        version, folder = "numbers/1", __import__("pathlib").Path("x")
        results = evaluate(system(), CASES[:cases], repeats=1)

    terminal.show_summary(Done)
    assert "– ∞" in capsys.readouterr().out
    assert len(report.plots(Done.results)) == 2
    assert report.as_metrics(report.summarise(Done.results))["success"] == (1.0 if cases == 1 else 0.95)
