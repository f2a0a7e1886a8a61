"""Our systems as an MCP server, over stdio or streamable HTTP."""

from __future__ import annotations

import hmac
import ipaddress
import os
from collections.abc import Sequence
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Literal

from agentkit.errors import UsageError
from agentkit.mcp.endpoints import require_sdk
from agentkit.mcp.exposed import Exposed

if TYPE_CHECKING:
    import mcp_types
    from mcp.server import Server as Protocol
    from starlette.types import ASGIApp, Receive, Scope, Send

    from agentkit.systems import System

TOKEN = "AGENTKIT_MCP_TOKEN"  # environment variable: what callers of our own server must bear


def serve(
    systems: System | Sequence[System],
    *,
    transport: Literal["stdio", "http"] = "stdio",
    host: str = "127.0.0.1",
    port: int = 8321,
    token: str | None = None,
    allowed_hosts: Sequence[str] = (),
    at_once: int = 4,
) -> None:
    """Serve systems as an MCP server, one tool each, until the client goes (stdio) or the process is stopped (http).

    Args:
        transport: `http` is streamable HTTP at `/mcp`.
        token: what callers bear (`Authorization: Bearer …`); default: the environment variable AGENTKIT_MCP_TOKEN.
            Without one, `http` is for this machine only.
        allowed_hosts: further `Host` headers to answer to, such as `agents.example.com`, behind a proxy.
        at_once: runs at the same time; more wait.

    Raises:
        UsageError: a host that others can reach, and no token; a token of fewer than 16 characters; two systems of a name.
    """
    import anyio

    if transport == "stdio":
        anyio.run(_over_stdio, build_server(systems, at_once=at_once))
        return
    import uvicorn

    app = asgi_app(systems, host=host, token=token, allowed_hosts=allowed_hosts, at_once=at_once)
    uvicorn.run(app, host=host, port=port, log_level="warning", ws="none")


async def _over_stdio(server: Protocol[Any]) -> None:
    from mcp.server.stdio import stdio_server

    async with stdio_server() as (read, write):  # what our code prints goes to stderr meanwhile
        await server.run(read, write, server.create_initialization_options())


def asgi_app(
    systems: System | Sequence[System],
    *,
    host: str = "127.0.0.1",
    token: str | None = None,
    allowed_hosts: Sequence[str] = (),
    at_once: int = 4,
) -> ASGIApp:
    """The ASGI application behind `serve(transport="http")`, for a server of your own; arguments and errors are its."""
    from mcp.server.transport_security import TransportSecuritySettings

    token = token or os.environ.get(TOKEN) or None
    if token is not None and len(token) < 16:
        raise UsageError(f"the token of an MCP server ({TOKEN}) has at least 16 characters")
    if token is None and not _is_loopback(host):
        raise UsageError(f"{host} can be reached by others: set {TOKEN} to a secret that callers must bear")
    names = ["127.0.0.1", "localhost", "[::1]", host, *allowed_hosts]
    # A page in a browser must not reach us through a name that it points to this machine (DNS rebinding).
    security = TransportSecuritySettings(
        allowed_hosts=[form for name in names for form in (name, f"{name}:*")],
        allowed_origins=[
            f"{scheme}://{form}" for name in names for scheme in ("http", "https") for form in (name, f"{name}:*")
        ],
    )
    app = build_server(systems, at_once=at_once).streamable_http_app(transport_security=security)
    return app if token is None else _Bearer(app, token)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Bearer:
    """Lets through what bears the token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._allows(scope):
            await self._app(scope, receive, send)
            return
        headers = [(b"www-authenticate", b"Bearer"), (b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    def _allows(self, scope: Scope) -> bool:
        given = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


def build_server(systems: System | Sequence[System], *, at_once: int = 4) -> Protocol[Any]:
    """The protocol's server object, to be run over a transport of your own.

    Runs ask whoever is asked where this was called (`agentkit.approve_with`); where nobody is, the answer is no.
    """
    require_sdk()
    import anyio
    import mcp_types
    from mcp import MCPError
    from mcp.server import Server as Protocol

    import agentkit

    exposed = Exposed.all_of(systems)
    context = copy_context()
    limiter: list[anyio.CapacityLimiter] = []  # made where the event loop is

    async def listing(_: Any, __: Any) -> mcp_types.ListToolsResult:
        return mcp_types.ListToolsResult(tools=[one.described() for one in exposed.values()])

    async def calling(_: Any, asked: mcp_types.CallToolRequestParams) -> mcp_types.CallToolResult:
        if (one := exposed.get(asked.name)) is None:
            raise MCPError(mcp_types.INVALID_PARAMS, f"no tool {asked.name!r}; there are {sorted(exposed)!r}")
        if not limiter:
            limiter.append(anyio.CapacityLimiter(at_once))
        # A run cannot be stopped half-way: it goes on, and keeps its place, though the caller be gone.
        return await anyio.to_thread.run_sync(one.answer, context.copy(), asked.arguments or {}, limiter=limiter[0])

    name = next(iter(exposed)) if len(exposed) == 1 else "agentkit"
    return Protocol(name, version=agentkit.__version__, on_list_tools=listing, on_call_tool=calling)
