"""What is declared of tools and agents, and refused where it cannot be: permissions, options, JSON schemas."""

from __future__ import annotations

from typing import Any

import pytest
from governed import CALLS, cancel, flaky, nothing_called, using, wipe  # noqa: F401
from hedgehogs import doing

import agentkit as ak
from agentkit import RunRecord
from agentkit.errors import UsageError

# ---- permissions


def test_the_permission_matrix_can_be_printed_and_forbidden_stays_forbidden() -> None:
    read = flaky(0, ValueError())

    system = doing(lambda run: None, read, cancel)
    agent = system.agents["hedgehog"]
    type(agent).forbidden_tools = ("wire_money",)
    assert system.permissions().to_dicts() == [
        {"tool": "cancel", "hedgehog": "write"},
        {"tool": "fetch", "hedgehog": "read"},
        {"tool": "wire_money", "hedgehog": "forbidden"},
    ]
    type(agent).forbidden_tools = ("fetch",)
    assert str(using_agent(system, read).error).startswith("PermissionDenied")
    with pytest.raises(ak.AgentkitError, match="'fetch' is among its tools and forbidden to it"):
        agent.check()


def using_agent(system: ak.System, tool: ak.Tool[..., Any]) -> RunRecord:
    agent = system.agents["hedgehog"]
    type(agent).execute = lambda self, run, plan, text="": run.call(tool, place="A")  # type: ignore[assignment]
    return system.run()


# ---- options

WRONG: dict[str, dict[str, Any]] = {
    "tries": {"tries": 10},
    "tries must be": {"tries": 2.5},
    "idempotent": {"idempotent": "no"},
    "cost_usd": {"cost_usd": -1},
    "timeout_s": {"timeout_s": 0},
}


@pytest.mark.parametrize(("message", "options"), WRONG.items())
def test_options_out_of_range_are_refused(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=message):
        flaky(0, ValueError(), **options)


def test_a_fallback_must_take_the_same_arguments() -> None:
    with pytest.raises(UsageError, match="must take the same arguments"):
        flaky(0, ValueError(), permission="execute", fallback=wipe)


def test_an_inventory_without_its_comma_is_refused() -> None:
    for attribute, value in (("forbidden_tools", "danger"), ("tools", wipe), ("tools", (print,))):
        system = doing(lambda run: None)
        agent = system.agents["hedgehog"]
        setattr(type(agent), attribute, value)
        with pytest.raises(ak.AgentkitError, match=r"comma missing|is no tool"):
            agent.check()


# ---- tools from a schema

SCHEMA = {
    "type": "object",
    "properties": {
        "rows": {"type": "array", "items": {"type": "object", "properties": {"price": {"type": "number"}}}},
        "note": {"type": "object", "additionalProperties": {"type": "string"}},
        "usd": {"type": "number", "maximum": 100},
    },
    "required": ["usd"],
}
MISFITS = {
    "missing": ({}, "'usd' is a required property"),
    "over": ({"usd": 101}, "greater than the maximum of 100"),
    "not a number": ({"usd": float("nan")}, "NaN or infinite"),
    "infinite inside": ({"usd": 1, "rows": [{"price": float("inf")}]}, "NaN or infinite"),
    "extra": ({"usd": 1, "to": "me"}, "'to' was unexpected"),
    "extra inside": ({"usd": 1, "rows": [{"price": 1, "discount": 1}]}, "'discount' was unexpected"),
    "another type": ({"usd": "1"}, "'1' is not of type 'number'"),
}


@pytest.mark.parametrize(("arguments", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_a_tool_from_a_json_schema_is_as_strict_as_a_typed_one(arguments: dict[str, Any], message: str) -> None:
    tool = ak.Tool.from_schema("pay", "Pay.", SCHEMA, lambda **values: CALLS.append(values), permission="write")
    with pytest.raises(UsageError, match=message):
        tool.validate(arguments)
    record = using(tool, arguments=arguments)
    assert (record.state, CALLS) == ("FAILED", [])


def test_a_tool_from_a_json_schema_runs_like_any_other() -> None:
    tool = ak.Tool.from_schema("pay", "Pay.", SCHEMA, lambda **values: values, permission="write", human_at={"usd": 50})
    arguments = {"usd": 5, "rows": [{"price": 1.5}], "note": {"any": "thing"}}
    assert using(tool, arguments=arguments).output == {"value": arguments}
    assert using(tool, arguments={"usd": 50}).output == {"value": None}
    assert tool.spec()["arguments"] == SCHEMA
    with pytest.raises(UsageError, match="no valid JSON schema"):
        ak.Tool.from_schema("pay", "Pay.", {"type": "nonsense"}, print)
    with pytest.raises(UsageError, match=r"human_at names \['eur'\]"):
        ak.Tool.from_schema("pay", "Pay.", SCHEMA, print, permission="write", human_at={"eur": 1})
