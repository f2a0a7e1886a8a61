"""An MCP server of somebody else's: what it offers, which of its tools are granted, and their calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Unpack
from urllib.parse import urlsplit

from agentkit.current import current_run
from agentkit.errors import PolicyRefused, ToolFailed, UsageError
from agentkit.mcp.connection import Connection, Deadline, Late, Session, Unreachable
from agentkit.mcp.endpoints import Address, Command, name_of, require_sdk
from agentkit.mcp.granted import RemoteTool, tool
from agentkit.mcp.listing import Listed, claimed_permission, list_tools, only, other_than_granted, says_it_changes
from agentkit.mcp.untrusted import clean, clip, contents, identifier
from agentkit.tool_lint import lint
from agentkit.tool_schemas import ToolSchema
from agentkit.tools import ToolOptions

if TYPE_CHECKING:
    import mcp

START_S = 20.0  # seconds a server may take to start and shake hands; `npx` may have to download it first
MAX_BYTES = 100_000  # of one result, as JSON


class Server:
    """An MCP server: connected to at first use, again (once per use) where the connection is lost, until `close`.

    Args:
        name: prefix of its tools' names; by default from the command line or the URL.
        start_s: seconds it may take to start.
        max_bytes: of one result; a larger one is `malformed`.
    """

    def __init__(
        self, where: Command | Address, name: str, *, start_s: float = START_S, max_bytes: int = MAX_BYTES
    ) -> None:
        require_sdk()
        self.name, self.start_s, self.max_bytes = identifier(name), start_s, max_bytes
        self._connection = Connection(where, start_s)
        self.label = self._connection.label

    @classmethod
    def stdio(
        cls,
        command: str,
        *arguments: str,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        **limits: Any,
    ) -> Server:
        """A program to start. It gets HOME, PATH and the like, and `env`, where `${NAME}` stands for a variable of ours."""
        where = Command(command, arguments, dict(env or {}), cwd)
        return cls(where, name or name_of((command, *arguments)), **limits)

    @classmethod
    def http(
        cls, url: str, *, name: str | None = None, headers: Mapping[str, str] | None = None, **limits: Any
    ) -> Server:
        """A server at a URL. `headers` go with every request; `${NAME}` in them stands for an environment variable."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"an MCP server's URL begins with http:// or https://, got {url!r}")
        return cls(Address(url, dict(headers or {})), name or parts.hostname, **limits)

    def __repr__(self) -> str:
        return f"<MCP server {self.name}: {self.label}>"

    def __enter__(self) -> Server:
        self._list(Deadline(self.start_s))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection and, over stdio, the server with all it started. A later use connects again."""
        self._connection.close()

    def tools(self) -> list[Listed]:
        """What the server offers, linted as a whole.

        Raises:
            UsageError: it does not start or does not answer; says why.
        """
        listed = self._list(Deadline(self.start_s))
        found = lint([ToolSchema(t.name, t.description, t.parameters, claimed_permission(t)) for t in listed])
        return [replace(t, findings=tuple(f for f in found if f.tool == t.name)) for t in listed]

    def grant(
        self,
        name: str,
        *,
        sha256: str | None = None,
        alias: str | None = None,
        despite_hints: bool = False,
        **options: Unpack[ToolOptions],
    ) -> RemoteTool:
        """Make one of the server's tools a tool that an agent may be given.

        Args:
            name: as the server lists it.
            sha256: what the listing must be (from `tools` or `agentkit mcp grant`); default: what it is now.
            alias: what we call it; default: the server's name, an underscore, the tool's name.
            despite_hints: grant `read` although the server itself says that the tool changes something.
            options: as of `agentkit.tool`; `permission` must be among them: nobody but you decides it.

        Raises:
            UsageError: no or several tools of that name, another pin, a schema that cannot be used, no permission, or
                `read` for a tool that says it is none.
        """
        listed = only(self._list(Deadline(self.start_s)), name, self.name)
        if sha256 is not None and sha256 != listed.sha256:
            raise UsageError(f"{self.name}: {other_than_granted(name, sha256, listed)}; look at it and grant it anew")
        if options.get("permission") == "read" and not despite_hints and (claim := says_it_changes(listed)):
            raise UsageError(
                f"{self.name} says of {name!r} {claim}; grant it as `write` or `execute`, or say despite_hints=True"
            )
        return tool(
            self,
            name,
            sha256=listed.sha256,
            description=listed.description or name,
            parameters=listed.parameters,
            alias=alias,
            **options,
        )

    def _reach(self, deadline: Deadline) -> tuple[Session, list[Listed]]:
        return self._connection.reach(deadline, partial(list_tools, self.name))

    def _list(self, deadline: Deadline) -> list[Listed]:
        try:
            return self._reach(deadline)[1]
        except (Unreachable, Late) as e:
            raise UsageError(f"MCP server {self.name} ({self.label}) does not answer: {e}") from e

    def call(self, remote: RemoteTool, arguments: dict[str, Any]) -> dict[str, Any]:
        """Call a granted tool, if it still is what was granted; see `RemoteTool`."""
        deadline = Deadline(remote.timeout_s)
        try:
            session, listed = self._reach(deadline)
        except (Unreachable, Late) as e:  # nothing was sent, whatever the tool does
            fault: Literal["timeout", "error"] = "timeout" if isinstance(e, Late) else "error"
            raise ToolFailed(remote.name, fault, f"MCP server {self.name} cannot be reached: {e}") from e
        self._still_granted(remote, listed)

        async def send(client: mcp.Client) -> Any:
            return await client.session.call_tool(remote.remote_name, arguments, allow_input_required=True)

        try:
            answer = session.ask(deadline, send)
        except Late as e:
            raise TimeoutError(str(e)) from e  # after it was sent: the run decides about another try
        except Exception as e:
            raise self._failed(remote, session, e) from e
        return self._read(remote, answer)

    def _still_granted(self, remote: RemoteTool, listed: list[Listed]) -> None:
        try:
            now = only(listed, remote.remote_name, self.name)
        except UsageError as e:
            raise ToolFailed(remote.name, "error", str(e)) from e
        if now.sha256 == remote.sha256:
            return
        reason = other_than_granted(remote.remote_name, remote.sha256, now)
        error = PolicyRefused(remote.name, f"{self.name}: {reason}; `agentkit mcp grant` shows it")
        if (run := current_run()) is not None:
            run.refuse(error)
        raise error

    def _failed(self, remote: RemoteTool, session: Session, error: Exception) -> Exception:
        """What the run is told of a call that brought no result."""
        import mcp
        import mcp_types
        from pydantic import ValidationError

        if isinstance(error, mcp.MCPError) and error.code != mcp_types.CONNECTION_CLOSED:
            # By the SDK's codes a gateway's 504 looks as a server's own refusal does; what was sent may have been done.
            undone = error.code in (mcp_types.INVALID_PARAMS, mcp_types.METHOD_NOT_FOUND)
            unknown = remote.permission != "read" and not undone
            return ToolFailed(remote.name, "error", clip(clean(error.message)), unknown=unknown)
        if isinstance(error, RuntimeError | ValidationError):  # the SDK's word for what breaks schema or protocol
            told = clip(str(clean(str(error))).partition("\n")[0], 500)
            return ToolFailed(remote.name, "malformed", told, unknown=remote.permission != "read")
        self._connection.drop(session)
        return ConnectionError(
            f"MCP server {self.name} was lost during the call: {self._connection.why(session, error)}"
        )

    def _read(self, remote: RemoteTool, answer: Any) -> dict[str, Any]:
        import mcp_types

        unknown = remote.permission != "read"
        if not isinstance(answer, mcp_types.CallToolResult):
            asked = ", ".join(sorted(r.method for r in (answer.input_requests or {}).values())) or "more input"
            raise ToolFailed(remote.name, "error", f"the server asked for {asked} in the middle of the call: refused")
        source = f"mcp:{self.name}.{remote.remote_name}"
        result = {"source": clean(source), "untrusted": True, **contents(answer)}
        if answer.is_error:
            raise ToolFailed(remote.name, "error", clip(str(result["content"])) or "no reason was given")
        size = len(json.dumps(result, ensure_ascii=False).encode("utf-8", "replace"))
        if size > self.max_bytes:
            told = f"a result of {size:,} bytes; at most {self.max_bytes:,} are taken"
            raise ToolFailed(remote.name, "malformed", told, unknown=unknown)
        return result
