"""The commands about MCP: `agentkit mcp …` looks at other people's servers, grants their tools, and serves our systems."""

from __future__ import annotations

import json
import pprint
import shlex
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentkit.errors import UsageError
from agentkit_pipelines.options import Trusted

if TYPE_CHECKING:
    from agentkit.mcp import Listed, RemoteTool, Server

mcp_app = typer.Typer(help="Tools of MCP servers, and systems as an MCP server.", no_args_is_help=True)

Target = Annotated[str, typer.Argument(help='a command line in quotes ("npx -y PACKAGE@VERSION") or a URL')]
Headers = Annotated[list[str] | None, typer.Option("--header", help="NAME=VALUE, with ${VARIABLE} for a secret (URL)")]
Env = Annotated[list[str] | None, typer.Option("--env", help="NAME=VALUE, with ${VARIABLE} for a secret (command)")]
Start = Annotated[float, typer.Option(min=0.1, help="seconds it may take to start")]


@mcp_app.command("list")
def list_(
    target: Target,
    header: Headers = None,
    env: Env = None,
    start_s: Start = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="everything about each tool, as JSON")] = False,
) -> None:
    """List what a server offers, with what it claims and what the linter finds. A command line is executed for it."""
    with _server(target, header, env, start_s) as server:
        listed = server.tools()
    if as_json:
        from agentkit.jsonable import jsonable

        print(json.dumps([jsonable(t) for t in listed], indent=2))
        return
    from rich.markup import escape
    from rich.table import Table

    from agentkit_pipelines import terminal

    table = Table("tool", "description", "claims", "findings", show_lines=True)
    for t in listed:
        table.add_row(*(escape(cell) for cell in (t.name, t.description, _claims(t), _findings(t))))
    console = terminal.console()
    console.print(table)
    console.print(f"{len(listed)} tools, all denied until granted: `agentkit mcp grant … TOOL --permission read`")


def _claims(listed: Listed) -> str:
    words = [name.removesuffix("Hint") + ("" if value else ": no") for name, value in listed.hints.items()]
    return ", ".join(words) or "nothing"


def _findings(listed: Listed) -> str:
    lines = [f"{f.severity} {f.rule}, {f.where}: {f.message}" for f in listed.findings]
    return "\n".join([*(["HIDDEN CHARACTERS in its text, taken out here"] if listed.hidden else []), *lines])


@mcp_app.command()
def grant(
    target: Target,
    tool: Annotated[str, typer.Argument(help="as the server lists it")],
    permission: Annotated[str, typer.Option(help="read, write or execute: what you take it to do")],
    header: Headers = None,
    env: Env = None,
    start_s: Start = 60.0,
    despite_hints: Annotated[
        bool, typer.Option("--despite-hints", help="read, though the server says that it changes something")
    ] = False,
) -> None:
    """Print the Python to paste into a notebook: the tool's declaration, pinned to what the server lists now."""
    with _server(target, header, env, start_s) as server:
        options: Any = {"permission": permission}
        granted = server.grant(tool, despite_hints=despite_hints, **options)
    print(_declaration(granted, target, _pairs("--header", header), _pairs("--env", env)))


def _declaration(granted: RemoteTool, target: str, headers: dict[str, str], env: dict[str, str]) -> str:
    spec, server = granted.spec(), granted.server
    if _is_url(target):
        made = f"http({target!r}, name={server.name!r}" + (f", headers={headers!r}" if headers else "")
    else:
        words = ", ".join(map(repr, shlex.split(target)))
        made = f"stdio({words}, name={server.name!r}" + (f", env={env!r}" if env else "")
    schema = pprint.pformat(spec["arguments"], width=100, sort_dicts=False).replace("\n", "\n" + " " * 15)
    return (
        f"{server.name} = ak.mcp.Server.{made})\n"
        f"{granted.name} = ak.mcp.tool(\n"
        f"    {server.name},\n"
        f"    {granted.remote_name!r},\n"
        f"    permission={granted.permission!r},\n"
        f"    sha256={granted.sha256!r},\n"
        f"    description={granted.description!r},\n"
        f"    parameters={schema},\n"
        ")"
    )


@mcp_app.command()
def serve(
    references: Annotated[list[str], typer.Argument(help="name@alias, name/3, a release id, or FILE.py[:NAME]")],
    http: Annotated[int | None, typer.Option(min=1, max=65535, help="serve streamable HTTP on this port")] = None,
    host: Annotated[
        str, typer.Option(help="beyond loopback, callers must bear the secret in AGENTKIT_MCP_TOKEN")
    ] = "127.0.0.1",
    allow_host: Annotated[list[str] | None, typer.Option(help="further `Host` headers to answer to")] = None,
    at_once: Annotated[int, typer.Option(min=1, help="runs at the same time")] = 4,
    trust: Trusted = False,
) -> None:
    """Serve systems as tools: over stdio to the program that started this, or over HTTP at /mcp until Ctrl-C."""
    from agentkit import mcp

    with redirect_stdout(sys.stderr):  # stdout is the protocol's; a notebook may print
        systems = [_load(reference, trust) for reference in references]
    if http is None:
        mcp.serve(systems, at_once=at_once)
        return
    import uvicorn

    app = mcp.asgi_app(systems, host=host, allowed_hosts=allow_host or (), at_once=at_once)
    print(f"MCP on http://{host}:{http}/mcp: {', '.join(s.name for s in systems)} (Ctrl-C to stop)", file=sys.stderr)
    uvicorn.run(app, host=host, port=http, log_level="warning", ws="none")


def _load(reference: str, trust: bool) -> Any:
    from agentkit_tracking import loading, source

    if reference.split(":")[0].endswith((".py", ".ipynb")):
        return source.load_entry(source.parse_entry(reference))
    return loading.load(reference, trust=trust)


def _server(target: str, header: list[str] | None, env: list[str] | None, start_s: float) -> Server:
    from agentkit.mcp import Server

    headers, variables = _pairs("--header", header), _pairs("--env", env)
    if _is_url(target):
        if variables:
            raise UsageError("--env is for a command; a URL takes --header")
        return Server.http(target, headers=headers, start_s=start_s)
    if headers:
        raise UsageError("--header is for a URL; a command takes --env")
    if not (words := shlex.split(target)):
        raise UsageError("give the command line of an MCP server in quotes, or its URL")
    return Server.stdio(*words, env=variables, start_s=start_s)


def _is_url(target: str) -> bool:
    return target.startswith(("http://", "https://"))


def _pairs(option: str, given: list[str] | None) -> dict[str, str]:
    pairs = [item.partition("=") for item in given or []]
    if wrong := [name for name, sign, _ in pairs if not sign]:
        raise UsageError(f"{option} takes NAME=VALUE, got {wrong[0]!r}")
    return {name: value for name, _, value in pairs}
