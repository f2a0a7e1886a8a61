"""Granted tools: declared with the pin of what was granted, called like any other tool."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Unpack

from agentkit.errors import UsageError
from agentkit.mcp.untrusted import identifier
from agentkit.tool_lint import lint
from agentkit.tool_schemas import ToolSchema
from agentkit.tools import Tool, ToolOptions

if TYPE_CHECKING:
    from agentkit.mcp.servers import Server


class RemoteTool(Tool[..., Any]):
    """A granted tool of an MCP server.

    It returns `{"source": "mcp:everything.echo", "untrusted": True, "content": text}`, with `data` (structured content) and
    `attachments` (images, sounds, links and resources, described) where there are any.
    """

    server: Server
    remote_name: str
    sha256: str

    def spec(self) -> dict[str, Any]:
        """As of any tool, and where it comes from."""
        origin = {"server": self.server.label, "tool": self.remote_name, "sha256": self.sha256}
        return {**super().spec(), "mcp": origin}


def tool(
    server: Server,
    name: str,
    *,
    sha256: str,
    description: str,
    parameters: dict[str, Any],
    alias: str | None = None,
    **options: Unpack[ToolOptions],
) -> RemoteTool:
    """Declare a tool of a server with its pin, without connecting; `agentkit mcp grant` prints the declaration.

    It connects at its first call and is refused (`PolicyRefused`) if the server then lists anything else under that name.

    Args:
        name: as the server lists it.
        sha256: over name, description, schema and hints as the server lists them.
        description, parameters: what our model reads and what arguments are checked against; yours to sharpen.
        alias: what we call it; default: the server's name, an underscore, the tool's name.
        options: as of `agentkit.tool`; `permission` must be among them.

    Raises:
        UsageError: no permission, no pin, or a schema that is none or refers to something outside itself.
    """
    if "permission" not in options:
        raise UsageError(f"say what {name!r} may do: permission='read', 'write' or 'execute'")
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise UsageError(
            f"{name!r}: sha256 must be 64 hexadecimal digits, got {sha256!r}; `agentkit mcp grant` prints it"
        )
    if outside := sorted(set(_references(parameters))):
        raise UsageError(f"{name!r}: its schema refers to {outside[0]!r}, outside itself; nothing is fetched")
    # Providers want letters, digits, underscores, at most 64 of them.
    called = identifier(alias or f"{server.name}_{name}")

    def call(**arguments: Any) -> dict[str, Any]:
        return server.call(remote, arguments)

    remote: Any = RemoteTool.from_schema(called, description, parameters, call, **options)
    remote.server, remote.remote_name, remote.sha256 = server, name, sha256
    found: RemoteTool = remote
    if errors := [f for f in lint([ToolSchema.from_spec(found.spec())]) if f.severity == "error"]:
        raise UsageError(f"{name!r}: {errors[0].where}: {errors[0].message}")
    return found


def _references(schema: Any) -> Iterator[str]:
    """References that do not stay in the schema: whoever checks arguments by it must not be sent to fetch them."""
    if isinstance(schema, Mapping):
        for key, value in schema.items():
            if key in ("$ref", "$dynamicRef", "$recursiveRef") and not str(value).startswith("#"):
                yield str(value)
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)
