"""A model call that is tried again: how long it waits, what ends the wait, and the circuit breaker."""

from __future__ import annotations

import dspy
import pytest
from model_chain import DOWN, TICKET, calls, triage
from provider import MODEL, Reply, Serve

import agentkit as ak
from agentkit.budget import Budget
from agentkit.current import current_run
from agentkit.errors import Stopped
from agentkit.testing import FakeClock

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
    serve(Reply(delay=60), num_retries=2, timeout=120)
    record = triage(Budget(seconds=0.5)).run(ticket=TICKET)
    assert record.seconds < 30
    assert record.error is not None
    assert record.error.startswith("BudgetExceeded: budget of 0.5 seconds")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (Reply(cut=50), "LMTransportError"),
        (Reply(hang_up=True), "LMTransportError"),
        (Reply(body=b"<html>a gateway's error page"), "LMProviderError"),
        (Reply(body=b'{"choices": 3}'), "LMUnexpectedError"),
        (Reply(delay=5), "LMTransportError"),
        (Reply(status=503), "LMServerError"),
    ],
    ids=["cut off", "hung up", "gibberish", "odd JSON", "slow", "down"],
)
def test_a_reply_that_is_none_is_asked_for_again_and_both_attempts_are_recorded(
    serve: Serve, bad: Reply, said: str
) -> None:
    provider = serve(bad, Reply(), timeout=3)
    with FakeClock():
        record = triage().run(ticket=TICKET)
    assert (record.state, record.output) == ("DONE", {"label": "billing"})
    assert len(provider.requests) == record.model_calls == 2
    first, second = calls(record)
    assert first.error is not None
    assert first.error.startswith(said)
    assert second.error is None


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
