"""MCP: other people's tools are denied until granted, pinned, and untrusted; our systems are tools for others."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import anyio
import dspy
import httpx2
import mcp
import pytest
from hedgehogs import Hedgehog, doing
from mcp_servers import HOSTILE, INJECTION, everything, inspector, running
from servers import free_port
from typer.testing import CliRunner

import agentkit as ak
from agentkit.errors import PolicyRefused, ToolFailed, UsageError
from agentkit.mcp import Listed, Server, asgi_app, build_server, tool
from agentkit.mcp.untrusted import clean
from agentkit_pipelines.mcp_cli import mcp_app

ROOT = Path(__file__).resolve().parents[1]
NO_PIN = "0" * 64
CLI = (sys.executable, "-c", "from agentkit_pipelines.mcp_cli import mcp_app; mcp_app()")


def hostile(*options: str, **limits: Any) -> Server:
    return Server.stdio(*HOSTILE, *options, name="hostile", **limits)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The hostile server, for tests that leave it as it was."""
    with hostile() as one:
        yield one


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where a server of the test's own notes what happens to it."""
    return tmp_path / "server.log"


def noted(log: Path, what: str) -> int:
    return log.read_text().splitlines().count(what)


def starts(log: Path) -> int:
    return len(re.findall("^started", log.read_text(), re.M)) if log.exists() else 0


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether the process has ended within that time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return True
        time.sleep(0.05)
    return False


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


def called(server: Server, name: str, **arguments: Any) -> Any:
    return server.grant(name, permission="execute")(**arguments)


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


# --- time-outs, deaths, ends ---------------------------------------------------------------------------------------


def test_a_call_that_hangs_ends_here_and_is_cancelled_there(log: Path) -> None:
    with hostile("--log", str(log)) as own:
        slow = own.grant("sleep", permission="read", timeout_s=0.3, tries=1)
        record = doing(lambda run: run.call(slow), slow).run(text="")
        assert "(timeout)" in (record.error or "")
        deadline = time.monotonic() + 5
        while not noted(log, "cancelled") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert noted(log, "cancelled") == 1
        assert called(own, "echo", text="still there")["content"] == "still there"
        assert starts(log) == 1


def test_the_runs_own_time_also_ends_the_call(log: Path) -> None:
    with hostile("--log", str(log)) as own:
        slow = own.grant("sleep", permission="read", timeout_s=20)
        record = doing(lambda run: run.call(slow), slow, budget=ak.Budget(seconds=0.5)).run(text="")
        assert (record.error or "").startswith("BudgetExceeded")
        time.sleep(0.6)
        assert noted(log, "cancelled") == 1


def test_a_server_that_dies_in_a_call_leaves_a_write_unknown_and_is_started_again(log: Path) -> None:
    with hostile("--log", str(log)) as own:
        die, echo = own.grant("die", permission="write"), own.grant("echo", permission="read")
        record = doing(lambda run: run.call(die), die).run(text="")
        assert "was lost during the call" in (record.error or "")
        assert "out of memory" in (record.error or "")  # its last words on stderr
        assert "whether it took effect is unknown" in (record.error or "")
        assert noted(log, "call die") == 1  # never sent twice
        assert echo(text="back")["content"] == "back"
        assert starts(log) == 2


def test_a_server_killed_between_calls_is_started_again_unnoticed(log: Path) -> None:
    with hostile("--log", str(log)) as own:
        os.kill(int(called(own, "pid")["content"]), signal.SIGKILL)
        assert called(own, "echo", text="back")["content"] == "back"
        assert starts(log) == 2


