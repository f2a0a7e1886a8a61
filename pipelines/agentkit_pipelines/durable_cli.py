"""The commands of durable runs: `agentkit runs`, `agentkit work`, and `agentkit run --durable`."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentkit.errors import UsageError
from agentkit_pipelines import terminal

if TYPE_CHECKING:
    from agentkit.approvals import Approver
    from agentkit.records import RunRecord

Database = Annotated[
    str | None,
    typer.Option(help="sqlite:///PATH or postgresql://…; default: AGENTKIT_DURABLE, or durable.db in the home"),
]


def run_durably(
    reference: str,
    inputs: dict[str, Any],
    *,
    run_id: str | None = None,
    approver: Approver | None = None,
    database: str | None = None,
) -> RunRecord:
    """`agentkit run --durable`: one run here that outlives this process; says how to go on with it if it is stopped.

    Args:
        approver: asked where a person has to decide; default: the approvals desk.

    Raises:
        UsageError: the reference is a file (another process could not know that it runs the same), or names nothing.
    """
    from agentkit_tracking import durable

    if reference.split(":")[0].endswith((".py", ".ipynb")):
        raise UsageError(f"{reference} is a draft, and a durable run keeps its release; `agentkit register` it first")
    with durable.Runner(database, take_up=False, approver=approver) as runner:
        handle = runner.start(reference, inputs, run_id=run_id)
        try:
            return handle.result()
        except BaseException:
            terminal.console().print(
                f"run {handle.run_id} is kept; `agentkit work` goes on with it where it stopped", soft_wrap=True
            )
            raise


def runs(
    run_id: Annotated[str | None, typer.Argument(help="one run only")] = None,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="only those that are not over")] = False,
    limit: Annotated[int, typer.Option(min=1, help="the newest so many")] = 20,
    again: Annotated[bool, typer.Option("--resume", help="put RUN_ID, which was given up, back on its queue")] = False,
    database: Database = None,
) -> None:
    """Durable runs, and where they stand."""
    from rich.markup import escape
    from rich.table import Table

    from agentkit_tracking import durable

    if again:
        if run_id is None:
            raise UsageError("name the run to resume")
        durable.resume(run_id, database)
    found = [durable.status(run_id, database)] if run_id else durable.runs(database, limit=limit, unfinished=unfinished)
    if not found:
        terminal.console().print("nothing runs durably" if unfinished else "nothing was run durably yet")
        return
    asked = _asked() if any(one.state in ("running", "interrupted") for one in found) else {}
    table = Table("began", "system", "release", "state", "steps", "restarts", "last", "run")
    for one in found:
        began = one.began[:16].replace("T", " ")
        counts = str(one.steps), str(one.restarts)
        release = (one.release or "draft")[:12]
        state = f"{one.state}, asks {asked[one.run_id]}" if one.run_id in asked else one.state
        table.add_row(began, one.system, release, state, *counts, escape(terminal.clip(one.last)), one.run_id)
    terminal.console().print(table)


def _asked() -> dict[str, str]:
    """The approval that a run waits for, by run id."""
    from agentkit_tracking.control import ControlPlane

    return {approval.request.run_id: approval.id for approval in ControlPlane().desk.waiting()}


def work(
    queue: Annotated[
        list[str] | None, typer.Option("--queue", "-q", help="a queue to work on; several may be given")
    ] = None,
    module: Annotated[
        list[str] | None,
        typer.Option("--module", "-m", help="a module, or FILE.py, that registers work (`durable.work`)"),
    ] = None,
    at_once: Annotated[
        int, typer.Option(min=1, help="runs of a queue at once, those that wait for people included")
    ] = 8,
    until_idle: Annotated[
        bool, typer.Option("--until-idle", help="end when no durable run is left to be done")
    ] = False,
    database: Database = None,
) -> None:
    """Go on with durable runs whose process has died, and work on queues, until it is stopped (Ctrl-C, SIGTERM).

    A run that is under way when this process ends is kept: the next one goes on with it.
    """
    from agentkit_tracking import durable

    for name in module or []:
        _import(name)
    with _stopped_by_signal(), durable.Runner(database, queues=queue or [], at_once=at_once) as runner:
        terminal.console().print(
            f"working as {runner.executor} on {', '.join(queue or ['no queue'])} and on what dead processes have left",
            soft_wrap=True,
        )
        try:
            while not (until_idle and not durable.runs(database, unfinished=True)):
                runner.wait(1.0)
        except KeyboardInterrupt:
            terminal.console().print("stopped; what was under way is kept")


def _import(name: str) -> None:
    if not name.endswith(".py"):
        importlib.import_module(name)
        return
    path = Path(name).resolve()
    if not path.is_file():
        raise UsageError(f"there is no file {name}")
    sys.path.insert(0, str(path.parent))
    importlib.import_module(path.stem)


@contextmanager
def _stopped_by_signal() -> Iterator[None]:
    """SIGTERM, by which schedulers stop a process, ends it as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
