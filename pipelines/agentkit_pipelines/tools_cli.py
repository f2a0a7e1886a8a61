"""The command about tool schemas: `agentkit lint-tools`, and what `agentkit register` says of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentkit.errors import DataError
from agentkit_pipelines import terminal

if TYPE_CHECKING:
    from agentkit.tool_lint import Finding, ToolSchema

OK, FOUND = 0, 1
_STYLE = {"error": "red", "warning": "yellow", "note": "dim"}


def lint_tools(
    source: Annotated[
        str,
        typer.Argument(
            help="FILE.py[:NAME], name@alias, name/3, a release id, or a .json file of OpenAI, BFCL or MCP tools"
        ),
    ],
    strict: Annotated[bool, typer.Option("--strict", help="warnings count like errors; notes never do")] = False,
) -> None:
    """Look in tool schemas for what makes a model call a tool wrongly.

    Exit codes: 0 no errors, 1 errors (with --strict: or warnings), 2 the source cannot be read.
    """
    from agentkit.tool_lint import lint

    schemas = read_schemas(source)
    findings = lint(schemas)
    show_findings(findings)
    counts: Counter[str] = Counter(f.severity for f in findings)
    said = ", ".join(f"{n} {what}{'' if n == 1 else 's'}" for what in _STYLE if (n := counts[what])) or "nothing found"
    terminal.console().print(f"{len(schemas)} tool{'' if len(schemas) == 1 else 's'}: {said}")
    raise typer.Exit(FOUND if counts["error"] or (strict and counts["warning"]) else OK)


def registration_findings(spec: dict[str, Any]) -> list[Finding]:
    """Errors and warnings about the tools of a release; notes are for whoever asks with `agentkit lint-tools`."""
    from agentkit.tool_lint import ToolSchema, lint

    return [f for f in lint([ToolSchema.from_spec(tool) for tool in spec["tools"].values()]) if f.severity != "note"]


def show_findings(findings: Sequence[Finding]) -> None:
    """A table with a row for each, errors first; nothing where there are none."""
    from rich.markup import escape
    from rich.table import Table

    if not findings:
        return
    table = Table("severity", "tool", "where", "what to do")
    for f in sorted(findings, key=lambda f: [*_STYLE].index(f.severity)):
        color = _STYLE[f.severity]
        what = f"{escape(f.message)} [dim]{f.rule}[/dim]"
        table.add_row(f"[{color}]{f.severity}[/{color}]", escape(f.tool), escape(f.where), what)
    terminal.console().print(table)


def read_schemas(source: str) -> list[ToolSchema]:
    """Tool schemas of a draft, a release (nothing of it is executed) or a file.

    Raises:
        UsageError: there is no such file or release, or it does not hold tools.
    """
    from agentkit.tool_lint import ToolSchema

    if source.endswith((".json", ".jsonl")):
        return [ToolSchema.from_json(raw) for raw in _tools_of(Path(source))]
    return [ToolSchema.from_spec(spec) for spec in _spec_of(source)["tools"].values()]


def _spec_of(source: str) -> dict[str, Any]:
    from agentkit_tracking import loading, registry
    from agentkit_tracking.source import load_entry, parse_entry

    if source.split(":")[0].endswith((".py", ".ipynb")):
        return load_entry(parse_entry(source)).spec()
    return registry.fetch_version(loading.resolve(source))[1].spec


def _tools_of(file: Path) -> list[Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{file} cannot be read: {e}") from e
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = _lines(file, text)
    if isinstance(found, dict):
        found = found.get("tools", [found])
    if not isinstance(found, list):
        raise DataError(f'{file}: expected a list of tools or {{"tools": […]}}, got {type(found).__name__}')
    return found


def _lines(file: Path, text: str) -> list[Any]:
    """BFCL writes one document a line."""
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (json.JSONDecodeError, RecursionError) as e:
        raise DataError(f"{file} is neither JSON nor JSON lines: {e}") from e
