"""MCP: servers that hang, die, do not start or outlive their use; connections over stdio and HTTP."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hedgehogs import doing
from mcp_clients import called, hostile, log, server, starts  # noqa: F401
from mcp_servers import HOSTILE, running
from servers import free_port

import agentkit as ak
from agentkit.errors import PolicyRefused, ToolFailed, UsageError
from agentkit.mcp import Server

ROOT = Path(__file__).resolve().parents[1]


def noted(log: Path, what: str) -> int:
    return log.read_text().splitlines().count(what)


def gone(pid: int, seconds: float = 30.0) -> bool:
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


# --- time-outs, deaths, ends ---------------------------------------------------------------------------------------


def test_a_call_that_hangs_ends_here_and_is_cancelled_there(log: Path) -> None:
    with hostile("--log", str(log)) as own:
        slow = own.grant("sleep", permission="read", timeout_s=2, tries=1)
        record = doing(lambda run: run.call(slow), slow).run(text="")
        assert "(timeout)" in (record.error or "")
        deadline = time.monotonic() + 30
        while not noted(log, "cancelled") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert noted(log, "cancelled") == 1
        assert called(own, "echo", text="still there")["content"] == "still there"
        assert starts(log) == 1


def test_the_runs_own_time_also_ends_the_call(log: Path) -> None:
    with hostile("--log", str(log)) as own:
        slow = own.grant("sleep", permission="read", timeout_s=20)
        record = doing(lambda run: run.call(slow), slow, budget=ak.Budget(seconds=2)).run(text="")
        assert (record.error or "").startswith("BudgetExceeded")
        deadline = time.monotonic() + 30
        while not noted(log, "cancelled") and time.monotonic() < deadline:
            time.sleep(0.02)
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
