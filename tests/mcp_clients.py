"""For the tests of MCP: the hostile server as ours to call, and a real client to call ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import mcp
import pytest
from mcp_servers import HOSTILE

from agentkit.mcp import Server


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


def starts(log: Path) -> int:
    return len(re.findall("^started", log.read_text(), re.M)) if log.exists() else 0


def called(server: Server, name: str, **arguments: Any) -> Any:
    return server.grant(name, permission="execute")(**arguments)


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
