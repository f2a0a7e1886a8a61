"""Programs that exist already, as systems."""

from __future__ import annotations

import math
from typing import Any

import dspy
import pytest
from desks import WIFI, Technical, Triage, count_words, desk
from hedgehogs import Script, speaking

import agentkit as ak
from agentkit import Budget
from agentkit.errors import SourceError, UsageError


class Shouter:
    def __call__(self, text: str) -> dict[str, str]:
        return {"loud": text.upper()}


ADOPTED: dict[str, tuple[Any, str, str, dict[str, Any]]] = {
    "a predictor": (dspy.Predict("text -> long: bool"), "Predict", "Predict", {"long": True}),
    "a module": (Triage(), "Triage", "Triage", {"queue": "technical"}),
    "a chain of thought": (
        dspy.ChainOfThought("text -> long: bool"),
        "ChainOfThought",
        "ChainOfThought",
        {"reasoning": WIFI, "long": True},
    ),
    "a function": (count_words, "count_words", "count_words", {"value": 6}),
    "an object": (Shouter(), "Shouter", "Shouter", {"loud": WIFI.upper()}),
    "an agent": (Technical(), "technical", "technical", {"value": WIFI}),
}


@pytest.mark.parametrize(("program", "name", "route", "output"), ADOPTED.values(), ids=ADOPTED.keys())
def test_any_program_runs_unrewritten(
    program: Any, name: str, route: str, output: dict[str, Any], dspy_log: pytest.LogCaptureFixture
) -> None:
    system = ak.adopt(program)
    record = system.run(text=WIFI)
    assert (record.state, record.output, record.error) == ("DONE", output, None)
    assert (system.name, record.route) == (name, route)
    with pytest.raises(UsageError, match="it has no input 'txt'"):
        system.run(text=WIFI, txt=WIFI)
    assert dspy_log.messages == []


def test_a_system_is_adopted_as_it_is() -> None:
    system = desk()
    assert ak.adopt(system) is system


def test_options_reach_the_adopted_system() -> None:
    system = ak.adopt(Triage(), name="old_triage", budget=Budget(model_calls=0))
    assert system.name == "old_triage"
    assert "BudgetExceeded" in (system.run(text=WIFI).error or "")


def test_fields_that_are_called_route_and_record_do_not_get_in_the_way() -> None:
    system = ak.adopt(lambda text: {"route": "north", "record": 7, "km": 3}, name="navigator")
    prediction = system(text="x")
    assert prediction.record.output == {"route": "north", "record": 7, "km": 3}
    assert (prediction.route, prediction.km) == ("navigator", 3)


def test_a_program_that_returns_nothing_fails() -> None:
    record = ak.adopt(lambda text: None, name="silent").run(text="x")
    assert record.state == "FAILED"
    assert "the adopted program returned None" in (record.error or "")


class Later(dspy.Module):
    async def aforward(self, text: str) -> dspy.Prediction:
        return dspy.Prediction(text=text)


async def later(text: str) -> str:
    return text


class Awaited:
    async def __call__(self, text: str) -> str:
        return text


UNADOPTABLE: dict[str, tuple[Any, str]] = {
    "data": (7, "neither a dspy.Module nor callable"),
    "an asynchronous module": (Later(), "cannot adopt Later: it is asynchronous only"),
    "an asynchronous function": (later, "cannot adopt later: it is asynchronous only"),
    "an asynchronous object": (Awaited(), "cannot adopt Awaited: it is asynchronous only"),
    "a nameless function": (lambda text: text, "system name '_lambda_'"),
    "an input called kind": (lambda kind: kind, "rename the input 'kind'"),
}


@pytest.mark.parametrize(("program", "message"), UNADOPTABLE.values(), ids=UNADOPTABLE.keys())
def test_what_cannot_be_adopted_is_refused_with_the_reason(program: Any, message: str) -> None:
    options = {"name": "kind"} if "kind" in message else {}
    with pytest.raises(SourceError, match=message):
        ak.adopt(program, **options)


def test_model_calls_in_threads_that_dspy_starts_are_counted_and_limited() -> None:
    class Both(Triage):
        def forward(self, text: str) -> dict[str, Any]:  # type: ignore[override]
            pairs = [(self.route, {"text": text})] * 4
            found = dspy.Parallel(num_threads=2, disable_progress_bar=True)(pairs)
            return {"queues": [f.queue for f in found]}

    record = ak.adopt(Both()).run(text=WIFI)
    assert (record.output, record.model_calls) == ({"queues": ["technical"] * 4}, 4)
    record = ak.adopt(Both(), budget=Budget(model_calls=3)).run(text=WIFI)
    assert (record.state, record.model_calls) == ("FAILED", 3)


def test_a_model_pinned_in_an_adopted_program_is_metered_all_the_same() -> None:
    script = Script({"queue": "billing", "confidence": "1"})
    priced = ak.adopt(speaking(Triage(), script)).run(text=WIFI)
    assert (priced.output, priced.model_calls, priced.tokens_in) == ({"queue": "billing"}, 1, 100)
    assert priced.usd == pytest.approx(0.01)
    program = Triage()
    program.route.lm = dspy.LM("script/1", engine=Script(*script.answers), cache=False)
    record = ak.adopt(program).run(text=WIFI)
    assert (record.output, record.model_calls, record.tokens_in) == (priced.output, 1, 100)
    assert math.isnan(record.usd)  # nobody knows the price
