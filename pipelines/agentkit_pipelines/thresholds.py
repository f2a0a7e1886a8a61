"""Thresholds: one YAML file per system that says what a version must prove before it is promoted.

The file is no part of a release, so that an author cannot choose the bar; its sha256 stands in the evidence.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from agentkit.errors import DataError

CHAOS = frozenset({"chaos_failure", "chaos_escalated", "chaos_violation"})
"""Shares of runs under an injected fault; measured where a rule asks for one of them."""
PROPORTIONS = frozenset({"success", "task_failure", "escalated"}) | CHAOS
SECONDS = frozenset({"latency_s", "planning_s", "execution_s", "reflection_s"})
COST_PER_SUCCESS = "cost_per_success_usd"
DOLLARS = frozenset({"cost_usd", COST_PER_SUCCESS})
LOWER_IS_BETTER = frozenset({"task_failure", "escalated"}) | CHAOS | SECONDS | DOLLARS
"""Metrics of which less is better; all others, those of the system included, are better when greater."""

Level = Literal["block", "warn"]
_FORMS = ("at_least", "at_most", "margin")
_EXPECTED = {
    "too_short": "at least one rule",
    "tuple_type": "a list of rules",
    "model_type": "a rule such as {metric: success, at_least: 0.75}",
    "string_too_short": "a name",
}


class Rule(BaseModel):
    """One limit on one metric; exactly one of `at_least`, `at_most`, or `margin` with `versus`.

    A rule passes when the one-sided bound clears the limit, not when the estimate does. Units are those of the metric:
    shares from 0 to 1, seconds, USD.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, json_schema_extra={"oneOf": [{"required": [form]} for form in _FORMS]}
    )

    metric: str = Field(min_length=1, description="A column of the results, or cost_per_success_usd.")
    at_least: FiniteFloat | None = Field(default=None, description="The metric's mean must be at least this.")
    at_most: FiniteFloat | None = Field(
        default=None, description="The metric's mean (or quantile) must be at most this."
    )
    margin: FiniteFloat | None = Field(
        default=None, gt=0, description="How much worse than `versus` the metric may be."
    )
    versus: Literal["production"] | None = Field(
        default=None, description="The version to compare with, on the same cases."
    )
    quantile: FiniteFloat | None = Field(
        default=None, gt=0, lt=1, description="Limit this quantile of the rows, e.g. 0.95."
    )
    by: Literal["task_type"] | None = Field(default=None, description="Judge every task type by itself.")
    level: Level = Field(default="block", description="block: needed for promotion; warn: only reported.")

    @property
    def id(self) -> str:
        """A name that is unique in its file and valid as an MLflow tag, e.g. `latency_s/p95/at_most/2.5`."""
        form, limit = self.limit
        parts = [
            self.metric,
            self.quantile and f"p{self.quantile * 100:g}",
            form,
            f"{limit:g}",
            self.by and f"by_{self.by}",
        ]
        return "/".join(part for part in parts if part)

    @property
    def limit(self) -> tuple[str, float]:
        """The form of the rule (`at_least`, `at_most` or `margin`) and its number."""
        return next((form, value) for form in _FORMS if (value := getattr(self, form)) is not None)

    @model_validator(mode="after")
    def _is_one_sensible_limit(self) -> Rule:
        forms = [form for form in _FORMS if getattr(self, form) is not None]
        if len(forms) != 1:
            raise ValueError(f"expected exactly one of {', '.join(_FORMS)}; found {' and '.join(forms) or 'none'}")
        if (self.margin is None) != (self.versus is None):
            raise ValueError(
                "expected margin and versus together, e.g. margin: 0.05, versus: production; found one of them"
            )
        if self.quantile is not None and self.at_most is None:
            raise ValueError(f"expected quantile only beside at_most; found it beside {forms[0]}")
        self._check_metric(*self.limit)
        return self

    def _check_metric(self, form: str, limit: float) -> None:
        if self.metric in PROPORTIONS:
            if self.quantile is not None:
                raise ValueError(
                    f"expected no quantile: {self.metric} is a share of yes or no; found {self.quantile:g}"
                )
            if not 0 < limit < 1:
                raise ValueError(
                    f"expected {form} between 0 and 1, both excluded (no sample proves them); found {limit:g}"
                )
        if self.metric in SECONDS | DOLLARS and limit <= 0:
            raise ValueError(f"expected {form} above 0; found {limit:g}")
        if self.metric == COST_PER_SUCCESS and (form != "at_most" or self.quantile is not None):
            raise ValueError(
                f"expected only at_most for {COST_PER_SUCCESS}; found {form if self.quantile is None else 'quantile'}"
            )


class Thresholds(BaseModel):
    """The rules of one system and the confidence, one-sided, at which each must be proven."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, title="Thresholds of a system")

    system: str = Field(min_length=1, description="Name of the registered system.")
    confidence: Annotated[FiniteFloat, Field(gt=0.5, lt=1, description="One-sided, e.g. 0.95.")]
    rules: tuple[Rule, ...] = Field(min_length=1, strict=False)

    @property
    def sha256(self) -> str:
        """Hash of the content: comments, layout and defaults written out do not change it, any number does."""
        content = self.model_dump(mode="json", exclude_none=True)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def wants_chaos(self) -> bool:
        """Whether a rule needs the runs under faults."""
        return any(rule.metric in CHAOS for rule in self.rules)

    @model_validator(mode="after")
    def _has_no_rule_twice(self) -> Thresholds:
        ids = [rule.id for rule in self.rules]
        if twice := sorted({i for i in ids if ids.count(i) > 1}):
            raise ValueError(f"expected every rule once; found twice: {', '.join(twice)}")
        return self


def json_schema() -> dict[str, Any]:
    """JSON Schema of a thresholds file, for editors and other tools."""
    return Thresholds.model_json_schema()


def load_thresholds(path: str | Path) -> Thresholds:
    """Read and validate a thresholds file.

    Raises agentkit.errors.DataError, whose `problems` say for each key what was expected and what was found.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a YAML file of thresholds") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected YAML; found {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        found = "an empty file" if content is None else f"{type(content).__name__} {content!r:.60}"
        raise DataError(f"{path}: expected the keys {', '.join(Thresholds.model_fields)}; found {found}")
    try:
        return Thresholds.model_validate(content)
    except ValidationError as error:
        problems = [
            _problem(dict(detail))
            for detail in error.errors()
            if not (detail["type"] == "too_short" and detail["input"])
        ]
        raise DataError(
            f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)} in the thresholds", problems
        ) from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets the last of two equal keys win silently: a second `at_least` would lower the bar unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _problem(detail: dict[str, Any]) -> str:
    """One line of pydantic's report in our words: place, what was expected, what was found, nearest key."""
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"]).lstrip(".")
    if detail["type"] == "extra_forbidden":
        key = str(detail["loc"][-1])
        valid = list((Rule if "rules" in detail["loc"][:-1] else Thresholds).model_fields)
        near = difflib.get_close_matches(key, valid, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{place}: expected one of the keys {', '.join(valid)}; found {key!r}{hint}"
    if detail["type"] == "missing":
        return f"{place}: expected this key; found none"
    if detail["type"] == "value_error":
        return f"{place or 'rules'}: {detail['ctx']['error']}"
    expected = _EXPECTED.get(detail["type"]) or detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{place}: expected {expected}; found {detail['input']!r:.80}"
