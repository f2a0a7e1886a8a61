"""The commands of whoever is on duty: `agentkit stop` and `agentkit resume`."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from agentkit.errors import AgentkitError, UsageError
from agentkit_pipelines import terminal
from agentkit_pipelines.options import Why

if TYPE_CHECKING:
    from agentkit_tracking.control.stops import Target

_GRAMMAR = (
    "SYSTEM, SYSTEM/3 (a version), release:ID, agent:NAME, tool:NAME, SYSTEM/agent:NAME or SYSTEM/tool:NAME; an agent or a "
    "tool without a system is stopped in all of them"
)
_VERSION = re.compile(r"[^/:\s]+/\d+")


def stop(
    target: Annotated[str | None, typer.Argument(help=_GRAMMAR)] = None,
    why: Annotated[str, typer.Option(help="recorded, and shown to whoever meets the stop")] = "",
    list_: Annotated[bool, typer.Option("--list", help="show what is stopped, and do nothing")] = False,
) -> None:
    """Stop a system, release, agent or tool in every process: no new runs, no further calls of running ones.

    Holds within a second. A call that is already on its way ends. `agentkit resume` undoes it.
    """
    from agentkit_tracking.control import HOLDS_WITHIN_S, ControlPlane

    if list_ or target is None:
        if not list_:
            raise UsageError(f"name what to stop: {_GRAMMAR}; or --list")
        _show_stops()
        return
    wanted = _target(target)
    ControlPlane().stops.stop(wanted, why)
    out = terminal.console()
    out.print(
        f"[bold]{_plain(str(wanted))}[/bold] is stopped; it holds in every process within {HOLDS_WITHIN_S:g} s, and ends "
        "runs at their next call",
        soft_wrap=True,
    )
    out.print(f"undo it: agentkit resume {_plain(str(wanted))} --why …", soft_wrap=True)
    if doubt := _unheard_of(wanted):
        terminal.console().print(f"[yellow]{_plain(doubt)}[/yellow]", soft_wrap=True)


def resume(
    target: Annotated[str, typer.Argument(help=f"as it was stopped (see `agentkit stop --list`): {_GRAMMAR}")],
    why: Why,
) -> None:
    """Let what was stopped run again. Other stops that cover it stay in force."""
    from agentkit_tracking.control import HOLDS_WITHIN_S, ControlPlane

    wanted = _target(target)
    stops = ControlPlane().stops
    stops.resume(wanted, why)
    out = terminal.console()
    out.print(
        f"[bold]{_plain(str(wanted))}[/bold] may run again, in every process within {HOLDS_WITHIN_S:g} s",
        soft_wrap=True,
    )
    if still := [str(s.target) for s in stops.in_force()]:
        out.print(f"still stopped: {_plain(', '.join(still))}", soft_wrap=True)


def _show_stops() -> None:
    from rich.table import Table

    from agentkit_tracking.control import ControlPlane
    from agentkit_tracking.statements import day

    out = terminal.console()
    found = ControlPlane().stops.in_force()
    if not found:
        out.print("nothing is stopped")
        return
    table = Table("stopped", "since (UTC)", "by", "why", "")
    for one in found:
        said = one.event.statement
        doubt = one.doubt or one.event.problem
        table.add_row(*map(_plain, (str(one.target), day(said.time), one.event.by, said.why, doubt)))
    out.print(table)


def _target(text: str) -> Target:
    from agentkit_tracking.control.stops import Target

    if _VERSION.fullmatch(text):
        from agentkit_tracking import loading

        return Target(release=loading.resolve(text).release_id)
    return Target.parse(text)


def _unheard_of(target: Target) -> str | None:
    """A slip in a name stops nothing; said when neither the run log nor the registry knows the name."""
    from difflib import get_close_matches

    known: set[str] = set()
    kind = next(k for k in ("tool", "agent", "release", "system") if getattr(target, k))
    name: str = getattr(target, kind)
    query = {
        "system": "SELECT DISTINCT system FROM runs",
        "release": "SELECT DISTINCT release FROM runs",
        "agent": "SELECT DISTINCT agent FROM steps",
        "tool": "SELECT DISTINCT name FROM steps WHERE kind = 'tool'",
    }[kind]
    from agentkit_tracking.runlog import RunLog

    with suppress(AgentkitError):
        known |= {row[0] for row in RunLog().sql(query).iter_rows() if row[0]}
    if kind == "system" and name not in known:
        from agentkit_tracking import registry

        with suppress(AgentkitError):
            known |= set(registry.systems())
    if any(one.startswith(name) if kind == "release" else one == name for one in known):
        return None
    near = get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"no {kind} {name} has run or is registered here: if that is a slip, nothing real is stopped.{hint}"


def _plain(text: str) -> str:
    from rich.markup import escape

    from agentkit_tracking.control.card import visible

    return escape(visible(text))
