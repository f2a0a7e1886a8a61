"""Models by name, the provider path over HTTP, and budgets that stop the next request."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from provider import FAST, MODEL, Reply, Serve, prompt

import agentkit as ak
from agentkit.budget import Budget, Ledger
from agentkit.errors import BudgetExceeded, DataError, ModelError
from agentkit.models import EMBEDDED, build_lm, load_settings, resolve_name
from agentkit.records import RunRecord

TICKET = "I was charged twice for one order."
FREE = Budget(None, None, None, None, None, None)


def triage(budget: Budget | None = None) -> ak.System:
    return ak.adopt(dspy.Predict("ticket -> label"), name="triage", budget=budget)


def several(calls: int, budget: Budget) -> ak.System:
    """A program that asks the model `calls` times, one after another."""

    class Several(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ask = dspy.Predict("ticket -> label", max_tokens=20)

        def forward(self, ticket: str) -> dspy.Prediction:
            return [self.ask(ticket=ticket) for _ in range(calls)][-1]

    return ak.adopt(Several(), name="several", budget=budget)


# ---- names and settings


def test_both_tiers_are_the_embedded_model_until_a_settings_file_says_otherwise(project: Path) -> None:
    assert build_lm("fast").model == build_lm("strong").model == EMBEDDED
    (project / "agentkit.toml").write_text('[models]\nstrong = "openai/gpt-4.1"\ncheap = "ollama_chat/llama3"')
    settings = load_settings()
    assert [resolve_name(n, settings) for n in ("fast", "strong", "cheap")] == [
        EMBEDDED,
        "openai/gpt-4.1",
        "ollama_chat/llama3",
    ]


def test_the_settings_file_is_the_nearest_one_upwards(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "agentkit.toml").write_text('[models]\nfast = "openai/far"')
    (project / "near" / "deep").mkdir(parents=True)
    (project / "near" / "agentkit.toml").write_text('[models]\nfast = "openai/near"')
    monkeypatch.chdir(project / "near" / "deep")
    assert load_settings().models == {"fast": "openai/near"}


def test_agentkit_lm_replaces_every_tier_but_no_model_named_in_full(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "agentkit.toml").write_text('[models]\ncheap = "ollama_chat/llama3"')
    monkeypatch.setenv("AGENTKIT_LM", "anthropic/claude")
    settings = load_settings()
    assert {resolve_name(n, settings) for n in ("fast", "strong", "cheap")} == {"anthropic/claude"}
    assert resolve_name("openai/gpt-4.1", settings) == "openai/gpt-4.1"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'[modles]\nfast = "openai/x"', "modles: unknown key"),
        (b'[prices."openai/x"]\ninput = 1\noutput = 2\nper = 1000', "prices.openai/x.per: unknown key"),
        (b'[prices."openai/x"]\ninput = -1\noutput = 2', "prices.openai/x.input: Input should be greater than"),
        (b'[prices."openai/x"]\ninput = inf\noutput = 2', "prices.openai/x.input: Input should be a finite number"),
        (b'[prices."openai/x"]\ninput = 1', "prices.openai/x.output: Field required"),
        (b"[models]\nfast = 3", "models.fast: Input should be a valid string"),
        (b"[models\n", "not valid TOML"),
        ('[models]\nfast = "openai/né"'.encode("latin-1"), "not valid TOML"),
    ],
)
def test_a_wrong_settings_file_is_named_with_the_key_in_a_line(project: Path, content: bytes, says: str) -> None:
    file = project / "agentkit.toml"
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        build_lm("fast")
    head, *problems = str(caught.value).splitlines()
    assert str(file) in head
    assert len(problems) <= 1
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fsat", "neither a tier of agentkit.toml nor of the form provider/model; did you mean 'fast'?"),
        ("gpt", "neither a tier of agentkit.toml nor of the form provider/model"),
        ("bare", "tier 'bare' stands for 'gpt-4.1', which is not of the form provider/model"),
        ("embedded/large", "there is one: 'embedded/default'"),
        ("openai/", "no model id"),
        ("openai/odd", "num_retries must be a nonnegative integer"),
    ],
)
def test_an_unusable_name_is_refused_before_any_call(project: Path, name: str, says: str) -> None:
    (project / "agentkit.toml").write_text('[models]\nbare = "gpt-4.1"\n[options."openai/odd"]\nnum_retries = "two"')
    with pytest.raises(ModelError) as caught:
        build_lm(name)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fitted_weights_are_refused_with_a_providers_model() -> None:
    rows = [{"ticket": f"{word} {i}", "label": word} for i in range(8) for word in ("refund", "crash")]
    weights = ak.fit(dspy.Predict("ticket -> label: Literal['refund', 'crash']"), rows)
    with pytest.raises(ModelError, match="weights belong to the embedded engine"):
        build_lm(MODEL, weights=weights)


def test_a_price_comes_from_the_settings_then_from_the_published_table_then_not_at_all(project: Path) -> None:
    published = build_lm("openai/gpt-4.1-mini").price
    assert published is not None
    assert 0 < published.input < published.output < 100
    (project / "agentkit.toml").write_text('[prices."openai/gpt-4.1-mini"]\ninput = 7\noutput = 8')
    own = build_lm("openai/gpt-4.1-mini").price
    assert own is not None
    assert own.usd(1_000_000, 500_000) == 11
    assert build_lm(MODEL).price is None


# ---- one request over HTTP


def test_an_answer_is_recorded_with_its_usage_and_its_cost_by_our_prices(serve: Serve) -> None:
    provider = serve(Reply(tokens_in=1200, tokens_out=50), price=(2, 10))
    record = triage().run(ticket=TICKET)
    assert (record.state, record.output) == ("DONE", {"label": "billing"})
    assert (record.model_calls, record.tokens_in, record.tokens_out) == (1, 1200, 50)
    assert record.usd == pytest.approx(1200 * 2e-6 + 50 * 10e-6)
    assert [r["model"] for r in provider.requests] == ["loopback-1"]
    assert TICKET in prompt(provider.requests[0])
    assert provider.keys == ["Bearer a-key"]


def test_the_provider_path_needs_no_litellm(serve: Serve) -> None:
    provider = serve()
    code = (
        "import sys, dspy, agentkit as ak; "
        f"record = ak.adopt(dspy.Predict('ticket -> label'), name='triage').run(ticket={TICKET!r}); "
        "print(record.state, 'litellm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["DONE", "False"]
    assert len(provider.requests) == 1


def test_a_rate_limit_is_waited_for_as_long_as_the_server_asks(serve: Serve) -> None:
    provider = serve(Reply(status=429, headers={"Retry-After": "1.6"}), Reply())
    record = triage().run(ticket=TICKET)
    assert record.state == "DONE"
    assert provider.times[1] - provider.times[0] >= 1.6  # the wait without being asked is 1 s


@pytest.mark.parametrize(("asked", "budget"), [("3600", Budget()), ("50", Budget(seconds=30))])
def test_a_wait_past_a_minute_or_the_runs_deadline_is_not_begun(serve: Serve, asked: str, budget: Budget) -> None:
    provider = serve(Reply(status=429, headers={"Retry-After": asked}))
    record = triage(budget).run(ticket=TICKET)
    assert record.seconds < 25
    assert len(provider.requests) == 1
    assert record.error == (
        f"ModelError: {MODEL}: rate limited (it went wrong with 429, asks to wait {asked} s); run fewer workers or wait"
    )


def test_a_server_error_is_retried_after_one_to_two_seconds_and_both_attempts_are_recorded(serve: Serve) -> None:
    provider = serve(Reply(status=500), Reply())
    record = triage().run(ticket=TICKET)
    assert record.state == "DONE"
    assert 1.0 <= provider.times[1] - provider.times[0] < 2.5  # the second is jitter
    first, second = (s for s in record.steps if s.kind == "model")
    assert first.error is not None
    assert (second.error, second.tokens_in, record.tokens_in) == (None, 100, 100)


def test_a_lasting_server_error_ends_the_run_after_the_configured_retries(serve: Serve) -> None:
    provider = serve(Reply(status=500, headers=FAST), num_retries=3)
    record = triage().run(ticket=TICKET)
    assert record.state == "FAILED"
    assert record.error == f"ModelError: {MODEL}: the provider answered with an error (it went wrong with 500)"
    assert len(provider.requests) == record.model_calls == 4


NOT_FOUND = (
    b'{"error": {"message": "The model does not exist", "type": "invalid_request_error", "code": "model_not_found"}}'
)


@pytest.mark.parametrize(
    ("reply", "options", "says"),
    [
        (Reply(delay=0.5), {"timeout": 0.1}, "the model did not answer in time (read timed out"),
        (Reply(status=504), {}, "the model did not answer in time (it went wrong with 504)"),
        (Reply(body=b"{not json"), {}, "the provider answered with an error (the reply (HTTP 200"),
        (Reply(body=b"<html>\n<h1>a proxy</h1>"), {}, "the provider answered with an error (the reply (HTTP 200"),
        (Reply(body=b'{"choices": 3}'), {}, "the call failed (choices must be an array)"),
        (Reply(hang_up=True), {}, "the server cannot be reached (server closed connection"),
        (Reply(), {"api_base": "http://127.0.0.1:9/v1"}, "the server cannot be reached (failed to connect to 127."),
        (Reply(status=401), {}, "no valid key (it went wrong with 401)"),
        (Reply(status=404, body=NOT_FOUND), {}, "unknown model (The model does not exist); check the name"),
        (Reply(status=400), {}, "the provider answered with an error (it went wrong with 400)"),
        (Reply(status=503, body=b"<html>\nbad gateway"), {}, "the provider answered with an error (<html>)"),
    ],
)
def test_a_failing_provider_ends_the_run_with_one_clear_line(
    serve: Serve, reply: Reply, options: dict[str, Any], says: str
) -> None:
    serve(reply, num_retries=0, **options)
    record = triage().run(ticket=TICKET)
    assert (record.state, record.output, record.usd) == ("FAILED", None, 0)
    assert record.error is not None
    assert record.error.startswith(f"ModelError: {MODEL}: {says}")
    assert "\n" not in record.error
    assert len(record.error) < 400


@pytest.mark.parametrize(
    ("model", "key"), [("openai/gpt-4.1-mini", "OPENAI_API_KEY"), ("anthropic/claude", "ANTHROPIC_API_KEY")]
)
def test_a_missing_key_is_named_by_its_variable(model: str, key: str) -> None:
    record = ak.adopt(dspy.Predict("ticket -> label"), name="triage", model=model).run(ticket=TICKET)
    assert record.state == "FAILED"
    assert record.error is not None
    assert record.error.startswith(f"ModelError: {model}: no valid key")
    assert record.error.endswith(f"set the provider's key variable, {key}")
    assert "\n" not in record.error


def test_an_answer_of_the_wrong_form_is_asked_for_once_more_and_both_are_paid(serve: Serve) -> None:
    provider = serve(Reply(text="It is about billing."))
    record = triage().run(ticket=TICKET)
    assert record.state == "FAILED"
    assert len(provider.requests) == record.model_calls == 2
    assert record.usd == pytest.approx(2 * (100 * 1000 + 10 * 2000) / 1e6)


# ---- nothing escapes the meter


class Async(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ask = dspy.Predict("ticket -> label")

    def forward(self, ticket: str) -> dspy.Prediction:
        return asyncio.run(self.ask.acall(ticket=ticket))


class WithoutHistory(Async):
    def forward(self, ticket: str) -> dspy.Prediction:
        with dspy.context(disable_history=True):
            return self.ask(ticket=ticket)


class Cached(Async):
    def forward(self, ticket: str) -> dspy.Prediction:
        self.ask(ticket="a ticket of another run", config={"cache": True})
        return self.ask(ticket="a ticket of another run", config={"cache": True})


@pytest.mark.parametrize(("program", "calls"), [(Async, 1), (WithoutHistory, 1), (Cached, 2)])
def test_a_call_is_metered_however_the_program_makes_it(serve: Serve, program: type[Async], calls: int) -> None:
    provider = serve(Reply(status=500, headers=FAST), Reply())
    record = ak.adopt(program(), name="triage").run(ticket=TICKET)
    assert (record.state, record.tokens_in) == ("DONE", 100 * calls)
    assert record.usd == pytest.approx(0.12 * calls)
    assert len(provider.requests) == record.model_calls == calls + 1


def test_a_model_that_a_program_pinned_is_metered_priced_and_not_cached(serve: Serve) -> None:
    provider = serve(Reply(status=500, headers=FAST), Reply())
    program = dspy.Predict("ticket -> label")
    program.lm = dspy.LM(MODEL, api_base=provider.url, api_key="a-key")
    system = ak.adopt(program, name="triage", budget=Budget(usd=5))
    records = [system.run(ticket=TICKET) for _ in range(2)]
    assert [r.usd for r in records] == pytest.approx([0.12, 0.12])
    assert [r.model_calls for r in records] == [2, 1]
    assert len(provider.requests) == 3


def test_an_answer_without_usage_has_no_known_cost_and_keeps_its_reservation(serve: Serve) -> None:
    provider = serve(Reply(usage=False), price=(0, 1000))
    record = several(5, Budget(usd=0.05)).run(ticket=TICKET)  # 20 tokens out are reserved: 0.02 USD a call
    assert math.isnan(record.usd)
    assert record.error is not None
    assert record.error.startswith("BudgetExceeded: budget of 0.05 usd")
    assert len(provider.requests) == 2


def test_an_answer_without_usage_of_a_free_model_is_free(serve: Serve) -> None:
    serve(Reply(usage=False), price=(0, 0))
    assert triage().run(ticket=TICKET).usd == 0


# ---- budgets


@pytest.mark.parametrize(
    ("budget", "limit", "sent"),
    [
        (replace(FREE, model_calls=3), "3 model_calls", 3),
        (replace(FREE, tokens_in=500), "500 tokens_in", 4),  # about 180 are reserved, 100 used
        (replace(FREE, tokens_out=35), "35 tokens_out", 2),  # 20 are reserved, 10 used
        (replace(FREE, usd=0.1), "0.1 usd", 4),  # 0.04 is reserved, 0.02 used
        (replace(FREE, model_calls=0), "0 model_calls", 0),
        (replace(FREE, usd=0), "0 usd", 0),
    ],
)
def test_a_budget_stops_the_next_request(serve: Serve, budget: Budget, limit: str, sent: int) -> None:
    provider = serve(Reply(), price=(0, 2000))
    record = several(9, budget).run(ticket=TICKET)
    assert record.state == "FAILED"
    assert record.error is not None
    assert record.error.startswith(f"BudgetExceeded: budget of {limit} would be exceeded")
    assert len(provider.requests) == record.model_calls == sent


def test_a_run_past_its_time_sends_nothing_more(serve: Serve) -> None:
    provider = serve(Reply(delay=0.3))
    record = several(9, Budget(seconds=0.5)).run(ticket=TICKET)
    assert record.error is not None
    assert record.error.startswith("BudgetExceeded: budget of 0.5 seconds")
    assert len(provider.requests) == 2


def test_a_reservation_is_settled_to_what_was_used(serve: Serve) -> None:
    provider = serve(Reply(tokens_out=1), price=(0, 1000))  # reserved: 0.02 USD a call, used: 0.001
    record = several(9, Budget(usd=0.03)).run(ticket=TICKET)
    assert record.state == "DONE"
    assert record.usd == pytest.approx(0.009)
    assert len(provider.requests) == 9


def test_the_longest_answer_asked_for_is_what_is_reserved(serve: Serve) -> None:
    provider = serve(Reply(), price=(0, 1000), max_tokens=60)
    refused = triage(Budget(usd=0.05)).run(ticket=TICKET)
    assert refused.error is not None
    assert "0 used, 0.06 more asked for" in refused.error
    assert not provider.requests
    assert triage(Budget(usd=0.07)).run(ticket=TICKET).state == "DONE"
    assert provider.requests[0]["max_completion_tokens"] == 60


def test_every_attempt_counts_against_the_budget(serve: Serve) -> None:
    provider = serve(Reply(status=500, headers=FAST), num_retries=9)
    record = triage(Budget(model_calls=3)).run(ticket=TICKET)
    assert record.error is not None
    assert record.error.startswith("BudgetExceeded: budget of 3 model_calls")
    assert len(provider.requests) == 3


@pytest.mark.parametrize("shared", [False, True], ids=["its own", "shared"])
def test_a_usd_limit_without_a_known_price_sends_nothing(serve: Serve, shared: bool) -> None:
    provider = serve(Reply(), price=None)
    limit = Budget(usd=1)
    record = triage(None if shared else limit).run(ticket=TICKET, ledger=Ledger(limit) if shared else None)
    assert record.state == "FAILED"
    assert record.error == f"ModelError: a USD limit is set but no price is known for {MODEL}; add it to [prices]"
    assert not provider.requests


def test_without_a_usd_limit_an_unknown_price_is_recorded_as_unknown(serve: Serve) -> None:
    serve(Reply(), price=None)
    record = triage().run(ticket=TICKET)
    assert record.state == "DONE"
    assert math.isnan(record.usd)


def test_a_system_called_inside_a_run_spends_its_callers_budget(serve: Serve) -> None:
    provider = serve(Reply(), price=(0, 1000))
    inner = several(2, Budget())

    def outer(ticket: str) -> list[str | None]:
        return [inner.run(ticket=ticket).error for _ in range(4)]

    record = ak.adopt(outer, budget=Budget(usd=0.055)).run(ticket=TICKET)  # 0.01 a call, 0.02 reserved
    assert len(provider.requests) == 4
    assert record.output is not None
    assert [e is None for e in record.output["value"]] == [True, True, False, False]


def test_threads_together_never_spend_more_than_their_shared_budget(serve: Serve) -> None:
    provider = serve(Reply(delay=0.02), price=(0, 1000), max_tokens=10)  # 0.01 USD reserved and used
    shared, system = Ledger(replace(FREE, usd=0.255)), triage(FREE)

    def one(_: int) -> RunRecord:
        return system.run(ticket=TICKET, ledger=shared)

    with ThreadPoolExecutor(32) as pool:
        records = list(pool.map(one, range(60)))
    assert len(provider.requests) == sum(r.state == "DONE" for r in records) == 25
    assert shared.used["usd"] == pytest.approx(0.25)
    assert all(r.error is None or r.error.startswith("BudgetExceeded: budget of 0.255 usd") for r in records)


AMOUNTS = st.tuples(st.integers(0, 2), st.integers(0, 60), st.floats(0, 1))  # whose call, reserved, share of it used


@given(st.lists(AMOUNTS, max_size=60), st.integers(0, 200), st.lists(st.integers(0, 100), min_size=3, max_size=3))
def test_a_shared_ledger_holds_the_sum_of_its_runs_and_never_passes_its_limit(
    calls: list[tuple[int, int, float]], limit: int, limits: list[int]
) -> None:
    shared = Ledger(replace(FREE, tokens_in=limit))
    runs = [Ledger(replace(FREE, tokens_in=own), shared) for own in limits]
    open_calls: list[tuple[Ledger, int, float]] = []
    for i, (whose, amount, share) in enumerate(calls):
        before = [r.used["tokens_in"] for r in (shared, *runs)]
        try:
            runs[whose].reserve(tokens_in=amount)
        except BudgetExceeded:
            assert before == [r.used["tokens_in"] for r in (shared, *runs)]
            assert before[0] + amount > limit or before[whose + 1] + amount > limits[whose]
        else:
            open_calls.append((runs[whose], amount, share))
        if i % 2 and open_calls:
            ledger, amount, share = open_calls.pop(0)
            ledger.settle({"tokens_in": amount}, {"tokens_in": amount * share})
        assert shared.used["tokens_in"] == pytest.approx(sum(r.used["tokens_in"] for r in runs))
        assert shared.used["tokens_in"] <= limit + 1e-9
        assert all(r.used["tokens_in"] <= own + 1e-9 for r, own in zip(runs, limits, strict=True))


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Let threads take turns as often as they can, so that a race shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty_threads")
def test_a_shared_ledger_holds_its_limit_against_32_threads() -> None:
    shared, seen, start = Ledger(replace(FREE, usd=10)), [], threading.Barrier(32)
    really = 2.0**-12  # exact in binary

    def spend(_: int) -> int:
        run, granted = Ledger(FREE, shared), 0
        start.wait()
        for _ in range(1000):
            try:
                run.reserve(usd=2)
            except BudgetExceeded:
                continue
            seen.append(shared.used["usd"])
            run.settle({"usd": 2}, {"usd": really})
            granted += 1
        return granted

    with ThreadPoolExecutor(32) as pool:
        granted = sum(pool.map(spend, range(32)))
    assert max(seen) <= 10
    assert shared.used["usd"] == granted * really


def test_a_ledger_knows_the_nearest_deadline_and_every_limit_above_it() -> None:
    above = Ledger(replace(FREE, seconds=10, usd=1))
    assert above.seconds_left == pytest.approx(10, abs=0.5)
    assert Ledger(replace(FREE, seconds=3), above).seconds_left == pytest.approx(3, abs=0.5)
    assert Ledger(FREE, above).seconds_left == pytest.approx(10, abs=0.5)
    assert Ledger(FREE).seconds_left == math.inf
    assert Ledger(FREE, above).limits("usd")
    assert not Ledger(FREE).limits("usd")


@pytest.mark.parametrize("value", [-1, math.nan])
def test_a_limit_below_zero_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"Budget\.usd must be None or a number >= 0"):
        Budget(usd=value)
