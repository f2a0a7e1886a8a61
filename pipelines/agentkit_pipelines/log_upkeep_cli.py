"""What keeps the run log in order: `agentkit log fold`, `verify`, `compact`, `prune` and `erase`."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from agentkit_pipelines import terminal
from agentkit_pipelines.gate_cli import CRASH, OK
from agentkit_pipelines.log_cli import KEEP, log_app

if TYPE_CHECKING:
    from agentkit_tracking.runlog.folding import Folded
    from agentkit_tracking.runlog.retention import Kept

NOT_WHOLE = 3
_DAYS = 36_500  # a hundred years
_SHOWN = 50  # faults in a terminal

OlderThan = Annotated[
    int, typer.Option("--older-than", min=0, max=_DAYS, help="days (UTC) that stay as they are, beside today")
]


@log_app.command(rich_help_panel=KEEP)
def fold(
    every: Annotated[
        float | None, typer.Option(min=0.1, max=86_400, help="fold again every so many seconds, until Ctrl-C")
    ] = None,
) -> None:
    """Bring what processes have appended into the database, and sign how far it goes.

    Readers see everything at once without it; folded, questions are answered faster, and changes are found. A reader folds
    by itself when much is waiting, so this is for a timer, or for `--every 60` beside long-running services.
    """
    import time

    from agentkit_tracking.runlog import RunLog

    log = RunLog()
    while True:
        done = log.fold()
        if done is None or done.busy or done.events or every is None:
            _say(done)
        if every is None:
            raise typer.Exit(CRASH if done is not None and done.busy else OK)
        time.sleep(every)


def _say(done: Folded | None) -> None:
    from rich.markup import escape

    out = terminal.console()
    if done is None:
        out.print("another process is folding just now; it takes everything along")
        return
    out.print(f"{done.events} events folded")
    for segment, found in done.findings:
        out.print(f"[red]{segment}, byte {found.offset}: {escape(found.why)}[/red]")
    if done.busy:
        out.print(f"[yellow]stopped early: {escape(done.busy)}[/yellow]", soft_wrap=True)


@log_app.command(rich_help_panel=KEEP)
def verify(
    strict: Annotated[
        bool, typer.Option("--strict", help="folded events that no signature covers are faults, too")
    ] = False,
    checkpoint: Annotated[
        str | None, typer.Option(help="as an earlier verify printed it: the log must still hold it")
    ] = None,
) -> None:
    """Check every event against its hash chain and the signed heads: segment files, database and archives.

    Finds what was changed, is missing, or stands elsewhere, and says which event of which run. Keep the checkpoint that it
    prints somewhere else: with it, a log whose end was cut off is found, too. What it cannot find: tracking/RUNLOG.md.

    Exit code 3: something is not as it was written.
    """
    from rich.markup import escape

    from agentkit_tracking.control.card import visible
    from agentkit_tracking.runlog import RunLog
    from agentkit_tracking.runlog.verification import verify as check

    with terminal.progress("verifying events") as progress:
        report = check(RunLog(), strict=strict, checkpoint=checkpoint, progress=progress)
    out = terminal.console()
    for fault in report.faults[:_SHOWN]:
        out.print(f"[red]✗[/red] {escape(visible(str(fault)))}", soft_wrap=True)
    if len(report.faults) > _SHOWN:
        out.print(f"[red]✗[/red] and {len(report.faults) - _SHOWN} more")
    for remark in report.remarks:
        out.print(f"[yellow]![/yellow] {escape(remark)}", soft_wrap=True)
    word = "[bold]as it was written[/bold]" if report.is_whole else "[bold red]not as it was written[/bold red]"
    out.print(
        f"{word}: {report.events} events in {report.segments} segments, {report.signed} of them under a signed head"
    )
    if report.checkpoint:
        out.print(f"[dim]checkpoint {report.checkpoint}[/dim]")
    raise typer.Exit(OK if report.is_whole else NOT_WHOLE)


@log_app.command(rich_help_panel=KEEP)
def compact(older_than: OlderThan = 30) -> None:
    """Move past days from the database into Parquet files, `archive/day=2026-11-20/….parquet`; they are asked as before.

    For logs that grow: the database stays small and fast, and a day can be read with any tool. A lake is Parquet already:
    there many small files become few large ones, and `--older-than` is of no account.
    """
    from agentkit_tracking.runlog import RunLog, retention

    with terminal.progress("archiving days") as progress:
        done = retention.compact(RunLog(), older_than, progress=progress)
    out = terminal.console()
    if done.files is not None:
        out.print(f"the lake has {done.files} Parquet files now, and is {done.freed_bytes / 1e6:.1f} MB smaller")
        return
    out.print(
        f"{_days(done)} archived, {done.archive_bytes / 1e6:.1f} MB; the database is {done.freed_bytes / 1e6:.1f} MB smaller"
    )


@log_app.command(rich_help_panel=KEEP)
def adopt(
    accept_erased: Annotated[
        bool,
        typer.Option(
            "--accept-erased", help="also events without private part whose erasure was lost with the database"
        ),
    ] = False,
) -> None:
    """Take in archives that the database does not know, since it was lost or comes from a backup; sign how far they go.

    Only what is whole, and follows from what the log has. Restore first what else there is of `log.duckdb` and `segments/`.

    Exit code 3: a file was left.
    """
    from rich.markup import escape

    from agentkit_tracking.runlog import RunLog, adoption

    with terminal.console().status("looking through archives"), closing(RunLog()) as log:
        done = adoption.adopt(log, accept_erased=accept_erased)
    out = terminal.console()
    for file, why in sorted(done.refused.items()):
        out.print(f"[red]✗[/red] {escape(file)}: {escape(why)}", soft_wrap=True)
    out.print(f"{done.events} events of {len(done.files)} archives are part of the log again")
    if done.blank:
        out.print(f"[yellow]![/yellow] {done.blank} of them have no private part, and count as erased from now on")
    if done.open_ends:
        out.print(
            f"[yellow]![/yellow] {done.open_ends} segments do not end in their archives: their processes were killed, or what "
            "came next was lost with the database",
            soft_wrap=True,
        )
    raise typer.Exit(NOT_WHOLE if done.refused else OK)


@log_app.command(rich_help_panel=KEEP)
def prune(
    older_than: Annotated[
        int, typer.Option("--older-than", min=0, max=_DAYS, help="days (UTC) that are kept, beside today")
    ],
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Remove past days for good. It is signed which events went, so that `verify` knows the gap; `compact` only moves them.

    Says where runs that go were to be forwarded and are not yet.
    """
    from agentkit_tracking.runlog import RunLog, retention
    from agentkit_tracking.runlog.upkeep import before, unforwarded

    log = RunLog()
    for consumer, runs in unforwarded(log, before(older_than)).items():
        terminal.console().print(
            f"[yellow]! {consumer} has not got {runs} of the runs that go, and never will once they are gone; first "
            f"`agentkit forward {consumer.partition('-')[0]}`[/yellow]",
            soft_wrap=True,
        )
    if not yes:
        typer.confirm(f"Remove everything logged before {before(older_than)} (UTC) for good?", abort=True, err=True)
    with terminal.progress("pruning") as progress:
        done = retention.prune(log, older_than, progress=progress)
    terminal.console().print(f"{_days(done)} are gone; {done.freed_bytes / 1e6:.1f} MB are free")


