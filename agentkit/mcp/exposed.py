"""One system of ours as a tool: how it is listed, and how a call of it is answered."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextvars import Context
from typing import TYPE_CHECKING, Any

from agentkit.errors import AgentkitError, UsageError
from agentkit.mcp.described import description, input_schema, output_schema
from agentkit.mcp.untrusted import clean, clip
from agentkit.redaction import without_secrets

if TYPE_CHECKING:
    import mcp_types

    from agentkit.records import RunRecord
    from agentkit.systems import System


class Exposed:
    """One system as a tool."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.names, _ = system.input_names()
        self.adapters, self.schema = input_schema(system)

    @classmethod
    def all_of(cls, systems: System | Sequence[System]) -> dict[str, Exposed]:
        made = [cls(system) for system in ([systems] if not isinstance(systems, Sequence) else systems)]
        found = {one.system.name: one for one in made}
        if not made or len(found) != len(made):
            raise UsageError("an MCP server needs systems, and each a name of its own")
        return found

    def described(self) -> mcp_types.Tool:
        import mcp_types

        changes = any(t["permission"] != "read" for t in self.system.spec()["tools"].values())
        # Of an adopted program's own doings nothing is known, so nothing is claimed.
        known = mcp_types.ToolAnnotations(read_only_hint=not changes, destructive_hint=changes)
        return mcp_types.Tool(
            name=self.system.name,
            description=description(self.system),
            input_schema=self.schema,
            output_schema=output_schema(self.system),
            annotations=known if self.system.agents else None,
        )

    def answer(self, context: Context, arguments: dict[str, Any]) -> mcp_types.CallToolResult:
        """Run once; what goes wrong is told, without traceback and secrets."""
        try:
            record = context.run(self.system.run, **self._inputs(arguments))
        except AgentkitError as e:
            return _answer(_public(str(e)), error=True)
        meta = _meta(record)
        if record.state != "DONE":
            return _answer(_public(record.error or record.state), error=True, meta=meta)
        text = json.dumps(record.output, ensure_ascii=False, default=str)
        return _answer(text, data=record.output, meta=meta)

    def _inputs(self, arguments: dict[str, Any]) -> dict[str, Any]:
        from pydantic import ValidationError

        # `run` has options of its own (`kind`, `ledger`): only inputs may come from outside.
        allowed = set(self.names) if self.names else arguments.keys() - {"kind", "ledger"}
        if unknown := sorted(arguments.keys() - allowed):
            raise UsageError(f"{self.system.name} has no input {unknown[0]!r}; it takes {sorted(self.names)!r}")
        made = dict(arguments)
        for name, adapter in self.adapters.items():
            if name in made:
                try:
                    made[name] = adapter.validate_python(made[name])
                except ValidationError as e:
                    problem = e.errors(include_input=False, include_url=False)[0]
                    raise UsageError(f"input {name!r} does not fit: {problem['msg']}") from e
        return made


def _answer(text: str, *, data: Any = None, error: bool = False, meta: Any = None) -> mcp_types.CallToolResult:
    import mcp_types

    block = mcp_types.TextContent(text=text)
    return mcp_types.CallToolResult(content=[block], structured_content=data, is_error=error, _meta=meta)


def _meta(record: RunRecord) -> dict[str, Any]:
    return {
        f"agentkit/{name}": getattr(record, name) for name in ("run_id", "release", "state", "route", "seconds", "usd")
    }


_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.I)
_USERINFO = re.compile(r"(?<=://)[^/\s@]+@")


def _public(text: str) -> str:
    """An error's text for a caller outside: nothing that is or looks like a secret."""
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAME.search(name):
            text = text.replace(value, f"[{name}]")
    return clip(_USERINFO.sub("", str(without_secrets(clean(text)))), 1_000)
