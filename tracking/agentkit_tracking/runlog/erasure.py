"""One person's data taken out of the run log, on request; the chain can still be verified, and says that it happened.

First an `erasure` event names the runs; then their private parts go, from segment files, archives and database. A kill in between
leaves the event, and whoever erases next finishes what it names. From a lake they go for all machines; what lies on the disks of
others goes with their next fold.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentkit.errors import UsageError
from agentkit_tracking.home import author
from agentkit_tracking.runlog import lake_upkeep, reading, upkeep
from agentkit_tracking.runlog.blanking import HAVE, Named, blank, doom, named, of_runs
from agentkit_tracking.runlog.database import one, transaction
from agentkit_tracking.runlog.lake import Lake
from agentkit_tracking.runlog.recall import recall
from agentkit_tracking.runlog.segments import ERASED_SALT, Line, segment_files
from agentkit_tracking.runlog.trace_erasure import delete_traces, elsewhere

if TYPE_CHECKING:
    import duckdb

    from agentkit_tracking.runlog.log import RunLog

_log = logging.getLogger(__name__)
_HASH = re.compile(r"[0-9a-f]{16}")
_RUNS_IN_EVENT = 5_000
_PATIENCE_S = 60.0  # for readers to leave


@dataclass(frozen=True)
class Erased:
    """What an erasure did."""

    runs: tuple[str, ...] = ()
    events: int = 0
    traces: int = 0
    traces_left: str = ""  # why traces could not be removed
    elsewhere: tuple[str, ...] = ()  # other targets that runs were forwarded to; what they have is not removed
    callers: tuple[str, ...] = ()  # runs of which only outcome and handoffs were taken out
    # Other machines that fold into the same lake, and when they did last: what they had not folded by then was not reached.
    others: tuple[str, ...] = ()


def erase_user(
    log: RunLog,
    user: str | None = None,
    *,
    user_hash: str | None = None,
    why: str,
    by: str | None = None,
    progress: upkeep.Progress = upkeep.quiet,
) -> Erased:
    """Take out what runs for a user, the runs these called, and what people said of them hold of people's text.

    What is left of each event is what it was, when, how long and what it cost. Pseudonyms are private parts, too, so
    afterwards nobody can tell that the runs were this user's. Erasures that were cut off are finished on the way.
    Of runs for others that called such a run, outcome and handoffs lose their private parts: they hold its effects and results.

    It does not reach the journal of durable runs, the approvals desk, outputs of notebooks, results of batches,
    evaluations, exports and backups; nor runs of this user that are under way: erase again when they are over.

    Args:
        user: as given to `acting_for`.
        user_hash: instead of it, the pseudonym in the log: the first 16 hex digits of the SHA-256.
        why: recorded, redacted as payloads are; name nobody in it.
        by: who asked for it; by default `AGENTKIT_AUTHOR` or the name of the login.

    Raises:
        UsageError: no user is named, or no reason.
        LogBusy: folds or readers hold the log all the time.
    """
    pseudonym = _pseudonym(user, user_hash)
    if not why.strip():
        raise UsageError("an erasure is recorded with why: give a reason, without naming the person")
    log.fold()
    with lake_upkeep.in_turn(log.database):
        with upkeep.alone(log):
            upkeep.remove_orphans(log)
            with reading.connection(log) as connection:
                doomed, roots = _doomed(connection, pseudonym)
            if doomed != Named():
                announce(log, doomed, why, by or author())
        progress(0, 5)
        if isinstance(log.database, Lake):  # other machines must be able to read why before anything is gone
            upkeep.fold_all(log)
            lake_upkeep.share_erasures(log.database)
        count = 0
        with upkeep.alone(log):
            if doomed != Named():
                count += _erase_in_files(log, doomed)
                progress(1, 5)
                if not log.database.is_shared:
                    count += _erase_in_archives(log, doomed)
                progress(2, 5)
                count += _erase_in_database(log, doomed)
                progress(3, 5)
            others = _settle(log, pseudonym)
            recall(log.folder)
            progress(4, 5)
    traces, left = delete_traces(roots)
    progress(5, 5)
    if kept := sorted(log.folder.parent.glob("runs/*.jsonl.brought-over")):
        _log.warning("%s and %d more old files may hold data of anybody; delete them", kept[0], len(kept) - 1)
    return Erased(doomed.runs, count, traces, left, elsewhere(log.folder), doomed.callers, others)


def _pseudonym(user: str | None, user_hash: str | None) -> str:
    from agentkit.callers import Caller

    if (user is None) == (user_hash is None):
        raise UsageError("name the user, or the pseudonym as user_hash; one of them")
    found = Caller(user).user_hash if user_hash is None else user_hash.lower()
    if user is not None and not user.strip():
        raise UsageError("the user is empty")
    if found is None or not _HASH.fullmatch(found):
        raise UsageError(f"{found!r} is no pseudonym: those are 16 hex digits, the beginning of the user's SHA-256")
    return found


def _doomed(connection: duckdb.DuckDBPyConnection, pseudonym: str) -> tuple[Named, list[str]]:
    """The runs that have something to take out: the user's, those they called, their callers, and those of erasures before.

    With them the runs at the top that they belong to: these have the traces.
    """
    told = connection.execute("SELECT event FROM every_event WHERE type = 'erasure'").fetchall()
    before = [erasure for (event,) in told if (erasure := named(event)) is not None]
    doom(connection, Named(tuple(run for erasure in before for run in erasure.runs)))
    connection.execute("CREATE TEMP TABLE parents AS SELECT DISTINCT run_id, parent FROM every_event "
                       "WHERE run_id IS NOT NULL AND type IN ('run', 'outcome')")  # fmt: skip
    connection.execute(
        "INSERT INTO doomed WITH RECURSIVE below AS (SELECT DISTINCT run_id FROM every_event WHERE user_hash = ? AND run_id "
        "IS NOT NULL UNION SELECT p.run_id FROM parents p JOIN below b ON p.parent = b.run_id) SELECT run_id, true FROM below",
        [pseudonym],
    )
    connection.execute(
        "INSERT INTO doomed WITH RECURSIVE above AS (SELECT parent FROM parents WHERE run_id IN (SELECT run_id FROM doomed) "
        "UNION SELECT p.parent FROM parents p JOIN above a ON p.run_id = a.parent) "
        "SELECT parent, false FROM above WHERE parent IS NOT NULL AND parent NOT IN (SELECT run_id FROM doomed)"
    )
    connection.execute(
        "INSERT INTO doomed SELECT unnest(?::VARCHAR[]), false",
        [sorted({run for erasure in before for run in erasure.callers})],
    )
    rows = connection.execute(
        "SELECT run_id, run_id IN (SELECT run_id FROM doomed WHERE is_whole) AS is_whole FROM every_event "
        f"WHERE {HAVE} GROUP BY 1 ORDER BY 1"
    ).fetchall()
    roots = connection.execute(
        "WITH RECURSIVE above AS (SELECT run_id, parent FROM parents WHERE run_id IN (SELECT run_id FROM doomed) "
        "UNION SELECT p.run_id, p.parent FROM parents p JOIN above a ON p.run_id = a.parent) "
        "SELECT DISTINCT run_id FROM above WHERE parent IS NULL ORDER BY ALL"
    ).fetchall()
    return Named(tuple(run for run, whole in rows if whole), tuple(run for run, whole in rows if not whole)), [
        run_id for (run_id,) in roots
    ]


def announce(log: RunLog, doomed: Named, why: str, by: str) -> None:
    """Say in the chain what will be gone; on the disk before anything is."""
    from agentkit.redaction import redact

    private = {"by": by, "why": redact(why)}
    log.write(
        [
            ({"type": "erasure", "name": "user", "runs": [], field: runs[first : first + _RUNS_IN_EVENT]}, private)
            for field, runs in (("runs", doomed.runs), ("callers", doomed.callers))
            for first in range(0, len(runs), _RUNS_IN_EVENT)
        ]
    )


def _erase_in_files(log: RunLog, doomed: Named) -> int:
    doomed_line, folded = of_runs(doomed), _folded_up_to(log)
    count = 0
    for path in segment_files(log.segments):
        next_byte = folded.get(path.stem, 0)
        fresh = 0

        def chosen(line: Line, next_byte: int = next_byte) -> bool:
            nonlocal fresh
            is_doomed = doomed_line(line)
            fresh += is_doomed and line.offset >= next_byte  # the others are counted where they are folded to
            return is_doomed

        blank(path, chosen)
        count += fresh
    return count


def _folded_up_to(log: RunLog) -> dict[str, int]:
    with log.database.reading() as connection:
        if connection is None:
            return {}
        return dict(connection.execute("SELECT segment, next_byte FROM log.segments").fetchall())


def _erase_in_archives(log: RunLog, doomed: Named) -> int:
    """Write archives that have something to take out anew; the old file goes when nobody reads it any more."""
    count = 0
    with log.database.reading() as connection:
        archives = [] if connection is None else upkeep.archived(connection)
    for day, file, *_ in archives:
        source = upkeep.parquet(log.folder, [file])
        with log.database.reading() as connection:
            assert connection is not None
            doom(connection, doomed)
            found = int(one(connection.execute(f"SELECT count(*) FROM {source} WHERE {HAVE}")))
        if not found:
            continue
        new = upkeep.new_archive(log, day)
        with log.database.reading() as connection:
            assert connection is not None
            doom(connection, doomed)
            events, digest = upkeep.write_archive(connection, _without(source), log.folder, new)
        with log.database.writing(_PATIENCE_S) as connection:
            with transaction(connection):
                connection.execute(
                    "UPDATE log.archives SET file = ?, events = ?, sha256 = ?, archived_at = now() WHERE file = ?",
                    [new, events, digest, file],
                )
                upkeep.counts(connection, new)
                upkeep.expendable(connection, [file])
            (log.folder / file).unlink()  # here, where no reader is
        count += found
    return count


def _without(source: str) -> str:
    """All rows of a source, those of `doomed` runs without what is private."""
    blanked = {"user_hash": "NULL", "session": "NULL", "private": "NULL", "salt": f"'{ERASED_SALT.decode()}'"}
    changed = ", ".join(f"CASE WHEN {HAVE} THEN {value} ELSE {name} END AS {name}" for name, value in blanked.items())
    return f"SELECT * REPLACE ({changed}) FROM (SELECT {upkeep.WHOLE} FROM {source})"


def _erase_in_database(log: RunLog, doomed: Named) -> int:
    count = 0

    def take_out(connection: duckdb.DuckDBPyConnection) -> None:
        nonlocal count
        with transaction(connection):
            count = int(
                one(
                    connection.execute(
                        "UPDATE log.events SET user_hash = NULL, session = NULL, private = NULL, "
                        f"salt = '{ERASED_SALT.decode()}' WHERE {HAVE}"
                    )
                )
            )

    with log.database.writing(_PATIENCE_S) as connection:
        doom(connection, doomed)
        log.database.retrying(lambda: take_out(connection))
    return count


def _settle(log: RunLog, pseudonym: str) -> tuple[str, ...]:
    """Leave nothing readable behind: DuckDB keeps what was overwritten until its file is written anew.

    Returns:
        Other machines, if there may be any.
    """
    if not isinstance(log.database, Lake):
        upkeep.give_back(log, always=True)
        upkeep.remove_orphans(log)
        return ()
    with log.database.reading() as connection:
        assert connection is not None
        lake_upkeep.catch_up(log.database, log.segments, connection)
    lake_upkeep.settle(log.database, pseudonym=pseudonym)
    return lake_upkeep.others(log.database, log.segments)
