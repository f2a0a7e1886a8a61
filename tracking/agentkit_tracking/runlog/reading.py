"""What a reader sees: folded, archived and fresh events as views of one DuckDB connection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from agentkit.errors import AgentkitError, UsageError
from agentkit_tracking.runlog import stored
from agentkit_tracking.runlog.database import one, quoted
from agentkit_tracking.runlog.events import COLUMNS, ESCALATED, STEPS
from agentkit_tracking.runlog.segments import Line, lines, segment_files
from agentkit_tracking.runlog.unfolded import ROWS, Position, SegmentGone, as_table, parts, positions

if TYPE_CHECKING:
    import duckdb

    from agentkit_tracking.runlog.log import RunLog

_STEPS = ", ".join(quoted(kind) for kind in STEPS)
_NAMES = ", ".join(COLUMNS)
_SAID = 3  # damaged archives in one message
_TRIES = 5  # to read while somebody folds into a database that is new, or a lake
_WHOLE = f"segment, n, {_NAMES}, user_hash, session, event, private, salt, hash"
# Of an outcome's event. To a person: one was asked, or the run's own answer is to hand over.
IS_ESCALATED = f"(coalesce(approvals, 0) > 0 OR coalesce(result = {quoted(ESCALATED)}, false))"
_VIEWS = (
    # One row an event. `private` is what people wrote; null once it was erased.
    f"CREATE VIEW events AS SELECT segment || '-' || n AS id, segment, n, {_NAMES}, user_hash, session, "
    "private::JSON AS private, hash FROM every_event",
    # One row a finished run.
    f"""CREATE VIEW outcomes AS SELECT run_id, parent, system, release, stage, kind, started_at, seconds, state, route,
        error_type, waited_s, model_calls, tool_calls, tokens_in, tokens_out, usd, planning_s, execution_s, reflection_s,
        effects, failed_calls, approvals, refusals, is_degraded, {IS_ESCALATED} AS is_escalated, budget_used, user_hash, session,
        logged_at AS ended_at
    FROM every_event WHERE type = 'outcome'""",
    # One row a run, those under way (RUNNING) or broken off (INTERRUPTED) included.
    f"""CREATE VIEW runs AS SELECT run_id, system, release, kind, started_at, seconds, state, coalesce(private->>'route', route) AS route,
        private->'inputs' AS inputs, private->'output' AS output, private->>'error' AS error,
        coalesce(private->'effects', '[]'::JSON) AS effects,
        {{planning: planning_s, execution: execution_s, reflection: reflection_s}} AS phases,
        waited_s, model_calls, tool_calls, tokens_in, tokens_out, usd, parent, user_hash, session, stage,
        private->>'degraded' AS degraded, private->'partial' AS partial, budget_used, error_type, failed_calls, approvals,
        refusals, {IS_ESCALATED} AS is_escalated
    FROM every_event WHERE type = 'outcome'
    UNION ALL BY NAME
    SELECT b.run_id, b.system, b.release, b.kind, b.started_at,
        CASE WHEN s.state = 'open' THEN 'RUNNING' ELSE 'INTERRUPTED' END AS state, b.private->'inputs' AS inputs,
        0.0 AS seconds, 0.0 AS waited_s, 0 AS model_calls, 0 AS tool_calls, 0 AS tokens_in, 0 AS tokens_out, 0.0 AS usd,
        '[]'::JSON AS effects, b.parent, b.user_hash, b.session, b.stage
    FROM every_event b LEFT JOIN segment_states s ON s.segment = b.segment
    WHERE b.type = 'run'
        AND NOT EXISTS (SELECT 1 FROM every_event o WHERE o.type = 'outcome' AND o.run_id = b.run_id)""",
    # One row a step. Those of a run that another called are that run's.
    f"""CREATE VIEW steps AS SELECT run_id, system, release, step, type AS kind, coalesce(private->>'name', name) AS name, state, started, seconds, agent,
        private->'inputs' AS inputs, private->'outputs' AS outputs, model, coalesce(tokens_in, 0) AS tokens_in,
        coalesce(tokens_out, 0) AS tokens_out, CASE WHEN model IS NULL THEN coalesce(usd, 0) ELSE usd END AS usd,
        private->>'error' AS error, coalesce(cached, false) AS cached, coalesce(tries, 0) AS tries, result, error_type,
        stage, logged_at, CASE WHEN type = 'approval' THEN coalesce(private->>'decided_by', private->'outputs'->>'by') END AS decided_by,
        started_at AS asked_at, waited_s
    FROM every_event WHERE type IN ({_STEPS})""",
    # What people said of a run.
    """CREATE VIEW feedback AS SELECT run_id, logged_at AS given_at, name AS source, result AS label, rating, private->>'comment' AS comment,
        private->>'by' AS by, system, release, stage
    FROM every_event WHERE type = 'feedback'""",
)


class LogUnreadable(AgentkitError):
    """An archive of the run log is missing or damaged; what lies elsewhere is intact."""


@contextmanager
def connection(log: RunLog) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection with all views.

    Raises:
        LogBusy: another program keeps the database locked.
        LogUnreadable: an archive cannot be read. That may show only when a query comes upon the damaged place.
    """
    import duckdb

    of_query = (duckdb.ParserException, duckdb.CatalogException, duckdb.BinderException)  # before anything is read
    is_ready = False
    try:
        with _opened(log) as opened:
            is_ready = True
            yield opened
    except Exception as e:
        cause = e.__cause__ if isinstance(e, UsageError) else e  # `RunLog.sql` says what its query did wrong
        # A message that quotes damaged bytes may be no text.
        is_of_reading = isinstance(cause, duckdb.Error | UnicodeDecodeError)
        if cause is not None and is_of_reading and not (is_ready and isinstance(cause, of_query)):
            check_archives(log, cause)
        raise


