"""Metrics: plain functions `metric(example, prediction) -> bool | float | str`.

`example` and `prediction` allow attribute access (`dspy.Example`, `dspy.Prediction`), so DSPy's own metrics fit
unchanged. A bool is an assertion, a float a score, a str a label. A metric that raises is reported as crashed on
that case, never as a zero. The prediction has the result's fields plus `route` and `record` (a `RunRecord`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Metric = Callable[[Any, Any], bool | float | str]
_PLACEHOLDER = re.compile(
    r"\{\s*[\w.]*\s*\}|\[(?:name|your name|customer|order|date|amount|link|insert[^\]]*)\]|<\w+>|\bTODO\b|\bXXX+\b",
    re.I,
)


def _named(name: str, metric: Metric) -> Metric:
    metric.__name__ = metric.__qualname__ = name
    return metric


def exact(field: str, *, name: str | None = None) -> Metric:
    """True when the field of the prediction equals that of the example."""
    return _named(name or field, lambda example, prediction: bool(getattr(prediction, field) == example[field]))


def overlap(field: str, *, name: str | None = None) -> Metric:
    """Set overlap of two lists, |A ∩ B| / |A ∪ B| (Jaccard index), 1.0 when both are empty."""

    def metric(example: Any, prediction: Any) -> float:
        expected, found = set(example[field]), set(getattr(prediction, field))
        return len(expected & found) / len(expected | found) if expected | found else 1.0

    return _named(name or f"{field}_overlap", metric)


def cites(expected: str, cited: str, *, name: str | None = None) -> Metric:
    """True when the expected article id (field of the example) is among those cited, or none is expected."""
    return _named(
        name or f"{expected}_cited",
        lambda example, prediction: not example[expected] or example[expected] in getattr(prediction, cited),
    )


def citations_supported(cited: str, tool: str, *, name: str | None = None) -> Metric:
    """True when every cited id was among the results of `tool` in this very run: nothing cited is made up."""

    def metric(example: Any, prediction: Any) -> bool:
        seen = str([s.outputs for s in prediction.record.steps if s.kind == "tool" and s.name == tool])
        return all(re.search(rf"(?<!\w){re.escape(str(i))}(?!\w)", seen) for i in getattr(prediction, cited))

    return _named(name or f"{cited}_supported", metric)


def no_placeholder(field: str, *, name: str | None = None) -> Metric:
    """True when the text is not empty and holds no leftover like `{name}`, `[customer]` or `TODO`."""

    def metric(example: Any, prediction: Any) -> bool:
        text = str(getattr(prediction, field))
        return bool(text.strip()) and not _PLACEHOLDER.search(text)

    return _named(name or f"{field}_clean", metric)


def cost_under(usd: float, *, name: str | None = None) -> Metric:
    """True when the run cost less than `usd`."""
    return _named(name or "cost_ok", lambda example, prediction: bool(prediction.record.usd < usd))


def latency_under(seconds: float, *, name: str | None = None) -> Metric:
    """True when the run took less than `seconds`, waiting for people not counted."""
    return _named(
        name or "latency_ok",
        lambda example, prediction: bool(prediction.record.seconds - prediction.record.waited_s < seconds),
    )
