"""Where a server is, a program of ours or a URL: what it is called, and how it is spoken to."""

from __future__ import annotations

import os
import re
import shlex
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import PurePath
from typing import Any, TextIO
from urllib.parse import urlsplit

from agentkit.errors import UsageError
from agentkit.mcp.untrusted import MAX_ERROR, clean, identifier


def require_sdk() -> None:
    """Say what to install where the extra is missing."""
    if find_spec("mcp") is None:  # not imported yet: that takes seconds, and a declaration needs nothing of it
        raise UsageError("MCP needs an extra: pip install 'agentkit-hedgehog[mcp]'")


class Tail(threading.Thread):
    """The last a server said beside the protocol: on stderr (our own is no file in a notebook), or as an HTTP status."""

    def __init__(self) -> None:
        super().__init__(name="agentkit-mcp-stderr", daemon=True)
        self._kept, self.status = b"", 0  # over HTTP, the last status that meant no
        self.sink: TextIO | None = None

    def open(self) -> TextIO:
        """Where the program writes to."""
        self._read, write = os.pipe()
        self.sink = os.fdopen(write, "w")
        self.start()
        return self.sink

    def close(self) -> None:
        """Give up our end of it; the program has its own."""
        if self.sink is not None:
            self.sink.close()

    def run(self) -> None:
        with os.fdopen(self._read, "rb", buffering=0) as source:
            while chunk := source.read(65_536):
                self._kept = (self._kept + chunk)[-MAX_ERROR:]

    def said(self) -> str:
        """What to add to an error message."""
        lines = str(clean(self._kept.decode("utf-8", "replace"))).strip().splitlines()
        wrote = f"; it wrote: {' / '.join(lines[-3:])[-500:]}" if lines else ""
        return wrote + (f"; it answered HTTP {self.status}" if self.status else "")


@dataclass(frozen=True)
class Command:
    """A server that is a program of ours, spoken to over its stdin and stdout."""

    command: str
    arguments: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str | None

    @property
    def label(self) -> str:
        return shlex.join((self.command, *self.arguments))

    def transport(self, tail: Tail) -> AbstractAsyncContextManager[Any]:
        from mcp.client.stdio import StdioServerParameters, stdio_client

        # The SDK hands on HOME, PATH and the like and nothing else: no key of ours reaches the server unless named.
        given = StdioServerParameters(
            command=self.command,
            args=list(self.arguments),
            env=_expand(self.env),
            cwd=self.cwd,
            encoding_error_handler="replace",
        )
        return stdio_client(given, errlog=tail.open())


@dataclass(frozen=True)
class Address:
    """A server at a URL, spoken to over streamable HTTP."""

    url: str
    headers: Mapping[str, str]

    @property
    def label(self) -> str:
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"  # no password, no key in a query

    def transport(self, tail: Tail) -> AbstractAsyncContextManager[Any]:
        return _over_http(self.url, _expand(self.headers), tail)


@asynccontextmanager
async def _over_http(url: str, headers: dict[str, str], tail: Tail) -> AsyncIterator[Any]:
    from mcp.client.streamable_http import streamable_http_client
    from mcp.shared._httpx_utils import create_mcp_http_client

    async def note(response: Any) -> None:
        tail.status = response.status_code if response.status_code >= 400 else 0

    async with create_mcp_http_client(headers) as client, streamable_http_client(url, http_client=client) as streams:
        client.event_hooks = {"response": [note]}  # the SDK's errors do not tell a 401 from a 500
        yield streams


_LAUNCHERS = frozenset(
    ("npx", "bunx", "uvx", "uv", "node", "deno", "docker", "python", "python3", "pipx", "run", "exec")
)


def name_of(words: Sequence[str]) -> str:
    """What a command line is called: of `npx -y @scope/server-everything@1` it is `everything`."""
    plain = [w for w in words if not w.startswith("-") and PurePath(w).stem not in _LAUNCHERS]
    found = PurePath((plain or list(words))[0]).name
    found = re.sub(r"(@[\w.-]+|\.(py|js|mjs|ts|exe))$", "", found[1:] if found.startswith("@") else found)
    return identifier(re.sub(r"^(mcp-)?server-|^mcp-|-mcp(-server)?$", "", found))


_VARIABLE = re.compile(r"\$\{(\w+)\}")


def _expand(values: Mapping[str, str]) -> dict[str, str]:
    """`${NAME}` in values replaced by environment variables, so that no secret stands in a source."""

    def value_of(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise UsageError(f"the environment variable {match[1]} is not set, and an MCP server is to be given it")
        return os.environ[match[1]]

    return {name: _VARIABLE.sub(value_of, value) for name, value in values.items()}
