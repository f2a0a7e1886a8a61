"""The commands for people who decide: `agentkit approvals`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentkit.errors import UsageError
from agentkit_pipelines import terminal
from agentkit_pipelines.options import Why

if TYPE_CHECKING:
    from agentkit_tracking.control.decisions import Approval

approvals_app = typer.Typer(
    help="Calls of agents that wait for a person. A decision is signed with your key (`agentkit keys`); without one a call "
    "is rejected when its time is over. In the browser: `marimo run notebooks/approvals.py`.",
    no_args_is_help=True,
)
Identity = Annotated[str, typer.Argument(metavar="ID", help="id of the approval, or how it begins")]


@approvals_app.command("list")
def list_(
    everything: Annotated[bool, typer.Option("--all", help="decided and expired ones, too; the newest 100")] = False,
) -> None:
    """What waits, the one that expires first at the top."""
    from rich.markup import escape
    from rich.table import Table

    from agentkit_tracking.control import ControlPlane
    from agentkit_tracking.control.card import until
    from agentkit_tracking.control.decisions import decided

    desk, out = ControlPlane().desk, terminal.console()
    found = desk.all() if everything else desk.waiting()
    if not found:
        out.print("nothing was ever asked" if everything else "nothing waits for a decision")
        return
    table = Table("id", *(("agent", "wants", "outcome") if everything else ("expires in", "agent", "wants", "because")))
    for approval in found:
        request = approval.request
        agent = f"{request.system} / {request.agent}" if request.system else request.agent
        call = f"{request.tool}({', '.join(f'{k}={_json(v)}' for k, v in request.arguments.items())})"
        if everything:
            table.add_row(approval.id, _cell(agent), _cell(call), escape(_safe(decided(approval))))
        else:
            table.add_row(approval.id, until(approval.expires_at), *map(_cell, (agent, call, request.reason)))
    out.print(table)
    if not everything:
        out.print("[dim]agentkit approvals show ID · approve ID · reject ID --why …[/dim]")


@approvals_app.command()
def show(
    identity: Identity,
    full: Annotated[bool, typer.Option("--full", help="also everything that was asked, uncut, as JSON")] = False,
) -> None:
    """One approval on one card: what the agent was doing, why it stops, what is to be decided."""
    from dataclasses import asdict

    from agentkit_tracking.control import ControlPlane

    approval = ControlPlane().desk.get(identity)
    _print_card(approval)
    if full:
        print(json.dumps(asdict(approval.request), indent=2, default=str))  # ASCII: nothing in it acts on the terminal


@approvals_app.command()
def approve(
    identity: Identity,
    why: Annotated[str, typer.Option(help="recorded; needed together with --set")] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="name=value: approve with this argument instead; JSON, or plain text for a text"),
    ] = None,
) -> None:
    """Let the call be made, as asked or, with --set, with other arguments."""
    from agentkit_tracking.control import ControlPlane
    from agentkit_tracking.control.decisions import changed_arguments

    desk = ControlPlane().desk
    approval = desk.get(identity)
    if not set_:
        desk.decide(approval.id, "approve", why)
    else:
        changes = [_setting(item, approval.request.arguments) for item in set_]
        desk.decide(approval.id, "modify", why, changed_arguments(approval, changes))
    _print_recorded(desk.get(approval.id))


@approvals_app.command()
def reject(
    identity: Identity,
    why: Why,
) -> None:
    """The call is not made; the agent goes on without it."""
    from agentkit_tracking.control import ControlPlane

    desk = ControlPlane().desk
    approval = desk.get(identity)
    desk.decide(approval.id, "reject", why)
    _print_recorded(desk.get(approval.id))


def _setting(item: str, asked: dict[str, Any]) -> tuple[str, Any]:
    name, equals, text = item.partition("=")
    if not equals:
        raise UsageError(f"--set takes name=value, got {item!r}")
    if isinstance(asked.get(name), str) and not text.startswith('"'):
        return name, text
    try:
        return name, json.loads(text)
    except ValueError:
        raise UsageError(f"--set {name}: {text!r} is no JSON; write a text as {name}='\"…\"'") from None


def _print_card(approval: Approval) -> None:
    from rich.markdown import Markdown

    from agentkit_tracking.control.card import card

    terminal.console().print(Markdown(card(approval), code_theme="bw", hyperlinks=False))


def _print_recorded(approval: Approval) -> None:
    from rich.markup import escape

    from agentkit_tracking.control.approvals import POLL_S
    from agentkit_tracking.control.decisions import decided

    request = approval.request
    out = terminal.console()
    out.print(f"{approval.id} {escape(_safe(decided(approval)))}", soft_wrap=True)
    if approval.decision and approval.decision.arguments is not None:
        out.print(escape(_safe(f"{request.tool} is called with {_json(approval.decision.arguments)}")), soft_wrap=True)
    out.print(f"[dim]signed; a run that waits goes on within {POLL_S:g} s[/dim]")


def _cell(text: str) -> str:
    return terminal.clip(_safe(text))


def _safe(text: str) -> str:
    from agentkit_tracking.control.card import visible

    return visible(text)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
