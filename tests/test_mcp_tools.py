"""MCP: other people's tools are denied until granted, pinned to what was granted, and what they return is untrusted."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hedgehogs import doing
from mcp_clients import called, hostile, log, server, starts  # noqa: F401
from mcp_servers import INJECTION

import agentkit as ak
from agentkit.errors import PolicyRefused, ToolFailed, UsageError
from agentkit.mcp import Listed, Server, tool
from agentkit.mcp.untrusted import clean

NO_PIN = "0" * 64


# --- what is listed, and what is granted ---------------------------------------------------------------------------


def test_a_listing_is_data_with_what_the_linter_says(server: Server) -> None:
    listed = {t.name: t for t in server.tools()}
    assert listed["echo"].description == "Say it back."
    assert listed["echo"].parameters["required"] == ["text"]
    assert listed["echo"].hints == {"readOnlyHint": True}
    assert [f.rule for f in listed["broken"].findings] == ["invalid-schema"]
    assert [f.rule for f in listed["far"].findings] == ["invalid-schema"]
    assert not listed["echo"].findings
    assert not callable(listed["echo"])


def test_hidden_characters_in_a_description_are_taken_out_and_told(server: Server) -> None:
    listed = {t.name: t for t in server.tools()}
    assert listed["delete-all"].hidden
    assert listed["delete-all"].description == "Deletes all things."
    assert not listed["echo"].hidden


def test_a_tool_that_was_not_granted_is_denied(server: Server) -> None:
    echo = server.grant("echo", permission="read")
    record = doing(lambda run: run.call(echo, text="a")).run(text="")
    assert record.state == "FAILED"
    assert (record.error or "").startswith("PermissionDenied")


def test_a_granted_tool_works_inside_a_run_and_says_where_it_comes_from(server: Server) -> None:
    echo = server.grant("echo", permission="read")
    record = doing(lambda run: run.call(echo, text="hello"), echo).run(text="")
    assert record.output == {"value": {"source": "mcp:hostile.echo", "untrusted": True, "content": "hello"}}
    assert echo.spec()["mcp"] == {"server": server.label, "tool": "echo", "sha256": echo.sha256}
    assert echo(text="outside a run")["content"] == "outside a run"


def test_arguments_are_checked_here_before_anything_is_sent(server: Server) -> None:
    echo = server.grant("echo", permission="read")
    for wrong in ({"text": 3}, {}, {"text": "a", "more": "b"}):
        with pytest.raises(UsageError, match="do not fit"):
            echo(**wrong)
    with pytest.raises(UsageError, match="by name"):
        echo("a")


def test_the_permission_is_for_a_person_to_choose(server: Server) -> None:
    with pytest.raises(UsageError, match="say what 'echo' may do"):
        server.grant("echo")
    assert server.grant("echo", permission="write").permission == "write"


def test_a_server_that_says_it_deletes_is_not_granted_to_read(server: Server) -> None:
    with pytest.raises(UsageError, match="destructiveHint: true"):
        server.grant("delete-all", permission="read")
    assert server.grant("delete-all", permission="execute").name == "hostile_delete_all"
    assert server.grant("delete-all", permission="read", despite_hints=True).permission == "read"


def test_a_schema_that_cannot_be_checked_by_is_not_granted(server: Server) -> None:
    with pytest.raises(UsageError, match="outside itself; nothing is fetched"):
        server.grant("far", permission="read")
    with pytest.raises(UsageError, match="no valid JSON schema"):
        server.grant("broken", permission="read")


def test_a_reference_hidden_in_an_id_is_found_too() -> None:
    for schema in (
        {"$dynamicRef": "http://127.0.0.1:9/"},
        {"anyOf": [{"$ref": "x.json", "$id": "http://127.0.0.1:9/"}]},
    ):
        with pytest.raises(UsageError, match="outside itself"):
            tool(hostile(), "x", sha256=NO_PIN, description="X.", parameters=schema, permission="read")


def test_unknown_and_ambiguous_names_are_refused(server: Server) -> None:
    with pytest.raises(UsageError, match="offers no tool 'ecko'"):
        server.grant("ecko", permission="read")
    with hostile("--twice") as twice, pytest.raises(UsageError, match="2 tools called 'echo'"):
        twice.grant("echo", permission="read")


def test_names_fit_every_provider_and_do_not_clash(server: Server) -> None:
    assert server.grant("delete-all", permission="write").name == "hostile_delete_all"
    assert server.grant("echo", permission="read", alias="say it").name == "say_it"
    names = [
        ("npx", "-y", "@modelcontextprotocol/server-everything@1.2"),
        ("uvx", "mcp-server-git"),
        ("./my-tools.py",),
    ]
    assert [Server.stdio(*words).name for words in names] == ["everything", "git", "my_tools"]
    assert Server.http("https://mcp.example.com/mcp").name == "mcp_example_com"


def test_a_listed_tool_is_only_data() -> None:
    assert not [name for name in vars(Listed) if callable(getattr(Listed, name)) and not name.startswith("_")]


# --- what was granted is pinned ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["text", "schema", "hint"])
def test_a_tool_that_its_server_changes_after_the_grant_is_refused(what: str) -> None:
    with hostile() as own:
        echo = own.grant("echo", permission="read")
        change = own.grant("change", permission="write")
        assert echo(text="before")["content"] == "before"
        change(what=what)
        record = doing(lambda run: run.call(echo, text="after"), echo).run(text="")
        assert (record.error or "").startswith("PolicyRefused: tool 'hostile_echo' was not called")
        assert "is not what was granted" in (record.error or "")
        with pytest.raises(UsageError, match="grant it anew"):
            own.grant("echo", permission="read", sha256=echo.sha256)


def test_a_refusal_cannot_be_caught_away() -> None:
    def work(run: ak.Run) -> str:
        change(what="text")
        try:
            run.call(echo, text="a")
        except Exception:
            return "nothing happened"
        return "called"

    with hostile() as own:
        echo, change = own.grant("echo", permission="read"), own.grant("change", permission="write")
        assert doing(work, echo, change).run(text="").state == "FAILED"


def test_a_declared_tool_starts_nothing_until_it_is_called(log: Path) -> None:
    own = hostile("--log", str(log))
    with hostile() as other:
        pin = other.grant("echo", permission="read")
    schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    echo = tool(own, "echo", sha256=pin.sha256, description="Ours.", parameters=schema, permission="read", timeout_s=20)
    assert echo.spec()["description"] == "Ours."
    assert echo.spec()["timeout_s"] == 20
    assert not starts(log)
    assert echo(text="now")["content"] == "now"
    assert starts(log) == 1
    own.close()


def test_a_declared_tool_with_another_pin_is_refused() -> None:
    own = hostile()
    echo = tool(own, "echo", sha256=NO_PIN, description="Ours.", parameters={"type": "object"}, permission="read")
    with pytest.raises(PolicyRefused, match="sha256 000000000000 then"):
        echo()
    own.close()


NOTEBOOK_WITH_A_TOOL = """
from hedgehogs import Hedgehog
import agentkit as ak
from agentkit import mcp