def check_archives(log: RunLog, cause: BaseException) -> None:
    """Say which archives are not as they were written, if any.

    Raises:
        LogUnreadable: some are not.
    """
    import duckdb

    from agentkit_tracking.control.card import visible

    if log.database.is_shared:
        return  # a lake has none
    faults: list[stored.Fault] = []
    with suppress(duckdb.Error, UnicodeDecodeError), log.database.reading() as opened:
        if opened is not None:
            stored.open_kept(opened, log.folder, faults)
    if found := {fault.where: fault.what for fault in faults}:  # of each the last, which says the most
        some = "; ".join(f"{file}: {visible(what[:200])}" for file, what in list(found.items())[:_SAID])
        more = f"; and {len(found) - _SAID} more" if len(found) > _SAID else ""
        raise LogUnreadable(
            f"archives in {log.folder} are not as they were written: {some}{more}. Run `agentkit log verify`, and restore "
            "them from a backup"
        ) from cause


@contextmanager
def _opened(log: RunLog) -> Iterator[duckdb.DuckDBPyConnection]:
    import duckdb

    for tried in range(1, _TRIES + 1):
        with ExitStack() as stack:
            opened = stack.enter_context(log.database.reading())
            if opened is None:
                opened = stack.enter_context(duckdb.connect())
                opened.execute("SET TimeZone = 'UTC'")
            try:
                _prepare(log, opened)
            except SegmentGone:  # folded meanwhile, into a database that was not there or is seen as of before
                if tried == _TRIES:
                    raise
                continue
            yield opened
            return


def kept(log: RunLog, run_id: str) -> set[int] | None:
    """The places of the steps of a run that the log holds; None if it does not hold that it began.

    Raises:
        LogBusy: another program keeps the database locked.
    """
    with connection(log) as opened:
        query = f"SELECT step FROM every_event WHERE run_id = ? AND type IN ('run', {_STEPS})"
        return _places([step for (step,) in opened.execute(query, [run_id]).fetchall()])


def kept_in(path: Path, run_id: str) -> set[int] | None:
    """As `kept`, of what one segment holds of the run."""
    own = b'"run_id":' + orjson.dumps(run_id)
    told = [
        orjson.loads(line.event) for line in lines(path.read_bytes()) if isinstance(line, Line) and own in line.event
    ]
    return _places([event.get("step") for event in told if event["run_id"] == run_id])


def _places(steps: list[int | None]) -> set[int] | None:
    return {step - 1 for step in steps if step is not None} if steps else None


def _prepare(log: RunLog, opened: duckdb.DuckDBPyConnection) -> None:
    """Read what is fresh, and make the views."""
    has_events = _has_events(opened)
    # How far segments are folded first, then the segments: while a reader is in the room nobody folds.
    folded = positions(opened) if has_events else {}
    fresh = [
        part
        for path in segment_files(log.segments)
        for part in parts(path, folded.get(path.stem) or Position(path.stem), check=False)
    ]
    opened.register("lines", as_table(fresh))
    opened.execute(f"CREATE TEMP TABLE fresh AS {ROWS}")
    opened.unregister("lines")
    latest = {**folded, **{part.after.segment: part.after for part in fresh}}
    opened.execute("CREATE TEMP TABLE segment_states (segment VARCHAR, state VARCHAR)")
    if latest:
        opened.execute(
            "INSERT INTO segment_states SELECT unnest(?), unnest(?)",
            [list(latest), [position.state for position in latest.values()]],
        )
    sources = [f"SELECT {_WHOLE} FROM fresh WHERE is_json"]
    if has_events:
        sources.append(f"SELECT {_WHOLE} FROM log.events")
        sources += _archived(opened, log.folder)
    opened.execute(f"CREATE VIEW every_event AS {' UNION ALL BY NAME '.join(sources)}")
    for view in _VIEWS:
        opened.execute(view)


def _has_events(connection: duckdb.DuckDBPyConnection) -> bool:
    tables = "SELECT count(*) FROM duckdb_tables() WHERE database_name = 'log' AND table_name = 'events'"
    return bool(one(connection.execute(tables)))


def _archived(connection: duckdb.DuckDBPyConnection, folder: Path) -> list[str]:
    files = [row[0] for row in connection.execute("SELECT file FROM log.archives ORDER BY day").fetchall()]
    if not files:
        return []
    paths = ", ".join(quoted(folder / file) for file in files)
    return [f"SELECT {_WHOLE} FROM read_parquet([{paths}], union_by_name = true, hive_partitioning = false)"]
