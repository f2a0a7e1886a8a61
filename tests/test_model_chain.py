"""One model call on its way: cache, retries, circuit breaker, fallbacks, repair, streams, interceptors."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from provider import FAST, MODEL, Provider, Reply, Request, Serve, in_bad_health, prompt, serving

import agentkit as ak
from agentkit import models
from agentkit.asked import Asked
from agentkit.budget import Budget, Ledger
from agentkit.calls import Call, intercept
from agentkit.current import current_run
from agentkit.errors import MalformedOutput, ModelError, Stopped
from agentkit.models import build_lm
from agentkit.records import RunRecord, Step
from agentkit.repair import repairing
from agentkit.testing import FakeClock

TICKET = "I was charged twice for one order."
FREE = Budget.unlimited()
DOWN = Reply(status=500, headers=FAST)
OTHER = "openai/loopback-2"


@pytest.fixture
def serve(project: Path) -> Iterator[Serve]:
    models._breakers.clear()
    with serving(project) as start:
        yield start


@pytest.fixture
def second(project: Path) -> Iterator[Callable[..., Provider]]:
    """A second provider that answers when the first, at `first`, does not."""
    with ExitStack() as stack:

        def start(first: Provider, *script: Reply, **options: object) -> Provider:
            provider = stack.enter_context(Provider(*script))
            more = [
                "[fallbacks]",
                f'fast = ["{OTHER}"]',
                f'[options."{OTHER}"]',
                f'api_base = "{provider.url}"',
                'api_key = "other-key"',
                f'[prices."{OTHER}"]',
                "input = 10\noutput = 20",
            ]
            (project / "agentkit.toml").write_text(first.settings(more="\n".join(more), **options))
            return provider

        yield start


def triage(budget: Budget | None = None, **options: Any) -> ak.System:
    return ak.adopt(dspy.Predict("ticket -> label"), name="triage", budget=budget, **options)


def calls(record: RunRecord) -> list[Step]:
    return [s for s in record.steps if s.kind == "model"]


def decisions(record: RunRecord) -> list[tuple[str, Any, Any]]:
    return [(s.name, s.outputs, s.inputs) for s in record.steps if s.kind == "decision"]


# ---- retries


def test_a_retry_never_comes_sooner_than_the_server_asks_nor_all_at_once(serve: Serve) -> None:
    provider = serve(*[Reply(status=429, headers={"Retry-After": "7"})] * 2, Reply(), num_retries=2)
    with FakeClock() as now:
        record = triage().run(ticket=TICKET)
    assert record.state == "DONE"
    assert len(provider.requests) == 3
    assert 14 <= now.monotonic() <= 14 * 1.1


def test_back_off_doubles_and_has_jitter(serve: Serve) -> None:
    waits = []
    for _ in range(3):
        serve(*[Reply(status=500)] * 3, Reply(), num_retries=3)
        with FakeClock() as now:
            assert triage().run(ticket=TICKET).state == "DONE"
        waits.append(now.monotonic())
    assert all(1 + 2 + 4 <= wait <= 1 + 2 + 4 + 3 for wait in waits)
    assert len(set(waits)) == 3


def test_a_stop_cuts_a_long_wait_short(serve: Serve) -> None:
    provider = serve(Reply(status=429, headers={"Retry-After": "30"}))
    seen: list[ak.Run] = []

    class Operator(FakeClock):
        """Stops the run three seconds into its wait."""

        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            if self.monotonic() >= 3:
                with pytest.raises(Stopped):
                    seen[0].refuse(Stopped("by an operator"))

    def program(ticket: str) -> str:
        seen.append(current_run())  # type: ignore[arg-type]
        return str(dspy.Predict("ticket -> label")(ticket=ticket).label)

    with Operator() as now:
        record = ak.adopt(program, name="program").run(ticket=TICKET)
    assert record.error == "Stopped: by an operator"
    assert now.monotonic() < 5
    assert len(provider.requests) == 1


def test_a_request_is_not_waited_for_past_the_runs_time(serve: Serve) -> None:
    serve(Reply(delay=5), num_retries=2, timeout=30)
    record = triage(Budget(seconds=0.5)).run(ticket=TICKET)
    assert record.seconds < 3
    assert record.error is not None
    assert record.error.startswith("BudgetExceeded: budget of 0.5 seconds")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (Reply(cut=50), "LMTransportError"),
        (Reply(hang_up=True), "LMTransportError"),
        (Reply(body=b"<html>a gateway's error page"), "LMProviderError"),
        (Reply(body=b'{"choices": 3}'), "LMUnexpectedError"),
        (Reply(delay=1.0), "LMTransportError"),
        (Reply(status=503), "LMServerError"),
    ],
    ids=["cut off", "hung up", "gibberish", "odd JSON", "slow", "down"],
)
def test_a_reply_that_is_none_is_asked_for_again_and_both_attempts_are_recorded(
    serve: Serve, bad: Reply, said: str
) -> None:
    provider = serve(bad, Reply(), timeout=0.5)
    with FakeClock():
        record = triage().run(ticket=TICKET)
    assert (record.state, record.output) == ("DONE", {"label": "billing"})
    assert len(provider.requests) == record.model_calls == 2
    first, second = calls(record)
    assert first.error is not None
    assert first.error.startswith(said)
    assert second.error is None


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


# ---- circuit breaker


def test_a_provider_that_fails_again_and_again_is_left_alone_for_a_while(serve: Serve) -> None:
    provider = serve(*[DOWN] * 4, Reply(), num_retries=0, more="[circuit]\nfailures = 3\nseconds = 30")
    with FakeClock() as now:
        records = [triage().run(ticket=TICKET) for _ in range(5)]
        assert len(provider.requests) == 3
        assert records[3].error == (
            f"ModelError: {MODEL}: the provider is taken for down (too many failures in a row; the next try is in 30 s)"
        )
        assert records[4].model_calls == 0
        now.tick(31)
        assert triage().run(ticket=TICKET).state == "FAILED"  # the trial fails
        assert triage().run(ticket=TICKET).model_calls == 0
        now.tick(31)
        assert [triage().run(ticket=TICKET).state for _ in range(2)] == ["DONE", "DONE"]
    assert len(provider.requests) == 6


def test_rate_limits_and_refused_requests_do_not_open_the_circuit(serve: Serve) -> None:
    provider = serve(
        *[Reply(status=429), Reply(status=400), Reply(status=401)] * 3, num_retries=0, more="[circuit]\nfailures = 2"
    )
    for _ in range(9):
        triage().run(ticket=TICKET)
    assert len(provider.requests) == 9


# ---- fallbacks


@pytest.mark.parametrize(
    "bad",
    [
        DOWN,
        Reply(status=429, headers={"Retry-After": "3600"}),
        Reply(status=401),
        Reply(status=402),
        Reply(status=404, body=b'{"error": {"message": "gone", "code": "model_not_found"}}'),
        Reply(status=400, body=b'{"error": {"message": "too long", "code": "context_length_exceeded"}}'),
        Reply(body=b"<html>"),
        Reply(cut=20),
    ],
    ids=["down", "rate limit", "key revoked", "no credit", "retired", "too long", "gibberish", "cut off"],
)
def test_another_model_answers_when_this_one_cannot(serve: Serve, second: Callable[..., Provider], bad: Reply) -> None:
    first = serve(bad)
    other = second(first, Reply(tokens_in=50, tokens_out=5))
    with FakeClock():
        record = triage().run(ticket=TICKET)
    assert (record.state, record.output) == ("DONE", {"label": "billing"})
    assert calls(record)[-1].model == OTHER
    assert record.usd == pytest.approx((50 * 10 + 5 * 20) / 1e6)
    (name, model, why) = decisions(record)[0]
    assert (name, model) == ("fallback", OTHER)
    assert why.startswith(MODEL)
    assert other.keys == ["Bearer other-key"]
    assert prompt(other.requests[0]) == prompt(first.requests[0])


def test_an_open_circuit_falls_back_at_once(serve: Serve, second: Callable[..., Provider]) -> None:
    first = serve(DOWN)
    other = second(first, num_retries=0)
    (Path("agentkit.toml")).write_text(Path("agentkit.toml").read_text() + "\n[circuit]\nfailures = 2\n")
    with FakeClock():
        records = [triage().run(ticket=TICKET) for _ in range(4)]
    assert [r.state for r in records] == ["DONE"] * 4
    assert (len(first.requests), len(other.requests)) == (2, 4)
    assert "taken for down" in decisions(records[-1])[0][2]


@pytest.mark.parametrize("status", [400, 422])
def test_an_invalid_request_is_not_sent_to_another_model(
    serve: Serve, second: Callable[..., Provider], status: int
) -> None:
    first = serve(Reply(status=status))
    other = second(first)
    assert triage().run(ticket=TICKET).state == "FAILED"
    assert not other.requests


def test_a_refusal_never_falls_back(serve: Serve, second: Callable[..., Provider]) -> None:
    first = serve(DOWN, num_retries=9)
    other = second(first, num_retries=9)
    record = triage(Budget(model_calls=2)).run(ticket=TICKET)
    assert record.error is not None
    assert record.error.startswith("BudgetExceeded")
    assert not other.requests


def test_a_missing_key_is_a_fault_of_the_set_up_and_not_hidden_by_a_fallback(project: Path) -> None:
    (project / "agentkit.toml").write_text('[fallbacks]\n"openai/gpt-4.1-mini" = ["embedded/default"]')
    record = triage(model="openai/gpt-4.1-mini").run(ticket=TICKET)
    assert record.error is not None
    assert "no valid key" in record.error


def test_the_whole_chain_shares_the_runs_budget_and_says_what_failed(
    serve: Serve, second: Callable[..., Provider]
) -> None:
    first = serve(DOWN)
    second(first, Reply(status=401), num_retries=1)
    with FakeClock():
        record = triage().run(ticket=TICKET)
        short = triage(Budget(model_calls=2)).run(ticket=TICKET)
    assert record.error == (
        f"ModelError: {MODEL}: the provider answered with an error (it went wrong with 500); "
        f"{OTHER}: no valid key (it went wrong with 401); set the provider's key variable, OPENAI_API_KEY"
    )
    assert record.model_calls == 3
    assert short.error is not None
    assert short.error.startswith("BudgetExceeded: budget of 2 model_calls")


def test_a_chain_may_name_tiers_and_misspelt_names_are_refused_at_once(project: Path) -> None:
    (project / "agentkit.toml").write_text(
        '[models]\nfast = "openai/a"\nstrong = "openai/b"\n[fallbacks]\n"openai/a" = ["strong", "fast"]'
    )
    assert [lm.model for lm in build_lm("fast")._fallbacks()] == ["openai/b"]
    for table in ('fast = ["storng"]', 'storng = ["fast"]'):
        (project / "agentkit.toml").write_text(f'[models]\nfast = "openai/a"\n[fallbacks]\n{table}')
        with pytest.raises(ModelError, match="did you mean 'strong'"):
            build_lm("fast")


# ---- max_tokens


def most(request: Request) -> int | None:
    return request.get("max_completion_tokens") or request.get("max_tokens")


def test_a_limited_budget_limits_the_answer_that_is_asked_for(serve: Serve) -> None:
    provider = serve(Reply(tokens_out=100), price=(0, 1000), num_retries=0)
    assert triage(FREE).run(ticket=TICKET).state == "DONE"
    assert triage().run(ticket=TICKET).state == "DONE"
    assert triage(replace(FREE, tokens_out=700)).run(ticket=TICKET).state == "DONE"
    assert triage(replace(FREE, usd=0.5)).run(ticket=TICKET).state == "DONE"
    assert [most(r) for r in provider.requests] == [None, 2048, 700, 500]


def test_less_than_an_answers_worth_left_is_refused(serve: Serve) -> None:
    provider = serve(Reply(), price=(0, 1000))
    assert (triage(replace(FREE, tokens_out=200)).run(ticket=TICKET).error or "").startswith("BudgetExceeded")
    assert (triage(replace(FREE, usd=0.2)).run(ticket=TICKET).error or "").startswith("BudgetExceeded")
    assert not provider.requests


def test_a_reasoning_model_gets_room_to_reason(project: Path) -> None:
    with Provider(Reply()) as provider:
        name = "openai/gpt-5-mini"
        (project / "agentkit.toml").write_text(
            f'[options."{name}"]\napi_base = "{provider.url}"\napi_key = "k"\n[prices."{name}"]\ninput=1\noutput=1'
        )
        assert triage(model=name).run(ticket=TICKET).state == "DONE"
    assert provider.requests[0]["max_completion_tokens"] == 16_000


def test_a_typed_request_is_limited_and_answered_typed(serve: Serve) -> None:
    provider = serve(Reply(text="hello"))

    def program(ticket: str) -> str:
        request = dspy.lm15.Request(model=MODEL, messages=(dspy.lm15.Message.user(ticket),))
        return str(dspy.settings.lm(request).text)

    record = ak.adopt(program, name="typed").run(ticket=TICKET)
    assert record.output == {"value": "hello"}
    assert record.tokens_in == 100
    assert most(provider.requests[0]) == 2048


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


# ---- beside


def test_a_call_beside_an_event_loop_is_metered_and_runs_in_parallel(serve: Serve) -> None:
    provider = serve(Reply(delay=0.3))

    def program(ticket: str) -> int:
        async def ask() -> int:
            ask = dspy.Predict("ticket -> label")
            return len(await asyncio.gather(*(ask.acall(ticket=f"{ticket} {i}") for i in range(12))))

        return asyncio.run(ask())

    record = ak.adopt(program, name="program").run(ticket=TICKET)
    assert (record.output, record.model_calls, len(provider.requests)) == ({"value": 12}, 12, 12)
    assert record.seconds < 12 * 0.3 / 2


def test_a_model_can_be_copied_deeply_after_it_was_used(serve: Serve, second: Callable[..., Provider]) -> None:
    first = serve(DOWN, Reply())
    second(first, num_retries=0)
    lm = build_lm("fast")
    lm("hello")
    assert copy.deepcopy(lm)("hello") == lm("hello")


# ---- never past a limit

LIMITS = {"model_calls": 40, "tokens_in": 4_000, "tokens_out": 8_000, "usd": 5.0}


@pytest.mark.parametrize("limit", LIMITS)
def test_64_workers_never_pass_a_shared_limit_whatever_fails(serve: Serve, limit: str) -> None:
    provider = serve(
        *in_bad_health(400), price=(100, 1000), num_retries=2, max_tokens=256, more="[circuit]\nfailures = 1000"
    )
    shared, system = Ledger(replace(FREE, **{limit: LIMITS[limit]})), triage(FREE)
    with FakeClock(), ThreadPoolExecutor(64) as pool:
        records = list(pool.map(lambda i: system.run(ticket=f"{TICKET} {i}", ledger=shared), range(120)))
    used = {name: sum(getattr(r, name) for r in records) for name in LIMITS}
    assert used[limit] <= LIMITS[limit]
    assert used["model_calls"] == len(provider.requests)
    assert shared.used[limit] == pytest.approx(used[limit])
    assert used[limit] > LIMITS[limit] / 3  # calls in flight hold more than they will use, but not all of it
    errors = [r.error for r in records if r.error is not None]
    assert all(e.startswith((f"BudgetExceeded: budget of {LIMITS[limit]:g} {limit}", "ModelError")) for e in errors)


@settings(max_examples=40)
@given(
    left=st.integers(0, 6_000),
    usd=st.one_of(st.none(), st.floats(0, 2)),
    n=st.integers(1, 3),
    words=st.integers(0, 300),
    asked=st.one_of(st.none(), st.integers(1, 3_000)),
)
def test_what_is_reserved_is_what_the_provider_is_told(
    left: int, usd: float | None, n: int, words: int, asked: int | None
) -> None:
    lm = models.MeteredLM("openai/nobody", api_base="http://127.0.0.1:9", num_retries=0, max_tokens=asked)
    lm.price = models.Price(input=100, output=200)
    ledger = Ledger(replace(FREE, tokens_out=left, usd=usd))
    messages = [{"role": "user", "content": "word " * words}]
    reserved, limits = lm._reservation(ledger, Asked(None, messages, {"n": n}))
    told = asked or limits["max_tokens"]
    assert reserved["tokens_out"] == told * n
    assert reserved["usd"] == pytest.approx(lm.price.usd(reserved["tokens_in"], told * n))
    try:
        ledger.reserve(**reserved)
    except ak.AgentkitError:
        assert ledger.used["tokens_out"] == 0
    else:
        assert ledger.used["tokens_out"] <= left
        assert usd is None or ledger.used["usd"] <= usd + 1e-9
