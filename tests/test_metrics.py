"""Ready metrics: what each one calls right."""

from __future__ import annotations

import math
from typing import Any

import dspy
import pytest
from hedgehogs import doing

import agentkit as ak
from agentkit import Run, metrics


def expected(**fields: Any) -> dspy.Example:
    return dspy.Example(**fields)


def found(**fields: Any) -> dspy.Prediction:
    return dspy.Prediction(**fields)


def test_exact_compares_one_field() -> None:
    metric = metrics.exact("queue")
    assert metric.__name__ == "queue"
    assert metric(expected(queue="billing"), found(queue="billing")) is True
    assert metric(expected(queue="billing"), found(queue="Billing")) is False
    assert metric(expected(queue=None), found(queue=None)) is True


@pytest.mark.parametrize(
    ("want", "have", "score"),
    [
        (["a", "b"], ["b", "a"], 1.0),
        (["a", "b"], ["b", "c"], 1 / 3),
        (["a"], ["b"], 0.0),
        (["a"], [], 0.0),
        ([], [], 1.0),
        (["a", "a"], ["a"], 1.0),
    ],
)
def test_overlap_is_the_jaccard_index(want: list[str], have: list[str], score: float) -> None:
    metric = metrics.overlap("tags")
    assert metric.__name__ == "tags_overlap"
    assert metric(expected(tags=want), found(tags=have)) == pytest.approx(score)
    assert metric(expected(tags=have), found(tags=want)) == pytest.approx(score)


def test_cites_wants_the_expected_article_among_those_cited() -> None:
    metric = metrics.cites("article", "cited")
    assert metric.__name__ == "article_cited"
    assert metric(expected(article="kb-1"), found(cited=["kb-2", "kb-1"])) is True
    assert metric(expected(article="kb-1"), found(cited=["kb-10"])) is False
    assert metric(expected(article="kb-1"), found(cited=[])) is False
    assert metric(expected(article=None), found(cited=["kb-2"])) is True


@ak.tool
def search(query: str) -> list[dict[str, str]]:
    """Find articles."""
    return [{"id": "kb-1", "title": "Refunds"}, {"id": "kb-12", "title": "See kb-30"}]


@ak.tool
def browse(query: str) -> list[dict[str, str]]:
    """Find something else."""
    return [{"id": "kb-9"}]


@pytest.mark.parametrize(
    ("cited", "supported"),
    [
        (["kb-1", "kb-12"], True),
        ([], True),
        (["kb-2"], False),
        (["kb-1", "kb-2"], False),
        (["kb"], True),  # a word of an id; ids are whole words
        (["b-1"], False),
        (["kb-9"], False),  # another tool's
        (["kb.12"], False),  # no pattern
    ],
)
def test_citations_are_supported_by_what_the_tool_returned_in_this_run(cited: list[str], supported: bool) -> None:
    def work(run: Run) -> list[str]:
        run.call(search, query="x")
        run.call(browse, query="x")
        return cited

    prediction = doing(work, search, browse)(text="x")
    assert metrics.citations_supported("value", "search")(expected(), prediction) is supported
    assert metrics.citations_supported("value", "unused")(expected(), prediction) is (not cited)


@pytest.mark.parametrize(
    "text",
    [
        "Dear {name},",
        "Dear {{ customer_name }}",
        "We sent it on [date].",
        "[insert link here]",
        "TODO",
        "<order_id>",
        "XXX",
        "{}",
        " ",
    ],
)
def test_a_reply_with_a_leftover_is_not_clean(text: str) -> None:
    assert metrics.no_placeholder("reply")(expected(), found(reply=text)) is False


@pytest.mark.parametrize(
    "text", ["Done. {see note 1}", "It costs < 5 and > 3", "Press [OK]", "I like to do it", "Ann [she]"]
)
def test_brackets_with_a_meaning_are_clean(text: str) -> None:
    assert metrics.no_placeholder("reply")(expected(), found(reply=text)) is True


class Costly:
    """A record as far as cost and latency go."""

    def __init__(self, usd: float = 0.0, seconds: float = 0.0, waited_s: float = 0.0) -> None:
        self.usd, self.seconds, self.waited_s = usd, seconds, waited_s


def test_cost_under_wants_less_and_an_unknown_cost_is_not_less() -> None:
    metric = metrics.cost_under(0.28)
    assert [metric(expected(), found(record=Costly(usd=usd))) for usd in (0.27, 0.28, 0.29, math.nan)] == [
        True,
        False,
        False,
        False,
    ]


def test_latency_under_does_not_count_waiting_for_people() -> None:
    metric = metrics.latency_under(2.5)
    records = [
        Costly(seconds=2.4),
        Costly(seconds=2.5),
        Costly(seconds=602.4, waited_s=600),
        Costly(seconds=603, waited_s=600),
    ]
    assert [metric(expected(), found(record=r)) for r in records] == [True, False, True, False]


def test_metrics_can_be_given_a_name_and_two_of_a_kind_do_not_share_one() -> None:
    first, second = metrics.exact("queue", name="routing"), metrics.exact("action")
    assert (first.__name__, second.__name__) == ("routing", "action")
    named = [
        metrics.overlap("a", name="n"),
        metrics.cites("a", "b", name="n"),
        metrics.citations_supported("a", "b", name="n"),
        metrics.no_placeholder("a", name="n"),
        metrics.cost_under(1, name="n"),
        metrics.latency_under(1, name="n"),
    ]
    assert {m.__name__ for m in named} == {"n"}


def test_a_metric_does_not_hide_a_field_that_is_missing() -> None:
    for metric in (metrics.exact("queue"), metrics.overlap("queue"), metrics.cites("queue", "queue")):
        with pytest.raises((KeyError, AttributeError)):
            metric(expected(), found())
