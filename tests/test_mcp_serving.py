"""MCP: our systems are tools for others, with their types, their refusals, and no secrets in their errors."""

from __future__ import annotations

import json
from typing import Any, Literal

import dspy
import mcp
import pytest
from hedgehogs import Hedgehog
from mcp_clients import answers, asked

import agentkit as ak
from agentkit.errors import UsageError
from agentkit.mcp import asgi_app, build_server


class Pick(dspy.Signature):
    """Decide which desk answers."""

    text: str = dspy.InputField(desc="what the customer writes")
    desk: Literal["a", "b"] = dspy.OutputField()


@ak.tool(permission="write", human_at={"usd": 50})
def pay(usd: float) -> str:
    """Pay."""
    return f"paid {usd}"


class Payer(Hedgehog):
    """Pays what is asked."""

    name, tools = "payer", (pay,)

    def plan(self, run: ak.Run, usd: float, note: str = "") -> Any:  # type: ignore[override]
        return usd

    def execute(self, run: ak.Run, plan: Any, **_: Any) -> Any:  # type: ignore[override]
        return run.call(pay, usd=plan)

    def reflect(self, run: ak.Run, plan: Any, facts: Any, **_: Any) -> Any:  # type: ignore[override]
        return {"value": facts}


payer = ak.System("payer", [Payer()])


def divide(n: int, by: float = 1.0) -> Any:
    """Divide."""
    if not by:
        raise ValueError("no key sk-abcdefghijklmnopqrst fits \x1b[1mhttp://u:p@host/; value=super-secret-value")
    return n / by


def test_a_system_is_a_tool_with_its_own_types() -> None:
    [listed] = asked(build_server(payer), lambda c: c.list_tools()).tools
    assert (listed.name, listed.description) == ("payer", "Pays what is asked.")
    assert listed.input_schema == {
        "type": "object",
        "properties": {"usd": {"type": "number"}, "note": {"type": "string"}},
        "required": ["usd"],
        "additionalProperties": False,
    }
    assert listed.output_schema is not None
    assert listed.output_schema["anyOf"] == [{"$ref": "#/$defs/Found"}]
    assert listed.annotations is not None
    assert (listed.annotations.read_only_hint, listed.annotations.destructive_hint) == (False, True)


def test_a_router_and_a_program_tell_what_they_take() -> None:
    class A(Hedgehog):
        name = "a"

    class B(Hedgehog):
        name = "b"

    desks = ak.System("desks", [A(), B()], router=dspy.Predict(Pick))
    whole = build_server([desks, ak.adopt(dspy.ChainOfThought(Pick), name="pick"), ak.adopt(divide)])
    tools = {t.name: t for t in asked(whole, lambda c: c.list_tools()).tools}
    assert tools["desks"].description == tools["pick"].description == "Decide which desk answers."
    text = {"type": "string", "description": "what the customer writes"}
    assert tools["desks"].input_schema["properties"] == tools["pick"].input_schema["properties"] == {"text": text}
    assert tools["divide"].description == "Divide."
    assert tools["divide"].annotations is None


def test_a_call_is_a_run_with_its_id() -> None:
    result = answers(build_server(payer), "payer", usd=10)
    assert result.structured_content == {"value": "paid 10.0"}
    assert json.loads(result.content[0].text) == {"value": "paid 10.0"}
    assert result.meta["agentkit/state"] == "DONE"
    assert len(result.meta["agentkit/run_id"]) == 32


def test_nobody_to_ask_means_no_and_an_approver_is_asked() -> None:
    assert answers(build_server(payer), "payer", usd=60).structured_content == {"value": None}
    with ak.approve_with(lambda request: True):
        asking = build_server(payer)
    assert answers(asking, "payer", usd=60).structured_content == {"value": "paid 60.0"}


def test_a_failed_run_is_an_error_without_traceback_or_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESK_TOKEN", "super-secret-value")
    result = answers(build_server(ak.adopt(divide)), "divide", n=1, by=0)
    assert result.is_error
    assert result.content[0].text == "ValueError: no key [key] fits http://host/; value=[DESK_TOKEN]"
    assert result.meta["agentkit/state"] == "FAILED"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"usd": "ten"}, "input 'usd' does not fit"),
        ({"usd": 1, "kind": "evaluation"}, "has no input 'kind'"),
        ({"usd": 1, "ledger": None}, "has no input 'ledger'"),
        ({}, "missing: ['usd']"),
    ],
)
def test_only_inputs_come_from_outside(arguments: dict[str, Any], said: str) -> None:
    result = answers(build_server(payer), "payer", **arguments)
    assert result.is_error
    assert said in result.content[0].text


def test_a_program_that_takes_anything_cannot_be_given_options_of_a_run() -> None:
    def anything(**inputs: Any) -> Any:
        return {"got": sorted(inputs)}

    server = build_server(ak.adopt(anything))
    assert answers(server, "anything", a=1).structured_content == {"got": ["a"]}
    assert answers(server, "anything", kind="evaluation").is_error


def test_an_unknown_tool_and_two_systems_of_a_name_are_refused() -> None:
    with pytest.raises(mcp.MCPError, match="no tool 'other'; there are \\['payer'\\]"):
        answers(build_server(payer), "other")
    with pytest.raises(UsageError, match="each a name of its own"):
        build_server([payer, ak.System("payer", [Payer()])])


def test_beyond_this_machine_a_token_is_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("0.0.0.0", "192.0.2.1", "agents.example.com", "::"):
        with pytest.raises(UsageError, match="AGENTKIT_MCP_TOKEN"):
            asgi_app(payer, host=host)
    with pytest.raises(UsageError, match="at least 16 characters"):
        asgi_app(payer, token="short")
    monkeypatch.setenv("AGENTKIT_MCP_TOKEN", "a-token-of-enough-length")
    assert asgi_app(payer, host="0.0.0.0") is not None