server = mcp.Server.stdio("no-such-program-here", name="far")
schema = {{"type": "object", "properties": {{"text": {{"type": "string"}}}}}}
far_echo = mcp.tool(server, "echo", sha256="{pin}", description="Say it.", parameters=schema, permission="read")


class Echo(Hedgehog):
    name, tools = "echo", (far_echo,)


system = ak.System("echo", [Echo()])
"""


def test_a_system_with_a_declared_tool_is_complete_without_its_server(project: Path) -> None:
    from agentkit_tracking import source

    (project / "echo.py").write_text(NOTEBOOK_WITH_A_TOOL.format(pin=NO_PIN))
    system = source.load_entry(source.parse_entry(project / "echo.py"))
    spec = system.spec()["tools"]["far_echo"]
    assert spec["mcp"] == {"server": "no-such-program-here", "tool": "echo", "sha256": NO_PIN}
    assert system.permissions().to_dicts() == [{"tool": "far_echo", "echo": "read"}]


def test_a_pin_must_be_one() -> None:
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        tool(hostile(), "echo", sha256="latest", description="X.", parameters={"type": "object"}, permission="read")


# --- what comes back is untrusted ----------------------------------------------------------------------------------


def test_what_a_terminal_or_a_reader_would_not_show_is_taken_out(server: Server) -> None:
    assert called(server, "ansi")["content"] == "red plain reversed zerowidth tag\nnext\tcell"


def test_an_injected_instruction_stays_marked_data(server: Server) -> None:
    assert called(server, "inject") == {"source": "mcp:hostile.inject", "untrusted": True, "content": INJECTION}


def test_what_is_no_text_is_described_and_links_are_not_followed(server: Server) -> None:
    assert called(server, "resources")["attachments"] == [
        {"type": "image", "mime_type": "image/png", "bytes": 3},
        {"type": "audio", "mime_type": "audio/wav", "bytes": 6},
        {"type": "resource", "uri": "file:///etc/passwd", "mime_type": "text/plain", "text": "root:x"},
        {"type": "resource", "uri": "file:///a.bin", "mime_type": "application/x-sh", "bytes": 3},
        {"type": "link", "uri": "http://127.0.0.1:9/never-fetched", "name": "a page", "mime_type": "text/html"},
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "fault", "said"),
    [
        ("fail", {}, "error", "disk full"),
        ("refuse", {}, "error", "no such order"),
        ("nonsense", {}, "error", "invalid result"),
        ("liar", {}, "malformed", "'warm' is not of type 'number'"),
        ("big", {"size": 3_000_000}, "malformed", "a result of 3,000,063 bytes; at most 100,000"),
    ],
)
def test_what_goes_wrong_is_the_tools_failure(
    server: Server, name: str, arguments: dict[str, Any], fault: str, said: str
) -> None:
    with pytest.raises(ToolFailed, match=re.escape(said)) as caught:
        called(server, name, **arguments)
    assert caught.value.fault == fault
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("options", [(), ("--old",)])
def test_a_server_that_asks_for_our_model_is_refused(options: tuple[str, ...]) -> None:
    with hostile(*options) as own, pytest.raises(ToolFailed, match=r"refused|not supported"):
        called(own, "ask")


def test_the_environment_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    printing = "import os,sys;sys.exit(' '.join(f'{k}={v}' for k, v in os.environ.items()))"
    with pytest.raises(UsageError, match="TOKEN=Bearer sk-secret") as caught:
        Server.stdio(sys.executable, "-c", printing, env={"TOKEN": "Bearer ${OPENAI_API_KEY}"}).tools()
    assert "OPENAI_API_KEY=" not in str(caught.value)
    with pytest.raises(UsageError, match="NOT_THERE is not set"):
        Server.stdio("true", env={"TOKEN": "${NOT_THERE}"}).tools()


@pytest.mark.parametrize("text", ["plain", "zwj 👩‍💻", "עברית", "a\nb\tc", "日本語"])
def test_cleaning_leaves_ordinary_text(text: str) -> None:
    assert clean(text) == text