def _days(done: Kept) -> str:
    return f"{done.events} events of {done.days} day{'' if done.days == 1 else 's'}"


@log_app.command(rich_help_panel=KEEP)
def erase(
    user: Annotated[str, typer.Argument(help="as in `--user` and acting_for(), or with --hash the pseudonym")],
    why: Annotated[str, typer.Option(help="recorded, signed with the log; name nobody in it")],
    is_hash: Annotated[
        bool, typer.Option("--hash", help="USER is the pseudonym: the first 16 hex digits of the SHA-256")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Take one user's data out: texts, inputs, outputs and pseudonyms of their runs, of runs these called, and of feedback on them.

    Figures stay, and the chain stays whole: an event says which runs were erased, by whom and why. MLflow traces of the
    runs go, too. Not reached: the journal of durable runs, the approvals desk, notebooks, results of batches, exports,
    what was forwarded elsewhere, and backups.

    In a lake it goes for all machines. Their own segments lose it with their next fold; what they had not folded yet is not
    reached: fold there, and erase again.
    """
    from rich.markup import escape

    from agentkit_tracking.runlog import RunLog
    from agentkit_tracking.runlog.erasure import erase_user

    if not yes:
        typer.confirm("What this user's runs hold of people's text will be gone for good. Go on?", abort=True, err=True)
    given = {"user_hash": user} if is_hash else {"user": user}
    with terminal.progress("erasing") as progress, closing(RunLog()) as log:
        done = erase_user(log, **given, why=why, progress=progress)
    out = terminal.console()
    callers = f" and of {len(done.callers)} that called them" if done.callers else ""
    out.print(
        f"private parts of {done.events} events of {len(done.runs)} runs{callers}, and {done.traces} traces, are gone",
        soft_wrap=True,
    )
    if not done.runs:
        out.print("nothing in the log was this user's: runs are found by what `acting_for` was given, letter by letter")
    if done.others:
        out.print(
            "[yellow]not reached: what other machines had not folded yet. Their segments lose the rest with their next fold; "
            f"then erase again. They folded last (UTC): {escape(', '.join(done.others))}[/yellow]",
            soft_wrap=True,
        )
    if done.elsewhere:
        out.print(
            f"[yellow]not reached: what was forwarded to {escape(', '.join(done.elsewhere))}. Remove it there; from an MLflow with "
            "MLFLOW_TRACKING_URI set to it and this command once more[/yellow]",
            soft_wrap=True,
        )
    if done.traces_left:
        out.print(f"[yellow]traces may be left: {escape(done.traces_left)}; do it again then[/yellow]", soft_wrap=True)
        raise typer.Exit(CRASH)