def test_a_server_that_does_not_come_back_is_tried_once_and_nothing_was_sent(tmp_path: Path, log: Path) -> None:
    script = tmp_path / "once.py"
    command = (
        f"import pathlib,sys,runpy; p = pathlib.Path({str(log)!r}); n = p.exists(); p.open('a').write('started\\n')\n"
    )
    script.write_text(
        f"{command}if n: sys.exit('no more')\nsys.argv = ['x']\nrunpy.run_path({HOSTILE[1]!r}, run_name='__main__')"
    )
    with Server.stdio(sys.executable, "-W", "ignore", str(script), name="once") as own:
        pid = int(own.grant("pid", permission="read")()["content"])
        write = own.grant("echo", permission="write")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ToolFailed, match=r"cannot be reached: .*no more") as caught:
            write(text="a")
        assert not caught.value.unknown
        assert starts(log) == 2


def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(UsageError, match="there is no program 'no-such-program' here"):
        Server.stdio("no-such-program").tools()
    with pytest.raises(UsageError, match="it wrote: boom"):
        Server.stdio(sys.executable, "-c", "import sys; sys.exit('boom')").tools()
    with pytest.raises(UsageError, match=r"no answer within 0\.5 s"):
        Server.stdio("sleep", "60", start_s=0.5).tools()


def test_the_end_of_the_block_ends_the_server() -> None:
    with hostile() as own:
        pid = int(called(own, "pid")["content"])
    assert gone(pid, 0.5)


ABANDON = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from mcp_servers import HOSTILE
from agentkit.mcp import Server
server = Server.stdio(*HOSTILE)
print(server.grant("pid", permission="read")()["content"], flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["", "raise RuntimeError", "os.kill(os.getpid(), signal.SIGKILL)", "del server"])
def test_no_server_outlives_its_process(end: str) -> None:
    code = ABANDON.format(tests=str(ROOT / "tests"), end=end)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert gone(int(done.stdout))


def test_a_forked_child_makes_a_connection_of_its_own(log: Path) -> None:
    code = ABANDON.format(
        tests=str(ROOT / "tests"),
        end="""
if (child := os.fork()) == 0:
    print(server.grant("pid", permission="read")()["content"], flush=True)
    server.close()
    os._exit(0)
os.waitpid(child, 0)
print(server.grant("pid", permission="read")()["content"], flush=True)
""",
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    first, forked, again = map(int, done.stdout.split())
    assert first == again != forked
    assert gone(first)
    assert gone(forked)


def test_many_threads_share_one_connection(server: Server) -> None:
    from concurrent.futures import ThreadPoolExecutor

    echo = server.grant("echo", permission="read")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: echo(text=str(i))["content"], range(40)))
    assert found == [str(i) for i in range(40)]


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(UsageError, match=r"agentkit-hedgehog\[mcp\]"):
        Server.stdio("true")


def test_importing_it_stays_light() -> None:
    code = "import agentkit.mcp, sys; sys.exit('mcp' in sys.modules or 'dspy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# --- over HTTP -----------------------------------------------------------------------------------------------------


def test_over_http_the_rules_are_the_same_and_a_restart_is_survived() -> None:
    port = free_port()
    command = (*HOSTILE, "--http", str(port))
    with running(command, port) as url, Server.http(url, name="hostile") as own:
        assert called(own, "ansi")["content"].startswith("red plain")
        echo, change = own.grant("echo", permission="read"), own.grant("change", permission="write")
        assert echo(text="a")["content"] == "a"
        change(what="schema")
        with pytest.raises(PolicyRefused):
            echo(text="a")
        with pytest.raises(TimeoutError):
            own.grant("sleep", permission="read", timeout_s=0.3)()
    with running(command, port), own:
        assert echo(text="another process, the same listing")["content"].startswith("another")
    with pytest.raises(ToolFailed, match="cannot be reached"):
        echo(text="a")


def test_secrets_of_a_url_are_not_told() -> None:
    server = Server.http("http://user:hunter2@127.0.0.1:9/mcp?key=abc123")
    with pytest.raises(UsageError, match=r"\(http://127\.0\.0\.1:9/mcp\) does not answer") as caught:
        server.tools()
    assert "hunter2" not in str(caught.value)
    assert "abc123" not in str(caught.value)
    with pytest.raises(UsageError, match="begins with http"):
        Server.http("ftp://example.com")


