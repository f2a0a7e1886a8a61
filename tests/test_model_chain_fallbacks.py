"""A model call that another model answers: when it falls back, when it must not, and what is said of the chain."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
from model_chain import DOWN, OTHER, TICKET, calls, decisions, second, triage  # noqa: F401
from provider import MODEL, Provider, Reply, Serve, prompt

from agentkit.budget import Budget
from agentkit.errors import ModelError
from agentkit.models import build_lm
from agentkit.testing import FakeClock


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


def test_a_model_can_be_copied_deeply_after_it_was_used(serve: Serve, second: Callable[..., Provider]) -> None:
    first = serve(DOWN, Reply())
    second(first, num_retries=0)
    lm = build_lm("fast")
    lm("hello")
    assert copy.deepcopy(lm)("hello") == lm("hello")
