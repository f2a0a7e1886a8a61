"""MCP with programs in processes of their own: the npm registry's reference server and client, and a real client of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import mcp
import pytest
from hedgehogs import doing
from mcp_clients import answers
from mcp_servers import everything, inspector, running
from servers import free_port

from agentkit.errors import UsageError
from agentkit.mcp import Server

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


# --- clients of our own server -------------------------------------------------------------------------------------

CLI = (sys.executable, "-c", "from agentkit_pipelines.mcp_cli import mcp_app; mcp_app()")
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