# --- the reference server of the npm registry ----------------------------------------------------------------------


@contextmanager
def reference_server(transport: str) -> Iterator[Server]:
    if transport == "stdio":
        with Server.stdio(*everything(), "stdio", name="everything") as server:
            yield server
        return
    port = free_port()
    with (
        running((*everything(), "streamableHttp"), port, PORT=str(port)) as url,
        Server.http(url, name="everything") as server,
    ):
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_the_reference_server(transport: str) -> None:
    with reference_server(transport) as server:
        listed = {t.name: t for t in server.tools()}
        assert len(listed) >= 10
        assert listed["echo"].hints["readOnlyHint"]

        def read(name: str, **arguments: Any) -> Any:
            granted = server.grant(name, permission="read", sha256=listed[name].sha256)
            record = doing(lambda run: run.call(granted, **arguments), granted).run(text="")
            assert record.state == "DONE", record.error
            return record.output["value"]  # type: ignore[index]

        assert read("echo", message="hello") == {
            "source": "mcp:everything.echo",
            "untrusted": True,
            "content": "Echo: hello",
        }
        assert read("get-sum", a=2, b=3)["content"] == "The sum of 2 and 3 is 5."
        weather = read("get-structured-content", location="Chicago")
        assert weather["content"] == ""
        assert set(weather["data"]) == {"temperature", "conditions", "humidity"}
        [image] = read("get-tiny-image")["attachments"]
        assert image == {"type": "image", "mime_type": "image/png", "bytes": image["bytes"]}
        assert image["bytes"] > 1_000
        [resource] = read("get-resource-reference", resourceType="Text", resourceId=1)["attachments"]
        assert resource["text"].startswith("Resource 1: This is a plaintext resource")
        with pytest.raises(UsageError, match="readOnlyHint: false"):
            server.grant("gzip-file-as-resource", permission="read")
        slow = server.grant("trigger-long-running-operation", permission="read", timeout_s=0.5, tries=1)
        with pytest.raises(TimeoutError):
            slow(duration=20, steps=4)
        assert read("echo", message="still there")["content"] == "Echo: still there"


# --- our systems as a server ---------------------------------------------------------------------------------------


def asked(target: Any, work: Callable[[mcp.Client], Any]) -> Any:
    """What a real client is answered."""

    async def ask() -> Any:
        async with mcp.Client(target) as client:
            try:
                return await work(client)
            except mcp.MCPError as e:  # raised outside, where no task group wraps it
                return e

    if isinstance(answer := anyio.run(ask), Exception):
        raise answer
    return answer


def answers(target: Any, name: str, **arguments: Any) -> Any:
    return asked(target, lambda client: client.call_tool(name, arguments))


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


# --- on the command line -------------------------------------------------------------------------------------------

NOTEBOOK = '''
import agentkit as ak

print("noise on stdout, which belongs to the protocol")


def shout(text: str) -> str:
    """Say it louder."""
    print("more noise")
    return text.upper()


system = ak.adopt(shout)
'''


@pytest.fixture
def notebook(project: Path) -> Path:
    file = project / "shout.py"
    file.write_text(NOTEBOOK)
    return file


@pytest.mark.slow
def test_a_real_client_over_stdio(notebook: Path) -> None:
    served = mcp.StdioServerParameters(command=CLI[0], args=[*CLI[1:], "serve", str(notebook)], env=dict(os.environ))
    result = answers(served, "shout", text="hello")
    assert result.structured_content == {"value": "HELLO"}


