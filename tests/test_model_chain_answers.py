"""A model's answer that cannot be used as it is: cut off, filtered, broken in a stream, malformed and repaired once."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import dspy
import pytest
from model_chain import TICKET, calls, decisions, second, triage  # noqa: F401
from provider import MODEL, Provider, Reply, Serve

import agentkit as ak
from agentkit.errors import MalformedOutput, ModelError
from agentkit.repair import repairing
from agentkit.testing import FakeClock

# ---- answers that are not whole


def test_an_answer_cut_off_at_max_tokens_is_not_taken_for_a_whole_one(serve: Serve) -> None:
    provider = serve(Reply(finish="length"))
    record = triage().run(ticket=TICKET)
    assert record.state == "FAILED"
    assert record.error is not None
    assert record.error.startswith(f"MalformedOutput: {MODEL}: the answer was cut off after 10 tokens; raise `max_tok")
    assert record.tokens_out == 10 * len(provider.requests)  # paid all the same


def test_an_answer_stopped_by_a_content_filter_is_an_error_and_no_other_model_is_asked(
    serve: Serve, second: Callable[..., Provider]
) -> None:
    first = serve(Reply(finish="content_filter"))
    other = second(first)
    record = triage().run(ticket=TICKET)
    assert record.error == f"ModelError: {MODEL}: the provider's content filter stopped the answer"
    assert not other.requests


def streamed(program: dspy.Module) -> list[Any]:
    async def read() -> list[Any]:
        return [part async for part in dspy.streamify(program)(ticket=TICKET)]

    return asyncio.run(read())


def test_a_stream_is_metered_like_any_call(serve: Serve) -> None:
    provider = serve(Reply(tokens_in=7, tokens_out=3))
    record = streamed(triage())[-1].record
    assert provider.requests[0]["stream"] is True
    assert (record.state, record.output) == ("DONE", {"label": "billing"})
    assert (record.model_calls, record.tokens_in, record.tokens_out) == (1, 7, 3)


def test_a_stream_cut_off_before_anything_was_shown_is_asked_for_again(serve: Serve) -> None:
    provider = serve(Reply(cut=0), Reply())
    with FakeClock():
        record = streamed(triage())[-1].record
    assert record.state == "DONE"
    assert len(provider.requests) == 2
    assert [s.error is None for s in calls(record)] == [False, True]


def test_a_stream_cut_off_half_way_ends_the_run_and_is_not_shown_twice(
    serve: Serve, second: Callable[..., Provider]
) -> None:
    first = serve(Reply(cut=3), Reply())
    other = second(first)
    with FakeClock(), pytest.raises(BaseException) as caught:  # noqa: PT011 - anyio wraps it in a group
        streamed(triage())
    group: BaseException = caught.value
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    assert isinstance(group, ModelError)
    assert "the stream was cut off" in str(group)
    assert len(first.requests) == 1
    assert not other.requests


# ---- repair


def test_a_malformed_answer_is_asked_for_once_more_with_what_was_wrong(serve: Serve) -> None:
    provider = serve(Reply(text="It is about billing."), Reply())
    with dspy.context(adapter=repairing(None)):
        record = triage().run(ticket=TICKET)
    assert (record.state, record.model_calls, record.tokens_in) == ("DONE", 2, 200)
    *before, said, told = provider.requests[1]["messages"]
    assert before == provider.requests[0]["messages"]
    assert (said["role"], said["content"]) == ("assistant", "It is about billing.")
    assert told["content"].startswith("Your answer could not be used: the answer cannot be read")
    assert [d[0] for d in decisions(record)] == ["repair"]


@pytest.mark.parametrize("adapter", [None, dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter()])
@pytest.mark.parametrize("text", ["no idea", ""])
def test_one_repair_whatever_the_adapter_then_a_typed_error(
    serve: Serve, adapter: dspy.Adapter | None, text: str
) -> None:
    provider = serve(Reply(text=text))
    with dspy.context(adapter=repairing(adapter)), pytest.raises(MalformedOutput) as caught:
        triage()(ticket=TICKET)
    assert len(provider.requests) == 2
    assert (caught.value.model, caught.value.repaired) == (MODEL, True)
    assert "\n" not in str(caught.value)


def test_a_cut_off_answer_is_asked_for_once_more_in_brief(serve: Serve) -> None:
    provider = serve(Reply(finish="length"), Reply())
    with dspy.context(adapter=repairing(None)):
        assert triage().run(ticket=TICKET).state == "DONE"
    assert "answer more briefly" in provider.requests[1]["messages"][-1]["content"]


def test_a_repair_beside_an_event_loop(serve: Serve) -> None:
    provider = serve(Reply(text="no idea"), Reply())

    def program(ticket: str) -> str:
        with dspy.context(adapter=repairing(None)):
            return str(asyncio.run(dspy.Predict("ticket -> label").acall(ticket=ticket)).label)

    record = ak.adopt(program, name="program").run(ticket=TICKET)
    assert (record.output, record.model_calls) == ({"value": "billing"}, 2)
    assert len(provider.requests[1]["messages"]) == len(provider.requests[0]["messages"]) + 2


def test_an_adapter_is_changed_in_a_copy_and_only_once() -> None:
    own = dspy.ChatAdapter()
    made = repairing(own)
    assert own.use_json_adapter_fallback
    assert isinstance(made, dspy.ChatAdapter)
    assert repairing(made) is made
    assert type(repairing(dspy.JSONAdapter())) is type(repairing(dspy.JSONAdapter()))


def test_the_repair_of_one_call_is_not_told_to_the_next(serve: Serve) -> None:
    provider = serve(Reply(text="no idea"), Reply(), Reply())
    with dspy.context(adapter=repairing(None)):
        triage().run(ticket=TICKET)
        triage().run(ticket=TICKET)
    assert provider.requests[2]["messages"] == provider.requests[0]["messages"]
