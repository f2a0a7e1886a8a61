"""What a server lists, as data to judge: read from the server, hashed, told apart."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentkit.errors import UsageError
from agentkit.mcp.untrusted import clean, clip

if TYPE_CHECKING:
    import mcp
    import mcp_types

    from agentkit.tool_lint import Finding

_MAX_PAGES = 100  # of a listing; one that never ends must not hang us
_HINTS = ("readOnlyHint", "destructiveHint", "idempotentHint", "openWorldHint")


@dataclass(frozen=True)
class Listed:
    """A tool as its server lists it: text to judge, nothing that can be called.

    `description` and `parameters` (a JSON schema) are cleaned; `hidden` says that characters nobody sees were taken out of
    them. `hints` are the server's own claims. `sha256` is over what the server sent; `findings` are the linter's.
    """

    server: str
    name: str
    description: str
    parameters: dict[str, Any]
    hints: dict[str, bool]
    sha256: str
    hidden: bool = False
    findings: tuple[Finding, ...] = ()


def _listed(server: str, raw: mcp_types.Tool) -> Listed:
    said = raw.annotations.model_dump(by_alias=True) if raw.annotations else {}
    hints = {name: said[name] for name in _HINTS if isinstance(said.get(name), bool)}
    text, schema = raw.description or "", raw.input_schema
    # json rather than orjson: a schema may hold integers past 64 bits and lone surrogates.
    whole = json.dumps([raw.name, text, schema, hints], sort_keys=True, separators=(",", ":"))
    sha256 = hashlib.sha256(whole.encode()).hexdigest()
    cleaned = clean([text, schema])
    hidden = cleaned != [text.replace("\r\n", "\n"), schema]
    return Listed(server, raw.name, cleaned[0].strip(), cleaned[1], hints, sha256, hidden)


async def list_tools(server: str, client: mcp.Client) -> list[Listed]:
    """All pages of what the server of that name lists."""
    found, cursor = list[Listed](), None
    for _ in range(_MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        found += [_listed(server, raw) for raw in page.tools]
        if (cursor := page.next_cursor) is None:
            return found
    raise ValueError(f"its listing has more than {_MAX_PAGES} pages")


def only(listed: list[Listed], name: str, server: str) -> Listed:
    """The one tool of that name.

    Raises:
        UsageError: there is none, or there are several.
    """
    found = [t for t in listed if t.name == name]
    if not found:
        names = ", ".join(clean(t.name) for t in listed)
        raise UsageError(f"MCP server {server} offers no tool {name!r}; it offers: {clip(names) or 'none'}")
    if len(found) > 1:
        raise UsageError(f"MCP server {server} offers {len(found)} tools called {name!r}; none of them is used")
    return found[0]


def other_than_granted(name: str, pin: str, now: Listed) -> str:
    """What to say where the pin does not fit."""
    return f"what it lists as {name!r} is not what was granted (sha256 {pin[:12]} then, {now.sha256[:12]} now)"


def claimed_permission(listed: Listed) -> str | None:
    """By the server's hint; None without one."""
    return {True: "read", False: "write"}.get(listed.hints.get("readOnlyHint"))  # type: ignore[arg-type]


def says_it_changes(listed: Listed) -> str | None:
    """The hint by which it is no read, or None."""
    for name, value in (("destructiveHint", True), ("readOnlyHint", False)):
        if listed.hints.get(name) is value:
            return f"{name}: {str(value).lower()}"
    return None
