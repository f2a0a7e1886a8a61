"""A model call never passes a limit: what is asked for, what is reserved, and many calls side by side."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import dspy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_chain import FREE, TICKET, triage
from provider import MODEL, Provider, Reply, Request, Serve, in_bad_health

import agentkit as ak
from agentkit import models
from agentkit.asked import Asked
from agentkit.budget import Ledger
from agentkit.testing import FakeClock

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
    # What a request that timed out or was cut off may have cost stays set aside.
    assert used[limit] * (1 - 1e-9) <= shared.used[limit] <= LIMITS[limit]
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


# ---- beside an event loop


def test_a_call_beside_an_event_loop_is_metered_and_runs_in_parallel(serve: Serve) -> None:
    together = threading.Barrier(6)  # answers only when so many have asked
    provider = serve(Reply(delay=lambda request: 0 * together.wait(60)))

    def program(ticket: str) -> int:
        async def ask() -> int:
            ask = dspy.Predict("ticket -> label")
            return len(await asyncio.gather(*(ask.acall(ticket=f"{ticket} {i}") for i in range(12))))

        return asyncio.run(ask())

    record = ak.adopt(program, name="program").run(ticket=TICKET)
    assert (record.output, record.model_calls, len(provider.requests)) == ({"value": 12}, 12, 12)
