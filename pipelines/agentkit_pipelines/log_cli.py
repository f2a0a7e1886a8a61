"""`agentkit log`: runs, SQL, events as they come, files for other tools; and `agentkit feedback`."""

from __future__ import annotations

import json
import math
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agentkit_pipelines import terminal
from agentkit_pipelines.incident_cli import RunId

if TYPE_CHECKING:
    import polars as pl

log_app = typer.Typer(
    help="The run log: every run, step, cost and piece of feedback, in one tamper-evident place. Without a command: the last runs.\n\n"
    "Ask it in SQL (`query`), watch it (`tail --follow`), hand it on (`export`), keep it in order (`fold`, `verify`, `compact`, "
    "`prune`, `erase`). Views and columns: tracking/RUNLOG.md.",
    invoke_without_command=True,
)
READ, KEEP = "Read", "Keep"
_MANY = 1_000_000
_SHOWN = 1_000  # rows of an answer in a terminal
_RECENT = (
    "SELECT started_at, system, left(release, 12) AS release, kind, route, state, round(seconds, 3) AS seconds, usd, run_id "
    "FROM runs ORDER BY started_at DESC LIMIT {limit}"
)


@log_app.callback()
def recent(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=_MANY, help="how many of the last runs, without a command")] = 20,
) -> None:
    """List the last runs, those under way included."""
    if context.invoked_subcommand is None:
        _print_table(_asked(_RECENT.format(limit=limit)))


@log_app.command(rich_help_panel=READ)
def query(
    sql: Annotated[str, typer.Argument(help="DuckDB SQL on `runs`, `outcomes`, `steps`, `feedback` and `events`")],
    as_json: Annotated[bool, typer.Option("--json", help="a JSON object a line, uncut")] = False,
) -> None:
    """Ask in SQL, e.g. `agentkit log query "SELECT route, count(*), sum(usd) FROM outcomes WHERE parent IS NULL GROUP BY route"`.

    A run's figures include those of the runs it called: sum over `parent IS NULL`. `outcomes` has finished runs only
    and no text, so it is the fast one for figures; `runs` also has inputs, outputs and runs under way.

    It reads, and nothing else. Of an answer the first 1,000 rows are shown, with --json all. Rows that are too wide for the terminal are shown as blocks, a value a line.

    Days: `WHERE started_at > now() - INTERVAL 7 DAY`. Text: `inputs->>'ticket'`.
    """
    frame = _asked(sql)
    if as_json:
        for named in frame.iter_rows(named=True):
            print(json.dumps(_plain(named), ensure_ascii=False))
        return
    _print_table(frame.head(_SHOWN), may_be_blocks=True)
    if frame.height > _SHOWN:
        terminal.console().print(
            f"[yellow]the first {_SHOWN:,} of {frame.height:,} rows; --json gives all, `agentkit log export` a whole view "
            "as a file[/yellow]",
            soft_wrap=True,
        )


def _asked(sql: str) -> pl.DataFrame:
    import polars as pl

    from agentkit_tracking.runlog import RunLog

    frame = RunLog().sql(sql)
    # Polars rounds decimals to 38 digits when it hands them over; a HUGEINT, as sums of whole numbers are, may have 39.
    decimals = [column for column in frame if column.dtype.is_decimal()]
    return frame.with_columns(
        pl.Series(column.name, [text and Decimal(text) for text in column.cast(pl.String)], pl.Object)
        for column in decimals
    )


