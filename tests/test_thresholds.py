"""Thresholds files: what is accepted, and that every mistake is named with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator  # type: ignore[import-untyped, unused-ignore]

from agentkit.errors import DataError
from agentkit_pipelines import thresholds
from agentkit_pipelines.thresholds import Rule, Thresholds, json_schema, load_thresholds

GOOD = """
system: support_triage
confidence: 0.95            # one-sided
rules:
  - {metric: success, at_least: 0.75}
  - {metric: success, at_least: 0.55, by: task_type}
  - {metric: task_failure, at_most: 0.08}
  - {metric: cost_per_success_usd, at_most: 0.28}
  - {metric: latency_s, quantile: 0.95, at_most: 2.5}
  - {metric: success, margin: 0.05, versus: production}
  - {metric: success, margin: 0.15, versus: production, by: task_type}
  - {metric: category, at_least: 0.7, level: warn}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "thresholds.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def rules(*lines: str) -> str:
    return "system: s\nconfidence: 0.95\nrules:\n" + "".join(f"  - {line}\n" for line in lines)


def complaint(folder: Path, text: str) -> str:
    with pytest.raises(DataError) as caught:
        load_thresholds(write(folder, text))
    assert "thresholds.yaml" in str(caught.value)
    return str(caught.value)


def test_a_good_file_loads(tmp_path: Path) -> None:
    loaded = load_thresholds(write(tmp_path, GOOD))
    assert (loaded.system, loaded.confidence, len(loaded.rules)) == ("support_triage", 0.95, 8)
    assert loaded.rules[4].id == "latency_s/p95/at_most/2.5"
    assert [rule.level for rule in loaded.rules] == ["block"] * 7 + ["warn"]
    assert Thresholds.model_validate_json(loaded.model_dump_json()) == loaded


def test_the_hash_follows_the_content_and_not_the_layout(tmp_path: Path) -> None:
    original = load_thresholds(write(tmp_path, GOOD)).sha256
    assert (
        load_thresholds(write(tmp_path, "# set in May\n" + GOOD.replace("0.75}", "0.750, level: block}"))).sha256
        == original
    )
    assert load_thresholds(write(tmp_path, GOOD.replace("0.75", "0.74"))).sha256 != original
    assert load_thresholds(write(tmp_path, GOOD.replace(", level: warn", ""))).sha256 != original


def test_values_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Rule(metric="success", at_least=0.7).at_least = 0.1  # type: ignore[misc, unused-ignore]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected the keys system, confidence, rules; found an empty file"),
        ("- 1", "found list [1]"),
        ("rules: [", "expected YAML"),
        ("system: s\nrules: []", "confidence: expected this key"),
        (rules(), "rules: expected a list of rules; found None"),
        ("system: s\nconfidence: 0.95\nrules: []", "rules: expected at least one rule"),
        (GOOD.replace("confidence", "confidance"), "did you mean 'confidence'?"),
        (GOOD + "success: 0.7\n", "success: expected one of the keys system, confidence, rules; found 'success'"),
        (GOOD.replace("0.95  ", "95  "), "confidence: expected less than 1; found 95"),
        (GOOD.replace("0.95  ", "0.5  "), "confidence: expected greater than 0.5; found 0.5"),
        (rules("success"), "rules[0]: expected a rule such as"),
        (rules("{metric: success, at_leest: 0.7}"), "rules[0].at_leest: expected one of the keys metric, at_least"),
        (rules("{metric: success, at_leest: 0.7}"), "did you mean 'at_least'?"),
        (rules("{metric: success}"), "expected exactly one of at_least, at_most, margin; found none"),
        (rules("{metric: success, at_least: 0.7, at_most: 0.8}"), "rules[0]: expected exactly one"),
        (rules("{metric: success, at_least: 0.7, margin: 0.1, versus: production}"), "found at_least and margin"),
        (rules("{metric: success, margin: 0.1}"), "expected margin and versus together"),
        (rules("{metric: success, at_least: 0.7, versus: production}"), "expected margin and versus together"),
        (rules("{metric: success, margin: 0.1, versus: staging}"), "versus: expected 'production'; found 'staging'"),
        (rules("{metric: success, margin: 0, versus: production}"), "margin: expected greater than 0; found 0"),
        (rules("{metric: success, at_least: 75}"), "expected at_least between 0 and 1, both excluded"),
        (rules("{metric: success, at_least: 1.0}"), "no sample proves them"),
        (rules("{metric: task_failure, at_most: 0}"), "expected at_most between 0 and 1"),
        (rules("{metric: success, at_least: '0.7'}"), "at_least: expected number; found '0.7'"),
        (rules("{metric: category, at_least: .nan}"), "at_least: expected a finite number"),
        (rules("{metric: latency_s, at_most: -1}"), "expected at_most above 0; found -1"),
        (rules("{metric: latency_s, quantile: 95, at_most: 2}"), "quantile: expected less than 1; found 95"),
        (rules("{metric: latency_s, quantile: 0.95, at_least: 2}"), "expected quantile only beside at_most"),
        (rules("{metric: success, quantile: 0.95, at_most: 0.9}"), "expected no quantile: success is a share"),
        (rules("{metric: cost_per_success_usd, at_least: 0.2}"), "expected only at_most for cost_per_success_usd"),
        (rules("{metric: success, at_least: 0.7, by: queue}"), "by: expected 'task_type'; found 'queue'"),
        (rules("{metric: success, at_least: 0.7, level: fatal}"), "level: expected 'block' or 'warn'; found 'fatal'"),
        (rules("{metric: '', at_least: 0.7}"), "rules[0].metric: expected a name; found ''"),
        (rules("{metric: success, at_least: 0.7, at_least: 0.1}"), "the key 'at_least' twice"),
        (rules("{metric: success, at_least: 0.7}", "{metric: success, at_least: 0.7, level: warn}"), "every rule once"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in complaint(tmp_path, text)


def test_all_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    text = rules("{metric: success, at_leest: 0.7}", "{metric: success, at_least: 2}", "{at_most: 1}")
    with pytest.raises(DataError) as caught:
        load_thresholds(write(tmp_path, text))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "rules[0].at_leest",
        "rules[1]",
        "rules[2].metric",
    ]


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.yaml: cannot be read"):
        load_thresholds(tmp_path / "absent.yaml")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thresholds.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="expected YAML"):
        load_thresholds(tmp_path / "thresholds.yaml")


def test_the_schema_accepts_what_loads_and_refuses_two_limits() -> None:
    validator = Draft202012Validator(json_schema())
    assert validator.is_valid(yaml.safe_load(GOOD))
    assert not validator.is_valid(yaml.safe_load(rules("{metric: success, at_least: 0.7, at_most: 0.8}")))
    assert not validator.is_valid(yaml.safe_load(rules("{metric: success, at_leest: 0.7}")))


def test_the_schema_file_beside_the_thresholds_is_the_one_of_the_code() -> None:
    file = Path(thresholds.__file__).with_suffix("") / "schema.json"
    assert json.loads(file.read_text()) == json_schema()