@pytest.mark.slow
def test_a_real_client_over_http_with_a_token(notebook: Path) -> None:
    port, token = free_port(), "a-token-of-enough-length"
    command = (*CLI, "serve", str(notebook), "--http", str(port))
    with running(command, port, AGENTKIT_MCP_TOKEN=token) as url:
        body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
        headers = {"Accept": "application/json, text/event-stream", "Authorization": f"Bearer {token}"}
        assert httpx2.post(url, json=body).status_code == 401
        assert (
            httpx2.post(url, json=body, headers={"Authorization": "Bearer another-token-entirely"}).status_code == 401
        )
        assert httpx2.post(url, json=body, headers={**headers, "Host": "evil.example"}).status_code == 421
        assert httpx2.post(url, json=body, headers={**headers, "Origin": "http://evil.example"}).status_code == 403
        with pytest.raises(UsageError, match="HTTP 401"):
            Server.http(url).tools()
        with Server.http(url, headers={"Authorization": f"Bearer {token}"}, name="ours") as ours:
            assert ours.grant("shout", permission="read")(text="hello")["data"] == {"value": "HELLO"}


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_the_reference_client(notebook: Path, transport: str) -> None:
    port = free_port()
    command = (*CLI, "serve", str(notebook))

    def inspect(target: tuple[str, ...], *method: str) -> Any:
        done = subprocess.run([*inspector(), *target, *method], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def both(target: tuple[str, ...]) -> None:
        [listed] = inspect(target, "--method", "tools/list")["tools"]
        assert (listed["name"], listed["description"]) == ("shout", "Say it louder.")
        result = inspect(target, "--method", "tools/call", "--tool-name", "shout", "--tool-arg", "text=hello")
        assert result["structuredContent"] == {"value": "HELLO"}

    if transport == "stdio":
        script = notebook.parent / "serve.sh"  # the inspector takes what looks like an option for its own
        script.write_text(f"#!/bin/sh\nexec {CLI[0]} -c '{CLI[2]}' serve {notebook}\n")
        script.chmod(0o755)
        both((str(script),))
        return
    with running((*command, "--http", str(port)), port) as url:
        both((url, "--transport", "http"))


def test_list_shows_what_there_is_to_judge() -> None:
    done = CliRunner().invoke(mcp_app, ["list", " ".join(HOSTILE)])
    assert done.exit_code == 0, done.output
    for expected in ("echo", "Say it back.", "HIDDEN CHARACTERS", "destructive", "invalid-schema", "all denied until"):
        assert expected in done.output
    listed = json.loads(CliRunner().invoke(mcp_app, ["list", " ".join(HOSTILE), "--json"]).output)
    assert {t["name"] for t in listed} >= {"echo", "delete-all"}


def test_the_printed_declaration_works_in_another_process(tmp_path: Path) -> None:
    done = CliRunner().invoke(mcp_app, ["grant", " ".join(HOSTILE), "echo", "--permission", "read"])
    assert done.exit_code == 0, done.output
    script = tmp_path / "pasted.py"
    body = done.output.replace("ak.mcp.", "mcp.")
    script.write_text(f"from agentkit import mcp\n\n{body}\nprint(mcp_servers_echo(text='pasted')['content'])\n")
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert ran.stdout == "pasted\n", ran.stderr


def test_a_declaration_keeps_the_names_of_secrets_and_not_the_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESK_TOKEN", "super-secret-value")
    given = [" ".join(HOSTILE), "echo", "--permission", "read", "--env", "TOKEN=${DESK_TOKEN}"]
    printed = CliRunner().invoke(mcp_app, ["grant", *given]).output
    assert "env={'TOKEN': '${DESK_TOKEN}'}" in printed
    assert "super-secret-value" not in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["list", "http://127.0.0.1:9/mcp", "--env", "A=b"],
        ["list", "true", "--header", "A=b"],
        ["list", "true", "--env", "A"],
        ["list", ""],
        ["grant", " ".join(HOSTILE), "delete-all", "--permission", "read"],
        ["grant", " ".join(HOSTILE), "echo", "--permission", "everything"],
    ],
)
def test_wrong_use_is_said(arguments: list[str]) -> None:
    done = CliRunner().invoke(mcp_app, arguments)
    assert isinstance(done.exception, UsageError)


def test_a_listed_tool_is_only_data() -> None:
    assert not [name for name in vars(Listed) if callable(getattr(Listed, name)) and not name.startswith("_")]