def _plain(value: Any) -> Any:
    """A value as JSON has it: decimals as numbers, NaN and infinity as null, times as ISO 8601, what else there is as text."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime):
        return value.isoformat()
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _print_table(frame: pl.DataFrame, *, may_be_blocks: bool = False) -> None:
    """Rows as a table, or, where not even the longest words fit beside each other, each as a block of lines `name  value`."""
    from rich.measure import Measurement
    from rich.table import Table

    out = terminal.console()
    names = [_cell(name) for name in frame.columns]
    rows = [[_cell(value) for value in row] for row in frame.iter_rows()]
    table = Table(*names)
    for row in rows:
        table.add_row(*row)
    wide = Measurement.get(out, out.options.update(max_width=100_000), table).minimum > out.width
    if not (may_be_blocks and wide and rows):
        out.print(table)
        return
    for number, row in enumerate(rows, 1):
        block = Table(show_header=False, box=None, padding=(0, 2, 0, 0), title=f"row {number}", title_justify="left")
        for name, cell in zip(names, row, strict=True):
            block.add_row(f"[dim]{name}[/dim]", cell)
        out.print(block)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Decimal):
        text = f"{value:f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    if isinstance(value, float):
        return f"{value:.15g}"  # as many digits as every float has: 0.1 + 0.2 is 0.3
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    from agentkit_tracking.control.card import visible

    return terminal.clip(visible(value) if isinstance(value, str) else value)


@log_app.command(rich_help_panel=READ)
def tail(
    n: Annotated[int, typer.Option("-n", min=0, max=_MANY, help="how many of the last events first")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on with new ones, until Ctrl-C")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON object a line, uncut")] = False,
) -> None:
    """Show the last events, and with --follow those of every process on this machine as they come.

    Times are UTC. For a filter: `agentkit log tail -f --json | jq 'select(.type == "outcome" and .state == "FAILED")'`.
    """
    from agentkit_tracking.runlog import RunLog
    from agentkit_tracking.runlog.following import Follower

    log = RunLog()
    with Follower(log) as follower:
        shown = _last(log, n)
        for event in shown:
            _print(event, as_json)
        if follow:
            known = {event["id"] for event in shown}
            for event in follower.forever():
                if event["id"] not in known:
                    _print(event, as_json)


def _last(log: Any, n: int) -> list[dict[str, Any]]:
    """The last events, oldest first."""
    rows = log.sql(
        "SELECT * EXCLUDE (segment, n, hash, user_hash, session) FROM events ORDER BY logged_at DESC, segment DESC, n DESC LIMIT ?",
        [n],
    )
    found = []
    for row in reversed(rows.to_dicts()):
        event = {name: _plain(value) for name, value in row.items() if value is not None}
        event["private"] = json.loads(event["private"]) if "private" in event else None
        event["logged_at"] = row["logged_at"].isoformat(timespec="microseconds")  # as it was written
        found.append(event)
    return found


def _print(event: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(event, ensure_ascii=False), flush=True)
        return
    color = {"outcome": "bold", "feedback": "cyan", "approval": "yellow", "segment": "dim", "erasure": "magenta"}
    style = "red" if event.get("error_type") else color.get(event["type"])
    terminal.console().print(_sentence(event), style=style, soft_wrap=True, markup=False)


def _sentence(event: dict[str, Any]) -> str:
    """An event on one line: when, which run, what, how it ended, what it took, and the beginning of its text."""
    private = event["private"]
    text = "erased" if private is None else next((private[k] for k in _TEXTS if private.get(k) is not None), "")
    words = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, default=str)
    ended = event.get("result") or (event.get("state") if event["type"] in ("outcome", "transition") else None)
    parts = (
        str(event["logged_at"])[11:23],
        str(event.get("run_id", ""))[:8].ljust(8),
        event["type"].ljust(10),
        " / ".join(str(event[k]) for k in ("system", "agent") if k in event),
        event.get("name"),
        ended,
        event.get("error_type"),
        f"{event['seconds']:.3f} s" if event.get("seconds") else None,
        f"USD {event['usd']:.6f}" if event.get("usd") else None,
        f"rated {event['rating']:g}" if event.get("rating") else None,
        " ".join(words.split())[:90],
    )
    return "  ".join(_padded(str(part)) for part in parts if part)


def _padded(part: str) -> str:
    from agentkit_tracking.control.card import visible

    return visible(part).ljust(len(part))


_TEXTS = ("error", "comment", "outputs", "output", "inputs", "why")


@log_app.command(rich_help_panel=READ)
def export(
    file: Annotated[Path, typer.Argument(help="FILE.parquet, FILE.csv or FILE.jsonl")],
    view: Annotated[
        Literal["runs", "outcomes", "steps", "feedback", "events"], typer.Option(help="what to write, whole")
    ] = "runs",
    force: Annotated[bool, typer.Option("--force", help="replace the file if it is there")] = False,
) -> None:
    """Write a whole view to a file, whole or not at all. For a part of it: `query --json`, or DuckDB itself (tracking/RUNLOG.md).

    CSV holds texts as they are: a spreadsheet may take one that begins with =, +, - or @ for a formula.

    It is a copy: what is erased from the log later stays in it.
    """
    from agentkit_tracking.runlog import RunLog, exporting

    rows = exporting.export(RunLog(), view, file, force=force)
    terminal.console().print(f"{rows} {view} written to {terminal.short(file)}", soft_wrap=True)


@log_app.command(rich_help_panel=KEEP)
def status() -> None:
    """Show what is folded and what is not, archives, sizes, and which processes have the database open."""
    from rich.table import Table

    from agentkit_tracking.runlog import RunLog
    from agentkit_tracking.runlog.status import status as find

    log = RunLog()
    found = find(log)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    last = "never" if found.folded_at is None else f"{found.folded_at:%Y-%m-%d %H:%M:%S} UTC"
    for name, value in (
        ("segments", f"{found.live} being written, {found.ended} ended; {_size(found.segment_bytes)}, of which {_size(found.fresh_bytes)} not folded yet"),
        ("database", f"{found.folded} events; {_size(found.database_bytes)}; last fold {last}"),
        ("archive", f"{found.archived} events of {found.days} days; {_size(found.archive_bytes)}"),
        ("pruned", f"{found.pruned} events"),
        ("signed", "all that is folded" if not found.unsigned else f"not the last events of {found.unsigned} segments: no key was at hand (`agentkit keys`)"),
        *([("ended twice", f"{found.ended_twice} runs: their program forked inside them, and each end counts")] if found.ended_twice else []),
        ("damage", "none found" if not found.findings else f"found at {found.findings} places; see `agentkit log verify`"),
        ("open in", ", ".join(found.holders) or "no other process"),
    ):  # fmt: skip
        table.add_row(f"[dim]{name}[/dim]", value)
    terminal.console().print(f"run log in {terminal.short(log.folder)}", soft_wrap=True)
    terminal.console().print(table)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def feedback(
    run_id: RunId,
    label: Annotated[
        Literal["accepted", "corrected", "rejected", "reopened", "escalated"] | None,
        typer.Option(help="what became of the result"),
    ] = None,
    rating: Annotated[float | None, typer.Option(help="from 1 (bad) to 5 (good)")] = None,
    comment: Annotated[str | None, typer.Option(help="kept redacted, as inputs are")] = None,
    source: Annotated[Literal["user", "reviewer", "system"], typer.Option(help="who says it")] = "user",
) -> None:
    """Say what a run was worth: an event beside it in the run log, never a change of it.

    Say it as often as you like; `agentkit log query "SELECT * FROM feedback"` has all of it.
    """
    from agentkit_tracking.runlog import feedback as feedbacks
    from agentkit_tracking.runlog import own

    whole = feedbacks.give(own(), run_id, label, rating=rating, comment=comment, source=source)
    terminal.console().print(f"kept for run {whole}")
