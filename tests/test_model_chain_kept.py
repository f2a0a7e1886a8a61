"""A model's answer given back instead of asked for: by the cache, by an interceptor that keeps a journal."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
from model_chain import DOWN, OTHER, TICKET, calls, second, triage  # noqa: F401
from provider import MODEL, Provider, Reply, Serve

import agentkit as ak
from agentkit.budget import Budget
from agentkit.calls import Call, intercept
from agentkit.repair import repairing
from agentkit.testing import FakeClock

# ---- cache

CACHED = "[cache]\nenabled = true\nseconds = 60\nentries = 2"


def test_a_kept_answer_costs_nothing_and_is_recorded_as_such(serve: Serve) -> None:
    provider = serve(Reply(tokens_in=100, tokens_out=10), more=CACHED)
    first, again = (triage().run(ticket=TICKET) for _ in range(2))
    assert first.output == again.output
    assert len(provider.requests) == 1
    (step,) = calls(again)
    assert (step.cached, step.model, step.tokens_in, step.usd) == (True, MODEL, 0, 0)
    assert (again.tokens_in, again.tokens_out, again.usd) == (0, 0, 0)
    assert triage(Budget(model_calls=0)).run(ticket=TICKET).state == "DONE"


def test_off_is_the_default(serve: Serve) -> None:
    provider = serve(Reply())
    for _ in range(2):
        assert not calls(triage().run(ticket=TICKET))[0].cached
    assert len(provider.requests) == 2


def test_everything_that_matters_is_in_the_key(serve: Serve, project: Path) -> None:
    provider = serve(Reply(), more=CACHED.replace("2", "99"))
    released = triage()
    released.release = "a" * 64
    hot = ak.adopt(dspy.Predict("ticket -> label", temperature=0.9), name="triage")
    for system, ticket in ((triage(), TICKET), (triage(), "other"), (released, TICKET), (hot, TICKET)):
        system.run(ticket=ticket)
    assert len(provider.requests) == 4
    with Provider(Reply()) as elsewhere:
        (project / "agentkit.toml").write_text(elsewhere.settings(more=CACHED.replace("2", "99")))
        triage().run(ticket=TICKET)
        assert len(elsewhere.requests) == 1


def test_answers_are_forgotten_after_their_time_and_the_oldest_when_there_are_too_many(serve: Serve) -> None:
    provider = serve(Reply(), more=CACHED)
    with FakeClock() as now:
        triage().run(ticket="1")
        now.tick(61)
        triage().run(ticket="1")
        for ticket in ("2", "3", "1"):
            triage().run(ticket=ticket)
    assert len(provider.requests) == 5


def test_an_evaluation_reads_no_cache_unless_asked(serve: Serve) -> None:
    provider = serve(Reply(), more=CACHED)
    for _ in range(2):
        triage().run(ticket=TICKET, kind="evaluation")
    assert len(provider.requests) == 2
    asked = serve(Reply(), more=f"{CACHED}\nevaluations = true")
    for _ in range(2):
        triage().run(ticket=TICKET, kind="evaluation")
    assert len(asked.requests) == 1


def test_neither_a_malformed_answer_nor_a_fallbacks_is_kept(
    serve: Serve, second: Callable[..., Provider], project: Path
) -> None:
    provider = serve(Reply(text="no idea"), more=CACHED)
    with dspy.context(adapter=repairing(None)):
        for _ in range(2):
            triage().run(ticket=TICKET)
    assert len(provider.requests) == 4
    first = serve(DOWN, Reply())
    other = second(first, num_retries=0)
    file = project / "agentkit.toml"
    file.write_text(f"{file.read_text()}\n{CACHED}")
    assert [calls(triage().run(ticket=TICKET))[-1].model for _ in range(2)] == [OTHER, MODEL]
    assert (len(first.requests), len(other.requests)) == (2, 1)


# ---- interceptors


class Journal:
    """Keeps what calls return, as JSON, and gives it back by the call's number when it has it."""

    def __init__(self) -> None:
        self.kept: dict[int, str] = {}
        self.calls: list[Call] = []
        self.attempts: list[Call] = []

    def call(self, call: Call, proceed: Callable[[], Any]) -> Any:
        self.calls.append(call)
        if call.number not in self.kept:
            self.kept[call.number] = json.dumps(proceed())
        return json.loads(self.kept[call.number])

    def attempt(self, call: Call, proceed: Callable[[], Any]) -> Any:
        self.attempts.append(call)
        return json.loads(json.dumps(proceed()))


def test_a_journal_gives_a_call_back_and_it_counts_but_is_not_made(
    serve: Serve, second: Callable[..., Provider]
) -> None:
    first = serve(DOWN)
    other = second(first, Reply(tokens_in=50, tokens_out=5), num_retries=0)
    journal = Journal()
    with intercept(journal):
        made = triage().run(ticket=TICKET)
        given = triage().run(ticket=TICKET)
    assert (len(first.requests), len(other.requests)) == (1, 1)
    assert given.output == made.output == {"label": "billing"}
    assert (given.tokens_in, given.tokens_out, given.usd) == (50, 5, pytest.approx(600 / 1e6))
    assert calls(given)[0].model == OTHER
    assert [c.name for c in journal.attempts] == [MODEL, OTHER]
    assert journal.calls[0].arguments["messages"] == first.requests[0]["messages"]
    assert "a-key" not in str(journal.calls[0].arguments)


def test_tool_calls_and_typed_answers_survive_a_journal(serve: Serve) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    body = {"model": "m", "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    provider = serve(Reply(body=json.dumps(body).encode()))

    def program(ticket: str) -> list[Any]:
        outputs = dspy.settings.lm(ticket)
        found = outputs[0]["tool_calls"][0]
        request = dspy.lm15.Request(model=MODEL, messages=(dspy.lm15.Message.user(ticket),))
        typed = dspy.settings.lm(request)
        return [found.function.name, found["function"]["arguments"], typed.tool_calls[0].input]

    system, journal = ak.adopt(program, name="program"), Journal()
    with intercept(journal):
        outputs = [system.run(ticket=TICKET).output for _ in range(2)]
    assert outputs[0] == outputs[1] == {"value": ["look", '{"at": "it"}', {"at": "it"}]}
    assert len(provider.requests) == 2
